"""The files of jobs: a record of each, what cancels it, and the rows it has finished. Shared by several processes."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.file_lock import FileLock

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: frozenset[JobState] = frozenset({"done", "failed", "cancelled"})
KEEP_FINISHED = 1000
"""Records of finished jobs that are kept, the newest."""
_ID = re.compile(r"[0-9a-f]{16}")
_RECORD, _LOCK, _CANCEL, _ROWS = ".json", ".lock", ".cancel", ".rows"
_STRIP_ROWS = 256
"""Rows of patches read at once of those that are finished."""


class JobRecord(BaseModel):
    """A job that labels a whole dataset.

    Attributes:
        id: its name.
        number: jobs are run in the order of their numbers.
        key: ``kept_id`` of the labels it makes.
        state: what becomes of it.
        url: the dataset.
        identity: of its content when the job was asked for.
        bidx: bands read as red, green and blue.
        rescale: values that become black and white.
        codebook: name that the codebook was asked for by; None: the default.
        codebook_name: name that the codebook has.
        codebook_digest: of its content.
        needed_bytes: what the labels may take.
        chunks: chunks of the dataset.
        chunks_done: those with labels.
        rows_done: rows of chunks that are on the disk; from there it goes on after a restart.
        seconds_left: as it looks, while it runs.
        error: why it failed, in one sentence.
        ends: times that the process that ran it ended without a word since a row was finished.
        created_at: when it was asked for.
        started_at: when it was begun last.
        finished_at: when it ended.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal["geocentroids-job/1"] = "geocentroids-job/1"
    id: str
    number: int
    key: str
    state: JobState = "queued"
    url: str
    identity: str
    bidx: tuple[int, int, int] | None
    rescale: tuple[float, float] | None
    codebook: str | None
    codebook_name: str
    codebook_digest: str
    needed_bytes: int
    chunks: int
    chunks_done: int = 0
    rows_done: int = 0
    seconds_left: float | None = None
    error: str | None = None
    ends: int = 0
    created_at: AwareDatetime
    started_at: AwareDatetime | None = None
    finished_at: AwareDatetime | None = None

    @property
    def finished(self) -> bool:
        """True if nothing will become of it any more."""
        return self.state in FINISHED

    def ended(self, state: JobState, at: datetime, error: str | None = None) -> Self:
        """Return the record of the job once it has finished."""
        return self.model_copy(update={"state": state, "finished_at": at, "error": error, "seconds_left": None})


class JobFiles:
    """The folder of jobs. A record is written by the holder of the job's lock only, and read by anyone at any time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._final: dict[str, JobRecord | None] = {}

    def creating(self) -> FileLock:
        """Wait until no other process creates jobs.

        Raises:
            OSError: if the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock.wait_for(self.folder / _LOCK)

    def all(self) -> list[JobRecord]:
        """Return all jobs, newest first. Records that cannot be read are left out, and logged once."""
        paths = list(self.folder.glob(f"*{_RECORD}"))
        found = [job for path in paths if (job := self._look(path)) is not None]
        for gone in self._final.keys() - {path.stem for path in paths}:
            self._final.pop(gone, None)
        return sorted(found, key=lambda job: job.number, reverse=True)

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job, or None if there is none of that name."""
        return self._look(self.folder / f"{job_id}{_RECORD}") if _ID.fullmatch(job_id) else None

    def write(self, job: JobRecord) -> None:
        """Write a record, at once and whole. Only for the holder of the job's lock, and for who creates it.

        Raises:
            OSError: if the folder cannot be written to.
        """
        path = self.folder / f"{job.id}{_RECORD}"
        new = path.with_suffix(f".{secrets.token_hex(4)}.new")
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(job.model_dump_json(indent=2))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)

    def lock(self, job: JobRecord) -> FileLock | None:
        """Take the lock of a job, or return None if somebody runs it."""
        return FileLock.take(self.folder / f"{job.id}{_LOCK}")

    def ask_to_cancel(self, job: JobRecord) -> None:
        """Leave word for whoever runs a job that it is not wanted any more."""
        (self.folder / f"{job.id}{_CANCEL}").touch()

    def cancelling(self, job: JobRecord) -> bool:
        """Tell whether a job is not wanted any more."""
        return (self.folder / f"{job.id}{_CANCEL}").exists()

    def rows(self, job: JobRecord) -> Path:
        """Return the directory for what a job has finished."""
        return self.folder / f"{job.id}{_ROWS}"

    def finish(self, job: JobRecord) -> None:
        """Write the last record of a job, and leave nothing else of it. Only for the holder of its lock.

        Raises:
            OSError: if the folder cannot be written to.
        """
        shutil.rmtree(self.rows(job), ignore_errors=True)  # first: the disk may be full
        self.write(job)
        (self.folder / f"{job.id}{_CANCEL}").unlink(missing_ok=True)

    def prune(self) -> None:
        """Remove the records of finished jobs but the newest. Only while ``creating``."""
        for job in [job for job in self.all() if job.finished][KEEP_FINISHED:]:
            for ending in (_CANCEL, _RECORD):
                (self.folder / f"{job.id}{ending}").unlink(missing_ok=True)

    def _look(self, path: Path) -> JobRecord | None:
        """Return a record; None if there is none, or it cannot be read. Those that change no more come from memory."""
        name = path.stem
        if name in self._final:
            return self._final[name] if path.exists() else None
        try:
            job = JobRecord.model_validate_json(path.read_bytes())
            if job.id != name:
                raise ValueError(f"it is the record of {job.id}")
        except OSError:  # it was removed meanwhile
            return None
        except ValueError as error:
            problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            logger.warning("the job record %s is left out: %s", path, problem)
            self._final[name] = None
            return None
        if job.finished:
            self._final[name] = job
        return job


class FinishedRows:
    """Labels and similarities of the rows of patches that a job has finished, in two plain files.

    Plain files, appended to: in a mapped file a full disk would end the process instead of raising an error.

    Args:
        folder: directory of its own, made if it does not exist.
        footprint: patches of the dataset.
        stride_patches: rows of patches in a row of chunks.
    """

    def __init__(self, folder: Path, footprint: PatchRange, stride_patches: int) -> None:
        folder.mkdir(exist_ok=True)
        self._labels, self._similarity = folder / "labels.raw", folder / "similarity.raw"
        self._item_bytes = {self._labels: 2, self._similarity: 4}
        self._footprint = footprint
        self._chunks = footprint.chunk_range(stride_patches)
        self._stride = stride_patches

    def resume(self, rows_done: int) -> int:
        """Cut off what is not said to be finished.

        Args:
            rows_done: rows of chunks that the job's record says are finished.

        Returns:
            Rows of chunks that are there; fewer if files were lost.
        """
        width = self._footprint.shape[1]
        for path, item_bytes in self._item_bytes.items():
            path.touch()
            while rows_done and self._patch_rows(rows_done) * width * item_bytes > path.stat().st_size:
                rows_done -= 1
        for path, item_bytes in self._item_bytes.items():
            os.truncate(path, self._patch_rows(rows_done) * width * item_bytes)
        return rows_done

    def left(self, rows_done: int) -> PatchRange:
        """Return the patches that are not finished."""
        area = self._footprint
        return PatchRange(area.row_start + self._patch_rows(rows_done), area.row_stop, area.col_start, area.col_stop)

    def append(self, strip: LabelBlock) -> None:
        """Add a row of chunks. When this returns it is on the disk.

        Raises:
            OSError: if the disk is full.
        """
        for path, values in ((self._labels, strip.labels), (self._similarity, strip.similarity)):
            with path.open("ab") as file:
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def strips(self) -> Iterator[LabelBlock]:
        """Yield all rows, some at a time, from the top."""
        area, (rows, cols) = self._footprint, self._footprint.shape
        for start in range(0, rows, _STRIP_ROWS):
            stop = min(rows, start + _STRIP_ROWS)
            part = PatchRange(area.row_start + start, area.row_start + stop, area.col_start, area.col_stop)
            count, before = (stop - start) * cols, start * cols
            labels = np.fromfile(self._labels, np.uint16, count, offset=2 * before)
            similarity = np.fromfile(self._similarity, np.float32, count, offset=4 * before)
            yield LabelBlock(part, labels.reshape(-1, cols), similarity.reshape(-1, cols))

    def _patch_rows(self, rows_done: int) -> int:
        """Return how many rows of patches the first rows of chunks hold."""
        stop = (self._chunks.row_start + rows_done) * self._stride
        return max(0, min(stop, self._footprint.row_stop) - self._footprint.row_start)
