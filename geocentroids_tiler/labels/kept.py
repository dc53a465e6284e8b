"""A folder of labels of whole datasets: what is in it is served without computing anything."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from cachetools import LRUCache

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import StorageFullError
from geocentroids_tiler.labels.keeping import KeptWriter, kept_writer
from geocentroids_tiler.labels.label_files import RECORD_FILE, KeptBlock, KeptDataset, kept_id, load_kept
from geocentroids_tiler.source import Dataset

__all__ = ["KeptBlock", "KeptDataset", "KeptLabels", "kept_id"]

logger = logging.getLogger(__name__)

BYTES_PER_PATCH = 6
"""A label and a similarity, before they are compressed."""
MAX_KNOWN = 1024
"""Datasets of which it is remembered whether their labels are kept."""
LOOK_EVERY_S = 5.0
"""How long that is remembered: labels that another process kept are seen after this long at most."""
BROKEN_FOR_S = 600.0
"""How long broken files are left alone unless they change; what broke them may have been a want of file handles."""
JOBS_DIR = "jobs"
"""Holds the files of jobs; all other directories in the folder hold labels."""

_Signature = tuple[int, int, int]


@dataclass(frozen=True)
class _Known:
    """What was seen of a dataset's directory.

    Attributes:
        looked_at: when it was looked at last.
        opened_at: when its files were opened last, or found broken.
        signature: changes when its content does; None: there is no directory.
        kept: None if there is none, or it is broken.
    """

    looked_at: float
    opened_at: float
    signature: _Signature | None
    kept: KeptDataset | None


class KeptLabels:
    """Finds and keeps labels of whole datasets. Safe for threads, and for several processes that share the folder.

    Each dataset has a directory named by ``kept_id``, with ``labels.tif``, ``similarity.tif`` and ``record.json``. It
    appears complete. Nothing is ever removed from it; who needs room removes directories.

    Args:
        folder: where they are; it need not exist before something is kept.
        max_bytes: what its files may take together.
        clock: tells the time in seconds.
    """

    def __init__(self, folder: Path, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._known: LRUCache[str, _Known] = LRUCache(MAX_KNOWN)
        self._told: LRUCache[tuple[str, _Signature], bool] = LRUCache(MAX_KNOWN)

    def find(self, dataset: Dataset, codebook: Codebook, *, fresh: bool = False) -> KeptDataset | None:
        """Return the labels kept of a dataset, or None.

        Mostly a look into a dictionary; every few seconds it asks for a file's date, and opens files when that is
        another one. Broken files count as none, and are logged once.

        Args:
            dataset: the dataset.
            codebook: the codebook.
            fresh: look now, in case that another process kept them a moment ago.
        """
        if dataset.options.grid is not None:  # what is kept is on the image's own grid
            return None
        name, now = kept_id(dataset, codebook), self._clock()
        with self._lock:
            known = self._known.get(name)
        if known is not None and not fresh and now - known.looked_at < LOOK_EVERY_S:
            return known.kept
        signature = _signature(self.folder / name)
        same = known is not None and known.signature == signature
        broken = same and known is not None and known.kept is None and signature is not None
        if known is None or not same or (broken and now - known.opened_at >= BROKEN_FOR_S):
            known = _Known(now, now, signature, None if signature is None else self._open(name, signature, dataset))
        else:
            known = replace(known, looked_at=now)
        with self._lock:
            self._known[name] = known
        return known.kept

    def writer(self, dataset: Dataset, codebook: Codebook, device: str) -> AbstractContextManager[KeptWriter]:
        """Let the labels of a dataset be written in a ``with`` block; without ``finish`` nothing of them stays.

        Args:
            dataset: what is labelled.
            codebook: what the labels are of.
            device: what computes them, as ``LabelEngine.device_name``.

        Raises:
            OSError: if the folder cannot be written to.
        """
        return kept_writer(self.folder, dataset, codebook, device, lambda: self._forget(kept_id(dataset, codebook)))

    def check_room(self, dataset: Dataset, reserved_bytes: int = 0) -> None:
        """Make sure that the labels of a dataset will have room.

        Args:
            dataset: the dataset.
            reserved_bytes: what was promised to others, beside what is taken already.

        Raises:
            StorageFullError: if they may not fit.
        """
        needed, taken = estimated_bytes(dataset), self.used_bytes() + reserved_bytes
        if taken + needed > self.max_bytes:
            raise StorageFullError(
                f"the labels of {dataset.source.url!r} may take {needed} bytes; {taken} of the {self.max_bytes} bytes "
                "for labels (GEOCENTROIDS_LABEL_FILES_BYTES) are taken or promised to unfinished jobs"
            )

    def used_bytes(self) -> int:
        """Return the size of all files, without those of jobs."""
        total = 0
        for folder in _entries(self.folder):
            if folder.name != JOBS_DIR:
                total += sum(_size(path) for path in _entries(folder))
        return total

    def _open(self, name: str, signature: _Signature, dataset: Dataset) -> KeptDataset | None:
        try:
            kept = load_kept(self.folder / name, dataset)
        except Exception as error:  # whatever is wrong with files, the labels can be computed
            self._tell(name, signature, error)
            return None
        return replace(kept, when_broken=lambda error: self._broke(name, signature, error))

    def _broke(self, name: str, signature: _Signature, error: Exception) -> None:
        """Leave labels alone that could be found and not be read."""
        self._tell(name, signature, error)
        now = self._clock()
        with self._lock:
            self._known[name] = _Known(now, now, signature, None)

    def _tell(self, name: str, signature: _Signature, error: Exception) -> None:
        with self._lock:
            told = self._told.get((name, signature), False)
            self._told[name, signature] = True
        if not told:
            logger.warning("the labels kept in %s are broken and not used: %s", self.folder / name, error)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)


def estimated_bytes(dataset: Dataset) -> int:
    """Return how large the files of a dataset's labels may be."""
    rows, cols = dataset.footprint.shape
    return BYTES_PER_PATCH * rows * cols


def _signature(folder: Path) -> _Signature | None:
    """Return what changes when the labels in a directory do, or None if there is no directory."""
    for path in (folder / RECORD_FILE, folder):
        try:
            stat = path.stat()
        except OSError:
            continue
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
    return None


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # it does not exist, was removed meanwhile, or is a file
        return []


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
