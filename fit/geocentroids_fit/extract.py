"""From images to features: the tokens of labelled patches, exactly as serving computes them, a shard per image.

Windows are read by threads ahead of the encoder, and blended and sampled behind it, so that the device stays busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from geocentroids_fit.images import ImageFolder, ahead, in_pool
from geocentroids_fit.ledger import Ledger
from geocentroids_fit.reading import Batch, ReadBatch, Unreadable, read_batch
from geocentroids_fit.shards import FeatureSettings, FeatureStore
from geocentroids_fit.stream import FeatureStream, ReadingAhead, layout_of
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder import Encoder
from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.source import Dataset

CHUNKS_PER_BATCH = 16
"""Chunks whose windows are read through one opening of a file."""
OPEN_AHEAD = 4
"""Images opened before their turn."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction made.

    Attributes:
        store: the features.
        reused: images whose features were there already.
        busy: share of the time, from the first window on, that the encoder was running; 0 if it did not run.
        features_per_s: features computed in a second of that time.
    """

    store: FeatureStore
    reused: int
    busy: float
    features_per_s: float


def extract(
    images: ImageFolder,
    encoder: Encoder,
    codebook: Codebook,
    settings: FeatureSettings,
    out: Path,
    *,
    readers: int = 2,
    progress: bool = True,
) -> Extraction:
    """Compute features of images and write them to a directory, a shard for each image.

    Shards that are there already and were made of the same image are kept, so a run that was ended at any moment goes
    on where it stopped and comes to the same files. An image that cannot be used is left out, and the manifest says
    why.

    Args:
        images: what to sample.
        encoder: computes tokens.
        codebook: how images are opened and windows are laid; its centroids do not matter.
        settings: what the features depend on; kept in the manifest.
        out: the directory.
        readers: threads that read.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``out`` holds features of other settings, no patch has data, or there is no room.
    """
    ledger = Ledger(images, settings, out)
    layout, patch_px = layout_of(settings), settings.encoder.patch_px
    with (
        ThreadPoolExecutor(readers, "geocentroids-read") as pool,
        ThreadPoolExecutor(1, "geocentroids-blend") as behind,
    ):

        def read(batch: Batch) -> Future[ReadBatch | Unreadable]:
            return pool.submit(read_batch, batch, layout, patch_px)

        ledger.find_finished(pool)
        stream = FeatureStream(encoder, settings, ReadingAhead(read, readers + 1, CHUNKS_PER_BATCH), behind, ledger)
        with ledger.bar(progress):
            stream.run(_opened(images, codebook, ledger, pool))
    took_s = max(time.perf_counter() - stream.began, 1e-9) if stream.began else 1e-9
    return Extraction(ledger.close(), ledger.reused, stream.encoding_s / took_s, ledger.computed / took_s)


def _opened(images: ImageFolder, codebook: Codebook, ledger: Ledger, pool: Executor) -> Iterator[tuple[str, Dataset]]:
    """Yield the images to do, opened ahead; leave out those that cannot be."""
    begin = in_pool(pool, partial(images.open, codebook=codebook))
    for name, opened in ahead(begin, ledger.pending, OPEN_AHEAD):
        try:
            dataset = opened.result()
        except GeocentroidsError as error:
            ledger.skip(name, str(error))
            continue
        yield name, dataset
