"""Opens files with rasterio: remote ones through ``RemoteFile``, all of them looked at before GDAL parses them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import rasterio
from rasterio._err import CPLE_BaseError  # GDAL's errors, some of which rasterio passes on as they are
from rasterio.abc import MultiByteRangeResourceContainer
from rasterio.errors import RasterioError

from geocentroids_tiler.errors import SourceUnavailableError
from geocentroids_tiler.source.policy import Source, gdal_options
from geocentroids_tiler.source.remote import RemoteFile
from geocentroids_tiler.source.tiff_header import NotTiffError, check_tiff

_NAME = "image.tif"
"""What GDAL knows a remote file by. It is not its name: a file has one whatever its URL looks like."""


@contextmanager
def open_checked(source: Source, identity: str, overview: int | None) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Open a source for the length of a ``with`` block, which raises at its end what went wrong while reading.

    Args:
        source: where it is.
        identity: of the content.
        overview: index of an overview to open in place of the image.

    Yields:
        The image, opened with rasterio; for one thread only. And what raises, before the block ends, what went wrong
        since it was opened: GDAL takes bytes that do not come for blocks without data.

    Raises:
        SourceUnavailableError: if it cannot be opened or read; missing, forbidden and unreadable read the same.
        SourceChangedError: if it is no longer what ``identity`` says.
        UnsupportedImageError: if it is not a file that is opened here.
    """
    levels = {} if overview is None else {"overview_level": overview}
    try:
        if source.remote is None:
            with _local(source) as name, rasterio.open(name, driver="GTiff", **levels) as raster:
                yield raster, _nothing
            return
        file = source.remote.open(source.url, identity)
        check_tiff(file.read_at, file.size_bytes)
        try:
            with (
                rasterio.Env(**gdal_options()),
                rasterio.open(_NAME, driver="GTiff", opener=_OneFile(file), **levels) as raster,
            ):
                yield raster, file.check
        finally:
            file.check()  # it is the reason for whatever GDAL says
    except (RasterioError, CPLE_BaseError, OSError, UnicodeError, NotTiffError) as error:  # Unicode: of a name
        raise SourceUnavailableError(f"cannot open {source.url!r}") from error


@contextmanager
def _local(source: Source) -> Iterator[str]:
    """Look at a local file and yield its name, with GDAL set up."""
    path = Path() if source.path is None else source.path
    with path.open("rb", buffering=0) as file:

        def read(offset: int, count: int) -> bytes:
            file.seek(offset)
            return file.read(count) or b""

        check_tiff(read, path.stat().st_size)
    with rasterio.Env(**gdal_options()):
        yield str(path)


def _nothing() -> None:
    """Raise nothing: GDAL itself notices what goes wrong with a local file."""


class _Handle:
    """One opening of a remote file by GDAL, with its own position."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._position = 0

    def read(self, count: int = -1) -> bytes:
        data = self._file.read_or_note(self._position, self._file.size_bytes if count < 0 else count)
        self._position += len(data)
        return data

    def get_byte_ranges(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        return self._file.ranges_or_note(offsets, sizes)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, offset + (0, self._position, self._file.size_bytes)[whence])
        return self._position

    def tell(self) -> int:
        return self._position

    def __enter__(self) -> _Handle:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the file is the task's, not GDAL's."""


class _OneFile(MultiByteRangeResourceContainer):  # type: ignore[misc]
    """A file system for GDAL that has one file and no other, whatever a TIFF says to look for beside it."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file

    def open(self, path: str, mode: str = "r", **_: Any) -> _Handle:
        if path != _NAME or set(mode) - set("rb"):
            raise FileNotFoundError(path)
        return _Handle(self._file)

    def isfile(self, path: str) -> bool:
        return path == _NAME

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        if path != _NAME:
            raise FileNotFoundError(path)
        return self._file.size_bytes

    def rm(self, path: str) -> NoReturn:
        raise io.UnsupportedOperation("sources are not written to")
