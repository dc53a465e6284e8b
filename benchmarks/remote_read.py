"""Reading windows of a remote COG: our reader against GDAL's own (vsicurl), in requests and in time.

    python benchmarks/remote_read.py [--latency-ms 20] [--rounds 15]

A server on this machine answers ranges of one file, each answer held back by the latency. Cold: a file that was never
read (each round has a URL of its own). Warm: windows beside those read just before, through a new opening, as the next
tile needs them. vsicurl is set up as for TiTiler: merged ranges, 64 KiB at opening, no HEAD, no directory listing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from PIL import Image
from rasterio.shutil import copy
from rasterio.windows import Window

from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import open_raster, open_remote, resolve_source, source_identity

SIDE_PX = 8192
WINDOW_PX = 448
VSICURL = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_HTTP_MULTIPLEX": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": 65536,
    "CPL_VSIL_CURL_USE_HEAD": "NO",
    "VSI_CACHE": "TRUE",
    "VSI_CACHE_SIZE": 5 * 2**20,
}

Windows = list[Window]
Read = Callable[[str, Windows], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency-ms", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for compress in ("jpeg", "deflate"):
            path = write_cog(Path(folder) / f"{compress}.tif", compress)
            compare(path, options.latency_ms / 1000, options.rounds)


def compare(path: Path, latency_s: float, rounds: int) -> None:
    requests = multiprocessing.Value("i", 0)
    port = multiprocessing.Queue()  # type: ignore[var-annotated]
    server = multiprocessing.Process(target=serve, args=(path, latency_s, requests, port), daemon=True)
    server.start()
    base = f"http://127.0.0.1:{port.get()}"
    remote = open_remote(Settings(source_http=True, source_networks=["127.0.0.0/8"]))

    def ours(url: str, windows: Windows) -> None:
        source = resolve_source(url, None, remote)
        identity = source_identity(source) if url not in known else known[url]
        known[url] = identity  # the server asks once a minute
        with open_raster(source, identity) as raster:
            read_all(raster, windows)

    def vsicurl(url: str, windows: Windows) -> None:
        with rasterio.Env(**VSICURL), rasterio.open(f"/vsicurl/{url}", driver="GTiff") as raster:
            read_all(raster, windows)

    known: dict[str, str] = {}
    print(f"{path.name}: {SIDE_PX} px, {path.stat().st_size / 2**20:.1f} MiB, {latency_s * 1000:.0f} ms latency")
    print(f"{'':34}{'requests':>20}{'milliseconds':>22}{'ratio':>16}")
    for name, (first, then) in jobs().items():
        figures = []
        for read in (vsicurl, ours):
            asked, took = [], []
            for i in range(rounds):
                url = f"{base}/{read.__name__}/{name.replace(' ', '-')}/{i}.tif"
                if then is not None:
                    read(url, first)
                before, start = requests.value, time.perf_counter()
                read(url, first if then is None else then)
                took.append(time.perf_counter() - start)
                asked.append(requests.value - before)
            figures.append((statistics.median(asked), statistics.median(took)))
        (n0, t0), (n1, t1) = figures
        print(
            f"  {name:32}{n0:>9.0f} ->{n1:>5.0f}{t0 * 1000:>14.1f} ->{t1 * 1000:>7.1f}"
            f"   {n1 / n0 if n0 else float(n1 > 0):.2f} / {t1 / t0:.2f}"
        )
    remote.close()
    server.terminate()
    server.join()


def jobs() -> dict[str, tuple[Windows, Windows | None]]:
    """Return what is read: cold, or after something else."""
    middle = SIDE_PX // 2 + 100
    one = [Window(middle, middle, WINDOW_PX, WINDOW_PX)]
    row = [Window(middle + 224 * i, middle, WINDOW_PX, WINDOW_PX) for i in range(8)]
    below = [Window(middle + 224 * i, middle + 448, WINDOW_PX, WINDOW_PX) for i in range(8)]
    return {
        "one window, cold": (one, None),
        "eight windows, cold": (row, None),
        "2048 px square, cold": ([Window(middle, middle, 2048, 2048)], None),
        "one window, warm": (one, one),
        "eight windows beside them, warm": (row, below),
    }


def read_all(raster: Any, windows: Windows) -> None:
    for window in windows:
        raster.read((1, 2, 3), window=window)


def write_cog(path: Path, compress: str) -> Path:
    """Write smooth noise with some grain as a COG of 512 px blocks."""
    rng = np.random.default_rng(0)
    bands = np.stack(
        [
            np.asarray(Image.fromarray(rng.integers(40, 215, (256, 256), np.uint8)).resize((SIDE_PX, SIDE_PX)))
            for _ in "rgb"
        ]
    )
    bands = bands + rng.integers(0, 8, (1, SIDE_PX, SIDE_PX), np.uint8)
    plain = path.with_suffix(".plain.tif")
    transform = rasterio.Affine(0.25, 0, 560_000, 0, -0.25, 6_140_000)
    profile: dict[str, Any] = {"width": SIDE_PX, "height": SIDE_PX, "count": 3, "dtype": "uint8"}
    with rasterio.open(
        plain, "w", driver="GTiff", crs="EPSG:32721", transform=transform, tiled=True, **profile
    ) as raster:
        raster.write(bands)
    copy(plain, path, driver="COG", compress=compress)
    plain.unlink()
    return path


def serve(path: Path, latency_s: float, requests: Any, port: Any) -> None:
    """Serve one file under every name, in a process of its own."""
    content = path.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one piece
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            with requests.get_lock():
                requests.value += 1
            time.sleep(latency_s)
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, last = (int(found[1]), min(int(found[2]), len(content) - 1)) if found else (0, len(content) - 1)
            self.send_response(206 if found else 200)
            if found:
                self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last + 1 - start))
            self.send_header("ETag", '"1"')
            self.end_headers()
            self.wfile.write(content[start : last + 1])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    port.put(server.server_address[1])
    server.serve_forever()


if __name__ == "__main__":
    main()
