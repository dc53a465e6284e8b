"""From a URL to the pixels of windows on the ground grid."""

from geocentroids_tiler.source.dataset import Dataset, ReadOptions, open_dataset
from geocentroids_tiler.source.pixels import WindowPixels, read_windows
from geocentroids_tiler.source.policy import Source, resolve_source

__all__ = ["Dataset", "ReadOptions", "Source", "WindowPixels", "open_dataset", "read_windows", "resolve_source"]
