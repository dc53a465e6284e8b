"""TiTiler's own routes: what one request may cost, and how many may be under way."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import LIBRARY_WARNINGS, PATIENCE_S, fake_service, write_codebooks, write_images
from fastapi import APIRouter, FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from rasterio.errors import RasterioIOError

from geocentroids_tiler.app import PREFIX, create_app
from geocentroids_tiler.errors import BusyError, InputError
from geocentroids_tiler.gate import Gate
from geocentroids_tiler.geojson_size import check_geojson_size, strays_from_bbox, vertices_exceed
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.stock import PER_SOURCE, stock_route
from geocentroids_tiler.stock_params import _CHECKS, check_stock_request

API = f"{PREFIX}/geocentroids"
WEST, SOUTH, EAST, NORTH = -56.3432, -34.8814, -56.3427, -34.8809
JSON = {"Content-Type": "application/json"}
SQUARE = [[WEST, SOUTH], [EAST, SOUTH], [EAST, NORTH], [WEST, NORTH], [WEST, SOUTH]]

pytestmark = LIBRARY_WARNINGS


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service, _ = fake_service(
        write_images(tmp_path_factory.mktemp("images")),
        write_codebooks(tmp_path_factory.mktemp("codebooks")),
        max_features=3,
        max_vertices=12,
    )
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(create_app(service=service))


def feature(ring: Any = SQUARE) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


INSIDE = {
    "tilesize": ["16", "1024"],
    "max_size": ["1", "2048"],
    "buffer": ["0.5", "256"],
    "padding": ["0", "256"],
    "cover_scale": ["1", "100"],
    "minzoom": ["0", "40"],
    "dst_crs": ["EPSG:3857", "epsg:4326", "OGC:CRS84"],
    "bidx": ["1", "65535"],
    "expression": ["b1/b2", "(b1-b2)/(b1+b2);where(b1>2,b1,0)", "b1**2", "2**b1", "-b1*1e3", "x" * 256],
    "nodata": ["nan", "-9999"],
    "rescale": ["0,255"],
    "color_formula": ["gamma rgb 3.5"],
    "colormap": ['{"1": "#ffffff"}', "[[[0, 1], [0, 0, 0, 255]]]"],
    "algorithm_params": ['{"buffer": 3}'],
    "c": ["1", "2.5"],
    "p": ["0", "100"],
    "histogram_bins": ["1024", "0,100,200", ",".join(["1"] * 1024)],
    "histogram_range": ["0,1000"],
}
OUTSIDE = {
    "tilesize": ["15", "1025", "6000", "٣٢", "1_00", "", "1e3", "9" * 5000],
    "max_size": ["0", "-1", "2049"],
    "buffer": ["-1", "256.5", "nan", "inf", "x"],
    "padding": ["-1", "257"],
    "cover_scale": ["0", "101"],
    "minzoom": ["-1", "41", "1000000000"],
    "maxzoom": ["-1", "41"],
    "z": ["-1", "41", "1000000000"],
    "x": ["1" + "0" * 18],
    "lon": ["nan", "inf", "1e300"],
    "minx": ["nan"],
    **{
        name: [
            "http://127.0.0.1:1/x",
            "/etc/passwd",
            "EPSG:4326+5773",
            "+proj=longlat",
            "4326",
            "[EPSG:4326]",
            "EPSG:0",
        ]
        for name in ("crs", "coord_crs", "dst_crs", "coord-crs", "dst-crs", "bbox-crs")
    },
    "bidx": ["0", "-1", "x"],
    "expression": [
        "b1" + "+b1" * 85,
        "b1;" * 17,
        "9**9**9",
        "b1*9**9**9",
        "2**2",
        "b1**65",
        "b1**(2*2)",
        "1<<b1<<99999",
        "1<<9999999999",
        "'a'*10**9",
        "[0]*99999",
        "(lambda: b1)()",
        "b1.real",
        "__import__('os')",
        "where(b1, x=1)",
        "(((",
        "b1 if b1 else b2",
    ],
    "nodata": ["9" * 33],
    "rescale": ["0," + "1" * 64],
    "color_formula": ["gamma rgb 3.5, " * 20],
    "colormap": ['{"1": "' + "f" * 8192 + '"}', "[" * 5000, "1", "{"],
    "colormap_name": ["x" * 65],
    "algorithm": ["x" * 65],
    "algorithm_params": ["[]", "[" * 1000, "{", '{"a": "' + "b" * 1024 + '"}'],
    "c": ["nan", "x"],
    "p": ["-1", "101"],
    "histogram_bins": ["0", "1025", "999999999", ",".join(["1"] * 1025), "1," * 5000],
    "histogram_range": ["0," + "1" * 64],
    "resampling": ["x" * 33],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in INSIDE.items() for value in values])
def test_inside(name: str, value: str) -> None:
    check_stock_request([("url", "x" * 4000), (name, value)], {})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OUTSIDE.items() for value in values],
    ids=lambda value: value[:20],
)
def test_outside(name: str, value: str) -> None:
    with pytest.raises(InputError) as refused:
        check_stock_request([(name, value)], {})
    assert len(str(refused.value)) < 300
    with pytest.raises(InputError):
        check_stock_request([], {name: value})


def test_a_second_value_does_not_hide_behind_a_first() -> None:
    with pytest.raises(InputError, match="max_size is given 2 times"):
        check_stock_request([("max_size", "10"), ("max_size", "20")], {})
    with pytest.raises(InputError, match="width is given 2 times"):
        check_stock_request([("width", "10"), ("height", "10")], {"width": 20})
    check_stock_request([("bidx", "1")] * 16, {})
    with pytest.raises(InputError, match="bidx is given 17 times; accepted: at most 16"):
        check_stock_request([("bidx", "1")] * 17, {})
    with pytest.raises(InputError, match="p is given 65 times"):
        check_stock_request([("p", "1")] * 65, {})


def test_a_side_does_not_follow_from_the_shape_of_an_area() -> None:
    check_stock_request([("width", "100"), ("height", "100")], {})
    with pytest.raises(InputError, match="width and height are needed together"):
        check_stock_request([("width", "100")], {})


def test_the_grid_on_which_polygons_are_weighed() -> None:
    check_stock_request([], {}, coverage=True)
    check_stock_request([("max_size", "2048"), ("cover_scale", "5")], {}, coverage=True)
    for query in ([("max_size", "2048")], [("cover_scale", "11")]):
        check_stock_request(query, {})
        with pytest.raises(InputError, match="a product of at most 10240"):
            check_stock_request(query, {}, coverage=True)


def test_every_parameter_of_every_route_is_bounded(client: TestClient) -> None:
    """A parameter that a new release of TiTiler brings along fails here."""
    paths = client.get("/openapi.json").json()["paths"]
    stock = {path: methods for path, methods in paths.items() if path.startswith(PREFIX) and not path.startswith(API)}
    assert len(stock) > 12
    names = {
        parameter["name"] for methods in stock.values() for each in methods.values() for parameter in each["parameters"]
    }
    assert len(names) > 30
    assert names - set(_CHECKS) == {"url", "tileMatrixSetId"}, "which our own dependency and a list of names bound"


class TestOverHttp:
    def test_every_route_is_bounded(self, client: TestClient) -> None:
        given = {"tileMatrixSetId": "WebMercatorQuad", "format": "png", "width": 8, "height": 8, "z": 1, "x": 0, "y": 0}
        given |= {"lon": WEST, "lat": SOUTH, "minx": WEST, "miny": SOUTH, "maxx": EAST, "maxy": NORTH}
        paths = client.get("/openapi.json").json()["paths"]
        stock = [
            (method, path.format(**given))
            for path, methods in paths.items()
            if path.startswith(PREFIX) and not path.startswith(API)
            for method in methods
        ]
        assert len(stock) > 15
        for method, path in stock:
            answer = client.request(method, path, params={"url": "whole.tif", "histogram_bins": "0"})
            assert answer.status_code == 400, path
            assert "histogram_bins='0'" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "path",
        [
            "/tiles/WebMercatorQuad/18/90044/158203.png?tilesize=6000",
            "/tiles/WebMercatorQuad/18/90044/158203.png?buffer=2000",
            "/tiles/WebMercatorQuad/-1/0/0.png?",  # the search for that zoom level would never end
            "/tiles/WebMercatorQuad/100000000/0/0.png?",
            "/preview.png?max_size=100000",
            "/preview/9000x9000.png?",
            "/preview.png?dst_crs=http://127.0.0.1:1/",
            "/info.geojson?crs=/etc/passwd",
            "/point/nan,0?",
            "/statistics?histogram_bins=1000000000",
            "/preview.png?expression=9**9**9",
        ],
    )
    def test_refused(self, client: TestClient, path: str) -> None:
        answer = client.get(f"{PREFIX}{path}&url=whole.tif")
        assert answer.status_code == 400
        assert answer.headers["cache-control"] == "no-store"
        assert re.search("accepted: |write AUTHORITY:code|powers and shifts are of", answer.json()["detail"])

    def test_a_box_without_a_width(self, client: TestClient) -> None:
        """rio-tiler divides by it."""
        answer = client.get(f"{PREFIX}/bbox/2e-152,0.04,2e-16,3600.webp?url=degrees.tif")
        assert answer.status_code == 400, answer.text
        assert answer.headers["cache-control"] == "no-store"

    def test_what_is_useful_still_works(self, client: TestClient) -> None:
        for path in (
            "/info?",
            "/info.geojson?crs=EPSG:4326",
            "/tiles/WebMercatorQuad/18/90044/158203.png?tilesize=512&bidx=1&rescale=0,255&colormap_name=viridis",
            "/preview.png?max_size=64&expression=b1/b2&rescale=0,2",
            f"/bbox/{WEST},{SOUTH},{EAST},{NORTH}.png?coord_crs=EPSG:4326&dst_crs=EPSG:3857",
            "/statistics?histogram_bins=5&p=50",
            "/WebMercatorQuad/tilejson.json?",
            "/tiles?",
        ):
            answer = client.get(f"{PREFIX}{path}&url=whole.tif")
            assert answer.status_code == 200, (path, answer.text)
        assert client.post(f"{PREFIX}/feature.png?url=whole.tif", json=feature()).status_code == 200
        answer = client.post(f"{PREFIX}/statistics?url=whole.tif", json=collection(feature()))
        assert answer.json()["features"][0]["properties"]["statistics"]

    def test_an_area_without_a_size_is_bounded(self, tmp_path: Path, service: Service) -> None:
        from rasters import texture, write_tif

        write_tif(tmp_path / "large.tif", np.tile(texture(400, 400), (1, 1, 8)))
        large, _ = fake_service(tmp_path, service.settings.codebooks_dir)
        client = TestClient(create_app(service=large))
        west, south, east, north = client.get(f"{PREFIX}/info.geojson?url=large.tif").json()["bbox"]
        answer = client.get(f"{PREFIX}/bbox/{west},{south},{east},{north}.png?url=large.tif")
        assert answer.status_code == 200, answer.text
        assert max(Image.open(io.BytesIO(answer.content)).size) == 1024, "it has 3200 pixels"
        large.close()

    def test_errors_are_sentences(self, client: TestClient) -> None:
        for path, status in (("/info", 422), ("/info?url=none.tif", 404), ("/preview.png?url=whole.tif&bidx=9", 400)):
            answer = client.get(f"{PREFIX}{path}")
            assert (answer.status_code, type(answer.json()["detail"])) == (status, str)
            assert answer.headers["cache-control"] == "no-store"

    def test_what_makes_no_sense_is_the_callers_fault(self, client: TestClient) -> None:
        answer = client.get(f"{PREFIX}/preview.png?url=whole.tif&bidx=1&algorithm=grayscale")
        assert answer.status_code == 400
        assert "1 bands" in answer.json()["detail"]

    def test_a_point_outside_is_the_callers_fault(self, client: TestClient) -> None:
        answer = client.get(f"{PREFIX}/point/0,0?url=whole.tif")
        assert answer.status_code == 400
        assert answer.headers["cache-control"] == "no-store"

    def test_what_cannot_be_read(self, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise RasterioIOError("/vsimem/secret: read failed")

        monkeypatch.setattr("rio_tiler.io.rasterio.Reader.preview", broken)
        answer = client.get(f"{PREFIX}/preview.png?url=whole.tif")
        assert (answer.status_code, answer.json()) == (404, {"detail": "cannot open 'whole.tif'"})

    def test_there_is_no_page_with_scripts_of_others(self, client: TestClient) -> None:
        assert client.get(f"{PREFIX}/WebMercatorQuad/map.html?url=whole.tif").status_code == 404
        assert client.get(f"{API}/WebMercatorQuad/map.html?url=whole.tif").status_code == 200

    def test_a_tile_outside_the_image_is_transparent(self, client: TestClient) -> None:
        answer = client.get(f"{PREFIX}/tiles/WebMercatorQuad/18/0/0?url=whole.tif&tilesize=32")
        assert (answer.status_code, answer.headers["x-geocentroids-empty"]) == (200, "outside")
        tile = Image.open(io.BytesIO(answer.content)).convert("RGBA")
        assert (tile.size, tile.getextrema()[3]) == ((32, 32), (0, 0))
        assert client.get(f"{PREFIX}/tiles/WebMercatorQuad/18/0/0.webp?url=whole.tif").status_code == 200
        assert client.get(f"{PREFIX}/tiles/WebMercatorQuad/18/0/0.jpeg?url=whole.tif").status_code == 404


class TestBodies:
    @pytest.mark.parametrize("route", [f"{API}/statistics", f"{PREFIX}/statistics"])
    def test_features(self, client: TestClient, route: str) -> None:
        triangle = [[WEST, SOUTH], [EAST, SOUTH], [EAST, NORTH], [WEST, SOUTH]]
        fits = collection(*[feature(triangle)] * 3)
        assert client.post(f"{route}?url=whole.tif", content=json.dumps(fits), headers=JSON).status_code == 200
        answer = client.post(
            f"{route}?url=whole.tif", content=json.dumps(collection(*[feature(triangle)] * 4)), headers=JSON
        )
        assert answer.status_code == 400
        assert "4 features; this server reads at most 3" in answer.json()["detail"]
        assert "GEOCENTROIDS_MAX_FEATURES" in answer.json()["detail"]

    @pytest.mark.parametrize(
        "route", [f"{API}/statistics", f"{API}/feature.png", f"{PREFIX}/statistics", f"{PREFIX}/feature.png"]
    )
    def test_vertices(self, client: TestClient, route: str) -> None:
        ring = [*SQUARE[:-1], *[[WEST, SOUTH + n / 1e6] for n in range(8, 0, -1)], SQUARE[0]]
        answer = client.post(f"{route}?url=whole.tif", content=json.dumps(feature(ring)), headers=JSON)
        assert answer.status_code == 400
        assert "GEOCENTROIDS_MAX_VERTICES" in answer.json()["detail"]
        del ring[4]
        assert client.post(f"{route}?url=whole.tif", content=json.dumps(feature(ring)), headers=JSON).status_code == 200

    def test_vertices_of_all_features_and_geometries(self) -> None:
        polygons = {"type": "MultiPolygon", "coordinates": [[SQUARE], [SQUARE]]}
        document = collection(feature(), {"geometry": {"type": "GeometryCollection", "geometries": [polygons]}})
        assert not vertices_exceed(document, 15)
        assert vertices_exceed(document, 14)
        assert not vertices_exceed({"coordinates": [[], None, "x"]}, 0)
        assert vertices_exceed({"coordinates": [["1", "2"]]}, 0), "TiTiler reads texts as numbers"

    def test_nested_deeply(self, client: TestClient) -> None:
        nested: list[Any] = []
        for _ in range(50_000):  # deeper than Python's own stack
            nested = [nested]
        assert not vertices_exceed(nested, 1)
        for route in (f"{API}/statistics", f"{PREFIX}/statistics"):
            answer = client.post(f"{route}?url=whole.tif", content=b"[" * 100_000, headers=JSON)
            assert answer.status_code in (400, 422)

    @pytest.mark.parametrize("route", [f"{PREFIX}/statistics", f"{PREFIX}/feature.png"])
    @pytest.mark.parametrize("where", ["feature", "geometry"])
    def test_bbox_of_another_place(self, client: TestClient, route: str, where: str) -> None:
        """With a vertex much farther away than this one GDAL would stop the whole process for ever."""
        line = {"type": "LineString", "coordinates": [[WEST, SOUTH - 5], [EAST, NORTH]]}
        whole = {"type": "Feature", "properties": {}, "geometry": line}
        part = whole if where == "feature" else line
        part["bbox"] = [WEST, SOUTH, EAST, NORTH]
        answer = client.post(f"{route}?url=whole.tif", json=whole)
        assert answer.status_code == 400
        assert "bbox that does not hold all vertices" in answer.json()["detail"]
        part["bbox"] = [WEST, SOUTH - 5, EAST, NORTH]
        assert client.post(f"{route}?url=whole.tif", json=whole).status_code == 200

    @pytest.mark.parametrize(
        ("bbox", "vertex", "strays"),
        [
            ([0, 0, 1, 1], [0.5, 1], False),
            ([0, 0, 1, 1], [0.5, 1.1], True),
            ([0, 0, 1, 1], [-0.1, 1], True),
            ([0, 0, -9, 1, 1, 9], [0.5, 1, 50], False),
            ([0, 0, -9, 1, 1, 9], [0.5, 2, 0], True),
            ([1, 0, 0, 1], [0.5, 1], True),
            ([0, 0, 1, 1], [0.5, float("nan")], True),
            ([0, 0, 1, 1], ["0.5", "1"], True),
            (["0", "0", "1", "1"], [0.5, 1], True),
            ([0, 0, 1], [0.5, 1], True),
            (None, [0.5, 1], False),
        ],
    )
    def test_what_strays_from_its_bbox(self, bbox: Any, vertex: list[Any], strays: bool) -> None:
        point = {"type": "Point", "coordinates": vertex, "bbox": bbox}
        both = {"type": "GeometryCollection", "geometries": [point, {"type": "Point", "coordinates": [9, 9]}]}
        assert strays_from_bbox(collection({"type": "Feature", "properties": {"bbox": 1}, "geometry": both})) is strays

    def test_the_largest_body_has_more_vertices_than_may_be(self) -> None:
        """So the bound on vertices is one that holds, not one that the bound on bytes makes idle."""
        settings = Settings()
        with pytest.raises(InputError, match="100000 vertices"):
            check_geojson_size(feature([[0, 0]] * (settings.max_body_bytes // len("[0,0],"))), settings)


class TestTheGate:
    async def inside(self, gate: Gate, expected: dict[str, int]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while gate.inside != expected:
                await asyncio.sleep(0)

    def test_refuses_after_the_wait(self) -> None:
        async def check() -> None:
            gate = Gate(3, 2, "SETTING")
            async with gate.enter("a", 0), gate.enter("a", 0):
                with pytest.raises(BusyError, match=r"3 such requests at once, and 2 of one image \(SETTING\)"):
                    async with gate.enter("a", 0):
                        pass
                async with gate.enter("b", 0):
                    assert gate.inside == {"a": 2, "b": 1}
                    with pytest.raises(BusyError):
                        async with gate.enter("c", 0):
                            pass
                    assert not gate._waiting, "who gave up is remembered no longer"
            assert gate.inside == {}

        asyncio.run(check())

    def test_lets_in_who_waits(self) -> None:
        async def check() -> None:
            gate, order = Gate(1, 1, ""), []

            async def pass_through(name: str) -> None:
                async with gate.enter(name, PATIENCE_S):
                    order.append(name)

            async with gate.enter("first", 0):
                tasks = [asyncio.create_task(pass_through(name)) for name in "abc"]
                await asyncio.sleep(0)
                assert order == []
            await asyncio.gather(*tasks)
            assert order == list("abc")
            assert gate.inside == {}

        asyncio.run(check())

    def test_one_source_does_not_hold_up_another(self) -> None:
        async def check() -> None:
            gate = Gate(2, 1, "")
            async with gate.enter("silent", 0):
                waiting = asyncio.create_task(gate.enter("silent", PATIENCE_S).__aenter__())
                await asyncio.sleep(0)
                async with gate.enter("other", 0):
                    assert gate.inside == {"silent": 1, "other": 1}
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert gate.inside == {}, "who went away while waiting takes no place"
            async with gate.enter("silent", 0):
                pass

        asyncio.run(check())

    @pytest.mark.parametrize("turns", range(5))
    @pytest.mark.parametrize("cancelled_first", [True, False])
    def test_cancelled_in_the_moment_in_which_its_turn_comes(self, turns: int, cancelled_first: bool) -> None:
        async def check() -> None:
            gate = Gate(1, 1, "")
            held = gate.enter("a", 0)
            await held.__aenter__()
            waiting = asyncio.create_task(gate.enter("a", PATIENCE_S).__aenter__())
            for _ in range(3):
                await asyncio.sleep(0)
            if cancelled_first:
                waiting.cancel()
                for _ in range(turns):
                    await asyncio.sleep(0)
                await held.__aexit__(None, None, None)
            else:
                await held.__aexit__(None, None, None)
                waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert gate.inside == {}
            assert not gate._waiting

        asyncio.run(check())

    def test_for_several_loops(self) -> None:
        gate = Gate(2, 2, "")
        most, lock = [0], threading.Lock()

        async def pass_through() -> None:
            async with gate.enter("a", PATIENCE_S):
                with lock:
                    most[0] = max(most[0], gate.inside["a"])
                await asyncio.sleep(0)

        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(asyncio.run, pass_through()) for _ in range(64)]:
                future.result(PATIENCE_S)
        assert most[0] <= 2
        assert gate.inside == {}


class TestAtOnce:
    """Sources that are silent: every request to one holds a thread for as long as the source lets it."""

    @pytest.fixture
    def app(self) -> Iterator[FastAPI]:
        app = FastAPI()
        router = APIRouter(route_class=stock_route(Settings(source_timeout_s=0.001, stock_requests=6)))
        app.state.silent, app.state.entered = threading.Event(), threading.Semaphore(0)

        @router.get("/info")
        def info(url: str) -> str:
            if url.startswith("silent"):
                app.state.entered.release()
                assert app.state.silent.wait(PATIENCE_S)
            return url

        app.include_router(router)

        @app.get("/healthz")
        async def healthz() -> str:
            return "ok"

        yield app
        app.state.silent.set()

    def test_they_take_no_more_than_their_share(self, app: FastAPI) -> None:
        with TestClient(app) as client, ThreadPoolExecutor(8) as pool:
            sources = ["silent-1"] * PER_SOURCE + ["silent-2"] * 2
            first = [pool.submit(client.get, f"/info?url={url}") for url in sources[:PER_SOURCE]]
            for _ in first:
                assert app.state.entered.acquire(timeout=PATIENCE_S)
            busy = client.get("/info?url=silent-1")
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
            assert "GEOCENTROIDS_STOCK_REQUESTS" in busy.json()["detail"]
            assert busy.headers["cache-control"] == "no-store"
            assert client.get("/info?url=other").status_code == 200, "another source is served meanwhile"
            second = [pool.submit(client.get, f"/info?url={url}") for url in sources[PER_SOURCE:]]
            for _ in second:
                assert app.state.entered.acquire(timeout=PATIENCE_S)
            assert client.get("/info?url=other").status_code == 503, "now there is no room for anybody"
            assert client.get("/healthz").status_code == 200
            app.state.silent.set()
            assert {answer.result(PATIENCE_S).status_code for answer in first + second} == {200}
            assert client.get("/info?url=other").status_code == 200
