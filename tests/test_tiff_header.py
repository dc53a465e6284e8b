"""The look at a TIFF's directories: its limits, its refusals, and that GDAL sees no more than was checked."""

import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasters import texture, write_tif

from geocentroids_tiler.errors import GeocentroidsError, UnsupportedImageError
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


@pytest.mark.parametrize(("order", "big"), ORDERS)
@pytest.mark.parametrize("tags", [image(), strips()], ids=["tiles", "strips"])
def test_what_a_directory_says(tags: dict[int, Tag], order: str, big: bool) -> None:
    found = check(tiff(tags, order=order, big=big))
    assert [(d.width_px, d.height_px, d.bands) for d in found] == [(64, 48, 3)]
    assert found[0].blocks == (12 if 322 in tags else 6)


@pytest.mark.parametrize("overviews", [(), (2, 4)])
@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("interleave", ["pixel", "band"])
@pytest.mark.parametrize("bigtiff", ["yes", "no"])
def test_agrees_with_gdal(
    tmp_path: Path, overviews: tuple[int, ...], tiled: bool, interleave: str, bigtiff: str
) -> None:
    layout = {"tiled": True} if tiled else {"tiled": False, "blockysize": 16}
    path = write_tif(
        tmp_path / "a.tif", texture(200, 300), overviews=overviews, interleave=interleave, bigtiff=bigtiff,
        photometric="RGB", **layout,
    )  # fmt: skip
    data = path.read_bytes()
    found = check(data)
    with rasterio.open(path) as raster:
        assert (found[0].width_px, found[0].height_px, found[0].bands) == (raster.width, raster.height, raster.count)
        assert raster.overviews(1) == list(overviews)
    assert [directory.width_px for directory in found[1:]] == [300 // factor for factor in overviews]
    assert found[0].georeferenced


TOO_MUCH = {
    "width": (image(t256=Tag(LONG, (2**20 + 1,)), t325=Tag(LONG, (0,) * 12)), "accepted: up to 1048576 px a side"),
    "pixels": (image(t256=Tag(LONG, (2**20,)), t257=Tag(LONG, (2**20,))), "px in all"),
    "bands": (image(t277=Tag(SHORT, (1025,))), "1025 bands; accepted: up to 1024"),
    "bits": (image(t258=Tag(SHORT, (8, 129, 8))), "129 bits per sample"),
    "compression": (image(t259=Tag(SHORT, (34925,))), "compression 34925; accepted: none, LZW, JPEG"),
    "block": (image(t322=Tag(SHORT, (16384,)), t323=Tag(SHORT, (16384,))), "blocks of 16384 x 16384 px"),
    "blocks": (image(t256=Tag(LONG, (2**16,)), t257=Tag(LONG, (2**16,)), t322=Tag(SHORT, (16,))), "blocks; accepted"),
    "metadata": (image(t42112=Tag(ASCII, (1,), count=2**20 + 1, offset=8)), "bytes of metadata; accepted: up to"),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_too_much_is_refused_with_the_limit(name: str) -> None:
    tags, text = TOO_MUCH[name]
    with pytest.raises(UnsupportedImageError, match=text):
        check(tiff(tags), size=2**33)


def test_a_block_counts_as_four_bytes_a_pixel() -> None:
    """GDAL opens what has another colour space than it knows as RGBA, whatever the number of bits."""
    side = 16384
    one_bit = image(t258=Tag(SHORT, (1,)), t277=Tag(SHORT, (1,)), t322=Tag(LONG, (side,)), t323=Tag(LONG, (side,)))
    with pytest.raises(UnsupportedImageError, match="1073741824 bytes each"):
        check(tiff(one_bit))


BROKEN = {
    "no width": without(image(), 256),
    "no offsets": without(image(), 324),
    "no counts": without(image(), 325),
    "too few offsets": image(t324=Tag(LONG, (0,) * 11)),
    "tile without height": without(image(), 323),
    "zero rows per strip": strips(t278=Tag(SHORT, (0,))),
    "values beyond the end": image(t324=Tag(LONG, (0,) * 12, offset=10**6)),
    "two widths": image(t256=Tag(SHORT, (64, 64))),
    "a width that is no integer": image(t256=Tag(FLOAT, ())),
    "many bits": image(t258=Tag(SHORT, (8,) * 3, count=10**6, offset=8)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name: str) -> None:
    with pytest.raises(NotTiffError):
        check(tiff(BROKEN[name]))


def test_tags_twice() -> None:
    with pytest.raises(NotTiffError, match="tag 256 is there twice"):
        check(tiff([*image().items(), (256, Tag(SHORT, (2**15,)))]))


@pytest.mark.parametrize("data", [b"", b"II*", b"II*\0", b"MM\0+" + bytes(12), b"\x89PNG" + bytes(100), b"<html>" * 9])
def test_no_tiff(data: bytes) -> None:
    with pytest.raises(NotTiffError):
        check(data)


@pytest.mark.parametrize("big", [False, True])
def test_directories_in_a_circle(big: bool) -> None:
    data = tiff(image(), big=big)
    first = struct.unpack_from("<Q" if big else "<I", data, 8 if big else 4)[0]
    with pytest.raises(NotTiffError, match="circle"):
        check(tiff(image(), big=big, after=first))


def test_number_of_directories() -> None:
    assert len(check(tiff(*[image()] * header.MAX_DIRECTORIES))) == header.MAX_DIRECTORIES
    with pytest.raises(UnsupportedImageError, match="more than 64 directories"):
        check(tiff(*[image()] * (header.MAX_DIRECTORIES + 1)))


def test_directories_inside_of_others_are_looked_at() -> None:
    inner = tiff(image(t277=Tag(SHORT, (2000,))))
    place = struct.unpack_from("<I", inner, 4)[0]
    with pytest.raises(UnsupportedImageError, match="2000 bands"):
        check(tiff(image(t330=Tag(IFD, (place,))), blob=inner[blob_at() :]))


@pytest.mark.parametrize(
    "text",
    [
        '<Item name="OVERVIEW_FILE" domain="OVERVIEWS">/etc/passwd</Item>',
        '<Item name="x_dataset" domain="GEOLOCATION">a</Item>',
        '<Item name="RPC_DEM" domain="RPC">a</Item>',
        '<Item name="a" domain="&#79;VERVIEWS">a</Item>',
        "<Item name='a' domain = 'OVER&#x56;IEWS'>a</Item>",
    ],
)
def test_metadata_that_may_name_other_files(text: str) -> None:
    values = tuple(f"<GDALMetadata>{text}</GDALMetadata>\0".encode())
    with pytest.raises(UnsupportedImageError, match="may name other files"):
        check(tiff(image(t42112=Tag(ASCII, values))))


def test_other_metadata_is_welcome() -> None:
    values = tuple(b'<GDALMetadata><Item name="a" sample="0" role="scale">1 &amp; 2</Item></GDALMetadata>\0')
    check(tiff(image(t42112=Tag(ASCII, values))))


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=12), st.sampled_from(ORDERS))
def test_any_bytes_end_with_one_of_two_errors(changes: list[tuple[int, int]], order: tuple[str, bool]) -> None:
    data = bytearray(tiff(image(), strips(), order=order[0], big=order[1]))
    for place, value in changes:
        data[place % len(data)] = value
    try:
        check(bytes(data))
    except (NotTiffError, GeocentroidsError):
        return
