"""Reading the pixels of windows at the codebook's gsd, resampled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    if not windows:
        return []
    with open_raster(dataset.source, dataset.identity, dataset.overview, dataset.timeout_s) as raster:
        if not dataset.warped:
            return [_window(dataset, index, patch_px, raster, _read_direct) for index in windows]
        with _warped(dataset, raster, patch_px) as vrt:
            return [_window(dataset, index, patch_px, vrt, _read_warped) for index in windows]


_Reader = Callable[[Any, Dataset, Bounds, int], tuple[NDArray[np.uint8], NDArray[np.bool_]]]


def _window(dataset: Dataset, index: ChunkIndex, patch_px: int, raster: Any, reader: _Reader) -> WindowPixels:
    pre = dataset.preprocess
    patches = window_patches_of(index, pre.window_patches, pre.margin_patches, pre.stride_patches)
    size = pre.window_patches * patch_px
    pixels, valid = reader(raster, dataset, dataset.grid.bounds_of(patches), size)
    p = pre.window_patches
    valid_share = valid.reshape(p, patch_px, p, patch_px).mean(axis=(1, 3))  # (P, P)
    return WindowPixels(pixels, valid_share >= 0.5)


def _read_direct(
    raster: Any, dataset: Dataset, bounds: Bounds, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a window of an image that is north up in the grid's CRS; returns (S, S, 3) pixels and (S, S) validity.

    Whole pixels around the window are read, invalid ones filled, and the window cut out of them by one resampling.
    """
    left, bottom, right, top = bounds
    t = raster.transform
    col0, col1 = (left - t.c) / t.a, (right - t.c) / t.a
    row0, row1 = (top - t.f) / t.e, (bottom - t.f) / t.e
    first_col, last_col = _with_reach(col0, col1, size, dataset)
    first_row, last_row = _with_reach(row0, row1, size, dataset)
    pixels, valid = _read_padded(raster, dataset, PatchRange(first_row, last_row, first_col, last_col))
    if dataset.collars:
        v = (np.arange(first_row, last_row) + 0.5)[:, None] / raster.height
        u = (np.arange(first_col, last_col) + 0.5)[None, :] / raster.width
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    filled = fill_invalid(pixels, valid)
    box = (col0 - first_col, row0 - first_row, col1 - first_col, row1 - first_row)
    image = Image.fromarray(filled).resize((size, size), _PILLOW_FILTER[dataset.preprocess.resampling], box)
    if valid.all():
        return np.asarray(image), np.ones((size, size), bool)
    share = Image.fromarray(valid.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX, box)
    return np.asarray(image), np.asarray(share) >= 128


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


def _read_warped(
    vrt: WarpedVRT, dataset: Dataset, bounds: Bounds, size: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read a window of a warped image; returns (S, S, 3) pixels and (S, S) validity."""
    left, _, _, top = bounds
    first_col, first_row = (
        round((left - vrt.transform.c) / vrt.transform.a),
        round((top - vrt.transform.f) / vrt.transform.e),
    )
    pixels, valid = _read_padded(vrt, dataset, PatchRange(first_row, first_row + size, first_col, first_col + size))
    if dataset.collars and valid.any():
        v, u = _place_in_image(dataset, bounds, size)
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    return fill_invalid(pixels, valid), valid


def _place_in_image(dataset: Dataset, bounds: Bounds, size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far down and across the image, 0 to 1, each pixel of a window lies; both of shape (S, S)."""
    tolerance = abs(dataset.transform[0]) + abs(dataset.transform[3])  # about a pixel of the image
    x, y = raster_points(bounds, dataset.grid.crs, (size, size), dataset.crs, tolerance)
    a, b, c, d, e, f = dataset.transform
    x, y, determinant = x - c, y - f, a * e - b * d
    col, row = (e * x - b * y) / determinant, (a * y - d * x) / determinant
    return row / dataset.height_px, col / dataset.width_px
