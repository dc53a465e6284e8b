"""The images that a codebook is fitted on: which there are, and opening them as the server would."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.source import (
    Dataset,
    ReadOptions,
    Remote,
    Source,
    open_dataset,
    resolve_source,
    source_identity,
)

SUFFIXES = (".tif", ".tiff")
AS_THEY_ARE = ReadOptions()
"""8-bit images whose bands say what they are."""
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Images of one fit.

    Attributes:
        folder: where local images lie.
        names: paths relative to it, and URLs.
        options: how bands become 8-bit RGB.
        remote: opens images that are named by URL; None: none are.
    """

    folder: Path | None
    names: tuple[str, ...]
    options: ReadOptions = AS_THEY_ARE
    remote: Remote | None = None

    def source(self, name: str) -> Source:
        """Return where an image is.

        Raises:
            SourceUnavailableError: if a local one is not there.
            SourceRefusedError: if it is no http(s) URL or lies outside of the folder.
        """
        return resolve_source(name, self.folder, self.remote)

    def identity(self, name: str) -> str:
        """Return a text that changes when the image does.

        Raises:
            SourceUnavailableError: if it is not there.
            SourceRefusedError: if it is no http(s) URL or lies outside of the folder.
        """
        return source_identity(self.source(name))

    def open(self, name: str, codebook: Codebook) -> Dataset:
        """Open an image as serving does with a codebook.

        Raises:
            GeocentroidsError: if it cannot be read, or is not an image that the codebook could classify.
        """
        source = self.source(name)
        return open_dataset(source, source_identity(source), self.options, codebook)


def list_images(folder: Path, exclude: Sequence[str] = ()) -> list[str]:
    """Return the GeoTIFFs below a folder, as sorted paths relative to it.

    Args:
        folder: where to look, at any depth.
        exclude: patterns such as ``*/mask/*``; a path that matches one is left out.

    Raises:
        InputError: if there is no such folder or no image is left.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a folder of GeoTIFFs")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.is_file()
    )
    hint = "geocentroids-fit prepare makes them of other images"
    return leave_out(folder, found, exclude, "GeoTIFF (*.tif, *.tiff)", hint)


def leave_out(folder: Path, names: Sequence[str], exclude: Sequence[str], kind: str, hint: str) -> list[str]:
    """Return the names that no pattern matches.

    Args:
        folder: where they lie, for the message.
        names: paths relative to it.
        exclude: patterns such as ``*/mask/*``.
        kind: what they are, for the message.
        hint: what helps if there are none.

    Raises:
        InputError: if none is left.
    """
    kept = [name for name in names if not any(fnmatch(name, pattern) for pattern in exclude)]
    if not kept:
        left_out = f" that --exclude does not leave out (it leaves out all {len(names)})" if names else ""
        raise InputError(f"{folder} holds no {kind}{left_out}; {hint}")
    return kept


def in_pool(pool: Executor, function: Callable[[T], R]) -> Callable[[T], Future[R]]:
    """Return what begins a function of one item in a pool."""
    return lambda item: pool.submit(function, item)


def ahead(begin: Callable[[T], Future[R]], items: Iterable[T], count: int) -> Iterator[tuple[T, Future[R]]]:
    """Yield items in order with what ``begin`` makes of them, begun up to ``count`` items before their turn."""
    waiting: deque[tuple[T, Future[R]]] = deque()
    for item in items:
        waiting.append((item, begin(item)))
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
