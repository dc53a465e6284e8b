"""Labels of images that lie over each other, as one: whose label a patch gets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.engine import LabelBlock

T = TypeVar("T")

NOBODY = -1
"""Stands for no image."""


async def merge_labels(
    patches: PatchRange,
    footprints: Sequence[PatchRange],
    read: Callable[[int, PatchRange], Awaitable[LabelBlock | None]],
    *,
    by_similarity: bool,
) -> tuple[LabelBlock, NDArray[np.int32]]:
    """Return the labels of patches that several images show.

    A patch gets the label of the first image that has one for it; of the others no more is read than those before left
    open. With ``by_similarity`` it gets that of the image with the highest similarity, of equals the first.

    Args:
        patches: which ones.
        footprints: patches of each image, the first image first.
        read: returns the labels of a part of an image, by its number; None: the image cannot be read.
        by_similarity: whether the best label wins and not the first.

    Returns:
        The labels, and the number of the image that each is from, of shape ``patches.shape``, int32; -1 for none.
    """
    merged = LabelBlock.empty(patches)
    origin = np.full(patches.shape, NOBODY, np.int32)
    parts = [footprint.intersect(patches) for footprint in footprints]
    begun: list[asyncio.Task[None]] = []

    async def add(number: int, before: Sequence[asyncio.Task[None]]) -> None:
        part = parts[number]
        if not by_similarity:
            if before:  # their labels may leave nothing to do
                await asyncio.gather(*before)
            part = _open_part(merged, part)
        block = None if part.empty else await read(number, part)
        if before and by_similarity:
            await asyncio.gather(*before)  # so that of equals the first has come first
        if block is not None:
            _paste(merged, origin, block, number, by_similarity=by_similarity)

    try:
        for number, part in enumerate(parts):
            if not part.empty:
                before = [task for task, other in zip(begun, parts, strict=False) if not other.intersect(part).empty]
                begun.append(asyncio.ensure_future(add(number, before)))
            else:
                begun.append(asyncio.ensure_future(_nothing()))
        await asyncio.gather(*begun)
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
    return merged, origin


async def _nothing() -> None:
    """Do nothing."""


def _open_part(merged: LabelBlock, part: PatchRange) -> PatchRange:
    """Return the smallest rectangle that holds the patches of a part without a label."""
    missing = merged.labels[part.within(merged.patches)] == NODATA_LABEL
    rows, cols = np.flatnonzero(missing.any(axis=1)), np.flatnonzero(missing.any(axis=0))
    if not len(rows):
        return PatchRange(0, 0, 0, 0)
    return PatchRange(
        part.row_start + int(rows[0]),
        part.row_start + int(rows[-1]) + 1,
        part.col_start + int(cols[0]),
        part.col_start + int(cols[-1]) + 1,
    )


def _paste(
    merged: LabelBlock, origin: NDArray[np.int32], block: LabelBlock, number: int, *, by_similarity: bool
) -> None:
    """Write the labels of an image where they are wanted."""
    at = block.patches.within(merged.patches)
    labels, similarity = merged.labels[at], merged.similarity[at]
    wanted = labels == NODATA_LABEL
    if by_similarity:
        wanted |= block.similarity > similarity
    wanted &= block.labels != NODATA_LABEL
    labels[wanted] = block.labels[wanted]
    similarity[wanted] = block.similarity[wanted]
    origin[at][wanted] = number
