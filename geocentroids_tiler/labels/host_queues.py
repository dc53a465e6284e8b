"""Work on files of many hosts, of which none takes all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future
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
        self._waiting: dict[str, deque[_Job]] = {}

    def submit(self, host: str | None, function: Callable[[], Any]) -> Future[Any]:
        """Run a function soon; ``host`` is None for what belongs to none, and waits for none.

        What the pool does not run any more, because it is shut down, ends with its ``RuntimeError``, or with a
        ``CancelledError`` if the pool had taken it already.
        """
        job = _Job(host, function)
        if host is not None:
            with self._lock:
                running = self._running.get(host, 0)
                if running >= self._limit:
                    self._waiting.setdefault(host, deque()).append(job)
                    return job.result
                self._running[host] = running + 1
        self._start(job)
        return job.result

    def _start(self, job: _Job) -> None:
        try:
            started = self._pool.submit(job.run)
        except RuntimeError as error:  # the pool is shut down
            self._end(job, error)
            return
        started.add_done_callback(lambda done: self._end(job, CancelledError() if done.cancelled() else None))

    def _end(self, job: _Job, problem: Exception | None) -> None:
        """Start what has waited longest for a host that is done with something."""
        if problem is not None:
            job.result.set_exception(problem)
        if job.host is None:
            return
        with self._lock:
            waiting = self._waiting.get(job.host)
            following = waiting.popleft() if waiting else None
            if following is None:
                self._running[job.host] -= 1
                if not self._running[job.host]:
                    del self._running[job.host]
            elif not waiting:
                del self._waiting[job.host]
        if following is not None:
            self._start(following)


class _Job:
    """A function, and what becomes of it."""

    def __init__(self, host: str | None, function: Callable[[], Any]) -> None:
        self.host = host
        self.result: Future[Any] = Future()
        self.result.set_running_or_notify_cancel()
        self._function = function

    def run(self) -> None:
        try:
            value = self._function()
        except BaseException as error:
            self.result.set_exception(error)
        else:
            self.result.set_result(value)
