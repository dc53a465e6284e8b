"""Labelling by devices elsewhere: windows that were read here go there in batches, labels come back.

``RemoteLabeller`` is the side that reads, ``LabelDesk`` the side of the device. What is between them, and which device
gets which batch, is a ``Carrier``'s matter.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo
from geocentroids_tiler.errors import EncoderError, GeocentroidsError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.labels.batching import BACKGROUND, BatchQueue, Lane, Rank
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.futures import done as known
from geocentroids_tiler.labels.futures import when_all
from geocentroids_tiler.labels.labeller import ChunkJob, DatasetKey, DeviceFigures, Window, WindowKey
from geocentroids_tiler.labels.once import Claim, Once, Work
from geocentroids_tiler.labels.owners import block_key
from geocentroids_tiler.labels.store import ChunkLabels

logger = logging.getLogger(__name__)

BATCH_CHUNKS = 16
"""Chunks sent together: neighbours share windows, and a message costs milliseconds."""
UNDER_WAY_BATCHES, UNDER_WAY_BYTES = 8, 64 * 2**20
"""Batches, and windows in them, that were sent and not answered. Nothing overtakes what was sent; what waits meanwhile
goes together."""
_ON_ITS_WAY: Rank = (1, 0, 0)
"""Rank of everything that is not background: senders decide what goes first, here it is first come first served."""


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """What a device is.

    Attributes:
        device: what computes.
        seconds_per_chunk: measured.
        windows_at_once: windows that keep it busy.
    """

    device: DeviceInfo
    seconds_per_chunk: float
    windows_at_once: int


@dataclass(frozen=True)
class LabelRequest:
    """Chunks of one block of an image, with all windows that cover them.

    Attributes:
        codebook: name of the codebook.
        digest: of the codebook's content.
        dataset: the image.
        background: whether nobody waits for it at a screen.
        chunks: what to label.
        windows: pixels of shape (S, S, 3), uint8, by index.
    """

    codebook: str
    digest: str
    dataset: DatasetKey
    background: bool
    chunks: Sequence[ChunkIndex]
    windows: Mapping[ChunkIndex, NDArray[np.uint8]]


LabelReply = Sequence[ChunkLabels | GeocentroidsError]
"""Of each chunk of a request, in its order, the labels, or why there are none."""


class Carrier(Protocol):
    """Takes requests to the devices. Safe for threads."""

    def describe(self, codebook: str, digest: str) -> DeviceDescription:
        """Return what labels the chunks of a codebook, waiting for it to be loaded.

        Raises:
            GeocentroidsError: if it cannot be loaded there, or is another codebook than here.
        """
        ...

    def label(self, owner: str, request: LabelRequest) -> Future[LabelReply]:
        """Have chunks labelled by the owner of a block; cancelled, the request is given up.

        The future has an error if the device, and the one that takes its place, cannot do it.
        """
        ...

    def figures(self, digest: str) -> list[DeviceFigures]:
        """Return what each device did with a codebook; those that do not answer soon are left out."""
        ...


@dataclass(frozen=True, eq=False)
class _Item:
    """A chunk with its windows read."""

    job: ChunkJob
    windows: Mapping[ChunkIndex, NDArray[np.uint8]]
    background: bool


class _Share:
    """One chunk of a batch that is under way; when nobody wants any chunk of it, the batch is given up."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self._wanted = True

    def release(self) -> bool:
        """Give the chunk up; False while others want the rest of the batch, which is computed then."""
        with self._batch.lock:
            if self._wanted:
                self._wanted = False
                self._batch.wanted -= 1
            over = not self._batch.wanted
        if over:
            self._batch.future.cancel()
        return over

    def raise_rank(self, rank: Rank) -> None:
        """Nothing: it is on its way."""


class _Batch:
    def __init__(self, future: Future[LabelReply], count: int) -> None:
        self.future = future
        self.lock = threading.Lock()
        self.wanted = count


class RemoteLabeller:
    """Labels chunks of one codebook by devices elsewhere. Safe for threads."""

    def __init__(self, codebook: Codebook, carrier: Carrier) -> None:
        """Ask the devices what they are.

        Args:
            codebook: whose labels.
            carrier: takes requests to the devices.

        Raises:
            GeocentroidsError: if they cannot label with this codebook.
        """
        pre = codebook.manifest.preprocess
        description = carrier.describe(codebook.name, codebook.digest)
        self.lock = threading.RLock()
        self.device = description.device
        self.seconds_per_chunk = description.seconds_per_chunk
        self.windows_at_once = max(description.windows_at_once, BATCH_CHUNKS)
        self._codebook = codebook
        self._carrier = carrier
        self._layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        self._window_bytes = 3 * (pre.window_patches * codebook.manifest.encoder.patch_px) ** 2
        self._wanted: set[ChunkJob] = set()
        self._batches = 0
        self._windows = 0
        self._when_shorter: Callable[[], None] = lambda: None
        self._send: Lane[_Item, tuple[_Batch, int]] = Lane(
            self._send_batch,
            lambda: BATCH_CHUNKS,
            group_of=lambda item: (block_key(item.job.dataset, item.job.place), item.background),
        )
        self._queue = BatchQueue(
            "geocentroids-send",
            1,
            may_take=self._may_send,
            when_shorter=lambda: self._when_shorter(),
        )

    @property
    def queued(self) -> int:
        """Chunks that wait to be sent."""
        return len(self._queue)

    def waiting(self) -> set[WindowKey]:
        """Return the windows of all chunks that are wanted and not labelled yet."""
        with self.lock:
            jobs = list(self._wanted)
        return {(job.dataset, window) for job in jobs for window in self._layout.windows_of(job.index)}

    def when_shorter(self, callback: Callable[[], None]) -> None:
        """Have a function called when something was sent."""
        self._when_shorter = callback

    def figures(self) -> DeviceFigures:
        """Return what all devices did together, as far as they answer."""
        found = self._carrier.figures(self._codebook.digest)
        return DeviceFigures(
            sum(figures.windows_encoded for figures in found),
            sum(figures.windows_given_up for figures in found),
            sum(figures.queued for figures in found),
        )

    def close(self) -> None:
        """Send what waits, and end the thread."""
        self._queue.close()

    def label(self, job: ChunkJob, work: Work[Any], done: Callable[[ChunkLabels], None]) -> None:
        """Have a chunk labelled as a part of ``work``, and call ``done`` with labels for all of its patches."""
        with self.lock:
            self._wanted.add(job)
        work.future.add_done_callback(lambda _: self._forget(job))
        indices = self._layout.windows_of(job.index)
        claims = [job.window(index, work.rank) for index in indices]
        for claim in claims:
            work.hold(claim)

        def send(item: _Item) -> None:
            work.hold(self._queue.submit(self._send, item, work.rank, partial(sent, item), work.fail))

        def sent(item: _Item, share: tuple[_Batch, int]) -> None:
            batch, place = share
            work.hold(_Share(batch))
            batch.future.add_done_callback(lambda future: work.go_on(lambda: arrived(item, place, future)))

        def arrived(item: _Item, place: int, future: Future[LabelReply]) -> None:
            if future.cancelled():  # nobody wanted it; if somebody does again, it starts anew
                send(item)
                return
            outcome = future.result()[place]
            if isinstance(outcome, GeocentroidsError):
                raise outcome
            done(outcome)

        def read(futures: list[Future[Window]]) -> None:
            windows = {index: future.result().pixels for index, future in zip(indices, futures, strict=True)}
            send(_Item(job, windows, work.rank <= BACKGROUND))

        when_all([claim.future for claim in claims], lambda futures: work.go_on(lambda: read(futures)))

    def _may_send(self) -> bool:
        return self._batches < UNDER_WAY_BATCHES and self._windows * self._window_bytes < UNDER_WAY_BYTES

    def _forget(self, job: ChunkJob) -> None:
        with self.lock:
            self._wanted.discard(job)

    def _send_batch(self, items: Sequence[_Item]) -> list[tuple[_Batch, int]]:
        first = items[0]
        windows = {index: pixels for item in items for index, pixels in item.windows.items()}
        request = LabelRequest(
            self._codebook.name,
            self._codebook.digest,
            first.job.dataset,
            first.background,
            tuple(item.job.index for item in items),
            windows,
        )

        def arrived(_: Future[LabelReply]) -> None:
            with self.lock:
                self._batches -= 1
                self._windows -= len(windows)
            self._queue.wake()

        future = self._carrier.label(block_key(first.job.dataset, first.job.place), request)
        with self.lock:
            self._batches += 1
            self._windows += len(windows)
        future.add_done_callback(arrived)
        batch = _Batch(future, len(items))
        return [(batch, place) for place in range(len(items))]


@dataclass(frozen=True, slots=True)
class _Sent:
    pixels: NDArray[np.uint8]


class LabelDesk:
    """Answers label requests with a device of this process, each chunk and window once however many ask.

    Safe for threads; it is closed with ``labeller``.
    """

    def __init__(self, labeller: DeviceLabeller, *, label_cache_bytes: int) -> None:
        """Keep what was labelled for those who ask for it before it is in their stores.

        Args:
            labeller: labels.
            label_cache_bytes: memory for labels.
        """
        self._labeller = labeller
        kept: ByteCache[WindowKey, ChunkLabels] = ByteCache(label_cache_bytes, lambda chunk: chunk.nbytes)
        self._chunks: Once[WindowKey, ChunkLabels] = Once(kept, labeller.lock)

    async def label(self, request: LabelRequest) -> LabelReply:
        """Label the chunks of a request; cancelled, what nobody else wants is given up.

        Nothing is refused here: each sender has let in what it sends, and has little under way at once.
        """
        rank = BACKGROUND if request.background else _ON_ITS_WAY
        claims = [self._claim(request, index, rank) for index in request.chunks]
        try:
            return [await _outcome(claim) for claim in claims]
        finally:
            for claim in claims:
                claim.release()

    def _claim(self, request: LabelRequest, index: ChunkIndex, rank: Rank) -> Claim[ChunkLabels]:
        def window(wanted: ChunkIndex, _: Rank) -> Claim[_Sent]:
            return Claim(known(_Sent(request.windows[wanted])), None)

        def start(work: Work[ChunkLabels]) -> None:
            self._labeller.label(ChunkJob(request.dataset, index, (0, 0), window), work, work.finish)

        return self._chunks.claim((request.dataset, index), start, rank)

    def describe(self) -> DeviceDescription:
        """Return what computes."""
        labeller = self._labeller
        return DeviceDescription(labeller.device, labeller.seconds_per_chunk, labeller.windows_at_once)

    def figures(self) -> DeviceFigures:
        """Return what was done since the start."""
        return self._labeller.figures()


async def _outcome(claim: Claim[ChunkLabels]) -> ChunkLabels | GeocentroidsError:
    """Return the labels of one chunk, or why it has none: those beside it are not to fail with it."""
    try:
        return await asyncio.wrap_future(claim.future)
    except GeocentroidsError as error:
        return error
    except Exception as error:
        logger.exception("a chunk could not be labelled")
        return EncoderError(f"the device failed: {type(error).__name__}: {error}")
