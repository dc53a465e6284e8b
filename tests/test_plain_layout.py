"""Several processes behind nginx with Redis, as deploy/ sets them up: with its nginx.conf, started by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import morecantile
import pytest
import rasterio
from fakes import LIBRARY_WARNINGS, until
from processes import ROOT, Process, nginx, start_nginx, start_redis, start_serve
from rasterio.warp import transform_bounds
from redis import Redis
from starlette.testclient import TestClient

from geocentroids_tiler.app import create_app
from geocentroids_tiler.scene import ensure_demo_scene
from geocentroids_tiler.settings import Settings

pytestmark = [
    *LIBRARY_WARNINGS,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
    pytest.mark.skipif(nginx() is None, reason="nginx is not installed"),
]
SETTINGS = {"threads": 1, "tile_budget_s": 600}
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo_scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def paths(scene: Path) -> list[str]:
    """Tiles of the scene's middle at zoom 18."""
    with rasterio.open(scene) as raster:
        west, south, east, north = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
    tms = morecantile.tms.get("WebMercatorQuad")
    middle = tms.tile((west + east) / 2, (south + north) / 2, 18)
    return [
        f"/cog/geocentroids/tiles/WebMercatorQuad/18/{middle.x + dx}/{middle.y + dy}.png?url={scene.name}"
        for dy in range(-1, 2)
        for dx in range(-1, 2)
    ]


@pytest.fixture(scope="module")
def expected(scene: Path, paths: list[str]) -> list[bytes]:
    """The tiles of one application alone."""
    with TestClient(create_app(Settings(root=scene.parent, **SETTINGS))) as client:  # type: ignore[arg-type]
        return [client.get(path).raise_for_status().content for path in paths]


@dataclass
class Layout:
    """What runs.

    Attributes:
        front: nginx.
        tilers: the processes behind it.
        redis: holds the labels of both.
        folder: of logs.
    """

    front: Process
    tilers: tuple[Process, Process]
    redis: Process
    folder: Path

    def tiles(self, paths: Sequence[str], server: Process | None = None) -> list[bytes]:
        """Ask for tiles at once; every one has to come."""
        with (
            httpx.Client(base_url=(server or self.front).url, timeout=PATIENCE_S) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            answers = list(pool.map(client.get, paths))
        assert {answer.status_code for answer in answers} == {200}, [answer.text[:200] for answer in answers]
        return [answer.content for answer in answers]

    def encoded(self) -> list[float]:
        return [tiler.metric("windows_encoded_total") for tiler in self.tilers]

    def await_stored(self, owner: Process) -> None:
        """Wait until Redis has all that it did not have when it was asked."""
        missed = owner.metric("cache_misses_total", cache="redis")
        with Redis(port=self.redis.port) as client:
            until(lambda: client.dbsize() == missed)


@pytest.fixture
def start(scene: Path, tmp_path: Path) -> Iterator[Callable[..., Layout]]:
    with ExitStack() as stack:

        def started(**settings: object) -> Layout:
            redis = start_redis(tmp_path)
            stack.callback(redis.close)
            settings = {**SETTINGS, "redis_url": f"redis://127.0.0.1:{redis.port}/0", **settings}
            first, second = (start_serve(scene.parent, tmp_path / f"tiler-{i}.log", **settings) for i in (1, 2))
            stack.callback(first.close)
            stack.callback(second.close)
            first.await_start("/readyz")
            second.await_start("/readyz")
            front = start_nginx(tmp_path, [first.port, second.port])
            stack.callback(front.close)
            return Layout(front, (first, second), redis, tmp_path)

        yield started


def test_one_image_is_one_process_and_labels_are_shared(
    start: Callable[..., Layout], paths: list[str], expected: list[bytes]
) -> None:
    layout = start()
    assert layout.tiles(paths) == expected
    encoded = layout.encoded()
    assert min(encoded) == 0
    assert max(encoded) > 0
    owner, other = sorted(layout.tilers, key=lambda tiler: -tiler.metric("windows_encoded_total"))
    layout.await_stored(owner)
    assert layout.tiles(paths, other) == expected
    assert other.metric("windows_encoded_total") == 0, "all labels came from Redis"
    assert other.metric("cache_hits_total", cache="redis") > 0
    assert other.metric("requests_total", status="200") >= len(paths)


def test_a_killed_process_costs_no_tile(start: Callable[..., Layout], paths: list[str], expected: list[bytes]) -> None:
    layout = start()
    layout.tiles(paths[:1])
    owner = max(layout.tilers, key=lambda tiler: tiler.metric("windows_encoded_total"))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(layout.tiles, paths)
        until(lambda: owner.metric("windows_waiting") > 0)
        owner.kill()
        assert asked.result(PATIENCE_S) == expected
    assert layout.tiles(paths) == expected


def test_redis_may_go_and_come_back(start: Callable[..., Layout], paths: list[str], expected: list[bytes]) -> None:
    layout = start(label_cache_bytes=0, tile_cache_bytes=0)
    layout.tiles(paths[:3])
    owner = max(layout.tilers, key=lambda tiler: tiler.metric("windows_encoded_total"))
    layout.await_stored(owner)
    assert httpx.get(f"{owner.url}/readyz").json() == {"status": "ok"}
    layout.redis.close()
    assert layout.tiles(paths) == expected
    assert owner.metric("store_away", cache="redis") == 1
    ready = httpx.get(f"{owner.url}/readyz")
    assert (ready.status_code, ready.json()) == (200, {"status": "ok", "detail": "labels are computed: redis away"})
    assert f"Redis at 127.0.0.1:{layout.redis.port} is away" in owner.text()
    hits = owner.metric("cache_hits_total", cache="redis")

    again = start_redis(layout.folder, layout.redis.port)
    try:
        until(lambda: layout.tiles(paths) == expected and owner.metric("store_away", cache="redis") == 0)
        until(lambda: layout.tiles(paths) == expected and owner.metric("cache_hits_total", cache="redis") > hits)
        assert f"Redis at 127.0.0.1:{layout.redis.port} is back" in owner.text()
        assert httpx.get(f"{owner.url}/readyz").json() == {"status": "ok"}
    finally:
        again.close()


def test_limits_and_clients_are_seen_through_nginx(start: Callable[..., Layout], paths: list[str]) -> None:
    layout = start()
    transport = httpx.HTTPTransport(local_address="127.0.0.5")
    with httpx.Client(base_url=layout.front.url, transport=transport, timeout=PATIENCE_S) as client:
        answers = [
            client.get("/cog/geocentroids/legend", params={"url": "x" * 17_000}),
            client.get("/cog/geocentroids/legend", headers={"a": "x" * 20_000, "b": "x" * 20_000}),
            client.post("/cog/geocentroids/statistics", params={"url": "x"}, content=b" " * 1_500_000),
        ]
        for answer, status, setting in zip(answers, (414, 431, 413), ("TARGET", "HEADER", "BODY"), strict=True):
            assert answer.status_code == status
            assert f"GEOCENTROIDS_MAX_{setting}_BYTES" in answer.json()["detail"]
        assert client.get("/metrics").status_code == 404
        client.get("/cog/geocentroids/info?url=missing.tif", headers={"X-Forwarded-For": "203.0.113.9"})
    line = "127.0.0.5 GET /cog/geocentroids/info 404"  # who asked nginx, not what was said of it
    until(lambda: any(line in tiler.text() for tiler in layout.tilers))
    assert not any("203.0.113.9" in tiler.text() for tiler in layout.tilers)


def test_refusals_come_with_retry_after_and_are_not_asked_again(start: Callable[..., Layout], paths: list[str]) -> None:
    layout = start(queue_windows=1, client_requests=2)
    with httpx.Client(base_url=layout.front.url, timeout=PATIENCE_S) as client, ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(client.get, paths))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} <= {429, 503}
    assert refused
    assert all(int(answer.headers["retry-after"]) >= 1 and answer.json()["detail"] for answer in refused)
    log = layout.folder / "nginx-access.log"
    until(lambda: len(log.read_text().splitlines()) == len(paths))
    asked = {line.partition(" from ")[2] for line in log.read_text().splitlines()}
    assert len(asked) == 1, "one process for all, and no other after it"
    assert asked <= {f"127.0.0.1:{tiler.port}" for tiler in layout.tilers}


def test_compose_and_nginx_name_the_same_processes() -> None:
    compose = (ROOT / "deploy" / "compose.yaml").read_text()
    conf = (ROOT / "deploy" / "nginx.conf").read_text()
    addresses = [line.split()[1] for line in conf.splitlines() if line.strip().startswith("server 10.")]
    assert len(addresses) == 2
    assert all(f"ipv4_address: {address.removesuffix(':8000')}\n" in compose for address in addresses)
    assert ":8080'" in compose
    assert "listen 8080 " in conf
