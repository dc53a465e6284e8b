"""One image of a list: looked at ahead, then opened and labelled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from geocentroids_tiler.bulk.folder import label_file
from geocentroids_tiler.bulk.image_list import ListedImage
from geocentroids_tiler.bulk.items import Histogram, Making, label_item, labels_name, time_taken
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import SourceChangedError
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.export import check_unchanged, classify
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    Remote,
    Source,
    check_structure,
    open_raster,
    place,
    source_identity,
    with_collars,
)


@dataclass(frozen=True, slots=True)
class Task:
    """An image that is to be labelled.

    Attributes:
        image: the image.
        identity: of its content.
        chunks: how many there are to compute.
    """

    image: ListedImage
    identity: str
    chunks: int


@dataclass(frozen=True, slots=True)
class Labelled:
    """An image that was labelled.

    Attributes:
        task: the image.
        labels: the file of its labels, a Cloud Optimized GeoTIFF.
        item: its STAC item.
    """

    task: Task
    labels: Path
    item: dict[str, Any]


def look_at(image: ListedImage, identity: str, remote: Remote, options: ReadOptions, codebook: Codebook) -> Task:
    """Find out from an image's header whether it can be labelled, and how much there is to do.

    Args:
        image: the image.
        identity: of its content.
        remote: what fetches URLs.
        options: how bands become RGB.
        codebook: what it will be labelled with.

    Raises:
        GeocentroidsError: if it cannot be opened or labelled.
    """
    manifest = codebook.manifest
    source = image.source(remote)
    with open_raster(source, identity) as raster:
        check_structure(raster)
        dataset = place(raster, source, identity, options, manifest.preprocess, manifest.encoder.patch_px)
    return Task(image, identity, dataset.chunk_count)


def label_image(
    task: Task,
    engine: LabelEngine,
    remote: Remote,
    options: ReadOptions,
    classes: int | None,
    work: Path,
    progress: Callable[[int], object] = lambda chunks: None,
) -> Labelled:
    """Label an image.

    Args:
        task: the image.
        engine: computes the labels.
        remote: what fetches URLs.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
        work: an existing folder that the labels are written to.
        progress: called with the number of chunks finished since the last call; what it raises ends the work.

    Raises:
        GeocentroidsError: if the image cannot be opened or labelled, or changed since it was looked at.
        OSError: if ``work`` cannot be written to.
    """
    source, codebook = task.image.source(remote), engine.codebook
    if source_identity(source) != task.identity:
        raise SourceChangedError(f"{task.image.url!r} is not what it was when the list was read; run it again")
    dataset, taken_at = _open(source, task.identity, options, codebook)
    histogram = Histogram(len(codebook))

    def count(strip: LabelBlock) -> None:
        histogram.add(strip.labels)

    labels = work / labels_name(task.image.id)
    classify(engine, dataset, codebook.classes(classes), labels, progress, count)
    check_unchanged(dataset)
    making = Making.of(codebook, engine.device_name, classes, options)
    item = label_item(task.image, dataset, taken_at, codebook, making, histogram, label_file(labels))
    return Labelled(task, labels, item)


def _open(source: Source, identity: str, options: ReadOptions, codebook: Codebook) -> tuple[Dataset, datetime | None]:
    """Open an image as ``open_dataset`` does, and read when it was taken."""
    manifest = codebook.manifest
    with open_raster(source, identity) as raster:
        check_structure(raster)
        placed = place(raster, source, identity, options, manifest.preprocess, manifest.encoder.patch_px)
        return with_collars(placed, raster), time_taken(raster.tags().get("TIFFTAG_DATETIME"))
