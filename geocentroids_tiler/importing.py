"""Make a codebook of two .npy files, and install codebooks: whole or not at all."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from geocentroids_tiler.codebook import (
    ENCODER_FILE,
    MAX_CENTROIDS,
    NAME_PATTERN,
    AssignmentSection,
    Codebook,
    EncoderSection,
    Manifest,
    Metric,
    PreprocessSection,
    file_sha256,
    load_codebook,
    save_codebook,
    validation_problems,
)
from geocentroids_tiler.errors import CodebookError, EncoderError, InputError

EMBEDDED_DIR = Path(__file__).parent / "codebooks"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WORK_DIR = ".partial"
DEFAULT_ARCHITECTURE = "dinov2_with_registers"
DEFAULT_REGISTER_TOKENS = 4
_REPO_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
REPO_ID = re.compile(rf"{_REPO_PART}/{_REPO_PART}")


def import_codebook(
    centroids_npy: Path,
    colors_npy: Path,
    *,
    name: str,
    encoder: str,
    preprocess: PreprocessSection,
    codebooks_dir: Path,
    metric: Metric = "inner_product",
    revision: str | None = None,
    architecture: str | None = None,
    register_tokens: int | None = None,
    version: str = "1",
    title: str | None = None,
    licence: str = "unknown",
    attribution: str = "",
    training: Mapping[str, JsonValue] | None = None,
    force: bool = False,
) -> Codebook:
    """Make a format-1 codebook from two .npy files and install it.

    Args:
        centroids_npy: array of shape (K, D), float16, float32 or float64 (stored as float32).
        colors_npy: array of shape (K, 3), uint8.
        name: the name it will be known by.
        encoder: a hub id ``owner/name``, a local directory with ``config.json`` and ``model.safetensors``, or an
            .onnx file, which becomes part of the codebook.
        preprocess: from pixels on the ground to windows.
        codebooks_dir: folder of installed codebooks, made if need be.
        metric: how a token finds its centroid.
        revision: commit of a hub id; none: found when the encoder is pulled.
        architecture: the encoder's model_type; none: that of its ``config.json``, else ``dinov2_with_registers``.
        register_tokens: the encoder's register tokens; none: those of its ``config.json``, else 4.
        version: version of the codebook.
        title: one line for lists and maps; none: the name.
        licence: licence of centroids and colours.
        attribution: whom a map that uses it has to name.
        training: facts about the fit.
        force: replace a codebook of that name.

    Returns:
        The installed codebook, as loaded from its directory.

    Raises:
        InputError: if an option has a wrong value, or the name is taken.
        CodebookError: if a file is not what is allowed; the text names it, what was found and what is allowed.
    """
    check_name(name, codebooks_dir, force=force)
    centroids, colors = read_arrays(centroids_npy, colors_npy)
    try:
        section, encoder_file = _encoder_section(encoder, centroids.shape[1], revision, architecture, register_tokens)
        manifest = Manifest(
            name=name,
            version=version,
            title=name if title is None else title,
            licence=licence,
            attribution=attribution,
            encoder=section,
            preprocess=preprocess,
            assignment=AssignmentSection(metric=metric),
            training=dict(training or {}),
        )
    except ValidationError as error:
        raise InputError(validation_problems(error)) from error
    codebook = Codebook(manifest, centroids, colors)
    return build_codebook(codebook, codebooks_dir, card=_card(manifest, len(codebook)), encoder=encoder_file)


def read_arrays(centroids_npy: Path, colors_npy: Path) -> tuple[NDArray[np.floating[Any]], NDArray[np.uint8]]:
    """Read and check centroids of shape (K, D), float16 or float32, and colours of shape (K, 3), uint8.

    Raises:
        CodebookError: if a file is not what is allowed; the text names it, what was found and what is allowed.
    """
    centroids = _read_npy(centroids_npy)
    if centroids.ndim != 2 or centroids.dtype.name not in ("float16", "float32", "float64") or not centroids.shape[1]:
        raise CodebookError(
            f"{centroids_npy} has shape {centroids.shape} and dtype {centroids.dtype.name}; "
            "allowed are shape (K, D) and dtype float16, float32 or float64"
        )
    if not 1 <= len(centroids) <= MAX_CENTROIDS:
        raise CodebookError(f"{centroids_npy} has {len(centroids)} rows; allowed are 1 to {MAX_CENTROIDS}")
    if centroids.dtype.name == "float64":
        with np.errstate(over="ignore"):  # what overflows is caught as not finite
            centroids = centroids.astype(np.float32)
    if bad := int((~np.isfinite(centroids)).sum()):
        raise CodebookError(f"{centroids_npy} has {bad} values that are not finite; allowed are numbers of float32")
    colors = _read_npy(colors_npy)
    if colors.shape != (len(centroids), 3) or colors.dtype != np.uint8:
        raise CodebookError(
            f"{colors_npy} has shape {colors.shape} and dtype {colors.dtype.name}; allowed are shape "
            f"({len(centroids)}, 3), one colour for each row of {centroids_npy.name}, and dtype uint8"
        )
    return np.ascontiguousarray(centroids, centroids.dtype.newbyteorder("=")), np.ascontiguousarray(colors)


def build_codebook(codebook: Codebook, codebooks_dir: Path, *, card: str, encoder: Path | None = None) -> Codebook:
    """Write a codebook and put it in place of what ``codebooks_dir`` has under its name."""
    work = codebooks_dir / WORK_DIR
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        draft = Path(folder) / codebook.name
        save_codebook(codebook, draft, card=card, encoder=encoder)
        return install(draft, codebooks_dir)


def install(draft: Path, codebooks_dir: Path) -> Codebook:
    """Move a checked codebook directory to its name in ``codebooks_dir``; what had that name is removed afterwards.

    The draft must lie on the same file system. If the move fails, what was installed before stays.
    """
    target = codebooks_dir / load_codebook(draft).name
    if not target.exists():
        draft.replace(target)
        return load_codebook(target)
    with tempfile.TemporaryDirectory(dir=codebooks_dir / WORK_DIR) as folder:
        old = Path(folder) / "old"
        target.replace(old)
        try:
            draft.replace(target)
        except OSError:
            old.replace(target)
            raise
    return load_codebook(target)


def check_name(name: str, codebooks_dir: Path, *, force: bool) -> None:
    """Raise InputError unless a codebook may be installed under ``name``."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise InputError(f"name {name!r} is not allowed; names match {NAME_PATTERN}")
    if (EMBEDDED_DIR / name).is_dir():
        raise InputError(f"{name!r} is the name of a built-in codebook; use another name")
    if (codebooks_dir / name).exists() and not force:
        raise InputError(f"a codebook named {name!r} is installed; use another name, or --force to replace it")


def check_onnx_file(path: Path) -> None:
    """Raise CodebookError unless a codebook may have the ONNX file at ``path`` as its encoder.

    The same check is made whenever the encoder is loaded. Where the onnx package is missing nothing can load it, and it
    is not checked here.
    """
    try:
        from geocentroids_tiler.encoder.model_file import read_model
    except ImportError:
        return
    try:
        read_model(path)
    except EncoderError as error:
        raise CodebookError(str(error)) from error


def _read_npy(path: Path) -> NDArray[Any]:
    """Map an .npy file into memory; pickled content is refused."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise CodebookError(f"{path} is missing; expected an .npy file") from error
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise CodebookError(f"{path} is not a readable .npy file (pickled objects are refused): {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise CodebookError(f"{path} is an .npz archive; allowed is an .npy file with one array")
    return array


def _encoder_section(
    encoder: str, dim: int, revision: str | None, architecture: str | None, register_tokens: int | None
) -> tuple[EncoderSection, Path | None]:
    """Return what the manifest says of an encoder, and the .onnx file to embed if it is one."""
    path = Path(encoder).expanduser()
    config: dict[str, Any] = {}
    embedded = path if path.suffix == ".onnx" else None
    sha256 = None
    if embedded is not None:
        if not path.is_file():
            raise InputError(f"encoder {encoder!r} is missing; expected an .onnx file")
        check_onnx_file(path)
        source = ENCODER_FILE
    elif path.is_dir():
        source, config = str(path.resolve()), _read_config(path)
        if not (path / WEIGHTS_FILE).is_file():
            raise CodebookError(f"{path / WEIGHTS_FILE} is missing; weights are read from safetensors only")
        sha256 = file_sha256(path / WEIGHTS_FILE)
        if config.get("hidden_size", dim) != dim:
            raise CodebookError(f"{path / CONFIG_FILE} has hidden_size {config['hidden_size']}; centroids allow {dim}")
    elif REPO_ID.fullmatch(encoder):
        source = encoder
    else:
        raise InputError(
            f"encoder {encoder!r} is neither a hub id OWNER/NAME, nor a directory with {CONFIG_FILE}, nor an .onnx file"
        )
    if register_tokens is None:
        plain = config.get("model_type", DEFAULT_ARCHITECTURE) != DEFAULT_ARCHITECTURE
        register_tokens = config.get("num_register_tokens", 0 if plain else DEFAULT_REGISTER_TOKENS)
    section = EncoderSection(
        source=source,
        revision=revision,
        architecture=architecture or config.get("model_type", DEFAULT_ARCHITECTURE),
        dim=dim,
        patch_px=config.get("patch_size", 14),
        register_tokens=register_tokens,
        sha256=sha256,
    )
    return section, embedded


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CodebookError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CodebookError(f"{file} holds {type(config).__name__}; allowed is an object")
    return config


def _card(manifest: Manifest, k: int) -> str:
    pre = manifest.preprocess
    return (
        f"# {manifest.title}\n\n"
        f"{k} centroids for tokens of `{manifest.encoder.source}` (dimension {manifest.encoder.dim}), "
        f"metric {manifest.assignment.metric}, {pre.gsd_m} m per pixel, windows of {pre.window_patches} patches.\n\n"
        f"Licence: {manifest.licence}. Attribution: {manifest.attribution or 'none given'}.\n\n"
        "Imported from two arrays. Whoever passes it on should add what it was fitted on and where it fails.\n"
    )
