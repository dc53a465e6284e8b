"""Ground that a request is about: which patches of which grid, and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from geocentroids_tiler.area import Area, Region, patches_of_zone
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import WGS84, Grid, PatchRange, grid_in, parse_crs, project
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.reading import DatasetLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import (
    Layer,
    MosaicPart,
    find_codebook,
    find_engine,
    find_labels,
    find_layer,
    open_part,
    run,
)
from geocentroids_tiler.mosaic import Mosaic, Zone
from geocentroids_tiler.params import LayerParams
from geocentroids_tiler.source import Dataset


@dataclass(frozen=True)
class Opened:
    """What a request names.

    Attributes:
        codebook: its codebook.
        read: how images are read.
        layer: an image or a mosaic.
        engine: computes labels.
        image: where labels come from if it is an image.
    """

    codebook: Codebook
    read: LayerParams
    layer: Layer
    engine: LabelEngine
    image: DatasetLabels | None

    @property
    def seconds_per_chunk(self) -> float:
        """What labelling a chunk takes; 0 if it was done already."""
        return self.engine.seconds_per_chunk if self.image is None else self.image.seconds_per_chunk


async def open_layer(service: Service, url: str, read: LayerParams) -> Opened:
    """Return what a request names."""
    codebook = await find_codebook(service, read)
    layer = await find_layer(service, url, read, codebook)
    engine = await find_engine(service, codebook)
    image = await find_labels(service, layer, codebook) if isinstance(layer, Dataset) else None
    return Opened(codebook, read, layer, engine, image)


class Budget:
    """What one request may still need: chunks, and images of mosaics."""

    def __init__(self, service: Service) -> None:
        self._chunks = self._max_chunks = service.settings.max_chunks
        self._images = service.settings.mosaic_opened

    @property
    def images(self) -> int:
        """Images that it may still open."""
        return self._images

    def check(self, patches: PatchRange, stride_patches: int) -> None:
        """Raise InputError if patches are too many."""
        rows, cols = patches.chunk_range(stride_patches).shape
        if rows * cols > self._chunks:
            needed = self._max_chunks - self._chunks + rows * cols
            raise InputError(
                f"the area needs {needed} chunks; this server computes at most {self._max_chunks} in one "
                "request. Split it, or use geocentroids classify"
            )

    def spend(self, patches: PatchRange, stride_patches: int) -> None:
        """Take the chunks of patches off what is left; raises as ``check`` does."""
        self.check(patches, stride_patches)
        rows, cols = patches.chunk_range(stride_patches).shape
        self._chunks -= rows * cols

    def open(self, images: int) -> None:
        """Take images off what is left."""
        self._images -= images


@dataclass(frozen=True)
class Ground:
    """Patches of one grid that a request is about.

    Attributes:
        grid: the grid.
        area: which patches.
        source: where their labels come from.
        budget: of the request.
    """

    grid: Grid
    area: Area
    source: DatasetLabels | MosaicPart
    budget: Budget

    async def labels(self, service: Service, timeout_s: float) -> tuple[LabelBlock, Sequence[str]]:
        """Return the labels of ``area.patches``, and the images that could not be read.

        Raises:
            BusyError: if too much is asked for at once, the time is over or the server ends.
        """
        over, pool, patches = service.closing.is_set, service.exporting, self.area.patches
        if isinstance(self.source, DatasetLabels):
            return await self.source.every_patch(patches, pool, timeout_s=timeout_s, over=over), ()
        unplaced = [problem.url for problem in self.source.mosaic.problems]
        if self.area.empty:
            return LabelBlock.empty(patches), (*self.source.missing, *unplaced)

        stride = self.source.images[0].engine.layout.stride_patches if self.source.images else 1

        def spend(part: PatchRange) -> None:
            self.budget.spend(part, stride)

        block, _, missing = await self.source.labels(
            service, patches, pool, timeout_s=timeout_s, over=over, spend=spend
        )
        return block, (*missing, *unplaced)


async def ground_of_export(service: Service, found: Opened, region: Region, budget: Budget) -> Ground | None:
    """Return the ground of a region on one grid, for a raster; of a mosaic the grid of the region's centre.

    Raises:
        InputError: if it holds too many patches.
    """
    if found.image is not None:
        return await _of_image(service, found.image, region, budget)
    mosaic = _mosaic_of(found)
    lon, lat = region.centre
    bounds = region.geographic_bounds
    if bounds is None or not (np.isfinite(lon) and np.isfinite(lat)):
        return None
    try:
        zone = await run(service.exporting, mosaic.on_grid, mosaic.zone_at(lon, lat), bounds)
    except (InputError, UnsupportedImageError):  # the poles, and the other side of the world
        return None
    return None if zone is None else await _of_mosaic(service, found, mosaic, zone, region, budget, split=False)


async def grounds_of_statistics(service: Service, found: Opened, region: Region, budget: Budget) -> list[Ground]:
    """Return the ground of a region on each grid that it touches; a place belongs to one of them.

    Raises:
        InputError: if it holds too many patches.
    """
    if found.image is not None:
        return [await _of_image(service, found.image, region, budget)]
    mosaic = _mosaic_of(found)
    grounds: list[Ground] = []
    for zone in mosaic.zones:
        ground = await _of_mosaic(service, found, mosaic, zone, region, budget, split=len(mosaic.zones) > 1)
        if ground is not None:
            grounds.append(ground)
    return grounds


def _mosaic_of(found: Opened) -> Mosaic:
    if not isinstance(found.layer, Mosaic):
        raise TypeError(f"{type(found.layer).__name__} is no mosaic")
    return found.layer


async def _of_image(service: Service, labels: DatasetLabels, region: Region, budget: Budget) -> Ground:
    dataset = labels.dataset
    area = await run(service.exporting, region.on, dataset.grid, dataset.footprint)
    budget.spend(area.patches, labels.engine.layout.stride_patches)
    return Ground(dataset.grid, area, labels, budget)


async def _of_mosaic(
    service: Service, found: Opened, mosaic: Mosaic, zone: Zone, region: Region, budget: Budget, *, split: bool
) -> Ground | None:
    """Return the ground of a region on one grid, with ``split`` of the zone's own part of the world only."""
    stride = found.engine.layout.stride_patches
    near = await run(service.exporting, region.near, zone.grid, zone.footprint)
    if near.empty:
        return None
    budget.check(near, stride)  # before a mask of them is made
    part = await open_part(service, mosaic, zone.code, zone.grid, near, found.read, found.codebook, budget.images)
    budget.open(len(part.images) + len(part.missing))

    def area() -> Area:
        whole = region.on(zone.grid, part.covered)
        whole = whole.only(part.inside(whole.patches))
        if split:
            whole = whole.only(patches_of_zone(whole.patches, zone.grid, partial(mosaic.in_zone, zone)))
        return whole

    selected = await run(service.exporting, area)
    if selected.empty and not part.missing:
        return None
    budget.check(selected.patches, stride)
    return Ground(_scaled(zone, selected.patches), selected, part, budget)


def _scaled(zone: Zone, patches: PatchRange) -> Grid:
    """Return a zone's grid with the areal scale of the middle of some patches."""
    left, bottom, right, top = zone.grid.bounds_of(patches)
    lon, lat = project(zone.grid.crs, WGS84, (left + right) / 2, (bottom + top) / 2)
    try:
        return grid_in(parse_crs(zone.code), float(lon), float(lat), zone.grid.patch_m)
    except UnsupportedImageError:
        return zone.grid
