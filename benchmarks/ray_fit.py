"""Features and K-Means on a Ray cluster of several nodes on this machine, against a run without a cluster.

    python benchmarks/ray_fit.py --images IMAGERY

Each node is kept to one core, which its encoder (one thread) and the process that reads share, so that two nodes have
twice what one has; so is the run without a cluster. A head without CPUs keeps the cluster together; it and the process
that writes the shards are kept to no core. Times are without starting processes and loading the encoder. One node of
two is ended as by a power cut when half of the images are done. The stores are looked at 20 times a second.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "fit" / "tests")]

import ray_cluster  # noqa: E402
from ray_stores import Store, look, watched  # noqa: E402

from geocentroids_fit.cluster import kmeans, kmeans_of_table  # noqa: E402
from geocentroids_fit.config import EncoderConfig  # noqa: E402
from geocentroids_fit.encoders import describe_encoder, load_described  # noqa: E402
from geocentroids_fit.extract import extract  # noqa: E402
from geocentroids_fit.images import ImageFolder, list_images  # noqa: E402
from geocentroids_fit.node_encoder import EncoderRecipe, device_of, own_code  # noqa: E402
from geocentroids_fit.pack import draft_codebook  # noqa: E402
from geocentroids_fit.ray_encoders import make_team, start_workers  # noqa: E402
from geocentroids_fit.ray_extract import extract_on_nodes  # noqa: E402
from geocentroids_fit.ray_kmeans import RemoteTable  # noqa: E402
from geocentroids_fit.ray_nodes import connected_to_fit  # noqa: E402
from geocentroids_fit.shards import FeatureSettings, FeatureStore, open_features  # noqa: E402
from geocentroids_tiler.codebook import load_codebook  # noqa: E402

NANO = ROOT / "geocentroids_tiler" / "codebooks" / "nano"
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of GeoTIFFs")
    parser.add_argument("--count", type=int, default=24, help="images")
    parser.add_argument("--per-image", type=int, default=1000)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--store", type=int, default=200, help="MiB of each node's object store")
    options = parser.parse_args()
    if not options.images.is_dir():
        print(f"not run: {options.images} is not there")
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        fit = Fit(options, Path(work))
        alone = fit.alone()
        one = fit.on_nodes("one node", 1)
        two = fit.on_nodes("two nodes", 2)
        fit.on_nodes("two nodes, one ended at half time", 2, kill=True)
        print(f"time of two nodes / of one: {two / one:.2f}; of one node / without a cluster: {one / alone:.2f}")
        for metric in ("cosine", "l2"):
            fit.cluster(open_features(Path(work) / "alone"), metric)


class Fit:
    """Images, an encoder, and what a run without a cluster made of them."""

    def __init__(self, options: Any, work: Path) -> None:
        self.options, self.work = options, work
        names = list_images(options.images, ["*mask*"])
        step = max(1, len(names) // options.count)
        self.images = ImageFolder(options.images, tuple(names[::step][: options.count]))
        self.preprocess = load_codebook(NANO).manifest.preprocess
        self.config = EncoderConfig(model=str(NANO / "encoder.onnx"), threads=1)
        self.section = describe_encoder(self.config, self.preprocess, work / "encoder")

    def settings(self, device: str) -> FeatureSettings:
        """Return what features depend on."""
        return FeatureSettings(
            encoder=self.section,
            preprocess=self.preprocess,
            device=device,
            per_image=self.options.per_image,
            seed=0,
        )

    def alone(self) -> float:
        """Extract without a cluster and return the seconds."""
        with on_core(0):
            encoder = load_described(self.section, self.preprocess, self.work / "encoder", self.config)
            wanted = self.settings(device_of(encoder))
            began = time.perf_counter()
            found = extract(
                self.images, encoder, draft_codebook(wanted), wanted, self.work / "alone", readers=1, progress=False
            )
            took_s = time.perf_counter() - began
        print(f"without a cluster: {len(found.store)} features of {len(found.store.images)} images in {took_s:.1f} s")
        return took_s

    def on_nodes(self, name: str, count: int, *, kill: bool = False) -> float:
        """Extract on nodes, tell what was found, and return the seconds."""
        out = self.work / name
        with self.nodes(count) as (running, address), connected_to_fit(address) as nodes:
            recipe = EncoderRecipe(self.section, self.preprocess, self.config, own_code())
            team = make_team(recipe, self.work / "encoder", nodes)
            workers, device = start_workers(team, nodes, out)
            killed = threading.Event()
            with watched(address) as stores, killer(running, out, len(self.images.names), killed if kill else None):
                began = time.perf_counter()
                extract_on_nodes(self.images, team, workers, self.settings(device), out, readers=1, progress=False)
                took_s = time.perf_counter() - began
        same = contents(out) == contents(self.work / "alone")
        print(
            f"{name}: {took_s:.1f} s; files {'the same, byte for byte' if same else 'DIFFER'}; "
            f"{sum(largest(stores, 'created_bytes')) / MIB:.0f} MiB through object stores of {self.options.store} MiB, "
            f"at most {max(largest(stores, 'pinned_bytes')) / MIB:.0f} MiB at once in one "
            f"({max(largest(stores, 'used_bytes')) / MIB:.0f} with what may be dropped), "
            f"{sum(largest(stores, 'spilled_bytes')) + sum(largest(stores, 'fallback_bytes'))} bytes spilled"
            + ("; a node was ended" if killed.is_set() else "")
        )
        return took_s

    def cluster(self, store: FeatureStore, metric: Any) -> None:
        """Run K-Means with and without a cluster and tell what was found."""
        options: Any = {"metric": metric, "seed": 0, "init": "random", "max_iterations": 15, "tolerance": 0.0}
        began = time.perf_counter()
        with on_core(0):
            ours = kmeans(store.parts(), self.options.k, **options, device="cpu", progress=False)
        alone_s = time.perf_counter() - began
        with self.nodes(2) as (_, address), connected_to_fit(address) as nodes:
            table = RemoteTable(store, nodes, metric, "cpu")
            before = sum(largest(look(address), "created_bytes"))
            began = time.perf_counter()
            theirs = kmeans_of_table(table, self.options.k, **options, checkpoint=None, identity=None, progress=False)
            took_s = time.perf_counter() - began
            travelled = sum(largest(look(address), "created_bytes")) - before
        print(
            f"K-Means by {metric}, {len(store)} x {store.dim}, k = {self.options.k}, {theirs.iterations} iterations: "
            f"objective {theirs.inertia:.6g} on two nodes, {ours.inertia:.6g} without (relative difference "
            f"{abs(theirs.inertia / ours.inertia - 1):.1e}); {took_s:.1f} s, {alone_s:.1f} s; "
            f"{travelled / (theirs.iterations + 1) / MIB:.2f} MiB written to object stores in an iteration, "
            f"features are {len(store) * store.dim * 2 / MIB:.0f} MiB"
        )

    @contextmanager
    def nodes(self, count: int) -> Iterator[tuple[ray_cluster.RunningCluster, str]]:
        """Run a head without CPUs and some nodes with one each."""
        with ray_cluster.cluster(nodes=1, cpus=0, store_bytes=self.options.store * MIB) as running:
            running.added = []
            for number in range(count):
                with on_core(number):
                    running.added.append(running.add_node(num_cpus=1))
            yield running, running.address


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep this thread, and the threads and processes that it starts meanwhile, to one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def killer(
    running: ray_cluster.RunningCluster, out: Path, images: int, killed: threading.Event | None
) -> Iterator[None]:
    """End a node when half of the images are done, if that is wanted."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            if len(list(out.rglob("*.safetensors"))) >= images // 2:
                running.kill(running.added[-1])
                if killed is not None:
                    killed.set()
                return

    thread = threading.Thread(target=watch)
    if killed is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if killed is not None:
            thread.join()


def largest(stores: list[Store], what: str) -> list[int]:
    """Return the largest value of each node's store."""
    return [max(getattr(store, what) for store in stores if store.node == node) for node in {s.node for s in stores}]


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    main()
