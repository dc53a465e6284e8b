"""Tiles: which patches lie under a tile's pixels, which zoom levels are worth asking for, and tiles kept in memory."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from morecantile import Tile, TileMatrixSet
from numpy.typing import NDArray
from pyproj import CRS

from geocentroids_tiler import __version__
from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Classes, PreprocessSection
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import (
    WGS84,
    Bounds,
    Grid,
    PatchRange,
    RasterMesh,
    bounds_holding,
    exact_points,
    project,
    raster_mesh,
)
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.kept import KeptBlock
from geocentroids_tiler.mosaic import Mosaic
from geocentroids_tiler.render import (
    ImageFormat,
    Style,
    average_samples,
    cell_colors,
    encode_indexed,
    encode_rgba,
    palette_index,
    sample,
)
from geocentroids_tiler.source import Dataset, ReadOptions

PLACE_TOLERANCE = 0.02
"""Pixel centres are placed on the ground to this share of a patch."""
_ENTRY_OVERHEAD_BYTES = 1024
"""Python objects around one cached tile, roughly."""
_NOWHERE = -(2.0**30)
"""Row and column of a pixel without a place in the grid's CRS."""


@dataclass(frozen=True, slots=True)
class TileKey:
    """All that a tile's content depends on.

    Attributes:
        url: the source.
        identity: of the source's content.
        options: how bands become RGB.
        codebook_digest: of the codebook's content.
        device: what computes the labels.
        tms: TileMatrixSet.
        z: zoom level.
        x: column.
        y: row.
        size_px: pixels a side.
        image_format: png or webp.
        classes: number of merged classes.
        style: how labels are drawn.
    """

    url: str
    identity: str
    options: ReadOptions
    codebook_digest: str
    device: str
    tms: str
    z: int
    x: int
    y: int
    size_px: int
    image_format: ImageFormat
    classes: int | None
    style: Style

    @property
    def etag(self) -> str:
        """The tile's entity tag. Equal keys give equal bytes, so it is known before the tile is drawn."""
        parts = [getattr(self, name) for name in self.__slots__]
        text = json.dumps([__version__, *parts], default=_plain)
        return f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'


class TileCache(ByteCache[TileKey, bytes]):
    """Encoded tiles in memory."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes, lambda content: len(content) + _ENTRY_OVERHEAD_BYTES)


@dataclass(frozen=True)
class TileView:
    """Patches under the pixels of a tile.

    Attributes:
        size_px: pixels a side of the tile.
        pixels: the tile's pixels that may hold a part of the image, as rows and columns; no other has a patch.
        samples: samples a side of a pixel: 1 where a pixel is at most as large as a patch, else 2 to 4.
        cell: patches a side of the squares whose colours are averaged before they are sampled: a power of two, 1
            where a pixel covers less than 4 x 4 patches.
        patches: a rectangle that holds the patches under the pixels, as far as they are inside the image; with larger
            cells of the whole cells, which start at the first row and column of the image.
        mesh: where the samples are, in patches from the start of ``patches``: y for rows, x for columns; where that
            cannot be interpolated, as fine as the samples.
    """

    size_px: int
    pixels: PatchRange
    samples: int
    cell: int
    patches: PatchRange
    mesh: RasterMesh

    @property
    def whole(self) -> PatchRange:
        """All pixels of the tile."""
        return PatchRange(0, self.size_px, 0, self.size_px)

    @cached_property
    def places(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Row and column of each sample's patch, from the start of ``patches``.

        Of shape (rows * samples, cols * samples) of ``pixels``, int32; outside of the rectangle where a sample is.
        """
        rows, cols = (
            part if part.shape == self.mesh.shape else self.mesh.spread(part.astype(np.float32))
            for part in (self.mesh.y, self.mesh.x)
        )
        return np.floor(rows).astype(np.int32), np.floor(cols).astype(np.int32)


def check_zoom(tms: TileMatrixSet, z: int) -> None:
    """Raise InputError unless the TileMatrixSet has the zoom level."""
    if not tms.minzoom <= z <= tms.maxzoom:
        raise InputError(f"zoom {z} is not in {tms.id}; accepted: {tms.minzoom} to {tms.maxzoom}")


def tile_view(tms: TileMatrixSet, tile: Tile, size_px: int, grid: Grid, footprint: PatchRange) -> TileView | None:
    """Find the patches under the pixels of a tile.

    Args:
        tms: the TileMatrixSet.
        tile: x, y and z.
        size_px: pixels a side.
        grid: the ground grid.
        footprint: patches of the image.

    Returns:
        The patches, or None if the tile lies outside of the image.
    """
    matrix = tms.matrix(tile.z)
    if not (0 <= tile.x < matrix.matrixWidth and 0 <= tile.y < matrix.matrixHeight):
        return None
    crs = tms_crs(tms)
    left, bottom, right, top = tms.xy_bounds(tile)
    bounds = (left, bottom, right, top)
    pixels = _pixels_holding(bounds_holding(footprint, grid, crs), bounds, size_px)
    if pixels.empty:
        return None
    part = _bounds_of_pixels(pixels, bounds, size_px)
    pixel = _pixel_patches(part, pixels.shape, crs, grid)
    cell = 2 ** max(0, math.floor(math.log2(pixel / 2)))
    samples = math.ceil(pixel / cell)
    shape = (pixels.shape[0] * samples, pixels.shape[1] * samples)
    tolerance = PLACE_TOLERANCE * grid.patch_m * max(1.0, pixel / samples)
    mesh = raster_mesh(part, crs, shape, grid.crs, tolerance)
    if mesh is None:
        mesh = RasterMesh(*exact_points(part, crs, shape, grid.crs), shape)
    x, y = mesh.x / grid.patch_m, -mesh.y / grid.patch_m
    placed = np.isfinite(x) & np.isfinite(y)
    if not placed.any():
        return None
    covered = PatchRange(
        math.floor(y[placed].min()),
        math.floor(y[placed].max()) + 1,
        math.floor(x[placed].min()),
        math.floor(x[placed].max()) + 1,
    ).intersect(footprint)
    if covered.empty:
        return None
    patches = _whole_cells(covered, cell, footprint)
    # In patches from the rectangle's start numbers are small enough for float32.
    rows = np.where(placed, y - patches.row_start, _NOWHERE).clip(_NOWHERE, -_NOWHERE)
    cols = np.where(placed, x - patches.col_start, _NOWHERE).clip(_NOWHERE, -_NOWHERE)
    return TileView(size_px, pixels, samples, cell, patches, RasterMesh(cols, rows, shape))


def draw_tile(
    view: TileView,
    block: LabelBlock | KeptBlock,
    classes: Classes,
    style: Style,
    similarity_range: tuple[float, float],
    image_format: ImageFormat,
) -> bytes:
    """Draw and encode a tile.

    Each pixel takes the colour of the patch under its centre; where a pixel covers several patches their colours are
    averaged.

    Args:
        view: patches under the pixels.
        block: labels of ``view.patches``, of patches or of cells of at most ``view.cell`` patches a side.
        classes: classes of the labels.
        style: how they are drawn.
        similarity_range: similarities of the ends of the ramp.
        image_format: png or webp.
    """
    index, palette = palette_index(block.labels, block.similarity, classes, style, similarity_range)
    if view.samples == 1:
        return encode_indexed(_indexed(view, index, len(palette) - 1), palette, image_format)
    return encode_rgba(_averaged(view, block, index, palette), image_format)


def draw_zones(
    parts: Sequence[tuple[TileView, LabelBlock | KeptBlock, NDArray[np.bool_]]],
    classes: Classes,
    style: Style,
    similarity_range: tuple[float, float],
    image_format: ImageFormat,
) -> bytes:
    """Draw and encode a tile that lies on several grids, as ``draw_tile`` does.

    Args:
        parts: of each grid the patches under the pixels, their labels, and which of the tile's pixels, of shape
            (size_px, size_px), belong to it.
        classes: classes of the labels.
        style: how they are drawn.
        similarity_range: similarities of the ends of the ramp.
        image_format: png or webp.
    """
    size_px = parts[0][0].size_px
    rgba = np.zeros((size_px, size_px, 4), np.uint8)
    for view, block, own in parts:
        index, palette = palette_index(block.labels, block.similarity, classes, style, similarity_range)
        if view.samples == 1:
            picture = palette[_indexed(view, index, len(palette) - 1)]
        else:
            picture = _averaged(view, block, index, palette)
        rgba[own] = picture[own]
    return encode_rgba(rgba, image_format)


def pixel_places(tms: TileMatrixSet, tile: Tile, size_px: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return longitude and latitude of a tile's pixel centres, of shape (size_px, size_px)."""
    left, bottom, right, top = tms.xy_bounds(tile)
    return exact_points((left, bottom, right, top), tms_crs(tms), (size_px, size_px), WGS84)


def _indexed(view: TileView, index: NDArray[np.uint16], nodata: int) -> NDArray[np.uint16]:
    """Return the palette index of each pixel of a tile."""
    rows, cols = view.places
    picture = np.full((view.size_px, view.size_px), nodata, np.uint16)
    picture[view.pixels.within(view.whole)] = sample(index, rows, cols, nodata)
    return picture


def _averaged(
    view: TileView, block: LabelBlock | KeptBlock, index: NDArray[np.uint16], palette: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Return the RGBA of each pixel of a tile, averaged over the patches that it covers."""
    rows, cols = view.places
    factor = block.factor if isinstance(block, KeptBlock) else 1
    colors = cell_colors(index, palette, view.cell // factor)
    rgba = np.zeros((view.size_px, view.size_px, 4), np.uint8)
    rgba[view.pixels.within(view.whole)] = average_samples(colors, rows // view.cell, cols // view.cell, view.samples)
    return rgba


@dataclass(frozen=True)
class Extent:
    """How much ground a layer has, and on which grid.

    Attributes:
        grid: the ground grid; of several the one with most images.
        footprint: patches of a rectangle that holds what is on that grid.
        geographic_bounds: west, south, east, north of the whole layer in degrees.
        chunks: to label all of it.
        preprocess: of the codebook.
        image_m: side of a square as large as an image is on average, where there are many.
    """

    grid: Grid
    footprint: PatchRange
    geographic_bounds: Bounds
    chunks: int
    preprocess: PreprocessSection
    image_m: float | None = None

    @classmethod
    def of(cls, layer: Dataset | Mosaic, preprocess: PreprocessSection) -> Extent:
        """Return the extent of an image or a mosaic."""
        if isinstance(layer, Dataset):
            return cls(layer.grid, layer.footprint, layer.geographic_bounds, layer.chunk_count, preprocess)
        zone = max(layer.zones, key=lambda zone: len(zone.members))
        chunk_m2 = (preprocess.stride_patches * layer.patch_m) ** 2
        return cls(
            zone.grid,
            zone.footprint,
            layer.geographic_bounds,
            math.ceil(layer.area_m2 / chunk_m2),
            preprocess,
            max(layer.patch_m, math.sqrt(layer.area_m2 / len(layer.members))),
        )


def zoom_range(
    tms: TileMatrixSet, extent: Extent, seconds_per_chunk: float, budget_s: float, max_images: int = sys.maxsize
) -> tuple[int, int]:
    """Return the zoom levels at which a layer is worth asking for.

    Args:
        tms: the TileMatrixSet.
        extent: of the layer.
        seconds_per_chunk: speed of the device; 0 where labels are there already.
        budget_s: time that one tile may take.
        max_images: images that one tile may open.

    Returns:
        minzoom, the lowest at which a tile's share of the layer is labelled within ``budget_s``, and maxzoom, the
        lowest at which a pixel of the tile is at most as large as one of the codebook's.
    """
    levels = range(tms.minzoom, tms.maxzoom + 1)
    gsd_m = extent.preprocess.gsd_m
    cell_m = _metres_per_unit(tms, extent)
    maxzoom = next((z for z in levels if tms.matrix(z).cellSize * cell_m <= gsd_m * 1.01), tms.maxzoom)
    chunk_m = extent.preprocess.stride_patches * extent.grid.patch_m
    affordable = budget_s / seconds_per_chunk if seconds_per_chunk else math.inf
    for z in levels:
        matrix = tms.matrix(z)
        side_m = matrix.cellSize * cell_m * max(matrix.tileWidth, matrix.tileHeight)
        images = 1 if extent.image_m is None else (side_m / extent.image_m + 1) ** 2
        if min(extent.chunks, (side_m / chunk_m + 1) ** 2) <= affordable and images <= max_images:
            return min(z, maxzoom), maxzoom
    return maxzoom, maxzoom


def tms_crs(tms: TileMatrixSet) -> CRS:
    """Return the CRS of a TileMatrixSet."""
    return _crs_of_wkt(tms.rasterio_crs.to_wkt())


@lru_cache(maxsize=256)
def _crs_of_wkt(wkt: str) -> CRS:
    return CRS.from_wkt(wkt)


def _metres_per_unit(tms: TileMatrixSet, extent: Extent) -> float:
    """Return the metres on the ground that one unit of the tiles' CRS spans at the middle of a layer."""
    crs, grid = tms_crs(tms), extent.grid
    left, bottom, right, top = grid.bounds_of(extent.footprint)
    cx, cy = project(grid.crs, crs, (left + right) / 2, (bottom + top) / 2)
    step = tms.matrix(tms.maxzoom).cellSize
    x, y = project(crs, grid.crs, cx + np.array([0, step, 0]), cy + np.array([0, 0, step]))
    area = abs((x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0]))
    scale = math.sqrt(float(area)) / step
    return scale if math.isfinite(scale) and scale > 0 else 1.0


def _pixels_holding(image: Bounds | None, tile: Bounds, size_px: int) -> PatchRange:
    """Return the pixels of a tile that share area with an image's bounds; all of them where those are unknown."""
    whole = PatchRange(0, size_px, 0, size_px)
    if image is None:
        return whole
    left, bottom, right, top = tile
    cols = [math.floor((x - left) / (right - left) * size_px) for x in (image[0], image[2])]
    rows = [math.floor((top - y) / (top - bottom) * size_px) for y in (image[3], image[1])]
    return PatchRange(rows[0], rows[1] + 1, cols[0], cols[1] + 1).intersect(whole)


def _bounds_of_pixels(pixels: PatchRange, tile: Bounds, size_px: int) -> Bounds:
    left, bottom, right, top = tile
    width, height = (right - left) / size_px, (top - bottom) / size_px
    return (
        left + pixels.col_start * width,
        top - pixels.row_stop * height,
        left + pixels.col_stop * width,
        top - pixels.row_start * height,
    )


def _whole_cells(patches: PatchRange, cell: int, footprint: PatchRange) -> PatchRange:
    """Extend a rectangle of patches to whole cells, which start where the footprint does."""
    top, left = footprint.row_start, footprint.col_start
    return PatchRange(
        top + (patches.row_start - top) // cell * cell,
        top - (top - patches.row_stop) // cell * cell,
        left + (patches.col_start - left) // cell * cell,
        left - (left - patches.col_stop) // cell * cell,
    )


def _pixel_patches(bounds: Bounds, shape: tuple[int, int], crs: CRS, grid: Grid) -> float:
    """Return the longer side in patches of a raster's pixels, at its middle; 1 where that has no place in the grid."""
    left, bottom, right, top = bounds
    cx, cy = (left + right) / 2, (bottom + top) / 2
    width, height = (right - left) / shape[1], (top - bottom) / shape[0]
    x, y = project(crs, grid.crs, cx + np.array([0, width, 0]), cy + np.array([0, 0, height]))
    length = float(np.hypot(x[1:] - x[0], y[1:] - y[0]).max()) / grid.patch_m
    return length if math.isfinite(length) else 1.0


def _plain(value: object) -> object:
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, ReadOptions):
        return [value.bidx, value.rescale, value.grid]
    if isinstance(value, Style):
        return [value.layer, sorted(value.highlight)]
    raise TypeError(f"{type(value).__name__} has no place in an entity tag")
