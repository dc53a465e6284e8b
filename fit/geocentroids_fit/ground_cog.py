"""One image of any format to one COG on the ground grid."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError  # raised as it is by rasterio.shutil.copy, and named nowhere else
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.shutil import copy as copy_raster
from rasterio.transform import Affine
from rasterio.windows import Window

from geocentroids_fit.files import new_file
from geocentroids_tiler.codebook import PreprocessSection
from geocentroids_tiler.errors import InputError, SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.source import (
    MAX_PX_WITHOUT_OVERVIEWS,
    Dataset,
    PatchPixels,
    ReadOptions,
    Source,
    check_structure,
    open_raster,
    place,
    read_patches,
    with_collars,
)

Compress = Literal["jpeg", "lossless"]
COG_OPTIONS: dict[Compress, dict[str, Any]] = {
    "jpeg": {"compress": "JPEG", "quality": 90},  # of RGB, GDAL makes YCbCr
    "lossless": {"compress": "DEFLATE", "predictor": "YES"},
}
AVERAGE_FROM = 2.0
"""From this many source pixels along a side of a target pixel on, they are averaged. Below, the average takes one pixel
and two by turns, which sharpens and blurs in a pattern; bilinear is widened to the target's pixel and does not."""
FINEST_DIRECT = 4.0
"""With more source pixels along a side than this, GDAL averages them before invalid ones are filled, piece by piece:
filling takes a hundred bytes a pixel."""
PATCH_PX = 14
BLOCK_PATCHES = 64
"""Patches a side of a block of work. Blocks are whole cells of JPEG (16 px), so what fills one does not ring in
another; and a block of 896 px takes 80 MB while its invalid pixels are filled."""
PATCHES_PER_OPENING = 512
"""Patches across that are read through one opening of the file."""
GDAL_OPTIONS = {
    "GDAL_TIFF_INTERNAL_MASK": True,
    "GDAL_CACHEMAX": 256 * 2**20,  # for rasterio this is in bytes, whatever the size
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # a JPEG cut short is a warning otherwise, and grey from there on
}
GDAL_ERRORS = (RasterioError, CPLE_BaseError, OSError, SystemError)
"""Of which rasterio raises the last where GDAL fails without saying why."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the pixels of an output depend on, apart from the image.

    Attributes:
        preprocess: its gsd.
        compress: compression of the output.
        options: how bands become RGB.
    """

    preprocess: PreprocessSection
    compress: Compress
    options: ReadOptions

    @property
    def parameters(self) -> dict[str, Any]:
        """The same as JSON holds it."""
        return {"gsd_m": self.preprocess.gsd_m, **COG_OPTIONS[self.compress], **asdict(self.options)}


def detail(error: BaseException) -> str:
    """Return the text of what caused an error in the first place, in one line: rasterio wraps what GDAL says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


@contextmanager
def reading() -> Iterator[None]:
    """Turn an error of GDAL into ``SourceUnavailableError``: the image is to blame."""
    try:
        yield
    except GDAL_ERRORS as error:
        raise SourceUnavailableError(detail(error)) from error


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an error of GDAL or of the disk into ``InputError``: there is no room, or no right to write.

    GDAL does not say which: a full disk is a failed write of some part of a file.
    """
    try:
        yield
    except GDAL_ERRORS as error:
        raise InputError(
            f"{target} cannot be written ({detail(error)}); free space and run the same command again; "
            "finished images are kept"
        ) from error


def place_image(raster: Any, path: Path, name: str, identity: str, recipe: Recipe) -> Dataset:
    """Place an open image on the ground by its header, and choose how it is resampled.

    Raises:
        SourceUnavailableError: if it cannot be read.
        UnsupportedImageError: if it is not an image that can be used.
    """
    with reading():
        dataset = place(raster, Source(name, path), identity, recipe.options, recipe.preprocess, PATCH_PX)
    pre = recipe.preprocess
    if dataset.upsampling * AVERAGE_FROM <= 1.01:
        pre = pre.model_copy(update={"resampling": "average"})
    # Overviews are not read: most are made by taking every second pixel.
    warped = dataset.warped or dataset.upsampling * FINEST_DIRECT < 1
    return replace(dataset, preprocess=pre, overview=None, warped=warped)


def write_cog(
    raster: Any,
    dataset: Dataset,
    own: Path,
    target: Path,
    recipe: Recipe,
    tags: dict[str, str],
    go_on: Callable[[], None],
) -> None:
    """Write an image as a COG that appears when it is complete.

    Args:
        raster: the image, open.
        dataset: from ``place_image``.
        own: an empty folder on the disk of ``target``.
        target: the COG.
        recipe: how to write it.
        tags: to put into it.
        go_on: called before each block; what it raises ends the work.

    Raises:
        SourceUnavailableError: if a part of the image cannot be read.
        UnsupportedImageError: if no pixel of it is data.
        InputError: if the disk is full.
    """
    plain, cog = own / "plain.tif", own / "cog.tif"
    with writing(target):
        dataset = _readable(raster, dataset, own / "geocentroids-copy.tif")
        side = _block_patches(dataset)
        pixel_sum = valid_sum = 0
        with rasterio.open(plain, "w", **_profile(dataset, side * PATCH_PX)) as output:
            for window, block in _blocks(dataset, side):
                go_on()
                output.write(block.pixels.transpose(2, 0, 1), window=window)
                output.write_mask(block.valid, window=window)
                pixel_sum += int(block.pixels.sum())
                valid_sum += int(block.valid.sum())
            output.update_tags(**tags)
        if not valid_sum:
            raise UnsupportedImageError("no pixel of the image is data")
        if _read_back(plain) != (pixel_sum, valid_sum):
            raise OSError(errno.ENOSPC, "what was written is not what is there")
        options = COG_OPTIONS[recipe.compress]
        copy_raster(plain, cog, driver="COG", overview_resampling="AVERAGE", bigtiff="IF_SAFER", **options)
        _read_back(cog)
        with new_file(target) as part:
            cog.replace(part)


def _readable(raster: Any, dataset: Dataset, copy: Path) -> Dataset:
    """Return the dataset with its collars, of a copy where the tiler's way of reading would not see the same image."""
    if not _seen_by_tiler(raster, dataset.source):
        _copy(raster, copy)
        dataset = replace(dataset, source=Source(dataset.source.url, copy))
    with open_raster(dataset.source, dataset.identity) as readable:
        return with_collars(dataset, readable)


def _seen_by_tiler(raster: Any, source: Source) -> bool:
    """True if an image can be read, and is the same, as the tiler opens it: a GeoTIFF without the files beside it."""
    seen = ("crs", "transform", "shape", "dtypes", "nodatavals", "mask_flag_enums", "colorinterp")
    try:
        with open_raster(source, "") as bare:
            check_structure(bare)
            # A strip of a large image that is not tiled would be decoded again for each block in it.
            striped = bare.block_shapes[0][1] == bare.width and bare.width * bare.height > MAX_PX_WITHOUT_OVERVIEWS
            return not striped and all(getattr(bare, what) == getattr(raster, what) for what in seen)
    except (SourceUnavailableError, UnsupportedImageError):
        return False


def _copy(raster: Any, copy: Path) -> None:
    """Copy an image to a tiled GeoTIFF, with an overview if it is large."""
    try:
        copy_raster(raster, copy, driver="GTiff", tiled=True, compress="DEFLATE", zlevel=1, bigtiff="IF_SAFER")
    except GDAL_ERRORS as error:
        # Which of the two files failed, GDAL says in passing at best.
        if "IReadBlock failed" in str(error) and copy.name not in str(error):
            raise SourceUnavailableError(str(error)) from error
        with reading(), rasterio.open(raster.name) as again:
            _read_all(again)
        raise
    _read_back(copy)
    too_large = raster.width * raster.height / MAX_PX_WITHOUT_OVERVIEWS
    if too_large > 1:
        with rasterio.open(copy, "r+") as copied:
            copied.build_overviews([2 ** math.ceil(math.log2(too_large) / 2)], Resampling.average)


def _read_back(path: Path) -> tuple[int, int]:
    """Read a file that was written: GDAL may lose a part of one, or its end, on a full disk without an error.

    Returns:
        The sum of all its values, and the number of valid pixels.
    """
    with rasterio.open(path) as raster:
        return _read_all(raster)


def _read_all(raster: Any) -> tuple[int, int]:
    pixel_sum = valid_sum = 0
    for _, window in raster.block_windows(1):
        pixel_sum += int(raster.read(window=window).sum(dtype=np.float64))
        valid_sum += int((raster.read_masks(1, window=window) > 0).sum())
    return pixel_sum, valid_sum


def _block_patches(dataset: Dataset) -> int:
    """Return the patches a side of a block: fewer where the image has many pixels in each."""
    per_pixel = 1.0 if dataset.warped else max(1.0, 1 / dataset.upsampling)
    return int(BLOCK_PATCHES / per_pixel) // 8 * 8  # 8 patches are 7 cells of JPEG


def _blocks(dataset: Dataset, side: int) -> Iterator[tuple[Window, PatchPixels]]:
    """Yield an image's pixels block by block, with their place in the output."""
    area = dataset.footprint
    for row in range(area.row_start, area.row_stop, side):
        for col in range(area.col_start, area.col_stop, PATCHES_PER_OPENING):
            strip = PatchRange(row, row + side, col, col + PATCHES_PER_OPENING).intersect(area)
            starts = range(strip.col_start, strip.col_stop, side)
            blocks = [PatchRange(strip.row_start, strip.row_stop, c, min(c + side, strip.col_stop)) for c in starts]
            with reading():
                read = read_patches(dataset, blocks, PATCH_PX)
            for block, pixels in zip(blocks, read, strict=True):
                height, width = pixels.valid.shape
                top, left = (part.start * PATCH_PX for part in block.within(area))
                yield Window(left, top, width, height), pixels


def _profile(dataset: Dataset, block_px: int) -> dict[str, Any]:
    rows, cols = dataset.footprint.shape
    left, _, _, top = dataset.grid.bounds_of(dataset.footprint)
    gsd_m = dataset.preprocess.gsd_m
    return {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 3,
        "height": rows * PATCH_PX,
        "width": cols * PATCH_PX,
        "crs": dataset.grid.crs.to_wkt(),
        "transform": Affine(gsd_m, 0, left, 0, -gsd_m, top),
        "photometric": "RGB",
        "tiled": True,
        "blockxsize": block_px,
        "blockysize": block_px,
        "compress": "DEFLATE",
        "zlevel": 1,
        "bigtiff": "IF_SAFER",
    }
