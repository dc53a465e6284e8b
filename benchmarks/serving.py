"""Our server beside plain TiTiler: the same tiles of the same image, one worker each, one after the other.

    python benchmarks/serving.py cached             50 clients ask for tiles that were asked for before
    python benchmarks/serving.py cold               a viewport of 6 x 4 tiles of zoom 18 on a server that just started
    python benchmarks/serving.py panning            50 clients pan over an image that nobody has looked at
    python benchmarks/serving.py kept               the whole image on a server that just started, after `classify`
    python benchmarks/serving.py memory --minutes 30    one server's memory while clients pan over many images

Without --image the sample scene is used, and for `memory` as many copies of it as images are wanted.
Clients are coroutines of this process, on the same cores as the server; they write HTTP/1.1 by hand so that they cost
little. GEOCENTROIDS_* variables reach our server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import morecantile
import numpy as np
import rasterio
from morecantile import Tile
from rasterio.warp import transform_bounds

from geocentroids_tiler.scene import ensure_demo_scene

TMS = morecantile.tms.get("WebMercatorQuad")
VIEW_COLS, VIEW_ROWS = 6, 4
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        port: where it listens, on 127.0.0.1.
        pid: its process.
        ours: whether it is ours, or TiTiler.
        root: the folder of its images.
    """

    port: int
    pid: int
    ours: bool
    root: Path

    def path(self, image: Path, tile: Tile) -> str:
        """Return the path of a tile."""
        if self.ours:
            url = quote(str(image.relative_to(self.root)))
            return f"/cog/geocentroids/tiles/WebMercatorQuad/{tile.z}/{tile.x}/{tile.y}.png?url={url}"
        return f"/cog/tiles/WebMercatorQuad/{tile.z}/{tile.x}/{tile.y}.png?tilesize=256&url={quote(str(image))}"

    def read(self, path: str) -> str:
        """Return what a path answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=600) as answer:
            return str(answer.read().decode())

    def metric(self, name: str) -> float:
        """Return a Prometheus metric, summed over its labels."""
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.read("/metrics"), re.M)
        return sum(map(float, found))

    def work(self) -> str:
        """Return what our server has done since it started."""
        windows, read_s, encode_s = (
            self.metric(f"geocentroids_{name}")
            for name in ("windows_encoded_total", "read_seconds_sum", "encode_seconds_sum")
        )
        return f"{windows:.0f} windows, the encoder busy {encode_s:.1f} s, readers (four threads) {read_s:.1f} s in all"

    def memory_mib(self) -> float:
        """Return the resident memory of the server."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


@contextmanager
def serve(root: Path, *, ours: bool, **settings: str) -> Iterator[Server]:
    """Run a server with one worker, and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = {"client_requests": "1000", "requests_at_once": "1000"} | settings  # all clients have one address here
    environment = {**os.environ, **{f"GEOCENTROIDS_{name.upper()}": value for name, value in settings.items()}}
    if ours:
        command = [sys.executable, "-m", "geocentroids_tiler.cli", "serve", "--port", str(port), "--root", str(root)]
    else:
        command = [sys.executable, "-m", "uvicorn", "peer_titiler:app", "--port", str(port), "--no-access-log"]
    process = subprocess.Popen(command, env=environment, cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(port, process.pid, ours, root)
    try:
        deadline_s = time.monotonic() + 120
        while True:
            try:
                server.read("/readyz")
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"{command[1:]} did not start") from error
                time.sleep(0.05)
        yield server
    finally:
        process.terminate()
        process.wait(60)


class Client:
    """One HTTP/1.1 connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def get(self, path: str) -> bytes:
        """Return the body of an answer; TiTiler answers tiles beside the image with 404."""
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = await self._reader.readuntil(b"\r\n\r\n")
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 200" if self._server.ours else b"HTTP/1.1 404")):
            raise RuntimeError(f"{path}: {head.splitlines()[0].decode()}")
        length = int(re.findall(rb"(?i)content-length: (\d+)", head)[0])
        return await self._reader.readexactly(length)

    def close(self) -> None:
        """Close the connection, in the middle of an answer or not."""
        if self._writer is not None:
            self._writer.close()


def bounds_of(image: Path) -> tuple[float, float, float, float]:
    """Return west, south, east, north of an image."""
    with rasterio.open(image) as raster:
        west, south, east, north = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
    return west, south, east, north


def viewport(image: Path, zoom: int) -> list[Tile]:
    """Return the tiles of a viewport in the middle of an image, those in its middle first."""
    west, south, east, north = bounds_of(image)
    middle = TMS.tile((west + east) / 2, (south + north) / 2, zoom)
    left, top = middle.x - VIEW_COLS // 2, middle.y - VIEW_ROWS // 2
    tiles = [Tile(x, y, zoom) for y in range(top, top + VIEW_ROWS) for x in range(left, left + VIEW_COLS)]
    return sorted(tiles, key=lambda tile: (tile.x - middle.x) ** 2 + (tile.y - middle.y) ** 2)


async def burst(server: Server, image: Path, tiles: Sequence[Tile]) -> tuple[float, float]:
    """Ask for tiles at once; return the seconds to the first and to the last."""
    start, times = time.perf_counter(), []

    async def one(tile: Tile) -> None:
        client = Client(server)
        await client.get(server.path(image, tile))
        times.append(time.perf_counter() - start)
        client.close()

    await asyncio.gather(*map(one, tiles))
    return min(times), max(times)


def cached(image: Path, clients: int, seconds: float) -> None:
    """Compare cached tiles with TiTiler's tiles of the same area."""
    tiles = viewport(image, 18)
    rates = {}
    for ours in (True, False):
        with serve(image.parent, ours=ours) as server:
            asyncio.run(burst(server, image, tiles))
            latencies = asyncio.run(_ask_on_and_on(server, image, tiles, clients, seconds))
        rates[ours] = len(latencies) / seconds
        p50, p99 = np.percentile(latencies, [50, 99]) * 1000
        name = "ours" if ours else "TiTiler"
        print(f"{name}: {rates[ours]:.0f} requests/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms = {p99 / p50:.2f} x p50")
    print(f"ratio of requests/s: {rates[True] / rates[False]:.1f}")


async def _ask_on_and_on(
    server: Server, image: Path, tiles: Sequence[Tile], clients: int, seconds: float
) -> list[float]:
    stop, latencies = time.perf_counter() + seconds, []
    paths = [server.path(image, tile) for tile in tiles]

    async def ask(seed: int) -> None:
        client, rng = Client(server), random.Random(seed)
        while (start := time.perf_counter()) < stop:
            await client.get(rng.choice(paths))
            latencies.append(time.perf_counter() - start)
        client.close()

    await asyncio.gather(*map(ask, range(clients)))
    return latencies


def cold(image: Path, repeats: int) -> None:
    """Compare a first look at an image with TiTiler's."""
    tiles = viewport(image, 18)
    totals: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for ours in (True, False):
            with serve(image.parent, ours=ours) as server:
                first, last = asyncio.run(burst(server, image, tiles))
                work = f"; {server.work()}" if ours else ""
            totals[ours].append(last)
            print(f"{'ours' if ours else 'TiTiler'}: first tile {first:.2f} s, all {len(tiles)} {last:.2f} s{work}")
    print(f"ratio of times: {min(totals[True]) / min(totals[False]):.1f}")


def panning(image: Path, clients: int, seconds: float) -> None:
    """Compare the windows/s under many panning clients with those of labelling the same image at once."""
    with serve(image.parent, ours=True, tile_budget_s="600", token_cache_bytes=str(2**30)) as server:
        windows, took = asyncio.run(_pan_until_seen(server, image, clients, seconds))
        views = server.metric("geocentroids_cancelled_total")
        requests = server.metric("geocentroids_requests_total")
        work = server.work()
    rate = windows / took
    print(f"{clients} clients: {windows:.0f} windows in {took:.1f} s, {rate:.1f} windows/s; {work}")
    print(f"{requests:.0f} requests, {views:.0f} of them given up")
    reference, distinct = _label_at_once(image)
    print(f"all of the image at once: {distinct} windows, {reference:.1f} windows/s")
    print(f"ratio of windows/s: {rate / reference:.2f}; windows computed twice: {max(0, windows - distinct):.0f}")


async def _pan_until_seen(server: Server, image: Path, clients: int, seconds: float) -> tuple[float, float]:
    """Let clients pan for a time; return the windows encoded and when the last of them was, to half a second."""
    start = time.perf_counter()
    panning = [asyncio.create_task(_pan(server, [image], seed, start + seconds, 18)) for seed in range(clients)]
    windows, last_s = 0.0, 0.0
    while not all(task.done() for task in panning) or await asyncio.to_thread(_waiting, server):
        await asyncio.sleep(0.5)
        encoded = await asyncio.to_thread(server.metric, "geocentroids_windows_encoded_total")
        if encoded > windows:  # an image that was all seen before the time was over is not held against it
            windows, last_s = encoded, time.perf_counter() - start
    await asyncio.gather(*panning)
    return windows, last_s


def _waiting(server: Server) -> float:
    return server.metric("geocentroids_windows_waiting")


async def _pan(server: Server, images: Sequence[Path], seed: int, stop_s: float, zoom: int) -> None:
    """Look at places of images one after the other, moving on before all tiles are there, as people do."""
    rng = random.Random(seed)
    while time.perf_counter() < stop_s:
        image = rng.choice(images)
        west, south, east, north = bounds_of(image)
        place = TMS.tile(rng.uniform(west, east), rng.uniform(south, north), zoom)
        for _ in range(rng.randint(1, 4)):
            view = [Tile(place.x + i, place.y + j, zoom) for i in range(3) for j in range(2)]
            connections = [Client(server) for _ in view]
            asked = [
                asyncio.create_task(client.get(server.path(image, tile)))
                for client, tile in zip(connections, view, strict=True)
            ]
            left_s = min(rng.expovariate(1 / 4), stop_s - time.perf_counter())
            if left_s > 0:
                await asyncio.wait(asked, timeout=left_s)
            for task, client in zip(asked, connections, strict=True):
                task.cancel()
                client.close()
            await asyncio.gather(*asked, return_exceptions=True)
            place = Tile(place.x + rng.randint(-1, 1), place.y + rng.randint(-1, 1), zoom)
            if time.perf_counter() >= stop_s:
                return


def _label_at_once(image: Path) -> tuple[float, int]:
    """Return windows/s of labelling a whole image, as `classify` does, and how many windows it takes."""
    from geocentroids_tiler.labels.service import Service
    from geocentroids_tiler.settings import Settings
    from geocentroids_tiler.source import ReadOptions

    service = Service(Settings(root=image.parent, token_cache_bytes=2**30))
    codebook = service.codebook(None)
    engine = service.engine(codebook).result()
    dataset = service.dataset(image.name, ReadOptions(), codebook).result()
    start = time.perf_counter()
    engine.block(dataset, dataset.footprint)
    took = time.perf_counter() - start
    windows = engine.windows_encoded
    service.close()
    return windows / took, windows


def kept(image: Path, repeats: int) -> None:
    """Compare a first look at a whole image whose labels are kept with TiTiler's look at its overviews."""
    west, south, east, north = bounds_of(image)
    zoom = next(z for z in range(22, 0, -1) if len(list(TMS.tiles(west, south, east, north, z))) <= 24)
    tiles = list(TMS.tiles(west, south, east, north, zoom))
    totals: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "geocentroids_tiler.cli", "classify", str(image), "--labels", folder]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(repeats):
            for ours in (True, False):
                with serve(image.parent, ours=ours, labels_dir=folder) as server:
                    first, last = asyncio.run(burst(server, image, tiles))
                    if ours and server.metric("geocentroids_windows_encoded_total"):
                        raise RuntimeError("windows were encoded although the labels are kept")
                totals[ours].append(last)
                name = "ours" if ours else "TiTiler"
                print(f"{name}: zoom {zoom}, first tile {first * 1000:.0f} ms, all {len(tiles)} {last * 1000:.0f} ms")
    print(f"ratio of times: {min(totals[True]) / min(totals[False]):.2f}")


def memory(images: Sequence[Path], minutes: float, clients: int) -> None:
    """Watch the server's memory while clients pan over many images."""
    bounds = {"label_cache_bytes": 16, "token_cache_bytes": 64, "tile_cache_bytes": 8}
    settings = {name: str(mib * 2**20) for name, mib in bounds.items()}
    with serve(images[0].parent, ours=True, tile_budget_s="600", **settings) as server:
        started = server.memory_mib()
        samples = asyncio.run(_watch(server, images, minutes * 60, clients))
        caches = server.metric("geocentroids_cache_bytes") / 2**20
        windows = server.metric("geocentroids_windows_encoded_total")
    quarter = len(samples) // 4
    medians = [float(np.median(samples[i * quarter : (i + 1) * quarter])) for i in range(4)]
    print(f"{len(images)} images, {clients} clients, {minutes:g} minutes, {windows:.0f} windows")
    print(
        f"at start {started:.0f} MiB; bounds of caches {sum(bounds.values())} MiB; caches at the end {caches:.0f} MiB"
    )
    print(f"median of each quarter: {', '.join(f'{m:.0f}' for m in medians)} MiB; most {max(samples):.0f} MiB")


async def _watch(server: Server, images: Sequence[Path], seconds: float, clients: int) -> list[float]:
    start, samples = time.perf_counter(), []
    panning = [asyncio.create_task(_pan(server, images, seed, start + seconds, 18)) for seed in range(clients)]
    while not all(task.done() for task in panning):
        samples.append(server.memory_mib())
        await asyncio.sleep(1)
    await asyncio.gather(*panning)
    return samples


def main() -> None:
    """Print the figures of one comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cached", "cold", "panning", "kept", "memory"])
    parser.add_argument("--image", type=Path, action="append", help="default: the sample scene; may be repeated")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps({"python": sys.version.split()[0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}))
    with tempfile.TemporaryDirectory() as folder:
        images = [path.resolve() for path in arguments.image or [ensure_demo_scene(Path(folder) / "scene")]]
        if arguments.what == "memory":
            links = Path(folder) / "images"
            links.mkdir()
            for i in range(max(20, len(images))):
                shutil.copyfile(images[i % len(images)], links / f"{i:02d}.tif")
            memory(sorted(links.iterdir()), arguments.minutes, arguments.clients)
        elif arguments.what == "cached":
            cached(images[0], arguments.clients, arguments.seconds)
        elif arguments.what == "cold":
            cold(images[0], arguments.repeats)
        elif arguments.what == "kept":
            kept(images[0], arguments.repeats)
        else:
            panning(images[0], arguments.clients, arguments.seconds)


if __name__ == "__main__":
    main()
