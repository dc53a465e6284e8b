"""Masks of land cover, read onto the patches of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import ColorInterp
from rasterio.enums import Resampling as RasterioResampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from geocentroids_fit.evaluate.landcover import UNKNOWN, majority_cover
from geocentroids_tiler.errors import InputError, short
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.source import Dataset, Source, open_raster

STRIP_PATCHES = 32
"""Rows of patches of a mask that are read at once."""


def read_cover(
    mask: Path, dataset: Dataset, area: PatchRange, patch_px: int, ignore: Sequence[int]
) -> NDArray[np.int64]:
    """Read land cover onto patches: nearest neighbour at ``patch_px`` samples a side, then the majority.

    Args:
        mask: GeoTIFF of class ids. One without a CRS has the image's place if it has the image's size.
        dataset: the image.
        area: the patches.
        patch_px: samples a side of a patch.
        ignore: values that say nothing, besides the mask's nodata.

    Returns:
        Of shape ``area.shape``, int64; ``UNKNOWN`` where fewer than half of the samples say something.

    Raises:
        SourceUnavailableError: if the mask cannot be opened.
        InputError: if it is not a mask of this image; the text says why.
    """
    cover = np.full(area.shape, UNKNOWN, np.int64)
    met = False
    with open_raster(Source(mask.name, mask), "") as raster:
        place = _place_of_mask(raster, mask.name, dataset)
        rows, cols = area.shape
        shape = rows * patch_px, cols * patch_px
        with on_grid(raster, dataset, area, shape, RasterioResampling.nearest, **place) as vrt:
            for start in range(0, rows, STRIP_PATCHES):
                height = min(STRIP_PATCHES, rows - start)
                window = Window(0, start * patch_px, cols * patch_px, height * patch_px)
                values = vrt.read(1, window=window).astype(np.int64)
                inside = vrt.dataset_mask(window=window) > 0
                known = inside & ~np.isin(values, list(ignore))
                if (values[known] < 0).any():
                    raise InputError(
                        f"mask {mask.name!r} holds {values[known].min()}; accepted: classes from 0 and ignored values"
                    )
                samples = (height, patch_px, cols, patch_px)
                cover[start : start + height] = majority_cover(values.reshape(samples), known.reshape(samples))
                met |= bool(inside.any())
    if not met:
        raise InputError(f"mask {mask.name!r} does not overlap what is evaluated of the image")
    if (cover == UNKNOWN).all():
        raise InputError(
            f"mask {mask.name!r} labels no patch here: at least half of a patch must have a value that is neither "
            f"ignored ({', '.join(map(str, ignore)) or 'none'}) nor nodata"
        )
    return cover


def on_grid(
    raster: Any,
    dataset: Dataset,
    area: PatchRange,
    shape: tuple[int, int],
    resampling: RasterioResampling,
    **place: Any,
) -> WarpedVRT:
    """Return an open raster warped to an area of a dataset's ground grid, as ``shape`` rows and columns of pixels."""
    left, bottom, right, top = dataset.grid.bounds_of(area)
    rows, cols = shape
    has_alpha = ColorInterp.alpha in raster.colorinterp
    return WarpedVRT(
        raster,
        crs=dataset.grid.crs.to_wkt(),
        transform=Affine((right - left) / cols, 0, left, 0, (bottom - top) / rows, top),
        width=cols,
        height=rows,
        resampling=resampling,
        add_alpha=not has_alpha and raster.nodata is None,
        **place,
    )


def _place_of_mask(raster: Any, name: str, dataset: Dataset) -> dict[str, Any]:
    """Return where a mask lies if it does not say so itself."""
    dtype = raster.dtypes[0]
    has_alpha = ColorInterp.alpha in raster.colorinterp
    if raster.count != 1 + has_alpha or not np.issubdtype(dtype, np.integer):
        raise InputError(f"mask {short(name)} has {raster.count} bands of {dtype}; accepted: one band of whole numbers")
    if raster.crs is not None and not raster.transform.is_identity:
        return {}
    if raster.shape != (dataset.height_px, dataset.width_px):
        raise InputError(
            f"mask {short(name)} has no georeference and {raster.width} x {raster.height} px; without one it must "
            f"have the image's {dataset.width_px} x {dataset.height_px} px"
        )
    return {"src_crs": dataset.crs.to_wkt(), "src_transform": Affine(*dataset.transform)}
