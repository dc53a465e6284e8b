"""Where the images of a mosaic lie: which are under a place, in which order, and on which grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import (
    WGS84,
    Bounds,
    Grid,
    PatchRange,
    grid_in,
    is_metric_grid,
    outline,
    parse_crs,
    project,
    utm_codes,
)
from geocentroids_tiler.mosaic.members import Member

Overlap = Literal["first", "newest", "similarity"]
"""Whose label a patch gets that several images show: the one that is named first, the newest (of equals the first, and
those without a date last), or the one whose patch fits its centroid best."""
_ZONE_DEGREES = 3
"""UTM zones, with their exceptions, begin and end at multiples of this."""
_ZONE_LATITUDES = (-80.0, 0.0, 56.0, 64.0, 72.0, 84.0)
"""Latitudes at which UTM zones begin and end."""
_INSIDE = 1e-9
_ZONE_REACH = 9.0
"""Degrees on both sides of a UTM zone's meridian within which its coordinates are of use here."""
_EDGE_POINTS = 5
"""Points along an edge of a footprint that are projected."""
_MARGIN = 3.0
"""Degrees that images may lie outside of the area that their CRS is meant for: surveys at a border keep to one zone."""
_SLACK_DEGREES = 1e-4
"""Images this near to a place are looked at too: 11 m, more than patches reach beyond what holds them."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An image that is left out, and why."""

    url: str
    reason: str


@dataclass(frozen=True)
class Zone:
    """The part of a mosaic on one ground grid.

    Attributes:
        code: of the grid's CRS, ``EPSG:32721``.
        grid: the ground grid; its areal scale is that of the zone's middle.
        footprint: patches of a rectangle that holds all images of the zone.
        geographic_bounds: west, south, east, north of its images in degrees.
        members: numbers of the images that touch it, ascending.
    """

    code: str
    grid: Grid
    footprint: PatchRange
    geographic_bounds: Bounds
    members: NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Mosaic:
    """Images that are shown as one layer. Holds no open file.

    The grid of a place does not depend on which images are there: it is the one CRS of all images if they have the
    same, and it is projected, in metres; otherwise that of the place's UTM zone.

    Attributes:
        url: of the document.
        identity: changes when the document does.
        members: the images, in the document's order, each with a footprint.
        patch_m: side of a patch in metres.
        problems: images that could not be placed.
    """

    url: str
    identity: str
    members: tuple[Member, ...]
    patch_m: float
    problems: tuple[Problem, ...] = ()
    _common: str | None = field(init=False)

    def __post_init__(self) -> None:
        """Find out whether all images have one CRS."""
        object.__setattr__(self, "_common", _common_crs(self.members, self.geographic_bounds, self.patch_m))

    @cached_property
    def _shapes(self) -> NDArray[np.object_]:
        return np.array([member.footprint for member in self.members], dtype=object)

    @cached_property
    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
        """Bounds of the polygons of all footprints, of shape (N, 4), and whose each is: two at the antimeridian."""
        parts, owners = shapely.get_parts(self._shapes, return_index=True)
        return shapely.bounds(parts), owners

    @cached_property
    def _tree(self) -> Any:
        return shapely.STRtree(self._shapes)

    def prepare(self) -> None:
        """Compute now what requests would compute when they first need it."""
        _ = self.zones, self._age_rank, self.area_m2, self._tree.query(shapely.Point(0, 0))

    @cached_property
    def _age_rank(self) -> NDArray[np.intp]:
        """Place of each image when the newest is the first."""
        taken = np.array([-1e18 if each.taken_at is None else each.taken_at.timestamp() for each in self.members])
        rank = np.empty(len(taken), np.intp)
        rank[np.argsort(-taken, kind="stable")] = np.arange(len(taken))
        return rank

    @cached_property
    def bounds(self) -> NDArray[np.float64]:
        """West, south, east, north of each image in degrees, of shape (N, 4)."""
        found: NDArray[np.float64] = shapely.bounds(self._shapes)
        return found

    @cached_property
    def geographic_bounds(self) -> Bounds:
        """West, south, east, north of all images in degrees."""
        return _hull(self.bounds)

    @cached_property
    def area_m2(self) -> float:
        """Area of all footprints together on a sphere, those that overlap counted as often as they do."""
        west, south, east, north = np.radians(self.bounds).T
        share = shapely.area(self._shapes)
        boxes = np.degrees(east - west) * np.degrees(north - south)
        fill = np.divide(share, boxes, out=np.ones_like(share), where=boxes > 0)
        return float((6371000.0**2 * (east - west) * (np.sin(north) - np.sin(south)) * fill).sum())

    @cached_property
    def zones(self) -> tuple[Zone, ...]:
        """The parts of the mosaic on one grid each, by the codes of their CRSs; none beyond the ends of UTM."""
        bounds, owners = self._parts
        if self._common is not None:
            return (self._zone(self._common, bounds, owners),)
        touched: dict[int, list[int]] = {}
        for number, codes in enumerate(_zones_of(bounds)):
            for code in codes:
                touched.setdefault(code, []).append(number)
        return tuple(
            self._zone(f"EPSG:{code}", _clipped(bounds[touched[code]], code), owners[touched[code]])
            for code in sorted(touched)
        )

    def zone_at(self, lon: float, lat: float) -> str:
        """Return the code of the CRS of a place's grid."""
        return self._common or f"EPSG:{int(utm_codes(lon, lat))}"

    @property
    def key(self) -> tuple[str, str]:
        """What changes when the mosaic does."""
        return self.url, self.identity

    def touches(self, zone: Zone, bounds: Bounds) -> bool:
        """Tell whether west, south, east, north in degrees may hold ground of a zone's images."""
        west, south, east, north = bounds
        left, bottom, right, top = zone.geographic_bounds
        if not (south <= top and bottom <= north and (east - west > 180 or (west <= right and left <= east))):
            return False
        if self._common is not None or east - west > 180:
            return True
        return int(zone.code.removeprefix("EPSG:")) in next(iter(_zones_of(np.array([bounds]))))

    def on_grid(self, code: str, bounds: Bounds) -> Zone | None:
        """Return the images near a place as if they lay in one zone, on the grid of a CRS; None if there are none.

        Args:
            code: of the CRS.
            bounds: west, south, east, north of the place in degrees.

        Raises:
            InputError: if there is no such CRS.
            UnsupportedImageError: if none of the images can be projected to it.
        """
        near = self._tree.query(shapely.box(*bounds), predicate="intersects")
        all_bounds, owners = self._parts
        west, south, east, north = bounds
        wanted = np.isin(owners, near) & (all_bounds[:, 0] <= east) & (all_bounds[:, 2] >= west)
        wanted &= (all_bounds[:, 1] <= north) & (all_bounds[:, 3] >= south)
        return self._zone(code, all_bounds[wanted], owners[wanted]) if wanted.any() else None

    def in_zone(self, zone: Zone, lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which places belong to a zone, of the shape of ``lon``."""
        if self._common is not None:
            return np.ones(lon.shape, bool)
        return np.asarray(utm_codes(lon, lat) == int(zone.code.removeprefix("EPSG:")))

    def under(self, patches: PatchRange, grid: Grid, overlap: Overlap) -> list[int]:
        """Return the numbers of the images that may hold some of the patches, in the order that ``overlap`` wants.

        Args:
            patches: which ones.
            grid: whose patches.
            overlap: the rule; for ``similarity`` the order decides where two fit equally well.
        """
        left, bottom, right, top = grid.bounds_of(patches)
        try:
            edge = outline(grid.crs, (right - left, 0, left, 0, bottom - top, top), 1, 1, WGS84)
        except UnsupportedImageError:
            return []
        found = {int(i) for box in _around(edge) for i in self._tree.query(box, predicate="intersects")}
        rank = self._age_rank if overlap == "newest" else np.arange(len(self.members))
        return sorted(found, key=lambda i: int(rank[i]))

    def _zone(self, code: str, bounds: NDArray[np.float64], owners: NDArray[np.intp]) -> Zone:
        """Return the zone of polygons with these bounds."""
        crs = parse_crs(code)
        x, y = project(WGS84, crs, *_edges(bounds))
        placed = np.isfinite(x) & np.isfinite(y)
        if not placed.any():
            raise UnsupportedImageError(f"none of the images lies where {crs.name!r} is defined")
        low, high = np.array([x[placed].min(), y[placed].min()]), np.array([x[placed].max(), y[placed].max()])
        slack = 0.005 * float((high - low).max())  # edges bend between the points
        west, south, east, north = hull = _hull(bounds)
        try:
            grid = grid_in(crs, (west + east) / 2, (south + north) / 2, self.patch_m)
        except UnsupportedImageError:  # so wide that its middle says nothing
            grid = Grid(crs, self.patch_m)
        footprint = grid.patches_touching((low[0] - slack, low[1] - slack, high[0] + slack, high[1] + slack))
        return Zone(code, grid, footprint, hull, np.unique(owners))


def _common_crs(members: Sequence[Member], bounds: Bounds, patch_m: float) -> str | None:
    """Return the CRS that all images say they have, if a ground grid can have it there."""
    codes = {member.crs for member in members}
    code = codes.pop() if len(codes) == 1 else None
    if code is None:
        return None
    west, south, east, north = bounds
    lon, lat = (west + east) / 2, (south + north) / 2
    try:
        crs = parse_crs(code)
        grid_in(crs, lon, lat, patch_m)
    except (InputError, UnsupportedImageError):
        return None
    area = crs.area_of_use
    if not is_metric_grid(crs) or area is None:
        return None
    # UTM is true to scale, to all appearance, on the other side of the Earth, too.
    width = (area.east - area.west) % 360 or 360.0
    near = abs((lon - area.west - width / 2 + 180) % 360 - 180) <= width / 2 + _MARGIN
    return code if near and area.south - _MARGIN <= lat <= area.north + _MARGIN else None


def _hull(bounds: NDArray[np.float64]) -> Bounds:
    west, south = bounds[:, :2].min(axis=0)
    east, north = bounds[:, 2:].max(axis=0)
    return float(west), float(south), float(east), float(north)


def _edges(bounds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points on the edges of rectangles, of shape (N, 4 * _EDGE_POINTS) each, x and y."""
    t = np.linspace(0, 1, _EDGE_POINTS)
    zero, one = np.zeros_like(t), np.ones_like(t)
    across, up = np.concatenate([t, one, t, zero]), np.concatenate([zero, t, one, t])
    west, south, east, north = (bounds[:, i, None] for i in range(4))
    return west + across * (east - west), south + up * (north - south)


def _clipped(bounds: NDArray[np.float64], code: int) -> NDArray[np.float64]:
    """Return rectangles cut to the neighbourhood of a UTM zone, beyond which its coordinates say little."""
    middle = (code % 100) * 6 - 183
    clipped = bounds.copy()
    clipped[:, 0] = bounds[:, 0].clip(middle - _ZONE_REACH, middle + _ZONE_REACH)
    clipped[:, 2] = bounds[:, 2].clip(middle - _ZONE_REACH, middle + _ZONE_REACH)
    return clipped


def _zones_of(bounds: NDArray[np.float64]) -> Iterable[list[int]]:
    """Yield the codes of the UTM zones that each of the rectangles touches."""
    bounds = bounds.clip(None, 180 - _INSIDE)  # 180 degrees east is where the first zone begins
    corners = np.stack([utm_codes(bounds[:, i], bounds[:, j]) for i in (0, 2) for j in (1, 3)], axis=1)
    small = (bounds[:, 2] - bounds[:, 0] < _ZONE_DEGREES) & (bounds[:, 3] - bounds[:, 1] < _ZONE_DEGREES)
    alike = small & (corners == corners[:, :1]).all(axis=1) & (corners[:, 0] > 0)
    for box, codes, one in zip(bounds, corners, alike, strict=True):
        if one:
            yield [int(codes[0])]
            continue
        west, south, east, north = (float(value) for value in box)
        first = np.floor(west / _ZONE_DEGREES) + 1
        borders = np.arange(first, np.ceil(east / _ZONE_DEGREES)) * _ZONE_DEGREES
        lon = np.concatenate([[west, east], borders, borders - _INSIDE])
        between = [lat for lat in _ZONE_LATITUDES if south < lat < north]
        lat = np.array([south, north, *between, *(value - _INSIDE for value in between)])
        yield sorted({int(code) for code in utm_codes(*np.meshgrid(lon, lat)).ravel() if code})


def _around(edge: NDArray[np.float64]) -> list[Any]:
    """Return shapes that hold the outline of some ground together: two where it crosses the antimeridian."""
    lon = edge[0, 0] + (edge[:, 0] - edge[0, 0] + 180) % 360 - 180  # no jump along the edge
    west, south, east, north = lon.min(), edge[:, 1].min(), lon.max(), edge[:, 1].max()
    slack = _SLACK_DEGREES + 0.02 * max(east - west, north - south)
    west, south, east, north = west - slack, south - slack, east + slack, north + slack
    if east - west > 180:  # around a pole
        return [shapely.box(-180, south, 180, north)]
    shifts = [0.0] + ([360.0] if west < -180 else []) + ([-360.0] if east > 180 else [])
    return [shapely.box(west + shift, south, east + shift, north) for shift in shifts]
