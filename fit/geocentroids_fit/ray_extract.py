"""Features on a Ray cluster: an encoder on each GPU or node, given images one by one; the books stay here."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geocentroids_fit.extract import CHUNKS_PER_BATCH, Extraction
from geocentroids_fit.files import read_json
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.ledger import SETTINGS_FILE, Ledger
from geocentroids_fit.node_encoder import (
    IMAGES_AT_ONCE,
    EncoderRecipe,
    Failed,
    LeftOut,
    NodeEncoder,
    Outcome,
    ReaderLost,
    Sampled,
    SampleJob,
    Unseen,
)
from geocentroids_fit.shards import FeatureSettings
from geocentroids_fit.stream import layout_of
from geocentroids_tiler.codebook import ENCODER_FILE
from geocentroids_tiler.distributed import Node, alive_nodes, import_ray, on_node
from geocentroids_tiler.errors import ClusterError, GeocentroidsError, InputError

STORE_SHARE = 0.5
"""Of a node's object store that windows and features may fill; Ray begins to write to disk at 0.8."""
LOAD_S = 600.0
"""How long the nodes may take to load the encoder; a model of the hub may have to be fetched first."""
LOOK_S = 5.0
"""How often new nodes are looked for."""
NO_NODE_S = 60.0
"""How long a run without any encoder waits for a node."""
MAX_ATTEMPTS = 3
"""How often an image is tried whose processes end, before it is left out."""
MAX_STARTS = 2
"""How often an encoder is started in vain on a node."""


@dataclass(frozen=True)
class Team:
    """What an extraction on a cluster needs to start an encoder.

    Attributes:
        recipe: which encoder.
        onnx: reference to the content of ``encoder.onnx``, None if the encoder is found by its name.
        onnx_bytes: length of that.
        on_gpus: whether encoders are started on GPUs, one on each; else on nodes.
    """

    recipe: EncoderRecipe
    onnx: Any
    onnx_bytes: int
    on_gpus: bool


@dataclass(eq=False)
class Worker:
    """An encoder on a node; ``images`` are those it works on."""

    node: Node
    actor: Any
    loading: Any
    images: list[str] = field(default_factory=list)
    ready: bool = False


def make_team(recipe: EncoderRecipe, folder: Path, nodes: Sequence[Node]) -> Team:
    """Put the encoder into the object store, from where each node fetches it once.

    Args:
        recipe: which encoder.
        folder: of ``encoder.onnx``, if it is one that the codebook carries.
        nodes: of the cluster.
    """
    on_gpus = any(node.gpus >= 1 for node in nodes)
    if recipe.section.source != ENCODER_FILE:
        return Team(recipe, None, 0, on_gpus)
    content = (folder / ENCODER_FILE).read_bytes()
    return Team(recipe, import_ray().put(content), len(content), on_gpus)


def start_workers(team: Team, nodes: Sequence[Node], out: Path) -> tuple[list[Worker], str]:
    """Start an encoder on each GPU or node and wait until all are loaded.

    Args:
        team: how.
        nodes: of the cluster.
        out: folder of features, which may hold some already.

    Returns:
        The workers, and backend, provider and precision of their encoders.

    Raises:
        ClusterError: if no node can have one, one cannot be loaded, or they would not all compute the same tokens.
    """
    ray = import_ray()
    workers = [_start(team, node) for node in nodes for _ in range(_places(team, node))]
    if not workers:
        raise ClusterError(
            f"none of the {len(nodes)} nodes offers a CPU to read images with; start one with --num-cpus"
        )
    found = []
    deadline = time.monotonic() + LOAD_S
    for worker in workers:
        try:
            device = ray.get(worker.loading, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError as error:
            what = "a GPU is not free" if team.on_gpus else "it does not answer"
            raise ClusterError(f"node {worker.node} has not loaded the encoder in {LOAD_S:.0f} s: {what}") from error
        except ray.exceptions.RayError as error:
            raise ClusterError(f"node {worker.node} cannot run an encoder: {type(error).__name__}") from error
        if isinstance(device, Failed):
            raise ClusterError(f"node {worker.node} cannot load the encoder: {device.reason}")
        worker.ready = True
        found.append(device)
    for worker, device in zip(workers, found, strict=True):
        if device != found[0]:
            raise ClusterError(
                f"node {worker.node} computes with {device}, node {workers[0].node} with {found[0]}; features must "
                "come from one kind of device: set encoder.provider and encoder.precision, or leave nodes out"
            )
    kept = (read_json(out / SETTINGS_FILE) or {}).get("device", found[0])
    if kept != found[0]:
        raise ClusterError(
            f"node {workers[0].node} computes with {found[0]}, but {out} holds features computed with {kept}; "
            "name another work folder, or remove this one"
        )
    return workers, found[0]


def extract_on_nodes(
    images: ImageFolder,
    team: Team,
    workers: list[Worker],
    settings: FeatureSettings,
    out: Path,
    *,
    readers: int = 2,
    progress: bool = True,
) -> Extraction:
    """Compute features of images as ``extract`` does, to the same files, on the nodes of a cluster.

    A node that is lost costs the images it was at, which others take; nodes that join are made use of.

    Args:
        images: what to sample; local ones are read by the nodes, under the same path.
        team: how further workers are started.
        workers: encoders, from ``start_workers``.
        settings: what the features depend on; kept in the manifest.
        out: the directory.
        readers: batches that an encoder has read at the same time, where its node has CPUs for it.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``out`` holds features of other settings, no patch has data, or there is no room.
        ClusterError: if a node does not see a local image, its object store is too small, or no node is left.
    """
    ledger = Ledger(images, settings, out)
    with ThreadPoolExecutor(readers, "geocentroids-read") as pool:
        ledger.find_finished(pool)
    run = _Run(images, team, workers, settings, ledger, readers)
    began = time.perf_counter()
    with ledger.bar(progress):
        run.all()
    took_s = max(time.perf_counter() - began, 1e-9)
    busy = run.encoding_s / took_s / max(run.most_workers, 1)
    return Extraction(ledger.close(), ledger.reused, busy, ledger.computed / took_s)


class _Run:
    """Images to do, and the workers that do them."""

    def __init__(
        self,
        images: ImageFolder,
        team: Team,
        workers: list[Worker],
        settings: FeatureSettings,
        ledger: Ledger,
        readers: int,
    ) -> None:
        self._images, self._team, self._workers = images, team, workers
        self._settings, self._ledger, self._readers = settings, ledger, readers
        self._stores = _store_bytes()
        self._jobs = {worker.node.id: self._job(worker.node) for worker in workers}
        self._queue = deque(ledger.pending)
        self._under_way: dict[Any, tuple[Worker, str | None]] = {}
        """Workers and what each is at: an image, or None for loading its encoder."""
        self._attempts: Counter[str] = Counter()
        self._starts: Counter[str] = Counter()
        self._looked = time.monotonic()
        self.encoding_s = 0.0
        self.most_workers = len(workers)

    def all(self) -> None:
        """Do all images."""
        ray = import_ray()
        idle_since = time.monotonic()
        while self._queue or any(name is not None for _, name in self._under_way.values()):
            self._look_for_nodes()
            self._hand_out()
            if not self._under_way:
                if time.monotonic() - idle_since > NO_NODE_S:
                    raise ClusterError(
                        f"no node is left that can compute features; {len(self._queue)} images are still to do: "
                        "start nodes and run the same command again, finished work is kept"
                    )
                time.sleep(LOOK_S / 10)
                continue
            idle_since = time.monotonic()
            done, _ = ray.wait(list(self._under_way), num_returns=1, timeout=LOOK_S, fetch_local=False)
            for reference in done:
                self._settle(reference)

    def _hand_out(self) -> None:
        """Give images to workers that have room, those with least to do first."""
        while self._queue:
            name = self._queue[0]
            able = [worker for worker in self._workers if worker.ready and self._has_room(worker, name)]
            if not able:
                return
            self._queue.popleft()
            try:
                source = self._images.source(name)
                identity = self._images.identity(name) if source.path is not None else None
            except GeocentroidsError as error:  # it has gone since
                self._ledger.skip(name, str(error))
                continue
            worker = min(able, key=lambda worker: len(worker.images))
            worker.images.append(name)
            reference = worker.actor.sample.remote(name, identity, self._jobs[worker.node.id])
            self._under_way[reference] = worker, name

    def _has_room(self, worker: Worker, name: str) -> bool:
        """Say whether a worker can take an image; one that may have ended a worker before is alone with the next."""
        if any(self._attempts[other] for other in (name, *worker.images)):
            return not worker.images
        return len(worker.images) < IMAGES_AT_ONCE

    def _settle(self, reference: Any) -> None:
        """Take what a worker has done."""
        ray = import_ray()
        worker, name = self._under_way.pop(reference)
        if name is not None:
            worker.images.remove(name)
        try:
            outcome = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise ClusterError(f"node {worker.node}: {error.cause!r}") from error
        except ray.exceptions.RayError as error:
            self._lost(worker)
            if name is not None:
                self._try_again(name, type(error).__name__, blameless=not _is_alive(worker.node))
            return
        if name is None:
            self._loaded(worker, outcome)
        else:
            self._take(worker, name, outcome)

    def _take(self, worker: Worker, name: str, outcome: Outcome) -> None:
        """Take the outcome of an image."""
        expected = self._settings.per_image
        if isinstance(outcome, Sampled):
            self._ledger.write(name, outcome.identity, outcome.bounds, outcome.features)
            self._ledger.advance(expected)
            self._ledger.advance(len(outcome.features) - expected, expected=True)
            self.encoding_s += outcome.encoding_s
        elif isinstance(outcome, LeftOut):
            self._ledger.skip(name, outcome.reason)
        elif isinstance(outcome, ReaderLost):
            self._try_again(name, outcome.reason, blameless=not _is_alive(worker.node))
        elif isinstance(outcome, Unseen):
            self._unseen(worker, name, outcome)
        else:
            raise InputError(outcome.reason)

    def _unseen(self, worker: Worker, name: str, outcome: Unseen) -> None:
        """Do an image again that has changed since; else raise ClusterError: the node has other files."""
        try:
            path, identity = self._images.source(name).path, self._images.identity(name)
        except GeocentroidsError as error:
            self._ledger.skip(name, str(error))
            return
        if identity == outcome.found:
            self._queue.append(name)
            return
        raise ClusterError(
            f"node {worker.node} sees {outcome.found} at {path}, this machine sees {identity} (time of the last change "
            "in ns, and bytes); put the images where all nodes see them under the same path"
        )

    def _try_again(self, name: str, reason: str, *, blameless: bool) -> None:
        """Put an image whose processes ended back into the queue, or leave it out if that has happened too often."""
        if not blameless:
            self._attempts[name] += 1
        if self._attempts[name] < MAX_ATTEMPTS:
            self._queue.append(name)
        else:
            self._ledger.skip(name, f"processes that worked on it ended {MAX_ATTEMPTS} times ({reason})")

    def _lost(self, worker: Worker) -> None:
        """Do without a worker; its other images come back as they are settled."""
        if worker in self._workers:
            self._workers.remove(worker)
            self._starts[worker.node.id] += not worker.ready
            self._looked = 0.0  # another may be started at once

    def _loaded(self, worker: Worker, device: str | Failed) -> None:
        """Take on a worker that has loaded its encoder, if its tokens would be the same."""
        if device != self._settings.device:
            self._starts[worker.node.id] = MAX_STARTS
            self._workers.remove(worker)
            return
        worker.ready = True
        ready = sum(worker.ready for worker in self._workers)
        self.most_workers = max(self.most_workers, ready)

    def _look_for_nodes(self) -> None:
        """Start workers on nodes that have joined, and in place of those that were lost."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        have = Counter(worker.node.id for worker in self._workers)
        nodes = alive_nodes()
        self._stores = _store_bytes()  # afterwards: it has all of them
        for node in nodes:
            for _ in range(_places(self._team, node) - have[node.id]):
                if self._starts[node.id] < MAX_STARTS:
                    self._start_on(node)

    def _start_on(self, node: Node) -> None:
        """Start a worker on a node, which is told of its images once its encoder is loaded."""
        try:
            self._jobs[node.id] = self._job(node)
        except ClusterError:  # its object store is too small; the run goes on with the others
            self._starts[node.id] = MAX_STARTS
            return
        worker = _start(self._team, node)
        self._workers.append(worker)
        self._under_way[worker.loading] = worker, None

    def _job(self, node: Node) -> SampleJob:
        """Return what the encoders of a node are told, so that all they read ahead fits its object store."""
        return make_job(
            self._images,
            self._settings,
            self._readers,
            node,
            (STORE_SHARE * self._stores[node.id] - self._team.onnx_bytes) / _places(self._team, node),
        )


def make_job(images: ImageFolder, settings: FeatureSettings, readers: int, node: Node, room_bytes: float) -> SampleJob:
    """Return a job whose windows and features fit the object store.

    Each image that an encoder works on has ``batches`` batches read ahead, one that is encoded, and its features at the
    end. A batch is at most ``chunks`` chunks and all the windows that cover them.

    Args:
        images: where images lie.
        settings: what features depend on.
        readers: batches that are read at the same time, and one more waits.
        node: for the message.
        room_bytes: room for one encoder.

    Raises:
        ClusterError: if there is no room for a chunk.
    """
    pre, section = settings.preprocess, settings.encoder
    chunk_bytes = len(layout_of(settings).parts) * 3 * (pre.window_patches * section.patch_px) ** 2
    feature_bytes = settings.per_image * (2 * section.dim + 3 + 16)
    room = room_bytes / IMAGES_AT_ONCE - feature_bytes
    for batches in range(readers + 1, 0, -1):
        chunks = min(CHUNKS_PER_BATCH, int(room / ((batches + 1) * chunk_bytes)))
        if chunks >= 1:
            folder = None if images.folder is None else images.folder.resolve()
            return SampleJob(settings, folder, images.options, batches, chunks)
    needed = IMAGES_AT_ONCE * (2 * chunk_bytes + feature_bytes)
    raise ClusterError(
        f"node {node} has room for {max(room_bytes, 0) / 2**20:.0f} MiB of an encoder's windows and features in its "
        f"object store, and {needed / 2**20:.0f} MiB are needed; start it with a larger --object-store-memory"
    )


def _start(team: Team, node: Node) -> Worker:
    """Start an encoder on a node; it takes a GPU, or no CPU: those are for the tasks that read."""
    ray = import_ray()
    actor_class = ray.remote(num_cpus=0, num_gpus=int(team.on_gpus), max_concurrency=IMAGES_AT_ONCE)(NodeEncoder)
    actor = actor_class.options(scheduling_strategy=on_node(node)).remote()
    return Worker(node, actor, actor.load.remote(team.recipe, team.onnx))


def _places(team: Team, node: Node) -> int:
    """Return how many encoders a node can have: one for each GPU, or one; none where nothing could read."""
    if node.cpus < 1:
        return 0
    return int(node.gpus) if team.on_gpus else 1


def _is_alive(node: Node) -> bool:
    return any(node.id == alive.id for alive in alive_nodes())


def _store_bytes() -> dict[str, float]:
    """Return the size of each node's object store."""
    return {node["NodeID"]: float(node["Resources"].get("object_store_memory", 0)) for node in import_ray().nodes()}
