"""Writing the labels of a whole dataset where they are kept: complete or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rasterio

from geocentroids_tiler import __version__
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import KeptLabelsError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.export import describe, raster_profile, window_of, write_cog
from geocentroids_tiler.labels.file_lock import FileLock
from geocentroids_tiler.labels.label_files import (
    LABELS_FILE,
    RECORD_FILE,
    SIMILARITY_FILE,
    FileLayout,
    KeptDataset,
    KeptRecord,
    kept_id,
    load_kept,
)
from geocentroids_tiler.source import Dataset

logger = logging.getLogger(__name__)

_MAKING = ".making-"
"""Start of the names of directories that are not complete yet. Whoever works in one holds the lock beside it."""
_LOCK = ".lock"


class KeptWriter:
    """Takes the labels of a dataset strip by strip; ``finish`` makes them appear."""

    def __init__(self, work: Path, target: Path, dataset: Dataset, codebook: Codebook, device: str) -> None:
        self._work = work
        self._target = target
        self._dataset = dataset
        self._codebook = codebook
        self._device = device
        self._layout = FileLayout.of(dataset.footprint)
        self._open = ExitStack()
        area = dataset.footprint
        rows, cols = self._layout.shape
        padded = PatchRange(area.row_start, area.row_start + rows, area.col_start, area.col_start + cols)
        self._labels = self._create("labels", raster_profile(padded, dataset.grid))
        self._similarity = self._create("similarity", raster_profile(padded, dataset.grid, "float32", float("nan")))

    def write(self, strip: LabelBlock) -> None:
        """Take the labels of a part of the dataset's footprint, without any it was given before."""
        window = window_of(strip.patches, self._dataset.footprint)
        self._labels.write(strip.labels, 1, window=window)
        self._similarity.write(strip.similarity, 1, window=window)

    def finish(self) -> KeptDataset:
        """Make what was written appear as the labels of the dataset; what was not written has no data.

        If others kept labels of the same dataset meanwhile, theirs stay.

        Raises:
            KeptLabelsError: if what was written cannot be read.
            OSError: if the disk is full, or the folder cannot be written to.
        """
        # Without a colour table: it has 65,536 entries, and each tile that is drawn from the file would parse them.
        describe(self._labels, self._codebook, self._codebook.classes(None), colors=False)
        self._labels.update_tags(**_tags(self._dataset, self._device))
        self._similarity.set_band_description(1, "similarity")
        self._similarity.update_tags(GEOCENTROIDS_DIGEST=self._codebook.digest, **_tags(self._dataset, self._device))
        self.close()
        made = self._work / self._target.name
        made.mkdir()
        overviews = len(self._layout.factors) - 1
        write_cog(self._work / "labels", made / LABELS_FILE, "MODE", overviews)
        write_cog(self._work / "similarity", made / SIMILARITY_FILE, "AVERAGE", overviews)
        (made / RECORD_FILE).write_text(self._record(made).model_dump_json(indent=2), encoding="utf-8")
        load_kept(made, self._dataset)
        for path in made.iterdir():
            _sync(path)
        self._appear(made)
        return load_kept(self._target, self._dataset)

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def _create(self, name: str, profile: dict[str, Any]) -> Any:
        return self._open.enter_context(rasterio.open(self._work / name, "w", **profile))

    def _record(self, made: Path) -> KeptRecord:
        dataset, area = self._dataset, self._dataset.footprint
        url, identity, options = dataset.key
        return KeptRecord(
            url=url,
            identity=identity,
            bidx=options.bidx,
            rescale=options.rescale,
            codebook_digest=self._codebook.digest,
            codebook=self._codebook.name,
            device=self._device,
            package_version=__version__,
            made_at=datetime.now(UTC),
            patch_m=dataset.grid.patch_m,
            rows=(area.row_start, area.row_stop),
            cols=(area.col_start, area.col_stop),
            labels_bytes=(made / LABELS_FILE).stat().st_size,
            similarity_bytes=(made / SIMILARITY_FILE).stat().st_size,
        )

    def _appear(self, made: Path) -> None:
        try:
            made.rename(self._target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            try:
                load_kept(self._target, self._dataset)
            except KeptLabelsError as broken:
                logger.warning("%s is broken (%s) and is replaced", self._target, broken)
                self._target.rename(self._work / "broken")
                made.rename(self._target)


@contextmanager
def kept_writer(
    folder: Path, dataset: Dataset, codebook: Codebook, device: str, appeared: Callable[[], object]
) -> Iterator[KeptWriter]:
    """Let the labels of a dataset be written in a ``with`` block; without ``finish`` nothing of them stays.

    Args:
        folder: where labels are kept; made if it does not exist.
        dataset: what is labelled.
        codebook: what the labels are of.
        device: what computes them.
        appeared: called at the end.

    Raises:
        OSError: if the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    work = folder / f"{_MAKING}{secrets.token_hex(8)}"
    lock = FileLock.wait_for(work.with_suffix(_LOCK))
    try:
        work.mkdir()
        writer = KeptWriter(work, folder / kept_id(dataset, codebook), dataset, codebook, device)
        try:
            yield writer
        finally:
            writer.close()
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release(remove=True)
        appeared()


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed had begun to write."""
    for path in folder.glob(f"{_MAKING}*{_LOCK}"):
        if (lock := FileLock.take(path)) is not None:
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            lock.release(remove=True)


def _tags(dataset: Dataset, device: str) -> dict[str, str]:
    url, identity, options = dataset.key
    return {
        "GEOCENTROIDS_SOURCE": url,
        "GEOCENTROIDS_IDENTITY": identity,
        "GEOCENTROIDS_OPTIONS": json.dumps({"bidx": options.bidx, "rescale": options.rescale}),
        "GEOCENTROIDS_DEVICE": device,
    }


def _sync(path: Path) -> None:
    """Have a file on the disk before others see it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
