"""From `geocentroids demo` to the first tile, and to all tiles of the sample scene; with or without the scene drawn.

python benchmarks/first_tile.py
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import httpx
import morecantile

ZOOM = 18


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measure(folder: Path) -> tuple[float, float, int]:
    """Return the seconds to the first tile and to all tiles, and the number of tiles."""
    base = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "geocentroids_tiler.cli", "demo", "--port", str(port), "--folder", str(folder)]
    start = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(timeout=300) as client:
            address = f"{base}/cog/geocentroids/WebMercatorQuad/tilejson.json?url=demo-scene-v1.tif&tilesize=256"
            answer = None
            while answer is None:
                with contextlib.suppress(httpx.TransportError):
                    answer = client.get(address)
                time.sleep(0.05)
            document = answer.raise_for_status().json()
            west, south, east, north = document["bounds"]
            tms = morecantile.tms.get("WebMercatorQuad")
            middle = tms.tile((west + east) / 2, (south + north) / 2, ZOOM)
            tiles = [middle, *tms.tiles(west, south, east, north, ZOOM)]
            first = 0.0
            for tile in tiles:
                client.get(document["tiles"][0].format(z=tile.z, x=tile.x, y=tile.y)).raise_for_status()
                first = first or time.perf_counter() - start
            return first, time.perf_counter() - start, len(tiles) - 1
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as folder:
        for state in ("scene drawn on first use", "scene there already"):
            first, whole, tiles = measure(Path(folder))
            print(f"{state}: first tile {first:.1f} s, all {tiles} tiles of zoom {ZOOM} {whole:.1f} s")
    packages = Path(sysconfig.get_path("purelib"))
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    print(f"installed packages: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
