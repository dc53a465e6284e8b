"""Which patches of an image become features: spread over it, no more than a number, the same for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.shards import Features
from geocentroids_tiler.grid import ChunkIndex, PatchRange

SPREAD = 4
"""Patches looked at for each one that is kept: neighbours are alike, so a thin sample of much ground says more."""


def chunks_of_sample(
    patches: PatchRange, stride_patches: int, per_image: int, image: str, seed: int
) -> list[ChunkIndex]:
    """Choose the chunks of an image that features are drawn from.

    Args:
        patches: the image on its ground grid.
        stride_patches: patches a side of a chunk.
        per_image: the most features of the image.
        image: its name; with the seed it decides, so that other images do not matter.
        seed: of the sample.
    """
    wanted = SPREAD * -(-per_image // stride_patches**2)
    return spread_chunks(patches, stride_patches, wanted, np.random.default_rng([seed, *image.encode()]))


def spread_chunks(patches: PatchRange, stride_patches: int, wanted: int, rng: np.random.Generator) -> list[ChunkIndex]:
    """Choose chunks spread evenly over a range of patches: one at random in each cell of a lattice.

    Args:
        patches: where.
        stride_patches: patches a side of a chunk.
        wanted: about how many; all are taken where there are no more.
        rng: chooses.

    Returns:
        Chunks row by row.
    """
    area = patches.chunk_range(stride_patches)
    rows, cols = area.shape
    if rows * cols <= wanted:
        return list(patches.chunks(stride_patches))
    step = math.sqrt(rows * cols / max(1, wanted))
    chosen = [
        ChunkIndex(area.row_start + int(rng.integers(top, bottom)), area.col_start + int(rng.integers(left, right)))
        for top, bottom in pairwise(_edges(rows, step))
        for left, right in pairwise(_edges(cols, step))
    ]
    return sorted(chosen)


class Sample:
    """Features of one image, a random choice of at most ``per_image`` of all that are offered.

    Each patch has a random number, and the smallest are kept. So what is kept does not depend on the order in which
    chunks come, and memory does not grow with the image.
    """

    def __init__(self, image: str, seed: int, per_image: int, dim: int) -> None:
        self._image, self._seed, self._per_image = image.encode(), seed, per_image
        self._kept = Features(
            tokens=np.empty((0, dim), np.float16),
            rgb=np.empty((0, 3), np.uint8),
            row=np.empty(0, np.int64),
            col=np.empty(0, np.int64),
        )
        self._numbers = np.empty(0)

    def offer(self, chunk: int, offered: Features) -> None:
        """Take in the features of the sample's chunk number ``chunk``."""
        rng = np.random.default_rng([self._seed, chunk, *self._image])
        numbers = np.concatenate([self._numbers, rng.random(len(offered))])
        both = _join([self._kept, offered])
        if len(both) > self._per_image:
            best = np.argsort(numbers, kind="stable")[: self._per_image]
            both, numbers = _take(both, best), numbers[best]
        self._kept, self._numbers = both, numbers

    def features(self) -> Features:
        """Return what was kept, by row and column."""
        return _take(self._kept, np.lexsort((self._kept.col, self._kept.row)))


def _edges(length: int, step: float) -> list[int]:
    cells = max(1, min(length, round(length / step)))
    return [round(i * length / cells) for i in range(cells + 1)]


def _take(features: Features, index: NDArray[np.int64]) -> Features:
    return Features(**{key: array[index] for key, array in vars(features).items()})


def _join(parts: Sequence[Features]) -> Features:
    keys = ("tokens", "rgb", "row", "col")
    return Features(**{key: np.concatenate([getattr(part, key) for part in parts]) for key in keys})
