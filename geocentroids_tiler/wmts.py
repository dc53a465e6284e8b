"""WMTS: in which TileMatrixSets an image can be asked for, and which of their tiles hold it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from morecantile import Tile, TileMatrixSet
from pyproj import CRS

from geocentroids_tiler.errors import UnsupportedImageError
from geocentroids_tiler.grid import WGS84, Bounds, bounds_holding, outline, project
from geocentroids_tiler.tiles import Extent, tms_crs, zoom_range

LAYER = "geocentroids"
WGS84_URN = "urn:ogc:def:crs:OGC:2:84"


@dataclass(frozen=True, slots=True)
class TileRange:
    """Tiles of one zoom level, first and last included."""

    z: int
    min_row: int
    max_row: int
    min_col: int
    max_col: int


def tile_ranges(tms: TileMatrixSet, extent: Extent, zooms: tuple[int, int]) -> tuple[TileRange, ...]:
    """Return the tiles that hold an image, for each zoom level; none if the image lies outside of a TileMatrixSet.

    Args:
        tms: the TileMatrixSet.
        extent: of the layer.
        zooms: first and last zoom level.
    """
    bounds = _bounds_in(tms, extent) if _is_meant_for(tms, extent.geographic_bounds) else None
    if bounds is None:
        return ()
    found = [_tiles_touching(tms, z, bounds) for z in range(zooms[0], zooms[1] + 1)]
    return () if None in found else tuple(tiles for tiles in found if tiles is not None)


def capabilities(
    extent: Extent,
    supported: Iterable[TileMatrixSet],
    seconds_per_chunk: float,
    budget_s: float,
    max_images: int,
    tiles_url: Callable[[str], str],
    query: str,
    media_type: str,
    use_epsg: bool,
) -> dict[str, Any]:
    """Return what the template of TiTiler's WMTS extension needs: a layer for each TileMatrixSet that holds the image.

    Args:
        extent: of the layer.
        supported: TileMatrixSets that the server knows.
        seconds_per_chunk: speed of the device.
        budget_s: time that one tile may take.
        max_images: images that one tile may open.
        tiles_url: address of the tiles of a TileMatrixSet.
        query: added to that address.
        media_type: of the tiles.
        use_epsg: name coordinate systems by EPSG code, which ArcMap needs.
    """
    layers, sets = [], []
    for tms in filter(_is_plain, supported):
        ranges = tile_ranges(tms, extent, zoom_range(tms, extent, seconds_per_chunk, budget_s, max_images))
        if not ranges:
            continue
        name = f"{LAYER}_{tms.id}_default"
        limits = [
            {
                "tileMatrix": tms.matrix(tiles.z).id,
                "minTileRow": tiles.min_row,
                "maxTileRow": tiles.max_row,
                "minTileCol": tiles.min_col,
                "maxTileCol": tiles.max_col,
            }
            for tiles in ranges
        ]
        layers.append(
            {
                "title": name,
                "identifier": name,
                "tms_identifier": tms.id,
                "tms_limits": limits,
                "tiles_url": tiles_url(str(tms.id)),
                "query_string": query,
                "bbox_crs_type": "WGS84BoundingBox",
                "bbox_crs_uri": WGS84_URN,
                "bbox": extent.geographic_bounds,
            }
        )
        crs = f"EPSG:{tms.crs.to_epsg()}" if use_epsg else tms.crs.srs
        sets.append({"id": tms.id, "crs": crs, "matrices": tms.tileMatrices})
    return {"layers": layers, "tileMatrixSets": sets, "media_type": media_type}


def _is_plain(tms: TileMatrixSet) -> bool:
    """Tell whether WMTS 1.0 can describe a TileMatrixSet: rows of equal tiles, counted from the top left."""
    return all(
        matrix.cornerOfOrigin == "topLeft" and matrix.variableMatrixWidths is None for matrix in tms.tileMatrices
    )


def _is_meant_for(tms: TileMatrixSet, bounds: Bounds) -> bool:
    """Tell whether a place is where the tiles' CRS is meant to be used: UTM 31 reaches around the Earth, distorted."""
    code = tms.crs.to_epsg()
    area = CRS.from_epsg(code).area_of_use if code else None
    if area is None:
        return True
    west, south, east, north = bounds
    pieces = [(area.west, area.east)] if area.west <= area.east else [(area.west, 180.0), (-180.0, area.east)]
    return south <= area.north and north >= area.south and any(west <= e and east >= w for w, e in pieces)


def _bounds_in(tms: TileMatrixSet, extent: Extent) -> Bounds | None:
    """Return a rectangle of the tiles' CRS that holds the layer; all of it where the layer is torn apart there."""
    crs, grid = tms_crs(tms), extent.grid
    bounds = _many_bounds_in(crs, extent) if extent.image_m else bounds_holding(extent.footprint, grid, crs)
    if bounds is not None:
        return bounds
    left, bottom, right, top = grid.bounds_of(extent.footprint)
    x, y = project(grid.crs, crs, (left + right) / 2, (bottom + top) / 2)
    return (-math.inf, -math.inf, math.inf, math.inf) if math.isfinite(x) and math.isfinite(y) else None


def _many_bounds_in(crs: CRS, extent: Extent) -> Bounds | None:
    """Return a rectangle of the tiles' CRS that holds many images, which may lie on several grids."""
    west, south, east, north = extent.geographic_bounds
    try:
        edge = outline(WGS84, (east - west, 0, west, 0, south - north, north), 1, 1, crs)
    except UnsupportedImageError:
        return None
    low, high = edge.min(axis=0), edge.max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def _tiles_touching(tms: TileMatrixSet, z: int, bounds: Bounds) -> TileRange | None:
    matrix, origin = tms.matrix(z), tms.xy_bounds(Tile(0, 0, z))
    width, height = matrix.cellSize * matrix.tileWidth, matrix.cellSize * matrix.tileHeight
    last_row, last_col = matrix.matrixHeight - 1, matrix.matrixWidth - 1
    cols = [(x - origin.left) / width for x in (bounds[0], bounds[2])]
    rows = [(origin.top - y) / height for y in (bounds[3], bounds[1])]
    if cols[1] < 0 or rows[1] < 0 or cols[0] > last_col + 1 or rows[0] > last_row + 1:
        return None
    return TileRange(
        z,
        math.floor(max(rows[0], 0)),
        math.floor(min(rows[1], last_row)),
        math.floor(max(cols[0], 0)),
        math.floor(min(cols[1], last_col)),
    )
