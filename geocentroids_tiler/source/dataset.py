"""A dataset: an image's identity, its place on the ground grid, and what is needed to read windows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyproj import CRS
from pyproj.exceptions import CRSError
from rasterio.enums import ColorInterp, Interleaving, MaskFlags
from rasterio.enums import Resampling as RasterioResampling

from geocentroids_tiler.codebook import Codebook, PreprocessSection
from geocentroids_tiler.errors import SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.grid import (
    AffineCoefficients,
    Bounds,
    Grid,
    PatchRange,
    geographic_bounds,
    grid_in,
    ground_grid,
    ground_gsd,
    horizontal,
    image_centre,
    outline,
    parse_crs,
)
from geocentroids_tiler.source.collar import MAX_CELLS, Collar, find_collars
from geocentroids_tiler.source.opener import open_checked
from geocentroids_tiler.source.policy import Source

MAX_UPSAMPLING = 4.0
"""Imagery this many times coarser than the codebook's gsd is the coarsest that is accepted."""
SAME_GSD = 1.05
"""Ratios of gsd up to here count as the same."""
MAX_FINENESS = 1000
"""Imagery this many times finer than the codebook's gsd is the finest that is accepted."""
MAX_ELONGATION = 64
"""Longest side of a pixel, in shortest ones; near the poles a degree of longitude is short."""
MAX_PX_WITHOUT_OVERVIEWS = 8192 * 8192
"""Larger images must have an overview of at most this size: a look at the whole image reads all of it."""
MAX_LOOK_BYTES = 2**30
"""Bytes of the smallest overview once decoded, all bands that are stored together."""
_FOREIGN_TAGS = frozenset({"OVERVIEWS", "GEOLOCATION", "SUBDATASETS", "RPC"})
"""Tags that make GDAL open other files, or hosts, by name."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How an image is read: how bands become 8-bit RGB, and on which grid.

    Attributes:
        bidx: band numbers (from 1) of red, green and blue; None: from the colour interpretation.
        rescale: values that become 0 and 255; None: only 8-bit images are accepted.
        grid: CRS of the ground grid, ``EPSG:code``, where an image is one of many; None: the image's own.
    """

    bidx: tuple[int, int, int] | None = None
    rescale: tuple[float, float] | None = None
    grid: str | None = None


@dataclass(frozen=True)
class Dataset:
    """An image as one codebook sees it. Holds no open file; every task opens its own.

    Attributes:
        source: where it is.
        identity: changes when the content does.
        options: how bands become RGB.
        crs: the image's CRS.
        transform: its geotransform.
        width_px: columns.
        height_px: rows.
        indexes: bands read as red, green and blue.
        gsd_m: metres on the ground per pixel.
        overview: index of the overview that windows are read from, None for the image itself.
        warped: True if pixels are warped to the grid's CRS, False if that is the image's own, north up.
        collars: flat borders to leave out; only for images without alpha, mask or nodata.
        grid: the ground grid.
        footprint: patches that share area with the image's outline.
        geographic_bounds: west, south, east, north in degrees.
        preprocess: the codebook's way from pixels to windows.
    """

    source: Source
    identity: str
    options: ReadOptions
    crs: CRS
    transform: AffineCoefficients
    width_px: int
    height_px: int
    indexes: tuple[int, int, int]
    gsd_m: float
    overview: int | None
    warped: bool
    collars: tuple[Collar, ...]
    grid: Grid
    footprint: PatchRange
    geographic_bounds: Bounds
    preprocess: PreprocessSection

    @property
    def key(self) -> tuple[str, str, ReadOptions]:
        """What pixels depend on, apart from the codebook."""
        return self.source.url, self.identity, self.options

    @property
    def chunk_count(self) -> int:
        """Chunks that share area with the image's outline."""
        rows, cols = self.footprint.chunk_range(self.preprocess.stride_patches).shape
        return rows * cols

    @property
    def upsampling(self) -> float:
        """The image's gsd divided by the codebook's."""
        return self.gsd_m / self.preprocess.gsd_m

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know before trusting the labels."""
        if self.upsampling <= SAME_GSD:
            return ()
        return (
            f"the image has {self.gsd_m:.3g} m per pixel and the codebook expects {self.preprocess.gsd_m:.3g} m: "
            f"it is upsampled {self.upsampling:.1f} x and labels are less reliable",
        )


def source_identity(source: Source) -> str:
    """Return a text that changes when the content of a source does.

    ETag, Last-Modified and length of a remote source; modification time and size of a local one.

    Raises:
        SourceUnavailableError: if the source cannot be reached or does not answer with success.
    """
    if source.remote is not None:
        return source.remote.identity(source.url)
    try:
        stat = Path(source.path or "").stat()
    except (OSError, UnicodeError) as error:
        raise SourceUnavailableError(f"cannot open {source.url!r}") from error
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def open_dataset(source: Source, identity: str, options: ReadOptions, codebook: Codebook) -> Dataset:
    """Read an image's header (and a small overview where validity needs it) and place it on the ground.

    Args:
        source: where it is, as allowed by the policy.
        identity: of its content, from ``source_identity``.
        options: how bands become RGB.
        codebook: sets gsd, resampling and the size of patches.

    Raises:
        SourceUnavailableError: if it is missing, forbidden or not a GeoTIFF.
        UnsupportedImageError: if it is not an image that the codebook can classify.
    """
    preprocess, patch_px = codebook.manifest.preprocess, codebook.manifest.encoder.patch_px
    with open_raster(source, identity) as raster:
        check_structure(raster)
        return with_collars(place(raster, source, identity, options, preprocess, patch_px), raster)


def place(
    raster: Any,
    source: Source,
    identity: str,
    options: ReadOptions,
    preprocess: PreprocessSection,
    patch_px: int,
) -> Dataset:
    """Place an open image on the ground by its header alone; its collars are not looked for yet.

    Args:
        raster: the image, opened with rasterio by any driver.
        source: where windows will be read from.
        identity: of its content.
        options: how bands become RGB.
        preprocess: sets gsd, resampling and windows.
        patch_px: pixels a side of a patch.

    Raises:
        UnsupportedImageError: if it is not an image that a codebook of this gsd can classify.
    """
    crs = _crs_of(raster)
    transform: AffineCoefficients = tuple(raster.transform)[:6]
    size = raster.width, raster.height
    patch_m = preprocess.gsd_m * patch_px
    if options.grid is None:
        grid = ground_grid(crs, transform, *size, patch_m)
    else:
        grid = grid_in(parse_crs(options.grid), *image_centre(crs, transform, *size), patch_m)
    gsd_m = ground_gsd(crs, transform, *size, grid)
    if not gsd_m <= MAX_UPSAMPLING * preprocess.gsd_m:
        raise UnsupportedImageError(
            f"the image has {gsd_m:.3g} m per pixel; the codebook expects {preprocess.gsd_m:.3g} m "
            f"and accepts up to {MAX_UPSAMPLING * preprocess.gsd_m:.3g} m"
        )
    indexes = _rgb_indexes(raster, options)
    _check_dtype(raster, indexes, options)
    factors = raster.overviews(1)
    fine_enough = [(factor, i) for i, factor in enumerate(factors) if gsd_m * factor <= preprocess.gsd_m * 1.01]
    a, b, _, d, e, _ = transform
    north_up = b == 0 and d == 0 and a > 0 and e < 0
    edge = outline(crs, transform, *size, grid.crs)
    (left, bottom), (right, top) = edge.min(axis=0), edge.max(axis=0)
    _check_pixels(crs, transform, gsd_m, preprocess.gsd_m)
    return Dataset(
        source=source,
        identity=identity,
        options=options,
        crs=crs,
        transform=transform,
        width_px=size[0],
        height_px=size[1],
        indexes=indexes,
        gsd_m=gsd_m,
        overview=max(fine_enough)[1] if fine_enough else None,
        warped=not (north_up and grid.crs == crs),
        collars=(),
        grid=grid,
        footprint=grid.patches_touching((left, bottom, right, top)),
        geographic_bounds=geographic_bounds(crs, transform, *size),
        preprocess=preprocess,
    )


def with_collars(dataset: Dataset, raster: Any) -> Dataset:
    """Return a dataset that knows the collars of its image, which is looked at as a whole unless it states validity.

    Args:
        dataset: from ``place``.
        raster: the image, open.
    """
    if _states_validity(raster):
        return dataset
    return replace(dataset, collars=_collars_of(raster, dataset.indexes, dataset.options))


@contextmanager
def open_raster(source: Source, identity: str, overview: int | None = None) -> Iterator[Any]:
    """Open a source with rasterio for the length of a ``with`` block; one per task, never shared by threads.

    What was read may be trusted once the block has ended without an error; before that see ``open_checked``.

    Args:
        source: where it is.
        identity: of the content.
        overview: index of an overview to open in place of the image.

    Raises:
        SourceUnavailableError: if it cannot be opened or read; missing, forbidden and unreadable read the same.
        SourceChangedError: if it is no longer what ``identity`` says.
        UnsupportedImageError: if it is not a file that is opened here.
    """
    with open_checked(source, identity, overview) as (raster, _):
        yield raster


def to_uint8(values: NDArray[Any], rescale: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Return values as bytes: as they are, or stretched linearly and clipped by ``rescale``; not-a-number becomes 0."""
    if rescale is None:
        return np.asarray(values, np.uint8)
    low, high = rescale
    scaled = (np.nan_to_num(values.astype(np.float32), nan=low) - low) * (255 / (high - low))
    result: NDArray[np.uint8] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return result


def check_structure(raster: Any) -> None:
    """Refuse a file that leads elsewhere, or of which one look takes too much time or memory.

    Raises:
        UnsupportedImageError: if it is one.
    """
    if foreign := _FOREIGN_TAGS.intersection(raster.tag_namespaces()):
        raise UnsupportedImageError(f"the image has {' and '.join(sorted(foreign))} tags, which may name other files")
    if imaginary := next((dtype for dtype in raster.dtypes if "complex" in dtype), None):
        raise UnsupportedImageError(f"the image holds {imaginary} values; accepted: integers and real numbers")
    factor = max(raster.overviews(1), default=1)
    if raster.width * raster.height > MAX_PX_WITHOUT_OVERVIEWS * factor**2:
        smallest = f"no overview smaller than 1:{factor}" if factor > 1 else "no overviews"
        raise UnsupportedImageError(
            f"the image has {raster.width} x {raster.height} px and {smallest}; overviews of at most "
            f"{MAX_PX_WITHOUT_OVERVIEWS} px are required (write it as a Cloud Optimized GeoTIFF)"
        )
    together = raster.count if raster.interleaving is Interleaving.pixel else 1
    look_bytes = raster.width * raster.height // factor**2 * together * np.dtype(raster.dtypes[0]).itemsize
    if look_bytes > MAX_LOOK_BYTES:
        raise UnsupportedImageError(
            f"the smallest overview of the image takes {look_bytes} bytes for all {raster.count} bands; accepted: up "
            f"to {MAX_LOOK_BYTES} (write it as a Cloud Optimized GeoTIFF)"
        )


def _crs_of(raster: Any) -> CRS:
    if raster.crs is None:
        raise UnsupportedImageError("the image has no coordinate reference system; a georeferenced GeoTIFF is needed")
    if raster.transform.is_identity:
        raise UnsupportedImageError("the image has no geotransform; a georeferenced GeoTIFF is needed")
    try:
        crs = CRS.from_wkt(raster.crs.to_wkt())
    except CRSError as error:
        raise UnsupportedImageError(f"the image's coordinate reference system is not usable: {error}") from error
    return horizontal(crs)


def _check_pixels(crs: CRS, transform: AffineCoefficients, gsd_m: float, codebook_gsd_m: float) -> None:
    """Refuse an image whose pixels are needles or dust: a file may state any size, and windows count in them."""
    a, b, _, d, e, _ = transform
    sides = math.hypot(a, d), math.hypot(b, e)
    longest, shortest = max(sides), min(sides)
    if not (math.isfinite(longest) and shortest > 0 and longest <= MAX_ELONGATION * shortest):
        raise UnsupportedImageError(
            f"the image has pixels of {sides[0]:.3g} x {sides[1]:.3g} {crs.axis_info[0].unit_name}; accepted: up to "
            f"{MAX_ELONGATION} times as long as wide"
        )
    if not gsd_m * MAX_FINENESS >= codebook_gsd_m:
        raise UnsupportedImageError(
            f"the image has {gsd_m:.3g} m per pixel; the codebook expects {codebook_gsd_m:.3g} m and accepts down to "
            f"{codebook_gsd_m / MAX_FINENESS:.3g} m"
        )


def _rgb_indexes(raster: Any, options: ReadOptions) -> tuple[int, int, int]:
    if options.bidx is not None:
        if not all(1 <= index <= raster.count for index in options.bidx):
            raise UnsupportedImageError(f"bidx {options.bidx} is not in the image; it has bands 1 to {raster.count}")
        return options.bidx
    interpretation = raster.colorinterp
    rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(color in interpretation for color in rgb):
        red, green, blue = (interpretation.index(color) + 1 for color in rgb)
        return red, green, blue
    colors = [i + 1 for i, color in enumerate(interpretation) if color != ColorInterp.alpha]
    if len(colors) == 3:
        return colors[0], colors[1], colors[2]
    found = ", ".join(color.name for color in interpretation)
    raise UnsupportedImageError(
        f"the image's bands ({found}) are not red, green and blue; choose three with bidx, for example "
        "bidx=1&bidx=2&bidx=3"
    )


def _check_dtype(raster: Any, indexes: tuple[int, int, int], options: ReadOptions) -> None:
    dtypes = {raster.dtypes[index - 1] for index in indexes}
    if dtypes == {"uint8"} or options.rescale is not None:
        return
    sample = raster.read(indexes, out_shape=(3, *_small_shape(raster, 512)), masked=True)
    finite = np.ma.masked_invalid(sample)
    found = f"{finite.min()} to {finite.max()}" if finite.count() else "none"
    raise UnsupportedImageError(
        f"the image holds {', '.join(sorted(dtypes))} values ({found}), not 8-bit colours; say which values are "
        "black and white with rescale, for example rescale=0,3000"
    )


def _states_validity(raster: Any) -> bool:
    """True if the file says which pixels are data: by alpha, mask or nodata."""
    # GDAL sees a mask in alpha bands of unsigned numbers only.
    has_alpha = ColorInterp.alpha in raster.colorinterp
    return has_alpha or any(MaskFlags.all_valid not in flags for flags in raster.mask_flag_enums)


def _collars_of(raster: Any, indexes: tuple[int, int, int], options: ReadOptions) -> tuple[Collar, ...]:
    """Look for collars in the whole image, averaged to at most ``MAX_CELLS`` a side."""
    shape = _small_shape(raster, MAX_CELLS)
    values = raster.read(indexes, out_shape=(3, *shape), resampling=RasterioResampling.average)
    overview = to_uint8(values.transpose(1, 2, 0), options.rescale)
    return find_collars(overview, cell_px=max(raster.height / shape[0], raster.width / shape[1]))


def _small_shape(raster: Any, longest: int) -> tuple[int, int]:
    factor = max(1.0, max(raster.height, raster.width) / longest)
    return max(1, round(raster.height / factor)), max(1, round(raster.width / factor))
