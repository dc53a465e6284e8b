"""Background jobs: their labels, their order, and that they survive whatever ends them; then the same over HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fakes import (
    PATCH_PX,
    PATIENCE_S,
    FakeEncoder,
    Loader,
    fake_codebook,
    fake_service,
    open_image,
    until,
    window_id,
    write_codebooks,
    write_images,
)
from fastapi import FastAPI
from fastapi.testclient import TestClient
from titiler.core.factory import TilerFactory

from geocentroids_tiler.app import create_app
from geocentroids_tiler.codebook import save_codebook
from geocentroids_tiler.errors import (
    BusyError,
    JobNotFoundError,
    JobStateError,
    SourceUnavailableError,
    StorageFullError,
)
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.labels import job_files
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.job_files import FinishedRows, JobRecord
from geocentroids_tiler.labels.job_run import MAX_ENDS
from geocentroids_tiler.labels.jobs import Jobs
from geocentroids_tiler.labels.kept import KeptLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.source import Dataset, read_windows
from geocentroids_tiler.tiler import GeocentroidsExtension

API = "/cog/geocentroids/jobs"
KILLED = """
import sys
from pathlib import Path
from fakes import fake_service, open_image
from geocentroids_tiler.labels.job_files import FinishedRows

images, codebooks, labels = map(Path, sys.argv[1:])
service, _ = fake_service(images, codebooks, labels_dir=labels)
append, rows = FinishedRows.append, 0

def counted(self, strip):
    global rows
    append(self, strip)
    rows += 1
    if rows == 3:
        print("three rows", flush=True)
        sys.stdin.read()

FinishedRows.append = counted
service.jobs.submit(open_image(service, "hole.tif"), service.codebook(None), None)
service.jobs.run_next()
"""
"""A process that labels three rows and then waits to be killed, the third not in the record yet."""


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


class Process:
    """What one server process has."""

    def __init__(self, service: Service, loader: Loader) -> None:
        assert service.jobs is not None
        assert service.kept is not None
        self.service, self.loader = service, loader
        self.jobs: Jobs = service.jobs
        self.kept: KeptLabels = service.kept

    def encoder(self, codebook: str | None = None) -> FakeEncoder:
        """Return the encoder of a codebook, with what measured it forgotten."""
        found = self.service.codebook(codebook)
        if not self.service.loaded(found):
            self.service.engine(found).result(PATIENCE_S)
            self.loader.made[found.name].forget()
        encoder = self.loader.made[found.name]
        while encoder.entered.acquire(blocking=False):
            pass
        return encoder

    def dataset(self, image: str = "hole.tif", codebook: str | None = None, **options: Any) -> Dataset:
        return open_image(self.service, image, codebook, **options)

    def submit(self, image: str = "hole.tif", codebook: str | None = None, **options: Any) -> tuple[JobRecord, bool]:
        dataset = self.dataset(image, codebook, **options)
        return self.jobs.submit(dataset, self.service.codebook(codebook), codebook)

    def check(self, image: str = "hole.tif", codebook: str | None = None, **options: Any) -> None:
        """See that the labels of an image are kept, and are what the engine gives."""
        dataset, found = self.dataset(image, codebook, **options), self.service.codebook(codebook)
        kept = self.kept.find(dataset, found, fresh=True)
        assert kept is not None
        expected = self.service.engine(found).result().block(dataset, dataset.footprint)
        read = kept.read(dataset.footprint)
        np.testing.assert_array_equal(read.labels, expected.labels)
        np.testing.assert_array_equal(read.similarity.view(np.uint32), expected.similarity.view(np.uint32))

    @property
    def files(self) -> set[str]:
        """Names of the files of jobs."""
        return {path.name for path in (self.kept.folder / "jobs").iterdir()} - {".lock"}


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def start(images: Path, codebooks: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> Iterator[Callable[..., Process]]:
    """Start processes; when they end, what waits in the pool ends too."""
    made: list[Process] = []

    def start(folder: Path = codebooks, **settings: Any) -> Process:
        made.append(Process(*fake_service(images, folder, **({"labels_dir": tmp_path / "labels"} | settings))))
        return made[-1]

    yield start
    for process in made:
        for encoder in process.loader.made.values():
            encoder.gate.set()
        process.service.close()


def after_rows(monkeypatch: pytest.MonkeyPatch, count: int, action: Callable[[], object]) -> None:
    """Do something once when so many rows of chunks have been finished."""
    append = FinishedRows.append
    rows = 0

    def counted(self: FinishedRows, strip: LabelBlock) -> None:
        nonlocal rows
        append(self, strip)
        rows += 1
        if rows == count:
            action()

    monkeypatch.setattr(FinishedRows, "append", counted)


def windows_of_rows(dataset: Dataset, rows: range) -> set[str]:
    """Return the ids of whole windows whose core starts in rows of chunks, counted from the dataset's first."""
    area = dataset.footprint.chunk_range(dataset.preprocess.stride_patches)
    chunks = [ChunkIndex(area.row_start + i, j) for i in rows for j in range(area.col_start, area.col_stop)]
    found = {window_id(window.pixels) for window in read_windows(dataset, chunks, PATCH_PX) if window.labelled.all()}
    assert found
    return found


class TestOneJob:
    def test_labels(self, start: Callable[..., Process]) -> None:
        process = start()
        job, new = process.submit()
        assert (new, job.state, job.chunks_done) == (True, "queued", 0)
        assert job.chunks == process.dataset().chunk_count
        assert process.jobs.run_next()
        done = process.jobs.get(job.id)
        assert (done.state, done.chunks_done, done.error, done.seconds_left) == ("done", job.chunks, None, None)
        assert done.created_at <= done.started_at <= done.finished_at
        assert process.files == {f"{job.id}.json"}
        process.check()
        assert not process.jobs.run_next()

    def test_requests_go_first(self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []
        stream = LabelEngine.stream

        def spy(engine: LabelEngine, *args: Any, **kwargs: Any) -> Any:
            asked.append(kwargs)
            return stream(engine, *args, **kwargs)

        monkeypatch.setattr(LabelEngine, "stream", spy)
        process = start()
        process.submit()
        process.jobs.run_next()
        assert asked == [{"background": True}]

    def test_options_and_codebook(self, start: Callable[..., Process]) -> None:
        process = start()
        asked = {"image": "whole.tif", "codebook": "plain", "bidx": (3, 2, 1), "rescale": (20.0, 200.0)}
        job, _ = process.submit(**asked)
        assert (job.codebook_name, job.bidx, job.rescale) == ("plain", (3, 2, 1), (20, 200))
        assert process.jobs.run_next()
        assert process.jobs.get(job.id).state == "done"
        process.check(**asked)
        assert process.kept.find(process.dataset("whole.tif"), process.service.codebook(None), fresh=True) is None

    def test_one_dataset_has_one_job(self, start: Callable[..., Process]) -> None:
        process, other = start(), start()
        job, _ = process.submit()
        assert process.submit() == (job, False)
        assert other.submit() == (job, False)
        another, new = process.submit(bidx=(3, 2, 1))
        assert new
        assert another.number == job.number + 1
        assert process.jobs.run_next()
        assert other.submit() == (process.jobs.get(job.id), False)
        (process.kept.folder / "jobs" / f"{job.id}.json").unlink()
        again, new = other.submit()
        assert (new, again.state, again.chunks_done) == (False, "done", job.chunks)
        assert other.submit() == (again, False)
        assert process.jobs.get(again.id) == again

    def test_labels_that_were_removed_are_made_again(self, start: Callable[..., Process]) -> None:
        process = start()
        first, _ = process.submit()
        process.jobs.run_next()
        kept = process.kept.find(process.dataset(), process.service.codebook(None))
        for path in kept.folder.iterdir():
            path.unlink()
        kept.folder.rmdir()
        second, new = process.submit()
        assert new
        assert second.id != first.id
        process.jobs.run_next()
        process.check()

    def test_progress(self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
        process = start()
        now = datetime(2026, 1, 1, tzinfo=UTC)
        process.jobs._clock = lambda: now
        job, _ = process.submit()
        across = process.dataset().footprint.chunk_range(3).shape[1]
        seen: list[JobRecord] = []
        append = FinishedRows.append

        def later(self: FinishedRows, strip: LabelBlock) -> None:
            nonlocal now
            append(self, strip)
            now += timedelta(seconds=across)  # a second for each chunk
            seen.append(process.jobs.get(job.id))

        monkeypatch.setattr(FinishedRows, "append", later)
        process.jobs.run_next()
        assert [record.state for record in seen] == ["running"] * len(seen)
        assert [record.rows_done for record in seen] == list(range(len(seen)))
        for record in seen[2:]:
            assert record.chunks_done in (record.rows_done * across, record.rows_done * across + 1)
            assert record.seconds_left == pytest.approx(job.chunks - record.rows_done * across, rel=0.1)
        assert len(seen) * across == job.chunks

    def test_what_fails_is_not_kept(self, start: Callable[..., Process]) -> None:
        process = start()
        encoder = process.encoder()
        encoder.poison = {next(iter(windows_of_rows(process.dataset(), range(5, 6))))}
        job, _ = process.submit()
        assert process.jobs.run_next()
        failed = process.jobs.get(job.id)
        assert (failed.state, failed.error) == ("failed", "unexpected PoisonError: poisoned")
        assert process.files == {f"{job.id}.json"}
        assert [path.name for path in process.kept.folder.iterdir()] == ["jobs"]
        encoder.poison = set()
        again, new = process.submit()
        assert new
        assert again.id != job.id
        process.jobs.run_next()
        process.check()

    def test_a_full_disk(self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
        process = start()
        job, _ = process.submit()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(FinishedRows, "append", full)
        process.jobs.run_next()
        assert "No space left on device" in str(process.jobs.get(job.id).error)
        assert process.files == {f"{job.id}.json"}

    def test_a_source_that_changes(
        self, start: Callable[..., Process], images: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process = start()
        job, _ = process.submit()
        after_rows(monkeypatch, 2, lambda: os.utime(images / "hole.tif", ns=(1, 1)))
        process.jobs.run_next()
        failed = process.jobs.get(job.id)
        assert (failed.state, failed.error) == (
            "failed",
            "'hole.tif' changed while it was labelled; label it again",
        )
        assert [path.name for path in process.kept.folder.iterdir()] == ["jobs"]

    def test_a_source_that_changed_while_it_waited(self, start: Callable[..., Process], images: Path) -> None:
        job, _ = start().submit()
        os.utime(images / "hole.tif", ns=(1, 1))
        process = start()
        process.jobs.run_next()
        assert "changed while it was labelled" in str(process.jobs.get(job.id).error)
        assert not process.loader.made["blend"].encoded.keys() & windows_of_rows(process.dataset(), range(3))

    def test_a_source_that_does_not_answer_is_tried_again(self, start: Callable[..., Process]) -> None:
        process = start()
        failures = 2

        def sometimes(job: JobRecord) -> Any:
            nonlocal failures
            failures -= 1
            if failures >= 0:
                raise SourceUnavailableError("cannot open 'hole.tif'")
            return process.service._open_job(job)

        job, _ = process.submit()
        jobs = Jobs(process.kept, sometimes, 100, retry_delays_s=(0, 0))
        jobs.run_next()
        assert jobs.get(job.id).state == "done"
        process.check()
        failures = 3
        job, _ = process.submit("whole.tif")
        jobs.run_next()
        assert (jobs.get(job.id).state, jobs.get(job.id).error) == ("failed", "cannot open 'hole.tif'")

    def test_another_codebook_of_that_name(self, start: Callable[..., Process], tmp_path: Path) -> None:
        job, _ = start().submit()
        save_codebook(fake_codebook("blend", stride=2), tmp_path / "other" / "blend", card="For tests.")
        other = start(tmp_path / "other")
        other.jobs.run_next()
        assert "codebook 'blend' is no longer the one" in str(other.jobs.get(job.id).error)


class TestLimits:
    def test_too_many(self, start: Callable[..., Process]) -> None:
        process = start(max_jobs=2)
        first, _ = process.submit()
        process.submit("whole.tif")
        with pytest.raises(BusyError, match="2 jobs are not finished") as refused:
            process.submit("whole.tif", bidx=(3, 2, 1))
        assert refused.value.retry_after_s > 0
        assert process.submit() == (first, False), "it has one already"
        process.jobs.run_next()
        assert process.submit("whole.tif", bidx=(3, 2, 1))[1]

    def test_room_is_promised_once(self, start: Callable[..., Process]) -> None:
        dataset = start().dataset()
        rows, cols = dataset.footprint.shape
        needed = 6 * rows * cols
        process = start(label_files_bytes=2 * needed + 10)
        process.submit()
        process.submit(bidx=(3, 2, 1))
        assert process.jobs.reserved_bytes() == 2 * needed
        with pytest.raises(StorageFullError, match=f"may take {needed} bytes; {2 * needed} of the {2 * needed + 10}"):
            process.submit(bidx=(2, 3, 1))
        process.jobs.cancel(process.jobs.newest(1)[0].id)
        assert process.submit(bidx=(2, 3, 1))[1]
        process.jobs.run_next()
        used = process.kept.used_bytes()
        assert used > 0
        with pytest.raises(StorageFullError, match=f"may take {needed} bytes; {used + needed} of"):
            process.submit(bidx=(1, 3, 2))

    def test_finished_records_are_pruned(self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(job_files, "KEEP_FINISHED", 3)
        process = start()
        queued, _ = process.submit()
        made = []
        for i in range(6):
            job, _ = process.submit("whole.tif", rescale=(0.0, 100.0 + i))
            process.jobs.cancel(job.id)
            made.append(job.id)
        last, _ = process.submit("whole.tif")
        assert [job.id for job in process.jobs.newest(100)] == [last.id, *made[:-4:-1], queued.id]
        assert process.files == {f"{name}.json" for name in (last.id, *made[-3:], queued.id)}
        with pytest.raises(JobNotFoundError):
            process.jobs.get(made[0])

    def test_a_record_that_cannot_be_read_is_left_out(
        self, start: Callable[..., Process], caplog: pytest.LogCaptureFixture
    ) -> None:
        process = start()
        job, _ = process.submit()
        folder = process.kept.folder / "jobs"
        (folder / "0123456789abcdef.json").write_bytes(b"{")
        (folder / "fedcba9876543210.json").write_bytes((folder / f"{job.id}.json").read_bytes())
        for _ in range(3):
            assert [found.id for found in process.jobs.newest(9)] == [job.id]
        assert len(caplog.records) == 2
        assert process.jobs.run_next()
        assert process.jobs.get(job.id).state == "done"

    def test_names_lead_nowhere_else(self, start: Callable[..., Process]) -> None:
        process = start()
        job, _ = process.submit()
        (process.kept.folder / "out.json").write_text(job.model_copy(update={"id": "out"}).model_dump_json())
        for name in ("../out", "out", "", "0" * 16, f"{job.id}/", job.id.upper() + "\n"):
            with pytest.raises(JobNotFoundError):
                process.jobs.get(name)
            with pytest.raises(JobNotFoundError):
                process.jobs.cancel(name)


class TestCancel:
    def test_queued(self, start: Callable[..., Process]) -> None:
        process, other = start(), start()
        job, _ = process.submit()
        assert other.jobs.cancel(job.id).state == "cancelled"
        assert process.files == {f"{job.id}.json"}
        assert process.jobs.cancel(job.id).state == "cancelled", "again"
        assert not process.jobs.run_next()

    def test_running_in_another_process(self, start: Callable[..., Process], pool: ThreadPoolExecutor) -> None:
        process, other = start(), start()
        encoder = process.encoder()
        encoder.gate.clear()
        job, _ = process.submit()
        running = pool.submit(process.jobs.run_next)
        encoder.await_run()
        assert other.jobs.cancel(job.id).state == "running", "until it sees it"
        again, new = other.submit()
        assert new, "the one that is being cancelled is not handed out"
        encoder.gate.set()
        assert running.result(PATIENCE_S)
        assert process.jobs.get(job.id).state == "cancelled"
        assert process.files == {f"{job.id}.json", f"{again.id}.json"}
        assert [path.name for path in process.kept.folder.iterdir()] == ["jobs"]
        assert process.jobs.run_next()
        process.check()

    def test_finished(self, start: Callable[..., Process]) -> None:
        process = start()
        encoder = process.encoder()
        done, _ = process.submit()
        process.jobs.run_next()
        encoder.poison = windows_of_rows(process.dataset("whole.tif"), range(2))
        failed, _ = process.submit("whole.tif")
        process.jobs.run_next()
        for job, state in ((done, "done"), (failed, "failed")):
            with pytest.raises(JobStateError, match=f"job {job.id} is {state}"):
                process.jobs.cancel(job.id)
        assert process.files == {f"{done.id}.json", f"{failed.id}.json"}


class TestGoingOn:
    @pytest.mark.parametrize(("codebook", "shared"), [("plain", 0), ("blend", 1)])
    def test_at_half(
        self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch, codebook: str, shared: int
    ) -> None:
        """Windows of finished rows are not encoded again, but those of the last that the next row blends with."""
        first = start()
        first.encoder(codebook)
        job, _ = first.submit(codebook=codebook)
        dataset = first.dataset(codebook=codebook)
        rows = 3 if codebook == "plain" else 6
        after_rows(monkeypatch, rows, first.jobs._stop.set)
        first.jobs.run_next()
        stopped = first.jobs.get(job.id)
        across = dataset.footprint.chunk_range(dataset.preprocess.stride_patches).shape[1]
        assert (stopped.state, stopped.rows_done, stopped.chunks_done) == ("queued", rows, rows * across)
        first.service.close()
        finished = windows_of_rows(dataset, range(rows - shared))
        assert finished <= first.loader.made[codebook].encoded.keys()
        second = start()
        encoder = second.encoder(codebook)
        assert second.jobs.run_next()
        assert second.jobs.get(job.id).state == "done"
        assert not finished & encoder.encoded.keys()
        assert windows_of_rows(dataset, range(rows, rows + 2)) <= encoder.encoded.keys()
        second.check(codebook=codebook)

    def test_close_stops_at_the_next_chunk_and_ends_the_thread(
        self, start: Callable[..., Process], pool: ThreadPoolExecutor
    ) -> None:
        process = start()
        encoder = process.encoder()
        encoder.gate.clear()
        job, _ = process.submit()
        waiting, _ = process.submit("whole.tif")
        process.jobs.start()
        process.jobs.start()
        encoder.await_run()
        assert process.jobs.get(job.id).state == "running"
        closing = pool.submit(process.jobs.close)
        until(process.jobs._stop.is_set)
        encoder.gate.set()
        closing.result(PATIENCE_S)
        assert not [thread for thread in threading.enumerate() if thread.name == "geocentroids-jobs"]
        assert [process.jobs.get(one.id).state for one in (job, waiting)] == ["queued", "queued"]
        process.jobs.start()
        assert not [thread for thread in threading.enumerate() if thread.name == "geocentroids-jobs"]
        again = start()
        again.jobs.start()
        until(lambda: again.jobs.get(waiting.id).state == "done")
        assert again.jobs.get(job.id).finished_at < again.jobs.get(waiting.id).finished_at, "in their order"
        again.check()

    @pytest.mark.parametrize("lost", [False, True])
    def test_after_the_process_was_killed(
        self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch, lost: bool
    ) -> None:
        """Its record says running, nobody holds the lock, and the files are longer than it says, or shorter."""
        first = start()
        job, _ = first.submit(codebook="plain")
        with monkeypatch.context() as patch:
            after_rows(patch, 3, first.jobs._stop.set)
            first.jobs.run_next()
        folder = first.kept.folder / "jobs"
        record = json.loads((folder / f"{job.id}.json").read_text())
        (folder / f"{job.id}.json").write_text(json.dumps(record | {"state": "running"}))
        raw = folder / f"{job.id}.rows" / "similarity.raw"
        if lost:
            os.truncate(raw, raw.stat().st_size * 3 // 4)
        else:
            with raw.open("ab") as file:
                file.write(bytes(4 * 30 * 2 + 3))
        second = start()
        encoder = second.encoder("plain")
        assert second.jobs.run_next()
        assert second.jobs.get(job.id).state == "done"
        dataset = second.dataset(codebook="plain")
        assert windows_of_rows(dataset, range(1, 2)).isdisjoint(encoder.encoded)
        assert windows_of_rows(dataset, range(2, 3)).isdisjoint(encoder.encoded) != lost
        second.check(codebook="plain")

    def test_a_process_that_is_killed(
        self, start: Callable[..., Process], images: Path, codebooks: Path, tmp_path: Path
    ) -> None:
        command = [sys.executable, "-c", KILLED, str(images), str(codebooks), str(tmp_path / "labels")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        second = start()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "three rows\n"
            (job,) = second.jobs.newest(9)
            assert (job.state, job.rows_done) == ("running", 2)
            assert not second.jobs.run_next(), "it is run by the other"
            process.kill()
        encoder = second.encoder()
        assert second.jobs.run_next()
        assert (second.jobs.get(job.id).state, second.jobs.get(job.id).chunks_done) == ("done", job.chunks)
        assert encoder.encoded
        second.check()

    def test_what_ends_the_process_each_time_is_given_up(self, start: Callable[..., Process]) -> None:
        process = start()
        job, _ = process.submit()
        path = process.kept.folder / "jobs" / f"{job.id}.json"
        for ends in (MAX_ENDS - 2, MAX_ENDS - 1):
            path.write_text(job.model_copy(update={"state": "running", "ends": ends}).model_dump_json())
            if ends == MAX_ENDS - 1:
                assert process.jobs.run_next()
        failed = process.jobs.get(job.id)
        assert (failed.state, failed.error) == (
            "failed",
            "the server ended 3 times while it labelled row 0 of the chunks",
        )
        second, _ = process.submit()
        path = path.with_name(f"{second.id}.json")
        path.write_text(second.model_copy(update={"state": "running", "ends": MAX_ENDS - 2}).model_dump_json())
        process.jobs.run_next()
        assert (process.jobs.get(second.id).state, process.jobs.get(second.id).ends) == ("done", 0)

    def test_stopped_when_the_labels_were_there(
        self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All rows are done and the files are not written yet: nothing is encoded again."""
        first = start()
        first.encoder()
        job, _ = first.submit()
        rows = first.dataset().footprint.chunk_range(3).shape[0]
        with monkeypatch.context() as patch:
            after_rows(patch, rows, first.jobs._stop.set)
            first.jobs.run_next()
        assert first.jobs.get(job.id).state == "queued"
        second = start()
        encoder = second.encoder()
        assert second.jobs.run_next()
        assert not encoder.encoded
        second.check()

    def test_kept_by_somebody_else_meanwhile(self, start: Callable[..., Process]) -> None:
        process = start()
        job, _ = process.submit()
        dataset, codebook = process.dataset(), process.service.codebook(None)
        engine = process.service.engine(codebook).result()
        with process.kept.writer(dataset, codebook, "other") as writer:
            writer.write(engine.block(dataset, dataset.footprint))
            writer.finish()
        process.encoder().forget()
        assert process.jobs.run_next()
        assert process.jobs.get(job.id).state == "done"
        assert not process.encoder().encoded


class TestSeveralProcesses:
    def test_one_job_is_run_once(self, start: Callable[..., Process], pool: ThreadPoolExecutor) -> None:
        process, other = start(), start()
        encoder = process.encoder()
        encoder.gate.clear()
        job, _ = process.submit()
        running = pool.submit(process.jobs.run_next)
        encoder.await_run()
        assert not other.jobs.run_next(), "there is no other"
        second, _ = other.submit("whole.tif")
        assert other.jobs.run_next(), "the next in the queue"
        assert [other.jobs.get(one.id).state for one in (job, second)] == ["running", "done"]
        encoder.gate.set()
        assert running.result(PATIENCE_S)
        assert process.jobs.get(job.id).state == "done"
        process.check()
        process.check("whole.tif")

    def test_a_job_that_another_finished_a_moment_ago(
        self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        process, other = start(), start()
        job, _ = process.submit()
        seen = other.jobs._files.all()
        assert process.jobs.run_next()
        done = process.jobs.get(job.id)
        monkeypatch.setattr(other.jobs._files, "all", lambda: seen)
        assert not other.jobs.run_next()
        assert other.jobs.get(job.id) == done
        assert process.files == {f"{job.id}.json"}

    def test_many_runners_and_jobs(self, start: Callable[..., Process]) -> None:
        processes = [start() for _ in range(3)]
        opened: list[str] = []
        everybody = threading.Barrier(6)

        def opener(job: JobRecord) -> Any:
            opened.append(job.id)
            return processes[0].service._open_job(job)

        made = [processes[0].submit("whole.tif", rescale=(0.0, 200.0 + i))[0].id for i in range(8)]
        runners = [Jobs(process.kept, opener, 100) for process in processes for _ in range(2)]

        def run(jobs: Jobs) -> int:
            everybody.wait(PATIENCE_S)
            count = 0
            while jobs.run_next():
                count += 1
            return count

        with ThreadPoolExecutor(6) as pool:
            counts = list(pool.map(run, runners))
        assert sum(counts) == 8
        assert sorted(opened) == sorted(made)
        assert {processes[0].jobs.get(name).state for name in made} == {"done"}
        assert processes[0].files == {f"{name}.json" for name in made}

    def test_many_ask_for_the_same(self, start: Callable[..., Process]) -> None:
        processes = [start() for _ in range(3)]
        datasets = [process.dataset() for process in processes]
        everybody = threading.Barrier(9)

        def submit(i: int) -> tuple[JobRecord, bool]:
            process = processes[i % 3]
            everybody.wait(PATIENCE_S)
            return process.jobs.submit(datasets[i % 3], process.service.codebook(None), None)

        with ThreadPoolExecutor(9) as pool:
            answers = list(pool.map(submit, range(9)))
        assert len({job.id for job, _ in answers}) == 1
        assert sum(new for _, new in answers) == 1

    def test_an_idle_process_takes_up_what_another_left(
        self, start: Callable[..., Process], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("geocentroids_tiler.labels.jobs.LOOK_EVERY_S", 0.01)
        idle, other = start(), start()
        idle.jobs.start()
        job, _ = other.submit()
        until(lambda: other.jobs.get(job.id).state == "done")
        other.check()


class TestHttp:
    @pytest.fixture
    def process(self, start: Callable[..., Process]) -> Process:
        return start(max_jobs=2)

    @pytest.fixture
    def client(self, process: Process) -> TestClient:
        return TestClient(create_app(service=process.service))

    def ask(self, client: TestClient, method: str, path: str, status: int, **query: Any) -> Any:
        answer: httpx.Response = client.request(method, path, params=query)
        assert answer.status_code == status, answer.text
        assert answer.headers["cache-control"] == "no-store"
        return answer

    def test_from_the_first_to_the_last(self, process: Process, client: TestClient) -> None:
        encoder = process.encoder()
        encoder.gate.clear()
        answer = self.ask(client, "POST", API, 202, url="hole.tif", bidx=[1, 2, 3], rescale="0,255")
        job = answer.json()
        assert answer.headers["location"] == job["href"] == f"http://testserver{API}/{job['id']}"
        assert (job["url"], job["codebook"], job["bidx"], job["rescale"]) == ("hole.tif", "blend", [1, 2, 3], [0, 255])
        assert (job["state"], job["chunks_done"], job["error"]) == ("queued", 0, None)
        encoder.await_run()
        found = self.ask(client, "GET", job["href"], 200).json()
        assert (found["state"], found["finished_at"]) == ("running", None)
        same = self.ask(client, "POST", API, 200, url="hole.tif", bidx=[1, 2, 3], rescale="0,255")
        assert same.json()["id"] == job["id"]
        assert same.headers["location"] == job["href"]
        second = self.ask(client, "POST", API, 202, url="whole.tif").json()
        full = self.ask(client, "POST", API, 503, url="whole.tif", codebook="plain")
        assert full.json() == {
            "detail": "2 jobs are not finished, and this server keeps at most 2; try again when some are done"
        }
        assert int(full.headers["retry-after"]) > 0
        listed = self.ask(client, "GET", API, 200).json()["jobs"]
        assert [item["id"] for item in listed] == [second["id"], job["id"]]
        assert [item["id"] for item in self.ask(client, "GET", API, 200, limit=1).json()["jobs"]] == [second["id"]]
        assert self.ask(client, "DELETE", second["href"], 200).json()["state"] == "cancelled"
        encoder.gate.set()
        until(lambda: client.get(job["href"]).json()["state"] == "done")
        done = self.ask(client, "POST", API, 200, url="hole.tif", bidx=[1, 2, 3], rescale="0,255").json()
        assert (done["id"], done["state"], done["chunks_done"]) == (job["id"], "done", job["chunks"])
        refused = self.ask(client, "DELETE", job["href"], 409).json()
        assert refused == {"detail": f"job {job['id']} is done; only a queued or running one can be cancelled"}
        process.check(bidx=(1, 2, 3), rescale=(0.0, 255.0))

    def test_cancel_what_runs(self, process: Process, client: TestClient) -> None:
        encoder = process.encoder()
        encoder.gate.clear()
        job = self.ask(client, "POST", API, 202, url="hole.tif").json()
        encoder.await_run()
        assert self.ask(client, "DELETE", job["href"], 200).json()["state"] == "running"
        encoder.gate.set()
        until(lambda: client.get(job["href"]).json()["state"] == "cancelled")

    @pytest.mark.parametrize(
        ("method", "path", "query", "status", "text"),
        [
            ("POST", API, {}, 422, "url is missing"),
            ("POST", API, {"url": "missing.tif"}, 404, "cannot open 'missing.tif'"),
            ("POST", API, {"url": "../hole.tif"}, 400, "leads out of the folder"),
            ("POST", API, {"url": "hole.tif", "codebook": "nope"}, 404, "there is no codebook 'nope'"),
            ("POST", API, {"url": "hole.tif", "bidx": [1, 2]}, 400, "three band numbers"),
            ("GET", f"{API}/0123456789abcdef", {}, 404, "there is no job '0123456789abcdef'"),
            ("GET", f"{API}/nonsense", {}, 404, "there is no job 'nonsense'"),
            ("DELETE", f"{API}/nonsense", {}, 404, "there is no job 'nonsense'"),
            ("GET", f"{API}/{'x' * 65}", {}, 422, "job_id="),
            ("GET", API, {"limit": 0}, 422, "limit='0'"),
            ("GET", API, {"limit": 1001}, 422, "limit='1001'"),
        ],
    )
    def test_errors(
        self, client: TestClient, method: str, path: str, query: dict[str, Any], status: int, text: str
    ) -> None:
        assert text in self.ask(client, method, path, status, **query).json()["detail"]

    def test_no_room(self, start: Callable[..., Process]) -> None:
        client = TestClient(create_app(service=start(label_files_bytes=1000).service))
        detail = self.ask(client, "POST", API, 507, url="hole.tif").json()["detail"]
        assert "0 of the 1000 bytes for labels (GEOCENTROIDS_LABEL_FILES_BYTES) are taken" in detail

    def test_a_folder_that_cannot_be_written_to(self, start: Callable[..., Process], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        client = TestClient(create_app(service=start(labels_dir=tmp_path / "file").service))
        detail = self.ask(client, "POST", API, 500, url="hole.tif").json()["detail"]
        assert detail == "the folder for labels cannot be written to: Not a directory"
        assert self.ask(client, "GET", API, 200).json() == {"jobs": []}

    def test_switched_off(self, images: Path, codebooks: Path) -> None:
        service, _ = fake_service(images, codebooks)
        client = TestClient(create_app(service=service))
        for method, path in (("POST", API), ("GET", API), ("GET", f"{API}/x"), ("DELETE", f"{API}/x")):
            answer = self.ask(client, method, path, 400, url="hole.tif")
            assert "GEOCENTROIDS_LABELS_DIR (geocentroids serve --labels DIR)" in answer.json()["detail"]
        service.close()

    def test_a_server_that_starts_goes_on_with_what_is_left(self, start: Callable[..., Process]) -> None:
        job, _ = start().submit()
        process = start()
        with TestClient(create_app(service=process.service)) as client:
            until(lambda: client.get(f"{API}/{job.id}").json()["state"] == "done")
        assert not [thread for thread in threading.enumerate() if thread.name == "geocentroids-jobs"]

    def test_under_the_prefix_of_another_application(self, process: Process) -> None:
        app = FastAPI()
        extension = GeocentroidsExtension(settings=process.service.settings, service=process.service)
        factory = TilerFactory(router_prefix="/some/images", extensions=[extension])
        app.include_router(factory.router, prefix="/some/images")
        client = TestClient(app, root_path="/behind")
        answer = self.ask(client, "POST", "/some/images/geocentroids/jobs", 202, url="hole.tif")
        assert answer.headers["location"].startswith("http://testserver/behind/some/images/geocentroids/jobs/")

    def test_documented(self, client: TestClient) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        post, get, one = paths[API]["post"], paths[API]["get"], paths[f"{API}/{{job_id}}"]
        assert {"200", "202", "400", "404", "503", "507", "422"} <= post["responses"].keys()
        for status in ("200", "202"):
            schema = post["responses"][status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/JobInfo"}
        assert {parameter["name"] for parameter in post["parameters"]} == {"url", "codebook", "bidx", "rescale"}
        assert {parameter["name"] for parameter in get["parameters"]} == {"limit"}
        assert {"409", "404"} <= one["delete"]["responses"].keys()
        operations = [route["operationId"] for path in paths.values() for route in path.values()]
        assert len(set(operations)) == len(operations)

    def test_the_event_loop_is_free_while_a_lock_is_waited_for(
        self, process: Process, client: TestClient, pool: ThreadPoolExecutor
    ) -> None:
        process.dataset("whole.tif")
        waiting = threading.Event()
        creating = process.jobs._files.creating

        def slow() -> Any:
            waiting.set()
            return creating()

        with client:
            with creating():
                process.jobs._files.creating = slow  # type: ignore[method-assign]
                asked = pool.submit(client.post, API, params={"url": "whole.tif"})
                assert waiting.wait(PATIENCE_S)
                assert client.get("/healthz").status_code == 200
                assert not asked.done()
            assert asked.result(PATIENCE_S).status_code == 202
