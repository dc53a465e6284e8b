"""What a URL names: an image, or a mosaic of them. From the parameters of a request to where labels come from."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS

from geocentroids_tiler.codebook import Classes, Codebook
from geocentroids_tiler.errors import (
    InputError,
    SourceChangedError,
    SourceRefusedError,
    SourceUnavailableError,
    TooManyImagesError,
    UnsupportedImageError,
)
from geocentroids_tiler.grid import Grid, PatchRange, authority_code
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.futures import follow
from geocentroids_tiler.labels.merging import merge_labels
from geocentroids_tiler.labels.reading import DatasetLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.mosaic import Mosaic, Overlap, Problem, is_document
from geocentroids_tiler.params import LayerParams, ReadParams
from geocentroids_tiler.source import Dataset, ReadOptions

T = TypeVar("T")

Layer = Dataset | Mosaic
BROKEN = (SourceUnavailableError, SourceChangedError, SourceRefusedError, UnsupportedImageError)
"""Why an image of a mosaic is left out of an answer; the others are shown."""


async def run(pool: Executor, function: Callable[..., T], *args: Any) -> T:
    """Run a function in a pool of threads."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


async def find_codebook(service: Service, read: ReadParams) -> Codebook:
    """Return the codebook of a request, reading it from disk once."""
    known = service.known_codebook(read.codebook)
    return known if known is not None else await run(service.working, service.codebook, read.codebook)


async def find_classes(service: Service, codebook: Codebook, n: int | None) -> Classes:
    """Return the classes of a codebook, cutting its tree once for each ``n``."""
    known = service.known_classes(codebook, n)
    return known if known is not None else await run(service.working, service.classes, codebook, n)


async def find_dataset(service: Service, url: str, options: ReadOptions, codebook: Codebook) -> Dataset:
    """Return an image."""
    known = service.known_dataset(url, options, codebook)
    if known is None:  # in a thread: a local file's folder may be far away
        known = await asyncio.wrap_future(await run(service.working, service.dataset, url, options, codebook))
    return known


async def find_layer(service: Service, url: str, read: ReadParams, codebook: Codebook) -> Layer:
    """Return the image or the mosaic of a request."""
    if not is_document(url):
        return await find_dataset(service, url, read.options, codebook)
    known = service.mosaics.known(url, read.options, codebook)
    if known is None:
        known = await asyncio.wrap_future(await run(service.working, service.mosaics.get, url, read.options, codebook))
    return known


async def find_image(service: Service, url: str, read: ReadParams, codebook: Codebook) -> Dataset:
    """Return the image of a request that works on single images only.

    Raises:
        InputError: if its URL names a mosaic.
    """
    if is_document(url):
        raise InputError(f"{url!r} names many images; this works on one: name an image")
    return await find_dataset(service, url, read.options, codebook)


async def find_engine(service: Service, codebook: Codebook) -> LabelEngine:
    """Return the engine of a codebook, waiting for its encoder to load."""
    loading = service.engine(codebook)
    return loading.result() if loading.done() else await asyncio.wrap_future(follow(loading))


async def find_labels(service: Service, dataset: Dataset, codebook: Codebook) -> DatasetLabels:
    """Return where the labels of an image come from."""
    engine = await find_engine(service, codebook)
    kept = None if service.kept is None else await run(service.working, service.kept.find, dataset, codebook)
    return DatasetLabels(dataset, engine, kept)


@dataclass(frozen=True)
class MosaicPart:
    """The images of a mosaic under a rectangle of patches, opened.

    Attributes:
        mosaic: the mosaic.
        code: of the CRS of the grid.
        grid: the ground grid that all of them are labelled on.
        patches: the rectangle.
        overlap: whose label a patch gets.
        images: those that can be read, the first one first.
        missing: those that cannot.
    """

    mosaic: Mosaic
    code: str
    grid: Grid
    patches: PatchRange
    overlap: Overlap
    images: tuple[DatasetLabels, ...]
    missing: tuple[str, ...]

    @property
    def content(self) -> tuple[object, ...]:
        """What its labels depend on apart from the codebook."""
        images = [(each.dataset.key, each.version) for each in self.images]
        return (self.code, self.overlap, *images)

    @property
    def any_image(self) -> bool:
        """True if there is an image there, be it one that cannot be read."""
        return bool(self.images or self.missing)

    @property
    def covered(self) -> PatchRange:
        """The smallest rectangle that holds what the images have of the patches."""
        parts = [image.dataset.footprint.intersect(self.patches) for image in self.images]
        parts = [part for part in parts if not part.empty]
        if not parts:
            return PatchRange(0, 0, 0, 0)
        return PatchRange(
            min(part.row_start for part in parts),
            max(part.row_stop for part in parts),
            min(part.col_start for part in parts),
            max(part.col_stop for part in parts),
        )

    def inside(self, patches: PatchRange) -> NDArray[np.bool_]:
        """Tell which patches lie in the outline of an image, of shape ``patches.shape``."""
        found = np.zeros(patches.shape, bool)
        for image in self.images:
            part = image.dataset.footprint.intersect(patches)
            if not part.empty:
                found[part.within(patches)] = True
        return found

    def at_hand(self) -> bool:
        """Tell whether all labels are there without computing any."""
        return all(image.at_hand(self.patches.intersect(image.dataset.footprint)) for image in self.images)

    async def labels(
        self,
        service: Service,
        patches: PatchRange,
        pool: Executor,
        *,
        rank: Rank | None = None,
        timeout_s: float,
        over: Callable[[], bool] = lambda: False,
        spend: Callable[[PatchRange], None] = lambda patches: None,
    ) -> tuple[LabelBlock, NDArray[np.int32], tuple[str, ...]]:
        """Return the labels of some of the patches.

        Args:
            service: told which images turn out to be broken.
            patches: which ones; within ``patches`` of the part.
            pool: threads that may read kept labels.
            rank: how urgent it is; None: as urgent as the newest request.
            timeout_s: longest time to wait for all of them.
            over: asked at each chunk that is computed whether the server ends.
            spend: told what is read of each image; what it raises ends the work.

        Returns:
            The labels; the number among ``images`` of the one that each is from, -1 for none; and the addresses of
            images that could not be read.

        Raises:
            BusyError: if too much is asked for at once, the time is over or the server ends.
        """
        broken: list[str] = []
        deadline_s = time.monotonic() + timeout_s  # one for all: some wait for others

        async def read(number: int, part: PatchRange) -> LabelBlock | None:
            image = self.images[number]
            spend(part)
            left_s = max(0.0, deadline_s - time.monotonic())
            try:
                return await image.every_patch(part, pool, rank=rank, timeout_s=left_s, over=over)
            except BROKEN as error:
                url = image.dataset.source.url
                service.mosaics.note(self.mosaic, url, str(error))
                broken.append(url)
                return None

        footprints = [image.dataset.footprint for image in self.images]
        by_similarity = self.overlap == "similarity"
        block, origin = await merge_labels(patches, footprints, read, by_similarity=by_similarity)
        return block, origin, (*self.missing, *broken)


async def open_part(
    service: Service,
    mosaic: Mosaic,
    code: str,
    grid: Grid,
    patches: PatchRange,
    read: LayerParams,
    codebook: Codebook,
    limit: int,
) -> MosaicPart:
    """Open the images of a mosaic that lie under a rectangle of patches.

    Args:
        service: opens them.
        mosaic: which ones.
        code: of the CRS of the grid.
        grid: on which they are labelled.
        patches: the rectangle.
        read: how they are read.
        codebook: what they are opened for.
        limit: the most images.

    Raises:
        TooManyImagesError: if there are too many.
    """
    numbers = mosaic.under(patches, grid, read.overlap)
    if len(numbers) > limit:
        raise TooManyImagesError(
            f"{len(numbers)} images of the mosaic lie there; one request opens at most "
            f"{service.settings.mosaic_opened}: ask for less",
            len(numbers),
        )
    urls = [mosaic.members[number].url for number in numbers]
    opened = await asyncio.gather(*(_open(service, mosaic, url, code, grid, read, codebook) for url in urls))
    images = tuple(
        labels for labels in opened if labels is not None and not labels.dataset.footprint.intersect(patches).empty
    )
    missing = tuple(url for url, labels in zip(urls, opened, strict=True) if labels is None)
    return MosaicPart(mosaic, code, grid, patches, read.overlap, images, missing)


async def _open(
    service: Service, mosaic: Mosaic, url: str, code: str, grid: Grid, read: LayerParams, codebook: Codebook
) -> DatasetLabels | None:
    """Open an image on a grid; None if it cannot be used."""
    try:
        dataset = await find_dataset(service, url, read.options, codebook)
        if not _same(dataset.grid.crs, grid.crs):
            options = ReadOptions(read.options.bidx, read.options.rescale, code)
            dataset = await find_dataset(service, url, options, codebook)
    except BROKEN as error:
        service.mosaics.note(mosaic, url, str(error))
        return None
    service.mosaics.note(mosaic, url, None)
    return await find_labels(service, dataset, codebook)


def _same(one: CRS, other: CRS) -> bool:
    """Tell whether two coordinate systems are the same, whatever they are called."""
    return one is other or _same_wkt(one.srs, other.srs)


@lru_cache(maxsize=4096)
def _same_wkt(one: str, other: str) -> bool:
    first, second = CRS.from_user_input(one), CRS.from_user_input(other)
    return first == second or (authority_code(first) is not None and authority_code(first) == authority_code(second))


async def problems_of(service: Service, mosaic: Mosaic, read: LayerParams, codebook: Codebook) -> list[Problem]:
    """Return the images of a mosaic that cannot be used, and why; those of a small one are all opened to see.

    Of a larger one they are those that were met so far.
    """
    if len(mosaic.members) <= service.settings.mosaic_opened:
        await asyncio.gather(*(_try(service, mosaic, each.url, read, codebook) for each in mosaic.members))
    return service.mosaics.problems(mosaic)


async def _try(service: Service, mosaic: Mosaic, url: str, read: LayerParams, codebook: Codebook) -> None:
    try:
        await find_dataset(service, url, read.options, codebook)
    except BROKEN as error:
        service.mosaics.note(mosaic, url, str(error))
    else:
        service.mosaics.note(mosaic, url, None)
