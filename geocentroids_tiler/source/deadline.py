"""How long something may take in all, however it is split into steps."""

from __future__ import annotations

import time
from collections.abc import Callable


class Deadline:
    """A point in time by which something has to be done.

    Args:
        seconds: from now on.
        clock: tells the time in seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at_s = clock() + seconds

    def allows(self, seconds: float) -> bool:
        """Tell whether something that takes so long would be done in time."""
        return self._clock() + seconds < self._at_s

    def left_s(self) -> float:
        """Return the time that is left.

        Raises:
            TimeoutError: if there is none.
        """
        left = self._at_s - self._clock()
        if left <= 0:
            raise TimeoutError("the time for reading a source is over")
        return left

    def within(self, seconds: float | None) -> float:
        """Return the shorter one of a step's own limit and what is left.

        Raises:
            TimeoutError: if nothing is left.
        """
        left = self.left_s()
        return left if seconds is None else min(seconds, left)
