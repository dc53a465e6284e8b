"""What ``geocentroids classify --list`` does, from settings to a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from geocentroids_tiler.bulk.folder import LabelFolder
from geocentroids_tiler.bulk.image_list import ListedImage
from geocentroids_tiler.bulk.run import Report, Run
from geocentroids_tiler.bulk.workers import LocalWorkers, Workers
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions

NO_LIMIT = 1_000_000
"""Windows that may wait; nobody else wants any."""


def classify_list(
    images: Sequence[ListedImage],
    out: Path,
    settings: Settings,
    options: ReadOptions,
    classes: int | None = None,
    address: str | None = None,
    overwrite: bool = False,
    *,
    progress: bool = True,
) -> Report:
    """Label images, here or on a Ray cluster.

    Args:
        images: the images.
        out: folder for their labels.
        settings: what the operator chose.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
        address: of a Ray cluster; None: this process labels.
        overwrite: whether labels made in another way may be replaced.
        progress: whether progress bars are drawn.

    Raises:
        GeocentroidsError: if the run cannot be begun, or no image could be labelled.
        OSError: if the disk is full.
    """
    service = Service(bulk_settings(settings))
    with ExitStack() as stack:
        stack.callback(service.close)
        codebook = service.codebook(None)
        codebook.classes(classes)  # says at once if there is no such number
        folder = LabelFolder(out)
        stack.enter_context(folder.writing())
        workers: Workers
        if address is None:
            workers = LocalWorkers(service.engine(codebook).result(), service.remote, options, classes)
        else:
            from geocentroids_tiler.bulk.ray_workers import ray_workers

            workers = stack.enter_context(ray_workers(address, codebook, service.settings, options, classes, _tell))
        run = Run(
            images,
            folder,
            workers,
            service.remote,
            codebook,
            options,
            classes,
            overwrite=overwrite,
            progress=progress,
        )
        return run.to_the_end()


def _tell(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def bulk_settings(settings: Settings) -> Settings:
    """Return settings of a process that labels lists: no folder of labels, and no bound on what waits."""
    return settings.model_copy(update={"labels_dir": None, "queue_windows": NO_LIMIT})
