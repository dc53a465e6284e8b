"""A bound on what runs at once, in all and for each source; the others wait their turn without a thread."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager

from geocentroids_tiler.errors import BusyError

_RETRY_AFTER_S = 1.0


class Gate:
    """Lets in so many at once, first come first served among those whose source has room. Safe for several loops.

    Args:
        in_all: how many may be inside.
        per_source: how many of one source.
        setting: names the bound in the error.
    """

    def __init__(self, in_all: int, per_source: int, setting: str) -> None:
        self._in_all = in_all
        self._per_source = per_source
        self._setting = setting
        self._lock = threading.Lock()
        self._inside: Counter[str] = Counter()
        self._waiting: list[tuple[str, Future[None]]] = []

    @property
    def inside(self) -> dict[str, int]:
        """How many of each source are inside; of no source there is a zero."""
        with self._lock:
            return dict(self._inside)

    @asynccontextmanager
    async def enter(self, source: str, wait_s: float) -> AsyncIterator[None]:
        """Wait until there is room, and hold the place until the end of the ``with`` block.

        Args:
            source: what is bounded by itself.
            wait_s: longest wait.

        Raises:
            BusyError: if there is no room within that time.
        """
        turn: Future[None] = Future()
        with self._lock:
            self._waiting.append((source, turn))
            self._admit()
        try:
            if not turn.done():
                async with asyncio.timeout(wait_s):
                    await asyncio.wrap_future(turn)
        except TimeoutError:
            self._withdraw(source, turn)
            raise BusyError(
                f"this server answers at most {self._in_all} such requests at once, and {self._per_source} of one "
                f"image ({self._setting})",
                _RETRY_AFTER_S,
            ) from None
        except BaseException:  # the request is cancelled
            self._withdraw(source, turn)
            raise
        try:
            yield
        finally:
            self._leave(source)

    def _admit(self) -> None:
        """Let in whoever there is room for; with the lock held."""
        still: list[tuple[str, Future[None]]] = []
        for source, turn in self._waiting:
            room = self._inside.total() < self._in_all and self._inside[source] < self._per_source
            if not room:
                still.append((source, turn))
            elif turn.set_running_or_notify_cancel():
                self._inside[source] += 1
                turn.set_result(None)
        self._waiting = still
        self._inside = +self._inside  # without the zeros that leaving left behind

    def _leave(self, source: str) -> None:
        with self._lock:
            self._inside[source] -= 1
            self._admit()

    def _withdraw(self, source: str, turn: Future[None]) -> None:
        """Give a place up, whether it was given meanwhile or not."""
        if not turn.cancel() and not turn.cancelled():  # it came in the very moment in which nobody waited any more
            self._leave(source)
            return
        with self._lock:
            self._waiting = [each for each in self._waiting if each[1] is not turn]
