"""Values that are computed once for all that want them at the same time, and not at all once nobody does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Generic, Protocol, TypeVar

from cachetools import LRUCache

from geocentroids_tiler.errors import EncoderError
from geocentroids_tiler.labels.batching import BACKGROUND, Rank
from geocentroids_tiler.labels.futures import done

K = TypeVar("K", bound=Hashable)
Asked = TypeVar("Asked", contravariant=True)
T = TypeVar("T")
S = TypeVar("S")


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


class Part(Protocol):
    """Something that a computation waits for: an item in a queue, or a claim on another computation."""

    def release(self) -> bool:
        """Give it up; False if it goes on all the same."""
        ...

    def raise_rank(self, rank: Rank) -> None:
        """Make it at least as urgent as ``rank``."""
        ...


class Work(Generic[T]):
    """A computation that runs, for all who have a claim on its value.

    Its steps call ``hold`` or ``after`` with what they wait for next, and ``finish`` or ``fail`` at the end.
    """

    def __init__(self, lock: threading.RLock, rank: Rank, ended: Callable[[Work[T], T | None], None]) -> None:
        """Begin without claims.

        Args:
            lock: shared by all computations that may wait for each other.
            rank: how urgent it is.
            ended: called once with the value, or None where there is none, before the future is done.
        """
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()  # it is shared: nobody may cancel it for the others
        self.rank = rank
        self.claims = 0
        self.over = False
        self._lock = lock
        self._ended = ended
        self._parts: list[Part] = []

    def hold(self, part: Part) -> None:
        """Remember what the next step waits for, to be given up with the work."""
        with self._lock:
            wanted = bool(self.claims) and not self.over
            if wanted:
                self._parts.append(part)
                part.raise_rank(self.rank)
            elif part.release():
                self._give_up()

    def after(self, claim: Claim[S], action: Callable[[S], None]) -> None:
        """Hold a claim, and go on with its value when it is there; what goes wrong on the way fails this work."""
        self.hold(claim)
        claim.future.add_done_callback(lambda future: self.go_on(lambda: action(future.result())))

    def go_on(self, step: Callable[[], None]) -> None:
        """Run a step, unless the work is over; what goes wrong in it fails the work."""
        if self.over:
            return
        try:
            step()
        except Exception as error:
            self.fail(error)

    def finish(self, value: T) -> None:
        """End with a value, which is kept."""
        if self._end(value):
            self.future.set_result(value)

    def fail(self, error: Exception) -> None:
        """End with an error, which is not kept; what was waited for is given up."""
        if self._end(None):
            self.future.set_exception(error)

    def raise_rank(self, rank: Rank) -> None:
        """Make it, and all that it waits for, at least as urgent as ``rank``."""
        with self._lock:
            if rank > self.rank:
                self.rank = rank
                for part in self._parts:
                    part.raise_rank(rank)

    def drop_claim(self) -> None:
        """Take one claim back; with the last the work is given up, unless its next step runs already."""
        with self._lock:
            self.claims -= 1
            if self.claims or self.over:
                return
            self._parts = [part for part in self._parts if not part.release()]
            if not self._parts:  # else it is on the device or being read, and is kept for whoever comes next
                self._give_up()

    def _give_up(self) -> None:
        if self._end(None):
            self.future.set_exception(CancelledError("nobody wants it any more"))  # for who waits for all to end

    def _end(self, value: T | None) -> bool:
        with self._lock:
            if self.over:
                return False
            self.over = True
            for part in self._parts:
                part.release()
            self._parts = []
            self._ended(self, value)
            return True


class Claim(Generic[T]):
    """One caller's share in a value. Released, it lets the computation go if nobody else has one."""

    def __init__(self, future: Future[T], work: Work[T] | None) -> None:
        self.future = future
        self._work = work
        self._lock = threading.Lock()

    def release(self) -> bool:
        """Give the share up, once; True, as nothing of this caller's goes on."""
        with self._lock:
            work, self._work = self._work, None
        if work is not None:
            work.drop_claim()
        return True

    def raise_rank(self, rank: Rank) -> None:
        """Make the computation at least as urgent as ``rank``."""
        work = self._work
        if work is not None:
            work.raise_rank(rank)

    def result(self, timeout_s: float | None = None) -> T:
        """Wait for the value, and give the share up."""
        try:
            return self.future.result(timeout_s)
        finally:
            self.release()


class Once(Generic[K, T]):
    """Computes each value once for all that want it at the same time, however little its keeper keeps.

    A failure reaches all who wait for the value and is forgotten: who asks next starts again. Safe for threads.
    """

    def __init__(self, keeper: Keeper[K, T], lock: threading.RLock | None = None) -> None:
        """Keep values in ``keeper``; ``lock`` is shared with computations whose values these wait for."""
        self._keeper = keeper
        self._lock = threading.RLock() if lock is None else lock
        self._running: dict[K, Work[T]] = {}
        self._closed = False
        self.given_up = 0
        """Computations that ended before their time because nobody wanted their value any more."""

    def __len__(self) -> int:
        """Computations that run."""
        return len(self._running)

    def keys(self) -> set[K]:
        """Return the keys of the computations that run."""
        with self._lock:
            return set(self._running)

    def claim(self, key: K, start: Callable[[Work[T]], None], rank: Rank = BACKGROUND) -> Claim[T]:
        """Return a share in the value of a key: kept, being computed, or computed from now on.

        Args:
            key: what the value depends on.
            start: begins the computation.
            rank: how urgent it is.

        Raises:
            EncoderError: if it would have to be computed and ``close`` was called.
        """
        with self._lock:
            if (kept := self._keeper.get(key)) is not None:
                return Claim(done(kept), None)
            running = self._running.get(key)
            work = running if running is not None else self._begin(key, rank)
            work.claims += 1
        if running is None:
            work.go_on(lambda: start(work))
        else:
            work.raise_rank(rank)
        return Claim(work.future, work)

    def get(self, key: K, start: Callable[[Work[T]], None]) -> Future[T]:
        """Return the value of a key, for a caller who will not give up."""
        return self.claim(key, start).future

    def close(self) -> list[Future[T]]:
        """Accept no new computations and return those that run."""
        with self._lock:
            self._closed = True
            return [work.future for work in self._running.values()]

    def _begin(self, key: K, rank: Rank) -> Work[T]:
        if self._closed:
            raise EncoderError("the server is shutting down")

        def ended(work: Work[T], value: T | None) -> None:
            del self._running[key]
            if value is not None:
                self._keeper.put(key, value)
            elif not work.claims:
                self.given_up += 1

        work = self._running[key] = Work(self._lock, rank, ended)
        return work
