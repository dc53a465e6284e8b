"""Labels of one dataset, wherever they come from: kept on disk as a whole, or computed when they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from geocentroids_tiler.errors import BusyError, KeptLabelsError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.kept import KeptBlock, KeptDataset
from geocentroids_tiler.source import Dataset


@dataclass(frozen=True)
class DatasetLabels:
    """Where the labels of a dataset come from.

    Attributes:
        dataset: the dataset.
        engine: computes labels that are not kept.
        kept: labels of the whole dataset, or None.
    """

    dataset: Dataset
    engine: LabelEngine
    kept: KeptDataset | None

    @property
    def version(self) -> str:
        """What labels depend on apart from dataset and codebook: what computes them, or which ones are kept."""
        return self.engine.device_name if self.kept is None else f"kept/{self.kept.version}"

    @property
    def seconds_per_chunk(self) -> float:
        """What labelling a chunk takes; 0 if it was done already."""
        return self.engine.seconds_per_chunk if self.kept is None else 0.0

    def at_hand(self, patches: PatchRange) -> bool:
        """Tell whether the labels of a rectangle of patches are there without computing any."""
        return self.kept is not None or self.engine.at_hand(self.dataset, patches)

    async def every_patch(
        self,
        patches: PatchRange,
        pool: Executor,
        *,
        rank: Rank | None = None,
        timeout_s: float,
        over: Callable[[], bool] = lambda: False,
    ) -> LabelBlock:
        """Return the label and similarity of every patch of a rectangle without holding a thread of the caller.

        Args:
            patches: which ones.
            pool: threads that may read kept labels.
            rank: how urgent it is, where labels have to be computed; None: as urgent as the newest request.
            timeout_s: longest time to wait for labels that are computed.
            over: asked at each chunk that is computed whether the server ends.

        Raises:
            BusyError: if too much is asked for at once, the time is over, the server ends, or kept labels turn out to
                be broken.
        """
        if self.kept is None:
            return await self.engine.block_async(self.dataset, patches, rank=rank, timeout_s=timeout_s, over=over)
        with _asked_again():
            return _patches_of(await asyncio.get_running_loop().run_in_executor(pool, self.kept.read, patches), patches)

    async def block_async(
        self,
        patches: PatchRange,
        pool: Executor,
        *,
        cell: int = 1,
        similarity: bool = True,
        rank: Rank | None = None,
        timeout_s: float,
    ) -> LabelBlock | KeptBlock:
        """Return the labels of a rectangle of patches without holding a thread of the caller.

        Args:
            patches: which ones.
            pool: threads that may read kept labels.
            cell: patches a side of the largest cells that are of use; computed labels are always of patches.
            similarity: whether similarities are needed; without they may be NaN.
            rank: how urgent it is, where labels have to be computed; None: as urgent as the newest request.
            timeout_s: longest time to wait for labels that are computed.

        Raises:
            BusyError: if too much is asked for at once, the time is over, or kept labels turn out to be broken.
        """
        if self.kept is not None:
            read = partial(self.kept.read, patches, self.kept.factor_for(2 * cell), similarity=similarity)
            with _asked_again():
                return await asyncio.get_running_loop().run_in_executor(pool, read)
        return await self.engine.block_async(self.dataset, patches, rank=rank, timeout_s=timeout_s)


@contextmanager
def _asked_again() -> Iterator[None]:
    """Turn away a request that met broken files: the next one finds no kept labels, and what it asks for is computed.

    This one may show more than can be computed, and its answer would be kept as one of theirs.
    """
    try:
        yield
    except KeptLabelsError as error:
        raise BusyError(f"{error}; ask again, and they are computed where that is possible", 1.0) from error


def _patches_of(block: KeptBlock, patches: PatchRange) -> LabelBlock:
    if block.patches != patches or block.factor != 1:
        raise KeptLabelsError(f"{patches} were asked for, and {block.patches} were read")
    return LabelBlock(patches, block.labels, block.similarity)
