"""The engine against brute force over the whole image, and under stampedes, failures and tiny caches."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import (
    MARGIN,
    PATCH_PX,
    PATIENCE_S,
    STRIDES,
    WINDOW,
    FakeEncoder,
    PoisonError,
    brute_force,
    fake_codebook,
    fake_service,
    open_image,
    part_of,
    until,
    window_id,
    write_codebooks,
    write_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.errors import BusyError, EncoderError
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.labels import engine as engine_module
from geocentroids_tiler.labels.batching import BACKGROUND, Rank
from geocentroids_tiler.labels.engine import SPARE_READERS, LabelBlock, LabelEngine
from geocentroids_tiler.labels.once import Claim, Lru, Once, Work
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels, LabelStore
from geocentroids_tiler.source import Dataset, ReadOptions, read_windows

TIE = 1e-6
"""Blending weights are float32, so nearer ties may flip. Measured: no label differs; the smallest lead is 1e-5."""
BLENDED = pytest.mark.parametrize("name", ["plain", "blend"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@dataclass
class Bench:
    engine: LabelEngine
    encoder: FakeEncoder
    open: Callable[[str], Dataset]

    def window(self, dataset: Dataset, index: ChunkIndex) -> str:
        return window_id(read_windows(dataset, [index], PATCH_PX)[0].pixels)


@pytest.fixture
def bench(images: Path, codebooks: Path) -> Iterator[Callable[..., Bench]]:
    made = []

    def make(name: str, **settings: Any) -> Bench:
        service, loader = fake_service(images, codebooks, **settings)
        engine = service.engine(service.codebook(name)).result(PATIENCE_S)
        encoder = loader.made[name]
        encoder.forget()
        while encoder.entered.acquire(blocking=False):
            pass
        made.append((service, encoder))
        return Bench(engine, encoder, lambda image: open_image(service, image, name))

    yield make
    for service, encoder in made:
        encoder.gate.set()
        service.close()


@pytest.fixture(scope="module")
def truth(images: Path, codebooks: Path) -> Callable[[str, str], Any]:
    """Brute force labels of an image, by codebook and image, computed once."""
    known: dict[tuple[str, str], Any] = {}

    def look_up(name: str, image: str) -> Any:
        if (name, image) not in known:
            service, _ = fake_service(images, codebooks)
            known[name, image] = brute_force(open_image(service, image, name), service.codebook(name))
            service.close()
        return known[name, image]

    return look_up


def same(left: LabelBlock, right: LabelBlock) -> bool:
    """Tell whether two blocks are equal bit for bit."""
    return (
        left.patches == right.patches
        and left.labels.tobytes() == right.labels.tobytes()
        and left.similarity.tobytes() == right.similarity.tobytes()
    )


def cut(block: LabelBlock, part: PatchRange) -> LabelBlock:
    labels = np.ascontiguousarray(part_of(block.labels, block.patches, part))
    return LabelBlock(part, labels, np.ascontiguousarray(part_of(block.similarity, block.patches, part)))


def _first_chunk(dataset: Dataset) -> tuple[int, int, int, int]:
    chunk = next(iter(dataset.footprint.chunks(6))).patches(6)
    return chunk.row_start, chunk.row_stop, chunk.col_start, chunk.col_stop


class TestAgainstBruteForce:
    @BLENDED
    @pytest.mark.parametrize("image", ["whole.tif", "hole.tif", "mercator.tif", "degrees.tif"])
    def test_labels(self, bench: Callable[..., Bench], truth: Callable[..., Any], name: str, image: str) -> None:
        b = bench(name)
        dataset = b.open(image)
        expected, lead = truth(name, image)
        block = b.engine.block(dataset, dataset.footprint)
        clear = lead > TIE
        assert clear.mean() > 0.999
        np.testing.assert_array_equal(block.labels[clear], expected[clear])
        assert len(np.unique(expected)) > 10, "the image has many classes"

    def test_the_codebooks_differ(self, truth: Callable[..., Any]) -> None:
        """Blending changes labels in this image; otherwise the comparison above would show nothing."""
        plain, blend = (truth(name, "whole.tif")[0] for name in ("plain", "blend"))
        assert (plain != blend).mean() > 0.05

    @pytest.mark.parametrize(("metric", "stride"), [("inner_product", 6), ("cosine", 3), ("l2", 2)])
    def test_every_overlap_and_metric(self, images: Path, metric: str, stride: int) -> None:
        codebook = fake_codebook("blend", metric=metric, stride=stride)
        service, _ = fake_service(images, images)
        dataset = service.dataset("degrees.tif", ReadOptions(), codebook).result(PATIENCE_S)
        engine = service.engine(codebook).result(PATIENCE_S)
        expected, lead = brute_force(dataset, codebook)
        labels = engine.block(dataset, dataset.footprint).labels
        np.testing.assert_array_equal(labels[lead > TIE], expected[lead > TIE])
        service.close()

    @BLENDED
    def test_similarity_is_that_of_the_label(self, bench: Callable[..., Bench], name: str) -> None:
        b = bench(name)
        dataset = b.open("hole.tif")
        block = b.engine.block(dataset, dataset.footprint)
        np.testing.assert_array_equal(np.isnan(block.similarity), block.labels == NODATA_LABEL)
        if name == "plain":  # of one window, so it can be computed again for a patch
            s = STRIDES[name]
            index = ChunkIndex(dataset.footprint.row_start // s + 1, dataset.footprint.col_start // s + 1)
            chunk = b.engine.chunk(dataset, index).result(PATIENCE_S)
            (window,) = read_windows(dataset, [index], PATCH_PX)
            token = b.encoder.encode(window.pixels[None])[0][MARGIN + 2, MARGIN + 4]
            centroid = b.engine.codebook.centroids[chunk.labels[2, 4]].astype(np.float64)
            assert chunk.similarity[2, 4] == np.float32(-np.linalg.norm(token - centroid))


class TestEachWindowOnce:
    @BLENDED
    def test_one_caller(self, bench: Callable[..., Bench], name: str) -> None:
        b = bench(name)
        dataset = b.open("whole.tif")
        b.engine.block(dataset, dataset.footprint)
        s, overlap = STRIDES[name], (WINDOW - 2 * MARGIN) // STRIDES[name]
        rows, cols = dataset.footprint.chunk_range(s).shape
        assert len(b.encoder.encoded) == (rows + overlap - 1) * (cols + overlap - 1)
        assert set(b.encoder.encoded.values()) == {1}
        assert b.engine.windows_encoded == len(b.encoder.encoded)

    @BLENDED
    def test_stampede_of_threads_and_event_loops(self, bench: Callable[..., Bench], name: str) -> None:
        b = bench(name, read_threads=3)
        dataset = b.open("hole.tif")
        b.encoder.gate.clear()
        start = threading.Barrier(13, timeout=PATIENCE_S)

        def in_thread() -> LabelBlock:
            start.wait()
            return b.engine.block(dataset, dataset.footprint)

        def in_loop() -> list[LabelBlock]:
            async def several() -> list[LabelBlock]:
                return await asyncio.gather(*(b.engine.block_async(dataset, dataset.footprint) for _ in range(3)))

            start.wait()
            return asyncio.run(several())

        with ThreadPoolExecutor(12) as pool:
            threads = [pool.submit(in_thread) for _ in range(8)]
            loops = [pool.submit(in_loop) for _ in range(4)]
            start.wait()
            b.encoder.await_run()
            b.encoder.gate.set()
            blocks = [future.result(PATIENCE_S) for future in threads]
            blocks += [block for future in loops for block in future.result(PATIENCE_S)]
        assert set(b.encoder.encoded.values()) == {1}
        assert all(same(block, blocks[0]) for block in blocks)

    def test_whatever_the_caches_hold(self, bench: Callable[..., Bench]) -> None:
        """Chunks in flight share their windows even where nothing is kept."""
        b = bench("blend", token_cache_bytes=0, label_cache_bytes=0)
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        row, col = dataset.footprint.row_start // 3 + 1, dataset.footprint.col_start // 3 + 1
        chunks = [
            b.engine.chunk(dataset, ChunkIndex(row + i, col + j)) for i in range(3) for j in range(3) for _ in "ab"
        ]
        # One window is on the device and the other 15 wait: all chunks have asked for their windows.
        b.encoder.await_run()
        until(lambda: b.engine.windows_to_read == 0 and b.engine.device_queue >= 16 - b.encoder.batch_windows)
        until(lambda: len(b.engine.labeller._tokens._running) == 16)
        b.encoder.gate.set()
        for chunk in chunks:
            chunk.result(PATIENCE_S)
        assert len(b.encoder.encoded) == 16
        assert set(b.encoder.encoded.values()) == {1}

    def test_requests_share_batches(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain")
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        all_chunks = list(dataset.footprint.chunks(6))
        first = b.engine.chunk(dataset, all_chunks[0])
        b.encoder.await_run()
        one = [b.engine.chunk(dataset, index) for index in all_chunks[1:3]]
        two = [b.engine.chunk(dataset, index) for index in all_chunks[6:8]]
        until(lambda: b.engine.device_queue == 4)
        b.encoder.gate.set()
        for future in (first, *one, *two):
            future.result(PATIENCE_S)
        assert b.encoder.runs == [1, 4]


class TestFailures:
    def test_a_poisoned_window_fails_its_chunks_only(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        chunks = dataset.footprint.chunk_range(3)
        bad = ChunkIndex(chunks.row_start + 3, chunks.col_start + 4)
        b.encoder.poison.add(b.window(dataset, bad))
        futures = {index: b.engine.chunk(dataset, index) for index in dataset.footprint.chunks(3)}
        failed = {index for index, future in futures.items() if future.exception(PATIENCE_S) is not None}
        assert failed == {ChunkIndex(bad.row + i, bad.col + j) for i in (0, 1) for j in (0, 1)}
        for index in failed:
            assert isinstance(futures[index].exception(), PoisonError)
        counted = b.encoder.encoded.copy()
        assert b.engine.windows_encoded == sum(counted.values()), "a window is counted when it is encoded"

        with pytest.raises(PoisonError):
            b.engine.block(dataset, dataset.footprint)
        b.encoder.poison.clear()
        healed = b.engine.block(dataset, dataset.footprint)
        assert (b.encoder.encoded - counted).total() == 1, "only the window that failed was encoded again"
        fresh = bench("blend")
        assert same(healed, fresh.engine.block(fresh.open("whole.tif"), dataset.footprint))

    def test_a_source_that_fails_while_it_is_read(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        broken = True

        def read(*args: Any) -> Any:
            if broken:
                raise OSError("gone")
            return iter(read_windows(*args))

        monkeypatch.setattr(engine_module, "iterate_windows", read)
        with pytest.raises(OSError, match="gone"):
            b.engine.block(dataset, dataset.footprint)
        until(lambda: not b.engine._pixels._running)  # whoever joins a read that began before shares its failure
        broken = False
        assert (b.engine.block(dataset, dataset.footprint).labels != NODATA_LABEL).any()

    def test_a_failed_assignment_is_not_remembered(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = bench("plain")
        dataset = b.open("whole.tif")
        index = next(iter(dataset.footprint.chunks(6)))
        with monkeypatch.context() as patch:
            patch.setattr(b.engine.labeller._assigner, "begin", lambda chunks: lambda: ([], []))
            with pytest.raises(RuntimeError, match="0 results"):
                b.engine.chunk(dataset, index).result(PATIENCE_S)
        assert b.engine.chunk(dataset, index).result(PATIENCE_S).labels.shape == (6, 6)


class TestWaitersThatGo:
    def test_others_are_not_disturbed(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()

        async def scene() -> LabelBlock:
            gone = asyncio.create_task(b.engine.block_async(dataset, dataset.footprint))
            stays = asyncio.create_task(b.engine.block_async(dataset, dataset.footprint))
            await asyncio.to_thread(b.encoder.await_run)
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            b.encoder.gate.set()
            return await asyncio.wait_for(stays, PATIENCE_S)

        block = asyncio.run(scene())
        assert (block.labels != NODATA_LABEL).mean() > 0.9
        assert set(b.encoder.encoded.values()) == {1}

    def test_a_loop_that_ends_while_it_waits(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain")
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()

        async def impatient() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(b.engine.block_async(dataset, dataset.footprint), 0.01)

        asyncio.run(impatient())
        b.encoder.gate.set()
        assert (b.engine.block(dataset, dataset.footprint).labels != NODATA_LABEL).mean() > 0.9

    def test_what_is_shared_cannot_be_cancelled(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain")
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        index = next(iter(dataset.footprint.chunks(6)))
        future = b.engine.chunk(dataset, index)
        assert not future.cancel()
        b.encoder.gate.set()
        assert future.result(PATIENCE_S) is b.engine.chunk(dataset, index).result(PATIENCE_S)


class TestGivenUp:
    """Requests whose client went away."""

    @pytest.fixture(autouse=True)
    def _all_is_read_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_module, "READ_AHEAD_RUNS", 1000)

    def leave(self, b: Bench, dataset: Dataset, parts: list[PatchRange], going: int) -> tuple[list[Any], int]:
        """Ask for parts at once, wait until all windows are asked for, and take the first ``going`` requests back."""

        async def scene() -> list[Any]:
            tasks = [asyncio.create_task(b.engine.block_async(dataset, part)) for part in parts]
            await asyncio.to_thread(b.encoder.await_run)
            await asyncio.to_thread(until, lambda: b.engine.windows_to_read == 0)
            for task in tasks[:going]:
                task.cancel()
            await asyncio.wait(tasks[:going])
            b.encoder.gate.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        b.encoder.gate.clear()
        answers = asyncio.run(scene())
        until(lambda: bool(b.encoder.runs))
        return answers, b.encoder.runs[0]

    def test_windows_nobody_wants_are_not_encoded(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend", read_threads=1)
        dataset = b.open("whole.tif")
        (gone,), running = self.leave(b, dataset, [dataset.footprint], 1)
        assert isinstance(gone, asyncio.CancelledError)
        until(lambda: b.engine.device_queue == 0 and b.engine.windows_waiting == 0)
        assert sum(b.encoder.runs) <= running + 1, "what was on the device or on its way to it, and nothing else"
        assert b.engine.windows_given_up > 50
        assert not b.engine._chunks._running
        until(lambda: not b.engine._pixels._running)  # what was being read

    def test_windows_others_want_are(self, bench: Callable[..., Bench], truth: Callable[..., Any]) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        area = dataset.footprint
        left = PatchRange(area.row_start, area.row_stop, area.col_start, area.col_start + 12)
        middle = PatchRange(area.row_start, area.row_stop, area.col_start + 7, area.col_start + 19)
        (gone, stays), _ = self.leave(b, dataset, [left, middle], 1)
        assert isinstance(gone, asyncio.CancelledError)
        labels, lead = truth("blend", "whole.tif")
        clear = part_of(lead, area, middle) > TIE
        assert (stays.labels == part_of(labels, area, middle))[clear].all()
        windows = {window for chunk in middle.chunks(3) for window in b.engine.layout.windows_of(chunk)}
        assert len(b.encoder.encoded) <= len(windows) + b.encoder.batch_windows
        assert set(b.encoder.encoded.values()) == {1}

    def test_chunks_asked_for_ahead(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend", read_threads=1)
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        ahead = b.engine.ahead(dataset, dataset.footprint.chunks(3))
        next(ahead)
        b.encoder.await_run()
        running = b.encoder.batch_windows
        ahead.close()  # type: ignore[attr-defined]
        b.encoder.gate.set()
        until(lambda: b.engine.windows_waiting == 0)
        assert len(b.encoder.encoded) <= running + 1  # one that was on its way from the reader to the queue
        assert not b.engine._chunks._running

    def test_others_are_read_when_the_queue_is_given_up(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Readers wait while the device has enough; they must be told also of what leaves its queue untaken."""
        monkeypatch.setattr(engine_module, "READ_AHEAD_RUNS", 2)
        b = bench("plain", read_threads=2)
        one, two = b.open("whole.tif"), b.open("hole.tif")
        b.encoder.gate.clear()
        gone = [b.engine.claim(one, index, (2, 0, 0)) for index in one.footprint.chunks(6)]
        b.encoder.await_run()
        until(lambda: b.engine.device_queue >= 8)
        stays = [b.engine.claim(two, index, (1, 0, 0)) for index in list(two.footprint.chunks(6))[:6]]
        assert b.engine.windows_to_read >= 6
        until(lambda: len(b.engine._reading._wake._waiters) == 2)  # type: ignore[attr-defined] # both readers sleep
        for claim in gone:
            claim.release()
        b.encoder.gate.set()
        for claim in stays:
            claim.result(PATIENCE_S)


class TestUrgency:
    def order(self, b: Bench, dataset: Dataset, indices: list[ChunkIndex]) -> list[ChunkIndex]:
        """Return chunks of a plain codebook in the order in which their windows were encoded."""
        name = {b.window(dataset, index): index for index in indices}
        return [name[window] for window in b.encoder.encoded if window in name]

    def test_the_newest_viewport_first_and_background_last(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain", batch_windows=1)
        dataset = b.open("whole.tif")
        chunks = list(dataset.footprint.chunks(6))
        first, background, old, new = chunks[0], chunks[1:3], chunks[3:5], chunks[5:7]
        b.encoder.gate.clear()
        claims = [b.engine.claim(dataset, first, (1, 0, 0))]
        b.encoder.await_run()
        claims += [b.engine.claim(dataset, index, (0, 0, 0)) for index in background]
        claims += [b.engine.claim(dataset, index, (2, 0, 0)) for index in old]
        claims += [b.engine.claim(dataset, index, (3, 0, 0)) for index in new]
        until(lambda: b.engine.device_queue == 6)
        b.encoder.gate.set()
        for claim in claims:
            claim.result(PATIENCE_S)
        assert self.order(b, dataset, chunks[:7]) == [first, *new, *old, *background]

    def test_what_a_newer_request_wants_too_goes_with_it(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain", batch_windows=1)
        dataset = b.open("whole.tif")
        chunks = list(dataset.footprint.chunks(6))
        b.encoder.gate.clear()
        claims = [b.engine.claim(dataset, chunks[0], (1, 0, 0))]
        b.encoder.await_run()
        claims += [b.engine.claim(dataset, index, (2, 0, 0)) for index in chunks[1:4]]
        until(lambda: b.engine.device_queue == 3)
        claims.append(b.engine.claim(dataset, chunks[3], (5, 0, 0)))
        b.encoder.gate.set()
        for claim in claims:
            claim.result(PATIENCE_S)
        assert self.order(b, dataset, chunks[:4]) == [chunks[0], chunks[3], chunks[1], chunks[2]]


class TestOverload:
    def test_refused_at_the_door_and_what_is_kept_is_not(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain", queue_windows=4)
        dataset = b.open("whole.tif")
        kept = b.engine.block(dataset, PatchRange(*_first_chunk(dataset)))
        b.encoder.gate.clear()
        waiting = [b.engine.chunk(dataset, index) for index in list(dataset.footprint.chunks(6))[1:5]]
        until(lambda: b.engine.windows_waiting == 4)
        with pytest.raises(BusyError, match="at most 4 waiting") as refused:
            asyncio.run(b.engine.block_async(dataset, dataset.footprint))
        assert refused.value.retry_after_s == pytest.approx(4 * b.engine.seconds_per_chunk)
        with pytest.raises(BusyError, match="4 windows wait"):
            b.engine.block(dataset, dataset.footprint)
        assert b.engine.windows_waiting == 4, "the refused left nothing in the queue"
        assert b.engine._meters.rejected._value.get() == 2
        again = asyncio.run(b.engine.block_async(dataset, kept.patches))
        assert same(again, kept), "what is kept is answered all the same"
        b.encoder.gate.set()
        for future in waiting:
            future.result(PATIENCE_S)
        assert (b.engine.block(dataset, dataset.footprint).labels != NODATA_LABEL).any()

    def test_what_waits_to_be_read_counts(self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(engine_module, "READ_AHEAD_BYTES", 0)
        b = bench("plain", queue_windows=25, read_threads=1)
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        chunks = list(dataset.footprint.chunks(6))
        claims = [b.engine.claim(dataset, index, (1, 0, 0)) for index in chunks[:27]]
        b.encoder.await_run()
        assert b.engine.windows_waiting == 27
        with pytest.raises(BusyError, match="27 windows wait"):
            b.engine.block(dataset, dataset.footprint)
        b.encoder.gate.set()
        for claim in claims:
            claim.result(PATIENCE_S)

    def test_given_up_when_the_server_ends(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain", read_threads=1)
        dataset = b.open("whole.tif")
        answers = iter([False, False, True])
        with pytest.raises(BusyError, match="shutting down"):
            asyncio.run(b.engine.block_async(dataset, dataset.footprint, over=lambda: next(answers)))
        until(lambda: b.engine.windows_waiting == 0)

    def test_background_work_is_never_refused(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain", queue_windows=1)
        dataset = b.open("whole.tif")
        assert len(list(b.engine.stream(dataset, dataset.footprint, background=True))) == dataset.chunk_count

    @pytest.mark.parametrize("kind", ["thread", "loop"])
    def test_a_deadline(self, bench: Callable[..., Bench], kind: str) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()

        def in_loop() -> LabelBlock:
            return asyncio.run(b.engine.block_async(dataset, dataset.footprint, timeout_s=0.05))

        def in_thread() -> LabelBlock:
            return b.engine.block(dataset, dataset.footprint, timeout_s=0.05)

        with pytest.raises(BusyError, match=r"not there within 0\.05 s"):
            (in_thread if kind == "thread" else in_loop)()
        assert b.engine._meters.timed_out._value.get() == 1
        b.encoder.gate.set()
        until(lambda: b.engine.windows_waiting == 0)
        assert len(b.encoder.encoded) <= 2 * b.encoder.batch_windows, "the rest was given up"

    def test_a_timeout_of_the_source_is_not_the_deadline(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")

        def slow(*args: Any) -> Any:
            raise TimeoutError("the source is slow")

        monkeypatch.setattr(engine_module, "iterate_windows", slow)
        with pytest.raises(TimeoutError, match="the source is slow"):
            b.engine.block(dataset, dataset.footprint, timeout_s=PATIENCE_S)
        with pytest.raises(TimeoutError, match="the source is slow"):
            asyncio.run(b.engine.block_async(dataset, dataset.footprint, timeout_s=PATIENCE_S))

    def test_no_more_is_read_than_the_device_can_take_soon(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "READ_AHEAD_BYTES", 0)
        monkeypatch.setattr(engine_module, "READ_BATCH", 2)
        b = bench("plain", read_threads=1)
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        futures = [b.engine.chunk(dataset, index) for index in dataset.footprint.chunks(6)]
        b.encoder.await_run()
        until(lambda: b.engine.device_queue >= 8)  # two runs' worth
        being_read = 2
        assert len(futures) > 20
        assert b.engine.windows_to_read >= len(futures) - 8 - b.encoder.batch_windows - being_read
        assert b.engine._meters.windows_read._value.get() <= 8 + b.encoder.batch_windows + being_read
        b.encoder.gate.set()
        for future in futures:
            future.result(PATIENCE_S)


class TestBitForBit:
    @settings(max_examples=10, deadline=None)
    @given(data=st.data())
    def test_any_split_order_cache_and_number_of_readers(
        self, images: Path, codebooks: Path, truth: Callable[..., Any], data: st.DataObject
    ) -> None:
        name = data.draw(st.sampled_from(["plain", "blend"]))
        service, _ = fake_service(
            images,
            codebooks,
            label_cache_bytes=data.draw(st.sampled_from([0, 2000, 10**8])),
            token_cache_bytes=data.draw(st.sampled_from([0, 10_000, 10**8])),
            read_threads=data.draw(st.integers(1, 4)),
            batch_windows=data.draw(st.integers(1, 9)),
        )
        engine = service.engine(service.codebook(name)).result(PATIENCE_S)
        dataset = open_image(service, "hole.tif", name)
        area = dataset.footprint
        whole = self._reference(images, codebooks, name)
        for _ in range(data.draw(st.integers(1, 6))):
            row = data.draw(st.integers(area.row_start, area.row_stop - 1))
            col = data.draw(st.integers(area.col_start, area.col_stop - 1))
            part = PatchRange(
                row,
                data.draw(st.integers(row + 1, area.row_stop)),
                col,
                data.draw(st.integers(col + 1, area.col_stop)),
            )
            assert same(engine.block(dataset, part), cut(whole, part))
        assert service.store.nbytes <= service.settings.label_cache_bytes
        service.close()

    _known: dict[str, LabelBlock] = {}  # noqa: RUF012

    def _reference(self, images: Path, codebooks: Path, name: str) -> LabelBlock:
        if name not in self._known:
            service, _ = fake_service(images, codebooks)
            dataset = open_image(service, "hole.tif", name)
            engine = service.engine(service.codebook(name)).result(PATIENCE_S)
            self._known[name] = engine.block(dataset, dataset.footprint)
            service.close()
        return self._known[name]

    def test_threads_with_tiny_caches(self, bench: Callable[..., Bench]) -> None:
        tiny = bench("blend", label_cache_bytes=3000, token_cache_bytes=0, read_threads=4, batch_windows=3)
        large = bench("blend")
        dataset = large.open("whole.tif")
        whole = large.engine.block(dataset, dataset.footprint)
        area = dataset.footprint
        parts = [
            PatchRange(row, min(row + 7, area.row_stop), col, min(col + 5, area.col_stop))
            for row in range(area.row_start, area.row_stop, 4)
            for col in range(area.col_start, area.col_stop, 9)
        ]
        random.Random(0).shuffle(parts)
        with ThreadPoolExecutor(6) as pool:
            blocks = list(pool.map(lambda part: tiny.engine.block(dataset, part), parts))
        assert all(same(block, cut(whole, block.patches)) for block in blocks)

    def test_two_workers_agree(self, bench: Callable[..., Bench]) -> None:
        """Two processes share nothing but the file; so do two services."""
        one, two = bench("blend", batch_windows=2), bench("blend", batch_windows=7, read_threads=2)
        blocks = []
        for b in (one, two):
            dataset = b.open("mercator.tif")
            blocks.append(b.engine.block(dataset, dataset.footprint))
        assert same(*blocks)


class TestStores:
    """Labels that outlive the process."""

    def test_a_restart_with_a_warm_store_computes_nothing(self, bench: Callable[..., Bench], tmp_path: Path) -> None:
        first = bench("blend", label_store_dir=tmp_path / "store")
        dataset = first.open("hole.tif")
        before = first.engine.block(dataset, dataset.footprint)
        first.engine.close()
        second = bench("blend", label_store_dir=tmp_path / "store")
        again = second.open("hole.tif")
        assert same(second.engine.block(again, again.footprint), before)
        assert not second.encoder.runs
        assert second.engine._meters.windows_read._value.get() == 0

    def test_workers_of_one_machine_share_it(self, bench: Callable[..., Bench], tmp_path: Path) -> None:
        one, two = (bench("blend", label_store_dir=tmp_path / "store") for _ in range(2))
        dataset = one.open("whole.tif")
        area = dataset.footprint
        half = PatchRange(area.row_start, area.row_start + 15, area.col_start, area.col_stop)
        block = one.engine.block(dataset, half)
        assert one.engine._storing is not None
        until(lambda: len(one.engine._storing or ()) == 0)
        until(lambda: two.engine._tier is not None and same(two.engine.block(two.open("whole.tif"), half), block))
        whole = two.engine.block(two.open("whole.tif"), area)
        assert same(cut(whole, half), block)
        fresh = bench("blend")
        assert same(whole, fresh.engine.block(fresh.open("whole.tif"), area))

    def test_what_a_store_has_is_shared_by_a_stampede(self, bench: Callable[..., Bench], tmp_path: Path) -> None:
        b = bench("blend", label_store_dir=tmp_path / "store", label_cache_bytes=0)
        dataset = b.open("whole.tif")
        with ThreadPoolExecutor(6) as pool:
            blocks = list(pool.map(lambda _: b.engine.block(dataset, dataset.footprint), range(6)))
        assert all(same(block, blocks[0]) for block in blocks)
        until(lambda: len(b.engine._storing or ()) == 0)
        b.encoder.forget()
        assert same(b.engine.block(dataset, dataset.footprint), blocks[0])

    def test_labels_of_another_shape_are_not_believed(
        self, bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = bench("blend", label_store_dir=tmp_path / "store")
        dataset = b.open("whole.tif")
        monkeypatch.setattr(b.engine._tier, "get_many", lambda keys: [ChunkLabels.empty(5) for _ in keys])
        fresh = bench("blend")
        expected = fresh.engine.block(fresh.open("whole.tif"), dataset.footprint)
        assert same(b.engine.block(dataset, dataset.footprint), expected)

    def test_a_store_that_raises_fails_nothing_but_its_own(
        self, bench: Callable[..., Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        b = bench("blend", label_store_dir=tmp_path / "store")
        dataset = b.open("whole.tif")

        def broken(items: Any) -> None:
            raise OSError("disk")

        monkeypatch.setattr(b.engine._tier, "put_many", broken)
        assert (b.engine.block(dataset, dataset.footprint).labels != NODATA_LABEL).any()
        until(lambda: len(b.engine._storing or ()) == 0)

    def test_given_up_while_it_is_looked_for(self, bench: Callable[..., Bench], tmp_path: Path) -> None:
        b = bench("blend", label_store_dir=tmp_path / "store")
        dataset = b.open("whole.tif")
        gate, entered = threading.Event(), threading.Event()
        assert b.engine._tier is not None
        get_many = b.engine._tier.get_many

        def held(keys: Any) -> Any:
            entered.set()
            assert gate.wait(PATIENCE_S)
            return get_many(keys)

        b.engine._tier.get_many = held  # type: ignore[method-assign]
        claims = [b.engine.claim(dataset, index, (1, 0, 0)) for index in list(dataset.footprint.chunks(3))[:6]]
        assert entered.wait(PATIENCE_S)
        for claim in claims:
            claim.release()
        gate.set()
        until(lambda: len(b.engine._chunks) == 0)
        assert not b.encoder.runs, "nothing was begun for nobody"


class TestEdges:
    def test_beyond_the_image_is_no_data(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        area = dataset.footprint
        inside = b.engine.block(dataset, area)
        wide = PatchRange(area.row_start - 5, area.row_stop + 4, area.col_start - 3, area.col_stop + 7)
        block = b.engine.block(dataset, wide)
        assert same(cut(block, area), inside)
        beyond = np.ones(block.labels.shape, bool)
        part_of(beyond, wide, area)[:] = False
        assert (block.labels[beyond] == NODATA_LABEL).all()
        assert np.isnan(block.similarity[beyond]).all()

    def test_far_outside_nothing_is_read(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        block = b.engine.block(b.open("whole.tif"), PatchRange(0, 4, 0, 5))
        assert block.labels.shape == (4, 5)
        assert (block.labels == NODATA_LABEL).all()
        assert not b.encoder.runs

    def test_an_empty_range(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        assert b.engine.block(b.open("whole.tif"), PatchRange(0, 0, 0, 0)).labels.shape == (0, 0)

    @BLENDED
    def test_chunks_without_data_cost_nothing(self, bench: Callable[..., Bench], name: str) -> None:
        b = bench(name)
        dataset = b.open("hole.tif")
        s = STRIDES[name]
        empty = []
        for index in dataset.footprint.chunks(s):
            (window,) = read_windows(dataset, [index], PATCH_PX)
            if not window.labelled[MARGIN : MARGIN + s, MARGIN : MARGIN + s].any():
                empty.append(index)
        assert empty
        chunk = b.engine.chunk(dataset, empty[0]).result(PATIENCE_S)
        assert (chunk.labels == NODATA_LABEL).all()
        assert np.isnan(chunk.similarity).all()
        assert not b.encoder.runs

    def test_a_caller_keeps_few_chunks_in_the_queues(
        self, bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "CHUNKS_AHEAD", 5)
        b = bench("blend")
        dataset = b.open("whole.tif")
        asked: list[Claim[ChunkLabels]] = []
        most = 0
        ask = b.engine.claim

        def counted(*args: Any) -> Claim[ChunkLabels]:
            nonlocal most
            asked.append(ask(*args))
            most = max(most, sum(not claim.future.done() for claim in asked))
            return asked[-1]

        monkeypatch.setattr(b.engine, "claim", counted)
        b.engine.block(dataset, dataset.footprint)
        assert len(asked) == dataset.chunk_count
        assert 1 <= most <= 5


class TestClosing:
    def test_what_was_asked_is_finished_and_nothing_else(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend")
        dataset = b.open("whole.tif")
        indices = list(dataset.footprint.chunks(3))
        b.encoder.gate.clear()
        futures = [b.engine.chunk(dataset, index) for index in indices[:20]]
        b.encoder.await_run()
        closing = threading.Thread(target=b.engine.close)
        closing.start()
        until(lambda: b.engine._chunks._closed)
        with pytest.raises(EncoderError, match="shutting down"):
            b.engine.chunk(dataset, indices[-1])
        joined = b.engine.chunk(dataset, indices[5])
        b.encoder.gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        for future in (*futures, joined):
            assert (future.result(0).labels != NODATA_LABEL).any()
        assert b.engine.chunk(dataset, indices[0]).result(0) is futures[0].result(0), "what is kept is still there"

    def test_what_is_given_up_meanwhile_is_not_waited_for(self, bench: Callable[..., Bench]) -> None:
        b = bench("blend", read_threads=1)
        dataset = b.open("whole.tif")
        b.encoder.gate.clear()
        claims = [b.engine.claim(dataset, index, (1, 0, 0)) for index in list(dataset.footprint.chunks(3))[:30]]
        b.encoder.await_run()
        closing = threading.Thread(target=b.engine.close)
        closing.start()
        until(lambda: b.engine._chunks._closed)
        for claim in claims:
            claim.release()
        b.encoder.gate.set()
        closing.join(PATIENCE_S)
        assert not closing.is_alive()
        assert len(b.encoder.encoded) <= b.encoder.batch_windows + 1

    def test_twice(self, bench: Callable[..., Bench]) -> None:
        b = bench("plain")
        b.engine.close()
        b.engine.close()

    def test_no_threads_are_left(self, bench: Callable[..., Bench]) -> None:
        before = set(threading.enumerate())
        b = bench("plain", read_threads=3)
        names = [t.name for t in set(threading.enumerate()) - before]
        assert sum("geocentroids-read" in name for name in names) == 3 + SPARE_READERS
        assert sum("geocentroids-device" in name for name in names) == 1
        b.engine.close()
        assert b.encoder.closed
        assert not [
            t for t in set(threading.enumerate()) - before if t.name.startswith(("geocentroids-read", "geocentroids-d"))
        ]


class TestStore:
    def key(self, i: int) -> ChunkKey:
        return ChunkKey("u", "i", ReadOptions(), "d", "cpu", i, 0)

    def test_bounded_in_bytes_oldest_out_first(self) -> None:
        size = ChunkLabels.empty(6).nbytes
        store = LabelStore(3 * size)
        for i in range(3):
            store.put(self.key(i), ChunkLabels.empty(6))
        assert store.get(self.key(0)) is not None
        store.put(self.key(3), ChunkLabels.empty(6))
        assert store.nbytes == 3 * size
        assert [store.get(self.key(i)) is not None for i in range(4)] == [True, False, True, True]

    def test_an_entry_counts_at_least_its_arrays(self) -> None:
        assert ChunkLabels.empty(10).nbytes > 100 * (2 + 4)

    def test_larger_than_the_whole(self) -> None:
        store = LabelStore(100)
        store.put(self.key(0), ChunkLabels.empty(6))
        assert store.nbytes == 0


class TestOnce:
    def test_a_value_is_kept(self) -> None:
        once: Once[str, int] = Once(Lru(2))
        assert once.get("a", lambda work: work.finish(5)).result(0) == 5
        assert once.get("a", lambda work: work.finish(6)).result(0) == 5

    def test_a_failure_on_the_way_is_passed_on_and_forgotten(self) -> None:
        once: Once[str, int] = Once(Lru(2))

        def broken(work: Work[int]) -> None:
            raise OSError("no")

        with pytest.raises(OSError, match="no"):
            once.get("a", broken).result(0)
        assert once.get("a", lambda work: work.finish(1)).result(0) == 1
        assert once.given_up == 0

    def test_none_is_kept_where_none_is_to_be(self) -> None:
        once: Once[str, int] = Once(Lru(0))
        once.get("a", lambda work: work.finish(1))
        assert once.get("a", lambda work: work.finish(2)).result(0) == 2

    def test_bounded(self) -> None:
        kept: Lru[int, int] = Lru(3)
        once = Once(kept)
        for i in range(10):
            once.get(i, lambda work: work.finish(1))
        assert [i for i in range(10) if kept.get(i)] == [7, 8, 9]
        assert len(once) == 0


class Step:
    """Something that a computation waits for, as a queue's ticket: waiting until it is running."""

    def __init__(self) -> None:
        self.running = False
        self.given_back = 0
        self.rank = BACKGROUND

    def release(self) -> bool:
        if not self.running:
            self.given_back += 1
        return not self.running

    def raise_rank(self, rank: Rank) -> None:
        self.rank = max(self.rank, rank)


class TestClaims:
    """Who waits for a value, and what becomes of it when nobody does."""

    def ask(
        self, once: Once[str, int], key: str, started: list[Work[int]], step: Step, rank: Rank = (1, 0, 0)
    ) -> Claim[int]:
        def start(work: Work[int]) -> None:
            started.append(work)
            work.hold(step)

        return once.claim(key, start, rank)

    def test_given_up_with_the_last_claim(self) -> None:
        once: Once[str, int] = Once(Lru(2))
        started: list[Work[int]] = []
        step = Step()
        one, two = (self.ask(once, "a", started, step) for _ in range(2))
        one.release()
        one.release()  # the same share
        assert (step.given_back, len(once)) == (0, 1)
        two.release()
        assert (step.given_back, len(once), once.given_up) == (1, 0, 1)
        again = self.ask(once, "a", started, Step())
        assert len(started) == 2, "who asks next starts again"
        started[0].finish(7)  # too late
        assert not again.future.done()
        started[1].finish(8)
        assert again.future.result(0) == 8

    def test_what_runs_is_kept_for_the_next(self) -> None:
        once: Once[str, int] = Once(Lru(2))
        started: list[Work[int]] = []
        step = Step()
        claim = self.ask(once, "a", started, step)
        step.running = True
        claim.release()
        assert (len(once), once.given_up) == (1, 0)
        joined = self.ask(once, "a", started, Step())
        assert len(started) == 1
        started[0].finish(3)
        assert joined.future.result(0) == 3

    def test_nothing_more_is_begun_for_nobody(self) -> None:
        once: Once[str, int] = Once(Lru(2))
        started: list[Work[int]] = []
        first, second = Step(), Step()
        claim = self.ask(once, "a", started, first)
        first.running = True
        claim.release()
        first.running = False
        started[0].hold(second)  # the first step is over; the next would begin
        assert (second.given_back, len(once), once.given_up) == (1, 0, 1)

    def test_claims_of_claims(self) -> None:
        lock = threading.RLock()
        outer: Once[str, int] = Once(Lru(2), lock)
        inner: Once[str, int] = Once(Lru(2), lock)
        started: list[Work[int]] = []
        step = Step()

        def start(work: Work[int]) -> None:
            work.after(self.ask(inner, "part", started, step, work.rank), lambda value: work.finish(value + 1))

        one, two = outer.claim("x", start, (1, 0, 0)), outer.claim("y", start, (2, 0, 0))
        assert step.rank == (2, 0, 0), "as urgent as the most urgent of those who wait"
        outer.claim("x", start, (5, 0, 0)).release()
        assert step.rank == (5, 0, 0)
        one.release()
        assert step.given_back == 0
        assert (len(outer), outer.given_up) == (1, 1)
        started[0].finish(4)
        assert two.result(0) == 5
        assert len(started) == 1

    def test_a_failed_part_gives_up_the_others(self) -> None:
        lock = threading.RLock()
        outer: Once[str, int] = Once(Lru(2), lock)
        inner: Once[str, int] = Once(Lru(2), lock)
        parts: dict[str, Work[int]] = {}
        steps = {"bad": Step(), "good": Step()}

        def start(work: Work[int]) -> None:
            for name in steps:

                def begin(part: Work[int], name: str = name) -> None:
                    parts[name] = part
                    part.hold(steps[name])

                work.after(inner.claim(name, begin, (1, 0, 0)), lambda value: None)

        claim = outer.claim("x", start, (1, 0, 0))
        parts["bad"].fail(OSError("bad"))
        with pytest.raises(OSError, match="bad"):
            claim.future.result(0)
        assert steps["good"].given_back == 1
        assert (len(inner), len(outer)) == (0, 0)
