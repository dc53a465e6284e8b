"""A Ray cluster that labels the images of a list: a worker for each GPU, or for each node where there are none.

Images are handed out one after the other, the largest first, two to a worker, and come back as files' contents. What a
worker that ends had in hand is given to others.
"""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from geocentroids_tiler.bulk.folder import Failure
from geocentroids_tiler.bulk.items import labels_name
from geocentroids_tiler.bulk.labelling import Labelled, Task
from geocentroids_tiler.bulk.ray_actor import Introduction, RayWorker, Result, codebook_digest
from geocentroids_tiler.bulk.workers import AT_ONCE, Progress
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.distributed import Node, alive_nodes, check_agreement, connected, import_ray, on_node
from geocentroids_tiler.errors import ClusterError
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions

START_S = 600.0
"""How long a worker may take to start and to load its encoder."""
POLL_S = 0.5
"""How often workers are asked how far they are."""
RECRUIT_EVERY_S = 2.0
"""How often it is looked whether a node came, or could have a new worker in place of one that ended."""
ALONE_S = 60.0
"""How long the run goes on without any worker."""
MAX_TRIES = 3
"""Workers that may end while they have an image, before it is listed as failed: it may be what ends them."""
MAX_ENDS = 5
"""Workers that may end at one place before it gets no other."""
_PASSED_ON = frozenset(
    {
        "codebooks_dir",
        "backend",
        "provider",
        "device",
        "precision",
        "threads",
        "batch_windows",
        "read_threads",
        "label_cache_bytes",
        "token_cache_bytes",
        "failure_ttl_s",
    }
)
"""Settings that workers get from the driver, beside those of sources; no secret is among either."""


Tell = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker may be: the n-th GPU of a node, or a node without any."""

    node: Node
    number: int
    on_gpu: bool

    def __str__(self) -> str:
        return f"node {self.node}" + (f", GPU {self.number}" if self.on_gpu else "")


@dataclass(eq=False)
class _Worker:
    """A worker; ``alone``: it is to have no other image beside the one that it has."""

    place: Place
    actor: Any
    usable: bool = True
    alone: bool = False
    tasks: dict[Any, Task] = field(default_factory=dict)


@contextmanager
def ray_workers(
    address: str,
    codebook: Codebook,
    settings: Settings,
    options: ReadOptions,
    classes: int | None,
    tell: Tell = lambda text: None,
) -> Iterator[RayWorkers]:
    """Connect to a cluster and start workers on it, for the length of a ``with`` block.

    Args:
        address: of the cluster, as ``connected`` takes it.
        codebook: whose labels.
        settings: what the operator chose; those of sources and encoders are passed on.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
        tell: told of workers that end and come.

    Raises:
        InputError: if Ray is not installed or the address is none.
        ClusterError: if there is no cluster, or its nodes do not agree with each other or with this machine.
    """
    name = _name_on_nodes(codebook, settings)
    with connected(address, passed_on(settings)) as nodes:
        check_agreement(nodes, f"codebook {codebook.name!r} with digest", codebook_digest, name)
        workers = RayWorkers(name, options, classes, tell)
        try:
            workers.start(nodes)
            yield workers
        finally:
            workers.close()


class RayWorkers:
    """Workers on the nodes of a cluster that this process is connected to.

    Attributes:
        device_name: what computes labels, the same everywhere.
    """

    def __init__(
        self, codebook: str, options: ReadOptions, classes: int | None, tell: Tell = lambda text: None
    ) -> None:
        self.device_name = ""
        self._tell = tell
        self._ray = import_ray()
        self._arguments = codebook, options, classes
        self._class = self._ray.remote(
            max_restarts=0, max_task_retries=0, concurrency_groups={"label": AT_ONCE, "tell": 1}
        )(RayWorker)
        self._workers: list[_Worker] = []
        self._starting: dict[Any, _Worker] = {}
        self._expected: Introduction | None = None
        self._ends: Counter[tuple[str, int]] = Counter()
        self._recruited_at = 0.0
        self._seen_at = time.monotonic()

    def start(self, nodes: Sequence[Node]) -> None:
        """Start a worker at each place, and wait for all.

        Raises:
            ClusterError: if one does not start, or they differ in what computes labels.
        """
        places = places_on(nodes)
        if not places:
            raise ClusterError(f"none of the {len(nodes)} nodes offers a CPU or a GPU to Ray; start one that does")
        asked = [self._begin(place) for place in places]
        self._ray.wait(asked, num_returns=len(asked), timeout=START_S)
        said: list[tuple[Place, Introduction]] = []
        for ref in asked:
            worker = self._starting.pop(ref)
            try:
                introduction = self._ray.get(ref, timeout=0)
            except self._ray.exceptions.GetTimeoutError as error:
                raise ClusterError(
                    f"{worker.place} has not started a worker within {START_S:g} s; are its CPUs or GPUs taken?"
                ) from error
            except self._ray.exceptions.RayError as error:
                raise ClusterError(f"{worker.place} cannot start a worker: {_said(error)}") from error
            said.append((worker.place, introduction))
            self._workers.append(worker)
        first, self._expected = said[0]
        self.device_name = self._expected.device
        for place, introduction in said[1:]:
            if introduction.device != self.device_name:
                raise ClusterError(
                    f"{place} computes with {introduction.device}, {first} with {self.device_name}; labels may differ "
                    "in places, so all nodes have to compute with the same; GEOCENTROIDS_BACKEND, _PROVIDER and "
                    "_PRECISION choose it"
                )

    def label(self, tasks: Sequence[Task], work: Path, progress: Progress) -> Generator[Labelled | Failure]:
        """Yield what became of each image; see ``Workers``.

        Raises:
            ClusterError: if all workers have ended and no new one could be started.
        """
        waiting = deque(sorted(tasks, key=lambda task: -task.chunks))
        again: deque[Task] = deque()
        tries: Counter[str] = Counter()
        asked: dict[Any, _Worker] = {}
        self._seen_at = time.monotonic()
        while waiting or again or any(worker.tasks for worker in self._workers):
            self._hand_out(waiting, again)
            for worker, task, result in self._finished():
                if isinstance(result, Result):
                    labels = work / labels_name(task.image.id)
                    labels.write_bytes(result.labels)
                    yield Labelled(task, labels, result.item)
                elif isinstance(result, Failure):
                    yield result
                else:
                    self._lose(worker, f"lost its worker, others take over: {_said(result)}")
                    progress(task, 0)
                    tries[task.image.id] += 1
                    if tries[task.image.id] < MAX_TRIES:
                        again.append(task)
                        continue
                    reason = f"{MAX_TRIES} workers ended while they had it, the last on {worker.place}: {_said(result)}"
                    yield Failure(task.image, reason)
            self._ask_progress(asked, progress)
            self._recruit()
            self._workers = [worker for worker in self._workers if worker.usable or worker.tasks]

    def close(self) -> None:
        """End all workers."""
        for worker in [*self._workers, *self._starting.values()]:
            self._kill(worker)

    def _hand_out(self, waiting: deque[Task], again: deque[Task]) -> None:
        """Give images to workers, first to those that have least.

        One that was lost with its worker is given to a worker that has no other: should it end that, too, it costs
        no others.
        """
        for held in range(AT_ONCE):
            for worker in self._workers:
                if not worker.usable or worker.alone or len(worker.tasks) != held:
                    continue
                if again and held == 0:
                    worker.alone = True
                    self._give(worker, again.popleft())
                elif waiting and not again:
                    self._give(worker, waiting.popleft())

    def _give(self, worker: _Worker, task: Task) -> None:
        worker.tasks[worker.actor.label.options(concurrency_group="label").remote(task)] = task

    def _finished(self) -> list[tuple[_Worker, Task, Result | Failure | Exception]]:
        """Wait a moment, and return an image that is done, or lost with its worker.

        Only one: results stay on their nodes until they are asked for, and are forgotten there once they are here.
        """
        owner = {ref: worker for worker in self._workers for ref in worker.tasks}
        if not owner:
            time.sleep(POLL_S)
            return []
        ready, _ = self._ray.wait(list(owner), num_returns=1, timeout=POLL_S, fetch_local=False)
        if not ready:
            return []
        worker = owner[ready[0]]
        task = worker.tasks.pop(ready[0])
        worker.alone = False
        try:
            return [(worker, task, self._ray.get(ready[0]))]
        except self._ray.exceptions.RayError as error:
            return [(worker, task, error)]

    def _ask_progress(self, asked: dict[Any, _Worker], progress: Progress) -> None:
        """Take answers that have come, and ask those workers again."""
        for ref in self._ready(asked):
            worker = asked.pop(ref)
            with suppress(self._ray.exceptions.RayError):  # it is found out when its images are asked for
                done = self._ray.get(ref)
                for task in worker.tasks.values():
                    progress(task, min(done.get(task.image.id, 0), task.chunks))
        for worker in set(self._workers) - set(asked.values()):
            if worker.usable and worker.tasks:
                asked[worker.actor.progress.options(concurrency_group="tell").remote()] = worker

    def _ready(self, asked: Mapping[Any, _Worker]) -> list[Any]:
        """Return the questions that are answered."""
        refs = list(asked)
        return list(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else []

    def _recruit(self) -> None:
        """Take on workers that have started, and start some where there is none.

        Raises:
            ClusterError: if there has been none for long.
        """
        for ref in self._ready(self._starting):
            worker = self._starting.pop(ref)
            try:
                found = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                self._lose(worker, f"cannot start a worker: {_said(error)}")
                continue
            if found == self._expected:
                self._workers.append(worker)
                self._tell(f"{worker.place} has a new worker")
            else:
                self._ends[_key(worker.place)] = MAX_ENDS
                self._lose(worker, f"gets no work: it is {found}, others are {self._expected}")
        now = time.monotonic()
        if any(worker.usable for worker in self._workers):
            self._seen_at = now
        elif now - self._seen_at > (START_S if self._starting else ALONE_S):
            raise ClusterError(
                "all workers of the cluster have ended; what is done is kept, and the same command goes on from there"
            )
        if now - self._recruited_at < RECRUIT_EVERY_S:
            return
        self._recruited_at = now
        taken = {_key(worker.place) for worker in [*self._workers, *self._starting.values()] if worker.usable}
        for place in places_on(alive_nodes()):
            if _key(place) not in taken and self._ends[_key(place)] < MAX_ENDS:
                self._begin(place)

    def _begin(self, place: Place) -> Any:
        """Start a worker and return what will be its introduction."""
        actor = self._class.options(
            num_cpus=0 if place.on_gpu else 1,
            num_gpus=int(place.on_gpu),
            scheduling_strategy=on_node(place.node),
            # Ray would let libraries use as many threads as the worker has reserved CPUs, here one.
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(place.node.cpus)))}},
        ).remote(*self._arguments, place.node.address)
        ref = actor.introduce.options(concurrency_group="tell").remote()
        self._starting[ref] = _Worker(place, actor)
        return ref

    def _lose(self, worker: _Worker, why: str) -> None:
        """Give a worker nothing more; its images are found out to be lost one by one."""
        if worker.usable:
            self._tell(f"{worker.place} {why}")
            worker.usable = False
            self._ends[_key(worker.place)] += 1
            self._kill(worker)

    def _kill(self, worker: _Worker) -> None:
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(worker.actor)


def places_on(nodes: Sequence[Node]) -> list[Place]:
    """Return where workers may be: one at each GPU of the cluster; where it has none, one on each node with a CPU."""
    on_gpus = [Place(node, number, True) for node in nodes for number in range(int(node.gpus))]
    return on_gpus or [Place(node, 0, False) for node in nodes if node.cpus >= 1]


def passed_on(settings: Settings) -> dict[str, str]:
    """Return the settings that workers get, as variables of their environment; what is a default here is one there."""
    variables = {}
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        if not (name in _PASSED_ON or name.startswith("source_")) or value is None or isinstance(value, SecretStr):
            continue
        plain = settings.model_dump(mode="json", include={name})[name]
        text = str(value.expanduser().resolve()) if isinstance(value, Path) else plain
        variables[f"GEOCENTROIDS_{name.upper()}"] = text if isinstance(text, str) else json.dumps(plain)
    return variables


def _name_on_nodes(codebook: Codebook, settings: Settings) -> str:
    """Return what a codebook is found by on nodes: its name, or the whole path of its directory."""
    given = Path(settings.codebook).expanduser()
    by_path = given.is_dir() and codebook.path is not None and given.resolve() == codebook.path.resolve()
    return str(given.resolve()) if by_path else settings.codebook


def _key(place: Place) -> tuple[str, int]:
    return place.node.id, place.number


def _said(error: BaseException) -> str:
    """Return the first line of what an error says, that of the cause where Ray wraps one."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(cause).__name__
