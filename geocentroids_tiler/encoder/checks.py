"""What all backends refuse, and in which words."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import ChunkLayout, TokenHandle, Windows
from geocentroids_tiler.errors import EncoderError

Metric = Literal["inner_product", "cosine", "l2"]

METRICS: tuple[Metric, ...] = ("inner_product", "cosine", "l2")

MAX_CENTROIDS = 65535
"""Labels are uint16, and 65535 says "no data"."""


def check_windows(windows: Windows, window_px: int) -> None:
    """Raise EncoderError unless windows are uint8 of shape (window_px, window_px, 3), in one array or one by one."""
    shape = (window_px, window_px, 3)
    if isinstance(windows, np.ndarray):
        if windows.dtype != np.uint8 or windows.ndim != 4 or windows.shape[1:] != shape:
            raise EncoderError(
                f"windows are {windows.dtype} {windows.shape}, allowed: uint8 (N, {window_px}, {window_px}, 3)"
            )
        return
    for window in windows:
        if window.dtype != np.uint8 or window.shape != shape:
            raise EncoderError(f"a window is {window.dtype} {window.shape}, allowed: uint8 {shape}")


def check_centroids(centroids: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return centroids as a C-ordered float32 array of shape (K, D).

    Raises:
        EncoderError: if K is 0 or over 65535, D is not ``dim``, or a value is not finite.
    """
    if centroids.ndim != 2 or centroids.shape[1] != dim or not 1 <= centroids.shape[0] <= MAX_CENTROIDS:
        raise EncoderError(f"centroids have shape {centroids.shape}, allowed: (K, {dim}), K from 1 to {MAX_CENTROIDS}")
    result = np.ascontiguousarray(centroids, np.float32)
    if not np.isfinite(result).all():
        raise EncoderError("centroids hold values that are not finite in float32")
    return result


def check_metric(metric: str) -> Metric:
    """Return ``metric`` if it is known, raise EncoderError otherwise."""
    if metric not in METRICS:
        raise EncoderError(f"metric is {metric!r}, allowed: {', '.join(METRICS)}")
    return metric


def check_layout(layout: ChunkLayout, window_patches: int) -> None:
    """Raise EncoderError unless windows of ``window_patches`` can be laid out like this."""
    if layout.window_patches != window_patches:
        raise EncoderError(
            f"the layout's windows are {layout.window_patches} patches a side, the encoder's {window_patches}"
        )
    stride, core = layout.stride_patches, layout.core_patches
    if layout.margin_patches < 0 or stride < 1 or core < stride or core % stride:
        raise EncoderError(
            f"margin {layout.margin_patches} and stride {stride} do not fit a window of {window_patches} patches; "
            "what the margins leave has to be a multiple of the stride"
        )


def check_chunks(chunks: Sequence[Sequence[TokenHandle]], parts: int) -> None:
    """Raise EncoderError unless every chunk has the tokens of ``parts`` windows."""
    for chunk in chunks:
        if len(chunk) != parts:
            raise EncoderError(f"a chunk has the tokens of {len(chunk)} windows, its layout says {parts}")


def check_precision(precision: str, backend: str, allowed: Collection[str]) -> None:
    """Raise EncoderError unless ``precision`` is ``auto`` or one that the backend computes in."""
    if precision != "auto" and precision not in allowed:
        raise EncoderError(f"precision is {precision!r}, allowed with {backend}: auto, {', '.join(allowed)}")


def check_batch(batch_windows: int) -> int:
    """Return ``batch_windows`` if a batch can hold that many windows, raise EncoderError otherwise."""
    if batch_windows < 1:
        raise EncoderError(f"batch_windows is {batch_windows}, allowed: 1 or more")
    return batch_windows


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise EncoderError if the SHA-256 of the file at ``path`` is not ``expected`` (None: anything goes)."""
    if expected is None:
        return
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read: {error.strerror}") from error
    if found != expected.lower():
        raise EncoderError(f"{path}: SHA-256 is {found}, expected {expected}")
