"""Generated GeoTIFFs, and codebooks and datasets to read them with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from codebooks import make_codebook
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine

from geocentroids_tiler.codebook import Codebook, PreprocessSection
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    Remote,
    open_dataset,
    open_remote,
    resolve_source,
    source_identity,
)

UTM = "EPSG:32721"
LEFT, TOP = 560_000.0, 6_140_001.0
"""A corner that lies on the grid of 3.5 m patches, in Uruguay."""


def texture(rows: int, cols: int, seed: int = 0, low: int = 30, high: int = 220, bands: int = 3) -> NDArray[np.uint8]:
    """Return (bands, rows, cols): smooth noise at three scales, never darker than ``low`` or brighter than ``high``."""
    rng = np.random.default_rng(seed)
    total = np.zeros((rows, cols, bands))
    for cells, weight in ((4, 1.0), (16, 0.7), (64, 0.5)):
        for band in range(bands):
            noise = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
            total[..., band] += weight * np.asarray(noise.resize((cols, rows), Image.Resampling.BICUBIC))
    total = (total - total.min()) / np.ptp(total)
    return np.rint(low + total * (high - low)).astype(np.uint8).transpose(2, 0, 1)


def write_tif(
    path: Path,
    bands: NDArray[Any],
    *,
    crs: Any = UTM,
    transform: Affine | None = None,
    gsd_m: float = 0.25,
    colors: Sequence[ColorInterp] | None = None,
    mask: NDArray[np.bool_] | None = None,
    overviews: Sequence[int] = (),
    colormap: dict[int, tuple[int, ...]] | None = None,
    tags: dict[str, dict[str, str]] | None = None,
    **profile: Any,
) -> Path:
    """Write bands of shape (N, rows, cols) as a tiled GeoTIFF with everything inside the one file."""
    count, rows, cols = bands.shape
    options = {"driver": "GTiff", "tiled": True, "blockxsize": 128, "blockysize": 128} | profile
    if transform is None:
        transform = Affine(gsd_m, 0, LEFT, 0, -gsd_m, TOP)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", width=cols, height=rows, count=count, dtype=bands.dtype, crs=crs, transform=transform, **options
        ) as raster,
    ):
        if colors is not None:
            raster.colorinterp = list(colors)
        raster.write(bands)
        if colormap is not None:
            raster.write_colormap(1, colormap)
        if mask is not None:
            raster.write_mask(mask)
        for namespace, values in (tags or {}).items():
            raster.update_tags(ns=namespace, **values)
    if overviews:
        with rasterio.open(path, "r+") as raster:
            raster.build_overviews(list(overviews), Resampling.average)
    return path


def codebook_for(
    gsd_m: float = 0.25, resampling: str = "bilinear", window: int = 16, margin: int = 3, stride: int = 10
) -> Codebook:
    """Return a small codebook that reads windows at a gsd."""
    preprocess = PreprocessSection.model_validate(
        {
            "gsd_m": gsd_m,
            "resampling": resampling,
            "window_patches": window,
            "margin_patches": margin,
            "stride_patches": stride,
        }
    )
    return make_codebook(preprocess=preprocess)


LOOPBACK: dict[str, Any] = {"source_http": True, "source_networks": ["127.0.0.0/8"]}
"""Settings of a server that reads from this machine."""


def loopback_remote(**settings: Any) -> Remote:
    """Return what opens files of servers on this machine."""
    return open_remote(Settings(**{**LOOPBACK, "source_timeout_s": 5, "failure_ttl_s": 0, **settings}))


def open_tif(path: Path, codebook: Codebook | None = None, **options: Any) -> Dataset:
    """Open a local file as the server does."""
    source = resolve_source(path.name, path.parent)
    identity = source_identity(source)
    return open_dataset(source, identity, ReadOptions(**options), codebook or codebook_for())
