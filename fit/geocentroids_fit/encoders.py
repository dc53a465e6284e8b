"""The encoder of a fit: described for the manifest, exported where the codebook is to carry it, and loaded."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from geocentroids_fit.config import EncoderConfig
from geocentroids_fit.files import new_file, read_json, write_json
from geocentroids_tiler.codebook import ENCODER_FILE, EncoderSection, PreprocessSection, file_sha256
from geocentroids_tiler.encoder import Encoder, encoder_source, load_encoder
from geocentroids_tiler.encoder.checkpoint import WEIGHTS, Checkpoint, locate_checkpoint
from geocentroids_tiler.encoder.export import export_onnx
from geocentroids_tiler.encoder.model_file import read_model
from geocentroids_tiler.errors import InputError

RECORD_FILE = "encoder.json"
MAX_WINDOW_PX = 4096


def describe_encoder(config: EncoderConfig, preprocess: PreprocessSection, folder: Path) -> EncoderSection:
    """Find an encoder and return how a manifest describes it.

    What the codebook is to carry (a local checkpoint, an ONNX file) is written to ``folder`` as ``encoder.onnx``; a
    model of the hub is named by its id and commit instead.

    Args:
        config: which encoder.
        preprocess: windows and normalising, which are part of an exported encoder.
        folder: where ``encoder.onnx`` is written; what is there already is kept if it was made of the same.

    Raises:
        EncoderError: if it cannot be had or is not a DINOv2.
        InputError: if windows are too large.
    """
    if config.model.endswith(".onnx"):
        return _copied(Path(config.model), preprocess, folder)
    checkpoint = locate_checkpoint(config.model, config.revision)
    dim, patch_px = int(checkpoint.config["hidden_size"]), int(checkpoint.config["patch_size"])
    if patch_px * preprocess.window_patches > MAX_WINDOW_PX:
        raise InputError(
            f"a window of {preprocess.window_patches} patches of {patch_px} px is over {MAX_WINDOW_PX} px; "
            "choose a smaller one"
        )
    named = checkpoint.name if checkpoint.revision else str(checkpoint.path.resolve())
    embed = config.embed if config.embed is not None else not checkpoint.revision
    described = EncoderSection(
        source=ENCODER_FILE if embed else named,
        revision=checkpoint.revision or None,
        architecture=checkpoint.architecture,
        dim=dim,
        patch_px=patch_px,
        register_tokens=checkpoint.registers,
        sha256=file_sha256(checkpoint.path / WEIGHTS) if (checkpoint.path / WEIGHTS).is_file() else None,
    )
    return _exported(checkpoint, described, preprocess, folder) if embed else described


def load_described(
    section: EncoderSection, preprocess: PreprocessSection, folder: Path, config: EncoderConfig
) -> Encoder:
    """Load an encoder that ``describe_encoder`` described.

    Raises:
        EncoderError: if it cannot be run here.
    """
    embedded = folder / ENCODER_FILE if section.source == ENCODER_FILE else None
    source = replace(encoder_source(section, preprocess, embedded), allow_download=True)
    return load_encoder(
        source, provider=config.provider, device=config.device, precision=config.precision, threads=config.threads
    )


def _exported(
    checkpoint: Checkpoint,
    described: EncoderSection,
    preprocess: PreprocessSection,
    folder: Path,
) -> EncoderSection:
    """Export a checkpoint with fp16 weights, unless that was done before."""
    made_of = {
        "checkpoint": described.sha256,
        "window_patches": preprocess.window_patches,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }
    path = folder / ENCODER_FILE
    record = read_json(folder / RECORD_FILE) or {}
    if record.get("made_of") != made_of or not path.is_file() or file_sha256(path) != record.get("sha256"):
        folder.mkdir(parents=True, exist_ok=True)
        report = export_onnx(
            str(checkpoint.path),
            path,
            window_patches=preprocess.window_patches,
            mean=preprocess.mean,
            std=preprocess.std,
            weights="fp16",
        )
        record = {"made_of": made_of, "sha256": report.sha256}
        write_json(folder / RECORD_FILE, record)
    return described.model_copy(update={"revision": None, "sha256": record["sha256"]})


def _copied(path: Path, preprocess: PreprocessSection, folder: Path) -> EncoderSection:
    """Take an ONNX file as it is; what it does not say of itself is taken to be that of DINOv2 with registers."""
    if not path.is_file():
        raise InputError(f"encoder {str(path)!r} is missing; expected an .onnx file")
    _, spec = read_model(path)
    if spec.window_patches != preprocess.window_patches:
        raise InputError(
            f"{path} takes windows of {spec.window_patches} patches, not {preprocess.window_patches}; "
            f"set the window to {spec.window_patches}, or export it again"
        )
    with new_file(folder / ENCODER_FILE) as part:
        shutil.copyfile(path, part)
    return EncoderSection(
        source=ENCODER_FILE,
        architecture=spec.metadata.get("architecture", "dinov2_with_registers"),
        dim=spec.dim,
        patch_px=spec.patch_px,
        register_tokens=int(spec.metadata.get("registers", 4)),
        sha256=file_sha256(path),
    )
