"""The labels of one whole dataset on disk: two rasters on the ground grid, and a record of what they were made of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError
from rasterio.errors import RasterioError
from rasterio.windows import Window

from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.errors import KeptLabelsError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.source import Dataset, ReadOptions, gdal_options

FORMAT: Literal["geocentroids-labels/1"] = "geocentroids-labels/1"
"""Written in records and part of every key: files of another format are never found."""
LABELS_FILE = "labels.tif"
SIMILARITY_FILE = "similarity.tif"
RECORD_FILE = "record.json"
SMALLEST_PATCHES = 256
"""An overview this large, or a smaller raster, needs no smaller one: it is read at once."""


@dataclass(frozen=True)
class FileLayout:
    """Where patches lie in the rasters of a dataset.

    Attributes:
        factors: patches a side of a pixel, of the raster itself (1) and of its overviews.
        shape: rows and columns of the raster. Up to ``factors[-1] - 1`` rows and columns without data follow those of
            the dataset, so that each pixel of each overview stands for whole pixels of the raster.
    """

    factors: tuple[int, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, footprint: PatchRange) -> FileLayout:
        """Return the layout of the rasters of a dataset with this footprint."""
        factors = [1]
        while max(footprint.shape) > SMALLEST_PATCHES * factors[-1]:
            factors.append(2 * factors[-1])
        rows, cols = (-(-size // factors[-1]) * factors[-1] for size in footprint.shape)
        return cls(tuple(factors), (rows, cols))


class KeptRecord(BaseModel):
    """What kept labels were made of. The first five say what they are the labels of; see ``kept_id``."""

    model_config = ConfigDict(frozen=True)

    format: Literal["geocentroids-labels/1"] = FORMAT
    url: str
    identity: str
    bidx: tuple[int, int, int] | None
    rescale: tuple[float, float] | None
    codebook_digest: str
    codebook: str
    device: str
    package_version: str
    made_at: AwareDatetime
    patch_m: float
    rows: tuple[int, int]
    cols: tuple[int, int]
    labels_bytes: int
    similarity_bytes: int

    @property
    def footprint(self) -> PatchRange:
        """Patches of the dataset."""
        return PatchRange(*self.rows, *self.cols)

    @property
    def version(self) -> str:
        """A short text that is another one whenever the labels may be others."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    @property
    def id(self) -> str:
        """Name of the directory that they belong in."""
        return _id(self.url, self.identity, ReadOptions(self.bidx, self.rescale), self.codebook_digest)


def kept_id(dataset: Dataset, codebook: Codebook) -> str:
    """Return the name of the directory for the labels of a dataset, a hash of all that labels depend on.

    What computed them is not part of it: labels differ between devices in near ties at most, and those that are kept
    are the only ones that anybody sees.
    """
    return _id(*dataset.key, codebook.digest)


@dataclass(frozen=True)
class KeptBlock:
    """Labels of a rectangle of cells, each a square of ``factor`` x ``factor`` patches.

    Cells start at the first row and column of the dataset's footprint, so the cell of a patch depends on the dataset
    alone, not on what is asked for. With ``factor`` 1 cells are patches, and labels and similarity are bit for bit
    what the engine gave. A larger cell has the most frequent label of its patches with data (from one overview to the
    next: of its four quarters; among equals, any) and their average similarity.

    Attributes:
        factor: patches a side of a cell, a power of two.
        patches: the patches of all the cells: those asked for, and up to ``factor - 1`` more on each side. Cell
            (i, j) holds the patches from row ``patches.row_start + i * factor`` and from column
            ``patches.col_start + j * factor`` on.
        labels: of shape ``patches.shape / factor``, uint16; 65535 where there is no data, as everywhere outside of
            the footprint.
        similarity: of the same shape, float32; NaN where there is no data.
    """

    factor: int
    patches: PatchRange
    labels: NDArray[np.uint16]
    similarity: NDArray[np.float32]


@dataclass(frozen=True)
class KeptDataset:
    """Labels of a whole dataset, on disk. Holds no open file; every read opens its own, so it is safe for threads.

    Attributes:
        folder: where they are.
        record: what they were made of.
        when_broken: told when a file cannot be read.
    """

    folder: Path
    record: KeptRecord
    when_broken: Callable[[Exception], object] = field(default=lambda _: None, repr=False, compare=False)

    @property
    def footprint(self) -> PatchRange:
        """Patches of the dataset."""
        return self.record.footprint

    @property
    def factors(self) -> tuple[int, ...]:
        """What ``read`` accepts, smallest first: 1, 2, 4 ... up to where the whole dataset is a small picture."""
        return FileLayout.of(self.footprint).factors

    @property
    def version(self) -> str:
        """A short text that is another one whenever the labels may be others; for cache keys and entity tags."""
        return self.record.version

    def factor_for(self, pixel_patches: float) -> int:
        """Return the largest factor that leaves two cells or more a side to a pixel of so many patches a side."""
        return max(factor for factor in self.factors if factor == 1 or 2 * factor <= pixel_patches)

    def read(self, patches: PatchRange, factor: int = 1, *, similarity: bool = True) -> KeptBlock:
        """Read the labels of a rectangle of patches, which may lie anywhere.

        Args:
            patches: what is wanted.
            factor: patches a side of a cell; one of ``factors``.
            similarity: read similarities too; without they are all NaN.

        Raises:
            ValueError: if ``factor`` is none of ``factors``.
            KeptLabelsError: if a file cannot be read; from then on ``KeptLabels.find`` does not find it any more.
        """
        if factor not in self.factors:
            raise ValueError(f"factor is {factor}; accepted: {self.factors}")
        rows, cols = FileLayout.of(self.footprint).shape
        whole = PatchRange(0, rows // factor, 0, cols // factor)
        top, left = self.footprint.row_start, self.footprint.col_start
        cells = PatchRange(  # counted from the footprint's first patch
            math.floor((patches.row_start - top) / factor),
            math.ceil((patches.row_stop - top) / factor),
            math.floor((patches.col_start - left) / factor),
            math.ceil((patches.col_stop - left) / factor),
        )
        labels = np.full(cells.shape, NODATA_LABEL, np.uint16)
        fit = np.full(cells.shape, np.nan, np.float32)
        part = cells.intersect(whole)
        if not part.empty:
            at = part.within(cells)
            labels[at] = self._read(LABELS_FILE, part, factor)
            if similarity:
                fit[at] = self._read(SIMILARITY_FILE, part, factor)
        held = PatchRange(
            top + cells.row_start * factor,
            top + cells.row_stop * factor,
            left + cells.col_start * factor,
            left + cells.col_stop * factor,
        )
        return KeptBlock(factor, held, labels, fit)

    def _read(self, name: str, cells: PatchRange, factor: int) -> NDArray[Any]:
        level = {} if factor == 1 else {"overview_level": self.factors.index(factor) - 1}
        window = Window(cells.col_start, cells.row_start, *cells.shape[::-1])
        try:
            with (
                rasterio.Env(**gdal_options()),
                rasterio.open(self.folder / name, driver="GTiff", **level) as raster,
            ):
                pixels: NDArray[Any] = raster.read(1, window=window)
                return pixels
        except (RasterioError, OSError) as error:
            self.when_broken(error)
            raise KeptLabelsError(f"the labels kept of {self.record.url!r} cannot be read") from error


def load_kept(folder: Path, dataset: Dataset) -> KeptDataset:
    """Read the record of kept labels and look at the headers of their files.

    Args:
        folder: their directory.
        dataset: what they should be the labels of.

    Raises:
        KeptLabelsError: if they are broken; the text says how.
    """
    try:
        record = KeptRecord.model_validate_json((folder / RECORD_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise KeptLabelsError(f"{RECORD_FILE} cannot be read: {' '.join(str(error).split())}") from error
    if record.id != folder.name:
        raise KeptLabelsError(f"{RECORD_FILE} belongs in {record.id}")
    if (record.footprint, record.patch_m) != (dataset.footprint, dataset.grid.patch_m):
        raise KeptLabelsError(f"{RECORD_FILE} is of {record.footprint}, the image has {dataset.footprint}")
    layout = FileLayout.of(record.footprint)
    for name, dtype, size_bytes in (
        (LABELS_FILE, "uint16", record.labels_bytes),
        (SIMILARITY_FILE, "float32", record.similarity_bytes),
    ):
        _check_raster(folder / name, size_bytes, ((dtype,), layout.shape, layout.factors))
    return KeptDataset(folder, record)


def _check_raster(path: Path, size_bytes: int, expected: tuple[object, ...]) -> None:
    """Raise KeptLabelsError unless a raster has this size and these data types, shape and overviews."""
    try:
        found_bytes = path.stat().st_size
        if found_bytes != size_bytes:
            raise KeptLabelsError(f"{path.name} has {found_bytes} bytes; {size_bytes} were written")
        with (
            rasterio.Env(**gdal_options()),
            rasterio.open(path, driver="GTiff") as raster,
        ):
            found = raster.dtypes, raster.shape, (1, *raster.overviews(1))
    except (RasterioError, OSError) as error:
        raise KeptLabelsError(f"{path.name} cannot be opened: {error}") from error
    if found != expected:
        raise KeptLabelsError(f"{path.name} has {found}; expected: {expected}")


def _id(url: str, identity: str, options: ReadOptions, codebook_digest: str) -> str:
    rescale = options.rescale and [float(value) for value in options.rescale]
    text = json.dumps([FORMAT, url, identity, options.bidx, rescale, codebook_digest])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
