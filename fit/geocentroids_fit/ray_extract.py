"""Features on a Ray cluster: an encoder on each GPU or node, given images one by one; the books stay here."""

from __future__ import annotations

import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from geocentroids_fit.extract import Extraction
from geocentroids_fit.images import ImageFolder
from geocentroids_fit.ledger import Ledger
from geocentroids_fit.node_encoder import (
    IMAGES_AT_ONCE,
    Failed,
    LeftOut,
    Outcome,
    ReaderLost,
    Sampled,
    SampleJob,
    Unseen,
)
from geocentroids_fit.ray_encoders import STORE_SHARE, Team, Worker, make_job, places_on, start_worker, store_bytes
from geocentroids_fit.shards import FeatureSettings
from geocentroids_tiler.distributed import Node, alive_nodes, import_ray
from geocentroids_tiler.errors import ClusterError, GeocentroidsError, InputError

LOOK_S = 5.0
"""How often new nodes are looked for."""
NO_NODE_S = 60.0
"""How long a run without any encoder waits for a node."""
MAX_ATTEMPTS = 3
"""How often an image is tried whose processes end, before it is left out."""
MAX_STARTS = 2
"""How often an encoder is started in vain on a node."""


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
        self._stores = store_bytes()
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
        self._stores = store_bytes()  # afterwards: it has all of them
        for node in nodes:
            for _ in range(places_on(self._team, node) - have[node.id]):
                if self._starts[node.id] < MAX_STARTS:
                    self._start_on(node)

    def _start_on(self, node: Node) -> None:
        """Start a worker on a node, which is told of its images once its encoder is loaded."""
        try:
            self._jobs[node.id] = self._job(node)
        except ClusterError:  # its object store is too small; the run goes on with the others
            self._starts[node.id] = MAX_STARTS
            return
        worker = start_worker(self._team, node)
        self._workers.append(worker)
        self._under_way[worker.loading] = worker, None

    def _job(self, node: Node) -> SampleJob:
        """Return what the encoders of a node are told, so that all they read ahead fits its object store."""
        return make_job(
            self._images,
            self._settings,
            self._readers,
            node,
            (STORE_SHARE * self._stores[node.id] - self._team.onnx_bytes) / places_on(self._team, node),
        )


def _is_alive(node: Node) -> bool:
    return any(node.id == alive.id for alive in alive_nodes())
