"""What a store of files elsewhere has to offer: ranges of bytes, and a text that changes when the content does."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

from geocentroids_tiler.source.deadline import Deadline

MAX_IDENTITY = 512
"""Longer identities are replaced by their digest: they are part of cache keys."""


class FetchError(Exception):
    """Why bytes did not come. For the operator's log: a stranger gets the same text for all reasons."""


class SilentError(FetchError):
    """The server did not answer, or not in time."""


class TooLargeError(FetchError):
    """The file is larger than may be read."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A range of a file.

    Attributes:
        identity: changes when the file's content does.
        data: the bytes; fewer than asked for only at the end of the file.
    """

    identity: str
    data: bytes


class ByteStore(Protocol):
    """Fetches ranges of files. Safe for threads."""

    def fetch(self, url: str, start: int, stop: int, deadline: Deadline, *, ask_again: bool = False) -> Fetched:
        """Fetch one range of bytes.

        Args:
            url: of the file.
            start: first byte.
            stop: one past the last byte.
            deadline: for all of it, retries included.
            ask_again: use nothing that was learned about the URL before.

        Raises:
            FetchError: if they do not come.
        """
        ...

    def fetch_all(self, url: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Fetch a whole file, whether or not the server knows of ranges.

        Args:
            url: of the file.
            max_bytes: the most that is read.
            deadline: for all of it, retries included.

        Raises:
            TooLargeError: if the file is larger.
            FetchError: if it does not come.
        """
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


def identity_of(etag: str, last_modified: str, size_bytes: int) -> str:
    """Return a text that changes when the content does, and ends with its size."""
    known = f"{etag}-{last_modified}"
    if len(known) > MAX_IDENTITY:
        known = hashlib.sha256(known.encode()).hexdigest()
    return f"{known}-{size_bytes}"


def size_of(identity: str) -> int:
    """Return the size in bytes that an identity names.

    Raises:
        ValueError: if it is none of ``identity_of``.
    """
    return int(identity.rpartition("-")[2])
