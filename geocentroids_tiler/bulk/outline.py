"""The outline of an image in longitude and latitude, as GeoJSON wants it (RFC 7946)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS
from shapely.affinity import translate
from shapely.geometry.polygon import orient

from geocentroids_tiler.grid import WGS84, AffineCoefficients, Bounds, geographic_bounds, outline

DECIMALS = 6
"""Of a degree: a tenth of a metre."""
_SIDE = 32
"""Steps in which ``outline`` goes along a side."""
_TORN_DEGREES = 90.0
"""Neighbours on the outline that are further apart in longitude lie around a pole."""


@dataclass(frozen=True)
class Footprint:
    """Where an image lies.

    Attributes:
        geometry: a GeoJSON Polygon, or a MultiPolygon that is cut at the antimeridian.
        bbox: west, south, east, north in degrees; west is greater than east where it crosses the antimeridian.
    """

    geometry: dict[str, Any]
    bbox: Bounds


def footprint_of(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int) -> Footprint:
    """Return the outline of an image with as many points as it needs to be true to a tenth of a metre or so.

    Args:
        crs: the image's CRS.
        transform: its geotransform.
        width_px: columns.
        height_px: rows.

    Raises:
        UnsupportedImageError: if no part of it lies on Earth.
    """
    edge = outline(crs, transform, width_px, height_px, WGS84)
    lon = np.unwrap(edge[:, 0], period=360)
    whole = len(edge) == 4 * (_SIDE + 1)
    if not whole or np.abs(np.diff(lon)).max() > _TORN_DEGREES or abs(lon[-1] - lon[0]) > _TORN_DEGREES:
        # Around a pole, or partly beyond what its CRS can place: a box that holds it.
        west, south, east, north = geographic_bounds(crs, transform, width_px, height_px)
        if np.ptp(lon) > 180:
            west, east = -180.0, 180.0
            south, north = (-90.0, north) if south + north < 0 else (south, 90.0)
        return _as_geojson(shapely.box(west, south, east, north))
    points = _needed(np.stack([lon, edge[:, 1]], axis=1))
    points[:, 0] -= 360 * np.floor((points[:, 0].mean() + 180) / 360)
    return _as_geojson(shapely.Polygon(points))


def bbox_of_all(boxes: Iterable[Sequence[float]]) -> Bounds:
    """Return the smallest box that holds all of some.

    It crosses the antimeridian (west is greater than east) only where that makes it narrower than a quarter of the
    world: many programs cannot draw such a box.

    Args:
        boxes: west, south, east, north in degrees of each; at least one.
    """
    west, south, east, north = np.array(list(boxes), np.float64).T
    crossing = east < west
    order = np.argsort(west, kind="stable")
    start, end = west[order], np.where(crossing, east + 360, east)[order]
    # The widest gap on the circle is what a box may leave out. All that ends before a gap, going east, counts: also
    # what begins at the end of the circle.
    reach = np.maximum.accumulate(np.append(end.max() - 360, end))[1:]
    gaps = np.append(start[1:], start[0] + 360) - reach
    widest = int(np.argmax(gaps))
    left, right = float(start[(widest + 1) % len(start)]), _wrapped(float(reach[widest]))
    if left > right and 360 - gaps[widest] >= 90:
        left, right = (-180.0, 180.0) if crossing.any() else (float(west.min()), float(east.max()))
    return left, float(south.min()), right, float(north.max())


def _wrapped(lon: float) -> float:
    return lon - 360 if lon > 180 else lon


def _needed(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return every n-th point of each side, the largest n for which no other lies beside the line between them."""
    sides = points.reshape(4, _SIDE + 1, 2)
    for step in (32, 16, 8, 4, 2):
        at = np.arange(0, _SIDE + 1, step)
        bent = max(
            float(np.abs(np.interp(np.arange(_SIDE + 1), at, side[at, axis]) - side[:, axis]).max())
            for side in sides
            for axis in (0, 1)
        )
        if bent <= 10**-DECIMALS:
            return sides[:, :-1:step].reshape(-1, 2).copy()
    return sides[:, :-1].reshape(-1, 2).copy()


def _as_geojson(polygon: shapely.Polygon) -> Footprint:
    """Cut a polygon with longitudes somewhat beyond -180 to 180 at the antimeridian, and round it."""
    parts = []
    for shift in (0, 360, -360):
        inside = shapely.intersection(translate(polygon, shift), shapely.box(-180, -90, 180, 90))
        parts += [part for part in shapely.get_parts(inside) if part.area > 0]
    rings = [_ring(part) for part in parts if isinstance(part, shapely.Polygon)]
    west, south, east, north = polygon.bounds
    if len(rings) > 1:
        west, east = (west + 360 if west < -180 else west), _wrapped(east)
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    if len(rings) == 1:
        geometry = {"type": "Polygon", "coordinates": rings}
        west, south, east, north = parts[0].bounds
    return Footprint(geometry, (_round(west), _round(south), _round(east), _round(north)))


def _ring(part: shapely.Polygon) -> list[list[float]]:
    return [[_round(value) for value in point] for point in orient(part).exterior.coords]


def _round(value: float) -> float:
    return round(value, DECIMALS) + 0.0  # no minus zero
