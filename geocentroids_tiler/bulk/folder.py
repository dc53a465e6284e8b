"""The folder that a run fills: labels and an item for each image, a collection of them, and what failed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geocentroids_tiler.bulk.image_list import ListedImage
from geocentroids_tiler.bulk.items import (
    COLLECTION_FILE,
    ITEMS_FILE,
    LabelFile,
    LabelledRecord,
    Making,
    as_json,
    item_name,
    label_collection,
    label_file_of,
    labels_name,
    read_record,
)
from geocentroids_tiler.codebook import Codebook, file_sha256
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.file_lock import FileLock

FAILURES_FILE = "failures.json"
_LOCK_FILE = ".lock"
_WORK_DIR = ".work"
_OTHERS = frozenset({COLLECTION_FILE, ITEMS_FILE, FAILURES_FILE})
_COMPACT = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be labelled, and why, in one sentence."""

    image: ListedImage
    reason: str


class LabelFolder:
    """A folder of labels. Only one run at a time writes to it.

    An image counts as done when its item is there, which is written last; so a run that was ended at any moment goes on
    where it stopped.

    Attributes:
        path: the folder.
        work: a folder in it for what is not finished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / _WORK_DIR

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Make the folder and keep others from writing to it during a ``with`` block; what was half done is removed.

        Raises:
            InputError: if another process writes to it, or it holds another collection.
            OSError: if it cannot be written to.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        collection = self.path / COLLECTION_FILE
        if collection.exists() and b'"geocentroids-' not in collection.read_bytes():
            raise InputError(f"{collection} is a collection of something else; name another folder")
        lock = FileLock.take(self.path / _LOCK_FILE)
        if lock is None:
            raise InputError(f"another process writes to {self.path}; wait until it has ended, or name another folder")
        try:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            yield
        finally:
            shutil.rmtree(self.work, ignore_errors=True)
            lock.release(remove=True)

    def finished(self, image: ListedImage, identity: str, making: Making) -> bool:
        """Tell whether the labels of an image are there and whole, of the image as it is now and made as is asked."""
        found = self._read(self.path / item_name(image.id))
        if found is None:
            return False
        item, record = found
        labels = self.path / labels_name(image.id)
        file = label_file_of(item)
        return (
            record.source == image.url
            and record.identity == identity
            and record.difference(making) is None
            and labels.is_file()
            and labels.stat().st_size == file.size_bytes
            and file_sha256(labels) == file.sha256
        )

    def check_making(self, images: Sequence[ListedImage], making: Making) -> None:
        """Make sure that no labels would be replaced by labels made in another way.

        Raises:
            InputError: if some would; the text says how they differ.
        """
        for image in images:
            found = self._read(self.path / item_name(image.id))
            if found is not None and (difference := found[1].difference(making)):
                raise InputError(
                    f"{self.path} holds labels of {image.name!r} with {difference}; name another folder, or use "
                    "--overwrite"
                )

    def keep(self, image: ListedImage, labels: Path, item: Mapping[str, Any]) -> None:
        """Keep the labels of an image: first they, then the item, each whole or not at all.

        Args:
            image: the image.
            labels: file of the labels, below ``work``; it is moved.
            item: its item.

        Raises:
            OSError: if the disk is full.
        """
        with labels.open("rb+") as file:
            os.fsync(file.fileno())
        labels.replace(self.path / labels_name(image.id))
        self._write(item_name(image.id), as_json(item))

    def finish(self, failures: Sequence[Failure], codebook: Codebook) -> None:
        """Write what failed, and the collection of all items in the folder.

        Raises:
            OSError: if the disk is full.
        """
        listed = [
            {"image": failure.image.name, "line": failure.image.line, "reason": failure.reason} for failure in failures
        ]
        self._write(FAILURES_FILE, as_json({"failures": listed}))
        items = [item for item, record in self.items() if record.codebook_digest == codebook.digest]
        if not items:
            return
        lines = ",\n".join(json.dumps(item, **_COMPACT) for item in items)  # type: ignore[arg-type]
        self._write(ITEMS_FILE, f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n')
        self._write(COLLECTION_FILE, as_json(label_collection(items, codebook)))

    def items(self) -> Iterator[tuple[dict[str, Any], LabelledRecord]]:
        """Yield the items in the folder by name, and what each says; other files are left out."""
        for file in sorted(self.path.glob("*.json")):
            found = None if file.name in _OTHERS else self._read(file)
            if found is not None and item_name(found[0]["id"]) == file.name:
                yield found

    def _read(self, file: Path) -> tuple[dict[str, Any], LabelledRecord] | None:
        try:
            return read_record(file.read_bytes())
        except OSError:
            return None

    def _write(self, name: str, text: str) -> None:
        part = self.work / name
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path / name)


def label_file(path: Path) -> LabelFile:
    """Return what an item says of a file of labels."""
    return LabelFile(path.stat().st_size, file_sha256(path))
