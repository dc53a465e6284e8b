"""A bounded set of threads that hand over what waits for them in batches, the most urgent first."""

from __future__ import annotations

import sys
import threading
import time
from bisect import bisect_left, bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

from geocentroids_tiler.source import computing_in

Item = TypeVar("Item")
Result = TypeVar("Result")

Rank = tuple[int, int, int]
"""How urgent something is; the greater goes first. The number of the viewport it belongs to, from 1, the newer the more
urgent; minus its request's place in the viewport; minus its place in the request: what was asked for first is finished
first."""
BACKGROUND: Rank = (0, 0, 0)
"""Rank of work that nobody waits for at a screen."""
PATIENCE_S = 10.0
"""What has waited this long goes first, so that newer requests do not hold it up for ever."""


@dataclass(frozen=True, eq=False)
class Lane(Generic[Item, Result]):
    """One kind of work.

    Attributes:
        handle: begins a batch of items; without ``finish`` it returns their results, in order, and each is handed on as
            soon as it is there.
        max_batch: returns how many items a batch may have; asked anew for each batch.
        group_of: only items with equal groups share a batch.
        owner_of: whom an item is for, where a queue lets no owner take all its threads; None: nobody in particular.
        first: whether its items go before those of other lanes of the same rank.
        finish: waits for what ``handle`` returned and turns it into as many results as there were items, in order, so
            that a device that works on its own has the next batch before the last one is waited for.
    """

    handle: Callable[[Sequence[Item]], Any]
    max_batch: Callable[[], int]
    group_of: Callable[[Item], Hashable] = field(default=lambda _: None)
    owner_of: Callable[[Item], Hashable] = field(default=lambda _: None)
    first: bool = False
    finish: Callable[[Any], Sequence[Result]] | None = None


class Ticket:
    """An item in a queue. It can be given back while it waits."""

    __slots__ = ("_queue", "answered", "done", "failed", "item", "lane", "rank", "since_s", "unwanted", "waiting")

    def __init__(
        self,
        queue: BatchQueue,
        lane: Lane[Any, Any],
        item: Any,
        rank: Rank,
        done: Callable[[Any], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._queue = queue
        self.lane = lane
        self.item = item
        self.rank = rank
        self.done = done
        self.failed = failed
        self.since_s = time.monotonic()
        self.waiting = True
        self.answered = False
        self.unwanted = False

    def release(self) -> bool:
        """Take the item out of the queue; False if a worker has it at this moment."""
        return self._queue.remove(self)

    def raise_rank(self, rank: Rank) -> None:
        """Make the item at least as urgent as ``rank``, if it still waits."""
        self._queue.raise_rank(self, rank)


class _Waiting:
    """Tickets by rank; of each rank in the order of their arrival, those of lanes that go first before the others."""

    def __init__(self) -> None:
        self._tickets: dict[Rank, tuple[dict[Ticket, None], dict[Ticket, None]]] = {}
        self._ranks: list[Rank] = []  # the keys of ``_tickets``, ascending
        self.count = 0

    def add(self, ticket: Ticket) -> None:
        if ticket.rank not in self._tickets:
            self._tickets[ticket.rank] = {}, {}
            insort(self._ranks, ticket.rank)
        self._tickets[ticket.rank][not ticket.lane.first][ticket] = None
        self.count += 1

    def remove(self, ticket: Ticket) -> None:
        pair = self._tickets[ticket.rank]
        del pair[not ticket.lane.first][ticket]
        self.count -= 1
        if not (pair[0] or pair[1]):
            del self._tickets[ticket.rank]
            del self._ranks[bisect_left(self._ranks, ticket.rank)]

    def in_order(self, now_s: float) -> Iterator[Ticket]:
        """Yield tickets as they should be taken: first those of the oldest viewport if it has waited for long."""
        start = bisect_right(self._ranks, BACKGROUND)  # of requests
        stop = start
        if start < len(self._ranks):
            stop = bisect_left(self._ranks, (self._ranks[start][0] + 1,))  # of the oldest viewport's
            first = next(self._of(self._ranks[stop - 1]))
            if stop < len(self._ranks) and now_s - first.since_s <= PATIENCE_S:
                stop = start
        for ranks in (self._ranks[start:stop], self._ranks[stop:], self._ranks[:start]):
            for rank in reversed(ranks):
                yield from self._of(rank)

    def _of(self, rank: Rank) -> Iterator[Ticket]:
        return chain(*self._tickets[rank])


class BatchQueue:
    """Runs work in batches: a free worker takes the most urgent item and all that may go with it, and never waits.

    An exception in a batch of several is not shared: its items are run again one by one, so that only the item at
    fault fails. With one worker the queue is the only user of whatever its lanes touch, for example a GPU.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        *,
        in_flight: int = 1,
        spare_threads: int = 0,
        owner_batches: int = sys.maxsize,
        may_take: Callable[[], bool] = lambda: True,
        when_shorter: Callable[[], None] = lambda: None,
    ) -> None:
        """Start the workers.

        Args:
            name: of the threads.
            threads: how many work at once.
            in_flight: batches that a worker may have begun and not finished.
            spare_threads: workers that take the places of those that wait for the network; see ``computing_in``.
            owner_batches: batches of one owner at once.
            may_take: whether the workers may go on; ``wake`` makes them ask again.
            when_shorter: called when items have left the queue, taken or given back.
        """
        self._waiting = _Waiting()
        lock = threading.RLock()
        self._wake = threading.Condition(lock)
        # Spare workers sleep apart: with all of them in turn, each would keep memory of its own.
        self._wake_spare = threading.Condition(lock)
        self._closed = False
        self._in_flight = in_flight
        self._may_take = may_take
        self._when_shorter = when_shorter
        self._at_once = threads
        self._busy = 0
        self._paused = 0
        self._owner_batches = owner_batches
        self._owners: Counter[Hashable] = Counter()
        sleeps = [self._wake] * threads + [self._wake_spare] * spare_threads
        self._threads = [
            threading.Thread(target=self._run, args=(wake,), name=f"{name}-{i}", daemon=True)
            for i, wake in enumerate(sleeps)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        lane: Lane[Item, Result],
        item: Item,
        rank: Rank,
        done: Callable[[Result], None],
        failed: Callable[[Exception], None],
    ) -> Ticket:
        """Queue one item; a worker's thread calls ``done`` with its result, or ``failed``.

        Raises:
            RuntimeError: if the queue is closed.
        """
        ticket = Ticket(self, lane, item, rank, done, failed)
        with self._wake:
            if self._closed:
                raise RuntimeError("the queue is closed")
            self._waiting.add(ticket)
            self._notify(1)
        return ticket

    def __len__(self) -> int:
        return self._waiting.count

    def remove(self, ticket: Ticket) -> bool:
        """Take an item out; False if a worker has it at this moment."""
        with self._wake:
            if not ticket.waiting:
                ticket.unwanted = True
                return ticket.answered
            ticket.waiting = False
            self._waiting.remove(ticket)
        self._when_shorter()
        return True

    def raise_rank(self, ticket: Ticket, rank: Rank) -> None:
        """Make an item at least as urgent as ``rank``, if it still waits."""
        with self._wake:
            if ticket.waiting and rank > ticket.rank:
                self._waiting.remove(ticket)
                ticket.rank = rank
                self._waiting.add(ticket)

    def wake(self) -> None:
        """Make the workers ask again whether they may go on."""
        with self._wake:
            self._notify(self._at_once)

    def close(self) -> None:
        """Finish what is queued and end the workers."""
        with self._wake:
            self._closed = True
            self._notify_all()
        for thread in self._threads:
            thread.join()

    def _notify(self, count: int) -> None:
        """Wake workers; spare ones only where others wait for the network."""
        self._wake.notify(count)
        self._wake_spare.notify(min(count, self._paused))

    def _notify_all(self) -> None:
        self._wake.notify_all()
        self._wake_spare.notify_all()

    def _run(self, wake: threading.Condition) -> None:
        begun: deque[tuple[list[Ticket], Any]] = deque()
        with computing_in(self._pause, self._resume):
            while True:
                batch = self._take(wake, wait=not begun)
                if batch:
                    self._when_shorter()
                    try:
                        begun += _begin(batch)
                    finally:
                        self._release(batch)
                elif not begun:
                    return
                if begun and (not batch or len(begun) >= self._in_flight):
                    _finish(*begun.popleft())

    def _pause(self) -> None:
        """Let another worker go on while this one waits."""
        with self._wake:
            self._busy -= 1
            self._paused += 1
            self._wake.notify()
            self._wake_spare.notify()

    def _resume(self) -> None:
        """Go on, be it beside one worker too many for a while."""
        with self._wake:
            self._busy += 1
            self._paused -= 1

    def _release(self, batch: list[Ticket]) -> None:
        owner = batch[0].lane.owner_of(batch[0].item)
        with self._wake:
            self._busy -= 1
            if owner is not None:
                self._owners[owner] -= 1
                if not self._owners[owner]:
                    del self._owners[owner]
        # Nobody is woken: this worker looks for the next batch itself.

    def _next(self) -> list[Ticket]:
        """Take the most urgent item whose owner may have another batch, and all that may go with it."""
        batch: list[Ticket] = []
        size, owner = 1, None
        for ticket in self._waiting.in_order(time.monotonic()):
            if not batch:
                owner = ticket.lane.owner_of(ticket.item)
                if owner is not None and self._owners[owner] >= self._owner_batches:
                    continue
                lane, group, size = ticket.lane, ticket.lane.group_of(ticket.item), ticket.lane.max_batch()
            elif ticket.lane is not lane or lane.group_of(ticket.item) != group:
                continue
            batch.append(ticket)
            if len(batch) >= size:
                break
        if batch:
            self._busy += 1
            if owner is not None:
                self._owners[owner] += 1
        for ticket in batch:
            ticket.waiting = False
            self._waiting.remove(ticket)
        return batch

    def _take(self, wake: threading.Condition, *, wait: bool) -> list[Ticket]:
        """Return the next batch; none if the queue is closed and empty, or none may be taken and not ``wait``."""
        with self._wake:
            while True:
                if self._waiting.count and self._busy < self._at_once and self._may_take() and (batch := self._next()):
                    return batch
                if not wait:
                    return []
                if self._closed and not self._waiting.count:
                    self._notify_all()  # those that wait for a place end too
                    return []
                wake.wait()


def _begin(batch: list[Ticket]) -> list[tuple[list[Ticket], Any]]:
    """Begin a batch, and return what there is to finish of it."""
    lane = batch[0].lane
    try:
        started = lane.handle([ticket.item for ticket in batch])
    except Exception as error:
        _fail(batch, error)
        return []
    if lane.finish is None:
        _answer(batch, started)
        return []
    return [(batch, started)]


def _finish(batch: list[Ticket], started: Any) -> None:
    try:
        results = batch[0].lane.finish(started)  # type: ignore[misc]
    except Exception as error:
        _fail(batch, error)
    else:
        _answer(batch, results)


def _answer(batch: list[Ticket], results: Iterable[Any]) -> None:
    """Give each item its result, as they come."""
    coming = iter(results)
    for place, ticket in enumerate(batch):
        try:
            result = next(coming)
        except StopIteration:
            _fail(batch[place:], RuntimeError(f"{len(batch)} items gave {place} results"))
            return
        except Exception as error:
            _fail(batch[place:], error)
            return
        _settle(ticket, result)


def _settle(ticket: Ticket, result: Any) -> None:
    ticket.answered = True
    try:
        ticket.done(result)
    except Exception as error:
        ticket.failed(error)


def _fail(batch: list[Ticket], error: Exception) -> None:
    """Fail an item that is alone, or that nobody waits for; run the others of a batch again, each alone."""
    if len(batch) == 1:
        batch[0].answered = True
        batch[0].failed(error)
        return
    for ticket in batch:
        if ticket.unwanted:  # a source that does not answer would cost its timeout once more for each
            ticket.answered = True
            ticket.failed(error)
            continue
        for alone in _begin([ticket]):
            _finish(*alone)
