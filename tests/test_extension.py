"""The extension on a TilerFactory that belongs to somebody else."""

from __future__ import annotations

import inspect
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import morecantile
import numpy as np
import pytest
from fakes import LIBRARY_WARNINGS, Loader, fake_service, write_codebooks, write_images
from fastapi import Depends, FastAPI, HTTPException, Query
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from morecantile.defaults import TileMatrixSets
from PIL import Image
from pyproj import Transformer
from titiler.core.errors import DEFAULT_STATUS_CODES, add_exception_handlers
from titiler.core.factory import TilerFactory

from geocentroids_tiler.app import create_app
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.tiler import GeocentroidsExtension

TILE = "WebMercatorQuad/18/90044/158203"
POINT = "-56.343,-34.881"
WMTS = "{http://www.opengis.net/wmts/1.0}"
OWS = "{http://www.opengis.net/ows/1.1}"


def leave_rio_tiler_alone(test: Any) -> Any:
    """Leave warnings out that TiTiler's own routes cause."""
    for mark in LIBRARY_WARNINGS:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def service(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service, _ = fake_service(images, write_codebooks(tmp_path_factory.mktemp("codebooks")))
    yield service
    service.close()


def host(*factories: TilerFactory, **options: Any) -> TestClient:
    app = FastAPI(**options)
    for factory in factories:
        app.include_router(factory.router, prefix=factory.router_prefix)
    add_exception_handlers(app, DEFAULT_STATUS_CODES)
    return TestClient(app)


@pytest.fixture(scope="module")
def extension(service: Service) -> GeocentroidsExtension:
    return GeocentroidsExtension(service=service)


@pytest.fixture(scope="module")
def client(extension: GeocentroidsExtension) -> TestClient:
    return host(TilerFactory(extensions=[extension]))


class TestMounting:
    def test_three_lines(self, images: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in the README: no service, no prefix, settings from the environment."""
        monkeypatch.setenv("GEOCENTROIDS_ROOT", str(images))
        monkeypatch.setenv("GEOCENTROIDS_CODEBOOKS_DIR", str(service.settings.codebooks_dir))
        monkeypatch.setenv("GEOCENTROIDS_CODEBOOK", "plain")
        extension = GeocentroidsExtension()
        extension.service._load = Loader()
        app = FastAPI()
        app.include_router(TilerFactory(extensions=[extension]).router)
        client = TestClient(app)
        assert client.get(f"/geocentroids/tiles/{TILE}.png?url=whole.tif").headers["content-type"] == "image/png"
        assert client.get("/geocentroids/info?url=whole.tif").json()["codebook"]["name"] == "plain"
        missing = client.get("/geocentroids/info?url=none.tif")
        assert (missing.status_code, missing.json()["detail"]) == (404, "cannot open 'none.tif'")
        extension.service.close()

    def test_settings_of_its_own(self, images: Path, service: Service) -> None:
        settings = Settings(root=images, codebooks_dir=service.settings.codebooks_dir, codebook="bare")
        extension = GeocentroidsExtension(settings=settings)
        assert extension.service.settings is settings
        client = host(TilerFactory(extensions=[extension]))
        assert client.get("/geocentroids/legend").json()["codebook"] == "bare"
        extension.service.close()

    def test_with_a_prefix(self, service: Service) -> None:
        client = host(TilerFactory(router_prefix="/a/b", extensions=[GeocentroidsExtension(service=service)]))
        assert client.get("/a/b/geocentroids/info?url=whole.tif").status_code == 200
        document = client.get("/a/b/geocentroids/WebMercatorQuad/tilejson.json?url=whole.tif").json()
        assert document["tiles"][0].startswith("http://testserver/a/b/geocentroids/tiles/WebMercatorQuad/")
        assert (
            "http://testserver/a/b/geocentroids/tiles/"
            in client.get("/a/b/geocentroids/WMTSCapabilities.xml?url=whole.tif").text
        )

    def test_several_at_once(self, service: Service) -> None:
        factories = [
            TilerFactory(router_prefix=prefix, extensions=[GeocentroidsExtension(service=service)])
            for prefix in ("/one", "/two")
        ]
        client = host(*factories)
        documents = [
            client.get(f"/{name}/geocentroids/WebMercatorQuad/tilejson.json?url=whole.tif").json()
            for name in ("one", "two")
        ]
        assert ["/one/" in documents[0]["tiles"][0], "/two/" in documents[1]["tiles"][0]] == [True, True]
        tiles = [client.get(document["tiles"][0].format(z=18, x=90044, y=158203)).content for document in documents]
        assert tiles[0] == tiles[1]
        assert_unique_operations(client)

    @pytest.mark.parametrize("kind", ["async", "sync"])
    def test_path_dependency_of_the_host(self, service: Service, kind: str) -> None:
        def by_name(image: Annotated[str, Query()]) -> str:
            return f"{image}.tif"

        async def by_name_async(image: Annotated[str, Query()]) -> str:
            return by_name(image)

        chosen = by_name_async if kind == "async" else by_name
        client = host(TilerFactory(path_dependency=chosen, extensions=[GeocentroidsExtension(service=service)]))
        assert client.get("/geocentroids/info?image=whole").json()["url"] == "whole.tif"
        document = client.get("/geocentroids/WebMercatorQuad/tilejson.json?image=whole").json()
        assert "image=whole" in document["tiles"][0]
        assert client.get(document["tiles"][0].format(z=18, x=90044, y=158203)).status_code == 200
        assert client.get("/geocentroids/info?url=whole.tif").json()["detail"] == "image is missing"

    def test_route_dependencies_of_the_host(self, service: Service) -> None:
        def key(key: Annotated[str | None, Query()] = None) -> None:
            if key != "secret":
                raise HTTPException(401, "a key is needed", headers={"WWW-Authenticate": "Key"})

        guarded = [
            f"/geocentroids/tiles/{TILE}.png",
            "/geocentroids/info",
            f"/geocentroids/point/{POINT}",
            "/geocentroids/WMTSCapabilities.xml",
            "/info",
        ]
        scopes = [{"path": path, "method": "GET"} for path in guarded]
        client = host(
            TilerFactory(
                extensions=[GeocentroidsExtension(service=service)], route_dependencies=[(scopes, [Depends(key)])]
            )
        )
        for path in guarded[:4]:
            refused = client.get(f"{path}?url=whole.tif")
            assert (refused.status_code, refused.json()) == (401, {"detail": "a key is needed"})
            assert refused.headers["www-authenticate"] == "Key"
            assert refused.headers["cache-control"] == "no-store"
            assert client.get(f"{path}?url=whole.tif&key=secret").status_code == 200
        assert client.get("/info?url=whole.tif").status_code == 401
        assert client.get("/geocentroids/legend").status_code == 200, "it was not asked for"

    def test_fewer_tile_matrix_sets(self, service: Service) -> None:
        only = TileMatrixSets({"WorldCRS84Quad": morecantile.tms.get("WorldCRS84Quad")})
        client = host(TilerFactory(supported_tms=only, extensions=[GeocentroidsExtension(service=service)]))
        assert client.get("/geocentroids/info?url=whole.tif").json()["maxzoom"] >= 17
        refused = client.get(f"/geocentroids/tiles/{TILE}.png?url=whole.tif")
        assert refused.json()["detail"] == "'WebMercatorQuad' is not a TileMatrixSet here; accepted: WorldCRS84Quad"

    def test_behind_a_proxy(self, extension: GeocentroidsExtension) -> None:
        app = FastAPI()
        app.include_router(
            TilerFactory(router_prefix="/x", extensions=[GeocentroidsExtension(service=extension.service)]).router,
            prefix="/x",
        )
        client = TestClient(app, root_path="/api")
        document = client.get("/x/geocentroids/WebMercatorQuad/tilejson.json?url=whole.tif").json()
        assert document["tiles"][0].startswith("http://testserver/api/x/geocentroids/tiles/")
        html = client.get("/x/geocentroids/WebMercatorQuad/map.html").text
        assert "/api/x/geocentroids" in html


@leave_rio_tiler_alone
class TestTheHostsOwnRoutes:
    @pytest.mark.parametrize(
        "path",
        [
            "/info",
            "/info.geojson",
            "/WebMercatorQuad/tilejson.json",
            f"/tiles/{TILE}.png",
            f"/tiles/{TILE}",
            f"/point/{POINT}",
            "/preview.png",
            "/WebMercatorQuad/map.html",
            "/statistics",
            "/tiles",
            "/nothing",
        ],
    )
    def test_answer_as_without_the_extension(self, client: TestClient, images: Path, path: str) -> None:
        plain = host(TilerFactory())
        query = {"url": str(images / "whole.tif")}
        expected, found = plain.get(path, params=query), client.get(path, params=query)
        assert (found.status_code, found.content) == (expected.status_code, expected.content)
        assert found.headers == expected.headers

    def test_errors_too(self, client: TestClient) -> None:
        plain = host(TilerFactory())
        for path in ("/info?url=/none.tif", "/info", "/tiles/Nope/1/1/1?url=/none.tif"):
            expected, found = plain.get(path), client.get(path)
            assert (found.status_code, found.content) == (expected.status_code, expected.content)

    def test_documentation_of_both(self, client: TestClient) -> None:
        plain = host(TilerFactory()).get("/openapi.json").json()["paths"]
        both = client.get("/openapi.json").json()["paths"]
        assert {path: both[path] for path in plain} == plain
        assert {path for path in both if path not in plain} == {
            f"/geocentroids{path}"
            for path in (
                "/tiles/{tileMatrixSetId}/{z}/{x}/{y}",
                "/tiles/{tileMatrixSetId}/{z}/{x}/{y}.{format}",
                "/{tileMatrixSetId}/tilejson.json",
                "/{tileMatrixSetId}/map.html",
                "/WMTSCapabilities.xml",
                "/info",
                "/footprints",
                "/point/{lon},{lat}",
                "/bbox/{minx},{miny},{maxx},{maxy}.{format}",
                "/feature.{format}",
                "/statistics",
                "/legend",
                "/exemplars/{label}.{format}",
                "/jobs",
                "/jobs/{job_id}",
            )
        }


def assert_unique_operations(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(ids) > 20
    assert len(set(ids)) == len(ids)


class TestDocumentation:
    def test_of_an_extension(self, client: TestClient) -> None:
        assert_unique_operations(client)

    def test_of_our_application(self, service: Service) -> None:
        client = TestClient(create_app(service=service))
        assert_unique_operations(client)
        document = client.get("/openapi.json").json()
        post = document["paths"]["/cog/geocentroids/statistics"]["post"]
        assert post["requestBody"]["content"]["application/geo+json"]["schema"]["properties"]["type"]["enum"] == [
            "Feature",
            "FeatureCollection",
        ]
        tile = document["paths"]["/cog/geocentroids/tiles/{tileMatrixSetId}/{z}/{x}/{y}"]["get"]
        names = {parameter["name"] for parameter in tile["parameters"]}
        assert names >= {"url", "codebook", "bidx", "rescale", "classes", "highlight", "layer", "tilesize"}
        assert all(
            "description" in parameter
            for parameter in tile["parameters"]
            if parameter["in"] == "query" and parameter["name"] != "format"
        )
        assert {"200", "304"} <= set(tile["responses"])

    def test_every_route_is_in_the_docs(self, service: Service) -> None:
        text = (Path(__file__).parents[1] / "docs" / "http.md").read_text(encoding="utf-8")
        paths = TestClient(create_app(service=service)).get("/openapi.json").json()["paths"]
        for path in paths:
            if "geocentroids" in path or path in ("/healthz", "/readyz", "/metrics"):
                short = path.replace("tileMatrixSetId", "tms").replace(".{format}", "").replace("/{name}", "")
                assert short in text, path


def calls_of(dependant: Dependant) -> list[Callable[..., Any]]:
    own = [dependant.call] if dependant.call else []
    return own + [call for part in dependant.dependencies for call in calls_of(part)]


class TestNoThreads:
    """A synchronous dependency would make an asynchronous route wait for AnyIO's threads."""

    @pytest.mark.usefixtures("client")  # mounts the extension
    def test_every_dependency_of_every_route_is_asynchronous(self, extension: GeocentroidsExtension) -> None:
        routes = [route for route in extension.factory.router.routes if isinstance(route, APIRoute)]
        assert len(routes) >= 12
        for route in routes:
            calls = calls_of(route.dependant)
            assert calls
            for call in calls:
                assert inspect.iscoroutinefunction(call), f"{route.path}: {call}"

    def test_tiles_are_answered_while_all_threads_are_taken(self, client: TestClient, service: Service) -> None:
        """AnyIO's pool is empty: whatever needs it would wait for ever."""
        import anyio.to_thread
        import httpx

        app = client.app

        async def scene() -> int:
            anyio.to_thread.current_default_thread_limiter().total_tokens = 1
            await anyio.to_thread.current_default_thread_limiter().acquire_on_behalf_of("nobody")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as asking:
                with anyio.fail_after(30):
                    answers = [
                        await asking.get(f"/geocentroids{path}?url=whole.tif")
                        for path in (
                            f"/tiles/{TILE}.png",
                            "/info",
                            "/WebMercatorQuad/tilejson.json",
                            "/legend",
                            f"/point/{POINT}",
                        )
                    ]
            return [answer.status_code for answer in answers]

        assert anyio.run(scene) == [200] * 5


class TestAddresses:
    @pytest.fixture
    def app(self, service: Service) -> TestClient:
        return TestClient(create_app(service=service))

    def test_tilejson(self, app: TestClient) -> None:
        document = app.get(
            "/cog/geocentroids/WorldCRS84Quad/tilejson.json?url=whole.tif&highlight=1,2&bidx=1&bidx=2&bidx=3&tilesize=256"
        ).json()
        assert document["tiles"][0].endswith("?url=whole.tif&highlight=1%2C2&bidx=1&bidx=2&bidx=3&tilesize=256"), (
            "parameters go along, repeated ones too"
        )
        west, south, east, north = document["bounds"]
        tile = morecantile.tms.get("WorldCRS84Quad").tile((west + east) / 2, (south + north) / 2, document["maxzoom"])
        answer = app.get(document["tiles"][0].format(z=tile.z, x=tile.x, y=tile.y))
        assert answer.status_code == 200
        assert "x-geocentroids-empty" not in answer.headers
        assert app.get(document["legend"]).status_code == 200

    @pytest.mark.parametrize("path", ["/cog/geocentroids/WebMercatorQuad/map.html?url=whole.tif", "/"])
    def test_viewer(self, app: TestClient, path: str) -> None:
        answer = app.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "/cog/geocentroids" in answer.text
        for asset in re.findall(r'(?:src|href)="(/[^"]*/viewer/[^"]+)"', answer.text):
            assert app.get(asset).status_code == 200
        found = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', answer.text, re.S)
        if found:
            config = json.loads(found[1])
            assert app.get(f"{config['endpoint']}/legend").status_code == 200
            assert app.get(config["codebooks_url"]).status_code == 200
            assert app.get(f"{config['source_endpoint']}/info", params={"url": "whole.tif"}).status_code == 200

    def test_viewer_does_not_run_what_it_is_given(self, app: TestClient) -> None:
        evil = "</script><script>alert(1)</script>"
        html = app.get("/", params={"url": evil, "codebook": evil}).text
        assert evil not in html
        assert "<script>alert" not in html

    def test_wmts(self, app: TestClient) -> None:
        answer = app.get("/cog/geocentroids/WMTSCapabilities.xml?url=whole.tif&classes=6&SERVICE=WMTS&tilesize=512")
        assert answer.headers["content-type"] == "application/xml"
        root = ET.fromstring(answer.content)
        layers = root.findall(f"{WMTS}Contents/{WMTS}Layer")
        sets = {
            element.findtext(f"{OWS}Identifier"): element
            for element in root.findall(f"{WMTS}Contents/{WMTS}TileMatrixSet")
        }
        offered = [layer.findtext(f"{WMTS}TileMatrixSetLink/{WMTS}TileMatrixSet") for layer in layers]
        assert set(offered) == set(sets)
        assert {"WebMercatorQuad", "WorldCRS84Quad", "WorldMercatorWGS84Quad"} <= set(offered)
        assert not {"UTM31WGS84Quad", "EuropeanETRS89_LAEAQuad", "NZTM2000Quad", "CDB1GlobalGrid"} & set(offered)
        bounds = app.get("/cog/geocentroids/info?url=whole.tif").json()["bounds"]
        for layer, name in zip(layers, offered, strict=True):
            corner = layer.findtext(f"{OWS}WGS84BoundingBox/{OWS}LowerCorner")
            assert [float(value) for value in corner.split()] == pytest.approx(bounds[:2])
            template = layer.find(f"{WMTS}ResourceURL").get("template")
            assert template.endswith("?url=whole.tif&classes=6")
            self.assert_limits(app, layer, sets[name], morecantile.tms.get(name), template, bounds)

    def assert_limits(self, app: TestClient, layer: Any, described: Any, tms: Any, template: str, bounds: Any) -> None:
        """The limits hold the image, do not leave the matrix, and their tiles are there."""
        matrices = {m.findtext(f"{OWS}Identifier"): m for m in described.findall(f"{WMTS}TileMatrix")}
        transform = Transformer.from_crs("EPSG:4326", tms.rasterio_crs.to_wkt(), always_xy=True).transform
        west, south, east, north = bounds
        xs, ys = transform([west, east, west, east], [south, south, north, north])
        limits = layer.findall(f"{WMTS}TileMatrixSetLink/{WMTS}TileMatrixSetLimits/{WMTS}TileMatrixLimits")
        assert limits
        for limit in limits:
            z = int(limit.findtext(f"{WMTS}TileMatrix"))
            first_row, last_row, first_col, last_col = (
                int(limit.findtext(f"{WMTS}{name}"))
                for name in ("MinTileRow", "MaxTileRow", "MinTileCol", "MaxTileCol")
            )
            width, height = (int(matrices[str(z)].findtext(f"{WMTS}Matrix{side}")) for side in ("Width", "Height"))
            assert 0 <= first_row <= last_row < height
            assert 0 <= first_col <= last_col < width
            tiles = [tms._tile(x, y, z) for x, y in zip(xs, ys, strict=True)]
            assert first_row <= min(t.y for t in tiles) <= max(t.y for t in tiles) <= last_row
            assert first_col <= min(t.x for t in tiles) <= max(t.x for t in tiles) <= last_col
            assert last_row - first_row <= max(t.y for t in tiles) - min(t.y for t in tiles) + 1
        tile = tiles[0]
        address = template.format(TileMatrix=tile.z, TileCol=tile.x, TileRow=tile.y)
        answer = app.get(address)
        assert answer.status_code == 200
        assert "x-geocentroids-empty" not in answer.headers

    def test_wmts_for_arcmap(self, app: TestClient) -> None:
        text = app.get("/cog/geocentroids/WMTSCapabilities.xml?url=whole.tif&use_epsg=true&tile_format=webp").text
        assert "<ows:SupportedCRS>EPSG:3857</ows:SupportedCRS>" in text
        assert "<Format>image/webp</Format>" in text
        assert "{TileCol}.webp?url=whole.tif" in text or "{TileRow}.webp?url=whole.tif" in text

    @leave_rio_tiler_alone
    def test_stock_routes_of_our_application_follow_the_policy(self, app: TestClient, images: Path) -> None:
        assert app.get("/cog/info?url=whole.tif").json()["width"] == 420
        picture = app.get(f"/cog/tiles/{TILE}.png?url=whole.tif")
        assert np.asarray(Image.open(io.BytesIO(picture.content))).std() > 5
        for url, status in (
            (str(images / "whole.tif"), 400),
            ("/vsicurl/http://127.0.0.1/a.tif", 400),
            ("none.tif", 404),
        ):
            refused = app.get("/cog/info", params={"url": url})
            assert refused.status_code == status
            assert refused.headers["cache-control"] == "no-store"
            assert "detail" in refused.json()
