"""What a layer is, and what is at a place of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from morecantile import TileMatrixSet

from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.grid import WGS84, Grid, PatchRange, project
from geocentroids_tiler.grounds import Opened
from geocentroids_tiler.handlers import zooms_of
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import open_part, problems_of
from geocentroids_tiler.mosaic import Mosaic
from geocentroids_tiler.responses import ImageInfo, MosaicInfo, image_info, mosaic_info
from geocentroids_tiler.tiles import Extent


async def describe(service: Service, found: Opened, tms: TileMatrixSet) -> ImageInfo | MosaicInfo:
    """Describe a layer and the cost of labelling it."""
    zooms = zooms_of(service, found.layer, found.codebook, found.seconds_per_chunk, tms)
    if not isinstance(found.layer, Mosaic):
        kept = None if found.image is None else found.image.kept
        return image_info(found.layer, found.engine, zooms, kept)
    extent = Extent.of(found.layer, found.codebook.manifest.preprocess)
    problems = await problems_of(service, found.layer, found.read, found.codebook)
    return mosaic_info(found.layer, found.engine, extent, zooms, found.read.overlap, problems)


@dataclass(frozen=True)
class LabelAt:
    """The label of the patch at a place.

    Attributes:
        label: 65535 for none.
        similarity: how well it fits.
        image: of a mosaic, the image that it is from.
        missing: how many images of a mosaic could not be read.
    """

    label: int = NODATA_LABEL
    similarity: float = 0.0
    image: str | None = None
    missing: int = 0


async def label_at(service: Service, found: Opened, lon: float, lat: float) -> LabelAt:
    """Return the label of the patch at a place.

    Raises:
        BusyError: if it cannot be computed now or in time.
    """
    timeout_s = service.settings.request_timeout_s
    if found.image is not None:
        dataset = found.image.dataset
        patch = _patch_at(dataset.grid, lon, lat).intersect(dataset.footprint)
        if patch.empty:
            return LabelAt()
        block = await found.image.block_async(patch, service.working, timeout_s=timeout_s)
        return LabelAt(int(block.labels[0, 0]), float(block.similarity[0, 0]))
    if not isinstance(found.layer, Mosaic):
        return LabelAt()
    code = found.layer.zone_at(lon, lat)
    zone = next((zone for zone in found.layer.zones if zone.code == code), None)
    if zone is None:
        return LabelAt()
    patch = _patch_at(zone.grid, lon, lat).intersect(zone.footprint)
    if patch.empty:
        return LabelAt()
    limit = service.settings.mosaic_opened
    part = await open_part(service, found.layer, code, zone.grid, patch, found.read, found.codebook, limit)
    merged, origin, missing = await part.labels(service, patch, service.working, timeout_s=timeout_s)
    number = int(origin[0, 0])
    image = None if number < 0 else part.images[number].dataset.source.url
    lacking = len(missing) + len(found.layer.problems)
    return LabelAt(int(merged.labels[0, 0]), float(merged.similarity[0, 0]), image, lacking)


def _patch_at(grid: Grid, lon: float, lat: float) -> PatchRange:
    """Return the patch that holds a place; an empty range where the grid's CRS has none."""
    x, y = project(WGS84, grid.crs, lon, lat)
    if not (np.isfinite(x) and np.isfinite(y)):
        return PatchRange(0, 0, 0, 0)
    row, col = (int(value) for value in grid.patch_of(x, y))
    return PatchRange(row, row + 1, col, col + 1)
