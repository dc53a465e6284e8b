"""Finds a DINOv2 checkpoint, safetensors only, and loads it through transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from geocentroids_tiler.encoder.checks import check_sha256
from geocentroids_tiler.errors import EncoderError

MODEL_TYPES = ("dinov2", "dinov2_with_registers")

WEIGHTS = "model.safetensors"

INDEX = "model.safetensors.index.json"

UNUSED_WEIGHTS = ("embeddings.mask_token",)
"""Only training reads it, so a checkpoint may lack it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk.

    Attributes:
        name: hub id, or the name of the local directory (its full path is nobody else's business).
        path: directory with ``config.json`` and safetensors weights.
        revision: commit of the hub's repository; empty for a local directory.
        config: the content of ``config.json``.
    """

    name: str
    path: Path
    revision: str
    config: dict[str, Any]

    @property
    def registers(self) -> int:
        """Register tokens of the model."""
        return int(self.config.get("num_register_tokens", 0)) if self.architecture != "dinov2" else 0

    @property
    def architecture(self) -> str:
        """One of ``MODEL_TYPES``."""
        return str(self.config["model_type"])


def locate_checkpoint(
    source: str, revision: str | None = None, *, local_files_only: bool = False, sha256: str | None = None
) -> Checkpoint:
    """Find the checkpoint ``source``, downloading what is missing.

    Args:
        source: a local directory, or a hub id such as ``facebook/dinov2-with-registers-base``.
        revision: commit, tag or branch on the hub.
        local_files_only: never ask the hub.
        sha256: hex digest that ``model.safetensors`` must have.

    Raises:
        EncoderError: if it cannot be had, is no DINOv2, or has no safetensors weights.
    """
    local = Path(source)
    path = local if local.is_dir() else _fetch(source, revision, local_files_only)
    try:
        config = json.loads((path / "config.json").read_text())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(f"{source}: has no config.json that names a model_type") from error
    if model_type not in MODEL_TYPES:
        raise EncoderError(f"{source}: model_type is {model_type!r}, allowed: {', '.join(MODEL_TYPES)}")
    if not (path / WEIGHTS).is_file() and not (path / INDEX).is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir()))
        raise EncoderError(f"{source}: found {found}, allowed: weights in {WEIGHTS} (pickled weights are never loaded)")
    if sha256 is not None and not (path / WEIGHTS).is_file():
        raise EncoderError(f"{source}: a SHA-256 is given, but the weights are in several files, not {WEIGHTS}")
    check_sha256(path / WEIGHTS, sha256)
    if path is local:
        return Checkpoint(name=path.resolve().name, path=path, revision="", config=config)
    return Checkpoint(name=source, path=path, revision=path.name, config=config)


def load_model(checkpoint: Checkpoint, attention: str) -> Any:
    """Return the transformers model in float32 on the CPU, in evaluation mode.

    Args:
        checkpoint: what ``locate_checkpoint`` found.
        attention: ``sdpa``, or ``eager`` for export.

    Raises:
        EncoderError: if weights are missing or do not fit.
    """
    try:
        with quiet():
            model, loading = transformers.AutoModel.from_pretrained(
                str(checkpoint.path),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attention,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises OSError, RuntimeError, ValueError, SafetensorError, ...
        raise EncoderError(f"{checkpoint.path}: cannot be loaded: {str(error).splitlines()[0]}") from error
    # transformers fills in missing weights with random numbers and goes on.
    missing = sorted(key for key in loading["missing_keys"] if not key.endswith(UNUSED_WEIGHTS))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise EncoderError(f"{checkpoint.path}: lacks the weights {', '.join(missing[:3])}{more}")
    return model.eval().requires_grad_(False)


def _fetch(source: str, revision: str | None, local_files_only: bool) -> Path:
    """Return the hub cache's folder of ``source``; nothing but its config and safetensors is downloaded."""
    patterns = ["config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors"]
    try:
        return Path(
            snapshot_download(source, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except HFValidationError as error:
        raise EncoderError(f"{source}: is neither a directory nor a hub id such as owner/name") from error
    except LocalEntryNotFoundError as error:
        why = "downloads are not allowed" if local_files_only else "the hub cannot be reached"
        raise EncoderError(f"{source}: is not in the hub's local cache, and {why}") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EncoderError(f"{source}: cannot be fetched from the hub: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers while it loads or saves; what matters of its report is checked and raised by the caller."""
    log = transformers.utils.logging
    level, bars, hub_bars_off = log.get_verbosity(), log.is_progress_bar_enabled(), are_progress_bars_disabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
        # transformers' switch also moves the hub's, which is not ours to leave changed
        (disable_progress_bars if hub_bars_off else enable_progress_bars)()
