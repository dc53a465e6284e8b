"""The look at a TIFF's directories: its limits, its refusals, and that GDAL sees no more than was checked."""

import io
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
from rasterio.enums import Interleaving
from rasters import texture, write_tif

from geocentroids_tiler.errors import GeocentroidsError, SourceUnavailableError, UnsupportedImageError
from geocentroids_tiler.source import check_structure, gdal_options, open_raster, resolve_source, source_identity
from geocentroids_tiler.source import tiff_header as header
from geocentroids_tiler.source.tiff_header import Directory, NotTiffError, check_tiff

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

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


AT_THE_LIMIT = {
    "sides": strips(t256=Tag(LONG, (2**20,)), t257=Tag(SHORT, (1,)), t278=Tag(SHORT, (1,))),
    "bands": image(t277=Tag(SHORT, (1024,))),
    "bits": image(t258=Tag(SHORT, (128, 128, 128))),
    "block": image(t277=Tag(SHORT, (4,)), t322=Tag(SHORT, (8192,)), t323=Tag(SHORT, (8192,))),
    "blocks": image(
        t256=Tag(LONG, (2**15,)),
        t257=Tag(LONG, (2**15,)),
        t324=Tag(LONG, (0,), count=2**22, offset=8),
        t325=Tag(LONG, (0,), count=2**22, offset=8),
    ),
    "metadata": image(t42112=Tag(ASCII, (1,), count=2**20, offset=8)),
    "values": image(t700=Tag(BYTE, (1,), count=2**24 - 100, offset=8)),
}


@pytest.mark.parametrize("name", AT_THE_LIMIT)
def test_as_much_as_the_limit_is_accepted(name: str) -> None:
    [found] = check(tiff(AT_THE_LIMIT[name]), size=2**33)
    assert found.block_bytes <= header.MAX_BLOCK_BYTES
    assert found.blocks <= header.MAX_BLOCKS


@pytest.mark.parametrize("count", [256, 257])
def test_number_of_tags(count: int) -> None:
    tags = image() | {40_000 + i: Tag(SHORT, (0,)) for i in range(count - len(image()))}
    if count == 256:
        assert check(tiff(tags))
    else:
        with pytest.raises(UnsupportedImageError, match="directory of 257 tags; accepted: 1 to 256"):
            check(tiff(tags))


def test_a_directory_that_is_cut_off() -> None:
    data = tiff(image())
    with pytest.raises(NotTiffError, match="a directory reaches beyond the end of the file"):
        check(data[:-1])


def test_many_values_at_one_place_count_each() -> None:
    """GDAL takes memory for each of them: twenty tags of one and the same 290 MB took 6 GB."""
    tags = image() | {60_000 + i: Tag(BYTE, (1,), count=2**20, offset=8) for i in range(17)}
    with pytest.raises(UnsupportedImageError, match="accepted: up to 16777216"):
        check(tiff(tags), size=2**33)


def test_blocks_of_overviews_together() -> None:
    many = AT_THE_LIMIT["blocks"]
    assert len(check(tiff(many, many), size=2**33)) == 2
    with pytest.raises(UnsupportedImageError, match="overviews and masks have 8388608 blocks"):
        check(tiff(many, many, many), size=2**33)


def test_planes_have_blocks_of_their_own() -> None:
    with pytest.raises(NotTiffError, match="36 blocks, and tag 324"):
        check(tiff(image(t284=Tag(SHORT, (2,)))))
    assert check(tiff(image(t277=Tag(SHORT, (8,)))))[0].block_bytes == 16 * 16 * 8


@pytest.mark.parametrize("kind", [0, 14, 15, 99])
def test_a_tag_of_unknown_type_is_a_tag(kind: int) -> None:
    """The second of two is what a reader ignores: here it would be the one that was checked."""
    pairs = [(278, Tag(kind, (1,))), *strips(t278=Tag(SHORT, (8,))).items()]
    with pytest.raises(NotTiffError, match="tag 278 is there twice"):
        check(tiff(pairs))


@pytest.mark.parametrize("tag", [256, 258, 278])
def test_offsets_are_no_numbers(tag: int) -> None:
    """GDAL does not read a number of a type that is meant for directories."""
    with pytest.raises(NotTiffError, match=f"tag {tag} holds 1 values of type 13"):
        check(tiff(strips() | {tag: Tag(IFD, (8,))}))


@pytest.mark.parametrize("tag", [32997, 32998])
def test_images_are_flat(tag: int) -> None:
    """GDAL's buffer for a tile is as deep as the tile says."""
    assert check(tiff(image() | {tag: Tag(LONG, (1,))}))
    with pytest.raises(UnsupportedImageError, match="65535 layers deep"):
        check(tiff(image() | {tag: Tag(LONG, (65535,))}))


@pytest.mark.parametrize("tag", [322, 323, 324, 325])
def test_any_tag_of_tiles_makes_tiles(tag: int) -> None:
    with pytest.raises(NotTiffError, match="blocks without width or height"):
        check(tiff(strips() | {tag: Tag(LONG, (16,))}))


@pytest.mark.parametrize(("rows", "blocks"), [(1, 48), (7, 7), (48, 1), (49, 1), (2**32 - 1, 1)])
def test_rows_per_strip(rows: int, blocks: int) -> None:
    data = tiff(strips(t278=Tag(LONG, (rows,)), t273=Tag(LONG, (0,) * blocks), t279=Tag(LONG, (0,) * blocks)))
    assert check(data)[0].blocks == blocks
    assert check(data)[0].block_bytes == 64 * min(rows, 48) * 4, "four bytes at least"
    _agree(data)


@pytest.mark.parametrize(("order", "big"), ORDERS)
def test_numbers_of_eight_bytes_in_either_kind_of_file(order: str, big: bool) -> None:
    tags = image(t256=Tag(LONG8, (64,)), t322=Tag(LONG8, (16,)), t324=Tag(LONG8, (0,) * 12))
    data = tiff(tags, order=order, big=big)
    assert check(data)[0].blocks == 12
    _agree(data)


@pytest.mark.parametrize("kind", [16, 17, 18])
def test_values_of_eight_bytes_reach_as_far_as_they_do(kind: int) -> None:
    """In a classic TIFF even one of them lies elsewhere."""
    data = tiff(image() | {60_000: Tag(kind, (), count=1, offset=0)})
    at = data.index(struct.pack("<HHI", 60_000, kind, 1)) + 8
    for offset, fits in ((len(data) - 8, True), (len(data) - 7, False)):
        changed = data[:at] + struct.pack("<I", offset) + data[at + 4 :]
        if fits:
            assert check(changed)
        else:
            with pytest.raises(NotTiffError, match="tag 60000 reaches beyond the end of the file"):
                check(changed)


@pytest.mark.parametrize(
    ("bits", "form", "expected"),
    [
        ((1,), 1, 1),
        ((7,), 1, 1),
        ((8,), 2, 1),
        ((12,), 1, 2),
        ((16,), 1, 2),
        ((16,), 3, 4),
        ((24,), 3, 4),
        ((17,), 1, 4),
        ((32,), 3, 4),
        ((32,), 5, 4),
        ((64,), 3, 8),
        ((64,), 6, 8),
        ((128,), 6, 16),
        ((8, 16, 8, 8), 1, 2),
    ],
)
def test_what_a_sample_takes(bits: tuple[int, ...], form: int, expected: int) -> None:
    values = bits if len(bits) > 1 else bits * 4  # below four bytes a pixel nothing is told apart
    tags = image(t258=Tag(SHORT, values), t277=Tag(SHORT, (4,)), t262=Tag(SHORT, (1,)))
    data = tiff(tags | {339: Tag(SHORT, (form,) * 4)})
    assert check(data)[0].block_bytes == 16 * 16 * 4 * expected
    if len(bits) == 1:  # GDAL opens no others
        _agree(data)


@pytest.mark.parametrize("count", [4096, 4097])
def test_many_directories_inside_of_one(count: int) -> None:
    first = struct.unpack_from("<I", tiff(image()), 4)[0]
    match = "circle" if count == 4096 else "tag 330 holds 4097 values"
    with pytest.raises(NotTiffError, match=match):  # all of them are the one that names them
        check(tiff(image(), image(t330=Tag(LONG, (first,) * count))))


def test_a_directory_far_behind_the_end(tmp_path: Path) -> None:
    """A local file cannot even be asked for what lies there."""
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**64 - 1))
    source = resolve_source("a.tif", tmp_path)
    with pytest.raises(SourceUnavailableError), open_raster(source, source_identity(source)):
        pass


def test_several_images_in_one_file_are_refused(tmp_path: Path) -> None:
    """GDAL opens the first of them, and names the others as files to open."""
    (tmp_path / "a.tif").write_bytes(tiff(image(), image()))
    source = resolve_source("a.tif", tmp_path)
    with (
        open_raster(source, source_identity(source)) as raster,
        pytest.raises(UnsupportedImageError, match="SUBDATASETS"),
    ):
        check_structure(raster)


@pytest.mark.parametrize(("bits", "form", "dtype"), [(32, 5, "complex_int16"), (64, 6, "complex64")])
def test_complex_numbers_are_refused(tmp_path: Path, bits: int, form: int, dtype: str) -> None:
    """numpy does not even know the name that rasterio has for two of 16 bits."""
    (tmp_path / "a.tif").write_bytes(tiff(image(t258=Tag(SHORT, (bits,) * 3)) | {339: Tag(SHORT, (form,) * 3)}))
    source = resolve_source("a.tif", tmp_path)
    with open_raster(source, source_identity(source)) as raster, pytest.raises(UnsupportedImageError, match=dtype):
        check_structure(raster)


def _agree(data: bytes) -> None:
    """Look whether GDAL sees the image that was checked, and holds no larger blocks of it."""
    found = check(data)[0]
    with rasterio.Env(**gdal_options()), rasterio.MemoryFile(data) as file, file.open(driver="GTiff") as raster:
        assert (raster.width, raster.height, raster.count) == (found.width_px, found.height_px, found.bands)
        together = raster.count if raster.interleaving is Interleaving.pixel else 1
        rows, cols = raster.block_shapes[0]
        sample_bytes = 4 if raster.dtypes[0] == "complex_int16" else np.dtype(raster.dtypes[0]).itemsize
        assert rows * cols * together * sample_bytes <= found.block_bytes


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "float32", "float64", "complex64", "complex128"])
def test_agrees_with_gdal_on_types(tmp_path: Path, dtype: str) -> None:
    pixels = texture(200, 300, bands=4).astype(dtype)
    _agree(write_tif(tmp_path / "a.tif", pixels, photometric="MINISBLACK", interleave="pixel").read_bytes())


@pytest.mark.parametrize("codec", ["JPEG", "DEFLATE", "ZSTD", "LZW", "WEBP", "LERC", "PACKBITS"])
def test_agrees_with_gdal_on_codecs(tmp_path: Path, codec: str) -> None:
    path = write_tif(tmp_path / "a.tif", texture(200, 300), photometric="RGB", interleave="pixel", compress=codec)
    _agree(path.read_bytes())


def _encoded(codec: str, side: int) -> bytes:
    """Return the one block of an image of zeros as GDAL writes it."""
    with rasterio.MemoryFile() as file:
        layout = {"width": side, "height": side, "count": 3, "interleave": "pixel", "blockysize": side}
        with file.open(driver="GTiff", dtype="uint8", photometric="RGB", compress=codec, **layout) as raster:
            raster.write(np.zeros((3, side, side), np.uint8))
        with file.open() as raster:
            start, size = (int(raster.get_tag_item(f"BLOCK_{item}_0_0", "TIFF", 1)) for item in ("OFFSET", "SIZE"))
        return bytes(file.getbuffer()[start : start + size])


def _jpeg(side: int, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (200, 30, 30)).save(stream, "JPEG", **options)
    return stream.getvalue()


def _stated(jpeg: bytes, height: int, width: int) -> bytes:
    """Let a JPEG state another size in its header of the frame."""
    at = next(jpeg.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in jpeg)
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


_READ = """
    import sys, warnings
    import rasterio
    from rasterio.errors import RasterioError
    from geocentroids_tiler.source import gdal_options

    def peak_kb():
        return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

    warnings.simplefilter("ignore")
    with rasterio.Env(**gdal_options()), rasterio.open(sys.argv[1], driver="GTiff") as raster:
        raster.read()
    before = peak_kb()
    for path in sys.argv[2:]:
        with rasterio.Env(**gdal_options()):
            try:
                with rasterio.open(path, driver="GTiff") as raster:
                    raster.read()
            except RasterioError:
                pass
        print(path, peak_kb() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_blocks_that_decode_to_more_than_they_hold(tmp_path: Path) -> None:
    """What a block takes is bounded by what its directory says, for each codec that is accepted."""
    webp = io.BytesIO()
    Image.new("RGB", (8192, 8192)).save(webp, "WEBP", lossless=True, method=0)
    blobs = {
        "deflate": (8, zlib.compress(bytes(2**28))),
        "zstd": (50000, _encoded("ZSTD", 8192)),
        "lzw": (5, _encoded("LZW", 4096)),
        "packbits": (32773, _encoded("PACKBITS", 4096)),
        "webp": (50001, webp.getvalue()),
        "lerc": (34887, _encoded("LERC", 8192)),
        "jpeg-32": (7, _jpeg(32)),
        "jpeg-65000": (7, _stated(_jpeg(64), 65000, 65000)),
        "jpeg-progressive": (7, _stated(_jpeg(64, progressive=True), 65000, 65000)),
        "jpeg-progressive-rows": (7, _stated(_jpeg(16, progressive=True), 65000, 16)),
    }
    one = {256: Tag(SHORT, (16,)), 257: Tag(SHORT, (16,)), 324: Tag(LONG, (blob_at(),))}
    paths = [tmp_path / "plain.tif"]
    paths[0].write_bytes(tiff(image()))
    for name, (codec, blob) in blobs.items():
        tags = image() | one | {259: Tag(LONG, (codec,)), 325: Tag(LONG, (len(blob),))}
        if codec == 7:
            tags |= {262: Tag(SHORT, (6,)), 530: Tag(SHORT, (2, 2))}
        if codec == 34887:
            tags |= {50674: Tag(LONG, (4, 0))}
        paths.append(tmp_path / f"{name}.tif")
        paths[-1].write_bytes(tiff(tags, blob=blob))
        assert check(paths[-1].read_bytes())[0].block_bytes <= 1024
    command = [sys.executable, "-c", textwrap.dedent(_READ), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    taken = {Path(line.split()[0]).stem: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert taken.keys() == blobs.keys()
    assert max(taken.values()) < 64 * 1024, taken  # kilobytes; decoded they are 48 to 256 MiB
