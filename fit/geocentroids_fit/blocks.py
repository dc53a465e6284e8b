"""Rows of many arrays, more than memory holds, in blocks that threads share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_tiler.errors import InputError

BLOCK_ROWS = {"cpu": 2048, "cuda": 65_536}
"""Rows compared with all centroids at once. On a CPU each thread has a block; its scores take 50 MB at K = 6144."""
RESIDENT_SHARE = 0.6
"""Of free device memory that the data may fill to stay there; the rest is for scores."""

Float = TypeVar("Float", bound=np.floating[Any])
Result = TypeVar("Result")
Blocks = Iterator[tuple[int, torch.Tensor]]


@dataclass(frozen=True)
class Rows:
    """Arrays as if they were one, read in blocks that do not depend on where one array ends.

    Attributes:
        parts: arrays of shape (n, D), float16 or float32; memory maps are read as they are needed.
        device: where blocks are wanted.
        scaled: whether rows are scaled to length 1.
    """

    parts: Sequence[NDArray[np.floating[Any]]]
    device: torch.device
    scaled: bool

    def __post_init__(self) -> None:
        shapes = [part.shape for part in self.parts]
        if any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
            raise InputError(f"features come as {shapes[:3]}; they must be arrays of shape (n, D) with the same D")

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def dim(self) -> int:
        """Length D of a row."""
        return int(self.parts[0].shape[1])

    @property
    def dtype(self) -> np.dtype[np.floating[Any]]:
        """That all parts can be held in: float16 or float32."""
        return np.dtype(np.float16 if all(part.dtype == np.float16 for part in self.parts) else np.float32)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Number of the first row of each part, of shape (parts,)."""
        return np.concatenate([[0], np.cumsum([len(part) for part in self.parts])])[:-1].astype(np.int64)

    @property
    def block_starts(self) -> range:
        """Number of the first row of each block."""
        return range(0, len(self), BLOCK_ROWS[self.device.type])

    def blocks(self, first: int = 0, step: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield blocks: the number of the first row, and rows of shape (rows, D), float32, on the device.

        A block may be changed; it is overwritten by the next.

        Args:
            first: the first block to yield.
            step: from one block to the next, so that threads can share them.
        """
        space = torch.empty((self.block_starts.step, self.dim), device=self.device)
        for start, stored in self._resident or self._stored(first, step):
            block = space[: len(stored)].copy_(stored)
            if self.scaled:
                block /= torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min_(1e-30)
            yield start, block

    def map_blocks(self, work: Callable[[Blocks], Result]) -> list[Result]:
        """Return what ``work`` makes of each thread's share of the blocks.

        On a CPU threads work on blocks of their own in place of sharing every product: they never wait for each other,
        and one reads the disk while another computes. The shares depend on the number of threads only.
        """
        if self.device.type == "cuda":
            return [work(self.blocks())]
        threads, stop = torch.get_num_threads(), Event()

        def run(first: int) -> Result:
            return work(takewhile(lambda _: not stop.is_set(), self.blocks(first, threads)))

        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    return list(pool.map(run, range(min(threads, len(self.block_starts)))))
                except BaseException:
                    stop.set()  # else Ctrl-C would wait for the whole pass
                    raise
        finally:
            torch.set_num_threads(threads)

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by number, of shape (len(index), D); each part is read once, from its start to its end."""
        rows = np.empty((len(index), self.dim), np.float32)
        part = np.searchsorted(self.starts, index, side="right") - 1
        for number in np.unique(part):
            own = np.flatnonzero(part == number)
            own = own[np.argsort(index[own])]
            rows[own] = self.parts[number][index[own] - self.starts[number]]
        return unit(rows) if self.scaled else rows

    @cached_property
    def _resident(self) -> list[tuple[int, torch.Tensor]] | None:
        """All blocks on the device, or None if they stay where they are."""
        if self.device.type != "cuda":
            return None
        size_bytes = len(self) * self.dim * self.dtype.itemsize
        if size_bytes > RESIDENT_SHARE * torch.cuda.mem_get_info(self.device)[0]:
            return None
        return [(start, block.to(self.device, copy=True)) for start, block in self._stored()]

    def _stored(self, first: int = 0, step: int = 1) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield blocks of the parts, of the parts' dtype, in one piece of memory that each overwrites."""
        space = torch.from_numpy(np.empty((self.block_starts.step, self.dim), self.dtype))
        if self.device.type == "cuda":
            space = space.pin_memory()
        for start in self.block_starts[first::step]:
            block = space[: len(self) - start]
            part, filled = int(np.searchsorted(self.starts, start, side="right")) - 1, 0
            while filled < len(block):
                skip = start + filled - self.starts[part]
                piece = self.parts[part][skip : skip + len(block) - filled]
                block.numpy()[filled : filled + len(piece)] = piece
                part, filled = part + 1, filled + len(piece)
            yield start, block


def unit(rows: NDArray[Float]) -> NDArray[Float]:
    """Return rows of shape (..., D) scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1), rows.dtype)
