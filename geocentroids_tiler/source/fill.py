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
    row, col = np.indices(valid.shape)
    left, right = _nearest_valid(valid)
    up, down = (index.T for index in _nearest_valid(valid.T))
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
    known = distance.min(axis=0) < far
    edge_row = np.select([side == 2, side == 3], [up, down], row).clip(0, height - 1)
    edge_col = np.select([side == 0, side == 1], [left, right], col).clip(0, width - 1)
    mirror_row = (2 * edge_row - row).clip(0, height - 1)
    mirror_col = (2 * edge_col - col).clip(0, width - 1)
    mirrored = valid[mirror_row, mirror_col]
    source_row = np.where(mirrored, mirror_row, edge_row)
    source_col = np.where(mirrored, mirror_col, edge_col)
    filled = pixels[source_row, source_col]
    filled[valid] = pixels[valid]
    return filled, known


def _nearest_valid(valid: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return for each cell the column of the nearest valid one to its left (-1: none) and right (width: none)."""
    width = valid.shape[1]
    col = np.arange(width)
    left = np.maximum.accumulate(np.where(valid, col, -1), axis=1)
    right = np.minimum.accumulate(np.where(valid, col, width)[:, ::-1], axis=1)[:, ::-1]
    return left, right
