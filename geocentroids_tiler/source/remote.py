"""Remote files, as GDAL may read them: through a cache of blocks, within a time and a number of bytes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from urllib.parse import urlsplit

from cachetools import LRUCache

from geocentroids_tiler.errors import (
    GeocentroidsError,
    MosaicError,
    SourceChangedError,
    SourceUnavailableError,
    UnsupportedImageError,
)
from geocentroids_tiler.source.blocks import BLOCK_BYTES, BlockCache, Run, blocks_of
from geocentroids_tiler.source.deadline import Deadline
from geocentroids_tiler.source.policy import RemotePolicy
from geocentroids_tiler.source.stores import ByteStore, Fetched, FetchError, SilentError, TooLargeError, size_of
from geocentroids_tiler.source.waiting import waiting

logger = logging.getLogger(__name__)

HEADER_BYTES = 64 * 1024
"""Fetched with the first request for a file: most headers fit in."""
READ_AHEAD_BLOCKS = 4
"""Blocks fetched where a file is read piece by piece, as headers are."""
HELD_BLOCKS = 256
"""Blocks, 4 MiB, that an open file holds on to: those read first, which are its header's."""
MAX_REMEMBERED = 4096
"""Sources of which something is remembered."""


class Remote:
    """Opens remote files. Safe for threads.

    Args:
        policy: which URLs may be opened.
        web: fetches http(s) URLs.
        buckets: fetches files of buckets that the operator named, by the start of their URLs (``s3://bucket/``).
        cache_bytes: memory for what was fetched.
        read_s: longest time for all that one opening of a file waits for.
        read_bytes: most bytes that one opening of a file may fetch.
        failure_s: time for which a server that did not answer is not asked again.
    """

    def __init__(
        self,
        policy: RemotePolicy,
        web: ByteStore,
        *,
        buckets: Mapping[str, ByteStore] | None = None,
        cache_bytes: int = 64 * 2**20,
        read_s: float = 60.0,
        read_bytes: int = 512 * 2**20,
        failure_s: float = 3.0,
    ) -> None:
        self.policy = policy
        self.read_bytes = read_bytes
        self.blocks = BlockCache(cache_bytes)
        self._web = web
        self._buckets = dict(buckets or {})
        self._read_s = read_s
        self._failure_s = failure_s
        self._lock = threading.Lock()
        self._identities: LRUCache[str, str] = LRUCache(MAX_REMEMBERED)
        self._silent: LRUCache[str, Deadline] = LRUCache(MAX_REMEMBERED)
        self._outdated: LRUCache[str, bool] = LRUCache(MAX_REMEMBERED)

    def close(self) -> None:
        """Close all connections."""
        for store in (self._web, *self._buckets.values()):
            store.close()

    def in_bucket(self, url: str) -> bool:
        """Tell whether a URL is of a file in a bucket that the operator named."""
        return any(url.startswith(prefix) for prefix in self._buckets)

    def identity(self, url: str) -> str:
        """Ask a source for what changes when its content does; its first bytes come along if they are not here yet.

        Raises:
            SourceUnavailableError: if it cannot be read.
        """
        with self._lock:
            known = self._identities.get(url)
        here = known is not None and self.blocks.holds(url, known, 0)
        try:
            with waiting():
                fetched = self._ask(url, 0, 1 if here else HEADER_BYTES, Deadline(self._read_s), ask_again=True)
            size_bytes = size_of(fetched.identity)
        except (FetchError, ValueError) as error:
            raise self._unavailable(url, error) from error
        if not here and len(fetched.data) == min(HEADER_BYTES, size_bytes):
            self.blocks.put(url, fetched.identity, 0, fetched.data)
        with self._lock:
            self._identities[url] = fetched.identity
            self._outdated.pop(fetched.identity, None)
        return fetched.identity

    def document(self, url: str, max_bytes: int, deadline: Deadline) -> bytes:
        """Return the content of a document, asked for anew.

        Args:
            url: of the document.
            max_bytes: the most that it may have.
            deadline: for all of it.

        Raises:
            SourceUnavailableError: if it cannot be read.
            MosaicError: if it is too large.
        """
        try:
            with waiting():
                return self._store(url).fetch_all(url, max_bytes, deadline)
        except TooLargeError as error:
            raise MosaicError(f"{url!r} has more than {max_bytes} bytes (GEOCENTROIDS_MOSAIC_BYTES)") from error
        except FetchError as error:
            raise self._unavailable(url, error) from error

    def is_outdated(self, identity: str) -> bool:
        """Tell whether a source was seen to have changed since it had this identity."""
        with self._lock:
            return identity in self._outdated

    def open(self, url: str, identity: str) -> RemoteFile:
        """Open a file; nothing is asked for before it is read."""
        return RemoteFile(self, url, identity, Deadline(self._read_s), self.read_bytes)

    def fetch_blocks(self, url: str, identity: str, wanted: Iterable[int], deadline: Deadline) -> Mapping[int, bytes]:
        """Return blocks of a file.

        Raises:
            SourceUnavailableError: if they cannot be read.
            SourceChangedError: if the file is no longer what ``identity`` says.
        """
        size_bytes = size_of(identity)

        def fetch(run: Run) -> bytes:
            start, stop = run[0] * BLOCK_BYTES, min(run[1] * BLOCK_BYTES, size_bytes)
            fetched = self._ask(url, start, stop, deadline)
            if fetched.identity != identity:
                with self._lock:
                    self._outdated[identity] = True
                raise SourceChangedError(f"{url!r} changed while it was read; ask again")
            return fetched.data

        try:
            return self.blocks.get(url, identity, wanted, fetch, deadline.left_s)
        except (FetchError, TimeoutError) as error:
            raise self._unavailable(url, error) from error

    def _ask(self, url: str, start: int, stop: int, deadline: Deadline, *, ask_again: bool = False) -> Fetched:
        """Fetch a range, unless the server did not answer a moment ago."""
        store = self._store(url)
        with self._lock:
            silent = self._silent.get(url)
        if silent is not None and silent.allows(0):
            raise FetchError("it did not answer a moment ago")
        try:
            return store.fetch(url, start, stop, deadline, ask_again=ask_again)
        except SilentError:
            with self._lock:
                self._silent[url] = Deadline(self._failure_s)
            raise

    def _store(self, url: str) -> ByteStore:
        return next((store for prefix, store in self._buckets.items() if url.startswith(prefix)), self._web)

    def _unavailable(self, url: str, error: Exception) -> SourceUnavailableError:
        """Say to the operator why a source cannot be read, and to the user that it cannot."""
        parts = urlsplit(url)  # without its query, which may carry a signature
        logger.warning("%s://%s%s: %s", parts.scheme, parts.netloc, parts.path, error)
        return SourceUnavailableError(f"cannot open {url!r}")


class RemoteFile:
    """A file for one task.

    GDAL takes bytes that do not come for an end of the file, and goes on. So what went wrong is kept here, and whoever
    uses what GDAL made of the file has to call ``check`` first. What is read in order, as headers are, stays the same
    for as long as the file is open: what was judged is what GDAL sees.
    """

    def __init__(self, remote: Remote, url: str, identity: str, deadline: Deadline, budget_bytes: int) -> None:
        self.size_bytes = size_of(identity)
        self._remote = remote
        self._url = url
        self._identity = identity
        self._deadline = deadline
        self._budget_bytes = self._left_bytes = budget_bytes
        self._held: dict[int, bytes] = {}
        self._problem: GeocentroidsError | None = None

    def check(self) -> None:
        """Raise what went wrong while the file was read.

        Raises:
            SourceUnavailableError: if bytes did not come.
            SourceChangedError: if the file has changed.
            UnsupportedImageError: if it takes too many bytes.
        """
        if self._problem is not None:
            raise self._problem

    def read_at(self, start: int, count: int) -> bytes:
        """Return ``count`` bytes, fewer at the end of the file.

        Raises:
            SourceUnavailableError: if they do not come.
            SourceChangedError: if the file has changed.
            UnsupportedImageError: if it takes too many bytes.
        """
        stop = min(start + count, self.size_bytes)
        if stop <= start:
            return b""
        wanted = blocks_of(start, stop)
        if all(block in self._held for block in wanted):
            return _cut(self._held, start, stop)
        last = blocks_of(0, self.size_bytes)[-1]
        ahead = range(wanted[0], max(wanted[-1], min(wanted[0] + READ_AHEAD_BLOCKS - 1, last)) + 1)
        blocks = {**self._get(block for block in ahead if block not in self._held)}
        if len(self._held) + len(blocks) <= HELD_BLOCKS:
            self._held.update(blocks)
            return _cut(self._held, start, stop)
        return _cut(blocks | {block: self._held[block] for block in wanted if block in self._held}, start, stop)

    def read_or_note(self, start: int, count: int) -> bytes:
        """Read as ``read_at`` does, and note what goes wrong; after that there are no more bytes."""
        if self._problem is None:
            try:
                return self.read_at(start, count)
            except GeocentroidsError as error:
                self._problem = error
        return b""

    def ranges_or_note(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Return ranges of bytes, of exactly these sizes, and note what goes wrong; after that they are zeros."""
        ranges = [(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
        if self._problem is None:
            try:
                if any(stop > self.size_bytes for _, stop in ranges):
                    raise SourceUnavailableError(f"cannot open {self._url!r}")  # it points beyond its end
                blocks = self._get(sorted({block for start, stop in ranges for block in blocks_of(start, stop)}))
                return [_cut(blocks, start, stop) for start, stop in ranges]
            except GeocentroidsError as error:
                self._problem = error
        return [bytes(size) for size in sizes]

    def _get(self, wanted: Iterable[int]) -> Mapping[int, bytes]:
        blocks = list(wanted)
        missing = sum(not self._remote.blocks.holds(self._url, self._identity, block) for block in blocks)
        self._left_bytes -= missing * BLOCK_BYTES
        if self._left_bytes < 0:
            raise UnsupportedImageError(
                f"more than {self._budget_bytes} bytes of the image are needed for a small part of it "
                "(GEOCENTROIDS_SOURCE_READ_BYTES); write it as a Cloud Optimized GeoTIFF"
            )
        with waiting() if missing else nullcontext():
            return self._remote.fetch_blocks(self._url, self._identity, blocks, self._deadline)


def _cut(blocks: Mapping[int, bytes], start: int, stop: int) -> bytes:
    """Return the bytes from ``start`` to ``stop`` of blocks that hold them."""
    wanted = blocks_of(start, stop)
    data = blocks[wanted[0]] if len(wanted) == 1 else b"".join(blocks[block] for block in wanted)
    offset = wanted[0] * BLOCK_BYTES
    return data[start - offset : stop - offset]
