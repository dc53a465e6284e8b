"""Who labels the images of a list: here, threads of this process that share one engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

from geocentroids_tiler.bulk.folder import Failure
from geocentroids_tiler.bulk.labelling import Labelled, Task, label_image
from geocentroids_tiler.errors import EncoderError, GeocentroidsError
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.source import ReadOptions, Remote

AT_ONCE = 2
"""Images that one engine labels at once, so that it has work while one of them is opened or written."""

Progress = Callable[[Task, int], object]
"""Told of an image and of how many of its chunks are done; less than before if it has to be begun anew."""


class Workers(Protocol):
    """Labels images somewhere."""

    device_name: str
    """What computes labels, the same for all of them."""

    def label(self, tasks: Sequence[Task], work: Path, progress: Progress) -> Generator[Labelled | Failure]:
        """Yield what became of each image, in the order in which they are finished.

        Args:
            tasks: the images.
            work: an existing folder of this machine for the files of labels.
            progress: told how far images are.

        Raises:
            EncoderError: if labels cannot be computed.
            OSError: if files cannot be written.
        """
        ...


class StoppedError(Exception):
    """The run is about to end."""


class LocalWorkers:
    """Threads of this process.

    Args:
        engine: computes labels.
        remote: what fetches URLs.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
    """

    def __init__(self, engine: LabelEngine, remote: Remote, options: ReadOptions, classes: int | None) -> None:
        self._engine, self._remote, self._options, self._classes = engine, remote, options, classes
        self.device_name = engine.device_name

    def label(self, tasks: Sequence[Task], work: Path, progress: Progress) -> Generator[Labelled | Failure]:
        """Yield what became of each image; see ``Workers``."""
        stopping = threading.Event()
        left, running = deque(tasks), set[Future[Labelled | Failure]]()
        with ThreadPoolExecutor(AT_ONCE, "geocentroids-image") as pool:
            try:
                while left or running:
                    while left and len(running) < AT_ONCE:
                        running.add(pool.submit(self.one, left.popleft(), work, progress, stopping))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                stopping.set()

    def one(self, task: Task, work: Path, progress: Progress, stopping: threading.Event) -> Labelled | Failure:
        """Label one image, or say why that cannot be done.

        Raises:
            StoppedError: once ``stopping`` is set.
            EncoderError: if no image can be labelled.
            OSError: if files cannot be written.
        """
        done = 0

        def count(chunks: int) -> None:
            nonlocal done
            if stopping.is_set():
                raise StoppedError
            done += chunks
            progress(task, done)

        try:
            return label_image(task, self._engine, self._remote, self._options, self._classes, work, count)
        except (EncoderError, OSError, StoppedError):
            raise
        except GeocentroidsError as error:
            return Failure(task.image, str(error))
        except Exception as error:  # one image of thousands shall not end the run, whatever is wrong with it
            return Failure(task.image, f"unexpected {type(error).__name__}: {error}")
