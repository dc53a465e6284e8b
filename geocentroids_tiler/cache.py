"""A cache in memory, bounded in bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Keeps values up to a number of bytes, least recently used out first. Safe for threads.

    Attributes:
        hits: how often a value was found.
        misses: how often none was.
    """

    def __init__(self, max_bytes: int, size_of: Callable[[V], int]) -> None:
        """Keep up to ``max_bytes``, counted by ``size_of``."""
        self._lock = threading.Lock()
        self._size_of = size_of
        self._cache: LRUCache[K, V] = LRUCache(max_bytes, getsizeof=size_of)
        self.hits = 0
        self.misses = 0

    def get(self, key: K) -> V | None:
        """Return the value of a key, or None if it is not kept."""
        with self._lock:
            value = self._cache.get(key)
            if value is None:
                self.misses += 1
            else:
                self.hits += 1
            return value

    def peek(self, key: K) -> V | None:
        """Return the value of a key as ``get`` does, without counting it."""
        with self._lock:
            return self._cache.get(key)

    def put(self, key: K, value: V) -> None:
        """Keep a value, unless it is larger than the whole cache."""
        with self._lock:
            if self._size_of(value) <= self._cache.maxsize:
                self._cache[key] = value

    @property
    def nbytes(self) -> int:
        """Memory taken."""
        with self._lock:
            return int(self._cache.currsize)
