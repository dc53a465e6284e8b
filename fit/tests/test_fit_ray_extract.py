"""Features computed on a cluster: the files of a run without one, whatever happens to its nodes."""

from __future__ import annotations

import dataclasses
import os
import shutil
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
from faulty_encoders import Ends
from httpd import Served, serve
from ray_cluster import RAY_WARNINGS, RunningCluster, cluster
from ray_stores import watched
from small_images import settings, write_bands, write_image

from geocentroids_fit import ray_encoders, ray_extract, ray_nodes, workspace
from geocentroids_fit.config import EncoderConfig, FitConfig, WindowsConfig, make_config
from geocentroids_fit.encoders import describe_encoder
from geocentroids_fit.files import write_json
from geocentroids_fit.fitting import cluster_step, extract_step
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.ledger import SETTINGS_FILE
from geocentroids_fit.ray_encoders import STORE_SHARE, make_job
from geocentroids_fit.shards import MANIFEST_FILE, SHARDS_DIR
from geocentroids_fit.workspace import Fit
from geocentroids_tiler.codebook import ENCODER_FILE
from geocentroids_tiler.distributed import Node
from geocentroids_tiler.errors import ClusterError
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Remote, open_remote

pytestmark = [*RAY_WARNINGS, pytest.mark.torch]

IMAGES = 6
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
            "cluster": {"k": 24, "metric": "l2"},
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
    """A cluster whose nodes can import what lies beside this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
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


def test_images_on_the_web_are_read_by_the_nodes(
    project: Project, running: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOCENTROIDS_SOURCE_HTTP", "true")
    monkeypatch.setenv("GEOCENTROIDS_SOURCE_NETWORKS", '["127.0.0.0/8"]')
    remotes: list[Remote] = []

    def opened(settings: Settings) -> Remote:
        remotes.append(open_remote(settings))
        return remotes[-1]

    monkeypatch.setattr(workspace, "open_remote", opened)
    with serve() as server:
        server.files["/a.tif"] = Served((project.root / "imagery" / "0.tif").read_bytes(), {"ETag": '"1"'})
        urls = [f"{server.url}/a.tif", f"{server.url}/absent.tif"]
        for name, address in (("web", None), ("web-nodes", running.address)):
            config = make_config({**project.content(name), "images": {"urls": urls}})
            store = extract_step(Fit(config, say=lambda text: None, progress=False, ray=address))
            assert store.images == (urls[0],)
        for remote in remotes:
            remote.close()
    assert project.files("web-nodes") == project.files("web")


def test_clusters_are_those_of_a_run_without_a_cluster(project: Project, running: RunningCluster) -> None:
    shutil.copytree(project.fit("local").features, project.fit("clustered").features)
    ours, theirs = cluster_step(project.fit("clustered", running.address)), cluster_step(project.fit("local"))
    assert ours.record["inertia"] == pytest.approx(theirs.record["inertia"], rel=1e-4)
    assert (ours.labels == theirs.labels).mean() > 0.99
    assert ours.likeness == pytest.approx(theirs.likeness, abs=1e-2)
    assert ours.rgb == pytest.approx(theirs.rgb, abs=1)
    said: list[str] = []
    cluster_step(dataclasses.replace(project.fit("clustered"), say=said.append))
    assert said[-1].endswith("(kept)")  # where it was computed does not matter


def test_a_node_that_is_lost_costs_nothing_but_time(project: Project) -> None:
    with cluster(nodes=3) as running:
        killed = running.added[0]
        with meanwhile(lambda: project.shards("lost") >= 2, lambda: running.kill(killed)) as acted:
            extract_step(project.fit("lost", running.address))
        assert acted
    assert project.files("lost") == project.files("local")


def test_processes_that_end_are_started_again(
    project: Project, running: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder ends at one image always and at another once, when others are at work beside them."""
    monkeypatch.setattr(ray_encoders, "NodeEncoder", Ends)
    monkeypatch.setattr(ray_extract, "LOOK_S", 0.2)
    monkeypatch.setattr(ray_extract, "MAX_ATTEMPTS", 2)
    store = extract_step(project.fit("ended", running.address))
    assert (project.root / "ended.once").exists()
    reasons = {skipped.image: skipped.reason for skipped in store.manifest.skipped}
    assert reasons.pop("1.tif") == "processes that worked on it ended 2 times (ActorDiedError)"
    assert sorted(reasons) == ["coarse.tif", "torn.tif"]
    ours, theirs = (
        {name: content for name, content in project.files(fit).items() if "/1-" not in name and name != MANIFEST_FILE}
        for fit in ("ended", "local")
    )
    assert ours == theirs


@pytest.fixture
def command(project: Project) -> Callable[[str, str], list[str]]:
    """The command that computes features on a cluster."""

    def command(name: str, address: str) -> list[str]:
        config = project.root / f"{name}.toml"
        config.write_text(
            f'out = "{name}"\n[images]\nfolder = "imagery"\n[encoder]\nmodel = "{project.model}"\nthreads = 1\n'
            "[windows]\nwindow_patches = 8\nmargin_patches = 1\nstride_patches = 3\n"
            '[sample]\nper_image = 400\n[codebook]\nname = "tiny"\n'
        )
        return [sys.executable, "-m", "geocentroids_fit.cli", "extract", "--ray", address, str(config)]

    return command


def test_a_killed_run_goes_on_to_the_same_bytes(
    project: Project, running: RunningCluster, command: Callable[[str, str], list[str]]
) -> None:
    process = subprocess.Popen(command("killed", running.address), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with meanwhile(lambda: project.shards("killed") >= 2, lambda: process.send_signal(signal.SIGKILL)) as acted:
        output, _ = process.communicate(timeout=WATCH_S)
    assert acted, output.decode()
    assert 2 <= project.shards("killed") < IMAGES
    extract_step(project.fit("killed", running.address))
    assert project.files("killed") == project.files("local")


def test_the_only_node_is_lost_and_another_joins(project: Project, command: Callable[[str, str], list[str]]) -> None:
    with cluster(nodes=1, cpus=0) as running:
        only = running.add_node(num_cpus=1)
        process = subprocess.Popen(command("moved", running.address), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with meanwhile(lambda: project.shards("moved") >= 1, lambda: running.kill(only)) as acted:
            while not acted and process.poll() is None:
                time.sleep(0.01)
        running.add_node(num_cpus=1)
        output, _ = process.communicate(timeout=WATCH_S)
    assert acted, output.decode()
    assert process.returncode == 0, output.decode()
    assert project.files("moved") == project.files("local")


def test_nodes_with_another_device_are_refused(project: Project, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('not for this node')\n")
    with cluster(nodes=1) as running:
        path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
        running.add_node(env_vars={"PYTHONPATH": path})
        mixed = r"node \S+ \(\w+\) computes with \S+, node \S+ \(\w+\) with \S+; features must come from one kind"
        with pytest.raises(ClusterError, match=mixed) as caught:
            extract_step(project.fit("mixed", running.address))
        assert {"openvino", "onnxruntime"} <= set(str(caught.value).replace("/", " ").split())
    assert not project.files("mixed")


def test_nodes_with_other_code_are_refused(
    project: Project, running: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_nodes, "__version__", "9")
    other = r"node \S+ \(\w+\) has geocentroids-fit (\d\.\d\.\d\+\w+), this machine has 9\+\w+; they must be the same"
    with pytest.raises(ClusterError, match=other):
        extract_step(project.fit("versions", running.address))


def test_features_of_another_device_are_not_mixed(project: Project, running: RunningCluster) -> None:
    path = project.fit("elsewhere").features / SETTINGS_FILE
    write_json(path, {"device": "onnxruntime/CUDAExecutionProvider/fp32"})
    before = path.read_bytes()
    other = r"node \S+ \(\w+\) computes with \S+, but \S+ holds features computed with onnxruntime/CUDAExec\w+/fp32; "
    with pytest.raises(ClusterError, match=other):
        extract_step(project.fit("elsewhere", running.address))
    assert project.files("elsewhere") == {SETTINGS_FILE: before}


def test_images_that_a_node_does_not_see_are_no_broken_images(
    project: Project, running: RunningCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = ImageFolder.identity
    monkeypatch.setattr(
        ImageFolder, "identity", lambda images, name: "1-2" if name == "0.tif" else identity(images, name)
    )
    with pytest.raises(ClusterError, match=r"node \S+ \(\w+\) sees \d+-\d+ at \S+/0\.tif, this machine sees 1-2 "):
        extract_step(project.fit("unseen", running.address))


def test_nothing_is_spilled_from_a_small_object_store(project: Project) -> None:
    size_bytes = 80 * 2**20
    with cluster(nodes=1, store_bytes=size_bytes) as running:
        with watched(running.address) as stores:
            extract_step(project.fit("small", running.address))
        assert max(store.created_bytes for store in stores) > size_bytes
        assert all(store.spilled_bytes == store.fallback_bytes == 0 for store in stores)
        assert max(store.pinned_bytes for store in stores) <= STORE_SHARE * size_bytes
    assert project.files("small") == project.files("local")


def test_what_is_read_ahead_fits_the_store() -> None:
    wanted = settings()
    images = ImageFolder(Path("imagery"), ("a.tif",))
    node = Node("id", "10.0.0.1", 4, 0)
    chunk_bytes = 4 * 3 * 112 * 112
    large, small = (make_job(images, wanted, 2, node, room) for room in (2**30, 2 * (2 * chunk_bytes + 2000) + 8))
    assert (large.batches, large.chunks) == (3, 16)
    assert (small.batches, small.chunks) == (1, 1)
    assert large.folder == Path("imagery").resolve()
    with pytest.raises(ClusterError, match=r"node 10\.0\.0\.1 \(id\) has room for 1 MiB .* and 1 MiB are needed"):
        make_job(images, wanted, 2, node, 2 * (2 * chunk_bytes))
