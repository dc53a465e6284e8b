"""Reading the pixels of patches at the codebook's gsd, resampled once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.enums import Resampling as RasterioResampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geocentroids_tiler.errors import UnsupportedImageError
from geocentroids_tiler.grid import Bounds, ChunkIndex, PatchRange, raster_points, window_patches_of
from geocentroids_tiler.source.cells import CELL_PATCHES, EMPTY, GAP, Cell, CellCache
from geocentroids_tiler.source.dataset import Dataset, to_uint8
from geocentroids_tiler.source.fill import fill_invalid
from geocentroids_tiler.source.opener import open_checked

_PILLOW_FILTER = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "cubic": Image.Resampling.BICUBIC,
    "average": Image.Resampling.BOX,
}
_FILTER_RADIUS = {"nearest": 1, "bilinear": 1, "cubic": 2, "average": 1}
"""Reach of the resampling filters, in source pixels at equal gsd."""
MAX_SOURCE_PX = 2**24
"""Pixels of an image that are read at once: a file may state any pixel size. Filled and resampled they take about 50
bytes each; a window of 112 m has as many at 2.7 cm, and finer images have overviews."""
_CELLS_OF_ONE_CALL_BYTES = 32 * 2**20
"""Memory for cells that the rectangles of one call share, where the caller keeps none."""


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


def read_windows(
    dataset: Dataset, windows: Sequence[ChunkIndex], patch_px: int, cells: CellCache | None = None
) -> list[WindowPixels]:
    """Read windows of a dataset; see ``iterate_windows``."""
    return list(iterate_windows(dataset, windows, patch_px, cells))


def iterate_windows(
    dataset: Dataset, windows: Sequence[ChunkIndex], patch_px: int, cells: CellCache | None = None
) -> Iterator[WindowPixels]:
    """Read windows of a dataset one after the other, through one opening of its file.

    What is read for a window depends on nothing but the window: not on the others, not on their order, not on what
    was read before.

    Args:
        dataset: the dataset.
        windows: indices of the windows.
        patch_px: pixels a side of a patch.
        cells: pieces of windows read before, of one codebook; neighbouring windows share most of theirs.

    Raises:
        SourceUnavailableError: if the file cannot be read.
    """
    pre = dataset.preprocess
    p = pre.window_patches
    ranges = [window_patches_of(index, p, pre.margin_patches, pre.stride_patches) for index in windows]
    for read in _read_each(dataset, ranges, patch_px, cells):
        yield WindowPixels(read.pixels, labelled_patches(read.valid, patch_px))


def labelled_patches(valid: NDArray[np.bool_], patch_px: int) -> NDArray[np.bool_]:
    """Return the patches of which at least half of the pixels are data, of shape (R, C).

    Args:
        valid: pixels that are data, of shape (R * patch_px, C * patch_px).
        patch_px: pixels a side of a patch.
    """
    rows, cols = (side // patch_px for side in valid.shape)
    share: NDArray[np.float64] = valid.reshape(rows, patch_px, cols, patch_px).mean(axis=(1, 3))
    return share >= 0.5


def read_patches(
    dataset: Dataset, ranges: Sequence[PatchRange], patch_px: int, cells: CellCache | None = None
) -> list[PatchPixels]:
    """Read rectangles of patches of a dataset through one opening of its file.

    What is read for a rectangle depends on nothing but the rectangle. It may reach beyond the image.

    Args:
        dataset: the dataset.
        ranges: the rectangles, none of them empty.
        patch_px: pixels a side of a patch.
        cells: pieces of rectangles read before, of one codebook.

    Returns:
        For each rectangle of R x C patches its pixels, H = R * patch_px by W = C * patch_px.

    Raises:
        SourceUnavailableError: if the file cannot be read.
    """
    return list(_read_each(dataset, ranges, patch_px, cells))


def _read_each(
    dataset: Dataset, ranges: Sequence[PatchRange], patch_px: int, cells: CellCache | None
) -> Iterator[PatchPixels]:
    cells = CellCache(_CELLS_OF_ONE_CALL_BYTES) if cells is None else cells
    with _Reader(dataset, patch_px) as reader:
        for patches in ranges:
            yield _read(reader, patches, cells)


class _Reader:
    """Reads pieces of one dataset, which is opened when the first is read."""

    def __init__(self, dataset: Dataset, patch_px: int) -> None:
        self.dataset = dataset
        self.patch_px = patch_px
        self._stack = ExitStack()
        self._check: Callable[[], None] = lambda: None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close the file, which turns GDAL's errors into ours."""
        return self._stack.__exit__(kind, error, trace)

    @cached_property
    def raster(self) -> Any:
        """The image, or the image warped to the grid, open."""
        dataset = self.dataset
        opened = open_checked(dataset.source, dataset.identity, dataset.overview)
        raster, self._check = self._stack.enter_context(opened)
        return self._stack.enter_context(_warped(dataset, raster, self.patch_px)) if dataset.warped else raster

    def cells(self, wanted: Sequence[ChunkIndex]) -> list[Cell]:
        """Read cells."""
        ranges = [index.patches(CELL_PATCHES) for index in wanted]
        if self.dataset.warped:
            cells = [_warped_cell(self.raster, self.dataset, patches, self.patch_px) for patches in ranges]
        else:
            cells = _direct_cells(self.raster, self.dataset, ranges, self.patch_px)
        self._check()
        return cells

    def filled(self, patches: PatchRange) -> PatchPixels:
        """Read patches of an image that is not warped as one piece, invalid pixels filled before all is resampled."""
        read = _read_direct(self.raster, self.dataset, patches, self.patch_px)
        self._check()
        return read


def _read(reader: _Reader, patches: PatchRange, cells: CellCache) -> PatchPixels:
    """Put a rectangle together from cells; where cells of an image that is not warped have gaps, read it whole."""
    dataset, n = reader.dataset, reader.patch_px
    found = {index: cells.get((dataset.key, index)) for index in patches.chunks(CELL_PATCHES)}
    missing = [index for index, cell in found.items() if cell is None]
    if missing and GAP not in found.values():
        for index, read in zip(missing, reader.cells(missing), strict=True):
            cells.put((dataset.key, index), read)
            found[index] = read
    height, width = _size_px(patches, n)
    if all(cell is EMPTY for cell in found.values()):
        return PatchPixels(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool))
    if GAP in found.values() or EMPTY in found.values():
        return reader.filled(patches)
    pixels = np.empty((height, width, 3), np.uint8)
    valid = np.ones((height, width), bool)
    for index, cell in found.items():
        whole = index.patches(CELL_PATCHES)
        part = whole.intersect(patches)
        target = _scaled(part.within(patches), n)
        source = _scaled(part.within(whole), n)
        if cell is not None:
            pixels[target] = cell.pixels[source]
            if cell.valid is not None:
                valid[target] = cell.valid[source]
    return PatchPixels(pixels if valid.all() else fill_invalid(pixels, valid), valid)


def _scaled(part: tuple[slice, slice], patch_px: int) -> tuple[slice, slice]:
    rows, cols = part
    return (
        slice(rows.start * patch_px, rows.stop * patch_px),
        slice(cols.start * patch_px, cols.stop * patch_px),
    )


def _direct_cells(raster: Any, dataset: Dataset, ranges: Sequence[PatchRange], patch_px: int) -> list[Cell]:
    """Read cells of an image that is north up in the grid's CRS: their source in one piece, each resampled alone."""
    whole = PatchRange(0, raster.height, 0, raster.width)
    places = [_place(dataset, raster.transform, patches, patch_px) for patches in ranges]
    inside = {place.source for place in places if place.source.intersect(whole) == place.source}
    if not inside:
        return [EMPTY if place.source.intersect(whole).empty else GAP for place in places]
    around = PatchRange(
        min(source.row_start for source in inside),
        max(source.row_stop for source in inside),
        min(source.col_start for source in inside),
        max(source.col_stop for source in inside),
    )
    pixels, valid = _read_source(raster, dataset, around)
    cells = []
    for place in places:
        at = place.source.within(around)
        if place.source not in inside:
            cells.append(EMPTY if place.source.intersect(whole).empty else GAP)
        elif not valid[at].all():
            cells.append(GAP if valid[at].any() else EMPTY)
        else:
            image = Image.fromarray(np.ascontiguousarray(pixels[at]))
            cells.append(
                Cell(np.asarray(image.resize(place.size, _PILLOW_FILTER[dataset.preprocess.resampling], place.box)))
            )
    return cells


@dataclass(frozen=True)
class _Place:
    """Where patches lie in an image that is north up in the grid's CRS.

    Attributes:
        source: the pixels that resampling looks at, as rows and columns; they may reach beyond the image.
        box: left, top, right and bottom of the patches in ``source``, in its pixels.
        size: width and height of the patches in pixels of the codebook.
    """

    source: PatchRange
    box: tuple[float, float, float, float]
    size: tuple[int, int]


def _place(dataset: Dataset, transform: Affine, patches: PatchRange, patch_px: int) -> _Place:
    left, bottom, right, top = dataset.grid.bounds_of(patches)
    height, width = _size_px(patches, patch_px)
    t = transform
    col0, col1 = (left - t.c) / t.a, (right - t.c) / t.a
    row0, row1 = (top - t.f) / t.e, (bottom - t.f) / t.e
    first_col, last_col = _with_reach(col0, col1, width, dataset)
    first_row, last_row = _with_reach(row0, row1, height, dataset)
    source_px = (last_row - first_row) * (last_col - first_col)
    if source_px > MAX_SOURCE_PX:
        raise UnsupportedImageError(
            f"the image has {source_px} px in a place of {width} x {height} px of the codebook; accepted: up to "
            f"{MAX_SOURCE_PX}. Its pixels are too small, or it lacks overviews"
        )
    return _Place(
        source=PatchRange(first_row, last_row, first_col, last_col),
        box=(col0 - first_col, row0 - first_row, col1 - first_col, row1 - first_row),
        size=(width, height),
    )


def _read_direct(raster: Any, dataset: Dataset, patches: PatchRange, patch_px: int) -> PatchPixels:
    """Read patches of an image that is north up in the grid's CRS.

    Whole pixels around them are read, invalid ones filled, and the patches cut out of them by one resampling.
    """
    place = _place(dataset, raster.transform, patches, patch_px)
    pixels, valid = _read_source(raster, dataset, place.source)
    filled = Image.fromarray(fill_invalid(pixels, valid))
    image = filled.resize(place.size, _PILLOW_FILTER[dataset.preprocess.resampling], place.box)
    share = Image.fromarray(valid.astype(np.uint8) * 255).resize(place.size, Image.Resampling.BOX, place.box)
    return PatchPixels(np.asarray(image), np.asarray(share) >= 128)


def _read_source(raster: Any, dataset: Dataset, wanted: PatchRange) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read whole pixels as ``_read_padded`` does, and leave out the collars."""
    pixels, valid = _read_padded(raster, dataset, wanted)
    if dataset.collars:
        v = (np.arange(wanted.row_start, wanted.row_stop) + 0.5)[:, None] / raster.height
        u = (np.arange(wanted.col_start, wanted.col_stop) + 0.5)[None, :] / raster.width
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    return pixels, valid


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
    at = inside.within(wanted)
    if dataset.options.rescale is None:  # bytes, written where they belong
        raster.read(dataset.indexes, window=window, out=pixels[at].transpose(2, 0, 1))
        valid[at] = _validity(raster, dataset, window)
        return pixels, valid
    part = raster.read(dataset.indexes, window=window)  # (3, rows, cols)
    pixels[at] = to_uint8(part, dataset.options.rescale).transpose(1, 2, 0)
    valid[at] = _validity(raster, dataset, window)
    if np.issubdtype(part.dtype, np.floating):
        valid[at] &= np.isfinite(part).all(axis=0)
    return pixels, valid


def _validity(raster: Any, dataset: Dataset, window: Window) -> NDArray[np.bool_]:
    """Tell which pixels are data, of shape (rows, cols): by alpha, else by mask or nodata."""
    if ColorInterp.alpha in raster.colorinterp:
        alpha = raster.read(raster.colorinterp.index(ColorInterp.alpha) + 1, window=window)
        # A warped image of floating-point numbers has 255 for opaque, a file of its own may have 1.
        opaque = np.iinfo(alpha.dtype).max if np.issubdtype(alpha.dtype, np.integer) else 1.0
        return np.asarray(alpha >= opaque / 2)
    # A pixel is data if any band is: a pure red has nodata = 0 in the other two.
    shared = MaskFlags.per_dataset in raster.mask_flag_enums[0]
    bands = dataset.indexes[:1] if shared else dataset.indexes
    return np.asarray((raster.read_masks(bands, window=window) >= 128).any(axis=0))


def _warped(dataset: Dataset, raster: Any, patch_px: int) -> WarpedVRT:
    """Return the image warped to the grid: its pixels are the pixels of windows, so nothing is resampled again."""
    grid, gsd_m = dataset.grid, dataset.grid.patch_m / patch_px
    left, _, _, top = grid.bounds_of(dataset.footprint)
    rows, cols = dataset.footprint.shape
    has_alpha = ColorInterp.alpha in raster.colorinterp
    try:
        return WarpedVRT(
            raster,
            crs=grid.crs.to_wkt(),
            transform=Affine(gsd_m, 0, left, 0, -gsd_m, top),
            width=cols * patch_px,
            height=rows * patch_px,
            resampling=RasterioResampling[dataset.preprocess.resampling],
            add_alpha=not has_alpha and raster.nodata is None,
        )
    except (RuntimeError, OverflowError) as error:  # what rasterio ends with where GDAL gives up
        raise UnsupportedImageError(f"the image cannot be warped to the ground: {error}") from error


def _warped_cell(vrt: WarpedVRT, dataset: Dataset, patches: PatchRange, patch_px: int) -> Cell:
    """Read a cell of a warped image, whose pixels are its own."""
    rows, cols = _scaled(patches.within(dataset.footprint), patch_px)
    pixels, valid = _read_padded(vrt, dataset, PatchRange(rows.start, rows.stop, cols.start, cols.stop))
    if dataset.collars and valid.any():
        v, u = _place_in_image(dataset, dataset.grid.bounds_of(patches), valid.shape)
        for collar in dataset.collars:
            valid &= ~collar.covers(pixels, v, u)
    return Cell(pixels, None if valid.all() else valid)


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
