"""Outlines of images on the globe, against rasterio's transformation of many more points, and shapely."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from pyproj import CRS
from rasterio.warp import transform
from shapely.geometry import shape

from geocentroids_tiler.bulk.outline import Footprint, bbox_of_all, footprint_of

METRE = 1e-5
"""Of a degree, somewhat more than a metre."""


def place(crs: str, corner: tuple[float, float], size_px: tuple[int, int], gsd_m: float = 1.0) -> Footprint:
    return footprint_of(CRS.from_user_input(crs), (gsd_m, 0, corner[0], 0, -gsd_m, corner[1]), *size_px)


def edge(crs: str, corner: tuple[float, float], size_px: tuple[int, int], gsd_m: float = 1.0) -> shapely.LinearRing:
    """Return the same outline through a thousand points a side."""
    t = np.linspace(0, 1, 1000)
    col = np.concatenate([t, 0 * t + 1, t[::-1], 0 * t]) * size_px[0]
    row = np.concatenate([0 * t, t, 0 * t + 1, t[::-1]]) * size_px[1]
    lon, lat = transform(crs, "EPSG:4326", corner[0] + gsd_m * col, corner[1] - gsd_m * row)
    return shapely.LinearRing(np.stack([lon, lat], axis=1))


@pytest.mark.parametrize(
    ("crs", "corner", "size_px", "points"),
    [
        ("EPSG:32721", (560_000, 6_140_000), (1000, 800), 4),
        ("EPSG:32721", (300_000, 6_140_000), (200_000, 150_000), 100),
        ("EPSG:28992", (120_000, 480_000), (1000, 1000), 4),
        ("EPSG:3413", (-50_000, -1_050_000), (100_000, 50_000), 100),
    ],
)
def test_true_outline(crs: str, corner: tuple[float, float], size_px: tuple[int, int], points: int) -> None:
    found = place(crs, corner, size_px)
    polygon = shape(found.geometry)
    assert found.geometry["type"] == "Polygon"
    assert polygon.is_valid
    assert polygon.exterior.is_ccw, "RFC 7946"
    assert len(polygon.exterior.coords) - 1 <= 128
    assert (len(polygon.exterior.coords) - 1 == 4) == (points == 4), "as many points as are needed"
    assert shapely.hausdorff_distance(polygon.exterior, edge(crs, corner, size_px)) < 2 * METRE
    assert found.bbox == polygon.bounds


def test_turned_image() -> None:
    cos, sin = np.cos(np.radians(30)), np.sin(np.radians(30))
    turned = (cos, sin, 560_000, sin, -cos, 6_140_000)
    polygon = shape(footprint_of(CRS.from_epsg(32721), turned, 1000, 500).geometry)
    west, south, east, north = polygon.bounds
    assert polygon.area < 0.7 * (east - west) * (north - south), "not its bounding box"


def test_across_the_antimeridian() -> None:
    """Two parts, none of which leaves the map, and a box whose west is greater than its east."""
    corner, size_px = (813_000, 8_000_000), (20_000, 8_000)
    found = place("EPSG:32760", corner, size_px)
    assert found.geometry["type"] == "MultiPolygon"
    parts = [shape({"type": "Polygon", "coordinates": rings}) for rings in found.geometry["coordinates"]]
    assert sorted(part.bounds[0] < 0 for part in parts) == [False, True]
    assert all(part.is_valid and part.exterior.is_ccw for part in parts)
    west, south, east, north = found.bbox
    assert west > 179.8
    assert east < -179.8
    lon = np.array(edge("EPSG:32760", corner, size_px).coords)
    lon[:, 0] %= 360
    assert sum(part.area for part in parts) == pytest.approx(shapely.Polygon(lon).area, rel=1e-4)
    assert (south, north) == pytest.approx((lon[:, 1].min(), lon[:, 1].max()), abs=METRE)


def test_beside_the_antimeridian() -> None:
    found = place("EPSG:32760", (829_000, 8_000_000), (2000, 2000))
    assert found.geometry["type"] == "Polygon"
    assert -180 < found.bbox[0] < found.bbox[2] < -179


def test_around_a_pole() -> None:
    found = place("EPSG:3413", (-50_000, 50_000), (1000, 1000), 100)
    assert found.bbox[0] == -180
    assert found.bbox[2:] == (180, 90)
    assert found.bbox[1] == pytest.approx(np.array(edge("EPSG:3413", (-50_000, 50_000), (1000, 1000), 100).xy[1]).min())


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(1, 2, 3, 4)], (1, 2, 3, 4)),
        ([(1, 2, 3, 4), (-6, 5, -5, 6)], (-6, 2, 3, 6)),
        ([(179, 0, -179, 1)], (179, 0, -179, 1)),
        ([(179, 0, -179, 1), (177, -1, 178, 0)], (177, -1, -179, 1)),
        ([(177, 0, 178, 1), (-179, 0, -178, 1)], (177, 0, -178, 1)),
        ([(-60, 0, -59, 1), (124, 0, 125, 1)], (-60, 0, 125, 1)),
        ([(-100, 0, -99, 1), (0, 0, 1, 1), (100, 0, 101, 1), (179, 0, -179, 1)], (-180, 0, 180, 1)),
        ([(170, 0, -150, 1), (-170, 0, -160, 1)], (170, 0, -150, 1)),
    ],
)
def test_box_of_all(boxes: list[tuple[float, ...]], expected: tuple[float, ...]) -> None:
    assert bbox_of_all(boxes) == expected
    assert bbox_of_all(boxes[::-1]) == expected
