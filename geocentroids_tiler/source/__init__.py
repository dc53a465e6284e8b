"""From a URL to the pixels of windows on the ground grid."""

from geocentroids_tiler.source.dataset import Dataset, ReadOptions, open_dataset, open_raster, source_identity
from geocentroids_tiler.source.pixels import WindowPixels, read_windows
from geocentroids_tiler.source.policy import Source, gdal_options, resolve_source

__all__ = [
    "Dataset",
    "ReadOptions",
    "Source",
    "WindowPixels",
    "gdal_options",
    "open_dataset",
    "open_raster",
    "read_windows",
    "resolve_source",
    "source_identity",
]
