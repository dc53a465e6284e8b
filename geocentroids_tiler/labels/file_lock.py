"""Locks between processes that share a folder: held on a file, and let go by the system when their process ends."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType


class FileLock:
    """A lock that this object holds until ``release``. Threads of one process exclude each other as processes do."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    @classmethod
    def wait_for(cls, path: Path) -> FileLock:
        """Wait for a lock and take it.

        Raises:
            OSError: if the file cannot be made, or the file system has no locks.
        """
        while True:
            if (lock := cls._take(path, blocking=True)) is not None:
                return lock

    @classmethod
    def take(cls, path: Path) -> FileLock | None:
        """Take a lock, or return None if somebody holds it.

        Raises:
            OSError: if the file cannot be made, or the file system has no locks.
        """
        while True:
            try:
                lock = cls._take(path, blocking=False)
            except BlockingIOError:
                return None
            if lock is not None:
                return lock

    def release(self, *, remove: bool = False) -> None:
        """Let go of the lock, and remove its file if nobody is to lock it any more."""
        if remove:
            self._path.unlink(missing_ok=True)  # while it is held: who waits for it sees that it is gone
        os.close(self._descriptor)

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @classmethod
    def _take(cls, path: Path, *, blocking: bool) -> FileLock | None:
        """Take a lock, or return None if its file was removed meanwhile, which has to be tried again."""
        import fcntl  # not on Windows, where everything else works

        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
            own, named = os.fstat(descriptor), _stat(path)
        except BaseException:
            os.close(descriptor)
            raise
        if named is None or (own.st_dev, own.st_ino) != (named.st_dev, named.st_ino):
            os.close(descriptor)
            return None
        return cls(path, descriptor)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None
