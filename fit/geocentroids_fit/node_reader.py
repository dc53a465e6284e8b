"""Tasks that read windows on the nodes of a cluster. Apart from encoders: a process that only reads stays small."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from geocentroids_fit.reading import Batch, ReadBatch, Unreadable, read_batch
from geocentroids_tiler.encoder import ChunkLayout
from geocentroids_tiler.settings import load_settings
from geocentroids_tiler.source import Remote, open_remote


def read_on_node(batch: Batch, layout: ChunkLayout, patch_px: int) -> ReadBatch | Unreadable:
    """Read a batch, as a Ray task; a remote image is opened with what this process opens such with."""
    source = batch.dataset.source
    if source.path is None:
        batch = replace(batch, dataset=replace(batch.dataset, source=replace(source, remote=node_remote())))
    return read_batch(batch, layout, patch_px)


@lru_cache(maxsize=1)
def node_remote() -> Remote:
    """Return what opens images named by URL in this process, as the ``GEOCENTROIDS_SOURCE_*`` variables allow it."""
    return open_remote(load_settings())


def without_remote(batch: Batch) -> Batch:
    """Return a batch that can travel: connections cannot."""
    dataset = batch.dataset
    return replace(batch, dataset=replace(dataset, source=replace(dataset.source, remote=None)))
