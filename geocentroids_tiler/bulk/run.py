"""A run over a list: what is done already is left out, the rest is labelled and kept, failures are listed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import NoReturn

from tqdm import tqdm

from geocentroids_tiler.bulk.folder import Failure, LabelFolder
from geocentroids_tiler.bulk.image_list import ListedImage
from geocentroids_tiler.bulk.items import Making
from geocentroids_tiler.bulk.labelling import Labelled, Task, look_at
from geocentroids_tiler.bulk.workers import Workers
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.source import ReadOptions, Remote, source_identity

LOOK_THREADS = 16
"""Images looked at at once before any is labelled; most of the time they wait for a network or a disk."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became of a list.

    Attributes:
        labelled: images labelled now.
        reused: images whose labels were there already.
        failures: the others, in the order of the list.
    """

    labelled: int
    reused: int
    failures: tuple[Failure, ...]


class Run:
    """Labels the images of a list.

    Args:
        images: the images.
        folder: where labels go; the caller is in its ``writing`` block.
        workers: who labels.
        remote: what fetches URLs.
        codebook: whose labels.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
        overwrite: whether labels made in another way may be replaced.
        progress: whether progress bars are drawn.
    """

    def __init__(
        self,
        images: Sequence[ListedImage],
        folder: LabelFolder,
        workers: Workers,
        remote: Remote,
        codebook: Codebook,
        options: ReadOptions,
        classes: int | None = None,
        *,
        overwrite: bool = False,
        progress: bool = True,
    ) -> None:
        self._images, self._folder, self._workers = images, folder, workers
        self._remote, self._codebook, self._options = remote, codebook, options
        self._making = Making.of(codebook, workers.device_name, classes, options)
        self._overwrite, self._progress = overwrite, progress

    def to_the_end(self) -> Report:
        """Label all images that are not done.

        Raises:
            InputError: if labels made in another way are in the folder and may not be replaced.
            EncoderError: if labels cannot be computed.
            OSError: if the disk is full.
        """
        if not self._overwrite:
            self._folder.check_making(self._images, self._making)
        looked = list(self._look())
        tasks = [found for found in looked if isinstance(found, Task)]
        failed = {found.image: found for found in looked if isinstance(found, Failure)}
        with tqdm(
            total=sum(task.chunks for task in tasks), unit="chunk", disable=not self._progress, smoothing=0.1
        ) as bar:
            bars = _Bar(bar, tasks)
            with closing(self._workers.label(tasks, self._folder.work, bars.show)) as outcomes:
                for outcome in outcomes:
                    if isinstance(outcome, Labelled):
                        self._folder.keep(outcome.task.image, outcome.labels, outcome.item)
                        bars.show(outcome.task, outcome.task.chunks)
                        bars.end(outcome.task.image)
                    else:
                        failed[outcome.image] = outcome
                        bars.end(outcome.image)
        failures = tuple(failed[image] for image in self._images if image in failed)
        self._folder.finish(failures, self._codebook)
        reused = len(self._images) - len(tasks) - sum(isinstance(found, Failure) for found in looked)
        return Report(len(self._images) - reused - len(failures), reused, failures)

    def _look(self) -> Iterator[Task | Failure | None]:
        """Yield for each image what there is to do, why it cannot be done, or None if it is done."""
        with (
            ThreadPoolExecutor(LOOK_THREADS, "geocentroids-look") as pool,
            tqdm(total=len(self._images), unit="image", desc="looking", disable=not self._progress, leave=False) as bar,
        ):
            try:
                for found in pool.map(self._look_at, self._images):
                    bar.update()
                    yield found
            finally:
                pool.shutdown(cancel_futures=True)

    def _look_at(self, image: ListedImage) -> Task | Failure | None:
        try:
            identity = source_identity(image.source(self._remote))
            if self._folder.finished(image, identity, self._making):
                return None
            return look_at(image, identity, self._remote, self._options, self._codebook)
        except GeocentroidsError as error:
            return Failure(image, str(error))
        except Exception as error:  # one image of thousands shall not end the run, whatever is wrong with it
            return Failure(image, f"unexpected {type(error).__name__}: {error}")


class _Bar:
    """One progress bar for all images, in chunks; threads tell it how far they are."""

    def __init__(self, bar: tqdm[NoReturn], tasks: Sequence[Task]) -> None:
        self._bar = bar
        self._lock = threading.Lock()
        self._chunks = {task.image: task.chunks for task in tasks}
        self._shown = dict.fromkeys(self._chunks, 0)
        self._ended = 0

    def show(self, task: Task, done: int) -> None:
        """Show that so many chunks of an image are done."""
        with self._lock:
            self._move(task.image, done)

    def end(self, image: ListedImage) -> None:
        """Show that an image is done with; of one that failed, the other chunks are not waited for any more."""
        with self._lock:
            self._ended += 1
            self._bar.total = (self._bar.total or 0) + self._shown[image] - self._chunks[image]
            self._move(image, self._shown[image])

    def _move(self, image: ListedImage, done: int) -> None:
        self._bar.set_description(f"{image.id[:30]} ({self._ended} of {len(self._chunks)} done)", refresh=False)
        self._bar.update(done - self._shown[image])
        self._shown[image] = done
