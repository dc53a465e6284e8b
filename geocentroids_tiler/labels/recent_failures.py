"""Sources that could not be opened a moment ago, so that a map of them does not ask for each of its tiles."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from cachetools import LRUCache

from geocentroids_tiler.errors import GeocentroidsError

MAX_REMEMBERED = 4096


class RecentFailures:
    """Errors that are raised again for a short time. Safe for threads.

    Args:
        ttl_s: for how long.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._known: LRUCache[Hashable, tuple[GeocentroidsError, float]] = LRUCache(MAX_REMEMBERED)

    def remember(self, key: Hashable, error: GeocentroidsError, now_s: float) -> None:
        """Remember an error for a short time."""
        with self._lock:
            self._known[key] = error, now_s

    def check(self, key: Hashable, now_s: float) -> None:
        """Raise the error of a source that failed a moment ago."""
        with self._lock:
            known = self._known.get(key)
            if known is None:
                return
            error, at_s = known
            if now_s - at_s >= self._ttl_s:
                del self._known[key]
                return
        raise type(error)(*error.args)  # a new one: the old one's traceback grows with each that raises it
