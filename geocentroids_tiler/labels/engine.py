"""From wanted patches to labels: windows are read, encoded, blended and assigned, each once however many want them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo
from geocentroids_tiler.errors import BusyError
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.labels.batching import BACKGROUND, BatchQueue, Lane, Rank
from geocentroids_tiler.labels.labeller import ChunkJob, DeviceFigures, Labeller, WindowKey, device_name
from geocentroids_tiler.labels.meters import Meters, timed
from geocentroids_tiler.labels.once import Claim, Lru, Once, Work
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels, LabelStore
from geocentroids_tiler.labels.viewports import Viewports
from geocentroids_tiler.source import CellCache, Dataset, WindowPixels, iterate_windows

if TYPE_CHECKING:
    from geocentroids_tiler.labels.tiers import TierChain

logger = logging.getLogger(__name__)

READ_BATCH = 16
"""Windows read through one opening of a file: opening costs as much as reading a few."""
SPARE_READERS = 48
"""Threads that read while others wait for the network: so many waits, for slow servers among others, hold up nobody."""
CHUNKS_AHEAD = 128
"""Chunks that one caller keeps in the queues at once: enough to fill a device, few enough to bound memory."""
CHUNKS_BEFORE_OTHERS = 32
"""Chunks taken from memory before an event loop may turn to something else; waiting costs more than taking one."""
PIXEL_CACHE_BYTES = 64 * 2**20
"""Windows read but wanted again soon, as their own chunk's and as their neighbours'."""
CELL_CACHE_BYTES = 64 * 2**20
"""Cells of the ground that windows read soon will share."""
READ_AHEAD_RUNS, READ_AHEAD_BYTES = 8, 64 * 2**20
"""Windows that wait for the device, in runs of it and in memory; no more are read until it has taken some. What is read
too far ahead may not be wanted any more when its turn comes."""
MAX_AT_HAND = 20_000
"""Chunks of a tile below minzoom that are looked for in memory."""
LOOK_UP_BATCH = 256
"""Chunks looked up in one visit to a store outside of the process."""


@dataclass(frozen=True)
class LabelBlock:
    """Labels of a rectangle of patches.

    Attributes:
        patches: the rectangle.
        labels: of shape ``patches.shape``, uint16; 65535 where there is no data.
        similarity: of shape ``patches.shape``, float32; NaN where there is no data.
    """

    patches: PatchRange
    labels: NDArray[np.uint16]
    similarity: NDArray[np.float32]

    @classmethod
    def empty(cls, patches: PatchRange) -> LabelBlock:
        """Return a block without data."""
        return cls(patches, np.full(patches.shape, NODATA_LABEL, np.uint16), np.full(patches.shape, np.nan, np.float32))

    def paste(self, index: ChunkIndex, chunk: ChunkLabels) -> None:
        """Write the part of a chunk that lies inside into this block."""
        whole = index.patches(len(chunk.labels))
        part = whole.intersect(self.patches)
        target, source = part.within(self.patches), part.within(whole)
        self.labels[target] = chunk.labels[source]
        self.similarity[target] = chunk.similarity[source]


@dataclass(frozen=True)
class _WindowJob:
    dataset: Dataset
    index: ChunkIndex


class LabelEngine:
    """Computes and keeps the labels of one codebook. Safe for threads.

    Readers take windows from files, several through one opening; a labeller takes them from there, wherever its device
    is. What nobody waits for any more is not computed.
    """

    def __init__(
        self,
        codebook: Codebook,
        labeller: Labeller,
        store: LabelStore,
        *,
        read_threads: int,
        queue_windows: int = sys.maxsize,
        host_batches: int = sys.maxsize,
        next_rank: Callable[[], Rank] | None = None,
        meters: Meters | None = None,
        tier: TierChain | None = None,
    ) -> None:
        """Start the threads.

        Args:
            codebook: whose labels.
            labeller: labels the codebook's chunks; it is closed with the engine.
            store: keeps labels in memory.
            read_threads: threads that read windows at once, those that wait for the network not counted.
            queue_windows: with as many windows waiting, requests that need more are refused.
            host_batches: batches of windows read from one host at once.
            next_rank: returns the rank of the newest request, higher than all before; None: counts them itself.
            meters: count and time what is done; None: for nobody.
            tier: keeps labels outside of the process.
        """
        pre = codebook.manifest.preprocess
        self.codebook = codebook
        self.layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        self._patch_px = codebook.manifest.encoder.patch_px
        self.labeller = labeller
        self.device_name = device_name(labeller.device)
        self.seconds_per_chunk = labeller.seconds_per_chunk
        self._meters = Meters() if meters is None else meters
        self._tier = tier
        self._store = store
        self._queue_windows = queue_windows
        self._next_rank = Viewports().next if next_rank is None else next_rank
        window_bytes = 3 * (pre.window_patches * self._patch_px) ** 2
        self._cells = CellCache(CELL_CACHE_BYTES)
        lock = labeller.lock
        self._chunks: Once[ChunkKey, ChunkLabels] = Once(store, lock)
        self._pixels: Once[WindowKey, WindowPixels] = Once(Lru(PIXEL_CACHE_BYTES // window_bytes), lock)
        self._read: Lane[_WindowJob, WindowPixels] = Lane(
            self._read_batch,
            lambda: READ_BATCH,
            group_of=lambda job: job.dataset.key,
            owner_of=lambda job: job.dataset.source.host,
        )
        self._look_up: Lane[ChunkKey, ChunkLabels | None] = Lane(self._look_up_batch, lambda: LOOK_UP_BATCH)
        self._keep: Lane[tuple[ChunkKey, ChunkLabels], None] = Lane(self._keep_batch, lambda: LOOK_UP_BATCH)
        at_once = labeller.windows_at_once
        self._read_ahead = max(2 * at_once, min(READ_AHEAD_RUNS * at_once, READ_AHEAD_BYTES // window_bytes))
        self._reading = BatchQueue(
            "geocentroids-read",
            read_threads,
            spare_threads=SPARE_READERS,
            owner_batches=host_batches,
            may_take=lambda: labeller.queued < self._read_ahead,
        )
        labeller.when_shorter(self._reading.wake)
        self._storing = None if tier is None else BatchQueue("geocentroids-store", 1)

    @property
    def windows_to_read(self) -> int:
        """Windows that wait to be read."""
        return len(self._reading)

    @property
    def device(self) -> DeviceInfo:
        """What computes."""
        return self.labeller.device

    @property
    def windows_waiting(self) -> int:
        """Windows that are wanted and not encoded yet, whether read or not."""
        return len(self.labeller.waiting() | self._pixels.keys())

    @property
    def device_queue(self) -> int:
        """Windows and chunks that wait for the device."""
        return self.labeller.queued

    @property
    def windows_encoded(self) -> int:
        """Windows encoded since the start."""
        return self.figures().windows_encoded

    @property
    def windows_given_up(self) -> int:
        """Windows that were asked for and not encoded, because nobody wanted them any more."""
        return self.figures().windows_given_up

    def figures(self) -> DeviceFigures:
        """Return what the device did since the start; may wait for a network."""
        return self.labeller.figures()

    def close(self) -> None:
        """Finish the chunks that were asked for, accept no others, and end the threads."""
        wait(self._chunks.close())
        self._reading.close()
        self.labeller.close()
        if self._storing is not None:
            self._storing.close()

    def claim(self, dataset: Dataset, index: ChunkIndex, rank: Rank) -> Claim[ChunkLabels]:
        """Return a share in the labels of one chunk: kept, being computed by whoever wants them too, or computed now.

        Args:
            dataset: what to label.
            index: the chunk.
            rank: ``BACKGROUND``, or the greater the more urgent.

        Raises:
            EncoderError: if it would have to be computed and the engine is closed.
        """
        key = self._key(dataset, index)

        def start(work: Work[ChunkLabels]) -> None:
            if self._storing is None:
                self._compute(dataset, index, work)
                return

            def found(chunk: ChunkLabels | None) -> None:
                if chunk is not None and len(chunk.labels) == self.layout.stride_patches:
                    work.finish(chunk)
                else:
                    work.go_on(lambda: self._compute(dataset, index, work))

            work.hold(self._storing.submit(self._look_up, key, work.rank, found, work.fail))

        return self._chunks.claim(key, start, rank)

    def chunk(self, dataset: Dataset, index: ChunkIndex) -> Future[ChunkLabels]:
        """Return the labels of one chunk, for a caller who will not give up."""
        return self.claim(dataset, index, self._next_rank()).future

    def at_hand(self, dataset: Dataset, patches: PatchRange) -> bool:
        """Tell whether the labels of a rectangle of patches are all in memory, if it is not too large to look."""
        rows, cols = patches.intersect(dataset.footprint).chunk_range(self.layout.stride_patches).shape
        return rows * cols <= MAX_AT_HAND and all(
            self._store.peek(self._key(dataset, index)) is not None for index in self._inside(dataset, patches)
        )

    def ahead(
        self, dataset: Dataset, chunks: Iterable[ChunkIndex], *, rank: Rank = BACKGROUND
    ) -> Generator[tuple[ChunkIndex, Future[ChunkLabels]]]:
        """Yield chunks of a dataset in the order given, up to ``CHUNKS_AHEAD`` asked for before their turn.

        What is not taken when the iterator is closed is given up.

        Raises:
            BusyError: if something has to be computed and too many windows wait already; never for ``BACKGROUND``.
        """
        waiting: deque[tuple[ChunkIndex, Claim[ChunkLabels]]] = deque()
        full = rank != BACKGROUND and self.windows_waiting >= self._queue_windows
        try:
            for place, index in enumerate(chunks):
                claim = self.claim(dataset, index, (rank[0], rank[1], -place))
                waiting.append((index, claim))
                if full and not claim.future.done():
                    self._meters.rejected.inc()
                    raise BusyError(
                        f"{self.windows_waiting} windows wait to be labelled, and this server keeps at most "
                        f"{self._queue_windows} waiting; try again",
                        self.windows_waiting * self.seconds_per_chunk,
                    )
                if len(waiting) >= CHUNKS_AHEAD:
                    index, claim = waiting[0]
                    yield index, claim.future
                    waiting.popleft()[1].release()
            while waiting:
                index, claim = waiting[0]
                yield index, claim.future
                waiting.popleft()[1].release()
        finally:
            for _, claim in waiting:
                claim.release()

    def stream(
        self,
        dataset: Dataset,
        patches: PatchRange,
        *,
        background: bool = False,
        timeout_s: float | None = None,
    ) -> Generator[tuple[ChunkIndex, ChunkLabels]]:
        """Yield the chunks that hold ``patches``, those outside of the dataset left out, row by row as they come.

        Args:
            dataset: what to label.
            patches: which part of it.
            background: let all requests go first.
            timeout_s: longest time for all of it.

        Raises:
            BusyError: if the queue is full or the time is over.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        rank = BACKGROUND if background else self._next_rank()
        for index, future in self.ahead(dataset, self._inside(dataset, patches), rank=rank):
            try:
                labels = future.result(None if deadline_s is None else deadline_s - time.monotonic())
            except TimeoutError:
                if future.done():
                    raise  # the computation's own
                raise self.too_late(timeout_s) from None
            yield index, labels

    def block(self, dataset: Dataset, patches: PatchRange, *, timeout_s: float | None = None) -> LabelBlock:
        """Return the labels of a rectangle of patches, waiting for them; see ``stream``.

        Raises:
            BusyError: if the queue is full or the time is over.
        """
        result = LabelBlock.empty(patches)
        for index, chunk in self.stream(dataset, patches, timeout_s=timeout_s):
            result.paste(index, chunk)
        return result

    async def block_async(
        self,
        dataset: Dataset,
        patches: PatchRange,
        *,
        rank: Rank | None = None,
        timeout_s: float | None = None,
        over: Callable[[], bool] = lambda: False,
    ) -> LabelBlock:
        """Return the labels of a rectangle of patches without holding a thread; cancelled, it gives up what it wants.

        Args:
            dataset: what to label.
            patches: which part of it.
            rank: how urgent it is; None: as urgent as the newest request.
            timeout_s: longest time for all of it.
            over: asked at each chunk whether the server ends.

        Raises:
            BusyError: if the queue is full, the time is over or the server ends.
        """
        result = LabelBlock.empty(patches)
        ahead = self.ahead(dataset, self._inside(dataset, patches), rank=self._next_rank() if rank is None else rank)
        try:
            async with asyncio.timeout(timeout_s) as limit:
                for i, (index, future) in enumerate(ahead):
                    if over():
                        raise BusyError("the server is shutting down", 1.0)
                    if not future.done():
                        await asyncio.wrap_future(future)
                    elif i % CHUNKS_BEFORE_OTHERS == 0:
                        await asyncio.sleep(0)
                    result.paste(index, future.result())
        except TimeoutError:
            if not limit.expired():
                raise
            raise self.too_late(timeout_s) from None
        finally:
            ahead.close()
        return result

    def too_late(self, timeout_s: float | None) -> BusyError:
        """Return the error of a request that met its deadline, and count it."""
        self._meters.timed_out.inc()
        return BusyError(
            f"the labels were not there within {timeout_s:g} s; try again",
            self.windows_waiting * self.seconds_per_chunk,
        )

    def _key(self, dataset: Dataset, index: ChunkIndex) -> ChunkKey:
        return ChunkKey(*dataset.key, self.codebook.digest, self.device_name, *index)

    def _inside(self, dataset: Dataset, patches: PatchRange) -> Iterator[ChunkIndex]:
        return patches.intersect(dataset.footprint).chunks(self.layout.stride_patches)

    def _compute(self, dataset: Dataset, index: ChunkIndex, work: Work[ChunkLabels]) -> None:
        """Ask for the pixels of all windows; the chunk's own tells whether there is anything to label."""
        own, *others = [self._window(dataset, window, work.rank) for window in self.layout.windows_of(index)]
        for claim in others:  # read beside its own, not after it: the first tile of a burst waits for them
            work.hold(claim)
        work.after(own, partial(self._start_chunk, dataset, index, work))

    def _start_chunk(self, dataset: Dataset, index: ChunkIndex, work: Work[ChunkLabels], own: WindowPixels) -> None:
        """With its own window read: finish a chunk without data, or have it labelled."""
        m, s = self.layout.margin_patches, self.layout.stride_patches
        labelled = own.labelled[m : m + s, m : m + s]
        if not labelled.any():
            self._finish_chunk(dataset, index, work, ChunkLabels.empty(s))
            return

        def finish(chunk: ChunkLabels) -> None:
            known = ChunkLabels(
                np.where(labelled, chunk.labels, np.uint16(NODATA_LABEL)),
                np.where(labelled, chunk.similarity, np.float32(np.nan)),
            )
            self._finish_chunk(dataset, index, work, known)

        chunks = dataset.footprint.chunk_range(s)
        place = (index.row - chunks.row_start, index.col - chunks.col_start)
        self.labeller.label(ChunkJob(dataset.key, index, place, partial(self._window, dataset)), work, finish)

    def _finish_chunk(self, dataset: Dataset, index: ChunkIndex, work: Work[ChunkLabels], chunk: ChunkLabels) -> None:
        if self._storing is not None:
            item = self._key(dataset, index), chunk
            self._storing.submit(self._keep, item, BACKGROUND, lambda _: None, _log_failed_write)
        work.finish(chunk)

    def _window(self, dataset: Dataset, index: ChunkIndex, rank: Rank) -> Claim[WindowPixels]:
        """Return the pixels of a window, read once for all that want them at about the same time."""

        def start(work: Work[WindowPixels]) -> None:
            job = _WindowJob(dataset, index)
            work.hold(self._reading.submit(self._read, job, work.rank, work.finish, work.fail))

        return self._pixels.claim((dataset.key, index), start, rank)

    def _read_batch(self, jobs: Sequence[_WindowJob]) -> Iterator[WindowPixels]:
        coming = iterate_windows(jobs[0].dataset, [job.index for job in jobs], self._patch_px, self._cells)
        for _ in jobs:
            with timed(self._meters.read_seconds):
                window = next(coming)
            self._meters.windows_read.inc()
            yield window

    def _look_up_batch(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        return [] if self._tier is None else self._tier.get_many(keys)

    def _keep_batch(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> list[None]:
        if self._tier is not None:
            self._tier.put_many(items)
        return [None] * len(items)


def _log_failed_write(error: Exception) -> None:
    logger.error("labels could not be kept outside of the process: %s", error)
