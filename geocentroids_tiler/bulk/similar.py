"""Which images of a folder of labels look like one image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.bulk.command import bulk_settings
from geocentroids_tiler.bulk.folder import LabelFolder
from geocentroids_tiler.bulk.image_list import ListedImage, image_of
from geocentroids_tiler.bulk.items import Histogram, LabelledRecord, labels_name, read_record
from geocentroids_tiler.bulk.likeness import likeness
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.export import strips
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions, Remote, open_dataset, open_remote, source_identity


@dataclass(frozen=True, slots=True)
class Similar:
    """An image that was found.

    Attributes:
        id: name of its item.
        likeness: 1 for the same shares of all labels, 0 for nothing in common.
        source: its URL or path.
        labels: file of its labels.
    """

    id: str
    likeness: float
    source: str
    labels: Path


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for an image.

    Attributes:
        images: those most alike first.
        compared: how many images it was compared with.
        left_out: images of the folder that were labelled with another codebook, or have no labelled patch.
    """

    images: tuple[Similar, ...]
    compared: int
    left_out: int


def find_similar(
    name: str,
    folder: Path,
    settings: Settings,
    options: ReadOptions,
    codebook: str | None = None,
    progress: Callable[[int], object] = lambda chunks: None,
) -> Found:
    """Compare an image with those of a folder of labels.

    Args:
        name: id or JSON file of an item, or an image (URL or file), which is labelled now unless the folder has it.
        folder: written by ``classify --list``.
        settings: what the operator chose.
        options: how bands of an image that is labelled now become RGB.
        codebook: name of the codebook; None: the one that the item or the folder was labelled with.
        progress: called with the number of chunks labelled since the last call.

    Raises:
        InputError: if there is nothing to compare.
        GeocentroidsError: if the codebook is not there or the image cannot be labelled.
    """
    items = {item["id"]: record for item, record in LabelFolder(folder).items()}
    if not items:
        raise InputError(f"{folder} holds no items; geocentroids classify --list FILE --out {folder} makes them")
    image, own = _named(name, folder, items, settings)
    chosen = _codebook(codebook or (own or _usual(items)).codebook, settings)
    if own is not None and own.codebook_digest != chosen.digest:
        raise InputError(
            f"{name!r} was labelled with codebook {own.codebook} {own.codebook_version} "
            f"({own.codebook_digest[:12]}), and {chosen.name} {chosen.manifest.version} ({chosen.digest[:12]}) is "
            "here; label it again, or name the codebook"
        )
    k = len(chosen)
    others = {
        item_id: record.counts(k)
        for item_id, record in items.items()
        if item_id != image and record.codebook_digest == chosen.digest and record.histogram
    }
    if not others:
        raise InputError(
            f"{folder} holds no other image labelled with codebook {chosen.name} {chosen.manifest.version} "
            f"({chosen.digest[:12]}); there is nothing to compare"
        )
    counts = own.counts(k) if own is not None else _label(image_of(name), settings, options, chosen, progress)
    if not counts.any():
        raise InputError(f"{name!r} has no labelled patch; there is nothing to compare")
    values = likeness(counts, np.stack(list(others.values())), chosen.centroids, chosen.manifest.assignment.metric)
    ids = list(others)
    best = np.argsort(-values, kind="stable")
    found = tuple(
        Similar(ids[i], round(float(values[i]), 6), items[ids[i]].source, folder / labels_name(ids[i])) for i in best
    )
    return Found(found, len(others), len(items) - len(others) - (image in items))


def _named(
    name: str, folder: Path, items: dict[str, LabelledRecord], settings: Settings
) -> tuple[str, LabelledRecord | None]:
    """Return the id of what somebody named, and what its item says; None for an image that has no item."""
    if name in items:
        return name, items[name]
    if name.lower().endswith(".json"):
        file = Path(name) if Path(name).is_file() else folder / name
        found = read_record(file.read_bytes()) if file.is_file() else None
        if found is None:
            raise InputError(f"{name!r} is no item that geocentroids classify --list wrote")
        return found[0]["id"], found[1]
    image = image_of(name)
    known = items.get(image.id)
    if known is None:
        if image.is_file and not Path(image.url).exists():
            raise InputError(
                f"{name!r} is neither an item of {folder} nor an image; accepted: the id of an item, its JSON file, "
                f"a URL or a file (there is an item {next(iter(items))!r}, for example)"
            )
        return image.id, None
    remote = open_remote(settings)
    try:
        return image.id, known if _identity(image, remote) == known.identity else None
    finally:
        remote.close()


def _identity(image: ListedImage, remote: Remote) -> str | None:
    try:
        return source_identity(image.source(remote))
    except GeocentroidsError:
        return None


def _usual(items: dict[str, LabelledRecord]) -> LabelledRecord:
    """Return an item of the codebook that most are of."""
    digests = [record.codebook_digest for record in items.values()]
    return max(items.values(), key=lambda record: digests.count(record.codebook_digest))


def _codebook(name: str, settings: Settings) -> Codebook:
    return find_codebook(name, settings.codebooks_dir, allow_path=True)


def _label(
    image: ListedImage,
    settings: Settings,
    options: ReadOptions,
    codebook: Codebook,
    progress: Callable[[int], object],
) -> NDArray[np.int64]:
    """Label an image and return its histogram, of shape (K,)."""
    service = Service(bulk_settings(settings))
    try:
        source = image.source(service.remote)
        dataset = open_dataset(source, source_identity(source), options, codebook)
        histogram = Histogram(len(codebook))
        for strip in strips(service.engine(codebook).result(), dataset, dataset.footprint, progress):
            histogram.add(strip.labels)
        return histogram.counts
    finally:
        service.close()
