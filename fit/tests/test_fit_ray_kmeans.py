"""K-Means on a cluster against a run without one, and its sums against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_cluster import RAY_WARNINGS, RunningCluster, cluster
from small_images import settings

from geocentroids_fit import cluster as cluster_module
from geocentroids_fit import ray_kmeans
from geocentroids_fit.cluster import Clustering, NotFiniteError, kmeans, kmeans_of_table, similarities, unit
from geocentroids_fit.likeness import image_means
from geocentroids_fit.ray_kmeans import RemoteTable
from geocentroids_fit.shards import SHARDS_DIR, FeatureManifest, Features, FeatureStore, write_shard
from geocentroids_tiler.codebook import Metric
from geocentroids_tiler.distributed import Node, connected
from geocentroids_tiler.errors import ClusterError, InputError

pytestmark = RAY_WARNINGS

DIM = 12
SIZES = (300, 0, 500, 40, 700, 260)
K = 30


def store_of(folder: Path, sizes: tuple[int, ...] = SIZES, spoil: tuple[int, int] | None = None) -> FeatureStore:
    """Features on which K-Means takes many iterations, a shard for each size; with ``spoil`` one is infinite."""
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (40, DIM)) + 3
    records = []
    for number, size in enumerate(sizes):
        tokens = (centres[rng.integers(40, size=size)] + rng.normal(0, 1, (size, DIM))).astype(np.float16)
        if spoil is not None and spoil[0] == number:
            tokens[spoil[1]] = np.inf
        zeros = np.zeros(size, np.int64)
        features = Features(tokens, np.zeros((size, 3), np.uint8), zeros, zeros)
        records.append(write_shard(folder / SHARDS_DIR, f"{number}.tif", "1", features))
    wanted = settings()
    section = wanted.encoder.model_copy(update={"dim": DIM})
    return FeatureStore(
        folder, FeatureManifest(settings=wanted.model_copy(update={"encoder": section}), images=tuple(records))
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return store_of(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCluster]:
    with cluster(nodes=3) as running:
        yield running


@pytest.fixture(scope="module")
def nodes(running: RunningCluster) -> Iterator[list[Node]]:
    with connected(running.address) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def tables(store: FeatureStore, nodes: list[Node]) -> dict[Metric, RemoteTable]:
    """The features on all nodes; inner products are of the same rows as l2."""
    plain, scaled = (RemoteTable(store, nodes, metric, "auto") for metric in ("l2", "cosine"))
    return {"l2": plain, "cosine": scaled, "inner_product": plain}


@pytest.fixture(autouse=True)
def _look_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_kmeans, "RETRY_S", 0.1)


def rows_of(store: FeatureStore, metric: Metric) -> np.ndarray:
    rows = np.concatenate([np.asarray(part, np.float32) for part in store.parts()])
    return unit(rows) if metric == "cosine" else rows


def run(table: RemoteTable, metric: Metric, init: Any = "auto", path: Path | None = None) -> Clustering:
    return kmeans_of_table(
        table,
        K,
        metric=metric,
        seed=1,
        init=init,
        max_iterations=50,
        tolerance=1e-4,
        checkpoint=path,
        identity="these",
        progress=False,
    )


def local(store: FeatureStore, metric: Metric, init: Any = "auto") -> Clustering:
    return kmeans(store.parts(), K, metric=metric, seed=1, init=init, device="cpu", progress=False)


def fingerprint(found: Clustering) -> tuple[object, ...]:
    arrays = [array.tobytes() for array in (found.centroids, found.labels, found.counts)]
    return *arrays, found.inertia, found.curve, found.reseeded


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_sums_are_those_of_float64(store: FeatureStore, tables: dict[Metric, RemoteTable], metric: Metric) -> None:
    table, rows = tables[metric], rows_of(store, metric).astype(np.float64)
    assert (len(table), table.dim, table.nodes, table.device_type) == (len(rows), DIM, 3, "cpu")
    centroids = rows_of(store, metric)[::60][:K]
    seen = table.survey(spherical=metric != "l2")
    assert seen.mean == pytest.approx(rows.mean(axis=0), abs=1e-6)
    found = table.assign(centroids, seen.mean, spherical=metric != "l2")
    squares = np.square(rows[:, None] - centroids[None]).sum(axis=2)
    nearest = squares.argmin(axis=1)
    assert (table.labels() == nearest).all()
    assert (found.counts == np.bincount(nearest, minlength=K)).all()
    sums = np.stack([(rows - centroids[nearest])[nearest == k].sum(axis=0) for k in range(K)])
    assert found.residuals == pytest.approx(sums, abs=1e-3)  # measured 2e-5
    assert found.inertia == pytest.approx(squares.min(axis=1).sum(), rel=1e-6)
    clusters = np.repeat(np.arange(K), 3)
    numbers = np.concatenate([[0, count // 2, count - 1] for count in found.counts])
    expected = [np.flatnonzero(nearest == k)[number] for k, number in zip(clusters, numbers, strict=True)]
    assert table.members(clusters, numbers) == pytest.approx(rows[expected], abs=1e-6)
    index = np.array([1799, 0, 300, 299, 799, 800, 801, 5])
    assert table.take(index) == pytest.approx(rows[index], abs=1e-6)
    assert table.image_means() == pytest.approx(image_means(store.parts(), metric), abs=1e-9)


@pytest.mark.parametrize("metric", ["l2", "cosine", "inner_product"])
def test_the_objective_is_that_of_a_run_without_a_cluster(
    store: FeatureStore, tables: dict[Metric, RemoteTable], metric: Metric
) -> None:
    ours, theirs = run(tables[metric], metric), local(store, metric)
    assert ours.curve[0] == pytest.approx(theirs.curve[0], rel=1e-6)
    # Sums in another order: measured 0 to 2e-7.
    assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-4)
    if metric != "inner_product":
        fits = tables[metric].similarities(ours.centroids)
        assert fits == pytest.approx(similarities(store.parts(), ours, metric), abs=1e-5)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_empty_clusters_start_again(store: FeatureStore, tables: dict[Metric, RemoteTable], metric: Metric) -> None:
    rows = rows_of(store, metric)
    start = np.concatenate([rows[: K - 8], np.tile(rows[:1], (8, 1))])  # the last get nothing
    ours, theirs = run(tables[metric], metric, start), local(store, metric, start)
    assert ours.reseeded >= 8
    assert ours.counts.min() > 0
    assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-4)


def test_a_run_goes_on_where_it_stopped(
    store: FeatureStore,
    nodes: list[Node],
    tables: dict[Metric, RemoteTable],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = run(tables["l2"], "l2")
    save, path = cluster_module._save, tmp_path / "state"
    saves: list[int] = []

    def interrupted(*args: Any) -> None:
        save(*args)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cluster_module, "_save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tables["l2"], "l2", path=path)
    half = path.read_bytes()
    asked = count_calls(monkeypatch)
    assert fingerprint(run(tables["l2"], "l2", path=path)) == fingerprint(expected)
    assert len(asked) == expected.iterations - 3 + 1  # and the last assignment
    path.write_bytes(half)
    asked.clear()
    fewer = run(RemoteTable(store, nodes[:2], "l2", "auto"), "l2", path=path)
    assert len(asked) <= expected.iterations
    assert fewer.inertia == pytest.approx(expected.inertia, rel=1e-4)


def count_calls(patch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each assignment."""
    done: list[int] = []
    assign = RemoteTable.assign

    def counted(*args: Any, **options: Any) -> Any:
        done.append(1)
        return assign(*args, **options)

    patch.setattr(RemoteTable, "assign", counted)
    return done


def test_a_process_that_ends_costs_one_answer(
    store: FeatureStore, tables: dict[Metric, RemoteTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    rows = rows_of(store, "l2")
    start = np.concatenate([rows[: K - 2], np.tile(rows[:1], (2, 1))])
    expected = run(tables["l2"], "l2", start)
    ask, asked = RemoteTable._ask, []

    def deadly(table: RemoteTable, question: str, arguments: Any) -> Iterator[Any]:
        asked.append(question)
        if asked.count(question) == 2 or question == "members":
            ray.kill(table._actors[1])
        return ask(table, question, arguments)

    monkeypatch.setattr(RemoteTable, "_ask", deadly)
    assert fingerprint(run(tables["l2"], "l2", start)) == fingerprint(expected)
    assert asked.count("members") >= 1


def test_a_share_whose_process_always_ends_is_one_sentence(
    store: FeatureStore, nodes: list[Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    table = RemoteTable(store, nodes[:1], "l2", "auto")
    ray.kill(table._actors[0])
    monkeypatch.setattr(ray_kmeans, "MAX_LOSSES", 1)
    with pytest.raises(ClusterError, match=r"the process on node \S+ \(\w+\) that holds .* ended 1 times .*are kept"):
        table.survey(spherical=False)


def test_shards_that_a_node_does_not_see_as_they_are(nodes: list[Node], tmp_path: Path) -> None:
    store = store_of(tmp_path)
    path = tmp_path / SHARDS_DIR / store.manifest.images[4].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x55")
    changed = rf"node \S+ \(\w+\): \S+{path.name} has changed: .*every node must see the folder of features"
    with pytest.raises(ClusterError, match=changed):
        RemoteTable(store, nodes[:1], "l2", "auto")
    path.unlink()
    with pytest.raises(ClusterError, match=rf"node \S+ \(\w+\): \S+{path.name} is missing; every node must see"):
        RemoteTable(store, nodes[:1], "l2", "auto")


def test_what_is_not_finite_is_named(nodes: list[Node], tmp_path: Path) -> None:
    store = store_of(tmp_path, spoil=(4, 77))
    with pytest.raises(NotFiniteError) as caught:
        RemoteTable(store, nodes[:2], "l2", "auto").survey(spherical=False)
    assert (caught.value.part, caught.value.row) == (4, 77)


@pytest.mark.parametrize(
    ("device", "error", "text"),
    [
        ("cuda:1", InputError, "device is 'cuda:1'; on a cluster it must be auto, cpu or cuda"),
        ("cuda", ClusterError, r"node \S+ \(\w+\): device is 'cuda', but PyTorch finds 0 CUDA devices"),
    ],
)
def test_a_device_that_is_not_there(
    store: FeatureStore, nodes: list[Node], device: str, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        RemoteTable(store, nodes[:1], "l2", device)


def test_fewer_shards_than_nodes(nodes: list[Node], tmp_path: Path) -> None:
    store = store_of(tmp_path, sizes=(0, 120))
    table = RemoteTable(store, nodes, "l2", "auto")
    assert table.nodes == 1
    assert run(table, "l2").inertia == pytest.approx(local(store, "l2").inertia, rel=1e-4)


def test_a_lost_node_costs_one_answer(store: FeatureStore, tmp_path: Path) -> None:
    """In a process of its own: this one is connected to another cluster."""
    with cluster(nodes=2) as running:
        done = tmp_path / "done"
        script = tmp_path / "driver.py"
        script.write_text(_DRIVER)
        command = [sys.executable, str(script), running.address, str(store.path), str(done)]
        here = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(here)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True)
        assert process.stdout is not None
        first = process.stdout.readline()
        running.kill(running.added[0])
        done.touch()
        rest, _ = process.communicate(timeout=120)
    assert first == "assigned on 2\n", first + rest
    assert rest.splitlines()[-1] == "the same on 1", rest


_DRIVER = """
import sys, time
from pathlib import Path
import numpy as np
from geocentroids_fit import ray_kmeans
from geocentroids_fit.ray_kmeans import RemoteTable
from geocentroids_tiler.distributed import connected
from test_fit_ray_kmeans import store_of
store = store_of(Path(sys.argv[2]))
start = np.asarray(store.parts()[0][:30], np.float32)
with connected(sys.argv[1]) as nodes:
    table = RemoteTable(store, nodes, "l2", "auto")
    mean = table.survey(spherical=False).mean
    before, labels = table.assign(start, mean, spherical=False), table.labels()
    print("assigned on", table.nodes, flush=True)
    while not Path(sys.argv[3]).exists():
        time.sleep(0.05)
    same = (table.labels() == labels).all()
    after = table.assign(start, mean, spherical=False)
    same = same and (after.residuals == before.residuals).all() and (after.counts == before.counts).all()
    print("the same on" if same else "others on", table.nodes)
"""
