"""Labels of one dataset, wherever they come from: kept on disk as a whole, or computed when they are asked for."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from geocentroids_tiler.errors import KeptLabelsError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.kept import KeptBlock, KeptDataset
from geocentroids_tiler.source import Dataset

logger = logging.getLogger(__name__)


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

    def block(self, patches: PatchRange, timeout_s: float) -> LabelBlock:
        """Return the labels of a rectangle of patches, waiting for them.

        Raises:
            BusyError: if too much is asked for at once, or the time is over.
        """
        if self.kept is not None:
            try:
                return _patches_of(self.kept.read(patches), patches)
            except KeptLabelsError as error:
                logger.warning("%s; they are computed", error)
        return self.engine.block(self.dataset, patches, timeout_s=timeout_s)

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
            timeout_s: longest time for all of it.

        Raises:
            BusyError: if too much is asked for at once, or the time is over.
        """
        if self.kept is not None:
            read = partial(self.kept.read, patches, self.kept.factor_for(2 * cell), similarity=similarity)
            try:
                return await asyncio.get_running_loop().run_in_executor(pool, read)
            except KeptLabelsError as error:
                logger.warning("%s; they are computed", error)
        return await self.engine.block_async(self.dataset, patches, rank=rank, timeout_s=timeout_s)


def _patches_of(block: KeptBlock, patches: PatchRange) -> LabelBlock:
    if block.patches != patches or block.factor != 1:
        raise KeptLabelsError(f"{patches} were asked for, and {block.patches} were read")
    return LabelBlock(patches, block.labels, block.similarity)
