"""Work on files of many hosts, of which none takes all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class HostQueues:
    """Runs functions in a pool, at most so many of one host at once; the others of that host wait without a thread.

    Hosts that nothing is done for take no memory. Safe for threads.

    Args:
        pool: runs the functions.
        limit: functions of one host at once.
    """

    def __init__(self, pool: Executor, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._lock = threading.Lock()
        self._running: dict[str, int] = {}
        self._waiting: dict[str, deque[Callable[[], None]]] = {}

    def submit(self, host: str | None, function: Callable[[], Any]) -> Future[Any]:
        """Run a function soon; ``host`` is None for what belongs to none, and waits for none."""
        result: Future[Any] = Future()
        result.set_running_or_notify_cancel()

        def run() -> None:
            try:
                value = function()
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(value)
            finally:
                self._next(host)

        if host is not None:
            with self._lock:
                running = self._running.get(host, 0)
                if running >= self._limit:
                    self._waiting.setdefault(host, deque()).append(run)
                    return result
                self._running[host] = running + 1
        self._pool.submit(run)
        return result

    def _next(self, host: str | None) -> None:
        """Start what has waited longest for a host that is done with something."""
        if host is None:
            return
        with self._lock:
            waiting = self._waiting.get(host)
            if waiting is None:
                self._running[host] -= 1
                if not self._running[host]:
                    del self._running[host]
                return
            run = waiting.popleft()
            if not waiting:
                del self._waiting[host]
        self._pool.submit(run)
