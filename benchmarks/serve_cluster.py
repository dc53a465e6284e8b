"""Several processes against one: the same tiles, asked for by 50 clients at once, in three layouts on this machine.

    python benchmarks/serve_cluster.py                 one process; two behind nginx; a Ray cluster of two nodes

For each: two images cold, then the same tiles from memory; then, of the layouts with Redis, tiles that nobody has asked
for while Redis is stopped and started, and while a process with a device is killed. Clients ask again for what failed.
Ratios are to the one process of the same run, which has as many encoder threads as the two together. Needs nginx,
redis-server and `geocentroids-tiler[ray]`; everything listens on the loopback interface.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from processes import Process, free_port, start_nginx, start_redis, start_serve
from ray_cluster import cluster
from serving import Client, Server, viewport

from geocentroids_tiler.distributed import connected
from geocentroids_tiler.labels.owners import block_key, ranked
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.scene import ensure_demo_scene
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions

COMMON = {"tile_budget_s": 600, "client_requests": 1000, "requests_at_once": 1000, "token_cache_bytes": 2**30}
KILLED_BANDS = (2, 3, 1)
"""Bands of tiles that are asked for while a device dies: labels of other bands are other labels."""
TIMES_ASKED = 4
"""How often each cold tile is asked for, by different clients at about the same time."""


@dataclass
class Layout:
    """What runs.

    Attributes:
        name: for the figures.
        front: what clients talk to.
        workers: whose ``/metrics`` count windows.
        kill: ends the process with the device of an image that is being computed.
        redis: holds labels; None: there is none.
    """

    name: str
    front: Process
    workers: Sequence[Process]
    kill: Callable[[], None] | None = None
    redis: Process | None = None

    def encoded(self) -> float:
        """Return the windows encoded by all devices."""
        return sum(worker.metric("windows_encoded_total") for worker in self.workers)


@contextmanager
def one_process(root: Path, _: Sequence[Path], folder: Path) -> Iterator[Layout]:
    """Run a process that has all cores."""
    server = start_serve(root, folder / "one.log", threads=os.cpu_count(), **COMMON)
    try:
        server.await_start("/readyz")
        yield Layout("one process", server, [server])
    finally:
        server.close()


@contextmanager
def behind_nginx(root: Path, _: Sequence[Path], folder: Path) -> Iterator[Layout]:
    """Run two processes behind nginx, which share the cores, and Redis."""
    redis = start_redis(folder)
    settings = {"redis_url": f"redis://127.0.0.1:{redis.port}/0", "threads": _half(), **COMMON}
    tilers = [start_serve(root, folder / f"tiler-{i}.log", **settings) for i in range(2)]
    started = [redis, *tilers]
    try:
        for tiler in tilers:
            tiler.await_start("/readyz")
        front = start_nginx(folder, [tiler.port for tiler in tilers])
        started.append(front)
        layout = Layout("two behind nginx", front, tilers, redis=redis)

        def kill() -> None:
            busy = max(tilers, key=lambda tiler: tiler.metric("windows_waiting"))
            layout.workers = [tiler for tiler in tilers if tiler is not busy]
            busy.kill()

        layout.kill = kill
        yield layout
    finally:
        for process in reversed(started):
            process.close()


@contextmanager
def on_ray(root: Path, images: Sequence[Path], folder: Path) -> Iterator[Layout]:
    """Run `serve --ray` on two nodes with a device each, two ingress replicas, and Redis."""
    import ray

    service = Service(Settings(root=root))
    dataset = service.dataset(images[0].name, ReadOptions(bidx=KILLED_BANDS), service.codebook(None)).result()
    owned = block_key(dataset.key, (0, 0))
    service.close()
    with cluster(nodes=2, cpus=3) as running:
        redis = start_redis(folder)
        port = free_port()
        settings = {
            "redis_url": f"redis://127.0.0.1:{redis.port}/0",
            "threads": _half(),
            "ray_ingress_replicas": 2,
            "root": root,
            **COMMON,
        }
        command = [sys.executable, "-m", "geocentroids_tiler.cli", "serve", "--port", str(port)]
        environment = {f"GEOCENTROIDS_{name.upper()}": str(value) for name, value in settings.items()}
        server = Process([*command, "--ray", running.address], port, folder / "ray.log", environment)
        try:
            while "Open http" not in server.text():
                if "Error" in server.text():
                    raise RuntimeError(server.text())
                time.sleep(0.1)
            server.await_start("/readyz")

            def kill() -> None:
                with connected(running.address):
                    actors = ray.util.list_named_actors(all_namespaces=True)
                    names = {actor["name"].rpartition("#")[2]: actor["name"] for actor in actors}
                    devices = [last for last, name in names.items() if "#Encoders#" in name]
                    ray.kill(ray.get_actor(names[ranked(owned, devices)[0]], namespace="serve"))

            yield Layout("Ray, two nodes", server, [server], kill, redis)
        finally:
            server.close()
            redis.close()


def _half() -> int:
    return max(1, (os.cpu_count() or 2) // 2)


async def ask_all(server: Server, paths: Sequence[str], clients: int) -> tuple[list[float], int]:
    """Ask for paths by many clients, each for the next one when it has its last.

    Returns:
        Seconds of each answer, and how many failed although they were asked for twice.
    """
    left, seconds, failed = list(reversed(paths)), [], 0

    async def one() -> None:
        nonlocal failed
        client = Client(server)
        while left:
            path, start = left.pop(), time.perf_counter()
            for last in (False, True):
                try:
                    await client.get(path)
                    seconds.append(time.perf_counter() - start)
                    break
                except (OSError, RuntimeError, asyncio.IncompleteReadError):
                    client.close()
                    client = Client(server)
                    failed += last
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return seconds, failed


async def ask_on(server: Server, paths: Sequence[str], clients: int, seconds: float) -> list[float]:
    """Ask for known tiles for some time; return the seconds of each answer."""
    stop, took = time.perf_counter() + seconds, []

    async def one(seed: int) -> None:
        client, rng = Client(server), random.Random(seed)
        while (start := time.perf_counter()) < stop:
            try:
                await client.get(rng.choice(paths))
            except (asyncio.IncompleteReadError, ConnectionError):  # nginx ends a connection after a thousand requests
                client = Client(server)
                continue
            took.append(time.perf_counter() - start)
        client.close()

    await asyncio.gather(*map(one, range(clients)))
    return took


def figures(took: Sequence[float], seconds: float) -> str:
    """Return rate and quantiles."""
    p50, p95 = np.percentile(took, [50, 95]) * 1000
    return f"{len(took) / seconds:.1f} tiles/s, p50 {p50:.0f} ms, p95 {p95:.0f} ms"


def measure(layout: Layout, root: Path, images: Sequence[Path], clients: int, seconds: float) -> tuple[float, ...]:
    """Print the figures of one layout; return its windows, its rate cold and its rate from memory."""
    server = Server(layout.front.port, layout.front.pid, True, root)
    paths = [server.path(image, tile) for image in images for tile in viewport(image, 18)]
    asked = paths * TIMES_ASKED
    random.Random(0).shuffle(asked)
    start = time.perf_counter()
    cold, failed = asyncio.run(ask_all(server, asked, clients))
    cold_s = time.perf_counter() - start
    windows = layout.encoded()
    rate = f"{windows:.0f} windows, {windows / cold_s:.1f} windows/s, {failed} failed"
    print(f"{layout.name}: cold {figures(cold, cold_s)}, {rate}")
    known = asyncio.run(ask_on(server, paths, clients, seconds))
    print(f"{layout.name}: from memory {figures(known, seconds)}")
    return windows, len(cold) / cold_s, len(known) / seconds


def outages(layout: Layout, root: Path, images: Sequence[Path], folder: Path, clients: int) -> None:
    """Print how many tiles fail while a device dies, and while Redis is away."""
    server = Server(layout.front.port, layout.front.pid, True, root)
    paths = [server.path(image, tile) for image in images for tile in viewport(image, 18)]

    async def meanwhile(bands: str, event: Callable[[], None]) -> tuple[list[float], int]:
        asking = asyncio.create_task(ask_all(server, [path + bands for path in paths], clients))
        await asyncio.sleep(1)
        await asyncio.to_thread(event)
        return await asking

    if layout.redis is not None:
        redis = layout.redis

        def restart() -> None:
            redis.close()
            time.sleep(3)
            layout.redis = start_redis(folder, redis.port)

        took, failed = asyncio.run(meanwhile("&bidx=3&bidx=2&bidx=1", restart))
        print(f"{layout.name}: Redis stopped for 3 s and started: {len(took)} tiles, {failed} failed")
        if layout.redis is not redis:
            layout.redis.close()
    if layout.kill is not None:
        bands = "".join(f"&bidx={band}" for band in KILLED_BANDS)
        took, failed = asyncio.run(meanwhile(bands, layout.kill))
        print(
            f"{layout.name}: a device killed: {len(took)} tiles, {failed} failed, the slowest after {max(took):.1f} s"
        )


def main() -> None:
    """Print the figures of all layouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=10, help="asking from memory")
    arguments = parser.parse_args()
    print(json.dumps({"python": sys.version.split()[0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scene = ensure_demo_scene(folder / "scene").resolve()
        images = [scene.with_name(name) for name in ("a.tif", "d.tif")]
        for image in images:
            shutil.copyfile(scene, image)
        alone: tuple[float, ...] | None = None
        for start in (one_process, behind_nginx, on_ray):
            with start(scene.parent, images, folder) as layout:
                found = measure(layout, scene.parent, images, arguments.clients, arguments.seconds)
                if alone is None:
                    alone = found
                else:
                    ratios = f"{found[1] / alone[1]:.2f} cold, {found[2] / alone[2]:.2f} from memory"
                    print(
                        f"{layout.name}: windows computed twice {found[0] - alone[0]:.0f}; ratios of tiles/s {ratios}"
                    )
                outages(layout, scene.parent, images, folder, arguments.clients)


if __name__ == "__main__":
    main()
