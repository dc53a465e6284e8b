"""The queue in front of the device: what goes together, what fails alone, what is left out, how it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait

import pytest
from fakes import PATIENCE_S

from geocentroids_tiler.labels.batching import BatchQueue, Lane


class Work:
    """Doubles numbers in batches; negative ones fail. Batches wait at the gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if min(items) < 0:
            raise ValueError(f"{min(items)} is negative")
        return [2 * item for item in items]


@pytest.fixture
def work() -> Iterator[Work]:
    work = Work()
    yield work
    work.gate.set()


@pytest.fixture
def queue() -> Iterator[BatchQueue]:
    queue = BatchQueue("test", 1)
    yield queue
    queue.close()


def busy(queue: BatchQueue, lane: Lane[int, int], work: Work) -> Future[int]:
    """Give the worker something to do, and return once it is at the gate."""
    first = queue.submit(lane, 0)
    assert work.entered.acquire(timeout=PATIENCE_S)
    return first


# The fixture ``work`` comes after ``queue``, so its gate opens before the queue closes.
def test_what_waits_goes_together_and_in_order(queue: BatchQueue, work: Work) -> None:
    lane = Lane(work, max_batch=3)
    futures = [busy(queue, lane, work), *(queue.submit(lane, i) for i in range(1, 6))]
    assert len(queue) == 5
    work.gate.set()
    assert [future.result(PATIENCE_S) for future in futures] == [0, 2, 4, 6, 8, 10]
    assert work.batches == [[0], [1, 2, 3], [4, 5]]


def test_a_free_worker_does_not_wait_for_more(queue: BatchQueue, work: Work) -> None:
    work.gate.set()
    assert queue.submit(Lane(work, max_batch=100), 7).result(PATIENCE_S) == 14


def test_only_one_group_in_a_batch(queue: BatchQueue, work: Work) -> None:
    lane = Lane(work, max_batch=10, group_of=lambda item: item % 2)
    futures = [busy(queue, lane, work), *(queue.submit(lane, i) for i in (1, 2, 3, 4, 5))]
    work.gate.set()
    wait(futures, PATIENCE_S)
    assert work.batches == [[0], [1, 3, 5], [2, 4]]


def test_lanes_are_not_mixed_and_the_oldest_goes_first(queue: BatchQueue, work: Work) -> None:
    order: list[str] = []
    one = Lane(lambda items: order.append(f"one {items}") or list(items), max_batch=10)
    two = Lane(lambda items: order.append(f"two {items}") or list(items), max_batch=10)
    busy(queue, Lane(work, max_batch=1), work)
    futures = [queue.submit(lane, i) for i, lane in enumerate((two, one, two, one))]
    work.gate.set()
    assert [future.result(PATIENCE_S) for future in futures] == [0, 1, 2, 3]
    assert order == ["two [0, 2]", "one [1, 3]"]


def test_an_item_at_fault_fails_alone(queue: BatchQueue, work: Work) -> None:
    lane = Lane(work, max_batch=10)
    busy(queue, lane, work)
    futures = [queue.submit(lane, i) for i in (1, -2, 3)]
    work.gate.set()
    assert futures[0].result(PATIENCE_S) == 2
    assert futures[2].result(PATIENCE_S) == 6
    with pytest.raises(ValueError, match="-2 is negative"):
        futures[1].result(PATIENCE_S)
    assert queue.submit(lane, 4).result(PATIENCE_S) == 8, "the worker goes on"


def test_an_item_cancelled_while_it_waits_is_left_out(queue: BatchQueue, work: Work) -> None:
    lane = Lane(work, max_batch=10)
    first = busy(queue, lane, work)
    kept, dropped = queue.submit(lane, 1), queue.submit(lane, 2)
    assert dropped.cancel()
    assert not first.cancel(), "it is running"
    work.gate.set()
    assert kept.result(PATIENCE_S) == 2
    assert work.batches == [[0], [1]]
    with pytest.raises(CancelledError):
        dropped.result(PATIENCE_S)
    alone = queue.submit(lane, 5)
    assert alone.result(PATIENCE_S) == 10


def test_a_batch_of_cancelled_items_is_not_run(queue: BatchQueue, work: Work) -> None:
    lane = Lane(work, max_batch=10)
    busy(queue, lane, work)
    assert queue.submit(lane, 1).cancel()
    work.gate.set()
    assert queue.submit(lane, 2).result(PATIENCE_S) == 4
    assert work.batches == [[0], [2]]


def test_too_few_results_are_an_error_and_the_worker_goes_on(queue: BatchQueue) -> None:
    short: Lane[int, int] = Lane(lambda items: [], max_batch=10)
    with pytest.raises(RuntimeError, match="1 items gave 0 results"):
        queue.submit(short, 1).result(PATIENCE_S)
    assert queue.submit(Lane(list, max_batch=10), 1).result(PATIENCE_S) == 1


def test_close_finishes_what_is_queued_and_rejects_the_rest(work: Work) -> None:
    queue, lane = BatchQueue("test", 2), Lane(work, max_batch=1)
    futures = [queue.submit(lane, i) for i in range(5)]
    work.gate.set()
    queue.close()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
    with pytest.raises(RuntimeError, match="closed"):
        queue.submit(lane, 1)


def test_several_workers_run_at_once() -> None:
    together = threading.Barrier(3, timeout=PATIENCE_S)
    queue = BatchQueue("test", 3)
    lane = Lane(lambda items: [together.wait() >= 0 for _ in items], max_batch=1)
    futures = [queue.submit(lane, i) for i in range(3)]
    assert all(future.result(PATIENCE_S) for future in futures)
    queue.close()
