"""The look at a TIFF's directories: its limits, its refusals, and that GDAL sees no more than was checked."""

import io
import resource
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rasterio.enums import ColorInterp, Interleaving
from rasters import texture, write_tif

from geocentroids_tiler.errors import GeocentroidsError, SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.source import Source, gdal_options, open_raster, resolve_source, source_identity
from geocentroids_tiler.source import tiff_header as header
from geocentroids_tiler.source.tiff_header import Directory, NotTiffError, check_tiff

BYTE, ASCII, SHORT, LONG, RATIONAL, SIGNED, FLOAT, IFD, LONG8, IFD8 = 1, 2, 3, 4, 5, 9, 11, 13, 16, 18
CODES = {BYTE: "B", ASCII: "B", SHORT: "H", LONG: "I", SIGNED: "i", FLOAT: "f", IFD: "I", LONG8: "Q", IFD8: "Q"}
ORDERS = [("<", False), (">", False), ("<", True), (">", True)]


class Tag(NamedTuple):
    """An entry of a directory; ``count`` and ``offset`` say something else than is the case."""

    kind: int
    values: tuple[int, ...]
    count: int | None = None
    offset: int | None = None


def image(**changes: Any) -> dict[int, Tag]:
    """Return the tags of 64 x 48 px of three bytes in twelve tiles of 16 px that hold nothing."""
    tags = {
        256: Tag(SHORT, (64,)),
        257: Tag(SHORT, (48,)),
        258: Tag(SHORT, (8, 8, 8)),
        259: Tag(SHORT, (1,)),
        262: Tag(SHORT, (2,)),
        277: Tag(SHORT, (3,)),
        284: Tag(SHORT, (1,)),
        322: Tag(SHORT, (16,)),
        323: Tag(SHORT, (16,)),
        324: Tag(LONG, (0,) * 12),
        325: Tag(LONG, (0,) * 12),
    }
    return tags | {int(name[1:]): tag for name, tag in changes.items()}


def strips(**changes: Any) -> dict[int, Tag]:
    """Return the tags of the same image in six strips of 8 rows."""
    tags = {tag: value for tag, value in image().items() if tag < 322}
    more = {273: Tag(LONG, (0,) * 6), 278: Tag(SHORT, (8,)), 279: Tag(LONG, (0,) * 6)}
    return tags | more | {int(name[1:]): tag for name, tag in changes.items()}


def without(tags: dict[int, Tag], *names: int) -> dict[int, Tag]:
    return {name: tag for name, tag in tags.items() if name not in names}


def tiff(
    *directories: dict[int, Tag] | list[tuple[int, Tag]],
    order: str = "<",
    big: bool = False,
    after: int = 0,
    blob: bytes = b"",
) -> bytes:
    """Write a TIFF: its head, ``blob`` (at ``blob_at``), and directories that follow each other, with their values.

    Args:
        directories: tags, or pairs of them.
        order: struct's sign of the byte order.
        big: BigTIFF.
        after: where the last directory says that another one is.
        blob: any bytes.
    """
    word, count_code = order + ("Q" if big else "I"), order + ("Q" if big else "H")
    size = struct.calcsize(word)
    out = bytearray(b"II" if order == "<" else b"MM")
    out += struct.pack(order + "HHHQ", 43, 8, 0, 0) if big else struct.pack(order + "HI", 42, 0)
    link = len(out) - size
    out += blob
    for tags in directories:
        pairs = list(tags.items()) if isinstance(tags, dict) else tags
        entries = b""
        for name, tag in pairs:
            data = struct.pack(f"{order}{len(tag.values)}{CODES.get(tag.kind, 'B')}", *tag.values)
            if len(data) > size or tag.offset is not None:
                place = struct.pack(word, len(out) if tag.offset is None else tag.offset)
                out += data
            else:
                place = data.ljust(size, b"\0")
            entries += struct.pack(order + "HH", name, tag.kind)
            entries += struct.pack(word, len(tag.values) if tag.count is None else tag.count) + place
        struct.pack_into(word, out, link, len(out))
        out += struct.pack(count_code, len(pairs)) + entries
        link = len(out)
        out += bytes(size)
    struct.pack_into(word, out, link, after)
    return bytes(out)


def blob_at(big: bool = False) -> int:
    """Return where ``tiff`` puts its blob."""
    return 16 if big else 8


def check(data: bytes, size: int | None = None) -> list[Directory]:
    """Check a TIFF in memory; ``size`` is that of a larger file which starts with it."""
    total = len(data) if size is None else size

    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= total
        assert count >= 0
        part = data[offset : offset + count]
        return part + bytes(min(count, total - offset) - len(part))

    return check_tiff(read, total)
