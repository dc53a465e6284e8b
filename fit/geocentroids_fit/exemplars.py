"""Exemplars: for each centroid a few typical patches with what surrounds them, as a small picture."""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from geocentroids_fit.clusters import Clusters
from geocentroids_fit.files import write_arrays, write_text
from geocentroids_fit.shards import AGAIN, FeatureStore
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.exemplars import INDEX_FILE, SHEETS_FILE
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.source import Dataset, read_patches

PER_CENTROID = 4
BEST_SHARE = 0.1
BEST_AT_LEAST = 12
"""Features of a centroid that are typical enough to be shown: this share of them, and no fewer than this many."""
TILE_PX = 48
"""Side of a tile. A multiple of 16, so that WebP's blocks end where tiles do."""
REACH_PATCHES = 2
"""Patches shown on each side of the one that is meant."""
SHEET_BYTES = 1280
MAX_QUALITY = 80
"""Of WebP; more adds bytes and nothing to be seen."""
NO_DATA_LEVEL = 128
MARK_PX = 3
"""Length of the marks at the corners of the patch."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from.

    Attributes:
        licence: of the image.
        attribution: whom to name.
        url: where more is said of it.
    """

    licence: str = ""
    attribution: str = ""
    url: str = ""


def source_of(image: str, rules: Sequence[tuple[str, ImageSource]]) -> ImageSource:
    """Return the source that the first rule whose pattern fits gives to an image; one of empty texts if none fits.

    Args:
        image: its path or URL.
        rules: patterns such as ``neon/*`` (``*`` also stands for slashes), each with a source.
    """
    return next((source for pattern, source in rules if fnmatchcase(image, pattern)), ImageSource())


@dataclass(frozen=True)
class ChosenPatches:
    """The patches to show, label by label, and those of a label with the best one first.

    Attributes:
        label: the label, of shape (M,), uint16.
        feature: number of the feature, of shape (M,), int64.
        image: number of its image, of shape (M,), int64.
        row: row of the patch on the image's ground grid, of shape (M,), int64.
        col: its column, likewise.
    """

    label: NDArray[np.uint16]
    feature: NDArray[np.int64]
    image: NDArray[np.int64]
    row: NDArray[np.int64]
    col: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.label)


def choose_exemplars(store: FeatureStore, clusters: Clusters, *, per_centroid: int = PER_CENTROID) -> ChosenPatches:
    """Choose typical patches of each centroid: they fit it well, lie in many images, and far apart within one.

    Args:
        store: the features.
        clusters: their labels.
        per_centroid: patches of a centroid; fewer where it has fewer features.
    """
    order = np.lexsort((-clusters.similarity, clusters.labels))  # the best first in each label; equals as they came
    label = clusters.labels[order]
    count = np.bincount(label, minlength=len(clusters))
    rank = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    typical = rank < np.maximum(BEST_AT_LEAST, np.ceil(BEST_SHARE * count))[label]
    label, feature = label[typical], order[typical]
    image, row, col = _places(store, feature)
    edges = np.flatnonzero(np.diff(label, prepend=-1, append=-1))
    groups = [np.s_[start:stop] for start, stop in pairwise(edges)]
    chosen = np.concatenate([own.start + _spread(image[own], row[own], col[own], per_centroid) for own in groups])
    return ChosenPatches(label[chosen], feature[chosen], image[chosen], row[chosen], col[chosen])


def write_exemplars(
    folder: Path,
    store: FeatureStore,
    clusters: Clusters,
    open_image: Callable[[str], Dataset],
    source: Callable[[str], ImageSource],
    *,
    per_centroid: int = PER_CENTROID,
    progress: bool = True,
) -> int:
    """Write a sheet for each centroid that has features, all in ``sheets.safetensors``, and then ``index.json``.

    Args:
        folder: where they go.
        store: the features.
        clusters: their labels.
        open_image: opens an image by its name.
        source: tells where an image comes from.
        per_centroid: patches on a sheet.
        progress: whether a progress bar is drawn.

    Returns:
        How many sheets there are.

    Raises:
        InputError: if an image is no longer the one that its features were made of, or there is no room.
        SourceUnavailableError: if an image cannot be read.
    """
    chosen = choose_exemplars(store, clusters, per_centroid=per_centroid)
    tiles = _read_tiles(store, chosen, open_image, progress)
    sheets = _make_sheets(chosen.label, tiles, progress)
    write_arrays(folder / SHEETS_FILE, sheets)
    write_text(folder / INDEX_FILE, json.dumps(_index(store, chosen, source), ensure_ascii=False))
    return len(sheets)


def encode_sheet(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels of shape (H, W, 3) as WebP of at most ``SHEET_BYTES``, in the best quality that allows it.

    Where even the worst quality takes more, which no photograph does, details are averaged away first.
    """
    image = Image.fromarray(pixels)
    for factor in range(1, max(image.size) + 1):
        coarse = image.reduce(factor).resize(image.size, Image.Resampling.NEAREST)
        too_good = bisect_left(range(MAX_QUALITY + 1), True, key=lambda q: len(_webp(coarse, q)) > SHEET_BYTES)
        if too_good:
            return _webp(coarse, too_good - 1)
    raise InputError(f"a picture of {image.size} px cannot be written in {SHEET_BYTES} bytes")


def _webp(image: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=quality, method=6)
    return content.getvalue()


def _places(
    store: FeatureStore, feature: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return image, row and column of features, each of shape (M,), int64."""
    image, row, col = (np.empty(len(feature), np.int64) for _ in range(3))
    by_number = np.argsort(feature)
    edges = np.searchsorted(feature[by_number], store.starts)
    for number, (start, stop) in enumerate(pairwise(edges)):
        if start < stop:
            own = by_number[start:stop]
            origin, place = store.origin(number), feature[own] - store.starts[number]
            image[own], row[own], col[own] = number, origin.row[place], origin.col[place]
    return image, row, col


def _spread(image: NDArray[np.int64], row: NDArray[np.int64], col: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Choose up to ``count`` patches, one after the other: of the image shown least, there the farthest from the rest.

    Args:
        image: images of the patches, of shape (n,), the most typical patch first, which also decides between equals.
        row: their rows, of shape (n,).
        col: their columns, of shape (n,).
        count: how many.

    Returns:
        Which ones, of shape (min(count, n),).
    """
    chosen = [0]
    shown, away = np.zeros(len(image), np.int64), np.full(len(image), np.inf)
    while len(chosen) < min(count, len(image)):
        last = chosen[-1]
        same = image == image[last]
        shown += same
        away[same] = np.minimum(away[same], np.hypot(row[same] - row[last], col[same] - col[last]))
        shown[last] = len(image)  # never again
        chosen.append(int(np.lexsort((-away, shown))[0]))
    return np.array(chosen)


def _read_tiles(
    store: FeatureStore, chosen: ChosenPatches, open_image: Callable[[str], Dataset], progress: bool
) -> NDArray[np.uint8]:
    """Return a tile for each patch, of shape (M, TILE_PX, TILE_PX, 3); each image is opened once."""
    tiles = np.empty((len(chosen), TILE_PX, TILE_PX, 3), np.uint8)
    numbers = np.unique(chosen.image).tolist()
    for number in tqdm(numbers, "exemplars", unit="image", disable=not progress):
        record = store.manifest.images[number]
        dataset = open_image(record.image)
        if dataset.identity != record.identity:
            raise InputError(f"{record.image} has changed since its features were extracted; {AGAIN}")
        own = np.flatnonzero(chosen.image == number)
        around = [
            PatchRange(row - REACH_PATCHES, row + REACH_PATCHES + 1, col - REACH_PATCHES, col + REACH_PATCHES + 1)
            for row, col in zip(chosen.row[own].tolist(), chosen.col[own].tolist(), strict=True)
        ]
        read = read_patches(dataset, around, store.manifest.settings.encoder.patch_px)
        tiles[own] = [make_tile(np.where(part.valid[..., None], part.pixels, np.uint8(NO_DATA_LEVEL))) for part in read]
    return tiles


def make_tile(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a patch and what surrounds it, of shape (S, S, 3), as a tile in which four corners mark the patch."""
    tile = np.array(Image.fromarray(pixels).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS))
    first = round(TILE_PX * REACH_PATCHES / (2 * REACH_PATCHES + 1)) - 1
    corner = tile[first : TILE_PX - first, first : TILE_PX - first]
    for _ in range(4):
        corner[0, :MARK_PX] = corner[:MARK_PX, 0] = 255
        corner = np.rot90(corner)
    return tile


def _make_sheets(label: NDArray[np.uint16], tiles: NDArray[np.uint8], progress: bool) -> dict[str, NDArray[np.uint8]]:
    """Return for each label its tiles side by side, as the bytes of a WebP file."""
    labels, starts = np.unique(label, return_index=True)
    parts = np.split(tiles, starts[1:])
    return {
        str(number): np.frombuffer(encode_sheet(np.concatenate(part, axis=1)), np.uint8)
        for number, part in zip(tqdm(labels, "sheets", disable=not progress), parts, strict=True)
    }


def _index(store: FeatureStore, chosen: ChosenPatches, source: Callable[[str], ImageSource]) -> dict[str, Any]:
    """Return what ``index.json`` says: the images that are shown, and for each label its patches."""
    numbers, image = np.unique(chosen.image, return_inverse=True)
    names = [store.images[number] for number in numbers.tolist()]
    patches: dict[str, list[list[int]]] = {}
    for label, *place in zip(*(part.tolist() for part in (chosen.label, image, chosen.row, chosen.col)), strict=True):
        patches.setdefault(str(label), []).append(place)
    return {"images": [{"image": name, **asdict(source(name))} for name in names], "patches": patches}
