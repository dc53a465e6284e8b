"""Windows cut into runs of one fixed size, which is halved where a device's memory is too small for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import Windows
from geocentroids_tiler.errors import EncoderError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DeviceMemoryError(EncoderError):
    """A run did not fit the memory of its device; a smaller one may."""


class RunSize:
    """How many windows or chunks one run takes, found by halving.

    Attributes:
        count: what the next run takes.
    """

    def __init__(self, count: int, one: str) -> None:
        """Start with ``count``; ``one`` names a single window or chunk in messages, with its size."""
        self.count = count
        self._one = one

    def fit(self, run: Callable[[int], T]) -> T:
        """Return what ``run(count)`` returns, halving ``count`` for good as long as it runs out of memory.

        Raises:
            EncoderError: if not even one window or chunk fits.
        """
        while True:
            try:
                return run(self.count)
            except DeviceMemoryError as error:
                if self.count == 1:
                    raise EncoderError(f"{self._one} does not fit the memory of the device: {error}") from error
                logger.warning("runs of %d do not fit the memory of the device, trying %d", self.count, self.count // 2)
                self.count //= 2


def split(windows: Windows, size: int) -> list[Windows]:
    """Cut N windows into parts of ``size``, the last one with what is left."""
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def fill(batch: NDArray[Any], rows: Sequence[NDArray[Any]] | NDArray[Any]) -> None:
    """Write up to B arrays of shape S into ``batch`` of shape (B, *S), and zeros (a black window) after them."""
    for place, row in zip(batch, rows, strict=False):
        place[...] = row
    batch[len(rows) :] = 0


def batch_of(windows: Windows, size: int) -> NDArray[np.uint8]:
    """Return 1 to ``size`` windows of shape (S, S, 3) as a C-ordered batch of shape (size, S, S, 3), padded with black.

    A batch of one is the window itself, not a copy, where its memory is in order and may be written: torch
    shares no other.
    """
    if size == 1:
        window: NDArray[np.uint8] = np.require(windows[0], requirements=["C_CONTIGUOUS", "WRITEABLE"])
        return window[None]
    batch = np.empty((size, *windows[0].shape), np.uint8)
    fill(batch, windows)
    return batch


def usable_cores() -> int:
    """Return the cores that this process may use; not every system can say which those are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
