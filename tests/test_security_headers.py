"""Headers of every answer, and the viewer under its policy in a real browser."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest
import uvicorn
from browser import DIST, IN_A_BROWSER, TIMEOUT_MS, chromium, eventually, settle
from fakes import LIBRARY_WARNINGS, fake_service, until, write_codebooks, write_images
from fastapi.testclient import TestClient
from PIL import Image

from geocentroids_tiler.access import signed_query
from geocentroids_tiler.app import create_app
from geocentroids_tiler.docs_page import docs_policy
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.security_headers import page_policy

SIGNING_KEY = "a-signing-key-that-is-32-characters-long"
API = "/cog/geocentroids"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    images = write_images(tmp_path_factory.mktemp("images"))
    return images, write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture(scope="module")
def service(folders: tuple[Path, Path]) -> Iterator[Service]:
    service, _ = fake_service(*folders)
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    app = create_app(service=service)

    @app.get("/crash")
    async def crash() -> None:
        raise ZeroDivisionError("what nobody may know")

    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        (f"{API}/WebMercatorQuad/map.html", 200),
        (f"{API}/info?url=whole.tif", 200),
        (f"{API}/tiles/WebMercatorQuad/18/90044/158203.png?url=whole.tif", 200),
        (f"{API}/exemplars/3.webp", 404),
        ("/cog/info?url=none.tif", 404),
        ("/cog/info", 422),
        ("/tileMatrixSets/none", 422),
        ("/healthz", 200),
        ("/nothing", 404),
        (f"{API}/statistics?url=whole.tif", 405),
        ("/crash", 500),
    ],
)
def test_every_answer(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    for name in answer.headers:
        assert len(answer.headers.get_list(name)) == 1, "once"
    if answer.headers["content-type"].startswith("text/html"):
        assert answer.headers["content-security-policy"] == page_policy("'self'")
        assert "cross-origin-resource-policy" not in answer.headers
    else:
        assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    if status >= 400:
        assert answer.headers["cache-control"] == "no-store"
        assert isinstance(answer.json()["detail"], str)


def test_what_went_wrong_inside_is_for_the_log(client: TestClient) -> None:
    assert "what nobody may know" not in client.get("/crash").text


def test_tiles_stay_cacheable(client: TestClient) -> None:
    for _ in range(2):  # the second comes from the hot tiles
        tile = client.get(f"{API}/tiles/WebMercatorQuad/18/90044/158203.png?url=whole.tif&classes=6")
        assert tile.headers["cache-control"] == "public, max-age=3600"
        assert tile.headers["x-content-type-options"] == "nosniff"
    not_modified = client.get(tile.url, headers={"If-None-Match": tile.headers["etag"]})
    assert (not_modified.status_code, not_modified.headers["cache-control"]) == (304, "public, max-age=3600")


@pytest.mark.skipif(not (DIST / "index.html").exists(), reason="viewer not built")
def test_what_a_browser_runs_has_the_policy(client: TestClient) -> None:
    for name in ("app.js", "worker.js", "icon.svg"):
        headers = client.get(f"{API}/viewer/{name}").headers
        assert headers["content-security-policy"] == page_policy("'self'")
        assert headers["cache-control"].startswith("public")


def test_no_inline_code() -> None:
    assert "unsafe" not in page_policy("'self'")
    assert "*" not in page_policy("'self'")
    assert page_policy("https://a.example").endswith("; frame-ancestors https://a.example")


def test_who_may_frame_the_page(folders: tuple[Path, Path]) -> None:
    service, _ = fake_service(*folders, frame_ancestors="'self' https://portal.example")
    policy = TestClient(create_app(service=service)).get("/").headers["content-security-policy"]
    assert policy.endswith("frame-ancestors 'self' https://portal.example")
    service.close()


class TestDocs:
    def test_are_off(self, client: TestClient) -> None:
        assert [client.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]
        assert client.get("/openapi.json").status_code == 200

    def test_have_a_policy_of_their_own(self, folders: tuple[Path, Path]) -> None:
        service, _ = fake_service(*folders, docs=True)
        answer = TestClient(create_app(service=service)).get("/docs")
        service.close()
        (policy,) = answer.headers.get_list("content-security-policy")
        assert policy == docs_policy(answer.text, "'self'")
        assert "unsafe" not in policy
        for address in re.findall(r'(?:src|href)="(https://[^/"]+)', answer.text):
            assert address in policy
        (hashed,) = re.findall(r"script-src \S+ '(sha256-[\w+/=]+)'", policy)
        assert len(hashed) == len("sha256-") + 44

    def test_a_changed_script_has_another_hash(self) -> None:
        one, other = (docs_policy(f"<script>{code}</script>", "'none'") for code in ("a()", "b()"))
        assert one != other


@pytest.fixture(scope="module", params=["open", "signed"])
def server(request: pytest.FixtureRequest, folders: tuple[Path, Path]) -> Iterator[tuple[str, str]]:
    """Address of a server, and the query that opens an image on it."""
    signed = request.param == "signed"
    keys: dict[str, Any] = {"signing_key": SIGNING_KEY} if signed else {}
    service, _ = fake_service(*folders, **keys)
    key = service.settings.signing_key
    query = "url=whole.tif" if key is None else signed_query(key, "whole.tif", 4_000_000_000)
    running = uvicorn.Server(uvicorn.Config(create_app(service=service), port=0, log_level="critical"))
    thread = threading.Thread(target=running.run)
    thread.start()
    until(lambda: running.started)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", query
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 700})
    context.set_default_timeout(TIMEOUT_MS)
    opened = context.new_page()
    opened.complaints = []
    opened.asked = []
    opened.on("console", lambda message: message.type == "error" and opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("response", lambda answer: opened.asked.append((answer.status, answer.url)))
    yield opened
    context.close()


class TestTheViewer:
    pytestmark: ClassVar = [*IN_A_BROWSER, *LIBRARY_WARNINGS]

    def test_draws_without_breaking_its_policy(self, page: Any, server: tuple[str, str]) -> None:
        """The whole page: map, tiles of both layers, a point with its picture, statistics; nothing is refused."""
        origin, query = server
        answer = page.goto(f"{origin}/?{query}")
        assert answer.headers["content-security-policy"] == page_policy("'self'")
        page.locator("#tools").wait_for()
        kinds = ("/cog/tiles/WebMercatorQuad/", f"{API}/tiles/WebMercatorQuad/")

        def tiles_of(kind: str) -> list[str]:
            return [url for _, url in page.asked if urlsplit(url).path.startswith(kind)]

        eventually(page, lambda: all(map(tiles_of, kinds)))
        settle(page, page.asked)
        tiles = [url for kind in kinds for url in tiles_of(kind)]
        assert all(map(tiles_of, kinds)), "of the image and of its classes"
        assert all(query in url for url in tiles), "the signature goes along"
        box = page.locator("#map-image").bounding_box()
        page.mouse.click(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5)
        page.locator("#pick .picked-name").wait_for()
        page.locator("#stats-button").click()
        page.locator("#stats .class-row").first.wait_for()
        settle(page, page.asked)
        assert page.complaints == []
        assert [(status, url) for status, url in page.asked if status >= 400] == []
        assert {urlsplit(url).netloc for _, url in page.asked if url.startswith("http")} == {urlsplit(origin).netloc}
        clip = {"x": box["x"] + box["width"] * 0.55, "y": box["y"] + box["height"] * 0.4, "width": 200, "height": 120}

        def colors() -> int:
            picture = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
            return len(picture.getcolors(200 * 120))

        eventually(page, lambda: colors() > 3)
        assert colors() > 3, "there are classes on the map"

    def test_a_policy_that_is_broken_is_seen_here(self, page: Any, server: tuple[str, str]) -> None:
        """That the test above can fail: inline code is refused, and said to be."""
        origin, query = server
        page.goto(f"{origin}/?{query}")
        page.locator("#tools").wait_for()
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'owned = 1'}))")
        assert page.evaluate("typeof owned") == "undefined"
        assert any("Content Security Policy" in text for text in page.complaints)

    def test_another_image_does_not_take_the_signature_along(self, page: Any, server: tuple[str, str]) -> None:
        origin, query = server
        page.goto(f"{origin}/?{query}&classes=8")
        page.locator("#tools").wait_for()
        page.locator("#url").fill("hole.tif")
        with page.expect_response(lambda answer: "info?url=hole.tif" in answer.url) as found:
            page.locator("#open-button").click()
        assert "signature" not in found.value.url
        assert "signature" not in page.url
        assert found.value.status == (401 if "signature" in query else 200)
