"""From wanted patches to labels: windows are read, encoded, blended and assigned, each once however many want them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.encoder.base import ChunkLayout, Encoder, TokenHandle
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.labels.batching import BatchQueue, Lane
from geocentroids_tiler.labels.futures import guard, guard_all, when_all
from geocentroids_tiler.labels.once import Lru, Once
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels, LabelStore
from geocentroids_tiler.source import Dataset, ReadOptions, WindowPixels, read_windows

READ_BATCH = 16
"""Windows read through one opening of a file: opening costs as much as reading a few."""
CHUNKS_AHEAD = 128
"""Chunks that one caller keeps in the queues at once: enough to fill a device, few enough to bound memory."""
CHUNKS_BEFORE_OTHERS = 32
"""Chunks taken from memory before an event loop may turn to something else; waiting costs more than taking one."""
PIXEL_CACHE_BYTES = 64 * 2**20
"""Windows read but wanted again soon, as their own chunk's and as their neighbours'."""

_WindowKey = tuple[tuple[str, str, ReadOptions], ChunkIndex]


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
    """Computes and keeps the labels of one codebook on one device. Safe for threads.

    Readers take windows from files, several through one opening; one thread owns the device and takes whatever
    windows and chunks wait for it. Tokens stay on the device, so that neighbouring chunks share their windows.
    """

    def __init__(
        self, codebook: Codebook, encoder: Encoder, store: LabelStore, *, read_threads: int, token_cache_bytes: int
    ) -> None:
        pre = codebook.manifest.preprocess
        self.codebook = codebook
        self.encoder = encoder
        self.layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        self._patch_px = codebook.manifest.encoder.patch_px
        self._assigner = encoder.assigner(
            codebook.centroids.astype(np.float32), codebook.manifest.assignment.metric, self.layout
        )
        self.device_name = f"{encoder.info.backend}/{encoder.info.provider}/{encoder.info.precision}"
        self.seconds_per_chunk = self._measure()
        window_bytes = 3 * (pre.window_patches * self._patch_px) ** 2
        self._chunks: Once[ChunkKey, ChunkLabels] = Once(store)
        self._pixels: Once[_WindowKey, WindowPixels] = Once(Lru(PIXEL_CACHE_BYTES // window_bytes))
        self._tokens: Once[_WindowKey, TokenHandle] = Once(Lru(token_cache_bytes // encoder.token_bytes()))
        self._read: Lane[_WindowJob, WindowPixels] = Lane(
            self._read_batch, READ_BATCH, group_of=lambda job: job.dataset.key
        )
        self._encode: Lane[NDArray[np.uint8], TokenHandle] = Lane(self._encode_batch, encoder.windows_at_once)
        self._assign: Lane[Sequence[TokenHandle], ChunkLabels] = Lane(self._assign_batch, 4 * encoder.windows_at_once)
        self.windows_encoded = 0
        self._reading = BatchQueue("geocentroids-read", read_threads)
        self._device = BatchQueue("geocentroids-device", 1)

    @property
    def windows_to_read(self) -> int:
        """Windows that wait to be read."""
        return len(self._reading)

    @property
    def device_queue(self) -> int:
        """Windows and chunks that wait for the device."""
        return len(self._device)

    def close(self) -> None:
        """Finish the chunks that were asked for, accept no others, and end the threads."""
        wait(self._chunks.close())
        self._reading.close()
        self._device.close()

    def chunk(self, dataset: Dataset, index: ChunkIndex) -> Future[ChunkLabels]:
        """Return the labels of one chunk: from memory, from whoever computes them already, or computed now.

        Raises:
            EncoderError: if it would have to be computed and the engine is closed.
        """
        key = ChunkKey(*dataset.key, self.codebook.digest, self.device_name, *index)

        def start(future: Future[ChunkLabels]) -> None:
            own = self._window(dataset, index)
            own.add_done_callback(guard(future, partial(self._start_chunk, dataset, index, future)))

        return self._chunks.get(key, start)

    def ahead(
        self, dataset: Dataset, chunks: Iterable[ChunkIndex], count: int | None = None
    ) -> Iterator[tuple[ChunkIndex, Future[ChunkLabels]]]:
        """Yield chunks of a dataset in the order given, up to ``count`` asked for before their turn."""
        count = CHUNKS_AHEAD if count is None else count
        waiting: deque[tuple[ChunkIndex, Future[ChunkLabels]]] = deque()
        for index in chunks:
            waiting.append((index, self.chunk(dataset, index)))
            if len(waiting) >= count:
                yield waiting.popleft()
        yield from waiting

    def stream(self, dataset: Dataset, patches: PatchRange) -> Iterator[tuple[ChunkIndex, ChunkLabels]]:
        """Yield the chunks that hold ``patches``, those outside of the dataset left out, row by row as they come."""
        for index, future in self.ahead(dataset, self._inside(dataset, patches)):
            yield index, future.result()

    def block(self, dataset: Dataset, patches: PatchRange) -> LabelBlock:
        """Return the labels of a rectangle of patches, waiting for them."""
        result = LabelBlock.empty(patches)
        for index, chunk in self.stream(dataset, patches):
            result.paste(index, chunk)
        return result

    async def block_async(self, dataset: Dataset, patches: PatchRange) -> LabelBlock:
        """Return the labels of a rectangle of patches without holding a thread."""
        result = LabelBlock.empty(patches)
        for i, (index, future) in enumerate(self.ahead(dataset, self._inside(dataset, patches))):
            if not future.done():
                await asyncio.wrap_future(future)
            elif i % CHUNKS_BEFORE_OTHERS == 0:
                await asyncio.sleep(0)
            result.paste(index, future.result())
        return result

    def _inside(self, dataset: Dataset, patches: PatchRange) -> Iterator[ChunkIndex]:
        return patches.intersect(dataset.footprint).chunks(self.layout.stride_patches)

    def _start_chunk(self, dataset: Dataset, index: ChunkIndex, future: Future[ChunkLabels], own: WindowPixels) -> None:
        """With its own window read: finish a chunk without data, or ask for the tokens of all its windows."""
        m, s = self.layout.margin_patches, self.layout.stride_patches
        labelled = own.labelled[m : m + s, m : m + s]
        if not labelled.any():
            future.set_result(ChunkLabels.empty(s))
            return
        tokens = [self._window_tokens(dataset, window) for window in self.layout.windows_of(index)]
        when_all(tokens, guard_all(future, partial(self._assign_chunk, labelled, future)))

    def _assign_chunk(
        self, labelled: NDArray[np.bool_], future: Future[ChunkLabels], tokens: list[TokenHandle]
    ) -> None:
        def finish(chunk: ChunkLabels) -> None:
            future.set_result(
                ChunkLabels(
                    np.where(labelled, chunk.labels, np.uint16(NODATA_LABEL)),
                    np.where(labelled, chunk.similarity, np.float32(np.nan)),
                )
            )

        self._device.submit(self._assign, tokens).add_done_callback(guard(future, finish))

    def _window(self, dataset: Dataset, index: ChunkIndex) -> Future[WindowPixels]:
        """Return the pixels of a window, read once for all that want them at about the same time."""

        def start(future: Future[WindowPixels]) -> None:
            job = _WindowJob(dataset, index)
            self._reading.submit(self._read, job).add_done_callback(guard(future, future.set_result))

        return self._pixels.get((dataset.key, index), start)

    def _window_tokens(self, dataset: Dataset, index: ChunkIndex) -> Future[TokenHandle]:
        """Return the tokens of a window, encoded once for all that want them at about the same time."""

        def start(future: Future[TokenHandle]) -> None:
            def encode(window: WindowPixels) -> None:
                self._device.submit(self._encode, window.pixels).add_done_callback(guard(future, future.set_result))

            self._window(dataset, index).add_done_callback(guard(future, encode))

        return self._tokens.get((dataset.key, index), start)

    def _read_batch(self, jobs: Sequence[_WindowJob]) -> list[WindowPixels]:
        return read_windows(jobs[0].dataset, [job.index for job in jobs], self._patch_px)

    def _encode_batch(self, windows: Sequence[NDArray[np.uint8]]) -> list[TokenHandle]:
        tokens = self.encoder.encode(np.stack(windows))
        self.windows_encoded += len(windows)
        return tokens

    def _assign_batch(self, chunks: Sequence[Sequence[TokenHandle]]) -> list[ChunkLabels]:
        labels, similarity = self._assigner.assign(chunks)
        return [ChunkLabels(*pair) for pair in zip(labels, similarity, strict=True)]

    def _measure(self) -> float:
        """Run the model as it will be run and return the seconds that a chunk takes when the device is busy."""
        size = self.layout.window_patches * self._patch_px
        windows = np.random.default_rng(0).integers(0, 255, (self.encoder.windows_at_once, size, size, 3), np.uint8)
        best = float("inf")
        for _ in range(3):  # the first run allocates
            start = time.perf_counter()
            tokens = self.encoder.encode(windows)
            self._assigner.assign([[handle] * len(self.layout.parts) for handle in tokens])
            best = min(best, (time.perf_counter() - start) / len(windows))
        return best
