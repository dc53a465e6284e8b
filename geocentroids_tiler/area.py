"""Areas that users draw: which patches have their centre inside a box or a polygon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from shapely.errors import GEOSException
from shapely.geometry import shape

from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import (
    WGS84,
    Bounds,
    Grid,
    PatchRange,
    bounds_holding,
    outline,
    project,
    raster_points,
)

Inside = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.bool_]]
"""Tells which points, by x and y of one shape, lie in something."""
_POLYGONS = ("Polygon", "MultiPolygon")
_PLACE_TOLERANCE = 0.001
"""Patch centres are placed in the area's CRS to this share of a patch."""
_BLOCK_PATCHES = 256
"""Patch centres are placed in squares of this many patches a side, which lie where they do whatever is asked: so a
patch has one place in all requests, and of two areas that share an edge exactly one holds it."""


@dataclass(frozen=True)
class Area:
    """Patches of an area.

    Attributes:
        patches: the smallest rectangle of patches known to hold the area's part inside the image.
        inside: which of them have their centre in the area, of shape ``patches.shape``.
    """

    patches: PatchRange
    inside: NDArray[np.bool_]

    @property
    def empty(self) -> bool:
        """True if no patch has its centre in the area."""
        return not self.inside.any()

    def only(self, inside: NDArray[np.bool_]) -> Area:
        """Return the part of the area in which ``inside``, of its shape, is true."""
        return _tight(self.patches, self.inside & inside)


@dataclass(frozen=True)
class Region:
    """Ground that a user draws, whatever grid it is looked at on.

    Attributes:
        bounds: of a rectangle that holds it, in ``crs``.
        crs: its coordinate system, x (longitude) first.
        inside: tells which points, by x and y of one shape, lie in it.
    """

    bounds: Bounds
    crs: CRS
    inside: Inside

    @property
    def centre(self) -> tuple[float, float]:
        """Longitude and latitude of the middle of its bounds; infinite where it is no place on Earth."""
        left, bottom, right, top = self.bounds
        lon, lat = project(self.crs, WGS84, (left + right) / 2, (bottom + top) / 2)
        return float(lon), float(lat)

    @property
    def geographic_bounds(self) -> Bounds | None:
        """West, south, east, north in degrees of a rectangle that holds it; None if it has no place on Earth."""
        left, bottom, right, top = self.bounds
        try:
            edge = outline(self.crs, (right - left, 0, left, 0, bottom - top, top), 1, 1, WGS84)
        except UnsupportedImageError:
            return None
        (west, south), (east, north) = edge.min(axis=0), edge.max(axis=0)
        slack = 0.02 * max(east - west, north - south)  # edges bend between the points of the outline
        return float(west - slack), float(south - slack), float(east + slack), float(north + slack)

    def near(self, grid: Grid, footprint: PatchRange) -> PatchRange:
        """Return a rectangle of patches that is sure to hold its part inside ``footprint``."""
        return _candidates(self.bounds, self.crs, grid, footprint)

    def on(self, grid: Grid, footprint: PatchRange) -> Area:
        """Return the patches of ``footprint`` whose centre lies in it."""
        patches = self.near(grid, footprint)
        mask = np.zeros(patches.shape, bool)
        for block in patches.chunks(_BLOCK_PATCHES):
            whole = block.patches(_BLOCK_PATCHES)
            part = whole.intersect(patches)
            x, y = _centres(whole, grid, self.crs)
            own = part.within(whole)
            mask[part.within(patches)] = self.inside(x[own], y[own])
        return _tight(patches, mask)


def region_of_bbox(bbox: Bounds, crs: CRS) -> Region:
    """Return a box as a region; edges at the left and the bottom belong to it, the others do not.

    Args:
        bbox: minx, miny, maxx, maxy in ``crs``.
        crs: CRS of the box, x (longitude) first.

    Raises:
        InputError: if the box is not finite, empty or turned around.
    """
    minx, miny, maxx, maxy = bbox
    if not np.isfinite(bbox).all() or minx >= maxx or miny >= maxy:
        raise InputError(
            f"bbox {minx},{miny},{maxx},{maxy} is not minx,miny,maxx,maxy with minx < maxx and miny < maxy; "
            "split a box that crosses the antimeridian in two"
        )

    def inside(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray((x >= minx) & (x < maxx) & (y >= miny) & (y < maxy))

    return Region(bbox, crs, inside)


def region_of_geometry(geometry: Mapping[str, Any]) -> Region:
    """Return a GeoJSON polygon as a region.

    Args:
        geometry: a Polygon or MultiPolygon in longitude and latitude.

    Raises:
        InputError: if it is another kind of geometry or not a valid polygon.
    """
    kind = geometry.get("type")
    if kind not in _POLYGONS:
        raise InputError(f"geometry is a {kind}; accepted: {' and '.join(_POLYGONS)}")
    try:
        with np.errstate(invalid="ignore"):  # not-a-number makes an invalid polygon, and is said below
            polygon = shape(dict(geometry))
    except (GEOSException, ValueError, TypeError, LookupError, AttributeError) as error:
        raise InputError(f"geometry is not a readable {kind}: {error}") from error
    if polygon.is_empty or not polygon.is_valid:
        reason = "it is empty" if polygon.is_empty else shapely.is_valid_reason(polygon)
        raise InputError(f"geometry is not a valid {kind}: {reason}")
    shapely.prepare(polygon)

    def inside(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray(shapely.contains_xy(polygon, x, y))

    return Region(polygon.bounds, WGS84, inside)


def patches_of_zone(patches: PatchRange, grid: Grid, in_zone: Inside) -> NDArray[np.bool_]:
    """Tell which patches have their centre in a part of the world, of shape ``patches.shape``.

    Args:
        patches: which ones.
        grid: whose patches.
        in_zone: tells it of longitudes and latitudes.
    """
    found = np.zeros(patches.shape, bool)
    for block in patches.chunks(_BLOCK_PATCHES):
        whole = block.patches(_BLOCK_PATCHES)
        part = whole.intersect(patches)
        own = part.within(whole)
        lon, lat = _centres(whole, grid, WGS84)
        found[part.within(patches)] = in_zone(lon[own], lat[own])
    return found


def _tight(patches: PatchRange, mask: NDArray[np.bool_]) -> Area:
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return Area(PatchRange(0, 0, 0, 0), np.zeros((0, 0), bool))
    tight = PatchRange(
        patches.row_start + int(rows[0]),
        patches.row_start + int(rows[-1]) + 1,
        patches.col_start + int(cols[0]),
        patches.col_start + int(cols[-1]) + 1,
    )
    return Area(tight, mask[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def _centres(block: PatchRange, grid: Grid, crs: CRS) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return x and y in ``crs`` of the centres of a block's patches."""
    tolerance = grid.patch_m * _PLACE_TOLERANCE
    if crs.is_geographic:
        tolerance /= 111_320  # metres per degree, at most
    return raster_points(grid.bounds_of(block), grid.crs, block.shape, crs, tolerance)


def _candidates(bounds: Bounds, crs: CRS, grid: Grid, footprint: PatchRange) -> PatchRange:
    """Return patches that are sure to hold the part of ``bounds`` inside ``footprint``; more is harmless."""
    image = bounds_holding(footprint, grid, crs)
    if image is None:
        return footprint
    # The part near the image only: a grid says little about the other side of the world.
    left, bottom = max(bounds[0], image[0]), max(bounds[1], image[1])
    right, top = min(bounds[2], image[2]), min(bounds[3], image[3])
    if left > right or bottom > top:
        return PatchRange(0, 0, 0, 0)
    try:
        edge = outline(crs, (right - left, 0, left, 0, bottom - top, top), 1, 1, grid.crs)
    except UnsupportedImageError:
        return footprint
    if len(edge) < 4 * 33:  # part of it is beyond the grid's CRS, so its outline there says little
        return footprint
    (west, south), (east, north) = edge.min(axis=0), edge.max(axis=0)
    slack = 0.02 * max(east - west, north - south) + 2 * grid.patch_m  # edges bend between the points of the outline
    return grid.patches_touching((west - slack, south - slack, east + slack, north + slack)).intersect(footprint)
