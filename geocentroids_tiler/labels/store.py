"""Labels of chunks, and the memory that keeps them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.source import ReadOptions

_ENTRY_OVERHEAD_BYTES = 512
"""Python objects around the arrays of one entry, roughly."""


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """All that the labels of a chunk depend on.

    Attributes:
        url: the source.
        identity: of the source's content.
        options: how bands become RGB.
        codebook_digest: of the codebook's content.
        device: what computed them; number formats may differ in near ties.
        row: chunk row.
        col: chunk column.
    """

    url: str
    identity: str
    options: ReadOptions
    codebook_digest: str
    device: str
    row: int
    col: int


@dataclass(frozen=True, slots=True)
class ChunkLabels:
    """Labels and similarities of a chunk.

    Attributes:
        labels: of shape (s, s), uint16; 65535 where there is no data.
        similarity: of shape (s, s), float32; NaN where there is no data.
    """

    labels: NDArray[np.uint16]
    similarity: NDArray[np.float32]

    @classmethod
    def empty(cls, stride_patches: int) -> ChunkLabels:
        """Return a chunk without data."""
        shape = (stride_patches, stride_patches)
        return cls(np.full(shape, NODATA_LABEL, np.uint16), np.full(shape, np.nan, np.float32))

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        return self.labels.nbytes + self.similarity.nbytes + _ENTRY_OVERHEAD_BYTES


class LabelStore(ByteCache[ChunkKey, ChunkLabels]):
    """Labels of chunks in memory."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, lambda chunk: chunk.nbytes)
