"""A list of images on a Ray cluster: one worker against two, and one that is killed at half time.

The cluster's nodes are processes of this machine, each kept to one core of its own with an encoder of one thread, and
talk over the loopback interface; so two workers can be twice as fast where two cores are free. The images are squares
cut from the sample scene. Every run's folder is compared with that of a run in this process, byte by byte.

    python benchmarks/classify_list.py [--images 12] [--size 500]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rasterio
from rasterio.windows import Window

from geocentroids_tiler.bulk.command import bulk_settings, classify_list
from geocentroids_tiler.bulk.folder import LabelFolder
from geocentroids_tiler.bulk.image_list import ListedImage, image_of
from geocentroids_tiler.bulk.ray_workers import ray_workers
from geocentroids_tiler.bulk.run import Run
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.scene import ensure_demo_scene
from geocentroids_tiler.settings import Settings, load_settings
from geocentroids_tiler.source import ReadOptions, open_remote

LOOPBACK = "127.0.0.2"
NOTHING = ReadOptions()


def cut(scene: Path, folder: Path, count: int, size_px: int) -> list[ListedImage]:
    """Cut squares from a scene, row by row."""
    images = []
    with rasterio.open(scene) as raster:
        across = raster.width // size_px
        if count > across * (raster.height // size_px):
            raise SystemExit(f"the scene of {raster.width} x {raster.height} px has no {count} squares of {size_px} px")
        for number in range(count):
            window = Window(number % across * size_px, number // across * size_px, size_px, size_px)
            path = folder / f"square{number:02}.tif"
            profile = {"driver": "GTiff", "width": size_px, "height": size_px, "count": 3, "dtype": "uint8"}
            with rasterio.open(
                path,
                "w",
                crs=raster.crs,
                transform=raster.window_transform(window),
                tiled=True,
                photometric="RGB",
                **profile,
            ) as out:
                out.write(raster.read((1, 2, 3), window=window))
            images.append(image_of(str(path)))
    return images


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep processes that are started in a ``with`` block to one core of those that this one may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[number % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def on_cluster(
    images: list[ListedImage],
    out: Path,
    settings: Settings,
    nodes: int,
    during: Callable[[object, list[object]], None] | None = None,
) -> tuple[float, float]:
    """Label images on a cluster; return the seconds until its workers are ready, and those that the images took."""
    from ray.cluster_utils import Cluster

    options = {"node_ip_address": LOOPBACK, "object_store_memory": 256 * 2**20, "num_cpus": 1}
    with on_core(0):
        cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    added: list[object] = []
    for number in range(1, nodes):
        with on_core(number):
            added.append(cluster.add_node(**options))
    codebook = find_codebook(settings.codebook, settings.codebooks_dir)
    remote, folder = open_remote(settings), LabelFolder(out)
    try:
        start = time.perf_counter()
        with (
            folder.writing(),
            ray_workers(cluster.address, codebook, bulk_settings(settings), NOTHING, None, print) as workers,
        ):
            ready = time.perf_counter()
            if during is not None:
                threading.Thread(target=during, args=(cluster, added), daemon=True).start()
            Run(images, folder, workers, remote, codebook, NOTHING, progress=False).to_the_end()
            return ready - start, time.perf_counter() - ready
    finally:
        remote.close()
        cluster.shutdown()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--size", type=int, default=500)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings = load_settings(threads=1, read_threads=1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "images").mkdir()
        images = cut(ensure_demo_scene(work / "scene"), work / "images", arguments.images, arguments.size)
        start = time.perf_counter()
        classify_list(images, work / "here", settings, NOTHING, progress=False)
        print(f"this process, encoder of one thread: {time.perf_counter() - start:.1f} s, loading included", flush=True)
        expected = content(work / "here")
        seconds = {}
        for nodes in (1, 2):
            ready, seconds[nodes] = on_cluster(images, work / f"ray{nodes}", settings, nodes)
            same = content(work / f"ray{nodes}") == expected
            print(
                f"{nodes} worker{'s' * (nodes > 1)}: ready after {ready:.1f} s, {len(images)} images in "
                f"{seconds[nodes]:.1f} s; same bytes: {same}",
                flush=True,
            )
        print(f"ratio of two workers to one: {seconds[1] / seconds[2]:.2f} times as fast")
        killed: list[int] = []

        def kill(cluster: object, added: list[object]) -> None:
            while (done := len(list((work / "killed").glob("square*.json")))) < len(images) // 2:
                time.sleep(0.02)
            cluster.remove_node(added[0], allow_graceful=False)  # type: ignore[attr-defined]
            killed.append(done)

        _, took = on_cluster(images, work / "killed", settings, 2, kill)
        print(
            f"two workers, the node of one killed after {killed[0]} of {len(images)} images: {took:.1f} s; same bytes: "
            f"{content(work / 'killed') == expected}"
        )


if __name__ == "__main__":
    main()
