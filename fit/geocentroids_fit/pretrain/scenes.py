"""The ground that an encoder is trained on: images on the ground grid, in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.images import ImageFolder, ahead, in_pool
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.source import Dataset, labelled_patches, read_patches

BLOCK_PATCHES = 64
"""Side of the parts that are taken of an image too large to be taken whole."""
OPEN_AHEAD = 2


@dataclass(frozen=True)
class Scene:
    """Ground of one image.

    Attributes:
        image: name of the image.
        dataset: the image.
        patches: the patches it covers, R rows by C columns.
        pixels: RGB of shape (14 R, 14 C, 3), uint8; what is no data is filled from its surroundings.
        valid: pixels that are data, of shape (14 R, 14 C), bool.
        labelled: patches of which at least half of the pixels are data, of shape (R, C), bool.
    """

    image: str
    dataset: Dataset
    patches: PatchRange
    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    labelled: NDArray[np.bool_]


@dataclass(frozen=True)
class Scenes:
    """All ground that is trained on.

    Attributes:
        scenes: the ground.
        skipped: images that could not be used, and why.
    """

    scenes: tuple[Scene, ...]
    skipped: tuple[tuple[str, str], ...]

    @property
    def patches(self) -> int:
        """Patches with data."""
        return sum(int(scene.labelled.sum()) for scene in self.scenes)


def read_scenes(images: ImageFolder, codebook: Codebook, per_image: int, most: int, seed: int) -> Scenes:
    """Read images, or random blocks of the largest.

    Args:
        images: which.
        codebook: how they are opened: gsd and patch size.
        per_image: patches that are taken of one image, about.
        most: patches that are taken of all, about; the largest images give less first.
        seed: of the random blocks.

    Raises:
        InputError: if no image can be used.
    """
    opened: list[tuple[str, Dataset]] = []
    found, skipped = [], []

    def read(entry: tuple[str, Dataset]) -> list[Scene]:
        return list(_scenes_of(*entry, codebook.manifest.encoder.patch_px, share, seed))

    with ThreadPoolExecutor(OPEN_AHEAD, "geocentroids-read") as pool:
        for name, dataset in ahead(in_pool(pool, lambda name: images.open(name, codebook)), images.names, OPEN_AHEAD):
            try:
                opened.append((name, dataset.result()))
            except GeocentroidsError as error:
                skipped.append((name, str(error)))
        share = share_of(
            [rows * cols for _, dataset in opened for rows, cols in [dataset.footprint.shape]], per_image, most
        )
        for (name, _), scenes in ahead(in_pool(pool, read), opened, OPEN_AHEAD):
            try:
                own = scenes.result()
            except GeocentroidsError as error:
                skipped.append((name, str(error)))
                continue
            found += own
            if not own:
                skipped.append((name, "no patch has data"))
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped[:3])
        raise InputError(f"no patch of the {len(images.names)} images has data" + (f" ({reasons})" if reasons else ""))
    return Scenes(tuple(found), tuple(skipped))


def share_of(sizes: Sequence[int], per_image: int, most: int) -> int:
    """Return how many patches an image may give, so that all give at most ``most``, or one each."""
    share = per_image
    while share > 1 and sum(min(size, share) for size in sizes) > most:
        share = int(0.9 * share)
    return share


def _scenes_of(name: str, dataset: Dataset, patch_px: int, per_image: int, seed: int) -> Iterator[Scene]:
    """Yield an image, or random blocks of it until they hold ``per_image`` patches with data."""
    found = 0
    for patches in _parts(name, dataset.footprint, per_image, seed):
        read = read_patches(dataset, [patches], patch_px)[0]
        labelled = labelled_patches(read.valid, patch_px)
        if labelled.any():
            yield Scene(name, dataset, patches, np.array(read.pixels), np.array(read.valid), labelled)
        found += int(labelled.sum())
        if found >= per_image:
            return


def _parts(name: str, footprint: PatchRange, per_image: int, seed: int) -> list[PatchRange]:
    """Return the footprint, or where it is too large its blocks in random order."""
    rows, cols = footprint.shape
    if rows * cols <= per_image:
        return [footprint]
    chunks = list(footprint.chunks(BLOCK_PATCHES))
    order = np.random.default_rng([seed, *os.fsencode(name)]).permutation(len(chunks))
    return [chunks[i].patches(BLOCK_PATCHES).intersect(footprint) for i in order]
