"""Values that are computed once for all that want them at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache

from geocentroids_tiler.errors import EncoderError
from geocentroids_tiler.labels.futures import done

K = TypeVar("K", bound=Hashable)
Asked = TypeVar("Asked", contravariant=True)
T = TypeVar("T")


class Keeper(Protocol[Asked, T]):
    """Keeps some values for later."""

    def get(self, key: Asked) -> T | None:
        """Return the value of a key, or None if it is not kept."""
        ...

    def put(self, key: Asked, value: T) -> None:
        """Keep a value, or not."""
        ...


class Lru(Generic[K, T]):
    """Keeps the ``count`` values that were used last. Not safe for threads."""

    def __init__(self, count: int) -> None:
        self._cache: LRUCache[K, T] = LRUCache(count)

    def get(self, key: K) -> T | None:
        """Return the value of a key, or None if it is not kept."""
        return self._cache.get(key)

    def put(self, key: K, value: T) -> None:
        """Keep a value, unless none is to be kept."""
        if self._cache.maxsize:
            self._cache[key] = value


class Once(Generic[K, T]):
    """Computes each value once for all that want it at the same time, however little its keeper keeps.

    A failure reaches all who wait for the value and is forgotten: who asks next starts again. The futures handed out
    are shared, so nobody can cancel them. Safe for threads.
    """

    def __init__(self, keeper: Keeper[K, T]) -> None:
        self._keeper = keeper
        self._lock = threading.Lock()
        self._running: dict[K, Future[T]] = {}
        self._closed = False

    def get(self, key: K, start: Callable[[Future[T]], None]) -> Future[T]:
        """Return the value of a key: kept, being computed, or computed from now on.

        Args:
            key: what the value depends on.
            start: begins the computation that ends with a result or an exception in the future it is given.

        Raises:
            EncoderError: if it would have to be computed and ``close`` was called.
        """
        with self._lock:
            if (kept := self._keeper.get(key)) is not None:
                return done(kept)
            if (running := self._running.get(key)) is not None:
                return running
            if self._closed:
                raise EncoderError("the server is shutting down")
            future = self._running[key] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        future.add_done_callback(partial(self._finish, key))
        try:
            start(future)
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> list[Future[T]]:
        """Accept no new computations and return those that run."""
        with self._lock:
            self._closed = True
            return list(self._running.values())

    def _finish(self, key: K, future: Future[T]) -> None:
        with self._lock:
            del self._running[key]
            if future.exception() is None:
                self._keeper.put(key, future.result())
