"""One background job while it runs: labels row by row, then all of them kept at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import datetime

from geocentroids_tiler.errors import GeocentroidsError, SourceChangedError, SourceUnavailableError
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.export import check_unchanged, strips
from geocentroids_tiler.labels.job_files import FinishedRows, JobFiles, JobRecord
from geocentroids_tiler.labels.kept import KeptLabels
from geocentroids_tiler.source import Dataset

WRITE_EVERY_S = 1.0
"""How often progress is written between two rows of chunks."""
MAX_ENDS = 3
"""A job whose process ended so often in the same row is not tried again: it may be what ends it."""

Opener = Callable[[JobRecord], tuple[Dataset, LabelEngine]]
"""Opens what a job is to label, with what labels it."""


class StoppedJobError(Exception):
    """The process is about to end."""


class CancelledJobError(Exception):
    """The job is not wanted any more."""


class FailedJobError(GeocentroidsError):
    """The job cannot be done; the text says why."""


class JobRun:
    """One job while it runs.

    Attributes:
        job: its record, as it is on the disk or newer.
    """

    def __init__(
        self,
        files: JobFiles,
        job: JobRecord,
        kept: KeptLabels,
        opener: Opener,
        stop: threading.Event,
        clock: Callable[[], datetime],
        retry_delays_s: Sequence[float],
    ) -> None:
        self._files = files
        self.job = job
        self._kept = kept
        self._open = opener
        self._stop = stop
        self._clock = clock
        self._retry_delays_s = retry_delays_s
        self._began = self._written_at = clock()
        self._before = 0

    def to_the_end(self) -> None:
        """Label what is left of the dataset and keep the labels.

        Raises:
            CancelledJobError: if somebody cancelled the job.
            StoppedJobError: if the process is about to end.
            GeocentroidsError: if it cannot be done.
            OSError: if the disk is full.
        """
        ends = self.job.ends + (self.job.state == "running")
        if ends >= MAX_ENDS:
            raise FailedJobError(
                f"the server ended {ends} times while it labelled row {self.job.rows_done} of the chunks"
            )
        self._update(state="running", started_at=self._clock(), ends=ends, seconds_left=None)
        delays = list(self._retry_delays_s)
        while True:
            done = self.job.rows_done
            try:
                self._label()
                return
            except SourceUnavailableError:
                delays = list(self._retry_delays_s) if self.job.rows_done > done else delays
                if not delays:
                    raise
                self._wait(delays.pop(0))

    def _label(self) -> None:
        dataset, engine = self._open(self.job)
        codebook = engine.codebook
        if codebook.digest != self.job.codebook_digest:
            raise FailedJobError(
                f"codebook {self.job.codebook_name!r} is no longer the one that the job was started with"
            )
        if dataset.identity != self.job.identity:
            raise SourceChangedError(f"{self.job.url!r} changed while it was labelled; label it again")
        if self._kept.find(dataset, codebook, fresh=True) is None:
            rows = FinishedRows(self._files.rows(self.job), dataset.footprint, engine.layout.stride_patches)
            across = dataset.footprint.chunk_range(engine.layout.stride_patches).shape[1]
            done = rows.resume(self.job.rows_done)
            self._began, self._before = self._clock(), done * across
            self._update(rows_done=done, chunks_done=done * across)
            if not (left := rows.left(done)).empty:
                with closing(strips(engine, dataset, left, self._count, background=True)) as stream:
                    for strip in stream:
                        rows.append(strip)
                        done += 1
                        self._update(rows_done=done, chunks_done=done * across, ends=0, **self._pace())
            check_unchanged(dataset)
            with self._kept.writer(dataset, codebook, engine.device_name) as writer:
                for strip in rows.strips():
                    writer.write(strip)
                    self._check_wanted()
                writer.finish()
        self._update(chunks_done=self.job.chunks)

    def _count(self, chunks: int) -> None:
        """Take note of chunks that are done."""
        self._check_wanted()
        self.job = self.job.model_copy(update={"chunks_done": self.job.chunks_done + chunks})
        if (self._clock() - self._written_at).total_seconds() >= WRITE_EVERY_S:
            self._update(**self._pace())

    def _pace(self) -> dict[str, float | None]:
        """Return how long the rest will take if it goes on as since the start."""
        done, left = self.job.chunks_done - self._before, self.job.chunks - self.job.chunks_done
        passed_s = (self._clock() - self._began).total_seconds()
        return {"seconds_left": max(0.0, passed_s / done * left) if done else None}

    def _check_wanted(self) -> None:
        if self._stop.is_set():
            raise StoppedJobError
        if self._files.cancelling(self.job):
            raise CancelledJobError

    def _wait(self, seconds: float) -> None:
        """Wait, unless the job is not wanted any more."""
        end = self._clock().timestamp() + seconds
        while (left := end - self._clock().timestamp()) > 0:
            self._check_wanted()
            self._stop.wait(min(1.0, left))
        self._check_wanted()

    def _update(self, **changes: object) -> None:
        self.job = self.job.model_copy(update=changes)
        self._files.write(self.job)
        self._written_at = self._clock()
