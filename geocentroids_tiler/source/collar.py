"""Collars: the flat black or white border of an image that says nowhere what is data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FLAT = 2
"""A collar's pixels, averaged over a cell of the map, are this near to pure black or white (grey levels)."""
NOISE = 16
"""Compression noise reaches this far from black or white in the last pixels of a collar (grey levels).

Measured on a JPEG mosaic with a black collar (Bolivia, 0.25 m): the area of dark pixels connected to the edge is
47.7 % of the image at 0, 48.09 % at 16, and then stops growing (48.10 % at 24).
"""
SHORTEST_EDGE_CELLS, SHORTEST_EDGE_SHARE = 8, 0.01
"""A collar takes at least this stretch of an edge from a corner on: cells, and share of the longer side."""
SHORTEST_INNER_SHARE = 0.1
"""A collar that reaches no corner takes at least this share of an edge. Deep shadows, ponds and overexposed roofs cut
by the edge are shorter."""
NOISE_REACH_PX = 16
"""Compression noise reaches this far from the edge of data: a block of JPEG with colours at half resolution."""
MAX_CELLS = 2048
"""Cells along the longer side of the map of collars."""


@dataclass(frozen=True)
class Collar:
    """Where an image is a collar, on a coarse map of it.

    Attributes:
        inside: cells that are collar and whose neighbours are too, of shape (rows, cols): no data whatever is there.
        near: those and the cells around them: no data where a pixel is nearly black or white.
        white: True for a white collar, False for a black one.
    """

    inside: NDArray[np.bool_]
    near: NDArray[np.bool_]
    white: bool

    def covers(self, pixels: NDArray[np.uint8], v: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which pixels belong to the collar.

        Args:
            pixels: of shape (H, W, 3).
            v: place of each pixel down the image, 0 at its top and 1 at its bottom; broadcasts to (H, W).
            u: place across the image, likewise.

        Returns:
            Of shape (H, W), True on the collar.
        """
        rows, cols = self.near.shape
        row = np.clip(np.nan_to_num(v) * rows, 0, rows - 1).astype(np.intp)
        col = np.clip(np.nan_to_num(u) * cols, 0, cols - 1).astype(np.intp)
        near: NDArray[np.bool_] = self.near[row, col]
        if near.any():
            near = self.inside[row, col] | (near & _is_flat(pixels, self.white, NOISE))
        return near


def find_collars(overview: NDArray[np.uint8], cell_px: float) -> tuple[Collar, ...]:
    """Find the collars of an image.

    A collar is a flat black or white area, at least three cells wide, that takes a stretch of the image's edge. Dark
    or bright ground inside the image does not reach the edge, and a shadow or a roof that does is too small.

    Args:
        overview: the whole image, of shape (rows, cols, 3), averaged to at most ``MAX_CELLS`` a side.
        cell_px: pixels of the image along a side of a cell, its pixel.

    Returns:
        None, one or two collars.
    """
    collars = []
    for white in (False, True):
        flat = _is_flat(overview, white, FLAT)
        if not _edge_runs(flat).any():  # most images: what takes no stretch of the edge is no collar
            continue
        reached = _reach_from_edge(_erode(flat))
        if reached.any():
            area = _dilate(reached)
            near = _dilate(area, max(2, math.ceil(NOISE_REACH_PX / cell_px)))
            collars.append(Collar(inside=_erode(area), near=near, white=white))
    return tuple(collars)


def _is_flat(pixels: NDArray[np.uint8], white: bool, tolerance: int) -> NDArray[np.bool_]:
    red, green, blue = np.moveaxis(pixels, -1, 0)  # channel by channel: numpy is slow along a short last axis
    if white:
        return np.asarray(np.minimum(np.minimum(red, green), blue) >= 255 - tolerance)
    return np.asarray(np.maximum(np.maximum(red, green), blue) <= tolerance)


def _dilate(mask: NDArray[np.bool_], cells: int = 1) -> NDArray[np.bool_]:
    """Extend a mask by a number of cells in all eight directions; beyond the edge there is none of it."""
    for _ in range(2):
        padded = np.pad(mask, ((cells + 1, cells), (0, 0)))
        below = np.cumsum(padded, axis=0, dtype=np.int32)  # how many are set from the top down to here
        mask = (below[2 * cells + 1 :] > below[: -2 * cells - 1]).T
    return mask


def _erode(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~_dilate(~mask)


def _reach_from_edge(area: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the part of ``area`` that is connected, through sides of cells, to a long enough run on the edge."""
    reached = _edge_runs(area)
    while True:
        before = np.count_nonzero(reached)
        reached = _fill_runs(area, reached)
        reached = _fill_runs(area.T, reached.T).T
        if np.count_nonzero(reached) == before:
            return reached


def _edge_runs(area: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep the runs on the edge of ``area`` that are long enough for a collar, of shape ``area.shape``."""
    shortest = max(SHORTEST_EDGE_CELLS, round(SHORTEST_EDGE_SHARE * max(area.shape)))
    runs = np.zeros_like(area)
    for line in np.s_[0, :], np.s_[-1, :], np.s_[:, 0], np.s_[:, -1]:
        runs[line] |= _long_runs(area[line], shortest)
    return runs


def _long_runs(line: NDArray[np.bool_], shortest: int) -> NDArray[np.bool_]:
    """Keep the runs of True in a line that are long enough; of those at its ends, ``shortest`` is."""
    number = np.cumsum(np.diff(line, prepend=False) != 0)  # odd inside runs, even between them
    length = np.bincount(number)[number]
    at_end = (number == number[0]) | (number == number[-1])
    return np.asarray(line & (length >= np.where(at_end, shortest, max(shortest, SHORTEST_INNER_SHARE * len(line)))))


def _fill_runs(area: NDArray[np.bool_], reached: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Extend ``reached`` to every horizontal run of ``area`` that it touches."""
    starts = area.copy()
    starts[:, 1:] &= ~area[:, :-1]
    run = np.cumsum(starts.ravel()).reshape(area.shape)  # number of the run that each cell of area is in
    touched = np.zeros(int(run.flat[-1]) + 1, bool)
    touched[run[reached & area]] = True
    return touched[run] & area
