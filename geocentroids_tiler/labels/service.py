"""What one process shares between requests: codebooks, engines, datasets and pools of threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Classes, Codebook
from geocentroids_tiler.encoder import Encoder, encoder_source, load_encoder
from geocentroids_tiler.errors import SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.futures import then
from geocentroids_tiler.labels.host_queues import HostQueues
from geocentroids_tiler.labels.job_files import JobRecord
from geocentroids_tiler.labels.jobs import Jobs
from geocentroids_tiler.labels.kept import KeptLabels
from geocentroids_tiler.labels.labeller import Labeller
from geocentroids_tiler.labels.meters import Meters
from geocentroids_tiler.labels.mosaics import Mosaics
from geocentroids_tiler.labels.once import Once, Work
from geocentroids_tiler.labels.recent_failures import RecentFailures
from geocentroids_tiler.labels.store import LabelStore
from geocentroids_tiler.labels.tiers import TierFigures, open_tiers
from geocentroids_tiler.labels.viewports import Viewports
from geocentroids_tiler.pools import full_pool
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    Remote,
    Source,
    computing_in,
    open_dataset,
    open_remote,
    resolve_source,
    source_identity,
)

logger = logging.getLogger(__name__)

DATASET_CACHE_BYTES = 128 * 2**20
"""Memory for datasets; one takes some kilobytes, with collars up to 16 MB."""
MAX_SOURCES = 4096
"""Sources whose identity is remembered."""
MAX_CUTS = 64
"""Cuts of merge trees remembered at once."""
OPEN_THREADS, OPEN_AT_ONCE = 64, 8
"""Images that are being opened, most of them waiting for the network, and those of them that compute."""
WORK_THREADS = 4
"""Tiles drawn, short pieces of work done, and exports and statistics gathered at once: a pool of threads for each,
so that a long export holds up no tile."""

_DatasetKey = tuple[str, ReadOptions, str]


def load_codebook_encoder(codebook: Codebook, settings: Settings) -> Encoder:
    """Load the encoder of a codebook.

    Raises:
        EncoderError: if it cannot be loaded or run here.
    """
    return load_encoder(
        encoder_source(codebook.manifest.encoder, codebook.manifest.preprocess, codebook.encoder_path),
        backend=settings.backend,
        provider=settings.provider,
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        batch_windows=settings.batch_windows,
    )


@contextmanager
def open_engine(codebook: Codebook, encoder: Encoder, settings: Settings) -> Iterator[LabelEngine]:
    """Yield an engine that stands by itself and keeps labels in memory; it is closed afterwards, its encoder too."""
    labeller = DeviceLabeller(codebook, encoder, token_cache_bytes=settings.token_cache_bytes)
    engine = LabelEngine(codebook, labeller, LabelStore(settings.label_cache_bytes), read_threads=settings.read_threads)
    try:
        yield engine
    finally:
        engine.close()


@dataclass(frozen=True)
class _Identity:
    text: str
    asked_at: float


@dataclass(frozen=True)
class _Opened:
    dataset: Dataset
    identity: _Identity


class _FreshDatasets:
    """Those of the datasets in memory whose source was asked not long ago."""

    def __init__(self, opened: ByteCache[_DatasetKey, _Opened], is_fresh: Callable[[_Identity], bool]) -> None:
        self._opened = opened
        self._is_fresh = is_fresh
        self.put = opened.put

    def get(self, key: _DatasetKey) -> _Opened | None:
        """Return a dataset whose source was asked not long ago, or None."""
        known = self._opened.peek(key)  # ``known_dataset`` has counted
        return known if known is not None and self._is_fresh(known.identity) else None


class Service:
    """Shared state behind the HTTP routes and the command line. Safe for threads and for several event loops.

    Args:
        settings: what the operator chose.
        clock: tells the time in seconds.
        load: loads the encoder of a codebook.
        remote: opens remote sources; made from ``settings`` if not given.
        labeller: opens what labels the chunks of a codebook; if not given, a device of this process does.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        load: Callable[[Codebook, Settings], Encoder] = load_codebook_encoder,
        remote: Remote | None = None,
        labeller: Callable[[Codebook], Labeller] | None = None,
    ) -> None:
        self.settings = settings
        self.remote = open_remote(settings) if remote is None else remote
        self.clock = clock
        self._load = load
        self._open_labeller = self._load_device if labeller is None else labeller
        self._lock = threading.Lock()
        self._codebooks: dict[str, Codebook] = {}
        self._classes: LRUCache[tuple[str, int | None], Classes] = LRUCache(MAX_CUTS)
        self._engines: dict[str, Future[LabelEngine]] = {}
        self._datasets: ByteCache[_DatasetKey, _Opened] = ByteCache(
            DATASET_CACHE_BYTES, lambda opened: _dataset_bytes(opened.dataset)
        )
        self._opened: Once[_DatasetKey, _Opened] = Once(_FreshDatasets(self._datasets, self._is_fresh))
        self._failures = RecentFailures(settings.failure_ttl_s)
        self._identities: LRUCache[str, _Identity] = LRUCache(MAX_SOURCES)
        self.mosaics = Mosaics(settings, self.source, self.dataset, clock)
        self.store = LabelStore(settings.label_cache_bytes)
        self.caches: dict[str, ByteCache[Any, Any]] = {
            "labels": self.store,
            "datasets": self._datasets,
            "mosaics": self.mosaics.cache,
        }
        self.tier = open_tiers(settings)
        self.meters = Meters()
        self.closing = threading.Event()
        """Set when the service ends; what takes long looks at it."""
        self.viewports = Viewports()
        self.kept: KeptLabels | None = None
        self.jobs: Jobs | None = None
        if settings.labels_dir is not None:
            self.kept = KeptLabels(settings.labels_dir, settings.label_files_bytes, clock)
            self.jobs = Jobs(self.kept, self._open_job, settings.max_jobs)
        self._opening = full_pool(OPEN_THREADS, "geocentroids-open")
        self._may_compute = threading.Semaphore(OPEN_AT_ONCE)
        self._by_host = HostQueues(self._opening, settings.source_connections)
        self._loading = ThreadPoolExecutor(1, "geocentroids-load")
        self.drawing = ThreadPoolExecutor(WORK_THREADS, "geocentroids-draw")
        self.working = ThreadPoolExecutor(WORK_THREADS, "geocentroids-work")
        self.exporting = ThreadPoolExecutor(WORK_THREADS, "geocentroids-export")

    def close(self) -> None:
        """Finish what runs, but exports, and end all threads."""
        self.closing.set()
        if self.jobs is not None:
            self.jobs.close()
        self.mosaics.close()
        for pool in (self._opening, self._loading, self.exporting, self.working, self.drawing):
            pool.shutdown(cancel_futures=True)
        for future in self._engines.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
        if self.tier is not None:
            self.tier.close()
        self.remote.close()

    def codebook(self, name: str | None) -> Codebook:
        """Return a codebook by name, None for the default.

        Raises:
            CodebookNotFoundError: if it is not installed.
            CodebookError: if it is broken.
        """
        name = name or self.settings.codebook
        with self._lock:
            known = self._codebooks.get(name)
        if known is None:
            known = find_codebook(name, self.settings.codebooks_dir, allow_path=name == self.settings.codebook)
            with self._lock:
                known = self._codebooks.setdefault(name, known)
        return known

    def known_codebook(self, name: str | None) -> Codebook | None:
        """Return a codebook that was loaded already, or None."""
        with self._lock:
            return self._codebooks.get(name or self.settings.codebook)

    def classes(self, codebook: Codebook, n: int | None) -> Classes:
        """Return the classes of a codebook; see ``Codebook.classes``.

        Raises:
            InputError: if ``n`` is out of range or the codebook has no merge tree.
        """
        known = self.known_classes(codebook, n)
        if known is None:
            known = codebook.classes(n)
            with self._lock:
                self._classes[codebook.digest, n] = known
        return known

    def known_classes(self, codebook: Codebook, n: int | None) -> Classes | None:
        """Return the classes of a codebook that were looked up already, or None."""
        with self._lock:
            return self._classes.get((codebook.digest, n))

    def engine(self, codebook: Codebook) -> Future[LabelEngine]:
        """Return the engine of a codebook, loading its encoder once; a failed load is tried again when next asked."""
        with self._lock:
            future = self._engines.get(codebook.digest)
            if future is None or (future.done() and future.exception() is not None):
                future = self._engines[codebook.digest] = self._loading.submit(self._load_engine, codebook)
            return future

    def loaded(self, codebook: Codebook) -> bool:
        """Tell whether the engine of a codebook is ready, without loading it."""
        with self._lock:
            future = self._engines.get(codebook.digest)
        return future is not None and future.done() and future.exception() is None

    def load_failure(self, codebook: Codebook) -> BaseException | None:
        """Return why the last attempt to load the engine of a codebook failed, or None."""
        with self._lock:
            future = self._engines.get(codebook.digest)
        return future.exception() if future is not None and future.done() else None

    def engines(self) -> list[LabelEngine]:
        """Return the engines that are ready."""
        with self._lock:
            futures = list(self._engines.values())
        return [future.result() for future in futures if future.done() and future.exception() is None]

    def stores(self) -> list[TierFigures]:
        """Return what the stores of labels below the memory did, in the order they are asked."""
        return [] if self.tier is None else self.tier.figures()

    def dataset(self, url: str, options: ReadOptions, codebook: Codebook) -> Future[Dataset]:
        """Return a dataset, opened or known.

        Its source is asked again whether it changed when ``source_ttl_s`` has passed.

        Raises:
            SourceRefusedError: if the policy forbids the URL.
            SourceUnavailableError: if a local file does not exist.
        """
        source = self.source(url)
        key = (source.url, options, codebook.digest)
        self._failures.check(key, self.clock())

        def open_or_confirm() -> _Opened:
            try:
                with self._may_compute, computing_in(self._may_compute.release, self._may_compute.acquire):
                    return open_or_confirm_now()
            except (SourceUnavailableError, UnsupportedImageError) as error:
                self._failures.remember(key, error, self.clock())
                raise

        def open_or_confirm_now() -> _Opened:
            identity = self._identity(source)
            known = self._datasets.peek(key)
            if known is not None and known.identity.text == identity.text:
                return _Opened(known.dataset, identity)
            return _Opened(open_dataset(source, identity.text, options, codebook), identity)

        def start(work: Work[_Opened]) -> None:
            opening = self._by_host.submit(source.host, open_or_confirm)
            opening.add_done_callback(lambda done: work.go_on(lambda: work.finish(done.result())))

        return then(self._opened.get(key, start), lambda opened: opened.dataset)

    def known_dataset(self, url: str, options: ReadOptions, codebook: Codebook) -> Dataset | None:
        """Return a dataset that is in memory and was asked not long ago whether it changed, or None."""
        known = self._datasets.get((url, options, codebook.digest))
        return known.dataset if known is not None and self._is_fresh(known.identity) else None

    def fresh_until(self, dataset: Dataset) -> float | None:
        """Return when, by this service's clock, a dataset's source has to be asked again; None if it was not kept."""
        with self._lock:
            known = self._identities.get(dataset.source.url)
        if known is None or known.text != dataset.identity:
            return None
        return known.asked_at + self.settings.source_ttl_s

    def source(self, url: str) -> Source:
        """Return a source that may be opened; see ``resolve_source``."""
        return resolve_source(url, self.settings.root, self.remote)

    def identity(self, source: Source) -> str:
        """Return what changes when a source's content does, asked at most every ``source_ttl_s``.

        Raises:
            SourceUnavailableError: if the source does not answer.
        """
        return self._identity(source).text

    def _identity(self, source: Source) -> _Identity:
        with self._lock:
            known = self._identities.get(source.url)
        if known is None or not self._is_fresh(known):
            asked_at = self.clock()
            known = _Identity(source_identity(source), asked_at)
            with self._lock:
                self._identities[source.url] = known
        return known

    def _is_fresh(self, identity: _Identity) -> bool:
        fresh = self.clock() - identity.asked_at < self.settings.source_ttl_s
        return fresh and not self.remote.is_outdated(identity.text)

    def _open_job(self, job: JobRecord) -> tuple[Dataset, LabelEngine]:
        """Open what a job is to label, with what labels it."""
        codebook = self.codebook(job.codebook)
        dataset = self.dataset(job.url, ReadOptions(job.bidx, job.rescale), codebook)
        return dataset.result(), self.engine(codebook).result()

    def _load_engine(self, codebook: Codebook) -> LabelEngine:
        settings = self.settings
        labeller = self._open_labeller(codebook)
        engine = LabelEngine(
            codebook,
            labeller,
            self.store,
            read_threads=settings.read_threads,
            queue_windows=settings.queue_windows,
            host_batches=settings.source_connections,
            next_rank=self.viewports.next,
            meters=self.meters,
            tier=self.tier,
        )
        logger.info("codebook %s on %s: %.4f s per chunk", codebook.name, engine.device, engine.seconds_per_chunk)
        return engine

    def _load_device(self, codebook: Codebook) -> Labeller:
        """Load the encoder of a codebook into this process."""
        encoder = self._load(codebook, self.settings)
        try:
            return DeviceLabeller(
                codebook, encoder, token_cache_bytes=self.settings.token_cache_bytes, meters=self.meters
            )
        except BaseException:
            encoder.close()
            raise


def _dataset_bytes(dataset: Dataset) -> int:
    return 4096 + sum(collar.inside.nbytes + collar.near.nbytes for collar in dataset.collars)
