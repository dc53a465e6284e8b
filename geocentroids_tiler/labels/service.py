"""What one process shares between requests: codebooks, engines, datasets and pools of threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cachetools import LRUCache

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Classes, Codebook
from geocentroids_tiler.encoder import Encoder, encoder_source, load_encoder
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.futures import guard, then
from geocentroids_tiler.labels.once import Once
from geocentroids_tiler.labels.store import LabelStore
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    Source,
    open_dataset,
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
OPEN_THREADS = 8
"""Headers read at once. They wait for the network, not for the CPU."""
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
        known = self._opened.get(key)
        return known if known is not None and self._is_fresh(known.identity) else None


class Service:
    """Shared state behind the HTTP routes and the command line. Safe for threads and for several event loops.

    Args:
        settings: what the operator chose.
        clock: tells the time in seconds.
        load: loads the encoder of a codebook.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        load: Callable[[Codebook, Settings], Encoder] = load_codebook_encoder,
    ) -> None:
        self.settings = settings
        self._clock = clock
        self._load = load
        self._lock = threading.Lock()
        self._codebooks: dict[str, Codebook] = {}
        self._classes: LRUCache[tuple[str, int | None], Classes] = LRUCache(MAX_CUTS)
        self._engines: dict[str, Future[LabelEngine]] = {}
        self._datasets: ByteCache[_DatasetKey, _Opened] = ByteCache(
            DATASET_CACHE_BYTES, lambda opened: _dataset_bytes(opened.dataset)
        )
        self._opened: Once[_DatasetKey, _Opened] = Once(_FreshDatasets(self._datasets, self._is_fresh))
        self._identities: LRUCache[str, _Identity] = LRUCache(MAX_SOURCES)
        self.store = LabelStore(settings.label_cache_bytes)
        self._opening = ThreadPoolExecutor(OPEN_THREADS, "geocentroids-open")
        self._loading = ThreadPoolExecutor(1, "geocentroids-load")
        self.drawing = ThreadPoolExecutor(WORK_THREADS, "geocentroids-draw")
        self.working = ThreadPoolExecutor(WORK_THREADS, "geocentroids-work")
        self.exporting = ThreadPoolExecutor(WORK_THREADS, "geocentroids-export")

    def close(self) -> None:
        """Finish what runs and end all threads."""
        for pool in (self._opening, self._loading, self.exporting, self.working, self.drawing):
            pool.shutdown(cancel_futures=True)
        for future in self._engines.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()

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

    def dataset(self, url: str, options: ReadOptions, codebook: Codebook) -> Future[Dataset]:
        """Return a dataset, opened or known.

        Its source is asked again whether it changed when ``source_ttl_s`` has passed.

        Raises:
            SourceRefusedError: if the policy forbids the URL.
            SourceUnavailableError: if a local file does not exist.
        """
        source = resolve_source(url, self.settings.root)
        key = (source.url, options, codebook.digest)

        def open_or_confirm() -> _Opened:
            identity = self._identity(source)
            known = self._datasets.get(key)
            if known is not None and known.identity.text == identity.text:
                return _Opened(known.dataset, identity)
            timeout_s = self.settings.source_timeout_s
            return _Opened(open_dataset(source, identity.text, options, codebook, timeout_s), identity)

        def start(future: Future[_Opened]) -> None:
            self._opening.submit(open_or_confirm).add_done_callback(guard(future, future.set_result))

        return then(self._opened.get(key, start), lambda opened: opened.dataset)

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
            asked_at = self._clock()
            known = _Identity(source_identity(source, self.settings.source_timeout_s), asked_at)
            with self._lock:
                self._identities[source.url] = known
        return known

    def _is_fresh(self, identity: _Identity) -> bool:
        return self._clock() - identity.asked_at < self.settings.source_ttl_s

    def _load_engine(self, codebook: Codebook) -> LabelEngine:
        settings = self.settings
        encoder = self._load(codebook, settings)
        engine = LabelEngine(
            codebook,
            encoder,
            self.store,
            read_threads=settings.read_threads,
            token_cache_bytes=settings.token_cache_bytes,
        )
        logger.info("codebook %s on %s: %.4f s per chunk", codebook.name, encoder.info, engine.seconds_per_chunk)
        return engine


def _dataset_bytes(dataset: Dataset) -> int:
    return 4096 + sum(collar.inside.nbytes + collar.near.nbytes for collar in dataset.collars)
