"""Lists labelled by a Ray cluster of several nodes, against the same list labelled here."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from codebooks import make_codebook
from rasterio.transform import Affine
from rasters import LEFT, TOP, texture, write_tif
from ray_cluster import RAY_WARNINGS, RunningCluster, cluster

from geocentroids_tiler.bulk import ray_workers
from geocentroids_tiler.bulk.command import classify_list
from geocentroids_tiler.bulk.folder import Failure
from geocentroids_tiler.bulk.image_list import ListedImage, image_of
from geocentroids_tiler.bulk.labelling import Labelled, Task
from geocentroids_tiler.bulk.ray_actor import Introduction, RayWorker, Result
from geocentroids_tiler.bulk.ray_workers import passed_on, places_on
from geocentroids_tiler.bulk.workers import AT_ONCE
from geocentroids_tiler.codebook import save_codebook
from geocentroids_tiler.distributed import Node, alive_nodes, connected
from geocentroids_tiler.errors import ClusterError
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions

pytestmark = RAY_WARNINGS

PATIENCE_S = 60.0
LIGHT: dict[str, Any] = {"threads": 1, "read_threads": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[ListedImage, ...]:
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"image{seed}.tif" for seed in range(7)]
    for seed, path in enumerate(paths):
        at = Affine(0.25, 0, LEFT + 400 * seed, 0, -0.25, TOP)
        write_tif(path, texture(200 + 30 * seed, 250, seed), transform=at, photometric="RGB")
    broken = folder / "broken.tif"
    broken.write_text("no image")
    return tuple(image_of(str(path)) for path in (paths[0], broken, *paths[1:]))


@dataclass(frozen=True)
class Nodes:
    """A head that is like this machine, and a node whose home and settings are its own."""

    running: RunningCluster
    other: Any

    @property
    def address(self) -> str:
        return self.running.address


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    homes = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    for seed, home in enumerate(homes):
        place = home / ".local" / "share" / "geocentroids" / "codebooks" / "own"
        save_codebook(make_codebook("own", seed=seed), place, card="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(homes[0]))
        with cluster(nodes=1) as running:
            own = {"HOME": str(homes[1]), "GEOCENTROIDS_BACKEND": "onnx", "GEOCENTROIDS_PRECISION": "fp32"}
            yield Nodes(running, running.add_node(env_vars=own))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nodes_that_differ_are_refused(nodes: Nodes, images: tuple[ListedImage, ...], tmp_path: Path) -> None:
    def refused(**settings: Any) -> str:
        with pytest.raises(ClusterError) as caught:
            classify_list(images, tmp_path, Settings(**LIGHT, **settings), ReadOptions(), None, nodes.address)
        return str(caught.value)

    digest = r"codebook 'own' with digest [0-9a-f]{64}"
    assert re.match(rf"node 127.0.0.2 \(\w+\) has {digest}, this machine has [0-9a-f]{{64}};", refused(codebook="own"))
    pytest.importorskip("openvino", reason="without it, auto is what the other node has")
    said = refused()
    assert re.match(r"node \S+ \(\w+\) computes with \S+, node \S+ \(\w+\) with \S+;", said)
    assert "onnxruntime/CPUExecutionProvider/fp32" in said
    assert "openvino/CPU/" in said
    assert content(tmp_path) == {}


class StubWorker:
    """A worker that labels nothing; one image ends its process, and most wait until a file is there."""

    def __init__(self, go: str, *_: Any) -> None:
        self._go = Path(go)
        self._tasks = 0

    def introduce(self) -> Introduction:
        return Introduction("1", "digest", "stub")

    def progress(self) -> dict[str, int]:
        return {}

    def label(self, task: Task) -> Result:
        self._tasks += 1
        assert self._tasks <= AT_ONCE
        if task.image.name == "poison":
            time.sleep(0.2)
            os._exit(1)
        deadline = time.monotonic() + PATIENCE_S
        while task.chunks <= FREE and not self._go.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.1)
        self._tasks -= 1
        return Result(task.image.name.encode(), {"node": ray.get_runtime_context().get_node_id()})


FREE = 20
"""Images larger than this wait for nothing."""


def test_an_image_that_ends_workers_and_a_node_that_joins(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "RayWorker", StubWorker)
    images = [image_of(f"https://x.org/{number}") for number in range(24)]
    tasks = [Task(image, "1", number + 1) for number, image in enumerate(images)]
    tasks.insert(3, Task(image_of("poison"), "1", FREE + 2))
    go, added = tmp_path / "go", list[str]()
    said: list[str] = []
    done: list[Labelled | Failure] = []

    def tell(text: str) -> None:
        said.append(text)
        if "has a new worker" in text and any(node[:8] in text for node in added):
            go.touch()

    with connected(nodes.address) as before:
        workers = ray_workers.RayWorkers(str(go), ReadOptions(), None, tell)
        try:
            workers.start(before)
            assert workers.device_name == "stub"
            for outcome in workers.label(tasks, tmp_path, lambda task, chunks: None):
                done.append(outcome)
                if len(done) == 1:
                    nodes.running.add_node()
                    added += [node.id for node in alive_nodes() if node not in before]
        finally:
            workers.close()
    labelled = [outcome for outcome in done if isinstance(outcome, Labelled)]
    (failure,) = [outcome for outcome in done if isinstance(outcome, Failure)]
    assert failure.image.name == "poison"
    assert failure.reason.startswith("3 workers ended while they had it, the last on node 127.0.0.2")
    assert sorted(outcome.task.image.url for outcome in labelled) == sorted(image.url for image in images)
    assert all(outcome.labels.read_bytes() == outcome.task.image.name.encode() for outcome in labelled)
    assert len(added) == 1
    assert added[0] in {outcome.item["node"] for outcome in labelled}
    assert sum("lost its worker" in text for text in said) == 3
    assert labelled[0].task.chunks > FREE, "the largest first"


def test_a_node_that_dies_costs_nothing_but_time(nodes: Nodes, images: tuple[ListedImage, ...], tmp_path: Path) -> None:
    settings = Settings(backend="onnx", precision="fp32", **LIGHT)
    local, out = tmp_path / "local", tmp_path / "ray"
    here = classify_list(images, local, settings, ReadOptions(), progress=False)
    killed: list[int] = []

    def kill() -> None:
        while not (done := len(list(out.glob("image*.json")))):
            time.sleep(0.01)
        nodes.running.kill(nodes.other)
        killed.append(done)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    report = classify_list(images, out, settings, ReadOptions(), None, nodes.address, progress=False)
    killer.join(30)
    assert killed
    assert killed[0] < 7, "it died while there was work"
    assert (report.labelled, report.reused) == (here.labelled, here.reused) == (7, 0)
    assert [failure.image.name for failure in report.failures] == [images[1].name]
    assert content(out) == content(local)


def test_a_file_that_a_node_does_not_see(tmp_path: Path) -> None:
    worker = RayWorker.__new__(RayWorker)
    worker._address = "10.0.0.7"
    file = write_tif(tmp_path / "a.tif", texture(64, 64))
    image = image_of(str(file))
    stat = file.stat()
    identity = f"{stat.st_mtime_ns}-{stat.st_size}"
    assert worker._not_here(Task(image, identity, 1)) is None
    assert worker._not_here(Task(image_of("https://x.org/a.tif"), "1", 1)) is None
    other = worker._not_here(Task(image, "1-1", 1))
    assert other is not None
    assert other.startswith("node 10.0.0.7 (")
    assert "another version" in other
    file.unlink()
    missing = worker._not_here(Task(image, identity, 1))
    assert missing is not None
    assert f"has no file {str(file)!r}" in missing


def test_where_workers_are() -> None:
    big, small, head = Node("a", "10.0.0.1", 8, 2), Node("b", "10.0.0.2", 4, 0), Node("c", "10.0.0.3", 0, 0)
    assert [(place.node.id, place.number) for place in places_on([big, small, head])] == [("a", 0), ("a", 1)]
    assert [(place.node.id, place.on_gpu) for place in places_on([small, head])] == [("b", False)]
    assert places_on([head]) == []


def test_what_nodes_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SOURCE_HTTP": "true",
        "SOURCE_HOSTS": '["a.org"]',
        "SOURCE_PROXY": "http://user:secret@proxy",
        "API_KEYS": '["secretsecretsecret"]',
        "REDIS_URL": "redis://:secret@host",
        "PRECISION": "fp32",
        "ROOT": str(tmp_path),
    }.items():
        monkeypatch.setenv(f"GEOCENTROIDS_{name}", value)
    monkeypatch.chdir(tmp_path)
    told = passed_on(Settings(threads=2, codebooks_dir=Path("books")))
    assert told == {
        "GEOCENTROIDS_SOURCE_HTTP": "true",
        "GEOCENTROIDS_SOURCE_HOSTS": '["a.org"]',
        "GEOCENTROIDS_PRECISION": "fp32",
        "GEOCENTROIDS_THREADS": "2",
        "GEOCENTROIDS_CODEBOOKS_DIR": str(tmp_path / "books"),
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert passed_on(Settings()) == told, "what is passed on is read as it was"
