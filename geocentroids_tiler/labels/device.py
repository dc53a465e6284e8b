"""A device of this process: windows are encoded, blended and assigned, each once however many chunks want them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo, Encoder, Labels, TokenHandle
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.labels.batching import BatchQueue, Lane, Rank
from geocentroids_tiler.labels.futures import when_all
from geocentroids_tiler.labels.labeller import ChunkJob, DeviceFigures, Window, WindowKey
from geocentroids_tiler.labels.meters import Meters, timed
from geocentroids_tiler.labels.once import Claim, Lru, Once, Work
from geocentroids_tiler.labels.store import ChunkLabels


class DeviceLabeller:
    """Labels chunks of one codebook on one device. Safe for threads.

    One thread owns the device and takes whatever windows and chunks wait for it, those of the newest request first.
    Tokens stay on the device, so that neighbouring chunks share their windows; a window's pixels are only asked for
    if its tokens are not there.
    """

    def __init__(
        self, codebook: Codebook, encoder: Encoder, *, token_cache_bytes: int, meters: Meters | None = None
    ) -> None:
        """Load the centroids, measure the device and start its thread.

        Args:
            codebook: whose labels.
            encoder: the codebook's encoder, which is closed with this.
            token_cache_bytes: device memory for tokens.
            meters: count and time what is done; None: for nobody.
        """
        pre, assignment = codebook.manifest.preprocess, codebook.manifest.assignment
        self.lock = threading.RLock()
        self.encoder = encoder
        self._layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        self._assigner = encoder.assigner(codebook.centroids.astype(np.float32), assignment.metric, self._layout)
        self.seconds_per_chunk = self._measure(pre.window_patches * codebook.manifest.encoder.patch_px)
        self._meters = Meters() if meters is None else meters
        self._tokens: Once[WindowKey, TokenHandle] = Once(Lru(token_cache_bytes // encoder.token_bytes()), self.lock)
        self._encode: Lane[NDArray[np.uint8], TokenHandle] = Lane(self._encode_batch, lambda: encoder.windows_at_once)
        self._assign: Lane[Sequence[TokenHandle], ChunkLabels] = Lane(
            lambda chunks: self._assigner.begin(chunks),
            lambda: 4 * encoder.windows_at_once,
            first=True,
            finish=self._finish_assign,
        )
        self._encoded = 0
        self._when_shorter: Callable[[], None] = lambda: None
        on_gpu = encoder.info.device.startswith("cuda")
        self._queue = BatchQueue(
            "geocentroids-device", 1, in_flight=2 if on_gpu else 1, when_shorter=lambda: self._when_shorter()
        )

    @property
    def device(self) -> DeviceInfo:
        """What computes."""
        return self.encoder.info

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy when they are handed over together."""
        return self.encoder.windows_at_once

    @property
    def queued(self) -> int:
        """Windows and chunks that wait for the device."""
        return len(self._queue)

    def waiting(self) -> set[WindowKey]:
        """Return the windows that are wanted and not encoded yet."""
        return self._tokens.keys()

    def when_shorter(self, callback: Callable[[], None]) -> None:
        """Have a function called when something has left the queue."""
        self._when_shorter = callback

    def figures(self) -> DeviceFigures:
        """Return what was done since the start."""
        return DeviceFigures(self._encoded, self._tokens.given_up, self.queued)

    def close(self) -> None:
        """Finish what waits, and end the thread and the encoder."""
        self._queue.close()
        self.encoder.close()

    def label(self, job: ChunkJob, work: Work[Any], done: Callable[[ChunkLabels], None]) -> None:
        """Label a chunk as a part of ``work``, and call ``done`` with labels for all of its patches."""

        def assign(futures: list[Future[TokenHandle]]) -> None:
            tokens = [future.result() for future in futures]
            work.hold(self._queue.submit(self._assign, tokens, work.rank, done, work.fail))

        claims = [self._window_tokens(job, window, work.rank) for window in self._layout.windows_of(job.index)]
        for claim in claims:
            work.hold(claim)
        when_all([claim.future for claim in claims], lambda futures: work.go_on(lambda: assign(futures)))

    def _window_tokens(self, job: ChunkJob, index: ChunkIndex, rank: Rank) -> Claim[TokenHandle]:
        """Return the tokens of a window, encoded once for all that want them at about the same time."""

        def start(work: Work[TokenHandle]) -> None:
            def encode(window: Window) -> None:
                work.hold(self._queue.submit(self._encode, window.pixels, work.rank, work.finish, work.fail))

            work.after(job.window(index, work.rank), encode)

        return self._tokens.claim((job.dataset, index), start, rank)

    def _encode_batch(self, windows: Sequence[NDArray[np.uint8]]) -> list[TokenHandle]:
        self._meters.batch_windows.observe(len(windows))
        with timed(self._meters.encode_seconds):
            tokens = self.encoder.encode(windows)
        self._encoded += len(windows)
        return tokens

    def _finish_assign(self, finish: Callable[[], Labels]) -> list[ChunkLabels]:
        with timed(self._meters.assign_seconds):
            labels, similarity = finish()
        return [ChunkLabels(*pair) for pair in zip(labels, similarity, strict=True)]

    def _measure(self, size_px: int) -> float:
        """Run the model as it will be run and return the seconds that a chunk takes when the device is busy."""
        shape = (self.encoder.windows_at_once, size_px, size_px, 3)
        windows = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        best = float("inf")
        for _ in range(3):  # the first run allocates
            start = time.perf_counter()
            tokens = self.encoder.encode(windows)
            self._assigner.assign([[handle] * len(self._layout.parts) for handle in tokens])
            best = min(best, (time.perf_counter() - start) / len(windows))
        return best
