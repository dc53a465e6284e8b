"""Looks at a TIFF's directories before GDAL does, and refuses those that would cost too much or lead elsewhere.

Source: TIFF 6.0, section 2; BigTIFF, https://www.awaresystems.be/imaging/tiff/bigtiff.html; GDAL's private tags,
https://gdal.org/drivers/raster/gtiff.html.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from geocentroids_tiler.errors import UnsupportedImageError

ReadAt = Callable[[int, int], bytes]
"""Returns bytes of a file from an offset on, fewer at its end."""

MAX_SIDE_PX = 2**20
MAX_PX = 2**37
"""Pixels of an image: 137 thousand million, a square of 90 km at 0.25 m."""
MAX_BANDS = 1024
MAX_BLOCKS = 2**22
"""Blocks of one directory, and of its overviews and masks together; their index takes up to 16 bytes each."""
MAX_BLOCK_BYTES = 2**28
"""Bytes of one block as GDAL holds it: a window needs all of every block that it touches."""
MAX_DIRECTORIES = 64
MAX_ENTRIES = 256
"""Tags of one directory."""
MAX_VALUE_BYTES = 2**24
"""Values of all tags of a file, lists of blocks apart: GDAL reads them all when it opens the file, and values of many
tags may be the same bytes."""
MAX_METADATA_BYTES = 2**20
"""GDAL's metadata, which it parses as XML when it opens the file."""

COMPRESSIONS = {
    1: "none",
    5: "LZW",
    7: "JPEG",
    8: "Deflate",
    32773: "PackBits",
    32946: "Deflate",
    34887: "LERC",
    50000: "ZSTD",
    50001: "WebP",
}
"""Codecs whose memory a block's size bounds. Not among them: LZMA, which takes what its stream asks for."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _BANDS = 256, 257, 258, 259, 277
_ROWS_PER_STRIP, _PLANAR = 278, 284
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_STRIP_OFFSETS, _STRIP_COUNTS, _TILE_OFFSETS, _TILE_COUNTS = 273, 279, 324, 325
_SAMPLE_FORMAT, _IMAGE_DEPTH, _TILE_DEPTH = 339, 32997, 32998
_SUB_IFDS, _GEO_KEYS, _GDAL_METADATA = 330, 34735, 42112
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_OFFSETS = {4: "I", 13: "I", 16: "Q", 18: "Q"}
_ONE_VALUE = (
    _WIDTH,
    _HEIGHT,
    _COMPRESSION,
    _BANDS,
    _ROWS_PER_STRIP,
    _PLANAR,
    _TILE_WIDTH,
    _TILE_HEIGHT,
    _IMAGE_DEPTH,
    _TILE_DEPTH,
)
_FLOATS = 3
_BLOCK_LISTS = (_STRIP_OFFSETS, _STRIP_COUNTS, _TILE_OFFSETS, _TILE_COUNTS)
_MAX_LIST = 4096
"""Values of a list that is read as a whole."""
# GDAL opens the files that these items name. Entities could hide a domain's name from this look at it.
_FOREIGN = re.compile(rb"OVERVIEW_FILE|[XY]_DATASET|RPC_DEM|domain\s*=\s*[\"']?[^\"'>]*&", re.IGNORECASE)
_NOT_TIFF = "the file is not a readable TIFF"


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of a TIFF: the whole, an overview or a mask.

    Attributes:
        width_px: columns.
        height_px: rows.
        bands: samples per pixel.
        block_bytes: of one block as GDAL holds it: each sample takes 1, 2, 4, 8 or 16 bytes.
        blocks: how many there are.
        georeferenced: whether it has GeoTIFF keys.
    """

    width_px: int
    height_px: int
    bands: int
    block_bytes: int
    blocks: int
    georeferenced: bool


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: int
    count: int
    offset: int

    @property
    def nbytes(self) -> int:
        return self.count * _TYPE_BYTES[self.kind]


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a file writes numbers: classic TIFF or BigTIFF, either end first."""

    order: str
    big: bool

    @property
    def word(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def word_bytes(self) -> int:
        return 8 if self.big else 4

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.big else "H")

    @property
    def entry_bytes(self) -> int:
        return 20 if self.big else 12


class NotTiffError(ValueError):
    """The bytes are no TIFF, or one whose directories lead nowhere."""


def check_tiff(read: ReadAt, size_bytes: int) -> list[Directory]:
    """Look at all directories of a TIFF; no pixel is read.

    Args:
        read: reads the file.
        size_bytes: its size.

    Returns:
        Its directories, those that other directories name included.

    Raises:
        NotTiffError: if it is no TIFF, or a broken one.
        UnsupportedImageError: if it is one that is not opened here.
    """
    layout, first = _start(read)
    directories: list[Directory] = []
    waiting, seen = [first], set[int]()
    value_bytes = 0
    while waiting:
        offset = waiting.pop()
        if offset == 0:
            continue
        if offset in seen:
            raise NotTiffError("directories in a circle")
        seen.add(offset)
        if len(seen) > MAX_DIRECTORIES:
            raise UnsupportedImageError(f"the image has more than {MAX_DIRECTORIES} directories; accepted: up to that")
        entries, following = _entries(read, size_bytes, layout, offset)
        value_bytes += sum(entry.nbytes for tag, entry in entries.items() if tag not in _BLOCK_LISTS)
        if value_bytes > MAX_VALUE_BYTES:
            raise UnsupportedImageError(
                f"the image has tags of {value_bytes} bytes in all; accepted: up to {MAX_VALUE_BYTES}"
            )
        directories.append(_check_directory(read, layout, entries))
        if (blocks := sum(directory.blocks for directory in directories[1:])) > MAX_BLOCKS:
            raise UnsupportedImageError(
                f"the image's overviews and masks have {blocks} blocks; accepted: up to {MAX_BLOCKS}"
            )
        waiting.append(following)
        if (inner := entries.get(_SUB_IFDS)) is not None:
            waiting.extend(_integers(read, layout, inner, _SUB_IFDS, _OFFSETS))
    return directories


def _start(read: ReadAt) -> tuple[_Layout, int]:
    head = read(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise NotTiffError(_NOT_TIFF)
    magic = struct.unpack_from(order + "H", head, 2)[0]
    if magic == 42:
        return _Layout(order, False), struct.unpack_from(order + "I", head, 4)[0]
    if magic == 43 and len(head) == 16 and struct.unpack_from(order + "HH", head, 4) == (8, 0):
        return _Layout(order, True), struct.unpack_from(order + "Q", head, 8)[0]
    raise NotTiffError(_NOT_TIFF)


def _entries(read: ReadAt, size_bytes: int, layout: _Layout, offset: int) -> tuple[dict[int, _Entry], int]:
    """Read one directory; values that do not fit into it must lie inside of the file."""
    if offset >= size_bytes:  # a local file cannot even be asked for what lies far behind it
        raise NotTiffError("a directory lies beyond the end of the file")
    count_bytes = struct.calcsize(layout.count)
    count = _unpack(layout.count, read(offset, count_bytes))
    if not 1 <= count <= MAX_ENTRIES:
        raise UnsupportedImageError(f"the image has a directory of {count} tags; accepted: 1 to {MAX_ENTRIES}")
    length = count * layout.entry_bytes + layout.word_bytes
    body = read(offset + count_bytes, length)
    if len(body) != length:
        raise NotTiffError("a directory reaches beyond the end of the file")
    entries: dict[int, _Entry] = {}
    seen: set[int] = set()
    for start in range(0, count * layout.entry_bytes, layout.entry_bytes):
        tag, kind = struct.unpack_from(layout.order + "HH", body, start)
        items = struct.unpack_from(layout.word, body, start + 4)[0]
        if tag in seen:
            raise NotTiffError(f"tag {tag} is there twice")  # readers differ in which one they take
        seen.add(tag)
        if kind not in _TYPE_BYTES:
            continue  # as TIFF asks of readers
        value_at = start + 4 + layout.word_bytes
        nbytes = items * _TYPE_BYTES[kind]
        inline = nbytes <= layout.word_bytes
        place = offset + count_bytes + value_at if inline else struct.unpack_from(layout.word, body, value_at)[0]
        if not inline and place + nbytes > size_bytes:
            raise NotTiffError(f"tag {tag} reaches beyond the end of the file")
        entries[tag] = _Entry(kind, items, place)
    return entries, _unpack(layout.word, body[-layout.word_bytes :])


def _check_directory(read: ReadAt, layout: _Layout, entries: Mapping[int, _Entry]) -> Directory:
    """Refuse a directory whose image takes too much, or names other files."""
    numbers = {tag: _number(read, layout, entries, tag) for tag in _ONE_VALUE if tag in entries}
    width, height = numbers.get(_WIDTH, 0), numbers.get(_HEIGHT, 0)
    if width < 1 or height < 1:
        raise NotTiffError("an image without width or height")
    if max(width, height) > MAX_SIDE_PX or width * height > MAX_PX:
        raise UnsupportedImageError(
            f"the image has {width} x {height} px; accepted: up to {MAX_SIDE_PX} px a side and {MAX_PX} px in all"
        )
    bands = numbers.get(_BANDS, 1)
    if not 1 <= bands <= MAX_BANDS:
        raise UnsupportedImageError(f"the image has {bands} bands; accepted: up to {MAX_BANDS}")
    compression = numbers.get(_COMPRESSION, 1)
    if compression not in COMPRESSIONS:
        accepted = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise UnsupportedImageError(f"the image has compression {compression}; accepted: {accepted}")
    block_bytes, blocks = _blocks(read, layout, entries, numbers, bands)
    _check_metadata(read, entries)
    return Directory(width, height, bands, block_bytes, blocks, _GEO_KEYS in entries)


def _blocks(
    read: ReadAt, layout: _Layout, entries: Mapping[int, _Entry], numbers: Mapping[int, int], bands: int
) -> tuple[int, int]:
    """Return the size of a block and how many there are, both as the directory says."""
    width, height = numbers[_WIDTH], numbers[_HEIGHT]
    tiled = not entries.keys().isdisjoint((_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS))
    if tiled:
        cols, rows = numbers.get(_TILE_WIDTH, 0), numbers.get(_TILE_HEIGHT, 0)
    else:
        cols, rows = width, min(numbers.get(_ROWS_PER_STRIP, height), height)
    if cols < 1 or rows < 1:
        raise NotTiffError("blocks without width or height")
    if depth := next((numbers[tag] for tag in (_IMAGE_DEPTH, _TILE_DEPTH) if numbers.get(tag, 1) != 1), None):
        raise UnsupportedImageError(f"the image is {depth} layers deep; accepted: 1")
    separate = numbers.get(_PLANAR, 1) == 2
    # GDAL shows colour spaces that it does not know as RGBA, four bytes a pixel however few the file has.
    block_bytes = cols * rows * max(4, (1 if separate else bands) * _sample_bytes(read, layout, entries))
    if block_bytes > MAX_BLOCK_BYTES:
        raise UnsupportedImageError(
            f"the image has blocks of {cols} x {rows} px, {block_bytes} bytes each; accepted: up to {MAX_BLOCK_BYTES} "
            "(write it as a Cloud Optimized GeoTIFF)"
        )
    blocks = -(-width // cols) * -(-height // rows) * (bands if separate else 1)
    if blocks > MAX_BLOCKS:
        raise UnsupportedImageError(f"the image has {blocks} blocks; accepted: up to {MAX_BLOCKS}")
    for tag in (_TILE_OFFSETS, _TILE_COUNTS) if tiled else (_STRIP_OFFSETS, _STRIP_COUNTS):
        if tag not in entries or entries[tag].kind not in _INTEGERS or entries[tag].count < blocks:
            raise NotTiffError(f"{blocks} blocks, and tag {tag} does not say where they are")
    return block_bytes, blocks


def _sample_bytes(read: ReadAt, layout: _Layout, entries: Mapping[int, _Entry]) -> int:
    """Return what a sample takes in GDAL's memory, which knows numbers of 8, 16, 32, 64 and 128 bits."""
    bits = max(_integers(read, layout, entries[_BITS], _BITS), default=0) if _BITS in entries else 1
    if not 1 <= bits <= 128:
        raise UnsupportedImageError(f"the image has {bits} bits per sample; accepted: 1 to 128")
    formats = _integers(read, layout, entries[_SAMPLE_FORMAT], _SAMPLE_FORMAT) if _SAMPLE_FORMAT in entries else ()
    if _FLOATS in formats:
        bits = max(bits, 32)  # those of 16 bits become 32
    return 1 << max(0, math.ceil(math.log2(bits / 8)))


def _check_metadata(read: ReadAt, entries: Mapping[int, _Entry]) -> None:
    metadata = entries.get(_GDAL_METADATA)
    if metadata is None:
        return
    if metadata.nbytes > MAX_METADATA_BYTES:
        raise UnsupportedImageError(
            f"the image has {metadata.nbytes} bytes of metadata; accepted: up to {MAX_METADATA_BYTES}"
        )
    if found := _FOREIGN.search(read(metadata.offset, metadata.nbytes)):
        raise UnsupportedImageError(
            f"the image's metadata holds {found[0][:40].decode('latin-1')!r}, which may name other files"
        )


def _number(read: ReadAt, layout: _Layout, entries: Mapping[int, _Entry], tag: int) -> int:
    values = _integers(read, layout, entries[tag], tag)
    if len(values) != 1:
        raise NotTiffError(f"tag {tag} has {len(values)} values instead of one")
    return values[0]


def _integers(
    read: ReadAt, layout: _Layout, entry: _Entry, tag: int, kinds: Mapping[int, str] = _INTEGERS
) -> tuple[int, ...]:
    code = kinds.get(entry.kind)
    if code is None or entry.count > _MAX_LIST:
        raise NotTiffError(f"tag {tag} holds {entry.count} values of type {entry.kind}")
    data = read(entry.offset, entry.nbytes)
    if len(data) != entry.nbytes:
        raise NotTiffError(f"tag {tag} reaches beyond the end of the file")
    return struct.unpack(f"{layout.order}{entry.count}{code}", data)


def _unpack(code: str, data: bytes) -> int:
    if len(data) != struct.calcsize(code):
        raise NotTiffError("a directory reaches beyond the end of the file")
    return int(struct.unpack(code, data)[0])
