"""Fuzzing of what looks at strangers' TIFFs, led by coverage of our Python code.

    pip install atheris
    python benchmarks/fuzz_tiff.py header CORPUS [--findings FOLDER] [-- -max_total_time=600]
    python benchmarks/fuzz_tiff.py opening CORPUS [--findings FOLDER] [-- -max_total_time=600]

``header`` feeds bytes to ``check_tiff``, and to GDAL what passes: an image that GDAL takes for a larger one than was
checked is a finding. ``opening`` opens them as a remote file in memory, places it and reads a small window. In both,
only the two kinds of errors that callers handle may come out, and time and memory are bounded. What follows ``--`` is
for libFuzzer. CORPUS is filled with generated images first; inputs with findings go to a folder beside it, one of each
kind, and the search goes on. At its end libFuzzer prints executions, coverage and the corpus.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["geocentroids_tiler.source"], enable_loader_override=False):
    import geocentroids_tiler.source.opener
    import geocentroids_tiler.source.pixels  # noqa: F401

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.shutil import copy as copy_raster

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rasters import codebook_for, texture, write_tif

from geocentroids_tiler.errors import GeocentroidsError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.source import ReadOptions, RemotePolicy, Source, gdal_options, open_dataset, read_windows
from geocentroids_tiler.source.deadline import Deadline
from geocentroids_tiler.source.remote import Remote
from geocentroids_tiler.source.stores import Fetched
from geocentroids_tiler.source.tiff_header import Directory, NotTiffError, check_tiff

MAX_INPUT_BYTES = 64 * 1024
MAX_INPUT_S = 3.0
MAX_RSS_BYTES = 600 * 2**20
PATCH_PX = 14
URL = "https://example.com/image.tif"
ALIKE = ReadOptions(bidx=(1, 1, 1), rescale=(0, 255))
"""Reads images of any bands and type."""


# Seeds


def write_seeds(folder: Path) -> None:
    """Write small images of every kind that is read: layouts, codecs, types, overviews, masks and metadata."""
    pixels = texture(48, 64)
    tiles: dict[str, Any] = {"blockxsize": 16, "blockysize": 16, "photometric": "RGB"}

    def seed(name: str, bands: Any = pixels, **options: Any) -> Path:
        return write_tif(folder / f"{name}.tif", bands, **tiles | options)

    for codec in ("JPEG", "DEFLATE", "ZSTD", "LZW", "WEBP", "LERC", "PACKBITS"):
        seed(f"codec-{codec}", compress=codec, **({"interleave": "pixel"} if codec in ("JPEG", "WEBP") else {}))
    seed("ycbcr", compress="JPEG", photometric="YCBCR", interleave="pixel")
    seed("lzma", compress="LZMA")
    for big in ("NO", "YES"):
        for order in ("LITTLE", "BIG"):
            for interleave in ("pixel", "band"):
                seed(f"layout-{big}-{order}-{interleave}", BIGTIFF=big, ENDIANNESS=order, interleave=interleave)
        seed(f"strips-{big}", BIGTIFF=big, tiled=False, blockxsize=None, blockysize=8)
    seed("overviews", overviews=(2, 4))
    seed("mask", mask=pixels[0] > 100, overviews=(2,))
    seed("nodata", nodata=0)
    seed("metadata", tags={"": {"AREA": "here"}, "OTHER": {"key": "a & b < c"}})
    four = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    seed("alpha", texture(48, 64, bands=4), colors=four)
    seed("palette", pixels[:1], photometric=None, colormap={0: (0, 0, 0, 255), 1: (9, 9, 9, 255)})
    for dtype in ("uint16", "int16", "uint32", "float32", "float64", "complex64", "int8"):
        seed(f"type-{dtype}", pixels.astype(dtype), photometric="MINISBLACK")
    seed("predictor", pixels.astype("float32"), photometric="MINISBLACK", compress="DEFLATE", predictor=3)
    for bits in (1, 4, 12):
        kind = "uint16" if bits > 8 else "uint8"
        seed(f"bits-{bits}", (pixels[:1] & 1).astype(kind), photometric="MINISBLACK", nbits=bits)
    with rasterio.Env():
        for codec in ("JPEG", "DEFLATE"):
            copy_raster(
                folder / "layout-NO-LITTLE-pixel.tif", folder / f"cog-{codec}.tif", driver="COG", blocksize=32,
                compress=codec, overviews="AUTO", overview_resampling=Resampling.average.name,
            )  # fmt: skip
    _with_sub_ifd(folder / "overviews.tif", folder / "sub-ifd.tif")


def _with_sub_ifd(source: Path, target: Path) -> None:
    """Copy a classic TIFF whose second directory becomes one that the first names."""
    data = bytearray(source.read_bytes())
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    end = first + 2 + count * 12
    following = struct.unpack_from("<I", data, end)[0]
    entry = struct.pack("<HHII", 330, 13, 1, following)
    moved = struct.pack("<H", count + 1) + data[first + 2 : end] + entry + bytes(4)
    struct.pack_into("<I", data, 4, len(data) + len(data) % 2)
    target.write_bytes(bytes(data) + bytes(len(data) % 2) + moved)


# Mutations that know what a TIFF is made of

TAGS = (254, 256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330, 338, 339, 347, 530,
        33550, 33922, 34264, 34735, 34736, 34737, 34665, 42112, 42113, 50674, 50844, 50909)  # fmt: skip
KINDS = (*range(20), 0x8000, 0xFFFF)
NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 32, 64, 127, 255, 256, 4095, 4096, 4097, 0x7FFF, 0x8000, 0xFFFF, 0x10000,
           2**20, 2**20 + 1, 2**22, 2**28, 2**30, 2**31 - 1, 2**31, 2**32 - 16, 2**32 - 1, 2**32, 2**63 - 1,
           2**64 - 1)  # fmt: skip
CODECS = (1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34676, 34887, 34925, 50000, 50001, 50002)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a TIFF's directories, or bytes anywhere."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return bytes(atheris.Mutate(data, max_size))
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        with contextlib.suppress(struct.error, IndexError):
            rng.choice((_change_entry, _change_entry, _change_entry, _copy_entry, _change_link, _change_values))(
                changed, rng
            )
    return bytes(changed[:max_size])


def _layout(data: bytes) -> tuple[str, bool]:
    return (">" if data[:2] == b"MM" else "<"), data[2:4] in (b"\x2b\0", b"\0\x2b")


def _directories(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the entries of a directory start, and how many they are."""
    order, big = _layout(data)
    seen: set[int] = set()
    offset = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0]
    while 0 < offset < len(data) and offset not in seen and len(seen) < 8:
        seen.add(offset)
        count = struct.unpack_from(order + ("Q" if big else "H"), data, offset)[0]
        start = offset + (8 if big else 2)
        if not 0 < count < 256:
            return
        yield start, count
        offset = struct.unpack_from(order + ("Q" if big else "I"), data, start + count * (20 if big else 12))[0]


def _some_entry(data: bytes, rng: random.Random) -> int:
    start, count = rng.choice(list(_directories(data)))
    return start + rng.randrange(count) * (20 if _layout(data)[1] else 12)


def _change_entry(data: bytearray, rng: random.Random) -> None:
    order, big = _layout(data)
    word, size = order + ("Q" if big else "I"), 8 if big else 4
    at = _some_entry(data, rng)
    tag = struct.unpack_from(order + "H", data, at)[0]
    match rng.randrange(5):
        case 0:
            struct.pack_into(order + "H", data, at, rng.choice(TAGS))
        case 1:
            struct.pack_into(order + "H", data, at + 2, rng.choice(KINDS))
        case 2:
            struct.pack_into(word, data, at + 4, rng.choice(NUMBERS) % 2 ** (8 * size))
        case 3:
            value = rng.choice(CODECS if tag == 259 else NUMBERS)
            kind = struct.unpack_from(order + "H", data, at + 2)[0]
            code = {1: "B", 3: "H"}.get(kind, "Q" if big and kind in (16, 18) else "I")
            struct.pack_into(order + code, data, at + 4 + size, value % 2 ** (8 * struct.calcsize(code)))
        case 4:
            struct.pack_into(word, data, at + 4 + size, rng.randrange(len(data)))


def _copy_entry(data: bytearray, rng: random.Random) -> None:
    entry_bytes = 20 if _layout(data)[1] else 12
    source, target = _some_entry(data, rng), _some_entry(data, rng)
    there = bytes(data[target : target + entry_bytes])
    data[target : target + entry_bytes] = data[source : source + entry_bytes]
    if rng.random() < 0.5:
        data[source : source + entry_bytes] = there


def _change_link(data: bytearray, rng: random.Random) -> None:
    """Let a directory be followed by another one, itself included."""
    order, big = _layout(data)
    word = order + ("Q" if big else "I")
    places = list(_directories(data))
    start, count = rng.choice(places)
    target = rng.choice(places)[0] - (8 if big else 2) if rng.random() < 0.7 else rng.randrange(len(data))
    at = rng.choice((start + count * (20 if big else 12), 8 if big else 4))
    struct.pack_into(word, data, at, target)


def _change_values(data: bytearray, rng: random.Random) -> None:
    """Change a number of a list that an entry points to."""
    order, big = _layout(data)
    at = _some_entry(data, rng)
    place = struct.unpack_from(order + ("Q" if big else "I"), data, at + (12 if big else 8))[0]
    struct.pack_into(order + "I", data, place + 4 * rng.randrange(8), rng.choice(NUMBERS) % 2**32)


# What is fuzzed


class Finding(Exception):  # noqa: N818 - a finding is not an error of ours alone
    """What must not be."""


class MemoryStore:
    """A web server with one file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def fetch(self, url: str, start: int, stop: int, deadline: Deadline, *, ask_again: bool = False) -> Fetched:
        return Fetched(f"etag--{len(self.data)}", self.data[start:stop])

    def close(self) -> None:
        """Do nothing."""


def check_header(data: bytes) -> bool:
    """Target: the look at the directories, and whether GDAL sees the same images. Tells whether it sees one."""

    def read(offset: int, count: int) -> bytes:
        if offset < 0 or count < 0:
            raise Finding(f"read({offset}, {count})")
        if offset > len(data):
            raise Finding("a read beyond the end")
        return data[offset : offset + count]

    try:
        directories = check_tiff(read, len(data))
    except (GeocentroidsError, NotTiffError):
        return False
    return compare_with_gdal(data, directories)


def compare_with_gdal(data: bytes, directories: list[Directory]) -> bool:
    """Open an accepted image with GDAL, its overviews as well, and look for more than was checked."""
    with rasterio.Env(**gdal_options()), rasterio.MemoryFile(data) as file:
        try:
            with file.open(driver="GTiff") as raster:
                _compare(raster, directories[:1], "image")
                levels = len(raster.overviews(1))
        except (rasterio.errors.RasterioError, UnicodeError):
            return False
        for level in range(min(levels, 8)):
            with (
                contextlib.suppress(rasterio.errors.RasterioError, UnicodeError),
                file.open(driver="GTiff", overview_level=level) as raster,
            ):
                _compare(raster, directories, "overview")
    return True


def _compare(raster: Any, directories: list[Directory], what: str) -> None:
    together = raster.count if raster.interleaving is rasterio.enums.Interleaving.pixel else 1
    rows, cols = raster.block_shapes[0]
    block_bytes = rows * cols * together * np.dtype(raster.dtypes[0]).itemsize
    seen = f"{raster.width} x {raster.height} x {raster.count} of {raster.dtypes[0]}, blocks {cols} x {rows}"
    # Colour spaces that GDAL does not know it shows as RGBA: four bands, which a block's size is counted for.
    same = [
        d
        for d in directories
        if (d.width_px, d.height_px) == (raster.width, raster.height) and raster.count in (d.bands, 4)
    ]
    if not same:
        raise Finding(f"{what}: another size or number of bands", seen, directories)
    if block_bytes > max(directory.block_bytes for directory in same):
        raise Finding(f"{what}: larger blocks", seen, directories)


CODEBOOK = codebook_for(gsd_m=0.25, window=4, margin=1, stride=2)


def open_whole(data: bytes) -> bool:
    """Target: all that happens to a remote file from its opening to a window. Tells whether that was read."""
    with contextlib.closing(Remote(RemotePolicy(), MemoryStore(data), cache_bytes=2**20)) as remote:
        source = Source(URL, remote=remote)
        try:
            identity = remote.identity(URL)
            dataset = open_dataset(source, identity, ALIKE, CODEBOOK)
            area = dataset.footprint
            read_windows(dataset, [ChunkIndex(area.row_start // 2, area.col_start // 2)], PATCH_PX)
        except GeocentroidsError:
            return False
    return True


class Watched:
    """A target with its time and memory, which keeps one input of each kind of finding."""

    def __init__(self, target: Callable[[bytes], bool], findings: Path) -> None:
        self.target, self.findings = target, findings
        self.accepted_rss = MAX_RSS_BYTES
        self.executions = self.opened = 0
        self.slowest_s = 0.0
        findings.mkdir(parents=True, exist_ok=True)

    def __call__(self, data: bytes) -> None:
        self.executions += 1
        (self.findings / "last-input").write_bytes(data)  # should the process die
        start = time.perf_counter()
        try:
            self.opened += self.target(data)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error.args[0]) if isinstance(error, Finding) else f"{Path(frame.filename).name}:{frame.lineno}"
            self._keep(f"{type(error).__name__} {text}", data, traceback.format_exc())
        spent_s = time.perf_counter() - start
        self.slowest_s = max(self.slowest_s, spent_s)
        if spent_s > MAX_INPUT_S:
            self._keep("slow", data, f"{spent_s:.1f} s")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > self.accepted_rss:
            self._keep(f"memory {peak >> 26 << 6} MiB", data, f"{peak / 2**20:.0f} MiB")
            self.accepted_rss = peak + 2**26
        if self.executions % 10_000 == 0:
            print(
                f"{self.executions} inputs, {self.opened} opened, slowest {self.slowest_s:.2f} s, peak RSS "
                f"{peak / 2**20:.0f} MiB, {len(list(self.findings.glob('*.txt')))} kinds of findings", flush=True
            )  # fmt: skip

    def _keep(self, kind: str, data: bytes, text: str) -> None:
        name = "".join(c if c.isalnum() else "-" for c in kind)[:80]
        if not (self.findings / f"{name}.tif").exists():
            (self.findings / f"{name}.tif").write_bytes(data)
            (self.findings / f"{name}.txt").write_text(text)
            print(f"FINDING {kind}: {text.strip().splitlines()[-1]}", flush=True)


TARGETS = {"header": check_header, "opening": open_whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--findings", type=Path)
    parser.add_argument("--replay", action="store_true", help="run the corpus' files once, without fuzzing")
    parser.add_argument("libfuzzer", nargs="*")
    args = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    args.corpus.mkdir(parents=True, exist_ok=True)
    if args.replay:
        for path in sorted(args.corpus.glob("*")):
            print(path.name)
            TARGETS[args.target](path.read_bytes())
        return
    with tempfile.TemporaryDirectory() as scratch:
        write_seeds(Path(scratch))
        for path in Path(scratch).iterdir():
            shutil.copy(path, args.corpus)
    watched = Watched(TARGETS[args.target], args.findings or args.corpus.with_name(args.corpus.name + "-findings"))
    options = [
        f"-max_len={MAX_INPUT_BYTES}",
        "-len_control=0",
        "-reduce_inputs=0",
        "-timeout=30",
        "-rss_limit_mb=4096",
        *args.libfuzzer,
    ]
    atheris.Setup([sys.argv[0], *options, str(args.corpus)], watched, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
