"""Documents that name images, and where these lie: against morecantile, shapely and pyproj."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from typing import Any

import morecantile
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_utm_crs_info

from geocentroids_tiler.errors import MosaicError
from geocentroids_tiler.grid import Grid, PatchRange, project, utm_codes
from geocentroids_tiler.mosaic import Document, Member, Mosaic, is_document, read_document
from geocentroids_tiler.mosaic import box as box_of
from geocentroids_tiler.mosaic.mosaicjson import quadkey_box

MAX = {"max_bytes": 10_000, "max_members": 20}
HERE = "https://host/data/list.txt"
WGS84 = CRS.from_epsg(4326)
TOO_MANY = "names more images than this server takes as one layer .GEOCENTROIDS_MOSAIC_IMAGES."


def read(content: str | bytes | dict[str, Any], url: str = HERE, **limits: int) -> Document:
    if isinstance(content, dict):
        content = json.dumps(content)
    return read_document(content if isinstance(content, bytes) else content.encode(), url, **(MAX | limits))


def item(name: str = "one", **changes: Any) -> dict[str, Any]:
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": name,
        "bbox": [10, 20, 10.5, 20.5],
        "geometry": None,
        "properties": {"datetime": "2024-05-31T12:00:00Z"},
        "assets": {"visual": {"href": f"{name}.tif", "type": "image/tiff; application=geotiff"}},
        **changes,
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://host/mosaic.json", True),
        ("https://host/mosaic.JSON.gz?token=a.tif", True),
        ("https://host/items.geojson", True),
        ("sites/list.txt", True),
        ("table.csv", True),
        ("https://host/v1/search?collections=naip", True),
        ("https://host/collections/naip/items?limit=10", True),
        ("https://host/collections/naip/items/one", True),
        ("https://host/image.tif", False),
        ("https://host/image.tif?format=.json", False),
        ("https://host/items/one", False),
        ("https://host/anything", False),
        ("collections/naip/items", False),
        ("image.tiff", False),
    ],
)
def test_what_is_taken_for_a_document(url: str, expected: bool) -> None:
    assert is_document(url) is expected


class TestLists:
    def test_an_address_in_each_line(self) -> None:
        found = read("\ufeff# images\n\nhttps://other/a.tif\n sub/b.tif \n/c.tif\n")
        assert found.kind == "list"
        urls = ["https://other/a.tif", "https://host/data/sub/b.tif", "https://host/c.tif"]
        assert list(found.members) == [Member(url) for url in urls]

    def test_a_local_list_names_files_beside_it(self) -> None:
        found = read("a.tif\n./b.tif\nhttps://other/c.tif", "sites/list.txt")
        assert [member.url for member in found.members] == ["sites/a.tif", "sites/b.tif", "https://other/c.tif"]
        assert [member.url for member in read("a.tif", "list.txt").members] == ["a.tif"]

    def test_a_list_elsewhere_names_no_file_of_ours(self) -> None:
        found = read("file:///etc/passwd\n../../../etc/passwd")
        assert [member.url for member in found.members] == ["file:///etc/passwd", "https://host/etc/passwd"]

    def test_a_table(self) -> None:
        found = read('west,south,east,north,url,datetime,crs\n1,2,3,4,"a,b.tif",2024-05-31,EPSG:32631\n,,,,c.tif,,\n')
        first, second = found.members
        assert first.url == "https://host/data/a,b.tif"
        assert first.footprint.equals(shapely.box(1, 2, 3, 4))
        assert first.taken_at == datetime(2024, 5, 31, tzinfo=UTC)
        assert first.crs == "EPSG:32631"
        assert second == Member("https://host/data/c.tif")

    def test_across_the_antimeridian(self) -> None:
        (member,) = read("url,west,south,east,north\na.tif,179,-10,-179,10").members
        assert member.footprint.area == pytest.approx(40)
        assert member.footprint.intersects(shapely.Point(-179.5, 0))
        assert not member.footprint.intersects(shapely.Point(0, 0))

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("", "names no image"),
            ("# nothing", "names no image"),
            ("url,where\na,b", "column 'where'; accepted: url, west"),
            ("url,west\na,1", "some of the columns west, south, east, north"),
            ("url,west,south,east,north\na.tif,1,2,3", "line 2 has 4 values; the first line names 5 columns"),
            ("url,west,south,east,north\na.tif,1,2,3,north", "line 2 has bounds"),
            ("url,west,south,east,north\na.tif,1,2,3,91", r"line 2 has bounds \[1.0, 2.0, 3.0, 91.0\]; west, south"),
            ("url,west,south,east,north\na.tif,1,2,nan,3", "west, south, east, north in degrees are needed"),
            ("url,datetime\n\na.tif,yesterday", "line 3 has the date 'yesterday'; accepted: 2024-05-31"),
            ("url,crs\n,EPSG:4326", "line 2 names '' as an image"),
            ("a" * 5000, "line 1 names 'aaa"),
            ("a\n" * 21, TOO_MANY),
        ],
    )
    def test_what_cannot_be_used(self, text: str, problem: str) -> None:
        with pytest.raises(MosaicError, match=problem):
            read(text)


class TestMosaicJson:
    def test_images_lie_under_their_tiles(self) -> None:
        tms = morecantile.tms.get("WebMercatorQuad")
        tiles = list(tms.tiles(10, 20, 10.4, 20.3, [10]))
        keys = {tms.quadkey(tile): [f"{tile.x}.tif", "all.tif"] for tile in tiles}
        found = read({"mosaicjson": "0.0.3", "tiles": keys, "asset_prefix": "https://bucket/"})
        by_url = {member.url: member for member in found.members}
        assert set(by_url) == {"https://bucket/all.tif", *(f"https://bucket/{tile.x}.tif" for tile in tiles)}
        whole = shapely.union_all([shapely.box(*tms.bounds(tile)) for tile in tiles])
        assert by_url["https://bucket/all.tif"].footprint.symmetric_difference(whole).area < 1e-9

    @given(st.integers(1, 24), st.data())
    @settings(max_examples=60, deadline=None)
    def test_quadkeys(self, z: int, data: st.DataObject) -> None:
        tms = morecantile.tms.get("WebMercatorQuad")
        tile = morecantile.Tile(data.draw(st.integers(0, 2**z - 1)), data.draw(st.integers(0, 2**z - 1)), z)
        expected = tms.bounds(tile)
        assert quadkey_box(tms.quadkey(tile)).bounds == pytest.approx(tuple(expected), abs=1e-7)

    @pytest.mark.parametrize(
        ("document", "problem"),
        [
            ({"mosaicjson": "0.0.3"}, "tiles of the MosaicJSON is None"),
            ({"mosaicjson": "0.0.3", "tiles": {}}, "names no image"),
            ({"mosaicjson": "0.0.3", "tiles": {"4": ["a"]}}, "'4' is not a quadkey"),
            ({"mosaicjson": "0.0.3", "tiles": {"0" * 31: ["a"]}}, "is not a quadkey; accepted: 1 to 30 digits"),
            ({"mosaicjson": "0.0.3", "tiles": {"0": "a"}}, "tile '0' of the MosaicJSON is 'a'; a list"),
            ({"mosaicjson": "0.0.3", "tiles": {"0": [7]}}, "tile '0' of the MosaicJSON names 7 as an image"),
            (
                {"mosaicjson": "0.0.3", "tiles": {"0": list(map(str, range(21)))}},
                "or names them more often, than 20 allow",
            ),
            ({"mosaicjson": "0.0.3", "tiles": {"0": ["a"]}, "asset_prefix": 3}, "asset_prefix of the MosaicJSON is 3"),
        ],
    )
    def test_what_cannot_be_used(self, document: dict[str, Any], problem: str) -> None:
        with pytest.raises(MosaicError, match=problem):
            read(document)


class TestStac:
    def test_item(self) -> None:
        (member,) = read(
            item(properties={"datetime": None, "start_datetime": "2024-01-01", "proj:epsg": 32632})
        ).members
        assert member.url == "https://host/data/one.tif"
        assert member.footprint.equals(shapely.box(10, 20, 10.5, 20.5))
        assert member.taken_at == datetime(2024, 1, 1, tzinfo=UTC)
        assert member.crs == "EPSG:32632"

    def test_the_geometry_is_nearer_than_the_box(self) -> None:
        triangle = shapely.Polygon([(10, 20), (10.5, 20), (10, 20.5)])
        (member,) = read(item(geometry=shapely.geometry.mapping(triangle), bbox=[10, 20, 0, 10.5, 20.5, 9])).members
        assert member.footprint.equals(triangle)

    @pytest.mark.parametrize(
        ("assets", "expected"),
        [
            ({"thumbnail": {"href": "t.tif", "roles": ["thumbnail"]}, "x": {"href": "x.tif"}}, "x"),
            ({"labels": {"href": "l.tif", "roles": ["data"]}, "image": {"href": "i.tif", "roles": ["visual"]}}, "i"),
            ({"B4": {"href": "b.tif"}, "B5": {"href": "c.tif"}, "visual": {"href": "v.tif"}}, "v"),
            ({"image": {"href": "i.tif"}, "nir": {"href": "n.tif"}}, "i"),
            ({"a": {"href": "signed", "type": "image/tiff; application=geotiff; profile=cloud-optimized"}}, "signed"),
        ],
    )
    def test_which_asset_is_the_image(self, assets: dict[str, Any], expected: str) -> None:
        (member,) = read(item(assets=assets)).members
        assert member.url.removeprefix("https://host/data/").removesuffix(".tif") == expected

    def test_pages(self) -> None:
        link = {"rel": "next", "href": "/search?page=2"}
        found = read({"type": "FeatureCollection", "features": [item("a"), item("b")], "links": [link]})
        assert [member.url for member in found.members] == ["https://host/data/a.tif", "https://host/data/b.tif"]
        assert found.next_url == "https://host/search?page=2"
        assert read({"type": "FeatureCollection", "features": []}).next_url is None

    @pytest.mark.parametrize(
        ("document", "problem"),
        [
            (item(assets={}), "item 'one' has no asset that is clearly its image .it has none."),
            (item(assets={"a": {"href": "a.jpg"}}), "it has 'a'.; accepted: one GeoTIFF"),
            (item(assets={"a": {"href": "a.tif"}, "b": {"href": "b.tif"}}), "it has 'a', 'b'"),
            (item(assets={"a": {"href": "", "type": "image/tiff"}}), "item 'one' names '' as an image"),
            (item(bbox=[1, 2, 3]), None),
            (item(bbox=[1, 2, "x", 4]), "item 'one' has bounds"),
            (item(geometry={"type": "Polygon", "coordinates": "x"}), "the geometry of item 'one' cannot be read"),
            (item(geometry={"type": "Polygon", "coordinates": [[[500, 0], [501, 0], [501, 1], [500, 0]]]}), "bounds"),
            (item(properties={"datetime": "soon"}), "item 'one' has the date 'soon'"),
            ({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": None}]}, "no STAC item"),
            ({"type": "FeatureCollection", "features": [7]}, "one of the features is no STAC item: 7"),
            (
                {"type": "FeatureCollection", "features": [item()] * 21},
                TOO_MANY,
            ),
            ({"type": "Collection"}, "is a STAC Collection; accepted: its items"),
            ({"type": "Point"}, "is JSON of type 'Point'; accepted: a MosaicJSON"),
            ({}, "is JSON of type None"),
        ],
    )
    def test_what_cannot_be_used(self, document: dict[str, Any], problem: str | None) -> None:
        if problem is None:
            assert read(document).members[0].footprint is None  # the image is opened to learn where it lies
            return
        with pytest.raises(MosaicError, match=problem):
            read(document)

    @pytest.mark.parametrize(
        ("link", "problem"),
        [
            ({"rel": "next", "href": "x", "method": "POST"}, "needs a POST request"),
            ({"rel": "next", "href": "file:///etc/passwd"}, "an http.s. URL is needed"),
            ({"rel": "next"}, "names None"),
        ],
    )
    def test_pages_that_cannot_be_had(self, link: dict[str, Any], problem: str) -> None:
        with pytest.raises(MosaicError, match=problem):
            read({"type": "FeatureCollection", "features": [item()], "links": [link]})


class TestHostile:
    """What costs little to send must cost little to read; none of these may take seconds."""

    def test_a_shape_that_takes_for_ever_to_mend(self) -> None:
        teeth = [[x / 100 + (i % 2) / 200, y] for x in range(100) for i, y in enumerate((0, 1, 1, 0))]
        comb = [*teeth, *([y, x] for x, y in teeth), teeth[0]]
        (member,) = read(item(geometry={"type": "Polygon", "coordinates": [comb]}), max_bytes=10**6).members
        assert member.footprint.equals(shapely.box(*shapely.Polygon(comb).bounds))

    def test_a_shape_of_very_many_points(self) -> None:
        circle = shapely.Point(10, 20).buffer(1, quad_segs=1000)
        (member,) = read(item(geometry=shapely.geometry.mapping(circle)), max_bytes=10**6).members
        assert shapely.get_num_coordinates(member.footprint) == 5
        assert member.footprint.covers(circle)

    def test_very_many_lines(self) -> None:
        content = gzip.compress(b"a\n" * 4_000_000)
        with pytest.raises(MosaicError, match="names more images"):
            read(content, max_bytes=10**7)

    def test_very_many_parts(self) -> None:
        content = b'{"a": [' + b"[]," * 1_000_000 + b"[]]}"
        with pytest.raises(MosaicError, match="too many parts for 20 images"):
            read(content, max_bytes=10**8)

    def test_very_many_tiles(self) -> None:
        tiles = {format(i, "b").zfill(17).replace("1", "3"): ["a.tif"] for i in range(1500)}
        (member,) = read({"mosaicjson": "0.0.3", "tiles": tiles}, max_bytes=10**6).members
        assert member.footprint.equals(shapely.box(*member.footprint.bounds))
        tiles = {quadkey: ["a.tif", "b.tif"] for quadkey in tiles}
        with pytest.raises(MosaicError, match="names them more often"):
            read({"mosaicjson": "0.0.3", "tiles": tiles}, max_bytes=10**6)

    def test_an_error_names_a_few_assets(self) -> None:
        assets = {f"{'a' * 50}{i}": {"href": "a.tif"} for i in range(1000)}
        with pytest.raises(MosaicError) as caught:
            read(item(assets=assets), max_bytes=10**6)
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize(
        "document",
        [
            item(bbox=[1, 2, 10**400, 4]),
            item(geometry={"type": "Polygon", "coordinates": [[[1e308 * 10, 0], [1, 1], [0, 1], [0, 0]]]}),
            item(assets={"visual": {"href": "http://[x/a.tif"}}),
            {"type": "FeatureCollection", "features": [item()], "links": [{"rel": "next", "href": "http://[x/"}]},
        ],
    )
    def test_odd_values(self, document: dict[str, Any]) -> None:
        with pytest.raises(MosaicError):
            read(json.dumps(document).replace("Infinity", "1e999"))

    def test_deep_coordinates(self) -> None:
        deep = "[" * 900 + "]" * 900
        with pytest.raises(MosaicError):
            read(json.dumps(item(geometry={"type": "Polygon", "coordinates": "X"})).replace('"X"', deep))

    @pytest.mark.parametrize("url", ["http://[x/a.json", "http://[x/a.tif"])
    def test_an_address_that_is_none(self, url: str) -> None:
        assert not is_document(url)


class TestBuckets:
    def test_addresses_start_beside_the_document(self) -> None:
        found = read("a.tif\nsub/b.tif\nhttps://other/c.tif", "s3://bucket/data/list.txt")
        urls = ["s3://bucket/data/a.tif", "s3://bucket/data/sub/b.tif", "https://other/c.tif"]
        assert [member.url for member in found.members] == urls

    @pytest.mark.parametrize("line", ["/etc/passwd", "file:etc/passwd", "//host/a.tif"])
    def test_they_name_no_file_of_ours(self, line: str) -> None:
        with pytest.raises(MosaicError, match="is no address beside it"):
            read(line, "s3://bucket/list.txt")


class TestAnyDocument:
    def test_compressed(self) -> None:
        assert len(read(gzip.compress(b"a.tif\nb.tif")).members) == 2

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (gzip.compress(bytes(1_000_000)), "has more than 10000 bytes"),
            (gzip.compress(b"a.tif" * 9)[:-9], "cannot be unpacked"),
            (b"a" * 10_001, "has more than 10000 bytes"),
            (b"\xff\xfe\x00a", "is no text"),
            (b"II*\x00\x08\x00\x00\x00\xff", "is no text"),
            (b'{"type": "Feat', "is not JSON"),
            (b"[1]", "is a JSON list"),
            (b"[" * 9_000, "is not JSON"),
        ],
    )
    def test_what_cannot_be_read(self, content: bytes, problem: str) -> None:
        with pytest.raises(MosaicError, match=problem):
            read(content)


def mosaic_of(*boxes: tuple[float, float, float, float], crs: Any = None, dates: Any = None) -> Mosaic:
    codes = crs if isinstance(crs, list) else [crs] * len(boxes)
    taken = dates or [None] * len(boxes)
    members = tuple(Member(f"{i}.tif", shapely.box(*box), taken[i], codes[i]) for i, box in enumerate(boxes))
    return Mosaic("m.json", "1", members, 3.5)


class TestIndex:
    @given(st.floats(-180, 179.99), st.floats(-79.9, 83.9))
    @settings(max_examples=100, deadline=None)
    def test_utm_zones(self, lon: float, lat: float) -> None:
        """pyproj's own search, whose zones have no exceptions: Norway and Svalbard are looked at below."""
        if (
            (3 <= lon < 12 and 56 <= lat < 64)
            or (0 <= lon < 42 and lat >= 72)
            or min(lon % 6, -lon % 6, abs(lat)) < 1e-9
        ):
            return
        place = AreaOfInterest(lon, lat, lon, lat)
        found = query_utm_crs_info(datum_name="WGS 84", area_of_interest=place)
        assert int(utm_codes(lon, lat)) in {int(info.code) for info in found}

    @pytest.mark.parametrize(
        ("lon", "lat", "code"),
        [(5, 60, 32632), (5, 64, 32631), (8, 75, 32631), (9, 75, 32633), (22, 75, 32635), (34, 75, 32637),
         (42, 75, 32638), (180, 0, 32601), (-180, 0, 32601), (179.99, -1, 32760), (0, 84.1, 0), (0, -80.1, 0)],
    )  # fmt: skip
    def test_exceptions(self, lon: float, lat: float, code: int) -> None:
        assert int(utm_codes(lon, lat)) == code

    def test_zones_by_place(self) -> None:
        mosaic = mosaic_of(
            (5.9, 10, 6.1, 10.1), (5.8, 10, 5.85, 10.1), (6.2, -0.1, 6.3, 0.1), crs=["EPSG:32631", None, None]
        )
        found = {zone.code: zone.members.tolist() for zone in mosaic.zones}
        assert found == {"EPSG:32631": [0, 1], "EPSG:32632": [0, 2], "EPSG:32732": [2]}
        assert mosaic.zone_at(6.01, 10) == "EPSG:32632"

    def test_images_of_one_crs_share_its_grid(self) -> None:
        west, east = (5.9, 10, 6.0, 10.1), (6.0, 10, 6.1, 10.1)
        (zone,) = mosaic_of(west, east, crs="EPSG:32631").zones
        assert zone.code == "EPSG:32631"
        assert mosaic_of(west, east, crs="EPSG:32631").zone_at(6.05, 10) == "EPSG:32631"

    @pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:4326", "EPSG:32601", "nonsense", "EPSG:999999"])
    def test_a_common_crs_that_no_grid_can_have(self, crs: str) -> None:
        zones = mosaic_of((5.9, 10, 6.1, 10.1), crs=crs).zones
        assert [zone.code for zone in zones] == ["EPSG:32631", "EPSG:32632"]

    def test_the_footprint_of_a_zone_holds_its_images(self) -> None:
        mosaic = mosaic_of((5.2, 50, 5.4, 50.3), (4.0, 50.1, 4.1, 50.2))
        (zone,) = mosaic.zones
        for member in mosaic.members:
            x, y = project(
                WGS84, zone.grid.crs, *np.array(shapely.segmentize(member.footprint, 0.01).exterior.coords).T
            )
            rows, cols = zone.grid.patch_of(x, y)
            assert zone.footprint.row_start <= rows.min()
            assert rows.max() < zone.footprint.row_stop
            assert zone.footprint.col_start <= cols.min()
            assert cols.max() < zone.footprint.col_stop

    @given(st.integers(0, 2**32))
    @settings(max_examples=30, deadline=None)
    def test_none_under_a_place_is_overlooked(self, seed: int) -> None:
        """Against all footprints, one by one; what is found too much is near the place."""
        rng = np.random.default_rng(seed)
        corners = rng.uniform([10, 50], [10.2, 50.2], (40, 2))
        sizes = rng.uniform(0.0005, 0.01, (40, 2))
        mosaic = mosaic_of(
            *(tuple(map(float, (*low, *(low + size)))) for low, size in zip(corners, sizes, strict=True))
        )
        grid = Grid(CRS.from_epsg(32632), 3.5)
        x, y = project(WGS84, grid.crs, *rng.uniform([10, 50], [10.2, 50.2]))
        row, col = (int(value) for value in grid.patch_of(x, y))
        rows, cols = (int(value) for value in rng.integers(1, 600, 2))
        patches = PatchRange(row, row + rows, col, col + cols)
        left, bottom, right, top = grid.bounds_of(patches)
        ring = np.array(shapely.segmentize(shapely.box(left, bottom, right, top), 20).exterior.coords)
        place = shapely.Polygon(np.stack(project(grid.crs, WGS84, *ring.T), axis=1))
        needed = {i for i, member in enumerate(mosaic.members) if member.footprint.intersects(place)}
        found = set(mosaic.under(patches, grid, "first"))
        assert needed <= found
        near = place.buffer(0.001 + 0.1 * max(rows, cols) * 3.5 / 70_000)
        assert all(mosaic.members[i].footprint.intersects(near) for i in found)

    def test_order(self) -> None:
        box = (10, 50, 10.1, 50.1)
        days = [datetime(2020, 1, day, tzinfo=UTC) for day in (1, 3, 3, 2)]
        mosaic = mosaic_of(box, box, box, box, box, dates=[*days, None])
        grid = Grid(CRS.from_epsg(32632), 3.5)
        row, col = (int(value) for value in grid.patch_of(*project(WGS84, grid.crs, 10.05, 50.05)))
        patches = PatchRange(row, row + 1, col, col + 1)
        assert mosaic.under(patches, grid, "first") == [0, 1, 2, 3, 4]
        assert mosaic.under(patches, grid, "similarity") == [0, 1, 2, 3, 4]
        assert mosaic.under(patches, grid, "newest") == [1, 2, 3, 0, 4]

    def test_norway_within_a_wide_box(self) -> None:
        codes = {zone.code for zone in mosaic_of((4, 50, 5, 70)).zones}
        assert codes == {"EPSG:32631", "EPSG:32632"}

    def test_across_the_antimeridian(self) -> None:
        """Two zones, and footprints that are no larger than the image."""
        crossing = box_of((179.99, -17.01, -179.99, -17.0), "it")
        mosaic = Mosaic(
            "m.json", "1", (Member("a.tif", crossing), Member("b.tif", shapely.box(178, -17, 178.1, -16.9))), 3.5
        )
        found = {zone.code: zone for zone in mosaic.zones}
        assert set(found) == {"EPSG:32701", "EPSG:32760"}
        rows, cols = found["EPSG:32701"].footprint.shape
        assert rows * 3.5 < 3000
        assert cols * 3.5 < 3000
        grid = found["EPSG:32701"].grid
        row, col = (int(value) for value in grid.patch_of(*project(WGS84, grid.crs, -179.995, -17.005)))
        assert mosaic.under(PatchRange(row - 300, row + 300, col - 600, col + 600), grid, "first") == [0]
        # An image elsewhere on the same latitude is not under a place at the antimeridian.
        other = Mosaic("m.json", "1", (*mosaic.members, Member("c.tif", shapely.box(0, -17.01, 0.1, -17))), 3.5)
        assert other.under(PatchRange(row - 300, row + 300, col - 600, col + 600), grid, "first") == [0]

    def test_a_common_polar_crs(self) -> None:
        (zone,) = mosaic_of((120, -71.1, 120.2, -71), crs="EPSG:3031").zones
        assert zone.code == "EPSG:3031"

    def test_beyond_utm(self) -> None:
        assert mosaic_of((10, 85, 10.2, 86)).zones == ()

    def test_on_a_grid_near_a_place_only(self) -> None:
        mosaic = mosaic_of((-60, 10, -59.99, 10.01), (120, 10, 120.01, 10.01))
        zone = mosaic.on_grid("EPSG:32651", (120, 10, 120.01, 10.01))
        assert zone is not None
        assert zone.members.tolist() == [1]
        assert max(zone.footprint.shape) < 1000
        assert mosaic.on_grid("EPSG:32651", (0, 0, 1, 1)) is None

    def test_area(self) -> None:
        mosaic = mosaic_of((10, 50, 10.1, 50.1), (10, 50, 10.1, 50.1))
        area, _ = Geod(ellps="WGS84").geometry_area_perimeter(mosaic.members[0].footprint)
        assert mosaic.area_m2 == pytest.approx(2 * area, rel=0.01)
