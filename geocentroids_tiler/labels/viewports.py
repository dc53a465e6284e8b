"""Which requests belong to one look at a map, so that the newest look is computed first."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from cachetools import LRUCache

from geocentroids_tiler.labels.batching import Rank

GAP_S = 1.0
"""Tiles of one look are asked for in one burst; after a pause as long as this the map has moved. A server that has just
started may take half of it to take in the burst."""
MAX_CLIENTS = 4096


@dataclass(frozen=True, slots=True)
class _Viewport:
    number: int
    requests: int
    last_s: float


class Viewports:
    """Ranks the requests of a server: a later viewport before an earlier one, and each in the order it was asked for.

    Requests of one client for one zoom level of one image that follow each other closely are taken for one viewport.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._known: LRUCache[Hashable, _Viewport] = LRUCache(MAX_CLIENTS)

    def next(self) -> Rank:
        """Return the rank of a request that stands alone."""
        return next(self._numbers), 0, 0

    def rank(self, client: str, shown: Hashable) -> Rank:
        """Return the rank of a tile.

        Args:
            client: who asks.
            shown: what the map shows, image and zoom level.
        """
        now_s = self._clock()
        with self._lock:
            known = self._known.get((client, shown))
            if known is None or now_s - known.last_s >= GAP_S:
                known = _Viewport(next(self._numbers), 0, now_s)
            self._known[client, shown] = _Viewport(known.number, known.requests + 1, now_s)
        return known.number, -known.requests, 0
