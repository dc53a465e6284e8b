"""Reading the windows of some chunks of an image, and what the features of these chunks need beside tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.encoder import ChunkLayout
from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.source import Dataset, read_windows

S = TypeVar("S", bound=np.generic)


@dataclass(frozen=True)
class Batch:
    """Chunks of one image that are read through one opening of its file.

    Attributes:
        dataset: the image.
        start: number of the first chunk among those of the image's sample.
        chunks: the chunks.
    """

    dataset: Dataset
    start: int
    chunks: tuple[ChunkIndex, ...]

    @property
    def stop(self) -> int:
        """Number of the chunk after the last."""
        return self.start + len(self.chunks)


@dataclass(frozen=True)
class ReadChunk:
    """A chunk that has data; s is its side in patches.

    Attributes:
        number: among the chunks of the image's sample.
        index: on the ground grid.
        labelled: patches that have data, of shape (s, s).
        rgb: mean colour of each patch, of shape (s, s, 3), uint8.
    """

    number: int
    index: ChunkIndex
    labelled: NDArray[np.bool_]
    rgb: NDArray[np.uint8]


@dataclass(frozen=True)
class ReadBatch:
    """What was read.

    Attributes:
        chunks: those that have data.
        windows: pixels of the windows that cover them, of shape (S, S, 3), uint8.
    """

    chunks: tuple[ReadChunk, ...]
    windows: dict[ChunkIndex, NDArray[np.uint8]]


@dataclass(frozen=True)
class Unreadable:
    """An image that turned out to be broken somewhere in its middle.

    Attributes:
        reason: what is wrong, for the user.
    """

    reason: str


def read_batch(batch: Batch, layout: ChunkLayout, patch_px: int) -> ReadBatch | Unreadable:
    """Read the own windows of chunks, and of those that have data the others that cover them.

    Args:
        batch: which chunks.
        layout: how windows cover a chunk.
        patch_px: pixels a side of a patch.
    """
    dataset = batch.dataset
    try:
        own = dict(zip(batch.chunks, read_windows(dataset, batch.chunks, patch_px), strict=True))
        useful = [chunk for chunk in batch.chunks if _own(own[chunk].labelled, layout).any()]
        needed = dict.fromkeys(window for chunk in useful for window in layout.windows_of(chunk))
        others = [window for window in needed if window not in own]
        read = own | dict(zip(others, read_windows(dataset, others, patch_px), strict=True))
    except GeocentroidsError as error:
        return Unreadable(str(error))
    chunks = tuple(
        ReadChunk(
            batch.start + number,
            chunk,
            _own(own[chunk].labelled, layout).copy(),
            _patch_colors(_own(own[chunk].pixels, layout, patch_px), patch_px),
        )
        for number, chunk in enumerate(batch.chunks)
        if chunk in useful
    )
    return ReadBatch(chunks, {window: read[window].pixels for window in needed})


def _own(of_window: NDArray[S], layout: ChunkLayout, per_patch: int = 1) -> NDArray[S]:
    """Return the part of a window's array (P * per_patch, P * per_patch, ...) that is its own chunk's."""
    s, m = layout.stride_patches * per_patch, layout.margin_patches * per_patch
    return of_window[m : m + s, m : m + s]


def _patch_colors(pixels: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Return the mean colour of each patch of a square (S, S, 3), of shape (S / patch_px, S / patch_px, 3)."""
    p = len(pixels) // patch_px
    mean = pixels.reshape(p, patch_px, p, patch_px, 3).mean(axis=(1, 3))
    rgb: NDArray[np.uint8] = np.rint(mean).astype(np.uint8)
    return rgb
