"""The queue in front of the device: what goes together, what goes first, what fails alone, what is given back."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import pytest
from fakes import PATIENCE_S, until

from geocentroids_tiler.labels import batching
from geocentroids_tiler.labels.batching import BACKGROUND, BatchQueue, Lane, Ticket


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


def lane(handle: Any, size: int, **options: Any) -> Lane[int, int]:
    return Lane(handle, lambda: size, **options)


def ranked(rank: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """Return a rank; a number alone is that of a viewport."""
    return rank if isinstance(rank, tuple) else (rank, 0, 0)


def put(
    queue: BatchQueue, lane: Lane[int, int], item: int, rank: int | tuple[int, int, int] = 1
) -> tuple[Ticket, Future[int]]:
    future: Future[int] = Future()
    return queue.submit(lane, item, ranked(rank), future.set_result, future.set_exception), future


def submit(queue: BatchQueue, lane: Lane[int, int], item: int, rank: int | tuple[int, int, int] = 1) -> Future[int]:
    return put(queue, lane, item, rank)[1]


def busy(queue: BatchQueue, lane: Lane[int, int], work: Work) -> Future[int]:
    """Give the worker something to do, and return once it is at the gate."""
    first = submit(queue, lane, 0)
    assert work.entered.acquire(timeout=PATIENCE_S)
    return first


class TestBatches:
    # The fixture ``work`` comes after ``queue``, so its gate opens before the queue closes.
    def test_what_waits_goes_together_and_in_order(self, queue: BatchQueue, work: Work) -> None:
        three = lane(work, 3)
        futures = [busy(queue, three, work), *(submit(queue, three, i) for i in range(1, 6))]
        assert len(queue) == 5
        work.gate.set()
        assert [future.result(PATIENCE_S) for future in futures] == [0, 2, 4, 6, 8, 10]
        assert work.batches == [[0], [1, 2, 3], [4, 5]]
        assert len(queue) == 0

    def test_a_free_worker_does_not_wait_for_more(self, queue: BatchQueue, work: Work) -> None:
        work.gate.set()
        assert submit(queue, lane(work, 100), 7).result(PATIENCE_S) == 14

    def test_the_size_is_asked_anew_for_each_batch(self, queue: BatchQueue, work: Work) -> None:
        sizes = iter([1, 3, 2, 5])
        shrinking = Lane(work, lambda: next(sizes))
        futures = [busy(queue, shrinking, work), *(submit(queue, shrinking, i) for i in range(1, 8))]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [1, 2, 3], [4, 5], [6, 7]]

    def test_only_one_group_in_a_batch(self, queue: BatchQueue, work: Work) -> None:
        odd_and_even = lane(work, 10, group_of=lambda item: item % 2)
        futures = [busy(queue, odd_and_even, work), *(submit(queue, odd_and_even, i) for i in (1, 2, 3, 4, 5))]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [1, 3, 5], [2, 4]]

    def test_lanes_are_not_mixed_and_the_oldest_goes_first(self, queue: BatchQueue, work: Work) -> None:
        order: list[str] = []
        one = lane(lambda items: order.append(f"one {items}") or list(items), 10)
        two = lane(lambda items: order.append(f"two {items}") or list(items), 10)
        busy(queue, lane(work, 1), work)
        futures = [submit(queue, lane, i) for i, lane in enumerate((two, one, two, one))]
        work.gate.set()
        assert [future.result(PATIENCE_S) for future in futures] == [0, 1, 2, 3]
        assert order == ["two [0, 2]", "one [1, 3]"]

    def test_several_workers_run_at_once(self) -> None:
        together = threading.Barrier(3, timeout=PATIENCE_S)
        queue = BatchQueue("test", 3)
        meet = lane(lambda items: [together.wait() >= 0 for _ in items], 1)
        futures = [submit(queue, meet, i) for i in range(3)]
        assert all(future.result(PATIENCE_S) for future in futures)
        queue.close()


class TestOrder:
    def test_the_newest_rank_goes_first_and_background_last(self, queue: BatchQueue, work: Work) -> None:
        one = lane(work, 1)
        first = busy(queue, one, work)
        ranks = {10: BACKGROUND, 1: 1, 2: 1, 31: 3, 21: 2, 32: 3}
        futures = [first, *(submit(queue, one, item, rank) for item, rank in ranks.items())]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [31], [32], [21], [1], [2], [10]]

    def test_a_viewport_in_the_order_of_its_requests(self, queue: BatchQueue, work: Work) -> None:
        one = lane(work, 1)
        first = busy(queue, one, work)
        ranks = {12: (1, -2, 0), 11: (1, -1, 0), 22: (2, -1, -1), 21: (2, -1, 0), 10: (1, 0, 0), 20: (2, 0, -9)}
        futures = [first, *(submit(queue, one, item, rank) for item, rank in ranks.items())]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [20], [21], [22], [10], [11], [12]]

    def test_within_a_rank_lanes_that_go_first_do(self, queue: BatchQueue, work: Work) -> None:
        late, early = lane(work, 1), lane(work, 1, first=True)
        futures = [busy(queue, late, work), submit(queue, late, 1), submit(queue, early, 2), submit(queue, late, 3, 2)]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [3], [2], [1]]

    def test_a_batch_is_filled_from_lower_ranks(self, queue: BatchQueue, work: Work) -> None:
        three = lane(work, 3)
        futures = [busy(queue, three, work), submit(queue, three, 1, BACKGROUND), submit(queue, three, 2, 5)]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [2, 1]]

    def test_what_waited_for_long_goes_first(
        self, queue: BatchQueue, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]
        monkeypatch.setattr(batching.time, "monotonic", lambda: now[0])
        one = lane(work, 1)
        first = busy(queue, one, work)
        futures = [first, submit(queue, one, 9, BACKGROUND)]
        futures += [submit(queue, one, 11, (1, -1, 0)), submit(queue, one, 10, (1, 0, 0))]
        now[0] = batching.PATIENCE_S + 0.5
        futures += [submit(queue, one, 2, 2), submit(queue, one, 3, 3)]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [10], [11], [3], [2], [9]], (
            "a request that waits is not held up for ever; others are"
        )

    def test_raised(self, queue: BatchQueue, work: Work) -> None:
        one = lane(work, 1)
        first = busy(queue, one, work)
        low, low_future = put(queue, one, 1, 1)
        futures = [first, low_future, submit(queue, one, 2, 2)]
        low.raise_rank((3, 0, 0))
        low.raise_rank((1, 0, 0))  # never lowered
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert work.batches == [[0], [1], [2]]
        low.raise_rank((9, 0, 0))  # answered long ago
        assert len(queue) == 0


class TestFailures:
    def test_an_item_at_fault_fails_alone(self, queue: BatchQueue, work: Work) -> None:
        ten = lane(work, 10)
        busy(queue, ten, work)
        futures = [submit(queue, ten, i) for i in (1, -2, 3)]
        work.gate.set()
        assert futures[0].result(PATIENCE_S) == 2
        assert futures[2].result(PATIENCE_S) == 6
        with pytest.raises(ValueError, match="-2 is negative"):
            futures[1].result(PATIENCE_S)
        assert submit(queue, ten, 4).result(PATIENCE_S) == 8, "the worker goes on"

    def test_too_few_results_are_an_error_and_the_worker_goes_on(self, queue: BatchQueue) -> None:
        with pytest.raises(RuntimeError, match="1 items gave 0 results"):
            submit(queue, lane(lambda items: [], 10), 1).result(PATIENCE_S)
        assert submit(queue, lane(list, 10), 1).result(PATIENCE_S) == 1

    def test_results_are_handed_on_as_they_come(self, queue: BatchQueue, work: Work) -> None:
        gate = threading.Event()

        def slowly(items: Sequence[int]) -> Iterator[int]:
            for item in items:
                if item == 2:
                    assert gate.wait(PATIENCE_S)
                if item == 3:
                    raise ValueError("3 is odd")
                yield 10 * item

        many = lane(slowly, 10)
        busy(queue, lane(work, 1), work)
        futures = [submit(queue, many, i) for i in (1, 2, 3, 4)]
        work.gate.set()
        assert futures[0].result(PATIENCE_S) == 10
        assert not futures[1].done()
        gate.set()
        assert futures[1].result(PATIENCE_S) == 20
        assert futures[3].result(PATIENCE_S) == 40, "what came after the failure is done again, alone"
        with pytest.raises(ValueError, match="3 is odd"):
            futures[2].result(PATIENCE_S)

    def test_a_step_that_fails_on_a_result_is_told_so(self, queue: BatchQueue) -> None:
        failed: Future[int] = Future()

        def refuse(result: int) -> None:
            raise LookupError(f"{result} is unwanted")

        queue.submit(lane(list, 10), 5, (1, 0, 0), refuse, failed.set_exception)
        with pytest.raises(LookupError, match="5 is unwanted"):
            failed.result(PATIENCE_S)
        assert submit(queue, lane(list, 10), 1).result(PATIENCE_S) == 1, "the worker goes on"


class TestGivenBack:
    def test_an_item_given_back_while_it_waits_is_left_out(self, queue: BatchQueue, work: Work) -> None:
        ten = lane(work, 10)
        running, first = put(queue, ten, 0)
        assert work.entered.acquire(timeout=PATIENCE_S)
        kept = submit(queue, ten, 1)
        dropped, never = put(queue, ten, 2)
        assert dropped.release()
        assert not running.release(), "a worker has it"
        assert len(queue) == 1
        work.gate.set()
        assert kept.result(PATIENCE_S) == 2
        assert first.result(PATIENCE_S) == 0
        assert work.batches == [[0], [1]]
        assert not never.done()
        until(running.release)  # answered: nothing of it goes on

    def test_all_that_waited(self, queue: BatchQueue, work: Work) -> None:
        ten = lane(work, 10)
        busy(queue, ten, work)
        assert put(queue, ten, 1)[0].release()
        work.gate.set()
        assert submit(queue, ten, 2).result(PATIENCE_S) == 4
        assert work.batches == [[0], [2]]

    def test_what_nobody_waits_for_is_not_tried_again(self, queue: BatchQueue, work: Work) -> None:
        """A source that does not answer fails a batch once, not once more for each of its items."""
        ten = lane(work, 10)
        busy(queue, ten, work)
        tickets = [put(queue, ten, i) for i in (-1, -2, -3)]
        work.gate.set()  # the first run ends, the second begins
        work.gate.clear()
        until(lambda: len(work.batches) == 2)
        assert not any(ticket.release() for ticket, _ in tickets), "a worker has them"
        work.gate.set()
        for _, future in tickets:
            with pytest.raises(ValueError, match="-3 is negative"):
                future.result(PATIENCE_S)
        assert work.batches == [[0], [-1, -2, -3]]


class TestBegunAndFinished:
    """A device that works on its own: begun batches are waited for when the next ones are begun."""

    def test_the_next_is_begun_before_the_last_is_finished(self, work: Work) -> None:
        events: list[str] = []

        def begin(items: Sequence[int]) -> list[int]:
            events.append(f"begin {list(items)}")
            return [2 * item for item in items]

        def finish(results: list[int]) -> list[int]:
            events.append(f"finish {results}")
            return results

        queue = BatchQueue("test", 1, in_flight=2)
        two = lane(begin, 2, finish=finish)
        first = busy(queue, lane(work, 1), work)
        futures = [first, *(submit(queue, two, i) for i in range(1, 6))]
        work.gate.set()
        assert [future.result(PATIENCE_S) for future in futures] == [0, 2, 4, 6, 8, 10]
        assert events == [
            "begin [1, 2]",
            "begin [3, 4]",
            "finish [2, 4]",
            "begin [5]",
            "finish [6, 8]",
            "finish [10]",
        ]
        queue.close()

    def test_one_at_a_time(self, queue: BatchQueue, work: Work) -> None:
        events: list[str] = []
        plain = lane(
            lambda items: events.append("begin") or list(items),
            1,
            finish=lambda results: events.append("finish") or results,
        )
        busy(queue, lane(work, 1), work)
        futures = [submit(queue, plain, i) for i in (1, 2)]
        work.gate.set()
        wait(futures, PATIENCE_S)
        assert events == ["begin", "finish", "begin", "finish"]

    def test_a_failure_at_the_end_is_of_one_item(self, queue: BatchQueue, work: Work) -> None:
        def finish(items: Sequence[int]) -> Sequence[int]:
            if -1 in items:
                raise ValueError("-1")
            return items

        both = lane(list, 5, finish=finish)
        busy(queue, lane(work, 1), work)
        good, bad = submit(queue, both, 1), submit(queue, both, -1)
        work.gate.set()
        assert good.result(PATIENCE_S) == 1
        with pytest.raises(ValueError, match="-1"):
            bad.result(PATIENCE_S)


class TestHeldUp:
    def test_workers_take_nothing_until_they_may(self) -> None:
        allowed = threading.Event()
        asked = threading.Semaphore(0)

        def may_take() -> bool:
            asked.release()
            return allowed.is_set()

        queue = BatchQueue("test", 1, may_take=may_take)
        future = submit(queue, lane(list, 1), 3)
        assert asked.acquire(timeout=PATIENCE_S)
        queue.wake()
        assert asked.acquire(timeout=PATIENCE_S)
        assert len(queue) == 1
        allowed.set()
        queue.wake()
        assert future.result(PATIENCE_S) == 3
        queue.close()

    def test_told_when_items_leave(self, work: Work) -> None:
        left = threading.Semaphore(0)
        queue, one = BatchQueue("test", 1, when_shorter=left.release), lane(work, 1)
        busy(queue, one, work)
        assert left.acquire(timeout=PATIENCE_S), "taken"
        ticket, _ = put(queue, one, 1)
        assert not left.acquire(blocking=False)
        ticket.release()
        assert left.acquire(blocking=False), "given back"
        work.gate.set()
        queue.close()


class TestClosing:
    def test_what_is_queued_is_finished_and_the_rest_rejected(self, work: Work) -> None:
        queue, one = BatchQueue("test", 2), lane(work, 1)
        futures = [submit(queue, one, i) for i in range(5)]
        work.gate.set()
        queue.close()
        assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
        with pytest.raises(RuntimeError, match="closed"):
            submit(queue, one, 1)
