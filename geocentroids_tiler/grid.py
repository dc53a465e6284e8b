"""The ground grid: which patch, chunk and window a place belongs to. Pure functions on numbers and arrays.

Labels belong to the ground, so everything here follows from a coordinate system and the size of a patch alone. A patch
(row, col) of side p covers ``x`` in ``[col * p, (col + 1) * p)`` and ``-y`` in ``[row * p, (row + 1) * p)``: rows run
south, columns run east, both from the origin of the grid's coordinate system, so either may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pyproj import CRS, Proj, Transformer
from pyproj.exceptions import CRSError, ProjError

from geocentroids_tiler.errors import InputError, UnsupportedImageError

WGS84 = CRS.from_epsg(4326)
SCALE_TOLERANCE = 0.01
"""A projected CRS whose scale is this near to 1 at the image's centre is used as it is."""

Bounds = tuple[float, float, float, float]
"""left, bottom, right, top."""
AffineCoefficients = tuple[float, float, float, float, float, float]
"""a, b, c, d, e, f: x = a * col + b * row + c, y = d * col + e * row + f, as in ``affine.Affine``."""


class ChunkIndex(NamedTuple):
    """Index of a chunk, and of the window whose core starts where the chunk does."""

    row: int
    col: int

    def patches(self, stride_patches: int) -> PatchRange:
        """Return the patches of the chunk."""
        s = stride_patches
        return PatchRange(self.row * s, (self.row + 1) * s, self.col * s, (self.col + 1) * s)


@dataclass(frozen=True, slots=True)
class PatchRange:
    """A rectangle of patches: rows ``row_start`` to ``row_stop - 1``, columns ``col_start`` to ``col_stop - 1``."""

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; 0 where the range is empty."""
        return max(0, self.row_stop - self.row_start), max(0, self.col_stop - self.col_start)

    @property
    def empty(self) -> bool:
        """True if there is no patch in the range."""
        return 0 in self.shape

    def intersect(self, other: PatchRange) -> PatchRange:
        """Return the patches in both ranges."""
        return PatchRange(
            max(self.row_start, other.row_start),
            min(self.row_stop, other.row_stop),
            max(self.col_start, other.col_start),
            min(self.col_stop, other.col_stop),
        )

    def within(self, whole: PatchRange) -> tuple[slice, slice]:
        """Return where these patches lie in an array that holds those of ``whole``."""
        return (
            slice(self.row_start - whole.row_start, self.row_stop - whole.row_start),
            slice(self.col_start - whole.col_start, self.col_stop - whole.col_start),
        )

    def chunk_range(self, stride_patches: int) -> PatchRange:
        """Return the chunks that hold these patches, as a range of chunk indices."""
        s = stride_patches
        if self.empty:
            return PatchRange(0, 0, 0, 0)
        return PatchRange(self.row_start // s, -(-self.row_stop // s), self.col_start // s, -(-self.col_stop // s))

    def chunks(self, stride_patches: int) -> Iterator[ChunkIndex]:
        """Yield the chunks that hold these patches, row by row."""
        chunks = self.chunk_range(stride_patches)
        for row in range(chunks.row_start, chunks.row_stop):
            for col in range(chunks.col_start, chunks.col_stop):
                yield ChunkIndex(row, col)


@dataclass(frozen=True)
class Grid:
    """The patches of one coordinate system.

    Attributes:
        crs: a projected CRS in metres, true to scale within 1 % at the image's centre.
        patch_m: side of a patch in metres.
        areal_scale: area on the map divided by area on the ground, at the image's centre.
    """

    crs: CRS
    patch_m: float
    areal_scale: float = 1.0

    @property
    def patch_area_m2(self) -> float:
        """Area of a patch on the ground."""
        return self.patch_m**2 / self.areal_scale

    def patch_of(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows and columns of the patches that hold points, of the shape of ``x`` and ``y`` (grid CRS)."""
        row = np.floor(-np.asarray(y, np.float64) / self.patch_m).astype(np.int64)
        col = np.floor(np.asarray(x, np.float64) / self.patch_m).astype(np.int64)
        return row, col

    def patch_centre(self, row: ArrayLike, col: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return x and y (grid CRS) of patch centres, of the shape of ``row`` and ``col``."""
        x = (np.asarray(col, np.float64) + 0.5) * self.patch_m
        y = -(np.asarray(row, np.float64) + 0.5) * self.patch_m
        return x, y

    def bounds_of(self, patches: PatchRange) -> Bounds:
        """Return the outline of a range of patches, in the grid CRS."""
        p = self.patch_m
        return (patches.col_start * p, -patches.row_stop * p, patches.col_stop * p, -patches.row_start * p)

    def transform_of(self, patches: PatchRange) -> AffineCoefficients:
        """Return the geotransform of an array with one pixel per patch of ``patches``."""
        left, _, _, top = self.bounds_of(patches)
        return (self.patch_m, 0.0, left, 0.0, -self.patch_m, top)

    def patches_touching(self, bounds: Bounds) -> PatchRange:
        """Return the patches that share area with a rectangle of the grid CRS."""
        left, bottom, right, top = (value / self.patch_m for value in bounds)
        return PatchRange(math.floor(-top), math.ceil(-bottom), math.floor(left), math.ceil(right))


def window_patches_of(chunk: ChunkIndex, window_patches: int, margin_patches: int, stride_patches: int) -> PatchRange:
    """Return the patches of the window whose core starts where ``chunk`` does, margin included."""
    row = chunk.row * stride_patches - margin_patches
    col = chunk.col * stride_patches - margin_patches
    return PatchRange(row, row + window_patches, col, col + window_patches)


def ground_grid(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int, patch_m: float) -> Grid:
    """Return the grid of an image.

    Args:
        crs: the image's CRS.
        transform: its geotransform.
        width_px: columns.
        height_px: rows.
        patch_m: side of a patch in metres.

    Returns:
        The grid in the image's own CRS if that is projected, in metres and true to scale within 1 % at the image's
        centre; otherwise in the UTM zone of the centre.

    Raises:
        UnsupportedImageError: if the image cannot be placed on the ground.
    """
    crs = horizontal(crs)
    lon, lat = image_centre(crs, transform, width_px, height_px)
    if is_metric_grid(crs):
        scale = _true_scale_at(crs, lon, lat)
        if scale is not None:
            return Grid(crs, patch_m, areal_scale=scale[0] * scale[1])
    utm = utm_crs(lon, lat)
    scale = _scale_at(utm, lon, lat)
    if scale is None:
        raise UnsupportedImageError(f"the image's centre ({lon:.6f}, {lat:.6f}) cannot be projected to {utm.name}")
    return Grid(utm, patch_m, areal_scale=scale[0] * scale[1])


def grid_in(crs: CRS, lon: float, lat: float, patch_m: float) -> Grid:
    """Return the grid of a coordinate system, whatever the one of an image is.

    Args:
        crs: one that ``is_metric_grid``.
        lon: longitude of the place where it is used.
        lat: its latitude.
        patch_m: side of a patch in metres.

    Raises:
        UnsupportedImageError: if the place cannot be projected to it, or it is not true to scale there.
    """
    scale = _true_scale_at(crs, lon, lat)
    if scale is None:
        raise UnsupportedImageError(f"{crs.name} is not true to scale at {lon:.6f}, {lat:.6f}")
    return Grid(crs, patch_m, areal_scale=scale[0] * scale[1])


def image_centre(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int) -> tuple[float, float]:
    """Return longitude and latitude of an image's centre.

    Raises:
        UnsupportedImageError: if the CRS cannot be transformed to WGS 84, or the centre is not a place on Earth.
    """
    a, b, c, d, e, f = transform
    if a * e - b * d == 0:
        raise UnsupportedImageError(f"the geotransform {transform} has no area; a georeferenced image is needed")
    col, row = width_px / 2, height_px / 2
    lon, lat = project(crs, WGS84, a * col + b * row + c, d * col + e * row + f)
    if not (np.isfinite(lon) and np.isfinite(lat) and abs(lat) <= 90):
        raise UnsupportedImageError(f"the image's centre is outside the area where its CRS {crs.name!r} is defined")
    return wrap_longitude(float(lon)), float(lat)


def utm_crs(lon: float, lat: float) -> CRS:
    """Return the UTM zone of a place, with the exceptions of Norway and Svalbard.

    Raises:
        UnsupportedImageError: beyond 84 degrees north and 80 degrees south, where UTM ends.
    """
    if not -80 <= lat <= 84:
        raise UnsupportedImageError(
            f"latitude {lat:.4f} is beyond UTM (80 S to 84 N); supply the image in a projected CRS in metres "
            "that is true to scale there"
        )
    return CRS.from_epsg(int(utm_codes(wrap_longitude(lon), lat)))


def utm_codes(lon: ArrayLike, lat: ArrayLike) -> NDArray[np.int64]:
    """Return the EPSG codes of the UTM zones of places, 0 beyond 84 degrees north and 80 degrees south.

    Args:
        lon: longitudes, any shape.
        lat: latitudes, of the same shape.
    """
    lat = np.asarray(lat, np.float64)
    lon = (np.asarray(lon, np.float64) + 180) % 360 - 180
    zone = ((lon + 180) // 6).astype(np.int64) % 60 + 1
    zone = np.where((lat >= 56) & (lat < 64) & (lon >= 3) & (lon < 12), 32, zone)  # Norway
    zone = np.where(
        (lat >= 72) & (lon >= 0) & (lon < 42), 31 + 2 * ((lon + 3) // 12).astype(np.int64), zone
    )  # Svalbard
    codes: NDArray[np.int64] = np.where(lat >= 0, 32600, 32700) + zone
    return np.where((lat >= -80) & (lat <= 84), codes, 0)


def ground_gsd(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int, grid: Grid) -> float:
    """Return metres on the ground per pixel at the image's centre: the side of a square of a pixel's area."""
    a, b, c, d, e, f = transform
    col, row = width_px / 2, height_px / 2
    cols, rows = np.array([col, col + 1, col]), np.array([row, row, row + 1])
    x, y = project(horizontal(crs), grid.crs, a * cols + b * rows + c, d * cols + e * rows + f)
    area = abs((x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0]))
    return math.sqrt(float(area) / grid.areal_scale)


def outline(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int, target: CRS) -> NDArray[np.float64]:
    """Return an image's edge as points of shape (N, 2) in ``target``, 33 a side, without those that do not exist there.

    Raises:
        UnsupportedImageError: if no point of the edge exists in ``target``.
    """
    a, b, c, d, e, f = transform
    t = np.linspace(0, 1, 33)
    zero, one = np.zeros_like(t), np.ones_like(t)
    cols = np.concatenate([t, one, t[::-1], zero]) * width_px
    rows = np.concatenate([zero, t, one, t[::-1]]) * height_px
    x, y = project(horizontal(crs), target, a * cols + b * rows + c, d * cols + e * rows + f)
    points = np.stack([x, y], axis=1)
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        raise UnsupportedImageError(f"the image lies outside the area where {target.name!r} is defined")
    return points


def bounds_holding(patches: PatchRange, grid: Grid, target: CRS) -> Bounds | None:
    """Return a rectangle of another CRS that is sure to hold all of ``patches``.

    None where there is no such rectangle: part of them has no place there, or they are torn apart (at the
    antimeridian, around a pole).
    """
    left, bottom, right, top = grid.bounds_of(patches)
    try:
        edge = outline(grid.crs, (right - left, 0, left, 0, bottom - top, top), 1, 1, target)
    except UnsupportedImageError:
        return None
    low, high = edge.min(axis=0), edge.max(axis=0)
    torn = (np.abs(np.diff(edge, axis=0)) > (high - low) / 4).any()  # an edge's points lie 1/32 of it apart
    if len(edge) < 4 * 33 or torn:
        return None
    slack = 0.02 * float((high - low).max())  # edges bend between the points of the outline
    return float(low[0]) - slack, float(low[1]) - slack, float(high[0]) + slack, float(high[1]) + slack


def geographic_bounds(crs: CRS, transform: AffineCoefficients, width_px: int, height_px: int) -> Bounds:
    """Return west, south, east, north of an image in degrees; -180 to 180 where it crosses the antimeridian."""
    points = outline(crs, transform, width_px, height_px, WGS84)
    lon0, _ = image_centre(horizontal(crs), transform, width_px, height_px)
    lon = lon0 + (points[:, 0] - lon0 + 180) % 360 - 180  # no jump along the edge
    south, north = float(points[:, 1].min()), float(points[:, 1].max())
    if lon.min() < -180 or lon.max() > 180:
        return -180.0, south, 180.0, north
    return float(lon.min()), south, float(lon.max()), north


def project(source: CRS, target: CRS, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Transform points between coordinate systems, x first in both; points that do not exist become infinite.

    Args:
        source: CRS of ``x`` and ``y``.
        target: CRS wanted.
        x: eastings or longitudes, any shape.
        y: northings or latitudes, of the same shape.

    Raises:
        UnsupportedImageError: if there is no transformation between the two.
    """
    try:
        px, py = _transformer(source, target).transform(np.asarray(x, np.float64), np.asarray(y, np.float64))
    except ProjError as error:
        raise UnsupportedImageError(f"cannot transform from {source.name!r} to {target.name!r}: {error}") from error
    return np.asarray(px), np.asarray(py)


@dataclass(frozen=True)
class RasterMesh:
    """Where the pixel centres of a raster lie in another CRS, exactly at some, to be interpolated between them.

    Attributes:
        x: at (n + 1) x (n + 1) places in equal steps from the first pixel's centre to the last one's.
        y: likewise.
        shape: rows and columns of the raster.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    shape: tuple[int, int]

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Interpolate values given at the places of the mesh to all pixel centres: of shape ``shape``."""
        n = len(values) - 1
        (row, fv), (col, fu) = (_steps(count, n) for count in self.shape)
        fu, fv = fu.astype(values.dtype), fv.astype(values.dtype)
        left, right = values[:, col], values[:, col + 1]
        across = left + (right - left) * fu  # (n + 1, columns)
        below: NDArray[Any] = (across[1:] - across[:-1])[row]
        below *= fv[:, None]
        below += across[row]
        return below


def raster_mesh(bounds: Bounds, crs: CRS, shape: tuple[int, int], target: CRS, tolerance: float) -> RasterMesh | None:
    """Return where the pixel centres of a raster lie in another CRS, to be interpolated within a tolerance.

    The mesh is made finer until the error halfway between its places, where it is largest, is within the tolerance.

    Args:
        bounds: of the raster, in ``crs``.
        crs: CRS of the raster, x first.
        shape: rows and columns of the raster.
        target: CRS of the answer.
        tolerance: largest error allowed, in units of ``target``.

    Returns:
        The mesh, or None where it would have to be as fine as the raster, or some pixel has no place in ``target``.
    """
    cells = 8
    while cells * 2 <= min(shape):
        # Edges of the cells as well as their middles: between two conformal systems coordinates are harmonic, so
        # what is too much along a row is too little along a column, and at the middle of a cell the two cancel.
        fx, fy = exact_points(bounds, crs, shape, target, np.linspace(0, 1, 2 * cells + 1))
        if not (np.isfinite(fx).all() and np.isfinite(fy).all()):
            return None
        finer = RasterMesh(fx[::2, ::2], fy[::2, ::2], fx.shape)
        if np.hypot(finer.spread(finer.x) - fx, finer.spread(finer.y) - fy).max() <= tolerance:
            return RasterMesh(finer.x, finer.y, shape)
        cells *= 2
    return None


def raster_points(
    bounds: Bounds, crs: CRS, shape: tuple[int, int], target: CRS, tolerance: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return where the pixel centres of a raster lie in another CRS.

    Args:
        bounds: of the raster, in ``crs``.
        crs: CRS of the raster, x first.
        shape: rows and columns of the raster.
        target: CRS of the answer.
        tolerance: largest error allowed, in units of ``target``.

    Returns:
        x and y of shape ``shape``; infinite or NaN where a pixel has no place in ``target``.
    """
    mesh = raster_mesh(bounds, crs, shape, target, tolerance)
    return exact_points(bounds, crs, shape, target) if mesh is None else (mesh.spread(mesh.x), mesh.spread(mesh.y))


def exact_points(
    bounds: Bounds, crs: CRS, shape: tuple[int, int], target: CRS, steps: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Transform a raster's pixel centres one by one.

    Args:
        bounds: of the raster, in ``crs``.
        crs: CRS of the raster, x first.
        shape: rows and columns of the raster.
        target: CRS of the answer.
        steps: places along rows and columns in place of all pixels: 0 is the first pixel's centre, 1 the last one's.

    Returns:
        x and y; infinite or NaN where there is no place in ``target``.
    """
    left, bottom, right, top = bounds
    places = []
    for count in shape:
        at = np.linspace(0, 1, count) if steps is None else steps
        places.append((0.5 + at * (count - 1)) / count)
    v, u = places
    uu, vv = np.meshgrid(u, v)
    return project(crs, target, left + uu * (right - left), top + vv * (bottom - top))


def _steps(count: int, n: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return for ``count`` equal steps over a line the cell of n that each is in, and how far into it."""
    at = np.linspace(0, n, count)
    cell = np.minimum(at.astype(np.intp), n - 1)
    return cell, at - cell


def wrap_longitude(lon: float) -> float:
    """Bring a longitude to -180 (included) to 180 (not included)."""
    wrapped = (lon + 180) % 360 - 180
    return wrapped if wrapped < 180 else -180.0  # the remainder of a tiny negative number rounds to 360


def authority_code(crs: CRS) -> str | None:
    """Return ``AUTHORITY:code`` of a coordinate system, or None if it is none of an authority's, but only like one."""
    authority = crs.to_authority(min_confidence=100)  # with less, any other datum with the same ellipsoid would do
    return ":".join(authority) if authority else None


def parse_crs(text: str) -> CRS:
    """Read ``AUTHORITY:code``, for example ``EPSG:32721``; nothing else is accepted.

    Raises:
        InputError: if it is anything else.
    """
    authority, _, code = text.partition(":")
    if not (authority.isalpha() and code.isalnum() and len(text) <= 32):
        raise InputError(f"{text!r} is not a CRS; write AUTHORITY:code, for example EPSG:32721")
    try:
        crs = CRS.from_authority(authority, code)
    except CRSError as error:
        raise InputError(f"{text!r} is not a known CRS; write AUTHORITY:code, for example EPSG:32721") from error
    if not (crs.is_geographic or crs.is_projected):
        raise InputError(
            f"{text!r} ({crs.type_name}) does not place points on a map; accepted: AUTHORITY:code of a "
            "geographic or projected CRS, for example EPSG:32721"
        )
    return horizontal(crs)


@lru_cache(maxsize=256)
def _transformer(source: CRS, target: CRS) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


def horizontal(crs: CRS) -> CRS:
    """Return the part of a CRS that places points on the map: a compound one without its heights."""
    return crs.sub_crs_list[0] if crs.is_compound else crs


def is_metric_grid(crs: CRS) -> bool:
    """True for a projected CRS with axes east and north in metres, other than Web Mercator.

    Web Mercator is true to scale at the equator only, and its images there should share patches with their
    neighbours' UTM images. Both axes of a polar CRS point away from the pole, or to it.
    """
    if not crs.is_projected or (crs.coordinate_operation and "Pseudo" in crs.coordinate_operation.method_name):
        return False
    axes = crs.axis_info[:2]
    return {axis.direction for axis in axes} in ({"east", "north"}, {"north"}, {"south"}) and all(
        axis.unit_conversion_factor == 1 for axis in axes
    )


def _true_scale_at(crs: CRS, lon: float, lat: float) -> tuple[float, float] | None:
    """Return the scale at a place as ``_scale_at`` does, or None where it is not near enough to 1."""
    scale = _scale_at(crs, lon, lat)
    return scale if scale is not None and all(abs(factor - 1) <= SCALE_TOLERANCE for factor in scale) else None


def _scale_at(crs: CRS, lon: float, lat: float) -> tuple[float, float] | None:
    """Return the largest and the smallest scale in any direction at a place, or None where the CRS is not defined."""
    factors = Proj(crs).get_factors(lon, lat)
    scale = float(factors.tissot_semimajor), float(factors.tissot_semiminor)
    return scale if all(math.isfinite(value) and value > 0 for value in scale) else None
