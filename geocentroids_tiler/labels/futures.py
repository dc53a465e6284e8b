"""Small helpers for ``concurrent.futures.Future``, which works for threads and for any event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def done(value: T) -> Future[T]:
    """Return a future that holds ``value`` already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def follow(future: Future[T]) -> Future[T]:
    """Return a future with the same outcome that one caller may cancel without taking the result from the others."""
    return then(future, lambda result: result)


def then(future: Future[T], function: Callable[[T], R]) -> Future[R]:
    """Return a future of ``function(result)``; cancelling it leaves the original alone."""
    copy: Future[R] = Future()

    def forward(finished: Future[T]) -> None:
        if not copy.set_running_or_notify_cancel():
            return
        try:
            copy.set_result(function(finished.result()))
        except Exception as error:
            copy.set_exception(error)

    future.add_done_callback(forward)
    return copy


def when_all(futures: Iterable[Future[T]], callback: Callable[[list[Future[T]]], None]) -> None:
    """Call ``callback`` once, when the last of the futures is done."""
    futures = list(futures)
    left = len(futures)
    lock = threading.Lock()

    def count_down(_: Future[T]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            callback(futures)

    for future in futures:
        future.add_done_callback(count_down)
