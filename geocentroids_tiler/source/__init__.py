"""From a URL to the pixels of windows on the ground grid."""

from geocentroids_tiler.source.cells import CellCache
from geocentroids_tiler.source.dataset import (
    MAX_PX_WITHOUT_OVERVIEWS,
    Dataset,
    ReadOptions,
    check_structure,
    open_dataset,
    open_raster,
    place,
    source_identity,
    with_collars,
)
from geocentroids_tiler.source.deadline import Deadline
from geocentroids_tiler.source.pixels import (
    PatchPixels,
    WindowPixels,
    iterate_windows,
    labelled_patches,
    read_patches,
    read_windows,
)
from geocentroids_tiler.source.policy import RemotePolicy, Source, gdal_options, resolve_source
from geocentroids_tiler.source.remote import Remote
from geocentroids_tiler.source.setup import open_remote
from geocentroids_tiler.source.waiting import computing_in

__all__ = [
    "MAX_PX_WITHOUT_OVERVIEWS",
    "CellCache",
    "Dataset",
    "Deadline",
    "PatchPixels",
    "ReadOptions",
    "Remote",
    "RemotePolicy",
    "Source",
    "WindowPixels",
    "check_structure",
    "computing_in",
    "gdal_options",
    "iterate_windows",
    "labelled_patches",
    "open_dataset",
    "open_raster",
    "open_remote",
    "place",
    "read_patches",
    "read_windows",
    "resolve_source",
    "source_identity",
    "with_collars",
]
