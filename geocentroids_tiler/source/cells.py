"""Cells: fixed squares of the ground that windows are put together from, so that neighbours share what is read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.source.dataset import ReadOptions

CELL_PATCHES = 8
"""Patches a side of a cell. Large cells make a lone window read more than it needs, small ones cost more calls."""
_ENTRY_OVERHEAD_BYTES = 512

CellKey = tuple[tuple[str, str, ReadOptions], ChunkIndex]
"""A dataset's key and the index of a cell, counted in ``CELL_PATCHES`` from the grid's origin."""


@dataclass(frozen=True, eq=False)
class Cell:
    """Pixels of a cell at the codebook's gsd.

    Attributes:
        pixels: RGB of shape (S, S, 3), uint8; of a warped image whatever is there, also where it is invalid.
        valid: pixels that are data, of shape (S, S), bool; None: all of them.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_] | None = None

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.pixels.nbytes + (0 if self.valid is None else self.valid.nbytes) + _ENTRY_OVERHEAD_BYTES


GAP = Cell(np.zeros((0, 0, 3), np.uint8))
"""A cell of an image that is not warped and has invalid pixels there: these are filled before they are resampled, from
whatever the window holds around them, so the cell has no pixels of its own."""
EMPTY = Cell(np.zeros((0, 0, 3), np.uint8))
"""Such a cell without any valid pixel."""


class CellCache(ByteCache[CellKey, Cell]):
    """Cells in memory, of the windows of one codebook."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, lambda cell: cell.nbytes)
