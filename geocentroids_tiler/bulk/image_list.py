"""The list of images of one run: a text file with a URL or a path in each line."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from geocentroids_tiler.errors import InputError, SourceRefusedError
from geocentroids_tiler.source import Remote, Source, resolve_source

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_READABLE_CHARS = 60


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image of a list.

    Attributes:
        line: where the list names it first, counted from 1.
        name: as the list names it.
        url: its URL, or the whole path of the file.
    """

    line: int
    name: str
    url: str

    @property
    def id(self) -> str:
        """A name for files and items: readable, and different for every image."""
        return image_id(self.url)

    @property
    def is_file(self) -> bool:
        """True for a file of this machine or of a shared folder, False for a URL."""
        return not _SCHEME.match(self.url)

    def source(self, remote: Remote | None) -> Source:
        """Return what is to be opened; a file may lie anywhere, for whoever writes the list is the operator.

        Args:
            remote: what fetches URLs.

        Raises:
            SourceRefusedError: if the policy forbids the URL.
        """
        if self.is_file:
            return Source(self.url, Path(self.url))
        if not self.url.lower().startswith(("http:", "https:")) and not (remote and remote.in_bucket(self.url)):
            raise SourceRefusedError(
                f"{self.url!r} is not opened; accepted: http(s) URLs, files, and files in the buckets of "
                "GEOCENTROIDS_SOURCE_BUCKETS"
            )
        return resolve_source(self.url, None, remote)


@dataclass(frozen=True, slots=True)
class Repeated:
    """A line that names an image again, and the line that names it first."""

    line: int
    name: str
    first: int


@dataclass(frozen=True, slots=True)
class ImageList:
    """What is to be labelled: each image once, in the order of the list, and the lines left out."""

    images: tuple[ListedImage, ...]
    repeated: tuple[Repeated, ...]


def read_list(file: Path) -> ImageList:
    """Read a list of images: one in each line; blank lines and those that begin with ``#`` say nothing.

    Args:
        file: the list. Relative paths in it are relative to its folder.

    Raises:
        InputError: if it cannot be read as text or names no image.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise InputError(f"the list {file} cannot be read: {reason}") from error
    first: dict[str, ListedImage] = {}
    repeated = []
    for line, name in _entries(text):
        image = ListedImage(line, name, _whole(name, file.parent))
        known = first.setdefault(image.url, image)
        if known is not image:
            repeated.append(Repeated(line, name, known.line))
    if not first:
        raise InputError(f"the list {file} names no image; it has one URL or path in each line")
    return ImageList(tuple(first.values()), tuple(repeated))


def image_of(name: str) -> ListedImage:
    """Return the image that somebody names on the command line: a URL, or a path."""
    return ListedImage(1, name, _whole(name, Path()))


def image_id(url: str) -> str:
    """Return a name for an image, of ASCII letters, digits, ``-`` and ``_``: readable, and different for every URL."""
    path = unquote(urlsplit(url).path) if _SCHEME.match(url) else url
    stem = Path(path.rstrip("/")).stem[-_READABLE_CHARS:]
    readable = "".join(char if char.isascii() and (char.isalnum() or char in "-_") else "_" for char in stem)
    return f"{readable or 'image'}-{hashlib.sha256(url.encode(errors='surrogatepass')).hexdigest()[:12]}"


def _entries(text: str) -> Iterator[tuple[int, str]]:
    for line, content in enumerate(text.split("\n"), start=1):
        name = content.strip()
        if name and not name.startswith("#"):
            yield line, name


def _whole(name: str, folder: Path) -> str:
    """Return a URL as it is, and the whole path of a file."""
    return name if _SCHEME.match(name) else os.path.normpath((folder / name).absolute())
