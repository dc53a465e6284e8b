"""Filling pixels that are no data, so that they do not pull the labels beside them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def fill_invalid(pixels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Continue an image into its invalid pixels by mirroring it at the nearest edge along the row or the column.

    Args:
        pixels: of shape (H, W, 3).
        valid: of shape (H, W), True where ``pixels`` is data.

    Returns:
        Of shape (H, W, 3): ``pixels`` where valid; elsewhere data from across the edge, or from the edge itself where
        the mirrored place is no data either. All zero where nothing is valid.
    """
    if valid.all():
        return pixels
    if not valid.any():
        return np.zeros_like(pixels)
    filled, known = pixels, valid
    while not known.all():  # twice at most: after the first pass every row with data is complete
        filled, known = _mirror_once(filled, known)
    return filled


def _mirror_once(pixels: NDArray[np.uint8], valid: NDArray[np.bool_]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    height, width = valid.shape
    at = np.flatnonzero(~valid).astype(np.int32)
    row, col = np.divmod(at, np.int32(width))
    left, right = (index.ravel()[at] for index in _nearest_valid(valid, axis=1))
    up, down = (index.ravel()[at] for index in _nearest_valid(valid, axis=0))
    far = height + width
    distance = np.stack(
        [
            np.where(left >= 0, col - left, far),
            np.where(right < width, right - col, far),
            np.where(up >= 0, row - up, far),
            np.where(down < height, down - row, far),
        ]
    )
    side = distance.argmin(axis=0)
    reached = distance.min(axis=0) < far
    edge_row = np.select([side == 2, side == 3], [up, down], row).clip(0, height - 1)
    edge_col = np.select([side == 0, side == 1], [left, right], col).clip(0, width - 1)
    mirror = (2 * edge_row - row).clip(0, height - 1) * width + (2 * edge_col - col).clip(0, width - 1)
    source = np.where(valid.ravel()[mirror], mirror, edge_row * width + edge_col)
    filled, known = pixels.reshape(-1, 3).copy(), valid.ravel().copy()
    filled[at] = filled[source]
    known[at] = reached
    return filled.reshape(pixels.shape), known.reshape(valid.shape)


def _nearest_valid(valid: NDArray[np.bool_], axis: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return for each cell where along an axis the nearest valid one before it (-1: none) and after it is (n: none)."""
    n = valid.shape[axis]
    index = np.arange(n, dtype=np.int32).reshape((1, n) if axis else (n, 1))
    before = np.maximum.accumulate(np.where(valid, index, np.int32(-1)), axis=axis)
    after = np.flip(np.minimum.accumulate(np.flip(np.where(valid, index, np.int32(n)), axis), axis=axis), axis)
    return before, after
