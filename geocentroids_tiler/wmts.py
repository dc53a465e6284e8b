"""WMTS: in which TileMatrixSets an image can be asked for, and which of their tiles hold it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from morecantile import Tile, TileMatrixSet
from pyproj import CRS

from geocentroids_tiler.grid import Bounds, bounds_holding, project
from geocentroids_tiler.source import Dataset
from geocentroids_tiler.tiles import tms_crs, zoom_range

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


def tile_ranges(tms: TileMatrixSet, dataset: Dataset, zooms: tuple[int, int]) -> tuple[TileRange, ...]:
    """Return the tiles that hold an image, for each zoom level; none if the image lies outside of a TileMatrixSet.

    Args:
        tms: the TileMatrixSet.
        dataset: the image.
        zooms: first and last zoom level.
    """
    bounds = _bounds_in(tms, dataset) if _is_meant_for(tms, dataset.geographic_bounds) else None
    if bounds is None:
        return ()
    found = [_tiles_touching(tms, z, bounds) for z in range(zooms[0], zooms[1] + 1)]
    return () if None in found else tuple(tiles for tiles in found if tiles is not None)


def capabilities(
    dataset: Dataset,
    supported: Iterable[TileMatrixSet],
    seconds_per_chunk: float,
    budget_s: float,
    tiles_url: Callable[[str], str],
    query: str,
    media_type: str,
    use_epsg: bool,
) -> dict[str, Any]:
    """Return what the template of TiTiler's WMTS extension needs: a layer for each TileMatrixSet that holds the image.

    Args:
        dataset: the image.
        supported: TileMatrixSets that the server knows.
        seconds_per_chunk: speed of the device.
        budget_s: time that one tile may take.
        tiles_url: address of the tiles of a TileMatrixSet.
        query: added to that address.
        media_type: of the tiles.
        use_epsg: name coordinate systems by EPSG code, which ArcMap needs.
    """
    layers, sets = [], []
    for tms in filter(_is_plain, supported):
        ranges = tile_ranges(tms, dataset, zoom_range(tms, dataset, seconds_per_chunk, budget_s))
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
                "bbox": dataset.geographic_bounds,
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


def _bounds_in(tms: TileMatrixSet, dataset: Dataset) -> Bounds | None:
    """Return a rectangle of the tiles' CRS that holds the image; all of it where the image is torn apart there."""
    crs, grid = tms_crs(tms), dataset.grid
    bounds = bounds_holding(dataset.footprint, grid, crs)
    if bounds is not None:
        return bounds
    left, bottom, right, top = grid.bounds_of(dataset.footprint)
    x, y = project(grid.crs, crs, (left + right) / 2, (bottom + top) / 2)
    return (-math.inf, -math.inf, math.inf, math.inf) if math.isfinite(x) and math.isfinite(y) else None


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
