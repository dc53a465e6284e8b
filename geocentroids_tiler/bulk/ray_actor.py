"""What a process on a node of a Ray cluster does: it holds an engine and labels the images it is given."""

from __future__ import annotations

import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geocentroids_tiler.bulk.folder import Failure
from geocentroids_tiler.bulk.labelling import Task
from geocentroids_tiler.bulk.workers import LocalWorkers
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.distributed import code_version
from geocentroids_tiler.errors import SourceChangedError, SourceUnavailableError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings, load_settings
from geocentroids_tiler.source import ReadOptions, source_identity


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a worker says of itself before it gets work; all have to say the same.

    Attributes:
        version: of the code.
        codebook: digest of the codebook.
        device: what computes labels.
    """

    version: str
    codebook: str
    device: str


@dataclass(frozen=True, slots=True)
class Result:
    """Labels of an image on their way back: the file's content, and the item."""

    labels: bytes
    item: dict[str, Any]


class RayWorker:
    """Labels images on a node.

    Args:
        codebook: name of the codebook, or its directory on the node.
        options: how bands become RGB.
        classes: number of classes that labels are merged to; None: none are.
        address: of the node, for messages.
    """

    def __init__(self, codebook: str, options: ReadOptions, classes: int | None, address: str) -> None:
        self._address = address
        self._service = Service(node_settings(codebook))
        self._codebook = self._service.codebook(None)
        engine = self._service.engine(self._codebook).result()
        self._workers = LocalWorkers(engine, self._service.remote, options, classes)
        self._done: dict[str, int] = {}

    def introduce(self) -> Introduction:
        """Say what it is."""
        return Introduction(code_version(), self._codebook.digest, self._workers.device_name)

    def progress(self) -> dict[str, int]:
        """Return how many chunks of each image in work are done, by the image's id."""
        return dict(self._done)

    def label(self, task: Task) -> Result | Failure:
        """Label an image, or say why that cannot be done.

        Raises:
            EncoderError: if no image can be labelled.
            OSError: if the node's disk is full.
        """
        if (reason := self._not_here(task)) is not None:
            return Failure(task.image, reason)
        self._done[task.image.id] = 0
        try:
            with tempfile.TemporaryDirectory(prefix="geocentroids-") as work:
                outcome = self._workers.one(task, Path(work), self._count, threading.Event())
                if isinstance(outcome, Failure):
                    return outcome
                return Result(outcome.labels.read_bytes(), outcome.item)
        finally:
            del self._done[task.image.id]

    def _count(self, task: Task, chunks: int) -> None:
        self._done[task.image.id] = chunks

    def _not_here(self, task: Task) -> str | None:
        """Say if a file is not the one that the driver looked at, or return None."""
        if not task.image.is_file:
            return None
        node = f"node {self._address} ({socket.gethostname()})"
        try:
            identity = source_identity(task.image.source(None))
        except SourceUnavailableError:
            return f"{node} has no file {task.image.url!r}; local images have to lie in a folder that all nodes share"
        except SourceChangedError as error:
            return str(error)
        if identity != task.identity:
            return f"{node} has another version of {task.image.url!r}; all nodes have to see the same files"
        return None


def codebook_digest(codebook: str) -> str:
    """Return the digest of a codebook as this process finds it.

    Args:
        codebook: its name, or its directory.

    Raises:
        CodebookError: if it is not there or broken.
    """
    return _find(codebook).digest


def node_settings(codebook: str) -> Settings:
    """Return the settings of a process on a node, which come from its environment."""
    from geocentroids_tiler.bulk.command import bulk_settings

    return bulk_settings(load_settings(codebook=codebook))


def _find(codebook: str) -> Codebook:
    return find_codebook(codebook, load_settings().codebooks_dir, allow_path=True)
