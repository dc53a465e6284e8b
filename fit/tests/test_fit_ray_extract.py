"""Features computed on a cluster: the files of a run without one, whatever happens to its nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from ray_cluster import RAY_WARNINGS, RunningCluster, cluster
from small_images import write_bands, write_image

from geocentroids_fit import ray_extract
from geocentroids_fit.config import EncoderConfig, FitConfig, WindowsConfig, make_config
from geocentroids_fit.encoders import describe_encoder
from geocentroids_fit.fitting import extract_step
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.node_encoder import NodeEncoder, Outcome, SampleJob
from geocentroids_fit.ray_extract import make_job
from geocentroids_fit.shards import SHARDS_DIR
from geocentroids_fit.workspace import Fit
from geocentroids_tiler.codebook import ENCODER_FILE
from geocentroids_tiler.distributed import Node
from geocentroids_tiler.errors import ClusterError

pytestmark = [*RAY_WARNINGS, pytest.mark.torch]

IMAGES = 8
WINDOWS = {"window_patches": 8, "margin_patches": 1, "stride_patches": 3}
WATCH_S = 60.0


class Project:
    """Images and an encoder, and the files that a run without a cluster makes of them."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root, self.model = root, model

    def fit(self, name: str, ray: str | None = None) -> Fit:
        return Fit(self.config(name), say=lambda text: None, progress=False, ray=ray)

    def config(self, name: str) -> FitConfig:
        return make_config(self.content(name))

    def content(self, name: str) -> dict[str, object]:
        return {
            "out": str(self.root / name),
            "images": {"folder": str(self.root / "imagery")},
            "encoder": {"model": str(self.model), "threads": 1},
            "windows": WINDOWS,
            "sample": {"per_image": 400},
            "codebook": {"name": "tiny"},
        }

    def files(self, name: str) -> dict[str, bytes]:
        """All files of a fit's features."""
        features = self.fit(name).features
        paths = sorted(path for path in features.rglob("*") if path.is_file())
        return {path.relative_to(features).as_posix(): path.read_bytes() for path in paths}

    def shards(self, name: str) -> int:
        return len(list((self.fit(name).features / SHARDS_DIR).glob("*.json")))


@pytest.fixture(scope="module")
def project(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    for number in range(IMAGES):
        write_image(root / "imagery" / f"{number}.tif", number, size=14 * 40)
    write_bands(root / "imagery" / "coarse.tif", np.full((3, 20, 20), 90, np.uint8), pixel_m=10)
    rng = np.random.default_rng(0)
    torn = root / "imagery" / "torn.tif"
    write_bands(torn, rng.integers(20, 240, (3, 560, 560), np.uint8), compress="deflate", tiled=True)
    content = bytearray(torn.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    torn.write_bytes(content)
    preprocess = WindowsConfig(**WINDOWS).preprocess
    describe_encoder(EncoderConfig(model=str(encoder_dir)), preprocess, root / "exported")
    project = Project(root, root / "exported" / ENCODER_FILE)
    extract_step(project.fit("local"))
    return project


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCluster]:
    with cluster(nodes=3) as running:
        yield running


@contextmanager
def meanwhile(condition: Callable[[], bool], action: Callable[[], object]) -> Iterator[list[bool]]:
    """Act once a condition holds, while the block runs; yields a list that then says so."""
    acted: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + WATCH_S
        while not over.is_set() and time.monotonic() < deadline:
            if condition():
                action()
                acted.append(True)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield acted
    finally:
        over.set()
        thread.join()


def test_the_files_are_those_of_a_run_without_a_cluster(project: Project, running: RunningCluster) -> None:
    store = extract_step(project.fit("nodes", running.address))
    assert project.files("nodes") == project.files("local")
    assert len(store) == IMAGES * 400
    reasons = {skipped.image: skipped.reason for skipped in store.manifest.skipped}
    assert "10 m per pixel" in reasons["coarse.tif"]
    assert "torn.tif" in reasons["torn.tif"]
    before = {path: path.stat().st_mtime_ns for path in project.fit("nodes").features.rglob("*.safetensors")}
    extract_step(project.fit("nodes", running.address))
    assert {path: path.stat().st_mtime_ns for path in project.fit("nodes").features.rglob("*.safetensors")} == before
