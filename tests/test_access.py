"""Keys and signatures: what each opens, and that nothing else opens anything."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import pytest
from click.testing import CliRunner
from fakes import LIBRARY_WARNINGS, Clock, fake_service, write_codebooks, write_images
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from pydantic import SecretStr
from titiler.core.factory import TilerFactory

from geocentroids_tiler.access import AccessMiddleware, fresh_for, private, signature, signed_query
from geocentroids_tiler.app import create_app
from geocentroids_tiler.cli import main
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.tiler import GeocentroidsExtension

API = "/cog/geocentroids"
TILE = f"{API}/tiles/WebMercatorQuad/18/90044/158203.png"
POINT = f"{API}/point/-56.343,-34.881"
API_KEY, OTHER_KEY = "an-api-key-that-is-long", "another-api-key-that-is-long"
SIGNING_KEY = SecretStr("a-signing-key-that-is-32-characters-long")
LATER = 4_000_000_000
REFUSAL = "this needs a key"
KEY = {"X-API-Key": API_KEY}

pytestmark = LIBRARY_WARNINGS


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service, _ = fake_service(
        write_images(tmp_path_factory.mktemp("images")),
        write_codebooks(tmp_path_factory.mktemp("codebooks")),
        labels_dir=tmp_path_factory.mktemp("labels"),
        api_keys=[API_KEY, OTHER_KEY],
        signing_key=SIGNING_KEY,
        docs=True,
    )
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(create_app(service=service), follow_redirects=False)


def signed(url: str = "whole.tif", expires: int | None = LATER) -> str:
    return signed_query(SIGNING_KEY, url, expires)


def assert_refused(answer: Any) -> None:
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json()["detail"].startswith(REFUSAL)


OPEN = [
    "/",
    "/?url=whole.tif",
    "/healthz",
    "/readyz",
    "/geocentroids/codebooks",
    "/geocentroids/codebooks/blend",
    f"{API}/WebMercatorQuad/map.html?url=whole.tif",
    f"{API}/viewer/app.js",
    f"{API}/legend",
    f"{API}/exemplars/3.webp",
]
OF_AN_IMAGE = [
    ("GET", TILE),
    ("GET", TILE.removesuffix(".png")),
    ("GET", f"{API}/WebMercatorQuad/tilejson.json"),
    ("GET", f"{API}/WMTSCapabilities.xml"),
    ("GET", f"{API}/info"),
    ("GET", POINT),
    ("GET", f"{API}/bbox/-56.3432,-34.8814,-56.3427,-34.8809.png"),
    ("POST", f"{API}/feature.png"),
    ("POST", f"{API}/statistics"),
    ("GET", "/cog/info"),
    ("GET", "/cog/WebMercatorQuad/tilejson.json"),
    ("GET", "/cog/tiles/WebMercatorQuad/18/90044/158203.png"),
    ("GET", "/cog/preview.png"),
    ("POST", "/cog/statistics"),
]
FOR_KEYS_ONLY = [
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/tileMatrixSets"),
    ("GET", f"{API}/jobs"),
    ("POST", f"{API}/jobs"),
    ("GET", f"{API}/jobs/0000"),
    ("DELETE", f"{API}/jobs/0000"),
    ("GET", f"{API}/jobs/"),
    # A route's pattern ends with "$", which the end of a line may follow.
    ("POST", f"{API}/jobs%0A"),
    ("GET", "/metrics%0A"),
    ("GET", f"{API}/jobs/0000%0A"),
    ("GET", "/nothing"),
    ("GET", f"{API}/nothing"),
    ("GET", f"{API}/information"),
    ("PUT", f"{API}/info"),
    ("DELETE", TILE),
]
FEATURE = {
    "type": "Feature",
    "properties": {},
    "geometry": {
        "type": "Polygon",
        "coordinates": [
            [[-56.3432, -34.8814], [-56.3427, -34.8814], [-56.3427, -34.8809], [-56.3432, -34.8814]],
        ],
    },
}


def ask(client: TestClient, method: str, path: str, query: str, headers: dict[str, str] | None = None) -> Any:
    body = {"json": FEATURE} if method == "POST" and "/jobs" not in path else {}
    return client.request(method, f"{path}?{query}", headers=headers or {}, **body)


@pytest.mark.parametrize("path", OPEN)
def test_open_to_all(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (200, 404, 503), "not ready, or without that exemplar, but not refused"


@pytest.mark.parametrize(("method", "path"), OF_AN_IMAGE)
def test_data_of_an_image(client: TestClient, method: str, path: str) -> None:
    assert_refused(ask(client, method, path, "url=whole.tif"))
    assert ask(client, method, path, signed()).status_code == 200
    assert ask(client, method, path, "url=whole.tif", KEY).status_code == 200
    assert_refused(ask(client, method, path, signed().replace("whole", "hole")))


@pytest.mark.parametrize(("method", "path"), FOR_KEYS_ONLY)
def test_what_a_signature_does_not_open(client: TestClient, method: str, path: str) -> None:
    assert_refused(ask(client, method, path, "url=whole.tif"))
    assert_refused(ask(client, method, path, signed()))
    assert ask(client, method, path, "url=whole.tif", KEY).status_code != 401


@pytest.mark.parametrize("path", ["/healthz%0A", "/%0A", f"{API}/legend%0A", f"{API}/viewer/a%0A", f"{API}/viewer/a/b"])
def test_open_paths_are_whole(client: TestClient, path: str) -> None:
    assert_refused(client.get(path))


class TestKeys:
    @pytest.mark.parametrize(
        "headers",
        [
            {"X-API-Key": API_KEY},
            {"X-API-Key": OTHER_KEY},
            {"Authorization": f"Bearer {API_KEY}"},
            {"Authorization": f"bearer {OTHER_KEY}"},
        ],
    )
    def test_each_opens(self, client: TestClient, headers: dict[str, str]) -> None:
        assert client.get("/metrics", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        "headers",
        [
            {"X-API-Key": ""},
            {"X-API-Key": API_KEY[:-1]},
            {"X-API-Key": API_KEY + "x"},
            {"X-API-Key": API_KEY.upper()},
            {"X-API-Key": f"Bearer {API_KEY}"},
            {"Authorization": API_KEY},
            {"Authorization": f"Basic {API_KEY}"},
            {"Authorization": "Bearer "},
            {"Authorization": f"Bearer {SIGNING_KEY.get_secret_value()}"},
            {"Cookie": f"X-API-Key={API_KEY}"},
        ],
    )
    def test_nothing_else_does(self, client: TestClient, headers: dict[str, str]) -> None:
        assert_refused(client.get("/metrics", headers=headers))

    def test_never_in_a_query(self, client: TestClient) -> None:
        for name in ("key", "api_key", "X-API-Key", "access_token", "token"):
            assert_refused(client.get(f"/metrics?{name}={API_KEY}"))

    def test_every_key_is_compared(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And by hmac's own comparison: neither how many characters are right nor which key it is takes time."""
        compared: list[tuple[bytes, bytes]] = []
        real = hmac.compare_digest

        def compare(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return real(one, other)

        monkeypatch.setattr("geocentroids_tiler.access.hmac.compare_digest", compare)
        app = AccessMiddleware(None, Settings(api_keys=[API_KEY, OTHER_KEY]))  # type: ignore[arg-type]
        for given in (API_KEY, OTHER_KEY, "x"):
            compared.clear()
            app._has_key({"headers": [(b"x-api-key", given.encode())]})
            assert len(compared) == 2
            assert {len(side) for pair in compared for side in pair} == {32}

    def test_a_preflight_needs_none(self, client: TestClient) -> None:
        headers = {
            "Origin": "https://example.org",
            "Access-Control-Request-Method": "GET",
            "Access-Control-Request-Headers": "authorization",
        }
        answer = client.options(TILE, headers=headers)
        assert answer.status_code == 200
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert_refused(client.options(TILE))

    def test_another_origin_may_read_the_refusal(self, client: TestClient) -> None:
        answer = client.get(TILE, headers={"Origin": "https://example.org"})
        assert_refused(answer)
        assert answer.headers["access-control-allow-origin"] == "*"


class TestSignatures:
    def test_by_hand(self) -> None:
        message = b"geocentroids-access-1\n1900000000\nhttps://data.example/a b.tif?x=1&y=2"
        digest = hmac.new(SIGNING_KEY.get_secret_value().encode(), message, hashlib.sha256).digest()
        expected = base64.b64encode(digest).decode().translate(str.maketrans("+/", "-_", "="))
        assert signature(SIGNING_KEY, "https://data.example/a b.tif?x=1&y=2", "1900000000") == expected
        assert len(expected) == 43

    def test_parts_of_the_message_do_not_run_into_each_other(self) -> None:
        assert signature(SIGNING_KEY, "1\nx") != signature(SIGNING_KEY, "x", "1")
        assert signature(SIGNING_KEY, "x", "") != signature(SIGNING_KEY, "x", "0")

    @pytest.mark.parametrize("url", ["whole.tif", "https://data.example/ä b+c%2F.tif?x=1&y={z}#f", "a\nb"])
    def test_the_query_says_what_was_signed(self, url: str) -> None:
        query = dict(parse_qsl(signed(url), strict_parsing=True))
        assert query == {"url": url, "expires": str(LATER), "signature": signature(SIGNING_KEY, url, str(LATER))}

    def test_for_ever(self, client: TestClient) -> None:
        assert client.get(f"{API}/info?{signed(expires=None)}").status_code == 200
        assert client.get(f"{API}/info?{signed(expires=None)}&expires={LATER}").status_code == 401

    def test_other_parameters_are_free(self, client: TestClient) -> None:
        assert client.get(f"{TILE}?classes=6&{signed()}&layer=similarity").status_code == 200

    @pytest.mark.parametrize(
        "query",
        [
            f"{signed()}&url=hole.tif",
            f"url=hole.tif&{signed()}",
            signed().replace("url=whole.tif", "url=whole&url=.tif"),
            signed().replace(f"expires={LATER}", "expires=40000&expires=00000"),
            f"{signed()}&expires={LATER}",
            f"{signed()}&signature=x",
            f"{signed()}&signature={signature(SIGNING_KEY, 'whole.tif', str(LATER))}",
            signed().replace(f"expires={LATER}", f"expires={LATER + 1}"),
            signed().replace(f"expires={LATER}&", ""),
            signed().replace("signature=", "signature=A"),
            signed()[:-1],
            signed() + "=",
            signed().replace("signature", "Signature"),
            "url=whole.tif&signature=",
            "url=whole.tif&signature=%C3%A4",
            f"expires={LATER}&signature={signature(SIGNING_KEY, '', str(LATER))}",
            f"url=whole.tif&expires=1e10&signature={signature(SIGNING_KEY, 'whole.tif', '1e10')}",
            f"url=whole.tif&expires=-1&signature={signature(SIGNING_KEY, 'whole.tif', '-1')}",
            f"url=whole.tif&expires=inf&signature={signature(SIGNING_KEY, 'whole.tif', 'inf')}",
            signed_query(SecretStr("another-key-that-is-32-characters-long"), "whole.tif", LATER),
            signed_query(SIGNING_KEY, "whole.tif", 1_000_000_000),
        ],
    )
    def test_refused_all_alike(self, client: TestClient, query: str) -> None:
        answer = client.get(f"{API}/info?{query}")
        assert_refused(answer)
        assert answer.content == client.get(f"{API}/info").content, "what was wrong is not told"

    def test_until_it_expires(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        clock = Clock()
        access = AccessMiddleware(app, Settings(signing_key=SIGNING_KEY), clock=clock)

        def status() -> int:
            statuses = []

            async def send(message: Any) -> None:
                statuses.append(message.get("status"))

            query = signed(expires=2000).encode()
            scope = {"type": "http", "method": "GET", "path": f"{API}/info", "query_string": query, "headers": []}
            asyncio.run(access(scope, None, send))  # type: ignore[arg-type]
            return statuses[0]

        clock.now = 1999.9
        assert status() == 200
        clock.now = 2000.0
        assert status() == 401

    def test_behind_a_root_path(self, service: Service) -> None:
        client = TestClient(create_app(service=service), root_path="/maps")
        assert client.get(f"{API}/info?{signed()}").status_code == 200
        assert client.get("/healthz").status_code == 200
        assert_refused(client.post(f"{API}/jobs?{signed()}"))


class TestWhatHandsItOn:
    def query_of(self, address: str) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(address).query))

    @pytest.mark.parametrize("path", [f"{API}/WebMercatorQuad/tilejson.json", "/cog/WebMercatorQuad/tilejson.json"])
    def test_tilejson(self, client: TestClient, path: str) -> None:
        document = client.get(f"{path}?{signed()}").json()
        tile = document["tiles"][0].format(z=18, x=90044, y=158203)
        assert client.get(tile).status_code == 200
        assert_refused(client.get(tile.replace("signature=", "signature=A")))

    def test_wmts(self, client: TestClient) -> None:
        document = ET.fromstring(client.get(f"{API}/WMTSCapabilities.xml?{signed()}&service=WMTS").content)
        (template, *_) = [
            each.attrib["template"]
            for each in document.iter("{http://www.opengis.net/wmts/1.0}ResourceURL")
            if "/WebMercatorQuad/" in each.attrib["template"]
        ]
        tile = template.replace("{TileMatrix}", "18").replace("{TileCol}", "90044").replace("{TileRow}", "158203")
        assert client.get(tile).status_code == 200
        assert set(self.query_of(tile)) == {"url", "expires", "signature"}

    def test_not_to_exemplars_which_are_open(self, service: Service) -> None:
        extension = GeocentroidsExtension(service=service)
        app = FastAPI()
        app.include_router(TilerFactory(router_prefix="/cog", extensions=[extension]).router, prefix="/cog")

        @app.get("/link")
        async def link(request: Request) -> str:
            return extension.factory._exemplar_link(request)(3)

        address = TestClient(app).get(f"/link?{signed()}&codebook=blend&classes=6").json()
        assert address == f"http://testserver{API}/exemplars/3.webp?codebook=blend&classes=6"


class TestCaches:
    def test_a_hot_tile_is_guarded_too(self, client: TestClient) -> None:
        for _ in range(2):
            assert client.get(f"{TILE}?{signed()}&classes=6").status_code == 200
        hot = client.get(f"{TILE}?{signed()}&classes=6")
        assert hot.headers["server-timing"] == "cache;desc=hit"
        for _ in range(2):
            assert client.get(f"{TILE}?url=whole.tif&classes=6", headers=KEY).status_code == 200
        assert_refused(client.get(f"{TILE}?url=whole.tif&classes=6"))
        assert_refused(client.get(f"{TILE}?url=whole.tif&classes=6", headers={"If-None-Match": hot.headers["etag"]}))

    def test_a_hot_tile_expires(self, service: Service) -> None:
        clock = Clock()
        app = create_app(service=service)
        (access,) = [each for each in app.user_middleware if each.cls is AccessMiddleware]
        access.kwargs["clock"] = clock
        client = TestClient(app)
        clock.now, address = 1000.0, f"{TILE}?{signed(expires=1100)}"
        for _ in range(2):
            answer = client.get(address)
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "public, max-age=100")
        clock.now = 1099.5
        assert client.get(address).headers["cache-control"] == "public, max-age=0"
        not_modified = client.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert (not_modified.status_code, not_modified.headers["cache-control"]) == (304, "public, max-age=0")
        clock.now = 1100.0
        assert_refused(client.get(address))

    def test_what_a_key_opened_is_for_nobody_else(self, client: TestClient) -> None:
        assert client.get(f"{TILE}?url=whole.tif", headers=KEY).headers["cache-control"] == "private, max-age=3600"
        assert client.get(f"{API}/info?url=whole.tif", headers=KEY).headers["cache-control"] == "private"
        assert client.get(f"{API}/info?url=none.tif", headers=KEY).headers["cache-control"] == "no-store"
        assert client.get("/nothing", headers=KEY).headers["cache-control"] == "no-store"

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (None, "private"),
            ("public, max-age=3600", "private, max-age=3600"),
            ("public, s-maxage=60, max-age=30", "private, max-age=30"),
            ("no-store", "no-store"),
            ("no-cache", "private, no-cache"),
        ],
    )
    def test_private(self, value: str | None, expected: str) -> None:
        assert private(value) == expected

    @pytest.mark.parametrize(
        ("value", "left_s", "expected"),
        [
            ("public, max-age=3600", 60.9, "public, max-age=60"),
            ("public, max-age=30", 60, "public, max-age=30"),
            ("public, max-age=3600, s-maxage=7200", 60, "public, max-age=60, s-maxage=60"),
            ("public, max-age=3600, immutable, stale-while-revalidate=9", 60, "public, max-age=60"),
            ("public, max-age=x", 60, "public, max-age=0"),
            ("public, max-age=3600, immutable", float("inf"), "public, max-age=3600, immutable"),
            ("no-store", 60, "no-store"),
            (None, 60, "private"),
        ],
    )
    def test_fresh_for(self, value: str | None, left_s: float, expected: str) -> None:
        assert fresh_for(value, left_s) == expected


class TestSettings:
    def client(self, service: Service, **values: Any) -> TestClient:
        settings = service.settings
        other, _ = fake_service(settings.root, settings.codebooks_dir, **values)  # type: ignore[arg-type]
        return TestClient(create_app(service=other))

    def test_without_either_all_is_open(self, service: Service) -> None:
        client = self.client(service)
        assert client.get(f"{API}/info?url=whole.tif").status_code == 200
        assert client.get("/metrics").status_code == 200
        assert client.get(f"{TILE}?url=whole.tif").headers["cache-control"] == "public, max-age=3600"

    def test_keys_alone(self, service: Service) -> None:
        client = self.client(service, api_keys=[API_KEY])
        assert_refused(client.get(f"{API}/info?{signed()}"))
        assert client.get(f"{API}/info?url=whole.tif", headers=KEY).status_code == 200

    def test_signatures_alone(self, service: Service) -> None:
        client = self.client(service, signing_key=SIGNING_KEY)
        assert client.get(f"{API}/info?{signed()}").status_code == 200
        assert_refused(client.get(f"{API}/info?url=whole.tif", headers=KEY))
        assert_refused(client.get(f"{API}/info?url=whole.tif", headers={"X-API-Key": ""}))
        assert_refused(client.get("/metrics"))

    def test_every_route_is_closed_or_known_to_be_open(self, client: TestClient) -> None:
        """A route that is added later is closed until somebody opens it."""
        given = {"tileMatrixSetId": "WebMercatorQuad", "format": "png", "width": 8, "height": 8, "name": "blend"}
        given |= dict.fromkeys(("z", "x", "y", "lon", "lat", "minx", "miny", "maxx", "maxy", "label", "job_id"), 1)
        paths = client.get("/openapi.json", headers=KEY).json()["paths"]
        found = {
            path
            for path in paths
            for method in paths[path]
            if client.request(method, path.format(**given)).status_code != 401
        }
        assert found == {
            "/healthz",
            "/readyz",
            "/geocentroids/codebooks",
            "/geocentroids/codebooks/{name}",
            f"{API}/{{tileMatrixSetId}}/map.html",
            f"{API}/legend",
            f"{API}/exemplars/{{label}}.{{format}}",
        }


class TestTheCommand:
    @pytest.fixture(autouse=True)
    def _key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GEOCENTROIDS_SIGNING_KEY", SIGNING_KEY.get_secret_value())

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(main, ["sign", *arguments])

    def test_prints_a_query_that_opens(self, client: TestClient) -> None:
        for arguments in (["whole.tif"], ["whole.tif", "--expires", "7d"]):
            query = self.run(*arguments).stdout.strip()
            assert client.get(f"{API}/info?{query}").status_code == 200
            assert ("expires=" in query) is (len(arguments) > 1)

    def test_when_it_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("geocentroids_tiler.commands.time.time", lambda: 1000.7)
        for text, seconds in (("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800)):
            query = dict(parse_qsl(self.run("a.tif", "--expires", text).stdout.strip()))
            assert int(query["expires"]) == 1000 + seconds

    def test_prints_whole_addresses(self, client: TestClient) -> None:
        url = "https://data.example/a b.tif?x=1"
        lines = self.run(url, "--base", "http://testserver/").stdout.splitlines()
        printed = dict(line.split(maxsplit=1) for line in lines)
        assert list(printed) == ["XYZ", "TileJSON", "WMTS", "viewer"]
        query = urlencode({"url": url, "signature": signature(SIGNING_KEY, url)}, quote_via=quote, safe="")
        assert printed["XYZ"] == f"http://testserver{API}/tiles/WebMercatorQuad/{{z}}/{{x}}/{{y}}.png?{query}"
        assert printed["viewer"] == f"http://testserver/?{query}"
        tilejson = dict(
            line.split(maxsplit=1) for line in self.run("whole.tif", "--base", "http://testserver").stdout.splitlines()
        )
        assert client.get(tilejson["TileJSON"]).status_code == 200
        assert unquote(query).startswith(f"url={url}&")

    @pytest.mark.parametrize("text", ["7", "d", "-1d", "0s", "1.5h", "7w", "", "999999999d"])
    def test_no_time_span(self, text: str) -> None:
        result = self.run("a.tif", "--expires", text)
        assert result.exit_code == 1
        assert "is not a time span, for example 90s, 30m, 12h or 7d" in result.stderr

    def test_without_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("GEOCENTROIDS_SIGNING_KEY")
        result = self.run("a.tif")
        assert result.exit_code == 1
        assert "GEOCENTROIDS_SIGNING_KEY" in result.stderr


def test_a_folder_for_these_tests_is_needed(service: Service) -> None:
    assert isinstance(service.settings.labels_dir, Path), "else jobs would answer 400 to everybody"
