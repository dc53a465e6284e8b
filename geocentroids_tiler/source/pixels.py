"""Reading the pixels of patches at the codebook's gsd, resampled once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.enums import Resampling as RasterioResampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geocentroids_tiler.grid import Bounds, ChunkIndex, PatchRange, raster_points, window_patches_of
from geocentroids_tiler.source.dataset import Dataset, open_raster, to_uint8
from geocentroids_tiler.source.fill import fill_invalid

_PILLOW_FILTER = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "average": Image.Resampling.BOX,
}
_FILTER_RADIUS = {"nearest": 1, "bilinear": 1, "cubic": 2, "average": 1}
"""Reach of the resampling filters, in source pixels at equal gsd."""


@dataclass(frozen=True)
class PatchPixels:
    """A rectangle of patches, read.

    Attributes:
        pixels: RGB of shape (H, W, 3), uint8; invalid pixels are filled from their surroundings.
        valid: pixels that are data, of shape (H, W), bool.
    """

    pixels: NDArray[np.uint8]
    valid: NDArray[np.bool_]


@dataclass(frozen=True)
class WindowPixels:
    """One window, read.

    Attributes:
        pixels: RGB of shape (S, S, 3), uint8; invalid pixels are filled from their surroundings.
        labelled: patches of which at least half of the pixels are valid, of shape (P, P), bool.
    """

    pixels: NDArray[np.uint8]
    labelled: NDArray[np.bool_]


def read_windows(dataset: Dataset, windows: Sequence[ChunkIndex], patch_px: int) -> list[WindowPixels]:
    """Read windows of a dataset through one opening of its file.

    What is read for a window depends on nothing but the window: not on the others, not on their order.

    Args:
        dataset: the dataset.
        windows: indices of the windows.
        patch_px: pixels a side of a patch.

    Raises:
        SourceUnavailableError: if the file cannot be read.
    """
    pre = dataset.preprocess
    p = pre.window_patches
    ranges = [window_patches_of(index, p, pre.margin_patches, pre.stride_patches) for index in windows]
    return [
        WindowPixels(read.pixels, read.valid.reshape(p, patch_px, p, patch_px).mean(axis=(1, 3)) >= 0.5)
        for read in read_patches(dataset, ranges, patch_px)
    ]


def read_patches(dataset: Dataset, ranges: Sequence[PatchRange], patch_px: int) -> list[PatchPixels]:
    """Read rectangles of patches of a dataset through one opening of its file.

    What is read for a rectangle depends on nothing but the rectangle. It may reach beyond the image.

    Args:
        dataset: the dataset.
        ranges: the rectangles, none of them empty.
        patch_px: pixels a side of a patch.

    Returns:
        For each rectangle of R x C patches its pixels, H = R * patch_px by W = C * patch_px.

    Raises:
        SourceUnavailableError: if the file cannot be read.
    """
    if not ranges:
        return []
    with open_raster(dataset.source, dataset.identity, dataset.overview, dataset.timeout_s) as raster:
        if not dataset.warped:
            return [_read_direct(raster, dataset, patches, patch_px) for patches in ranges]
        with _warped(dataset, raster, patch_px) as vrt:
            return [_read_warped(vrt, dataset, patches, patch_px) for patches in ranges]


def _read_direct(raster: Any, dataset: Dataset, patches: PatchRange, patch_px: int) -> PatchPixels:
    """Read patches of an image that is north up in the grid's CRS.

    Whole pixels around them are read, invalid ones filled, and the patches cut out of them by one resampling.
    """
    left, bottom, right, top = dataset.grid.bounds_of(patches)
    height, width = _size_px(patches, patch_px)
    t = raster.transform
    col0, col1 = (left - t.c) / t.a, (right - t.c) / t.a
    row0, row1 = (top - t.f) / t.e, (bottom - t.f) / t.e
    first_col, last_col = _with_reach(col0, col1, width, dataset)
    first_row, last_row = _with_reach(row0, row1, height, dataset)
    pixels, valid = _read_padded(raster, dataset, PatchRange(first_row, last_row, first_col, last_col))
    if dataset.collars:
        v = (np.arange(first_row, last_row) + 0.5)[:, None] / raster.height
        u = (np.arange(first_col, last_col) + 0.5)[None, :] / raster.width
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    filled = fill_invalid(pixels, valid)
    box = (col0 - first_col, row0 - first_row, col1 - first_col, row1 - first_row)
    image = Image.fromarray(filled).resize((width, height), _PILLOW_FILTER[dataset.preprocess.resampling], box)
    if valid.all():
        return PatchPixels(np.asarray(image), np.ones((height, width), bool))
    share = Image.fromarray(valid.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BOX, box)
    return PatchPixels(np.asarray(image), np.asarray(share) >= 128)


def _size_px(patches: PatchRange, patch_px: int) -> tuple[int, int]:
    """Return height and width of patches in pixels."""
    rows, cols = patches.shape
    return rows * patch_px, cols * patch_px


def _with_reach(start: float, stop: float, size: int, dataset: Dataset) -> tuple[int, int]:
    """Return the whole pixels that resampling ``start`` to ``stop`` to ``size`` pixels looks at."""
    # Pillow widens the filter when it makes an image smaller.
    reach = math.ceil(_FILTER_RADIUS[dataset.preprocess.resampling] * max(1.0, (stop - start) / size)) + 1
    return math.floor(start) - reach, math.ceil(stop) + reach


def _read_padded(raster: Any, dataset: Dataset, wanted: PatchRange) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read whole pixels; those beyond the image are invalid. Returns (H, W, 3) and (H, W)."""
    pixels = np.zeros((*wanted.shape, 3), np.uint8)
    valid = np.zeros(wanted.shape, bool)
    inside = wanted.intersect(PatchRange(0, raster.height, 0, raster.width))
    if inside.empty:
        return pixels, valid
    rows, cols = inside.shape
    window = Window(inside.col_start, inside.row_start, cols, rows)
    part = raster.read(dataset.indexes, window=window)  # (3, rows, cols)
    at = inside.within(wanted)
    pixels[at] = to_uint8(part, dataset.options.rescale).transpose(1, 2, 0)
    valid[at] = _validity(raster, dataset, window, part)
    return pixels, valid


def _validity(raster: Any, dataset: Dataset, window: Window, part: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell which pixels are data, of shape (rows, cols): by alpha, else by mask or nodata, and by not-a-number."""
    if ColorInterp.alpha in raster.colorinterp:
        alpha = raster.read(raster.colorinterp.index(ColorInterp.alpha) + 1, window=window)
        # A warped image of floating-point numbers has 255 for opaque, a file of its own may have 1.
        opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1.0
        valid = alpha >= opaque / 2
    else:
        # A pixel is data if any band is: a pure red has nodata = 0 in the other two.
        shared = MaskFlags.per_dataset in raster.mask_flag_enums[0]
        bands = dataset.indexes[:1] if shared else dataset.indexes
        valid = (raster.read_masks(bands, window=window) >= 128).any(axis=0)
    if np.issubdtype(part.dtype, np.floating):
        valid &= np.isfinite(part).all(axis=0)
    return np.asarray(valid)


def _warped(dataset: Dataset, raster: Any, patch_px: int) -> WarpedVRT:
    """Return the image warped to the grid: its pixels are the pixels of windows, so nothing is resampled again."""
    grid, gsd_m = dataset.grid, dataset.grid.patch_m / patch_px
    left, _, _, top = grid.bounds_of(dataset.footprint)
    rows, cols = dataset.footprint.shape
    has_alpha = ColorInterp.alpha in raster.colorinterp
    return WarpedVRT(
        raster,
        crs=grid.crs.to_wkt(),
        transform=Affine(gsd_m, 0, left, 0, -gsd_m, top),
        width=cols * patch_px,
        height=rows * patch_px,
        resampling=RasterioResampling[dataset.preprocess.resampling],
        add_alpha=not has_alpha and raster.nodata is None,
    )


def _read_warped(vrt: WarpedVRT, dataset: Dataset, patches: PatchRange, patch_px: int) -> PatchPixels:
    """Read patches of a warped image, whose pixels are theirs."""
    rows, cols = (slice(part.start * patch_px, part.stop * patch_px) for part in patches.within(dataset.footprint))
    pixels, valid = _read_padded(vrt, dataset, PatchRange(rows.start, rows.stop, cols.start, cols.stop))
    if dataset.collars and valid.any():
        v, u = _place_in_image(dataset, dataset.grid.bounds_of(patches), valid.shape)
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    return PatchPixels(fill_invalid(pixels, valid), valid)


def _place_in_image(
    dataset: Dataset, bounds: Bounds, shape: tuple[int, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far down and across the image, 0 to 1, each pixel of a rectangle lies; both of shape ``shape``."""
    tolerance = abs(dataset.transform[0]) + abs(dataset.transform[3])  # about a pixel of the image
    x, y = raster_points(bounds, dataset.grid.crs, (shape[0], shape[1]), dataset.crs, tolerance)
    a, b, c, d, e, f = dataset.transform
    x, y, determinant = x - c, y - f, a * e - b * d
    col, row = (e * x - b * y) / determinant, (a * y - d * x) / determinant
    return row / dataset.height_px, col / dataset.width_px
