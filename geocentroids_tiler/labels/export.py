"""Label rasters: GeoTIFFs on the ground grid, one pixel per patch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.io import MemoryFile
from rasterio.shutil import copy as copy_raster
from rasterio.transform import Affine
from rasterio.windows import Window

from geocentroids_tiler.codebook import NODATA_LABEL, Classes, Codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import Grid, PatchRange
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.source import Dataset

_BLOCK = 256


def label_geotiff(
    ids: NDArray[np.uint16], patches: PatchRange, grid: Grid, codebook: Codebook, classes: Classes
) -> bytes:
    """Encode class ids as a GeoTIFF with a colour table.

    Args:
        ids: of shape ``patches.shape``, uint16; 65535 where there is no data.
        patches: where they lie.
        grid: the ground grid.
        codebook: named in the file's tags.
        classes: sets the colour table.
    """
    with MemoryFile() as memory:
        with memory.open(**_profile(patches, grid)) as raster:
            raster.write(ids, 1)
            _describe(raster, codebook, classes)
        return bytes(memory.read())


def classify(
    engine: LabelEngine,
    dataset: Dataset,
    classes: Classes,
    destination: Path,
    progress: Callable[[int], object] = lambda chunks: None,
) -> None:
    """Label a whole dataset and write the labels as a Cloud Optimized GeoTIFF with overviews by mode.

    Labels are written as they are computed, a row of chunks at a time, so memory grows with the image's width only. The
    destination appears when it is complete.

    Args:
        engine: computes the labels.
        dataset: what to label.
        classes: classes of the labels.
        destination: file to write.
        progress: called with the number of chunks finished since the last call.

    Raises:
        InputError: if the destination's folder does not exist.
    """
    if not destination.parent.is_dir():
        raise InputError(f"the folder {destination.parent} does not exist")
    footprint, stride = dataset.footprint, engine.layout.stride_patches
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as work:
        plain, cog = Path(work) / "labels.tif", Path(work) / "cog.tif"
        with rasterio.open(plain, "w", **_profile(footprint, dataset.grid)) as raster:
            for row, chunks in groupby(engine.stream(dataset, footprint), key=lambda item: item[0].row):
                strip = PatchRange(row * stride, (row + 1) * stride, footprint.col_start, footprint.col_stop)
                block = LabelBlock.empty(strip.intersect(footprint))
                for index, chunk in chunks:
                    block.paste(index, chunk)
                    progress(1)
                window = Window(0, block.patches.row_start - footprint.row_start, *block.patches.shape[::-1])
                raster.write(classes.of_labels(block.labels), 1, window=window)
            _describe(raster, engine.codebook, classes)
        copy_raster(
            plain,
            cog,
            driver="COG",
            compress="DEFLATE",
            predictor="YES",
            overview_resampling="MODE",
            blocksize=_BLOCK,
            overviews="IGNORE_EXISTING",
        )
        cog.replace(destination)


def _profile(patches: PatchRange, grid: Grid) -> dict[str, Any]:
    rows, cols = patches.shape
    tiled = rows >= _BLOCK and cols >= _BLOCK
    return {
        "driver": "GTiff",
        "dtype": "uint16",
        "count": 1,
        "height": rows,
        "width": cols,
        "crs": grid.crs.to_wkt(),
        "transform": Affine(*grid.transform_of(patches)),
        "nodata": NODATA_LABEL,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
        **({"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK} if tiled else {}),
    }


def _describe(raster: Any, codebook: Codebook, classes: Classes) -> None:
    raster.write_colormap(1, {i: (*map(int, color), 255) for i, color in enumerate(classes.colors)})
    raster.set_band_description(1, "class")
    raster.update_tags(
        GEOCENTROIDS_CODEBOOK=codebook.name,
        GEOCENTROIDS_DIGEST=codebook.digest,
        GEOCENTROIDS_CLASSES=str(len(classes)),
        TIFFTAG_COPYRIGHT=codebook.manifest.attribution,
    )
