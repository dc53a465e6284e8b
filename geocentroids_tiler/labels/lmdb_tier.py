"""Labels of chunks on a local disk, in an LMDB that the processes of one machine share.

Two tables: entries in the order they were written, under a number that only grows, and the number of each key. Writing
appends, so pages are full and neighbours on the ground are neighbours on the disk.

When the store is full the entries written first go, exactly in that order: whole pages fall free at the front, a write
costs the same for ever, and a read writes nothing. (Least recently used out first would turn every read into a write,
with a lock that all processes share. Two halves thrown away in turn would leave half of the bound unused on average.)

Each transaction is synced, its meta page is not (``metasync=False``): a power cut may lose the last transactions and
never the structure, because pages in use are never overwritten. ``sync=False`` would be faster and could lose it,
``writemap`` would let a stray pointer write into it.
"""

from __future__ import annotations

import fcntl
import logging
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

import lmdb

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.store import ChunkKey, ChunkLabels
from geocentroids_tiler.labels.tiers import (
    DIGEST_BYTES,
    FORMAT_VERSION,
    Tally,
    batches,
    decode_labels,
    encode_labels,
    key_digest,
)

logger = logging.getLogger(__name__)

MIN_BYTES = 2**20
"""Smallest bound that leaves room to work in; below 16 MiB a write may find no free page and be dropped."""
_SETTING = "GEOCENTROIDS_LABEL_STORE_DIR"
_FORMAT_KEY, _FORMAT = b"geocentroids labels", b"%d" % FORMAT_VERSION
_LOCK_BYTES = 64 * 1024
"""Left of the bound for the table of readers, which is a file beside."""
_MAX_READERS = 512
"""Read transactions at once, of all processes; 64 bytes each."""
_TRANSACTIONS_AHEAD = 3
"""Pages that fall free in a transaction are used again two later, so that free pages must do for three."""
_FEWEST_FREE, _MOST_FREE, _FREE_SHARE = 96, 4096, 1 / 8
"""Pages kept free: a share of all within bounds. The most let 500 chunks go into one transaction."""
_FIXED_PAGES = 16
"""Pages that any transaction writes: roots, branches, the list of free pages, entries at the front."""
_ENTRY_OVERHEAD_BYTES = 40
"""Node header, number and digest beside a stored value."""
_EVICT_AT_ONCE = 8
_RESIZE_PATIENCE_S = 1.0
_NUMBER_BYTES = 8

_Entry = tuple[bytes, bytes]
"""Digest of a key, and its labels as they are stored."""
T = TypeVar("T")


class LmdbTier:
    """A label store on disk. Safe for threads, and for processes that open the same folder.

    LMDB may be opened once in a process: tiers of the same folder share what the first one opened, its bound included.
    A process that was forked while a store was open finds nothing in it and writes nothing; workers that are spawned
    open the folder themselves.
    """

    name = "lmdb"
    away = False
    """It is on this machine."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Open or create the store in ``folder``; its files take up to ``max_bytes`` on disk.

        A store of another format version, or one larger than ``max_bytes``, is emptied. Processes that have it open
        keep what they have until they end.

        Raises:
            InputError: if the folder cannot be written, or holds an LMDB or a ``data.mdb`` that is no label store.
        """
        self._errors = Tally()
        self._told: set[str] = set()
        self._closed = False
        self._store = _share(folder, max_bytes)

    @property
    def errors(self) -> int:
        """Transactions that failed and values that could not be read, since the start."""
        return self._errors.count

    @property
    def nbytes(self) -> int:
        """Bytes of the store's file, free pages included; 0 when it is closed."""
        return self._attempt(self._store.file_bytes, 0)

    def get_many(self, keys: Sequence[ChunkKey]) -> list[ChunkLabels | None]:
        """Return the labels of each key, None where there are none that can be read."""
        found: list[ChunkLabels | None] = []
        for batch in batches(keys):
            digests = [key_digest(key) for key in batch]
            nothing: list[bytes | None] = [None] * len(digests)
            values = self._attempt(partial(self._store.read, digests), nothing)
            for digest, value in zip(digests, values, strict=True):
                chunk = None if value is None else decode_labels(digest, value)
                self._errors.add(value is not None and chunk is None)
                found.append(chunk)
        return found

    def put_many(self, items: Sequence[tuple[ChunkKey, ChunkLabels]]) -> None:
        """Keep labels, and let those written first go for them; where a transaction fails the rest is dropped.

        Raises:
            ValueError: if labels are not what ``encode_labels`` takes.
        """
        entries = [(digest := key_digest(key), encode_labels(digest, chunk)) for key, chunk in items]
        while entries:
            entries = self._attempt(partial(self._store.write, entries), [])

    def close(self) -> None:
        """Wait for calls under way; the last tier of a folder closes its files."""
        with _opened_lock:
            if not self._closed:
                self._closed = True
                _let_go(self._store)

    def _attempt(self, work: Callable[[], T], otherwise: T) -> T:
        """Do something with the store; where it fails or is closed, count and return ``otherwise``."""
        try:
            with self._store.use() as usable:
                if usable and not self._closed:
                    return work()
        except lmdb.MapFullError as error:
            self._count(error)
            self._store.relieve()
        except lmdb.MapResizedError as error:  # by a process with a larger bound
            self._count(error)
            self._store.adopt_size()
        except (lmdb.Error, OSError) as error:
            self._count(error)
        return otherwise

    def _count(self, error: Exception) -> None:
        """Count a failure; the first of each kind is logged."""
        self._errors.add()
        kind = type(error).__name__
        if kind not in self._told:
            self._told.add(kind)
            logger.warning("label store %s: %s; counted from now on", self._store.folder, error)


class _Store:
    """The one opening of a folder that this process has."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.tiers = 0
        self._env, self._data, self._index = _open(folder, max_bytes)
        self._page_bytes = self._env.stat()["psize"]
        pages = _map_bytes(max_bytes) // self._page_bytes
        free = min(max(int(pages * _FREE_SHARE), _FEWEST_FREE), _MOST_FREE)
        self._max_pages = pages - free
        self._pages_at_once = free // _TRANSACTIONS_AHEAD - _FIXED_PAGES
        self._pid = os.getpid()
        self._idle = threading.Condition()
        self._users = 0
        self._closed = False

    @contextmanager
    def use(self) -> Iterator[bool]:
        """Keep the files open while the block runs; false if they are closed already, or another process's."""
        if self._pid != os.getpid():
            yield False
            return
        with self._idle:
            usable = not self._closed
            self._users += 1
        try:
            yield usable
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    def close(self) -> None:
        """Close the files when nothing uses them any more."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._users == 0)
            self._env.close()

    def adopt_size(self) -> None:
        """Take over the size that another process gave the file, unless others keep using it; then the next may."""
        with self._idle:
            if self._idle.wait_for(lambda: self._users == 0, _RESIZE_PATIENCE_S) and not self._closed:
                with suppress(lmdb.Error):
                    self._env.set_mapsize(0)

    def file_bytes(self) -> int:
        """Return the size of the file."""
        return int((self._env.info()["last_pgno"] + 1) * self._page_bytes)

    def read(self, digests: Sequence[bytes]) -> list[bytes | None]:
        """Return what is stored under each digest: None if nothing, empty if what is there is of another key."""
        found: list[bytes | None] = []
        with self._env.begin() as txn:
            for digest in digests:
                number = txn.get(digest, db=self._index)
                row = None if number is None else txn.get(number, default=b"", db=self._data)
                if row is not None:
                    row = row[DIGEST_BYTES:] if row.startswith(digest) else b""
                found.append(row)
        return found

    def write(self, entries: Sequence[_Entry]) -> list[_Entry]:
        """Write in one transaction as many entries as it has room for, one at least; return the others.

        One that is there already, bit for bit, keeps its place in the order.
        """
        with self._env.begin(write=True) as txn:
            index_pages = self._pages(txn, self._index)
            place = self._last(txn)
            pages, written = 0.0, 0
            for i, (digest, value) in enumerate(entries):
                number = txn.get(digest, db=self._index)
                if number is not None:
                    if txn.get(number, db=self._data) == digest + value:
                        continue
                    txn.delete(number, db=self._data)
                own_pages = self._pages_of(value)
                # An entry changes a page of the index, and the one that goes for it another.
                if written and pages + own_pages + min(2 * (written + 1), index_pages) > self._pages_at_once:
                    return list(entries[i:])
                self._evict(txn, self._max_pages - math.ceil(own_pages))
                place += 1
                number = place.to_bytes(_NUMBER_BYTES, "big")
                txn.put(number, digest + value, append=True, db=self._data)
                txn.put(digest, number, db=self._index)
                pages += own_pages
                written += 1
        return []

    def relieve(self) -> None:
        """After a transaction found no free page: free those of readers that died, and a quarter of the entries."""
        with suppress(lmdb.Error), self.use() as usable:
            if usable:
                self._env.reader_check()
                with self._env.begin(write=True) as txn:
                    self._evict(txn, self._max_pages * 3 // 4)

    def _evict(self, txn: lmdb.Transaction[bytes], pages: int) -> None:
        """Delete the entries written first until no more than ``pages`` are taken."""
        while self._pages(txn, self._data) + self._pages(txn, self._index) > pages:
            with txn.cursor(db=self._data) as cursor:
                oldest = list(islice(cursor, _EVICT_AT_ONCE))
            if not oldest:
                return
            for number, row in oldest:
                txn.delete(number, db=self._data)
                digest = row[:DIGEST_BYTES]
                if txn.get(digest, db=self._index) == number:
                    txn.delete(digest, db=self._index)

    def _pages(self, txn: lmdb.Transaction[bytes], table: lmdb._Database) -> int:
        """Return the pages that a table takes."""
        stat = txn.stat(db=table)
        return stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]

    def _pages_of(self, value: bytes) -> float:
        """Return the pages that an entry takes: a part of one, or whole ones where it is larger than half of one."""
        size = len(value) + _ENTRY_OVERHEAD_BYTES
        return size / self._page_bytes if 2 * size < self._page_bytes else size // self._page_bytes + 1

    def _last(self, txn: lmdb.Transaction[bytes]) -> int:
        """Return the number of the entry written last, 0 if there is none."""
        with txn.cursor(db=self._data) as cursor:
            return int.from_bytes(cursor.key(), "big") if cursor.last() else 0


_opened: dict[tuple[int, int, int], _Store] = {}
"""Process, device and inode of the folder -> its one opening."""
_opened_lock = threading.Lock()


def _share(folder: Path, max_bytes: int) -> _Store:
    """Return the opening of a folder for one more tier.

    Raises:
        InputError: if it cannot be opened.
    """
    if max_bytes < MIN_BYTES:
        raise InputError(f"GEOCENTROIDS_LABEL_STORE_BYTES = {max_bytes}: at least {MIN_BYTES} are needed")
    with _opened_lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise InputError(f"{_SETTING} = {str(folder)!r}: {error.strerror}") from error
        key = (os.getpid(), status.st_dev, status.st_ino)
        if key not in _opened:
            _opened[key] = _Store(folder, max_bytes)
        _opened[key].tiers += 1
        return _opened[key]


def _let_go(store: _Store) -> None:
    """Close a store that has no tier left. The caller holds the lock."""
    store.tiers -= 1
    if store.tiers == 0:
        for key in [key for key, value in _opened.items() if value is store]:
            del _opened[key]
        store.close()


def _map_bytes(max_bytes: int) -> int:
    """Return the largest size of the file with labels, whole pages of the system."""
    return (max_bytes - _LOCK_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE


def _open(folder: Path, max_bytes: int) -> tuple[lmdb.Environment, lmdb._Database, lmdb._Database]:
    """Open the files of a folder, create or empty them where necessary.

    Raises:
        InputError: if that is not possible, or they are something else's.
    """
    try:
        with _alone(folder):
            env = _environment(folder, max_bytes)
            try:
                if not _is_usable(env, folder, max_bytes):
                    env.close()
                    for name in ("data.mdb", "lock.mdb"):
                        (folder / name).unlink()
                    env = _environment(folder, max_bytes)
                env.reader_check()
                with env.begin(write=True) as txn:
                    txn.put(_FORMAT_KEY, _FORMAT)
                    return env, env.open_db(b"data", txn=txn), env.open_db(b"index", txn=txn)
            except BaseException:
                env.close()
                raise
    except (lmdb.Error, OSError) as error:
        raise InputError(f"{_SETTING} = {str(folder)!r} cannot be used: {error}") from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time look at a folder and create or empty what is in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _environment(folder: Path, max_bytes: int) -> lmdb.Environment:
    return lmdb.open(
        str(folder),
        map_size=_map_bytes(max_bytes),
        max_dbs=2,
        max_readers=_MAX_READERS,
        metasync=False,
    )


def _is_usable(env: lmdb.Environment, folder: Path, max_bytes: int) -> bool:
    """Tell whether files can stay as they are: new ones, or ours, of this format and within the bound.

    Raises:
        InputError: if they are something else's.
    """
    with env.begin() as txn:
        found = txn.get(_FORMAT_KEY)
        if found is None and txn.stat()["entries"]:
            raise InputError(f"{_SETTING} = {str(folder)!r}: the LMDB in it is no label store; name another folder")
    if found not in (None, _FORMAT):
        logger.warning("label store %s: format %s, not %s; emptied", folder, found, _FORMAT)
        return False
    size = (folder / "data.mdb").stat().st_size
    if size > _map_bytes(max_bytes):
        logger.warning("label store %s: %d bytes, more than %d; emptied", folder, size, max_bytes)
        return False
    return True
