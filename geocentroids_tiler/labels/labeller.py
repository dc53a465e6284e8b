"""What turns the windows of a chunk into labels: the protocol between reading and a device, wherever the device is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import DeviceInfo
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.once import Claim, Work
from geocentroids_tiler.labels.store import ChunkLabels
from geocentroids_tiler.source import ReadOptions

DatasetKey = tuple[str, str, ReadOptions]
"""What pixels depend on, apart from the codebook: ``Dataset.key``."""
WindowKey = tuple[DatasetKey, ChunkIndex]


class Window(Protocol):
    """One window, read."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """RGB of shape (S, S, 3)."""
        ...


@dataclass(frozen=True, eq=False)
class ChunkJob:
    """A chunk that holds something to label.

    Attributes:
        dataset: what is labelled.
        index: the chunk.
        place: its row and column, counted from the dataset's first chunk.
        window: claims the pixels of a window, with a rank.
    """

    dataset: DatasetKey
    index: ChunkIndex
    place: tuple[int, int]
    window: Callable[[ChunkIndex, Rank], Claim[Any]]


@dataclass(frozen=True, slots=True)
class DeviceFigures:
    """What a device, or several together, did since the start.

    Attributes:
        windows_encoded: windows encoded.
        windows_given_up: windows asked for and not encoded, because nobody wanted them any more.
        queued: windows and chunks that wait.
    """

    windows_encoded: int
    windows_given_up: int
    queued: int


class Labeller(Protocol):
    """Labels chunks of one codebook. Safe for threads."""

    @property
    def lock(self) -> threading.RLock:
        """Shared by all computations that wait for each other, on both sides of this protocol."""
        ...

    @property
    def device(self) -> DeviceInfo:
        """What computes."""
        ...

    @property
    def seconds_per_chunk(self) -> float:
        """What labelling a chunk takes when the device is busy."""
        ...

    @property
    def windows_at_once(self) -> int:
        """Windows that keep it busy when they are handed over together."""
        ...

    @property
    def queued(self) -> int:
        """Windows and chunks that were handed over and wait; asked often."""
        ...

    def waiting(self) -> set[WindowKey]:
        """Return the windows that are wanted and not encoded yet."""
        ...

    def when_shorter(self, callback: Callable[[], None]) -> None:
        """Have a function called when less waits than before."""
        ...

    def label(self, job: ChunkJob, work: Work[Any], done: Callable[[ChunkLabels], None]) -> None:
        """Label a chunk as a part of ``work``, and call ``done`` with labels for all of its patches.

        What is waited for is held by the work: given up with it, raised in rank with it; what goes wrong fails it.
        """
        ...

    def figures(self) -> DeviceFigures:
        """Return what was done since the start; may wait for a network."""
        ...

    def close(self) -> None:
        """Finish what was asked for, and end the threads."""
        ...


def device_name(device: DeviceInfo) -> str:
    """Return what labels are kept under: number formats may differ in near ties."""
    return f"{device.backend}/{device.provider}/{device.precision}"
