"""Areas against shapely on patch centres that pyproj placed one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import CRS, Transformer

from geocentroids_tiler.area import Area, region_of_bbox, region_of_geometry
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import WGS84, Bounds, Grid, PatchRange

GRID = Grid(CRS.from_epsg(32721), 3.5)
FOOTPRINT = PatchRange(-1_754_290, -1_754_090, 160_000, 160_260)
"""200 x 260 patches in Uruguay, near 56.35 W 34.88 S."""
NEAR_EDGE = 0.002
"""Centres this near to an area's edge (share of a patch) may fall on either side: they are placed to 0.001."""


def area_of_bbox(bbox: Bounds, crs: CRS, grid: Grid, footprint: PatchRange) -> Area:
    return region_of_bbox(bbox, crs).on(grid, footprint)


def area_of_geometry(geometry: Mapping[str, Any], grid: Grid, footprint: PatchRange) -> Area:
    return region_of_geometry(geometry).on(grid, footprint)


def centres(crs: CRS, patches: PatchRange = FOOTPRINT, grid: Grid = GRID) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return x and y of patch centres in ``crs``, exactly."""
    rows, cols = np.mgrid[patches.row_start : patches.row_stop, patches.col_start : patches.col_stop]
    x, y = (cols + 0.5) * grid.patch_m, -(rows + 0.5) * grid.patch_m
    found: tuple[NDArray[Any], NDArray[Any]] = Transformer.from_crs(grid.crs, crs, always_xy=True).transform(x, y)
    return found


LON, LAT = centres(WGS84)
WEST, EAST, SOUTH, NORTH = float(LON.min()), float(LON.max()), float(LAT.min()), float(LAT.max())
PATCH_DEG = NEAR_EDGE * 3.5 / 90_000


def on_footprint(area: Area, footprint: PatchRange = FOOTPRINT) -> NDArray[np.bool_]:
    """Return which patches of the footprint an area holds."""
    found = np.zeros(footprint.shape, bool)
    part = area.patches
    assert area.inside.shape == part.shape
    if not area.empty:
        assert part.intersect(footprint) == part
        assert area.inside[0].any()
        assert area.inside[-1].any()
        assert area.inside[:, 0].any()
        assert area.inside[:, -1].any()
    found[
        part.row_start - footprint.row_start : part.row_stop - footprint.row_start,
        part.col_start - footprint.col_start : part.col_stop - footprint.col_start,
    ] = area.inside
    return found


def check_polygon(polygon: Any, geometry: dict[str, Any] | None = None) -> Area:
    area = area_of_geometry(geometry or shapely.geometry.mapping(polygon), GRID, FOOTPRINT)
    found = on_footprint(area) if not area.empty else np.zeros(FOOTPRINT.shape, bool)
    points = shapely.points(LON, LAT)
    clear = shapely.distance(polygon.boundary, points) > PATCH_DEG
    expected = shapely.contains(polygon, points)
    assert np.array_equal(found[clear], expected[clear])
    assert clear.mean() > 0.98
    return area


def at(u: float, v: float) -> tuple[float, float]:
    """Return the place at a share of the footprint's width and height."""
    return WEST + u * (EAST - WEST), SOUTH + v * (NORTH - SOUTH)


shares = st.floats(-0.3, 1.3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(shares, shares, shares, shares)
def test_boxes(u0: float, v0: float, u1: float, v1: float) -> None:
    (minx, miny), (maxx, maxy) = at(min(u0, u1), min(v0, v1)), at(max(u0, u1), max(v0, v1))
    if minx >= maxx or miny >= maxy:
        return
    area = area_of_bbox((minx, miny, maxx, maxy), WGS84, GRID, FOOTPRINT)
    found = on_footprint(area) if not area.empty else np.zeros(FOOTPRINT.shape, bool)
    expected = (minx <= LON) & (maxx > LON) & (miny <= LAT) & (maxy > LAT)
    edge = np.minimum.reduce([abs(LON - minx), abs(LON - maxx), abs(LAT - miny), abs(LAT - maxy)])
    assert np.array_equal(found[edge > PATCH_DEG], expected[edge > PATCH_DEG])


@pytest.mark.parametrize("name", ["EPSG:32721", "EPSG:3857", "EPSG:32720", "EPSG:31981"])
def test_boxes_in_other_systems(name: str) -> None:
    crs = CRS.from_user_input(name)
    x, y = centres(crs)
    minx, maxx = np.quantile(x, [0.21, 0.77])
    miny, maxy = np.quantile(y, [0.34, 0.9])
    found = on_footprint(area_of_bbox((minx, miny, maxx, maxy), crs, GRID, FOOTPRINT))
    expected = (minx <= x) & (maxx > x) & (miny <= y) & (maxy > y)
    edge = np.minimum.reduce([abs(x - minx), abs(x - maxx), abs(y - miny), abs(y - maxy)])
    clear = edge > NEAR_EDGE * 3.5 * 2
    assert np.array_equal(found[clear], expected[clear])


@settings(max_examples=12, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.sampled_from(["lon", "lat"]))
def test_adjacent_boxes_share_out_the_patches(u: float, v: float, axis: str) -> None:
    """Every patch lies in exactly one of two boxes with a common edge, also when centres are a hair from it."""
    x, y = at(u, v)
    if axis == "lon":
        x = float(LON.flat[np.abs(LON - x).argmin()])  # through a patch's centre
        boxes = [(WEST - 1, SOUTH - 1, x, NORTH + 1), (x, SOUTH - 1, EAST + 0.001, NORTH + 1)]
    else:
        y = float(LAT.flat[np.abs(LAT - y).argmin()])
        boxes = [(WEST - 1, SOUTH - 1, EAST + 1, y), (WEST - 0.001, y, EAST + 1, NORTH + 1)]
    held = sum(on_footprint(area_of_bbox(box, WGS84, GRID, FOOTPRINT)).astype(int) for box in boxes)
    assert np.array_equal(held, np.ones(FOOTPRINT.shape, int))


def test_a_centre_on_the_common_edge_of_two_boxes_is_in_one() -> None:
    """In the grid's own CRS, where centres are exact numbers: left and bottom edges belong to a box."""
    left, bottom, right, top = GRID.bounds_of(FOOTPRINT)
    for k in (5.5, 40.5, 100.5, 128.5):
        x, y = left + k * 3.5, bottom + k * 3.5
        for pair in (
            [(left, bottom, x, top), (x, bottom, right, top)],
            [(left, bottom, right, y), (left, y, right, top)],
        ):
            held = [on_footprint(area_of_bbox(box, GRID.crs, GRID, FOOTPRINT)) for box in pair]
            assert np.array_equal(held[0], ~held[1])
        west = on_footprint(area_of_bbox((left, bottom, x, top), GRID.crs, GRID, FOOTPRINT))
        assert west[0].sum() == int(k)


def test_overlapping_requests_agree_on_every_patch() -> None:
    """A patch has one place, whatever else is asked: the same centres are in, to the last one."""
    x, y = float(LON[77, 101]), float(LAT[77, 101])
    whole = on_footprint(area_of_bbox((x, y, EAST + 1, NORTH + 1), WGS84, GRID, FOOTPRINT))
    for top in (0.95, 0.7, 0.66):
        limit = at(0, top)[1]
        part = on_footprint(area_of_bbox((x, y, EAST + 0.5, limit), WGS84, GRID, FOOTPRINT))
        below = limit - 1e-6 > LAT
        assert np.array_equal(part[below], whole[below])


TRIANGLE = shapely.Polygon([at(0.1, 0.1), at(0.8, 0.3), at(0.4, 0.95)])


@pytest.mark.parametrize(
    "polygon",
    [
        TRIANGLE,
        TRIANGLE.difference(shapely.Point(at(0.4, 0.4)).buffer(0.0005)),
        shapely.MultiPolygon([shapely.box(*at(0.1, 0.1), *at(0.2, 0.3)), shapely.box(*at(0.6, 0.5), *at(0.9, 0.8))]),
        shapely.box(*at(-0.5, 0.4), *at(0.3, 1.5)),
        shapely.Point(at(0.5, 0.5)).buffer(0.001),
        shapely.LineString([at(-0.2, 0.2), at(0.5, 0.8), at(1.2, 0.1)]).buffer(0.0001),
        shapely.box(*at(0.41, 0.41), *at(0.4101, 0.9)),  # thinner than a patch
    ],
    ids=["triangle", "hole", "multi", "across", "circle", "band", "sliver"],
)
def test_polygons(polygon: Any) -> None:
    check_polygon(polygon)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(shares, shares), min_size=3, max_size=9, unique=True))
def test_any_polygon(corners: list[tuple[float, float]]) -> None:
    polygon = shapely.MultiPoint([at(*corner) for corner in corners]).convex_hull
    if isinstance(polygon, shapely.Polygon) and polygon.is_valid and polygon.area > 1e-12:
        check_polygon(polygon)


@pytest.mark.parametrize(
    "bounds",
    [(-180, -90, 180, 90), (-180, -85, 180, 85), (-100, -60, 20, 10), (-57, -36, -55, -34), (-179, -89.9, 179, -10)],
)
def test_huge_areas_hold_the_whole_image(bounds: tuple[float, float, float, float]) -> None:
    for area in (
        area_of_geometry(shapely.geometry.mapping(shapely.box(*bounds)), GRID, FOOTPRINT),
        area_of_bbox(bounds, WGS84, GRID, FOOTPRINT),
    ):
        assert area.patches == FOOTPRINT
        assert area.inside.all()


@pytest.mark.parametrize("epsg", [28992, 31370, 27700, 2154, 32601, 32660, 5041])
def test_the_world_holds_every_image(epsg: int) -> None:
    grid = Grid(CRS.from_epsg(epsg), 3.5)
    place = {
        28992: (155e3, 463e3),
        31370: (15e4, 17e4),
        27700: (4e5, 3e5),
        2154: (7e5, 66e5),
        32601: (170_000, 18e5),  # across the antimeridian
        32660: (83e4, 18e5),
        5041: (2e6, 2e6),  # around the pole
    }[epsg]
    row, col = (int(v) for v in grid.patch_of(*place))
    footprint = PatchRange(row - 300, row + 300, col - 300, col + 300)
    area = area_of_bbox((-180, -90, 180, 90.001), WGS84, grid, footprint)
    assert area.patches == footprint
    assert area.inside.mean() > 0.9999


def test_image_across_the_antimeridian() -> None:
    """Boxes on both sides share out its patches."""
    grid = Grid(CRS.from_epsg(32701), 3.5)
    x, y = Transformer.from_crs(WGS84, grid.crs, always_xy=True).transform(180, -16.5)
    row, col = (int(v) for v in grid.patch_of(x, y))
    footprint = PatchRange(row - 50, row + 50, col - 40, col + 40)
    west = on_footprint(area_of_bbox((170, -17, 180, -16), WGS84, grid, footprint), footprint)
    east = on_footprint(area_of_bbox((-180, -17, -170, -16), WGS84, grid, footprint), footprint)
    assert np.array_equal(west, ~east)
    assert west[:, :35].all()
    assert east[:, 45:].all()


@pytest.mark.parametrize(
    "bounds", [(10, 40, 11, 41), (-56.5, 34, -56, 35), (123.6, -35, 123.7, -34.8), (-56.2, -35, -56.1, -34)]
)
def test_areas_elsewhere_are_empty(bounds: tuple[float, float, float, float]) -> None:
    assert area_of_bbox(bounds, WGS84, GRID, FOOTPRINT).empty
    assert area_of_geometry(shapely.geometry.mapping(shapely.box(*bounds)), GRID, FOOTPRINT).empty


def test_area_between_centres_is_empty() -> None:
    x, y = float(LON[50, 50]), float(LAT[50, 50])
    area = area_of_bbox((x + 1e-6, y + 1e-6, x + 5e-6, y + 5e-6), WGS84, GRID, FOOTPRINT)
    assert area.empty
    assert area.inside.shape == area.patches.shape == (0, 0)


@pytest.mark.parametrize(
    "bbox",
    [(1, 1, 1, 2), (1, 2, 2, 2), (2, 1, 1, 2), (1, 2, 2, 1), (float("nan"), 0, 1, 1), (0, 0, float("inf"), 1)],
)
def test_turned_or_endless_boxes_are_refused(bbox: tuple[float, float, float, float]) -> None:
    with pytest.raises(InputError, match="minx < maxx"):
        area_of_bbox(bbox, WGS84, GRID, FOOTPRINT)


RING = [list(at(u, v)) for u, v in ((0, 0), (1, 0), (1, 1), (0, 0))]


@pytest.mark.parametrize(
    ("geometry", "text"),
    [
        ({"type": "Point", "coordinates": [1, 2]}, "is a Point; accepted: Polygon and MultiPolygon"),
        ({"type": "GeometryCollection", "geometries": []}, "is a GeometryCollection"),
        ({}, "is a None"),
        ({"type": ["Polygon"]}, "accepted: Polygon"),
        ({"type": "Polygon"}, "not a"),
        ({"type": "Polygon", "coordinates": None}, "not a"),
        ({"type": "Polygon", "coordinates": []}, "it is empty"),
        ({"type": "MultiPolygon", "coordinates": []}, "it is empty"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}, "not a readable Polygon"),
        ({"type": "Polygon", "coordinates": [[["a", "b"]] * 4]}, "not a readable Polygon"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]}, "Self-intersection"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [float("nan"), 1], [1, 0], [0, 0]]]}, "not a"),
        ({"type": "Polygon", "coordinates": {"a": 1}}, "not a"),
        ({"type": "MultiPolygon", "coordinates": [RING]}, "not a"),
        ({"type": "Polygon", "coordinates": 3}, "not a"),
    ],
)
def test_what_is_not_a_polygon_is_refused(geometry: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        area_of_geometry(geometry, GRID, FOOTPRINT)


def test_heights_and_direction_of_rings_do_not_matter() -> None:
    ring = [[*corner, 12.5] for corner in RING][::-1]
    check_polygon(shapely.Polygon(RING), {"type": "Polygon", "coordinates": [ring]})


def test_large_images_are_worked_through_in_blocks() -> None:
    """A footprint of 9 million patches and a small polygon: the answer is small."""
    footprint = PatchRange(-1_755_500, -1_752_500, 159_000, 162_000)
    area = area_of_geometry(shapely.geometry.mapping(TRIANGLE), GRID, footprint)
    small = area_of_geometry(shapely.geometry.mapping(TRIANGLE), GRID, FOOTPRINT)
    assert area.patches == small.patches
    assert np.array_equal(area.inside, small.inside)
