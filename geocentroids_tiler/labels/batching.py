"""A queue with worker threads that hand over what is waiting in batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lane(Generic[Item, Result]):
    """One kind of work.

    Attributes:
        handle: turns a batch of items into as many results, in order.
        max_batch: items in a batch at most.
        group_of: only items with equal groups share a batch.
    """

    handle: Callable[[Sequence[Item]], Sequence[Result]]
    max_batch: int
    group_of: Callable[[Item], Hashable] = field(default=lambda _: None)


class BatchQueue:
    """Runs work in batches: a free worker takes the oldest item and all that may go with it, and never waits for more.

    An exception in a batch of several is not shared: its items are run again one by one, so that only the item at
    fault fails. An item whose future was cancelled while it waited is left out. With one worker the queue is the only
    user of whatever its lanes touch, for example a GPU.
    """

    def __init__(self, name: str, threads: int) -> None:
        self._items: deque[tuple[Lane[Any, Any], Any, Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, lane: Lane[Item, Result], item: Item) -> Future[Result]:
        """Queue one item; the future holds its result.

        Raises:
            RuntimeError: if the queue is closed.
        """
        future: Future[Result] = Future()
        with self._wake:
            if self._closed:
                raise RuntimeError("the queue is closed")
            self._items.append((lane, item, future))
            self._wake.notify()
        return future

    def __len__(self) -> int:
        return len(self._items)

    def close(self) -> None:
        """Finish what is queued and end the workers."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            lane, items, futures = batch
            wanted = [future.set_running_or_notify_cancel() for future in futures]  # from here on none is cancelled
            _run_batch(lane, list(compress(items, wanted)), list(compress(futures, wanted)))

    def _take(self) -> tuple[Lane[Any, Any], list[Any], list[Future[Any]]] | None:
        with self._wake:
            while not self._items:
                if self._closed:
                    return None
                self._wake.wait()
            lane, first, future = self._items.popleft()
            group, items, futures = lane.group_of(first), [first], [future]
            rest: deque[tuple[Lane[Any, Any], Any, Future[Any]]] = deque()
            while self._items and len(items) < lane.max_batch:
                entry = self._items.popleft()
                if entry[0] is lane and lane.group_of(entry[1]) == group:
                    items.append(entry[1])
                    futures.append(entry[2])
                else:
                    rest.append(entry)
            self._items.extendleft(reversed(rest))
            return lane, items, futures


def _run_batch(lane: Lane[Any, Any], items: list[Any], futures: list[Future[Any]]) -> None:
    if not items:
        return
    try:
        results = lane.handle(items)
        if len(results) != len(items):
            raise RuntimeError(f"{len(items)} items gave {len(results)} results")
    except Exception as error:
        if len(items) == 1:
            futures[0].set_exception(error)
            return
        for item, future in zip(items, futures, strict=True):
            _run_batch(lane, [item], [future])
        return
    for future, result in zip(futures, results, strict=True):
        future.set_result(result)
