"""Files that strangers may offer as images."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from rasters import texture, write_tif

SIDE_PX = 448


def good(folder: Path) -> bytes:
    """Return a plain image, large enough that its pixels are not all in the first bytes fetched."""
    return write_tif(folder / "good.tif", texture(SIDE_PX, SIDE_PX, seed=1), photometric="RGB").read_bytes()


def with_tags(folder: Path, namespace: str, **tags: str) -> bytes:
    """Return an image with metadata."""
    path = folder / "tags.tif"
    return write_tif(path, texture(64, 64), photometric="RGB", tags={namespace: tags}).read_bytes()


def with_hidden_tag(folder: Path) -> bytes:
    """Return an image that names a file for its overviews, the item's name written with an entity."""
    content = with_tags(folder, "OVERVIEWS", OVERVIEW_FILE="/etc/passwd----")
    plain, hidden = (
        b'"OVERVIEW_FILE" domain="OVERVIEWS">/etc/passwd----',
        b'"OVERVIEW_F&#73;LE" domain="OVERVIEWS">/etc/passwd',
    )
    assert plain in content
    return content.replace(plain, hidden)


def with_overviews(folder: Path) -> bytes:
    """Return an image with an overview of its own."""
    return write_tif(folder / "overviews.tif", texture(SIDE_PX, SIDE_PX), photometric="RGB", overviews=[2]).read_bytes()


def compressed(folder: Path, compress: str) -> bytes:
    """Return an image with a codec."""
    path = folder / f"{compress}.tif"
    return write_tif(path, texture(128, 128), photometric="RGB", compress=compress).read_bytes()


def other_format(folder: Path, driver: str) -> bytes:
    """Return an image that is no TIFF."""
    source = write_tif(folder / "plain.tif", texture(64, 64), photometric="RGB")
    path = folder / f"other.{driver.lower()}"
    copy(source, path, driver=driver)
    return path.read_bytes()


def vrt(url: str) -> bytes:
    """Return a document that makes GDAL read another file."""
    return (
        '<VRTDataset rasterXSize="64" rasterYSize="64"><SRS>EPSG:32721</SRS>'
        "<GeoTransform>560000,0.25,0,6140000,0,-0.25</GeoTransform>"
        + "".join(
            f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><SourceFilename>{url}</SourceFilename>'
            f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
            for band in (1, 2, 3)
        )
        + "</VRTDataset>"
    ).encode()


GEO = {
    33550: (12, 3, (0.25, 0.25, 0.0)),
    33922: (12, 6, (0.0, 0.0, 0.0, 560_000.0, 6_140_000.0, 0.0)),
    34735: (3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32721)),
}
"""Tags that place an image."""
_CODES = {1: "B", 2: "B", 3: "H", 4: "I", 12: "d", 13: "I", 16: "Q"}


def tiff(
    *directories: dict[int, tuple[int, int, tuple[float, ...] | bytes]], data: bytes = b"", loop: bool = False
) -> bytes:
    """Write a classic TIFF by hand, so that it may say what no library would write.

    Args:
        *directories: tag -> type, count and values; the count may be a lie.
        data: bytes behind the header, from byte 8 on, that values may point to.
        loop: let the last directory lead to the first.
    """
    out = bytearray(b"II*\0" + struct.pack("<I", 8 + len(data)) + data)
    first = len(out)
    for place, tags in enumerate(directories):
        start = len(out)
        body = 2 + 12 * len(tags) + 4
        extra = bytearray()
        entries = bytearray(struct.pack("<H", len(tags)))
        for tag, (kind, count, values) in sorted(tags.items()):
            packed = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
            if len(packed) <= 4:
                value = packed.ljust(4, b"\0")
            else:
                value = struct.pack("<I", start + body + len(extra))
                extra += packed
            entries += struct.pack("<HHI", tag, kind, count) + value
        last = place == len(directories) - 1
        following = (first if loop else 0) if last else start + body + len(extra)
        out += entries + struct.pack("<I", following) + extra
    return bytes(out)


def directory(
    width: int,
    height: int,
    *,
    tile: int = 256,
    bands: int = 3,
    compression: int = 1,
    blocks: int | None = None,
    **more: int,
) -> dict[int, tuple[int, int, tuple[float, ...] | bytes]]:
    """Return the tags of a tiled image all of whose blocks are the same bytes, at 8."""
    count = -(-width // tile) * -(-height // tile) if blocks is None else blocks
    written = min(count, 100_000)
    size = more.pop("block_bytes", tile * tile * bands)
    return {
        256: (4, 1, (width,)),
        257: (4, 1, (height,)),
        258: (3, 1, (8,)),
        259: (3, 1, (compression,)),
        262: (3, 1, (2 if bands >= 3 else 1,)),
        277: (3, 1, (bands,)),
        284: (3, 1, (1,)),
        322: (4, 1, (tile,)),
        323: (4, 1, (tile,)),
        324: (4, count, (8,) * written),
        325: (4, count, (size,) * written),
        **GEO,
    }


def shared_blob(side_blocks: int) -> bytes:
    """Return an image of which all blocks are one small blob that Deflate makes large."""
    blob = zlib.compress(bytes(256 * 256 * 3), 9)
    side = 256 * side_blocks
    return tiff(directory(side, side, compression=8, block_bytes=len(blob)), data=blob)


def bomb(decoded_bytes: int) -> bytes:
    """Return an image of one block that decodes to far more than a block."""
    blob = zlib.compress(bytes(decoded_bytes), 9)
    return tiff(directory(256, 256, compression=8, block_bytes=len(blob)), data=blob)


def jpeg_larger_than_its_block(side_px: int) -> bytes:
    """Return an image whose one block is a JPEG of a larger picture."""
    out = io.BytesIO()
    Image.new("RGB", (side_px, side_px)).save(out, "JPEG")
    blob = out.getvalue()
    return tiff(directory(256, 256, compression=7, block_bytes=len(blob)), data=blob)


def many_bands(folder: Path) -> bytes:
    """Return an image of 65,535 bands."""
    path = folder / "bands.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=16, height=16, count=65_535, dtype="uint8", crs="EPSG:32721",
        transform=rasterio.Affine(0.25, 0, 560_000, 0, -0.25, 6_140_000), interleave="pixel", sparse_ok=True,
    ):  # fmt: skip
        pass
    return path.read_bytes()


def sparse(folder: Path, side_px: int, tile: int) -> bytes:
    """Return an image with no block of its own."""
    path = folder / "sparse.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=side_px, height=side_px, count=3, dtype="uint8", crs="EPSG:32721",
        transform=rasterio.Affine(0.25, 0, 560_000, 0, -0.25, 6_140_000), tiled=True, blockxsize=tile, blockysize=tile,
        sparse_ok=True, bigtiff="yes",
    ) as raster:  # fmt: skip
        raster.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
    return path.read_bytes()


def flipped(content: bytes, seed: int, flips: int, before: int) -> bytes:
    """Return a file with some bits turned, all of them among its first bytes."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for place in rng.integers(0, min(before, len(data)), flips):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)
