"""Labelling by a device elsewhere, which here is another thread: the same labels, shared, given up, refused."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fakes import PATIENCE_S, FakeEncoder, fake_service, open_image, until, window_id, write_codebooks, write_images

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import BusyError, EncoderError, TooManyRequestsError
from geocentroids_tiler.labels import remote
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.labeller import DeviceFigures
from geocentroids_tiler.labels.owners import BLOCK_CHUNKS, block_key, ranked
from geocentroids_tiler.labels.remote import DeviceDescription, LabelDesk, LabelReply, LabelRequest, RemoteLabeller
from geocentroids_tiler.labels.store import LabelStore
from geocentroids_tiler.source import ReadOptions, read_windows

PLENTY = 2**24


class DeskCarrier:
    """Takes requests to a desk in another thread's event loop."""

    def __init__(self, desk: LabelDesk) -> None:
        self.desk = desk
        self.requests: list[tuple[str, LabelRequest]] = []
        self.gate = threading.Event()
        self.gate.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def describe(self, codebook: str, digest: str) -> DeviceDescription:
        return self.desk.describe()

    def label(self, owner: str, request: LabelRequest) -> Future[LabelReply]:
        self.requests.append((owner, request))
        return asyncio.run_coroutine_threadsafe(self.desk.label(pickle.loads(pickle.dumps(request))), self._loop)

    def figures(self, digest: str) -> list[DeviceFigures]:
        return [self.desk.figures()]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Far:
    """Two engines that read, and one device elsewhere."""

    def __init__(self, images: Path, codebooks: Path, queue_windows: int = 10_000) -> None:
        self.service, _ = fake_service(images, codebooks)
        self.codebook: Codebook = self.service.codebook("blend")
        self.encoder = FakeEncoder()
        self.labeller = DeviceLabeller(self.codebook, self.encoder, token_cache_bytes=PLENTY)  # type: ignore[arg-type]
        self.encoder.forget()
        while self.encoder.entered.acquire(blocking=False):
            pass
        self.desk = LabelDesk(self.labeller, label_cache_bytes=PLENTY)
        self.carrier = DeskCarrier(self.desk)
        self.engines = [self._engine(queue_windows) for _ in range(2)]
        self.dataset = open_image(self.service, "hole.tif", "blend")

    def _engine(self, queue_windows: int) -> LabelEngine:
        labeller = RemoteLabeller(self.codebook, self.carrier)
        return LabelEngine(self.codebook, labeller, LabelStore(PLENTY), read_threads=2, queue_windows=queue_windows)

    def close(self) -> None:
        self.encoder.gate.set()
        for engine in self.engines:
            engine.close()
        self.carrier.close()
        self.labeller.close()
        self.service.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture
def make(images: Path, codebooks: Path) -> Iterator[Callable[..., Far]]:
    made: list[Far] = []

    def start(**options: int) -> Far:
        made.append(Far(images, codebooks, **options))
        return made[-1]

    yield start
    for far in made:
        far.close()


def test_the_same_labels_and_no_window_twice(make: Callable[..., Far]) -> None:
    far = make()
    area = far.dataset.footprint
    near = far.service.engine(far.codebook).result(PATIENCE_S).block(far.dataset, area)
    with ThreadPoolExecutor(8) as pool:
        blocks = list(pool.map(lambda i: far.engines[i % 2].block(far.dataset, area), range(8)))
    for block in blocks:
        np.testing.assert_array_equal(block.labels, near.labels)
        np.testing.assert_array_equal(block.similarity, near.similarity)
    assert set(far.encoder.encoded.values()) == {1}
    assert far.engines[0].windows_encoded == len(far.encoder.encoded)
    assert far.engines[0].device_name == "fake/numpy/fp64"
    until(lambda: all(engine.windows_waiting == 0 for engine in far.engines))


def test_windows_are_sent_in_batches(make: Callable[..., Far]) -> None:
    far = make()
    far.encoder.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(far.engines[0].block, far.dataset, far.dataset.footprint)
        until(lambda: far.engines[0].device_queue > 2 * remote.BATCH_CHUNKS)
        assert len(far.carrier.requests) == remote.UNDER_WAY_BATCHES, "no more are sent until one comes back"
        far.encoder.gate.set()
        asked.result(PATIENCE_S)
    requests = [request for _, request in far.carrier.requests]
    largest = max(requests, key=lambda request: len(request.chunks))
    assert len(largest.chunks) == remote.BATCH_CHUNKS
    assert len(largest.windows) < 3 * len(largest.chunks), "neighbours share windows, of which each chunk has four"
    assert {owner for owner, _ in far.carrier.requests} == {block_key(far.dataset.key, (0, 0))}


def test_what_nobody_waits_for_is_given_up_there(make: Callable[..., Far]) -> None:
    far = make()
    far.encoder.gate.clear()

    async def go_away() -> None:
        asked = asyncio.create_task(far.engines[0].block_async(far.dataset, far.dataset.footprint))
        await asyncio.to_thread(until, lambda: far.labeller.queued > 4)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(go_away())
    until(lambda: far.labeller.queued == 0 and far.engines[0].windows_waiting == 0)
    far.encoder.gate.set()
    assert far.desk.figures().windows_given_up > 0
    block = far.engines[0].block(far.dataset, far.dataset.footprint)
    near = far.service.engine(far.codebook).result(PATIENCE_S).block(far.dataset, far.dataset.footprint)
    np.testing.assert_array_equal(block.labels, near.labels)
    assert set(far.encoder.encoded.values()) == {1}


def test_one_who_goes_away_takes_nothing_from_the_others(make: Callable[..., Far]) -> None:
    far = make()
    far.encoder.gate.clear()
    area = far.dataset.footprint

    async def scene() -> np.ndarray:
        gone = asyncio.create_task(far.engines[0].block_async(far.dataset, area))
        stays = asyncio.create_task(far.engines[1].block_async(far.dataset, area))
        await asyncio.to_thread(far.encoder.await_run)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        far.encoder.gate.set()
        return (await stays).labels

    labels = asyncio.run(asyncio.wait_for(scene(), PATIENCE_S))
    near = far.service.engine(far.codebook).result(PATIENCE_S).block(far.dataset, area)
    np.testing.assert_array_equal(labels, near.labels)


def test_a_chunk_that_fails_takes_none_with_it(make: Callable[..., Far]) -> None:
    far = make()
    chunks = list(far.dataset.footprint.chunks(3))
    window = read_windows(far.dataset, [chunks[0]], 14)[0]
    far.encoder.poison.add(window_id(window.pixels))
    ahead = far.engines[0].ahead(far.dataset, chunks[:40])
    failed = {tuple(index): error for index, future in ahead if (error := future.exception(PATIENCE_S)) is not None}
    covered = {(chunks[0].row + a, chunks[0].col + b) for a in range(2) for b in range(2)}
    assert tuple(chunks[0]) in failed
    assert set(failed) <= covered
    assert all(isinstance(error, EncoderError) and "PoisonError" in str(error) for error in failed.values())


def test_who_is_full_refuses_and_what_was_let_in_is_finished(make: Callable[..., Far]) -> None:
    far = make(queue_windows=1)
    far.encoder.gate.clear()
    area = far.dataset.footprint
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(engine.block, far.dataset, area) for engine in far.engines]
        far.encoder.await_run()
        until(lambda: all(engine.windows_waiting > 1 for engine in far.engines))
        with pytest.raises(BusyError, match="and this server keeps at most 1 waiting") as refused:
            far.engines[0].block(far.dataset, area)
        assert refused.value.retry_after_s > 0
        far.encoder.gate.set()
        first, second = (future.result(PATIENCE_S) for future in asked)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_a_busy_error_goes_from_process_to_process() -> None:
    error = pickle.loads(pickle.dumps(TooManyRequestsError("too many", 2.5)))
    assert (type(error), str(error), error.retry_after_s) == (TooManyRequestsError, "too many", 2.5)


class TestOwners:
    KEYS = tuple(block_key(("https://example.org/a.tif", str(i), ReadOptions()), (0, 0)) for i in range(1000))

    def test_shares_are_even_and_only_those_of_who_goes_move(self) -> None:
        before = {key: ranked(key, ["a", "b", "c"]) for key in self.KEYS}
        after = {key: ranked(key, ["c", "a"]) for key in self.KEYS}
        shares = Counter(names[0] for names in before.values())
        assert all(250 < share < 420 for share in shares.values()), shares
        assert all(after[key] == [name for name in before[key] if name != "b"] for key in self.KEYS)

    def test_blocks(self) -> None:
        image = ("https://example.org/a.tif", "1-2", ReadOptions())
        last = BLOCK_CHUNKS - 1
        assert block_key(image, (0, 0)) == block_key(image, (last, last))
        assert len({block_key(image, place) for place in ((0, 0), (0, 64), (64, 0), (64, 64))}) == 4
        others = [
            ("https://example.org/b.tif", "1-2", ReadOptions()),
            ("https://example.org/a.tif", "3", ReadOptions()),
        ]
        others.append(("https://example.org/a.tif", "1-2", ReadOptions(bidx=(3, 2, 1))))
        assert len({block_key(other, (0, 0)) for other in [image, *others]}) == 4
