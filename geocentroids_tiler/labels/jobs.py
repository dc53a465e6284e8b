"""Background jobs that label whole datasets, one at a time in each of the processes that share a folder."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import BusyError, GeocentroidsError, JobNotFoundError, JobStateError, KeptLabelsError
from geocentroids_tiler.labels.file_lock import FileLock
from geocentroids_tiler.labels.job_files import JobFiles, JobRecord
from geocentroids_tiler.labels.job_run import CancelledJobError, JobRun, Opener
from geocentroids_tiler.labels.kept import JOBS_DIR, KeptLabels, estimated_bytes, kept_id
from geocentroids_tiler.source import Dataset

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""How often a process without work looks for jobs that others were given or left behind."""
RETRY_AFTER_S = 60.0
"""When a client is told to ask again whose job was one too many."""
RETRY_DELAYS_S = (10.0, 60.0)
"""Waits before a source that did not answer is tried again; then the job fails."""


def _now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def _writing() -> Iterator[None]:
    """Say in one sentence that the folder cannot be written to."""
    try:
        yield
    except OSError as error:
        raise KeptLabelsError(f"the folder for labels cannot be written to: {error.strerror}") from error


class Jobs:
    """Jobs of a folder: asked for, listed and cancelled from any process, run by whichever is free.

    A job goes on after a restart where it stopped. Safe for threads.

    Args:
        kept: where the labels go.
        opener: opens what a job is to label.
        max_jobs: unfinished jobs at most.
        clock: tells the time.
        retry_delays_s: waits before a source that did not answer is tried again.
    """

    def __init__(
        self,
        kept: KeptLabels,
        opener: Opener,
        max_jobs: int,
        clock: Callable[[], datetime] = _now,
        retry_delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        self._kept = kept
        self._open = opener
        self._max_jobs = max_jobs
        self._clock = clock
        self._retry_delays_s = retry_delays_s
        self._files = JobFiles(kept.folder / JOBS_DIR)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()

    def start(self) -> None:
        """Begin to run jobs in a thread, those first that were left unfinished; does nothing if it runs already."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._loop, name="geocentroids-jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop the running job at its next chunk, to be gone on with later, and end the thread."""
        self._stop.set()
        self._wake.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def submit(self, dataset: Dataset, codebook: Codebook, codebook_name: str | None) -> tuple[JobRecord, bool]:
        """Ask for the labels of a dataset.

        Args:
            dataset: what to label.
            codebook: what with.
            codebook_name: name under which the codebook is found again; None: the default.

        Returns:
            The job, and whether it is new. It is not if the dataset has an unfinished one, or labels already.

        Raises:
            BusyError: if there are too many unfinished jobs.
            StorageFullError: if the labels may not fit.
            KeptLabelsError: if the folder cannot be written to.
        """
        key = kept_id(dataset, codebook)
        with _writing(), self._files.creating():
            jobs = self._files.all()
            same = [job for job in jobs if job.key == key]
            for job in same:
                if not job.finished and not self._files.cancelling(job):
                    return job, False
            kept = self._kept.find(dataset, codebook, fresh=True)
            if kept is None:
                unfinished = [job for job in jobs if not job.finished]
                if len(unfinished) >= self._max_jobs:
                    raise BusyError(
                        f"{len(unfinished)} jobs are not finished, and this server keeps at most {self._max_jobs}; "
                        "try again when some are done",
                        RETRY_AFTER_S,
                    )
                self._kept.check_room(dataset, sum(job.needed_bytes for job in unfinished))
            elif done := [job for job in same if job.state == "done"]:
                return done[0], False
            url, identity, options = dataset.key
            job = JobRecord(
                id=secrets.token_hex(8),
                number=1 + max((job.number for job in jobs), default=0),
                key=key,
                url=url,
                identity=identity,
                bidx=options.bidx,
                rescale=options.rescale,
                codebook=codebook_name,
                codebook_name=codebook.name,
                codebook_digest=codebook.digest,
                needed_bytes=estimated_bytes(dataset),
                chunks=dataset.chunk_count,
                created_at=self._clock(),
            )
            if kept is not None:  # by the command line, or so long ago that the job is forgotten
                job = job.ended("done", kept.record.made_at).model_copy(update={"chunks_done": job.chunks})
            self._files.write(job)
            self._files.prune()
        self._wake.set()
        return job, kept is None

    def newest(self, limit: int) -> list[JobRecord]:
        """Return jobs, newest first, up to ``limit``."""
        return self._files.all()[:limit]

    def get(self, job_id: str) -> JobRecord:
        """Return a job.

        Raises:
            JobNotFoundError: if there is none of that name.
        """
        if (job := self._files.get(job_id)) is None:
            raise JobNotFoundError(f"there is no job {job_id!r}")
        return job

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job. One that runs, here or in another process, ends at its next chunk.

        Raises:
            JobNotFoundError: if there is none of that name.
            JobStateError: if it is done or has failed.
            KeptLabelsError: if the folder cannot be written to.
        """
        job = self.get(job_id)
        if not job.finished:
            with _writing():
                self._files.ask_to_cancel(job)
                if (lock := self._files.lock(job)) is not None:
                    self._take(job, lock)
            job = self.get(job_id)
        if job.state in ("done", "failed"):
            raise JobStateError(f"job {job_id} is {job.state}; only a queued or running one can be cancelled")
        return job

    def reserved_bytes(self) -> int:
        """Return what the labels of unfinished jobs may take."""
        return sum(job.needed_bytes for job in self._files.all() if not job.finished)

    def run_next(self) -> bool:
        """Run the oldest unfinished job that no other process runs, to its end; False if there is none."""
        for job in reversed(self._files.all()):
            if job.finished or (lock := self._files.lock(job)) is None:
                continue
            if (own := self._take(job, lock)) is not None:
                self._run(self.get(job.id), own)
                return True
        return False

    def _take(self, job: JobRecord, lock: FileLock) -> FileLock | None:
        """With a job's lock, return it if the job is to be run; else finish the job and let go of the lock."""
        current = self._files.get(job.id)
        if current is None or current.finished:
            lock.release(remove=True)
            return None
        if self._files.cancelling(current):
            self._finish(current.ended("cancelled", self._clock()), lock)
            return None
        return lock

    def _finish(self, job: JobRecord, lock: FileLock) -> None:
        """Write the last record of a job, and leave nothing else of it."""
        try:
            self._files.finish(job)
        except OSError:
            lock.release()
            raise
        lock.release(remove=True)
        # Without the query, and without the error, which may repeat it: a signature in it is a secret.
        logger.info("job %s, the labels of %s, is %s", job.id, job.url.partition("?")[0], job.state)

    def _loop(self) -> None:
        while True:
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                worked = self.run_next()
            except Exception:
                logger.exception("jobs cannot be run; they are tried again in %g s", LOOK_EVERY_S)
                worked = False
            if not worked:
                self._wake.wait(LOOK_EVERY_S)

    def _run(self, job: JobRecord, lock: FileLock) -> None:
        """Run a job whose lock this process holds, and let go of it."""
        run = JobRun(self._files, job, self._kept, self._open, self._stop, self._clock, self._retry_delays_s)
        try:
            run.to_the_end()
            ended = run.job.ended("done", self._clock())
        except CancelledJobError:
            ended = run.job.ended("cancelled", self._clock())
        except Exception as error:
            if self._stop.is_set():  # also where the engine was closed before us
                try:
                    self._files.write(run.job.model_copy(update={"state": "queued", "seconds_left": None}))
                finally:
                    lock.release()
                return
            if isinstance(error, GeocentroidsError):
                text = str(error)
            else:
                logger.exception("job %s failed", job.id, exc_info=error)
                text = f"unexpected {type(error).__name__}: {' '.join(str(error).split())}"
            ended = run.job.ended("failed", self._clock(), text)
        self._finish(ended, lock)
