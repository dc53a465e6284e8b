"""Label rasters: GeoTIFFs on the ground grid, one pixel per patch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
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
from geocentroids_tiler.errors import InputError, SourceChangedError
from geocentroids_tiler.grid import Grid, PatchRange
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.source import Dataset, source_identity

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
        with memory.open(**raster_profile(patches, grid)) as raster:
            raster.write(ids, 1)
            describe(raster, codebook, classes)
        return bytes(memory.read())


def classify(
    engine: LabelEngine,
    dataset: Dataset,
    classes: Classes,
    destination: Path,
    progress: Callable[[int], object] = lambda chunks: None,
    also: Callable[[LabelBlock], object] = lambda strip: None,
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
        also: called with each row of chunks.

    Raises:
        InputError: if the destination's folder does not exist.
    """
    if not destination.parent.is_dir():
        raise InputError(f"the folder {destination.parent} does not exist")
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as work:
        plain, cog = Path(work) / "labels.tif", Path(work) / "cog.tif"
        with rasterio.open(plain, "w", **raster_profile(dataset.footprint, dataset.grid)) as raster:
            for strip in strips(engine, dataset, dataset.footprint, progress):
                also(strip)
                window = window_of(strip.patches, dataset.footprint)
                raster.write(classes.of_labels(strip.labels), 1, window=window)
            describe(raster, engine.codebook, classes)
        write_cog(plain, cog, "MODE")
        cog.replace(destination)


def strips(
    engine: LabelEngine,
    dataset: Dataset,
    patches: PatchRange,
    progress: Callable[[int], object] = lambda chunks: None,
    *,
    background: bool = False,
) -> Generator[LabelBlock]:
    """Yield the labels of patches of a dataset, a row of chunks at a time, from the top.

    Args:
        engine: computes the labels.
        dataset: what to label.
        patches: a part of the dataset's footprint.
        progress: called with 1 for each chunk, in its thread; what it raises ends the work.
        background: give way to others that want labels.
    """
    stride = engine.layout.stride_patches
    with closing(engine.stream(dataset, patches, background=background)) as stream:
        for row, chunks in groupby(stream, key=lambda item: item[0].row):
            whole = PatchRange(row * stride, (row + 1) * stride, patches.col_start, patches.col_stop)
            strip = LabelBlock.empty(whole.intersect(patches))
            for index, chunk in chunks:
                strip.paste(index, chunk)
                progress(1)
            yield strip


def check_unchanged(dataset: Dataset) -> None:
    """Ask the source of a dataset whether it is still what was read.

    Raises:
        SourceChangedError: if it is not.
        SourceUnavailableError: if it does not answer.
    """
    if source_identity(dataset.source) != dataset.identity:
        raise SourceChangedError(f"{dataset.source.url!r} changed while it was labelled; label it again")


def write_cog(plain: Path, destination: Path, resampling: str, overviews: int | None = None) -> None:
    """Write a raster as a Cloud Optimized GeoTIFF.

    Args:
        plain: the raster.
        destination: file to write.
        resampling: of the overviews, as GDAL calls it.
        overviews: how many, each half the size of the one before; None: until one is a block.
    """
    copy_raster(
        plain,
        destination,
        driver="COG",
        compress="DEFLATE",
        predictor="YES",
        overview_resampling=resampling,
        blocksize=_BLOCK,
        overviews="IGNORE_EXISTING",
        **({} if overviews is None else {"overview_count": overviews}),
    )


def raster_profile(
    patches: PatchRange, grid: Grid, dtype: str = "uint16", nodata: float = NODATA_LABEL
) -> dict[str, Any]:
    """Return how rasterio makes a file with one pixel per patch.

    Args:
        patches: where they lie.
        grid: the ground grid.
        dtype: of the pixels.
        nodata: value that stands for no data.
    """
    rows, cols = patches.shape
    tiled = rows >= _BLOCK and cols >= _BLOCK
    return {
        "driver": "GTiff",
        "dtype": dtype,
        "count": 1,
        "height": rows,
        "width": cols,
        "crs": grid.crs.to_wkt(),
        "transform": Affine(*grid.transform_of(patches)),
        "nodata": nodata,
        "compress": "deflate",
        "BIGTIFF": "IF_SAFER",
        **({"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK} if tiled else {}),
    }


def window_of(patches: PatchRange, whole: PatchRange) -> Window:
    """Return where patches lie in a raster of others."""
    return Window(patches.col_start - whole.col_start, patches.row_start - whole.row_start, *patches.shape[::-1])


def describe(raster: Any, codebook: Codebook, classes: Classes, *, colors: bool = True) -> None:
    """Give a raster of labels its tags and, where ``colors`` is set, its colour table."""
    if colors:
        raster.write_colormap(1, {i: (*map(int, color), 255) for i, color in enumerate(classes.colors)})
    raster.set_band_description(1, "class")
    raster.update_tags(
        GEOCENTROIDS_CODEBOOK=codebook.name,
        GEOCENTROIDS_DIGEST=codebook.digest,
        GEOCENTROIDS_CLASSES=str(len(classes)),
        TIFFTAG_COPYRIGHT=codebook.manifest.attribution,
    )
