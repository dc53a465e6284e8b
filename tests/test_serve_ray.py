"""`geocentroids serve --ray` on a cluster of two nodes on this machine, with Redis."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import morecantile
import pytest
import rasterio
from fakes import LIBRARY_WARNINGS
from processes import Process, free_port, start_redis
from rasterio.warp import transform_bounds
from ray_cluster import RAY_WARNINGS, cluster
from starlette.testclient import TestClient

from geocentroids_tiler.app import create_app
from geocentroids_tiler.distributed import connected
from geocentroids_tiler.errors import ClusterError
from geocentroids_tiler.labels.owners import block_key, ranked
from geocentroids_tiler.scene import ensure_demo_scene
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions

pytestmark = [
    *RAY_WARNINGS,
    *LIBRARY_WARNINGS,
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed"),
]
SETTINGS = {"threads": 1, "tile_budget_s": 600}
PATIENCE_S = 60.0
CLIENTS = 16
TILES = "/cog/geocentroids/tiles/WebMercatorQuad"


def until(condition: object) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@dataclass
class Served:
    """What runs.

    Attributes:
        server: the command.
        address: of the cluster.
        redis: holds labels.
        logs: folder of what replicas print.
        scene: the image.
        paths: tiles of zoom 18 of all of the image, by row.
        alone: an application in this process, for comparison.
    """

    server: Process
    address: str
    redis: Process
    logs: Path
    scene: Path
    paths: list[list[str]]
    alone: TestClient

    def ask(self, paths: Sequence[str]) -> list[httpx.Response]:
        """Ask for paths by as many clients at once."""

        def one(path: str) -> httpx.Response:
            with httpx.Client(base_url=self.server.url, timeout=PATIENCE_S) as client:
                return client.get(path)

        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(one, paths))

    def check(self, paths: Sequence[str]) -> None:
        """Ask for tiles, which have to be those of the application alone, byte for byte."""
        answers = self.ask(paths)
        assert {answer.status_code for answer in answers} == {200}, [answer.text[:300] for answer in answers]
        for path, answer in zip(paths, answers, strict=True):
            assert answer.content == self.alone.get(path).content, path

    def encoded_alone(self) -> int:
        return int(self.alone.app.state.service.engines()[0].windows_encoded)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    scene = ensure_demo_scene(folder / "scene")
    with rasterio.open(scene) as raster:
        bounds = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
    rows: dict[int, list[str]] = {}
    for tile in morecantile.tms.get("WebMercatorQuad").tiles(*bounds, 18):
        rows.setdefault(tile.y, []).append(f"{TILES}/18/{tile.x}/{tile.y}.png?url={scene.name}")
    with ExitStack() as stack:
        running = stack.enter_context(cluster(nodes=2, cpus=3))
        redis = start_redis(folder)
        stack.callback(redis.close)
        port = free_port()
        settings = {**SETTINGS, "redis_url": f"redis://127.0.0.1:{redis.port}/0", "ray_ingress_replicas": 2}
        command = [sys.executable, "-m", "geocentroids_tiler.cli", "serve", "--port", str(port)]
        server = Process(
            [*command, "--root", str(scene.parent), "--ray", running.address],
            port,
            folder / "serve.log",
            {f"GEOCENTROIDS_{name.upper()}": str(value) for name, value in settings.items()},
        )
        stack.callback(server.close)
        alone = stack.enter_context(TestClient(create_app(Settings(root=scene.parent, **SETTINGS))))  # type: ignore[arg-type]
        until(lambda: "Open http" in server.text() or server.text().startswith("Error"))
        assert "Open http" in server.text(), server.text()
        until(lambda: httpx.get(f"{server.url}/readyz").status_code == 200)
        logs = Path(running._cluster.head_node.get_session_dir_path()) / "logs"
        yield Served(server, running.address, redis, logs, scene, list(rows.values()), alone)


def test_the_same_tiles_and_no_window_twice(served: Served) -> None:
    """Each tile is asked for twice by sixteen clients, with both ingress replicas and both devices there."""
    paths = [path for row in served.paths[1:4] for path in row]
    served.check([*paths, *paths])
    assert served.encoded_alone() > 50
    assert served.server.metric("windows_encoded_total") == served.encoded_alone()
    info = served.ask([f"/cog/geocentroids/info?url={served.scene.name}"])[0].json()
    assert info["device"] == served.alone.get(f"/cog/geocentroids/info?url={served.scene.name}").json()["device"]


def test_redis_may_go_and_come_back(served: Served) -> None:
    served.redis.close()
    served.check(served.paths[4])
    until(lambda: "redis away" in httpx.get(f"{served.server.url}/readyz").text)
    served.redis = start_redis(served.redis.log.parent, served.redis.port)
    try:
        served.check(served.paths[5])
    finally:
        served.redis.close()


def test_a_client_that_goes_away_gives_up_its_windows(served: Served) -> None:
    server = served.server
    whole = httpx.get(f"{server.url}/cog/geocentroids/info?url={served.scene.name}").json()
    west, south, east, north = whole["bounds"]
    encoded, given_up = server.metric("windows_encoded_total"), server.metric("windows_given_up_total")
    path = f"/cog/geocentroids/bbox/{west},{south},{east},{north}.tif?url={served.scene.name}&bidx=1&bidx=3&bidx=2"
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.get, server.url + path, timeout=2)
        until(lambda: server.metric("device_queue") > 0)
        with pytest.raises(httpx.ReadTimeout):
            asked.result()
    until(lambda: server.metric("device_queue") == 0)
    assert server.metric("windows_given_up_total") > given_up
    assert server.metric("windows_encoded_total") - encoded < 0.75 * whole["chunks"], "the rest was not computed"


def test_a_device_that_dies_costs_no_tile(served: Served) -> None:
    import ray

    service = served.alone.app.state.service  # type: ignore[attr-defined]
    dataset = service.dataset(served.scene.name, ReadOptions(bidx=(3, 2, 1)), service.codebook(None)).result()
    with connected(served.address), ThreadPoolExecutor(1) as pool:
        devices = {name.rpartition("#")[2]: name for name in _devices()}
        assert len(devices) == 2
        owner, _ = ranked(block_key(dataset.key, (0, 0)), list(devices))
        paths = [f"{path}&bidx=3&bidx=2&bidx=1" for row in served.paths[1:4] for path in row]
        asked = pool.submit(served.check, paths)
        until(lambda: served.server.metric("device_queue") > 0)
        ray.kill(ray.get_actor(devices[owner], namespace="serve"))
        asked.result(PATIENCE_S)
        assert devices[owner] not in _devices()


def _devices() -> list[str]:
    import ray

    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if "#Encoders#" in name]


def test_who_asks_is_seen_through_the_proxy(served: Served) -> None:
    transport = httpx.HTTPTransport(local_address="127.0.0.5")
    with httpx.Client(base_url=served.server.url, transport=transport) as client:
        assert client.get("/cog/geocentroids/info?url=missing.tif").status_code == 404
    line = "127.0.0.5 GET /cog/geocentroids/info 404"
    until(lambda: any(line in path.read_text() for path in served.logs.glob("worker*.err")))


def test_ended_it_leaves_nothing(served: Served) -> None:
    import ray

    served.server.close()
    assert served.server.returncode == 0, served.server.text()
    with connected(served.address):
        assert ray.util.list_named_actors(all_namespaces=True) == []


def test_devices_of_another_kind_are_refused() -> None:
    from geocentroids_tiler.ray_replicas import Agreement, check_device  # Ray warns of itself when it is imported

    agreement = Agreement()
    one = agreement.first("10.0.0.1", "openvino/CPU/bf16")
    check_device("10.0.0.1", "openvino/CPU/bf16", *one)
    two = agreement.first("10.0.0.2", "openvino/CPU/fp32")
    assert two == one
    told = r"node 10\.0\.0\.2 computes on openvino/CPU/fp32, node 10\.0\.0\.1 on openvino/CPU/bf16;"
    with pytest.raises(ClusterError, match=told):
        check_device("10.0.0.2", "openvino/CPU/fp32", *two)
