"""The ground grid against pyproj, geodesics, rasterio and arithmetic by hand."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import rasterio
import rasterio.warp
from hypothesis import given, settings
from hypothesis import strategies as st
from morecantile import tms as all_tms
from paths import needs_shared, shared
from pyproj import CRS, Geod, Transformer
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_utm_crs_info

from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import (
    WGS84,
    ChunkIndex,
    Grid,
    PatchRange,
    authority_code,
    bounds_holding,
    geographic_bounds,
    ground_grid,
    ground_gsd,
    image_centre,
    outline,
    parse_crs,
    project,
    raster_points,
    utm_crs,
    window_patches_of,
    wrap_longitude,
)


@dataclass(frozen=True)
class Tolerance:
    limit: float
    measured: float
    reason: str


TOLERANCES = {
    "raster points": Tolerance(1.0, 0.69, "share of the tolerance asked for; checked at edges and middles of the mesh"),
    "gsd": Tolerance(0.0001, 2.8e-05, "share of the geodesic length; the grid's scale is taken at the centre"),
    "patch area": Tolerance(0.0001, 5.6e-05, "share of the geodesic area; scale by finite differences inside PROJ"),
    "rasterio": Tolerance(0.1, 3e-10, "patches; GDAL may choose another datum operation than pyproj"),
}


def within(name: str, difference: float) -> None:
    """Assert that a difference is within the table's limit."""
    assert float(difference) <= TOLERANCES[name].limit


PATCH_M = 3.5
UTM32 = CRS.from_epsg(32632)


def grid(patch_m: float = PATCH_M, crs: CRS = UTM32) -> Grid:
    return Grid(crs, patch_m)


indices = st.integers(-(10**7), 10**7)
patch_sizes = st.sampled_from([3.5, 3.0625, 8.4, 0.7, 1.4])


class TestPatches:
    @given(indices, indices, patch_sizes)
    def test_centre_is_in_its_patch(self, row: int, col: int, patch_m: float) -> None:
        found = grid(patch_m).patch_of(*grid(patch_m).patch_centre(row, col))
        assert (int(found[0]), int(found[1])) == (row, col)

    def test_by_hand(self) -> None:
        """Rows run south from the origin, columns east; a border belongs to the patch south-east of it."""
        x, y = np.array([0.0, 3.49, 3.5, -0.01]), np.array([0.0, -3.49, -3.5, 0.01])
        rows, cols = grid().patch_of(x, y)
        assert rows.tolist() == [0, 0, 1, -1]
        assert cols.tolist() == [0, 0, 1, -1]
        assert [float(v) for v in grid().patch_centre(2, -1)] == [-1.75, -8.75]

    @given(indices, indices, st.integers(1, 50), st.integers(1, 50), patch_sizes)
    def test_bounds_round_trip(self, row: int, col: int, rows: int, cols: int, patch_m: float) -> None:
        """A range's bounds, drawn in by a hundredth of a patch, touch that range."""
        patches = PatchRange(row, row + rows, col, col + cols)
        left, bottom, right, top = grid(patch_m).bounds_of(patches)
        inset = 0.01 * patch_m
        assert grid(patch_m).patches_touching((left + inset, bottom + inset, right - inset, top - inset)) == patches
        assert right - left == pytest.approx(cols * patch_m, rel=1e-6)

    def test_exact_bounds_touch_no_neighbour(self) -> None:
        patches = PatchRange(-3, 4, 10, 12)
        assert grid().patches_touching(grid().bounds_of(patches)) == patches

    def test_transform_places_pixel_centres_on_patch_centres(self) -> None:
        patches = PatchRange(-3, 4, 10, 12)
        a, b, c, d, e, f = grid().transform_of(patches)
        x, y = a * 1.5 + b * 2.5 + c, d * 1.5 + e * 2.5 + f
        assert (x, y) == tuple(float(v) for v in grid().patch_centre(-3 + 2, 10 + 1))


ranges = st.builds(
    lambda row, col, rows, cols: PatchRange(row, row + rows, col, col + cols),
    st.integers(-300, 300),
    st.integers(-300, 300),
    st.integers(0, 40),
    st.integers(0, 40),
)


class TestChunks:
    @given(ranges, st.integers(1, 17))
    def test_chunks_cover_every_patch_once_and_each_holds_one(self, patches: PatchRange, stride: int) -> None:
        cover: dict[tuple[int, int], int] = {}
        for chunk in patches.chunks(stride):
            own = PatchRange(chunk.row * stride, (chunk.row + 1) * stride, chunk.col * stride, (chunk.col + 1) * stride)
            part = own.intersect(patches)
            assert not part.empty
            for row in range(part.row_start, part.row_stop):
                for col in range(part.col_start, part.col_stop):
                    cover[row, col] = cover.get((row, col), 0) + 1
        assert len(cover) == math.prod(patches.shape)
        assert set(cover.values()) <= {1}
        assert len(list(patches.chunks(stride))) == math.prod(patches.chunk_range(stride).shape)

    @given(ranges, ranges)
    def test_intersection_is_that_of_sets(self, one: PatchRange, other: PatchRange) -> None:
        def cells(patches: PatchRange) -> set[tuple[int, int]]:
            rows = range(patches.row_start, patches.row_stop)
            return {(row, col) for row in rows for col in range(patches.col_start, patches.col_stop)}

        both = one.intersect(other)
        assert cells(both) == cells(one) & cells(other)
        assert both.empty == (not cells(one) & cells(other))

    @given(st.integers(-50, 50), st.integers(-50, 50), st.sampled_from([(16, 3, 10), (16, 3, 5), (32, 3, 13)]))
    def test_windows_tile_the_plane(self, row: int, col: int, layout: tuple[int, int, int]) -> None:
        """The first stride x stride patches of each core join the next window's without gap or overlap."""
        window, margin, stride = layout
        own = window_patches_of(ChunkIndex(row, col), window, margin, stride)
        east = window_patches_of(ChunkIndex(row, col + 1), window, margin, stride)
        south = window_patches_of(ChunkIndex(row + 1, col), window, margin, stride)
        assert own.shape == (window, window)
        assert (own.row_start + margin, own.col_start + margin) == (row * stride, col * stride)
        assert east.col_start - own.col_start == stride == south.row_start - own.row_start
        assert (east.row_start, south.col_start) == (own.row_start, own.col_start)


class TestUtmZone:
    @settings(max_examples=30, deadline=None)
    @given(st.floats(-179.9, 179.9), st.floats(-79.9, 83.9))
    def test_is_among_those_of_the_registry(self, lon: float, lat: float) -> None:
        area = AreaOfInterest(lon, lat, lon, lat)
        codes = {info.code for info in query_utm_crs_info("WGS 84", area) if info.name.startswith("WGS 84 / UTM zone")}
        special = (56 <= lat < 64 and 3 <= lon < 12) or (lat >= 72 and 0 <= lon < 42)
        border = min(lon % 6, -lon % 6, abs(lat)) < 1e-6
        if not (special or border):  # the registry's areas of use leave the exceptions out
            assert str(utm_crs(lon, lat).to_epsg()) in codes

    @pytest.mark.parametrize(
        ("lon", "lat", "epsg"),
        [
            (-57.0, -34.0, 32721),  # Uruguay
            (32.58, 0.31, 32636),  # Kampala
            (32.58, -0.01, 32736),
            (0.0, 0.0, 32631),
            (-0.0001, 0.0, 32630),
            (6.0, 45.0, 32632),  # a border belongs to the zone east of it
            (5.9999, 45.0, 32631),
            (5.3, 60.4, 32632),  # Bergen: zone 32 is wider there
            (2.9, 60.4, 32631),
            (5.3, 55.9, 32631),
            (5.3, 64.0, 32631),
            (15.6, 78.2, 32633),  # Longyearbyen: zones 32, 34 and 36 do not exist there
            (8.9, 78.2, 32631),
            (9.0, 78.2, 32633),
            (20.9, 78.2, 32633),
            (21.0, 78.2, 32635),
            (32.9, 78.2, 32635),
            (33.0, 78.2, 32637),
            (41.9, 78.2, 32637),
            (42.0, 78.2, 32638),
            (15.6, 71.9, 32633),
            (-180.0, 10.0, 32601),
            (180.0, 10.0, 32601),
            (179.99, -17.0, 32760),
            (181.0, -17.0, 32701),
            (540.0, 10.0, 32601),
            (np.nextafter(-180, -181), 10.0, 32601),
            (10.0, 84.0, 32633 - 2),  # the last parallel, where zone 32 does not exist
            (10.0, -80.0, 32732),
        ],
    )
    def test_by_hand(self, lon: float, lat: float, epsg: int) -> None:
        if (lon, lat) == (10.0, 84.0):
            epsg = 32633  # 9 to 21 degrees east
        assert utm_crs(lon, lat).to_epsg() == epsg

    @pytest.mark.parametrize("lat", [84.01, -80.01, 90.0, -90.0])
    def test_beyond_utm_is_refused_with_a_way_out(self, lat: float) -> None:
        with pytest.raises(UnsupportedImageError, match=r"beyond UTM.*projected CRS in metres"):
            utm_crs(0, lat)

    @given(st.floats(-1e6, 1e6))
    def test_wrapped_longitude_is_in_range(self, lon: float) -> None:
        wrapped = wrap_longitude(lon)
        assert -180 <= wrapped < 180
        assert math.cos(math.radians(wrapped - lon)) == pytest.approx(1, abs=1e-9)


def transform_at(crs: CRS, lon: float, lat: float, gsd: float, size: int = 1000) -> tuple[float, ...]:
    """Return the geotransform of a square image with its centre at a place; ``gsd`` in units of the CRS."""
    x, y = Transformer.from_crs(WGS84, crs, always_xy=True).transform(lon, lat)
    return (gsd, 0.0, x - gsd * size / 2, 0.0, -gsd, y + gsd * size / 2)


def grid_at(name: str | CRS, lon: float, lat: float, gsd: float = 0.25) -> Grid:
    crs = CRS.from_user_input(name)
    return ground_grid(crs, transform_at(crs, lon, lat, gsd), 1000, 1000, PATCH_M)


OWN = [  # CRS, lon, lat
    ("EPSG:32721", -57.0, -34.0),
    ("EPSG:28992", 5.39, 52.16),
    ("EPSG:31370", 4.37, 50.8),
    ("EPSG:3812", 4.37, 50.8),
    ("EPSG:2154", 2.35, 48.85),
    ("EPSG:27700", -1.5, 52.0),
    ("EPSG:25832", 11.5, 48.1),
    ("EPSG:3006", 18.0, 59.3),
    ("EPSG:2180", 21.0, 52.2),
    ("EPSG:2056", 7.4, 46.9),
    ("EPSG:5514", 14.4, 50.1),
    ("EPSG:2193", 174.8, -41.3),
    ("EPSG:3035", 10.0, 52.0),
    ("EPSG:5041", 30.0, 88.0),  # polar stereographic: both axes point south
    ("EPSG:5042", 30.0, -88.0),
    ("EPSG:3031", 60.0, -71.0),
    ("EPSG:3413", -45.0, 70.0),
]
UTM = [  # CRS, lon, lat, pixel in units of the CRS, UTM zone
    ("EPSG:3857", 32.58, 0.31, 0.25, 32636),  # true to scale, but still not a grid in metres
    ("EPSG:3857", 11.5, 48.1, 0.25, 32632),
    ("EPSG:4326", 11.5, 48.1, 2e-6, 32632),
    ("EPSG:4979", 11.5, 48.1, 2e-6, 32632),
    ("EPSG:4258", -8.5, 40.0, 2e-6, 32629),
    ("EPSG:2263", -74.0, 40.7, 0.8, 32618),  # US feet
    ("EPSG:2227", -122.0, 37.5, 0.8, 32610),
    ("EPSG:3395", 11.5, 48.1, 0.25, 32632),  # Mercator in metres, 1.5 x too large
    ("EPSG:3035", -9.0, 38.7, 0.25, 32629),  # equal-area: 1.4 % long one way, short the other
    ("ESRI:54008", 40.0, 45.0, 0.25, 32637),  # sinusoidal: true along parallels only
    ("EPSG:32632", 30.0, 48.0, 0.25, 32636),  # a UTM image four zones off
    ("EPSG:3031", 60.0, -60.0, 0.25, 32741),
    ("EPSG:2048", 19.2, -33.9, 0.25, 32734),  # axes west and south
]


class TestGroundGrid:
    @pytest.mark.parametrize(("name", "lon", "lat"), OWN)
    def test_metric_grids_are_used_as_they_are(self, name: str, lon: float, lat: float) -> None:
        """Also as GDAL writes them down, which is what reaches us from a file."""
        assert grid_at(name, lon, lat).crs == CRS.from_user_input(name)
        as_read = CRS.from_wkt(rasterio.crs.CRS.from_string(name).to_wkt())
        assert grid_at(as_read, lon, lat).crs.equals(as_read)

    @pytest.mark.parametrize(("name", "lon", "lat", "gsd", "epsg"), UTM)
    def test_others_get_the_utm_zone_of_their_centre(
        self, name: str, lon: float, lat: float, gsd: float, epsg: int
    ) -> None:
        assert grid_at(name, lon, lat, gsd).crs.to_epsg() == epsg

    def test_compound_crs_uses_its_horizontal_part(self) -> None:
        assert grid_at("EPSG:25832+5783", 11.5, 48.1).crs.to_epsg() == 25832
        assert grid_at("EPSG:4326+5773", 11.5, 48.1, 2e-6).crs.to_epsg() == 32632

    def test_datum_shift_inside_the_crs(self) -> None:
        """TOWGS84 makes it a bound CRS; the grid in it is the same."""
        wkt = rasterio.crs.CRS.from_string(
            "+proj=tmerc +lat_0=0 +lon_0=9 +k=1 +x_0=3500000 +y_0=0 +ellps=bessel +units=m "
            "+towgs84=598.1,73.7,418.2,0.202,0.045,-2.455,6.7"
        ).to_wkt()
        assert grid_at(CRS.from_wkt(wkt), 9.2, 48.8).crs.equals(CRS.from_wkt(wkt))

    def test_web_mercator_written_out_is_still_web_mercator(self) -> None:
        proj = "+proj=merc +a=6378137 +b=6378137 +lat_ts=0 +lon_0=0 +x_0=0 +y_0=0 +k=1 +nadgrids=@null"
        crs = CRS.from_wkt(rasterio.crs.CRS.from_string(proj).to_wkt())
        assert grid_at(crs, 32.58, 0.31).crs.to_epsg() == 32636

    @pytest.mark.parametrize(
        ("name", "lon", "lat", "gsd"), [("EPSG:4326", 10.0, 86.0, 2e-6), ("EPSG:3995", 10.0, 89.0, 0.25)]
    )
    def test_beyond_utm_is_refused(self, name: str, lon: float, lat: float, gsd: float) -> None:
        with pytest.raises(UnsupportedImageError, match="beyond UTM"):
            grid_at(name, lon, lat, gsd)

    @pytest.mark.parametrize("name", ["EPSG:4326", "EPSG:32632", "EPSG:3857"])
    def test_centre_that_is_no_place_is_refused(self, name: str) -> None:
        with pytest.raises(UnsupportedImageError, match=r"outside the area|beyond UTM"):
            ground_grid(CRS.from_user_input(name), (0.25, 0, 1e9, 0, -0.25, 1e9), 1000, 1000, PATCH_M)

    def test_geotransform_without_area_is_refused(self) -> None:
        with pytest.raises(UnsupportedImageError, match="no area"):
            ground_grid(UTM32, (0.25, 0.25, 5e5, -0.25, -0.25, 5e6), 1000, 1000, PATCH_M)

    @pytest.mark.parametrize("name", ["EPSG:32632", "EPSG:3857"])
    def test_rotated_and_south_up_images_have_the_grid_of_the_north_up_one(self, name: str) -> None:
        crs = CRS.from_user_input(name)
        a, _, c, _, e, f = transform_at(crs, 11.5, 48.1, 0.25)
        north_up = ground_grid(crs, (a, 0, c, 0, e, f), 1000, 1000, PATCH_M)
        south_up = ground_grid(crs, (a, 0, c, 0, -e, f + 1000 * e), 1000, 1000, PATCH_M)
        rotated = ground_grid(crs, (0, a, c, a, 0, f + 1000 * e), 1000, 1000, PATCH_M)
        assert north_up == south_up == rotated

    @pytest.mark.parametrize(("name", "lon", "lat"), OWN)
    def test_patch_area_is_that_on_the_ground(self, name: str, lon: float, lat: float) -> None:
        own = grid_at(name, lon, lat)
        x, y = project(WGS84, own.crs, lon, lat)
        half = 50 * own.patch_m
        corners = project(own.crs, WGS84, x + np.array([-1, 1, 1, -1]) * half, y + np.array([-1, -1, 1, 1]) * half)
        area, _ = Geod(ellps="WGS84").polygon_area_perimeter(*corners)
        within("patch area", abs(own.patch_area_m2 * 100**2 / abs(area) - 1))


class TestAntimeridian:
    def test_geographic_image_across_it(self) -> None:
        """Longitudes beyond 180: the grid, gsd and outline are those of the place."""
        crs, transform = CRS.from_epsg(4326), (2e-6, 0, 179.999, 0, -2e-6, -16.5)
        own = ground_grid(crs, transform, 2000, 1000, PATCH_M)
        assert own.crs.to_epsg() == 32701
        centre = image_centre(crs, transform, 2000, 1000)
        assert centre[0] == pytest.approx(-179.999)
        edge = outline(crs, transform, 2000, 1000, own.crs)
        assert np.ptp(edge[:, 0]) < 500
        west, _, east, _ = geographic_bounds(crs, transform, 2000, 1000)
        assert (west, east) == (-180, 180)

    @pytest.mark.parametrize(("epsg", "lon"), [(32760, 179.999), (32701, -179.999)])
    def test_utm_image_across_it(self, epsg: int, lon: float) -> None:
        crs = CRS.from_epsg(epsg)
        transform = transform_at(crs, lon, -16.5, 0.5)
        assert ground_grid(crs, transform, 1000, 1000, PATCH_M).crs == crs
        west, south, east, north = geographic_bounds(crs, transform, 1000, 1000)
        assert (west, east) == (-180, 180)
        assert south < -16.5 < north
        assert north - south < 0.01

    @pytest.mark.parametrize("lon", [178.0, -178.0, 10.0])
    def test_bounds_elsewhere_are_tight(self, lon: float) -> None:
        crs = utm_crs(lon, -16.5)
        west, _, east, _ = geographic_bounds(crs, transform_at(crs, lon, -16.5, 0.5), 1000, 1000)
        assert west < lon < east
        assert east - west < 0.01

    def test_no_rectangle_holds_a_torn_image(self) -> None:
        own = Grid(CRS.from_epsg(32701), PATCH_M)
        x, y = project(WGS84, own.crs, [-180.0, -179.9], [-16.5, -16.5])
        row, col = own.patch_of(x, y)
        across = PatchRange(int(row[0]), int(row[0]) + 50, int(col[0]) - 25, int(col[0]) + 25)
        beside = PatchRange(int(row[1]), int(row[1]) + 50, int(col[1]), int(col[1]) + 50)
        assert bounds_holding(across, own, WGS84) is None
        assert bounds_holding(beside, own, WGS84) is not None
        pole = Grid(CRS.from_epsg(5041), PATCH_M)
        row, col = (int(v) for v in pole.patch_of(2_000_000, 2_000_000))
        around = PatchRange(row - 20, row + 20, col - 20, col + 20)
        assert bounds_holding(around, pole, WGS84) is None
        assert bounds_holding(around, pole, CRS.from_epsg(3857)) is None


@pytest.mark.parametrize(("name", "lon", "lat"), [*OWN[:8], ("EPSG:32636", 32.58, 0.31)])
@pytest.mark.parametrize("target", [4326, 3857])
def test_bounds_holding_hold_every_patch(name: str, lon: float, lat: float, target: int) -> None:
    own = grid_at(name, lon, lat)
    row, col = (int(v) for v in own.patch_of(*project(WGS84, own.crs, lon, lat)))
    patches = PatchRange(row - 5000, row + 3000, col - 2000, col + 7000)
    held = bounds_holding(patches, own, CRS.from_epsg(target))
    assert held is not None
    rows, cols = np.meshgrid(np.linspace(row - 5000, row + 2999, 200), np.linspace(col - 2000, col + 6999, 200))
    x, y = project(own.crs, CRS.from_epsg(target), *own.patch_centre(rows, cols))
    assert held[0] < x.min()
    assert x.max() < held[2]
    assert held[1] < y.min()
    assert y.max() < held[3]
    assert held[2] - held[0] < 1.1 * np.ptp(x)


class TestGroundGsd:
    @pytest.mark.parametrize(
        ("name", "lon", "lat", "gsd"),
        [(name, lon, lat, 0.25) for name, lon, lat in OWN] + [(name, lon, lat, gsd) for name, lon, lat, gsd, _ in UTM],
    )
    def test_is_the_geodesic_length(self, name: str, lon: float, lat: float, gsd: float) -> None:
        """Geometric mean of both sides of a pixel on the ellipsoid."""
        crs = CRS.from_user_input(name)
        transform = transform_at(crs, lon, lat, gsd)
        own = ground_grid(crs, transform, 1000, 1000, PATCH_M)
        a, _, c, _, e, f = transform
        x, y = c + a * 500, f + e * 500
        lons, lats = Transformer.from_crs(crs, WGS84, always_xy=True).transform(
            [x - 50 * a, x + 50 * a, x + 50 * a, x - 50 * a], [y - 50 * a, y - 50 * a, y + 50 * a, y + 50 * a]
        )
        area, _ = Geod(ellps="WGS84").polygon_area_perimeter(lons, lats)
        found = ground_gsd(crs, transform, 1000, 1000, own)
        within("gsd", abs(found / (math.sqrt(abs(area)) / 100) - 1))

    def test_by_hand(self) -> None:
        """Web Mercator at 60 degrees: half of the pixel size, but for the ellipsoid."""
        crs = CRS.from_epsg(3857)
        transform = transform_at(crs, 10.0, 60.0, 0.5)
        assert ground_gsd(crs, transform, 1000, 1000, grid_at(crs, 10.0, 60.0)) == pytest.approx(0.25, rel=0.005)

    def test_rotated_pixels(self) -> None:
        angle = math.radians(30)
        cos, sin = 0.25 * math.cos(angle), 0.25 * math.sin(angle)
        transform = (cos, sin, 690_000, sin, -cos, 5_330_000)
        own = ground_grid(UTM32, transform, 100, 100, PATCH_M)
        assert ground_gsd(UTM32, transform, 100, 100, own) == pytest.approx(0.25, rel=0.001)


def error_of_raster_points(
    bounds: tuple[float, float, float, float], crs: CRS, shape: tuple[int, int], target: CRS, tolerance: float
) -> tuple[float, float]:
    """Return the largest error and the share of points without a place, on every 7th row and 5th column."""
    x, y = raster_points(bounds, crs, shape, target, tolerance)
    assert x.shape == y.shape == shape
    left, bottom, right, top = bounds
    cols, rows = np.arange(0, shape[1], 5), np.arange(0, shape[0], 7)
    uu, vv = np.meshgrid((cols + 0.5) / shape[1], (rows + 0.5) / shape[0])
    transformer = Transformer.from_crs(crs, target, always_xy=True)
    ex, ey = transformer.transform(left + uu * (right - left), top + vv * (bottom - top))
    x, y = x[np.ix_(rows, cols)], y[np.ix_(rows, cols)]
    exists = np.isfinite(ex) & np.isfinite(ey)
    assert not (np.isfinite(x) & np.isfinite(y))[~exists].any()
    assert np.isfinite(x[exists]).all()
    error = np.hypot(x[exists] - ex[exists], y[exists] - ey[exists])
    return float(error.max(initial=0)), float((~exists).mean())


class TestRasterPoints:
    @pytest.mark.parametrize("zoom", [0, 2, 5, 8, 10, 12, 14, 17, 20])
    @pytest.mark.parametrize(("lon", "lat"), [(27.0, 59.9), (-3.1, -55.0), (32.58, 0.31), (-179.9, -16.5)])
    def test_web_mercator_tiles(self, zoom: int, lon: float, lat: float) -> None:
        """Between two conformal systems the error at the middle of a cell is zero where it is large at the edges."""
        tms = all_tms.get("WebMercatorQuad")
        tolerance = 0.02 * PATCH_M
        bounds = tuple(tms.xy_bounds(tms.tile(lon, lat, zoom)))
        error, missing = error_of_raster_points(bounds, CRS.from_epsg(3857), (256, 256), utm_crs(lon, lat), tolerance)
        within("raster points", error / tolerance)
        assert missing == 0 or zoom < 5

    @settings(max_examples=60, deadline=None)
    @given(
        st.floats(-170, 170), st.floats(-75, 80), st.integers(3, 20), st.sampled_from([(64, 64), (512, 40), (33, 300)])
    )
    def test_anywhere_in_any_shape(self, lon: float, lat: float, zoom: int, shape: tuple[int, int]) -> None:
        tms = all_tms.get("WebMercatorQuad")
        bounds = tuple(tms.xy_bounds(tms.tile(lon, lat, zoom)))
        error, _ = error_of_raster_points(bounds, CRS.from_epsg(3857), shape, utm_crs(lon, lat), 0.07)
        within("raster points", error / 0.07)

    @pytest.mark.parametrize("name", ["EPSG:28992", "EPSG:31370", "EPSG:2154", "EPSG:27700", "EPSG:3035", "EPSG:5514"])
    @pytest.mark.parametrize("side_m", [100.0, 5_000.0, 100_000.0, 2_000_000.0])
    def test_grids_to_degrees(self, name: str, side_m: float) -> None:
        crs = CRS.from_user_input(name)
        lon, lat = next((lon, lat) for other, lon, lat in OWN if other == name)
        x, y = project(WGS84, crs, lon, lat)
        bounds = (float(x), float(y), float(x) + side_m, float(y) + side_m)
        error, _ = error_of_raster_points(bounds, crs, (300, 300), WGS84, 1e-6)
        within("raster points", error / 1e-6)

    def test_points_that_do_not_exist_are_not_finite(self) -> None:
        """A transverse Mercator's other side of the Earth, seen from a tile of the whole world."""
        tms = all_tms.get("WebMercatorQuad")
        bounds = tuple(tms.xy_bounds(tms.tile(0, 0, 0)))
        _, missing = error_of_raster_points(bounds, CRS.from_epsg(3857), (256, 256), UTM32, 0.07)
        assert 0 < missing < 0.95

    def test_across_the_antimeridian(self) -> None:
        """Longitude jumps by 360 degrees inside the raster."""
        bounds = (816_000.0, 8_174_000.0, 825_000.0, 8_183_000.0)
        error, _ = error_of_raster_points(bounds, CRS.from_epsg(32760), (200, 200), WGS84, 1e-7)
        within("raster points", error / 1e-7)


@needs_shared
@pytest.mark.parametrize(
    "name",
    [
        "south_america/uruguay_business_park.tif",
        "south_america/bolivia_river_town.tif",
        "kampala_web_mercator_7cm.tif",
        "europe/netherlands_epsg28992.tif",
        "europe/flanders_022276_199896.tif",
        "manila_river.tif",
    ],
)
def test_same_places_as_rasterio(name: str) -> None:
    """GDAL and pyproj put the image's corners within a tenth of a patch, from its CRS to the grid's, to degrees, back.

    A different datum operation would be metres off.
    """
    with rasterio.open(shared("imagery/" + name)) as raster:
        crs, bounds = raster.crs, raster.bounds
    own = CRS.from_wkt(crs.to_wkt())
    x = np.array([bounds.left, bounds.right, bounds.left, bounds.right])
    y = np.array([bounds.bottom, bounds.bottom, bounds.top, bounds.top])
    lon, lat = project(own, WGS84, x, y)
    utm = utm_crs(float(lon[0]), float(lat[0]))
    for target in (utm, WGS84, CRS.from_epsg(3857)):
        ours = np.array(project(own, target, x, y))
        theirs = np.array(rasterio.warp.transform(crs, target.to_wkt(), x, y))
        scale = 111_320 if target is WGS84 else 1
        within("rasterio", np.abs(ours - theirs).max() * scale / PATCH_M)


def test_project_is_safe_for_threads() -> None:
    pairs = [(WGS84, UTM32), (UTM32, WGS84), (CRS.from_epsg(28992), WGS84), (CRS.from_epsg(3857), UTM32)]
    starts = {0: (10.0, 48.0), 1: (6e5, 5.3e6), 2: (1.5e5, 4.5e5), 3: (1.1e6, 6.1e6)}
    steps = np.linspace(0, 1, 2000)

    def work(i: int) -> tuple[np.ndarray, np.ndarray]:
        x, y = starts[i % 4]
        return project(*pairs[i % 4], x + steps, y + steps)

    expected = [work(i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for i, found in enumerate(pool.map(work, range(400))):
            assert np.array_equal(found, expected[i % 4])


class TestParseCrs:
    @pytest.mark.parametrize("text", ["EPSG:32721", "EPSG:4326", "ESRI:54008", "OGC:CRS84"])
    def test_accepted(self, text: str) -> None:
        assert ":".join(parse_crs(text).to_authority() or ()) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "4326",
            "EPSG:",
            ":4326",
            "EPSG:999999",
            "EPSG:4326+5773",
            "http://example.com/crs",
            "+proj=utm +zone=32",
            "/etc/passwd",
            "EPSG:4326\n",
            "PROJCS[]",
            "EPSG:" + "1" * 40,
        ],
    )
    def test_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="AUTHORITY:code"):
            parse_crs(text)

    @pytest.mark.parametrize("text", ["EPSG:5773", "EPSG:4978"])
    def test_heights_and_geocentric_systems_place_nothing_on_a_map(self, text: str) -> None:
        with pytest.raises(InputError, match="does not place points"):
            parse_crs(text)

    def test_compound_crs_is_its_horizontal_part(self) -> None:
        assert parse_crs("EPSG:7415").to_epsg() == 28992


def test_outline_runs_once_around() -> None:
    edge = outline(UTM32, (0.25, 0, 690_000, 0, -0.25, 5_330_000), 1000, 400, UTM32)
    assert edge.shape == (132, 2)
    length = sum(math.dist(one, other) for one, other in pairwise(edge))
    assert length == pytest.approx(2 * (250 + 100))


def test_a_crs_that_is_only_like_one_of_an_authority_has_no_code() -> None:
    """Taken for the one that it is like, it would put images elsewhere."""
    assert authority_code(CRS.from_epsg(32721)) == "EPSG:32721"
    alike = CRS.from_proj4("+proj=utm +zone=32 +ellps=intl +units=m +no_defs")
    assert alike.to_authority() is not None, "at PROJ's usual confidence"
    assert authority_code(alike) is None
