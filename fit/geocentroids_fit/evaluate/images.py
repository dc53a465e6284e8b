"""Images of an evaluation: opened, labelled as served, labelled again with moved windows, and their land cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.evaluate.masks import read_cover
from geocentroids_fit.images import ImageFolder, list_images
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.grid import Bounds, Grid, PatchRange
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.source import Dataset


@dataclass(frozen=True)
class ImageSet:
    """Images that are evaluated together, because their masks mean the same.

    Attributes:
        name: of the set.
        images: folder of GeoTIFFs, or one of them.
        exclude: patterns of paths below the folder that are left out.
        names: paths below the folder; none: all that are not left out.
        masks: land cover: a folder of GeoTIFFs with the same relative paths, or one of them for one image; or None.
        ignore: values of the masks that say nothing.
        class_names: names of the masks' values, or None.
    """

    name: str
    images: Path
    exclude: tuple[str, ...] = ()
    masks: Path | None = None
    ignore: tuple[int, ...] = (255,)
    class_names: Mapping[int, str] | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """An image that could not be evaluated, and why."""

    set_name: str
    name: str
    reason: str


@dataclass(frozen=True)
class OpenImage:
    """An image whose header was read.

    Attributes:
        set_name: name of its set.
        name: its path below the set's folder.
        dataset: the image as the codebook sees it.
        area: the patches that are evaluated.
        mask: file of its land cover, or None.
        ignore: values of the mask that say nothing.
    """

    set_name: str
    name: str
    dataset: Dataset
    area: PatchRange
    mask: Path | None
    ignore: tuple[int, ...]


@dataclass(frozen=True)
class LabelledImage:
    """An image with everything that measures need.

    Attributes:
        opened: the image.
        labels: as served, of shape ``area.shape``, uint16.
        similarity: of shape ``area.shape``, float32.
        moved_labels: labels from moved windows, of shape ``area.shape``, or None where windows cannot be moved.
        cover: land cover of shape ``area.shape``, int64, or None without a usable mask.
        notes: what a reader should know.
    """

    opened: OpenImage
    labels: NDArray[np.uint16]
    similarity: NDArray[np.float32]
    moved_labels: NDArray[np.uint16] | None
    cover: NDArray[np.int64] | None
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class MovedGrid(Grid):
    """A grid whose patches are those of the ground grid under higher numbers, so that windows lie elsewhere on it.

    Only outlines follow, which is all that reading windows asks for.

    Attributes:
        moved_patches: what was added to rows and columns.
    """

    moved_patches: int = 0

    def bounds_of(self, patches: PatchRange) -> Bounds:
        """Return the outline of a range of patches, in the grid CRS."""
        return super().bounds_of(moved(patches, -self.moved_patches))


def moved(patches: PatchRange, by: int) -> PatchRange:
    """Return a range with ``by`` added to rows and columns."""
    return PatchRange(patches.row_start + by, patches.row_stop + by, patches.col_start + by, patches.col_stop + by)


def move_windows(dataset: Dataset, by: int) -> Dataset:
    """Return the dataset with its patches numbered ``by`` higher: the same ground under windows ``by`` patches off."""
    grid = MovedGrid(dataset.grid.crs, dataset.grid.patch_m, dataset.grid.areal_scale, by)
    return replace(
        dataset, grid=grid, footprint=moved(dataset.footprint, by), identity=f"{dataset.identity}+moved-{by}"
    )


def farthest_move(stride_patches: int) -> int | None:
    """Return how far windows are moved: half of the distance at which they lie as before. None for a stride of 1."""
    return stride_patches // 2 or None


def central_part(patches: PatchRange, max_patches: int) -> PatchRange:
    """Return the middle of a range with at most ``max_patches`` patches, square where the range is wide enough."""
    rows, cols = patches.shape
    if rows * cols <= max_patches:
        return patches
    side = math.isqrt(max_patches)
    height = min(rows, max(side, max_patches // cols))
    width = min(cols, max_patches // height)
    top, left = patches.row_start + (rows - height) // 2, patches.col_start + (cols - width) // 2
    return PatchRange(top, top + height, left, left + width)


def set_names(places: Sequence[Path]) -> list[str]:
    """Return a name for each folder or file: as much of the end of its path as tells it from the others."""
    parts = [place.resolve().with_suffix("").parts if place.is_file() else place.resolve().parts for place in places]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [place.name for place in places]  # one is named twice


def check_sets(sets: Sequence[ImageSet]) -> None:
    """Raise InputError if sets cannot be evaluated as they are stated."""
    if not sets:
        raise InputError("there are no images to evaluate; name a folder of GeoTIFFs or one of them")
    names = [image_set.name for image_set in sets]
    if len(set(names)) < len(names):
        raise InputError(f"sets are named {', '.join(map(repr, names))}; each needs a name of its own")
    for image_set in sets:
        if image_set.masks is not None and not image_set.masks.exists():
            raise InputError(f"{image_set.masks} does not exist; name a folder of masks or one of them")
        if image_set.masks is not None and image_set.masks.is_file() and not image_set.images.is_file():
            raise InputError(f"{image_set.masks} is one mask for the folder {image_set.images}; name a folder of masks")


def open_set(number: int, image_set: ImageSet, codebook: Codebook, max_patches: int) -> Iterator[OpenImage | LeftOut]:
    """Open the images of a set as serving would with a codebook; those that cannot be are told apart.

    Args:
        number: of the set. It keeps labels of files of one name in different folders apart.
        image_set: the images.
        codebook: sets grid and windows.
        max_patches: the most patches of an image that are evaluated.

    Raises:
        InputError: if there are no images.
    """
    single = image_set.images.is_file()
    root = image_set.images.parent if single else image_set.images
    names = [image_set.images.name] if single else list(image_set.names) or list_images(root, image_set.exclude)
    folder = ImageFolder(root, tuple(names))
    for name in names:
        try:
            found = folder.open(name, codebook)
        except GeocentroidsError as error:
            yield LeftOut(image_set.name, name, str(error))
            continue
        except UnicodeError:
            yield LeftOut(image_set.name, name, "its name is not UTF-8")
            continue
        dataset = replace(found, identity=f"{number}-{found.identity}")
        masks = image_set.masks
        yield OpenImage(
            set_name=image_set.name,
            name=name,
            dataset=dataset,
            area=central_part(dataset.footprint, max_patches),
            mask=masks / name if masks is not None and masks.is_dir() else masks,
            ignore=image_set.ignore,
        )


def label_image(
    opened: OpenImage, engine: LabelEngine, patch_px: int, done: Callable[[int], object]
) -> LabelledImage | LeftOut:
    """Label an image twice, with windows as served and moved, and read its mask.

    Args:
        opened: the image.
        engine: computes the labels.
        patch_px: pixels a side of a patch.
        done: told how many chunks are through.
    """
    dataset, area = opened.dataset, opened.area
    by = farthest_move(engine.layout.stride_patches)
    try:
        block = _block(engine, dataset, area, done)
        again = None if by is None else _block(engine, move_windows(dataset, by), moved(area, by), done).labels
    except GeocentroidsError as error:
        return LeftOut(opened.set_name, opened.name, str(error))
    if (block.labels == NODATA_LABEL).all():
        return LeftOut(opened.set_name, opened.name, "no patch of it has data")
    notes = list(dataset.warnings)
    if area != dataset.footprint:
        notes.append(
            "only the middle was evaluated: {} x {} of {} x {} patches".format(*area.shape, *dataset.footprint.shape)
        )
    cover = None
    if opened.mask is not None:
        try:
            cover = read_cover(opened.mask, dataset, area, patch_px, opened.ignore)
        except GeocentroidsError as error:
            notes.append(f"evaluated without land cover: {error}")
    return LabelledImage(opened, block.labels, block.similarity, again, cover, tuple(notes))


def chunks_to_label(opened: OpenImage, stride_patches: int) -> int:
    """Return how many chunks ``label_image`` goes through."""
    by = farthest_move(stride_patches)
    areas = [opened.area] if by is None else [opened.area, moved(opened.area, by)]
    return sum(math.prod(area.chunk_range(stride_patches).shape) for area in areas)


def _block(engine: LabelEngine, dataset: Dataset, area: PatchRange, done: Callable[[int], object]) -> LabelBlock:
    block = LabelBlock.empty(area)
    for index, chunk in engine.stream(dataset, area):
        block.paste(index, chunk)
        done(1)
    return block
