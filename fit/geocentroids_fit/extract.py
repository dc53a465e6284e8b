"""From a folder of images to features: the tokens of labelled patches, exactly as serving computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from tqdm import tqdm

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder import ChunkLayout, Encoder, TokenHandle
from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    WindowPixels,
    open_dataset,
    read_windows,
    resolve_source,
    source_identity,
)

SUFFIXES = (".tif", ".tiff")
TIMEOUT_S = 10.0
"""Longest wait for an answer of a source; local files answer at once."""
CHUNKS_PER_BATCH = 16
"""Chunks whose windows are read through one opening of a file."""
TOKEN_CACHE_BYTES = 256 * 2**20
"""Windows kept because their neighbours' chunks need them too: two rows of windows of a wide image."""
SPREAD = 4
"""Patches looked at for each one that is kept: neighbours are alike, so a thin sample of much ground says more."""


@dataclass(frozen=True)
class Features:
    """Tokens and where they come from.

    Attributes:
        tokens: blended tokens, of shape (N, D), float16.
        rgb: mean colour of each patch, of shape (N, 3), uint8.
        image: number of each patch's image, of shape (N,), int32.
        row: its row on the image's ground grid, of shape (N,), int64.
        col: its column, of shape (N,), int64.
        images: names of the images, relative to the folder.
    """

    tokens: NDArray[np.float16]
    rgb: NDArray[np.uint8]
    image: NDArray[np.int32]
    row: NDArray[np.int64]
    col: NDArray[np.int64]
    images: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class _Window:
    """What is kept of an encoded window."""

    tokens: TokenHandle
    labelled: NDArray[np.bool_]
    rgb: NDArray[np.uint8]


def list_images(folder: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Return the GeoTIFFs below a folder, as sorted paths relative to it.

    Args:
        folder: where to look, at any depth.
        exclude: patterns such as ``*/mask/*``; a path that matches one is left out.

    Raises:
        InputError: if there is no such folder or no image is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a folder of GeoTIFFs")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    kept = [name for name in found if not any(fnmatch(name, pattern) for pattern in exclude)]
    if not kept:
        left_out = f" that --exclude does not leave out (it leaves out all {len(found)})" if found else ""
        raise InputError(f"{folder} holds no GeoTIFF (*.tif, *.tiff){left_out}")
    return kept


def open_images(folder: Path, names: Sequence[str], codebook: Codebook) -> list[Dataset]:
    """Open images of a folder as serving would with a codebook.

    Raises:
        SourceUnavailableError: if one cannot be read.
        UnsupportedImageError: if one is not an image that the codebook could classify.
    """
    datasets = []
    for name in names:
        try:
            source = resolve_source(name, folder)
            identity = source_identity(source, TIMEOUT_S)
            datasets.append(open_dataset(source, identity, ReadOptions(), codebook, TIMEOUT_S))
        except UnsupportedImageError as error:
            raise UnsupportedImageError(f"{name}: {error}; leave it out with --exclude") from error
    return datasets


def extract(
    datasets: Sequence[Dataset],
    encoder: Encoder,
    layout: ChunkLayout,
    *,
    patch_px: int,
    per_image: int,
    seed: int,
    progress: bool = True,
) -> Features:
    """Sample patches of images and compute their tokens as serving does: windows, blending, the same no data.

    Args:
        datasets: the images.
        encoder: computes the tokens.
        layout: how windows cover chunks.
        patch_px: pixels a side of a patch.
        per_image: the most patches that one image may give.
        seed: of the sample. It gives the same patches whatever other images there are.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if no patch has data.
        SourceUnavailableError: if an image cannot be read.
    """
    wanted = SPREAD * -(-per_image // layout.stride_patches**2)
    plans = []
    for dataset in datasets:
        rng = np.random.default_rng([seed, *dataset.source.url.encode()])
        plans.append((dataset, spread_chunks(dataset.footprint, layout.stride_patches, wanted, rng), rng))
    parts = []
    with tqdm(total=sum(len(chunks) for _, chunks, _ in plans), unit="chunk", disable=not progress) as bar:
        for number, (dataset, chunks, rng) in enumerate(plans):
            bar.set_postfix_str(dataset.source.url[-24:], refresh=False)
            whole = _join(
                list(_chunk_features(dataset, chunks, encoder, layout, patch_px, number, bar.update)), encoder.dim
            )
            if len(whole) > per_image:
                whole = _take(whole, np.sort(rng.choice(len(whole), per_image, replace=False)))
            parts.append(whole)
    features = _join(parts, encoder.dim, tuple(dataset.source.url for dataset in datasets))
    if not len(features):
        raise InputError("no patch of the images has data; there is nothing to fit")
    return features


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
    row_edges = _edges(rows, step)
    col_edges = _edges(cols, step)
    chosen = [
        ChunkIndex(area.row_start + int(rng.integers(top, bottom)), area.col_start + int(rng.integers(left, right)))
        for top, bottom in pairwise(row_edges)
        for left, right in pairwise(col_edges)
    ]
    return sorted(chosen)


def blend(tokens: Sequence[NDArray[np.float32]], layout: ChunkLayout) -> NDArray[np.float32]:
    """Blend the tokens of the windows that cover a chunk.

    Args:
        tokens: for each of ``layout.parts`` the tokens of its window, of shape (P, P, D).
        layout: how windows cover a chunk.

    Returns:
        Tokens of the chunk's patches, of shape (s, s, D), float32.
    """
    s = layout.stride_patches
    total = np.zeros((s, s, tokens[0].shape[-1]), np.float32)
    for part, weight, window in zip(layout.parts, layout.weights(), tokens, strict=True):
        share = window[part.token_row : part.token_row + s, part.token_col : part.token_col + s]
        total += share * weight[..., None]
    return total


def _edges(length: int, step: float) -> list[int]:
    cells = max(1, min(length, round(length / step)))
    return [round(i * length / cells) for i in range(cells + 1)]


def _chunk_features(
    dataset: Dataset,
    chunks: Sequence[ChunkIndex],
    encoder: Encoder,
    layout: ChunkLayout,
    patch_px: int,
    number: int,
    done: Callable[[int], object],
) -> Iterator[Features]:
    """Yield the features of the labelled patches of each chunk that has any; ``done`` is told how many are through."""
    s, m = layout.stride_patches, layout.margin_patches
    own = np.s_[m : m + s, m : m + s]
    kept: LRUCache[ChunkIndex, _Window] = LRUCache(
        max(4 * CHUNKS_PER_BATCH * len(layout.parts), TOKEN_CACHE_BYTES // encoder.token_bytes())
    )
    for start in range(0, len(chunks), CHUNKS_PER_BATCH):
        batch = chunks[start : start + CHUNKS_PER_BATCH]
        fresh = [index for index in batch if index not in kept]
        read = dict(zip(fresh, read_windows(dataset, fresh, patch_px), strict=True))
        labelled = {index: (read[index] if index in read else kept[index]).labelled[own] for index in batch}
        looked_at = len(batch)
        batch = [index for index in batch if labelled[index].any()]
        needed = {index: layout.windows_of(index) for index in batch}
        _encode_missing(dataset, [w for windows in needed.values() for w in windows], read, kept, encoder, patch_px)
        for index in batch:
            tokens = blend([encoder.fetch(kept[window].tokens) for window in needed[index]], layout)
            row, col = np.nonzero(labelled[index])
            yield Features(
                tokens=tokens[row, col].astype(np.float16),
                rgb=kept[index].rgb[own][row, col],
                image=np.full(len(row), number, np.int32),
                row=index.row * s + row,
                col=index.col * s + col,
                images=(),
            )
        done(looked_at)


def _encode_missing(
    dataset: Dataset,
    windows: Sequence[ChunkIndex],
    read: dict[ChunkIndex, WindowPixels],
    kept: LRUCache[ChunkIndex, _Window],
    encoder: Encoder,
    patch_px: int,
) -> None:
    """Read and encode the windows that are not in ``kept`` and put them there."""
    missing = [window for window in dict.fromkeys(windows) if window not in kept]
    for window in windows:
        kept.get(window)  # the cache must not drop what this batch uses
    unread = [window for window in missing if window not in read]
    read = read | dict(zip(unread, read_windows(dataset, unread, patch_px), strict=True))
    size = encoder.windows_at_once
    for start in range(0, len(missing), size):
        part = missing[start : start + size]
        handles = encoder.encode(np.stack([read[window].pixels for window in part]))
        for window, handle in zip(part, handles, strict=True):
            pixels = read[window]
            kept[window] = _Window(handle, pixels.labelled, _patch_colors(pixels.pixels, patch_px))


def _patch_colors(pixels: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Return the mean colour of each patch of a window (S, S, 3), of shape (P, P, 3)."""
    p = len(pixels) // patch_px
    mean = pixels.reshape(p, patch_px, p, patch_px, 3).mean(axis=(1, 3))
    rgb: NDArray[np.uint8] = np.rint(mean).astype(np.uint8)
    return rgb


def _take(features: Features, index: NDArray[np.int64]) -> Features:
    return Features(
        tokens=features.tokens[index],
        rgb=features.rgb[index],
        image=features.image[index],
        row=features.row[index],
        col=features.col[index],
        images=features.images,
    )


def _join(parts: Sequence[Features], dim: int, images: tuple[str, ...] = ()) -> Features:
    return Features(
        tokens=np.concatenate([np.empty((0, dim), np.float16), *(part.tokens for part in parts)]),
        rgb=np.concatenate([np.empty((0, 3), np.uint8), *(part.rgb for part in parts)]),
        image=np.concatenate([np.empty(0, np.int32), *(part.image for part in parts)]),
        row=np.concatenate([np.empty(0, np.int64), *(part.row for part in parts)]),
        col=np.concatenate([np.empty(0, np.int64), *(part.col for part in parts)]),
        images=images,
    )
