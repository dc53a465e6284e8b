"""Bytes of remote files in memory: fetched once for all that want them, in as few and as large ranges as make sense."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from geocentroids_tiler.cache import ByteCache

BLOCK_BYTES = 16 * 1024
"""Unit of what is kept. GDAL's own HTTP reader has the same."""
GAP_BLOCKS = 4
"""Blocks that nobody wants between two wanted ones, up to which both are fetched as one range: 64 KiB cost less than
another request."""
RUN_BLOCKS = 1024
"""Blocks of one range at most, 16 MiB: larger ones are split and fetched side by side."""
AT_ONCE = 8
"""Ranges of one call fetched at once."""
_ENTRY_OVERHEAD_BYTES = 512

_Key = tuple[str, str, int]
Run = tuple[int, int]
"""First block and one past the last."""


class BlockCache:
    """Blocks of files, bounded in bytes, least recently used out first. Safe for threads.

    Args:
        max_bytes: memory for blocks.
    """

    def __init__(self, max_bytes: int) -> None:
        self.kept: ByteCache[_Key, bytes] = ByteCache(max_bytes, lambda data: len(data) + _ENTRY_OVERHEAD_BYTES)
        self._lock = threading.Lock()
        self._coming: dict[_Key, Future[bytes]] = {}

    def holds(self, url: str, identity: str, block: int) -> bool:
        """Tell whether a block is in memory."""
        return self.kept.peek((url, identity, block)) is not None

    def put(self, url: str, identity: str, start: int, data: bytes) -> None:
        """Keep what was fetched from block ``start`` on; a last block that is cut short must be the file's last."""
        for offset in range(0, len(data), BLOCK_BYTES):
            self.kept.put((url, identity, start + offset // BLOCK_BYTES), data[offset : offset + BLOCK_BYTES])

    def get(
        self,
        url: str,
        identity: str,
        wanted: Iterable[int],
        fetch: Callable[[Run], bytes],
        timeout_s: Callable[[], float],
    ) -> Mapping[int, bytes]:
        """Return blocks of a file: kept, being fetched for somebody else, or fetched now.

        Args:
            url: of the file.
            identity: of its content.
            wanted: which blocks.
            fetch: returns the bytes of a run of blocks.
            timeout_s: returns how long blocks that somebody else fetches may be waited for.

        Raises:
            Exception: what ``fetch`` raises, here or for whoever fetches.
        """
        found: dict[int, bytes] = {}
        others: dict[int, Future[bytes]] = {}
        own: dict[int, Future[bytes]] = {}
        with self._lock:
            for block in wanted:
                key = (url, identity, block)
                if (data := self.kept.get(key)) is not None:
                    found[block] = data
                elif (coming := self._coming.get(key)) is not None:
                    others[block] = coming
                else:
                    own[block] = self._coming[key] = Future()
        if own:
            self._fetch(url, identity, own, fetch, found)
        for block, future in others.items():
            found[block] = future.result(timeout_s())
        return found

    def _fetch(
        self,
        url: str,
        identity: str,
        own: Mapping[int, Future[bytes]],
        fetch: Callable[[Run], bytes],
        found: dict[int, bytes],
    ) -> None:
        """Fetch blocks that were promised, and keep every promise, be it with an error."""

        def one(run: Run) -> None:
            data = fetch(run)
            self.put(url, identity, run[0], data)
            for block in range(*run):
                if block in own:
                    offset = (block - run[0]) * BLOCK_BYTES
                    found[block] = data[offset : offset + BLOCK_BYTES]

        runs = runs_of(sorted(own))
        problem: BaseException | None = None
        try:
            if len(runs) == 1:
                one(runs[0])
            else:
                # Threads of its own: in a shared pool slow servers would take the places of good ones.
                with ThreadPoolExecutor(min(len(runs), AT_ONCE), "geocentroids-fetch") as pool:
                    list(pool.map(one, runs))
        except BaseException as error:
            problem = error
            raise
        finally:
            with self._lock:
                for block, future in own.items():
                    del self._coming[url, identity, block]
                    if block in found:
                        future.set_result(found[block])
                    else:
                        future.set_exception(problem or RuntimeError("a block was not fetched"))


def runs_of(blocks: Sequence[int]) -> list[Run]:
    """Return runs that hold ``blocks``, which ascend: neighbours together, and those with a small gap between them."""
    runs: list[Run] = []
    for block in blocks:
        if runs and block - runs[-1][1] <= GAP_BLOCKS and block + 1 - runs[-1][0] <= RUN_BLOCKS:
            runs[-1] = runs[-1][0], block + 1
        else:
            runs.append((block, block + 1))
    return runs


def blocks_of(start: int, stop: int) -> range:
    """Return the blocks that hold the bytes from ``start`` to ``stop``."""
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))
