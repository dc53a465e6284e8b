"""What each stage costs on this machine, and what that means for more images and more requests than one machine takes.

    python benchmarks/scaling.py IMAGE [--figures figures.json]     measure, print, and write the figures
    python benchmarks/scaling.py --figures figures.json             project from figures measured before

Every projection is a division of what is wanted by a figure of the table, with nothing gained by working together: so
it is a lower bound of machines, in a number that was measured here. What queues add is in scaling_simulation.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import morecantile
import numpy as np

from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.labels.export import classify
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.labels.store import ChunkKey
from geocentroids_tiler.labels.tiers import encode_labels, key_digest
from geocentroids_tiler.render import Style
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions, open_dataset, read_windows, source_identity
from geocentroids_tiler.tiles import draw_tile, tile_view

SECONDS = 5.0
TMS = morecantile.tms.get("WebMercatorQuad")


@dataclass(frozen=True)
class Figures:
    """What was measured, on one machine; rates of one core are of one thread alone.

    Attributes:
        cores: of the machine.
        device: what ran the encoder, on all cores.
        dim: length of a token.
        chunk_m: side of a chunk on the ground; one window is encoded for each.
        open_s: to open an image whose header was not read before.
        read_windows_per_core_s: windows read and resampled in a second by one thread.
        encode_windows_s: windows encoded and assigned in a second by the device.
        classify_windows_s: windows in a second from file to label raster, all stages together.
        draw_tiles_per_core_s: tiles of 256 px drawn and encoded in a second from labels in memory, by one thread.
        image_bytes_per_window: bytes of the file for each window of ground, overviews included.
        label_bytes_per_window: of a label raster.
        stored_bytes_per_window: of a chunk in Redis or LMDB.
        tile_bytes: of a drawn tile.
    """

    cores: int
    device: str
    dim: int
    chunk_m: float
    open_s: float
    read_windows_per_core_s: float
    encode_windows_s: float
    classify_windows_s: float
    draw_tiles_per_core_s: float
    image_bytes_per_window: float
    label_bytes_per_window: float
    stored_bytes_per_window: float
    tile_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="?")
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--oam-images", type=float, default=20_000, help="assumed size of OpenAerialMap")
    parser.add_argument("--km2", type=float, default=1.0, help="assumed ground of an image")
    parser.add_argument("--gpu-windows", type=float, help="windows/s of a GPU, for another column; measure it there")
    options = parser.parse_args()
    if options.image is not None:
        figures = measure(options.image)
        if options.figures is not None:
            options.figures.write_text(json.dumps(asdict(figures), indent=2))
    elif options.figures is not None:
        figures = Figures(**json.loads(options.figures.read_text()))
    else:
        parser.error("name an image to measure, or --figures")
    show(figures)
    bulk(figures, "2,000 images", 2_000 * options.km2, 2_000, options.gpu_windows)
    bulk(figures, "all of OpenAerialMap", options.oam_images * options.km2, options.oam_images, options.gpu_windows)
    serving(figures, 1_000, options.gpu_windows)


def measure(image: Path) -> Figures:
    """Measure every stage on one image."""
    service = Service(Settings(root=image.parent, read_threads=4))
    codebook = service.codebook(None)
    source = service.source(image.name)
    start = time.perf_counter()
    dataset = open_dataset(source, source_identity(source), ReadOptions(), codebook)
    open_s = time.perf_counter() - start
    pre, patch_px = codebook.manifest.preprocess, codebook.manifest.encoder.patch_px
    chunks = list(dataset.footprint.chunks(pre.stride_patches))
    engine = service.engine(codebook).result()
    read = rate(lambda part: read_windows(dataset, part, patch_px), batches(chunks, 16))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        raster = Path(folder) / "labels.tif"
        classify(engine, dataset, service.classes(codebook, None), raster)
        classify_s = time.perf_counter() - start
        label_bytes = raster.stat().st_size
    tiles = tiles_of(dataset.geographic_bounds)
    drawn, tile_bytes = draw_rate(service, dataset, engine, tiles)
    kept = [engine.chunk(dataset, chunk).result() for chunk in chunks[: min(len(chunks), 500)]]
    key = ChunkKey(*dataset.key, codebook.digest, engine.device_name, 0, 0)
    stored = np.mean([len(encode_labels(key_digest(key), chunk)) for chunk in kept])
    figures = Figures(
        cores=os.cpu_count() or 1,
        device=engine.device_name,
        dim=codebook.manifest.encoder.dim,
        chunk_m=pre.stride_patches * dataset.grid.patch_m,
        open_s=open_s,
        read_windows_per_core_s=read,
        encode_windows_s=1 / engine.seconds_per_chunk,
        classify_windows_s=len(chunks) / classify_s,
        draw_tiles_per_core_s=drawn,
        image_bytes_per_window=image.stat().st_size / len(chunks),
        label_bytes_per_window=label_bytes / len(chunks),
        stored_bytes_per_window=float(stored),
        tile_bytes=tile_bytes,
    )
    service.close()
    return figures


def batches(chunks: list[ChunkIndex], size: int) -> list[list[ChunkIndex]]:
    return [chunks[i : i + size] for i in range(0, len(chunks), size)]


def rate(work: object, parts: list[list[ChunkIndex]]) -> float:
    """Return items done in a second by one thread."""
    done, start = 0, time.perf_counter()
    for part in parts:
        list(work(part))  # type: ignore[operator]
        done += len(part)
        if time.perf_counter() - start > SECONDS:
            break
    return done / (time.perf_counter() - start)


def tiles_of(bounds: tuple[float, float, float, float], zoom: int = 18) -> list[morecantile.Tile]:
    return list(TMS.tiles(*bounds, [zoom]))


def draw_rate(service: Service, dataset: object, engine: object, tiles: list[morecantile.Tile]) -> tuple[float, float]:
    """Return tiles drawn in a second by one thread from labels that are there, and the bytes of one."""
    codebook = service.codebook(None)
    classes = service.classes(codebook, None)
    views = [tile_view(TMS, tile, 256, dataset.grid, dataset.footprint) for tile in tiles]  # type: ignore[attr-defined]
    found = [(tile, view) for tile, view in zip(tiles, views, strict=True) if view is not None]
    blocks = [engine.block(dataset, view.patches) for _, view in found]  # type: ignore[attr-defined]
    sizes, start = [], time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        for (tile, _), block in zip(found, blocks, strict=True):
            view = tile_view(TMS, tile, 256, dataset.grid, dataset.footprint)  # type: ignore[attr-defined]
            if view is not None:
                look = classes, Style(), codebook.similarity_range(), "png"
                sizes.append(len(draw_tile(view, block, *look)))  # type: ignore[arg-type]
    return len(sizes) / (time.perf_counter() - start), float(np.mean(sizes))


def show(figures: Figures) -> None:
    """Print what was measured."""
    f = figures
    print(f"Machine: {f.cores} cores, {f.device}; a window for each {f.chunk_m:.0f} m x {f.chunk_m:.0f} m of ground\n")
    print("| stage | rate | bytes |\n|---|---|---|")
    print(f"| open an image | {1 / f.open_s:.0f} images/s and core | |")
    print(
        f"| read | {f.read_windows_per_core_s:.0f} windows/s and core | {f.image_bytes_per_window / 1e3:.0f} kB read |"
    )
    print(f"| encode, blend, assign | {f.encode_windows_s:.0f} windows/s | |")
    print(
        f"| all of it (`classify`) | {f.classify_windows_s:.0f} windows/s | {f.label_bytes_per_window:.0f} B of label "
        f"raster, {f.stored_bytes_per_window:.0f} B in a store |"
    )
    print(f"| features for fitting | as encode | {2 * f.dim} B a patch |")
    print(f"| draw a tile | {f.draw_tiles_per_core_s:.0f} tiles/s and core | {f.tile_bytes / 1e3:.1f} kB |\n")


def bulk(figures: Figures, name: str, km2: float, images: float, gpu_windows: float | None) -> None:
    """Print what labelling much ground takes."""
    f = figures
    windows = km2 * 1e6 / f.chunk_m**2
    hours = windows / f.classify_windows_s / 3600
    read_hours = windows / f.read_windows_per_core_s / 3600
    print(f"{name}: {images:,.0f} images, {km2:,.0f} km2, {windows:,.0f} windows")
    print(f"- this machine: {hours:,.1f} h; N of them: 1/N of that, as images do not wait for each other")
    print(f"- of it reading: {read_hours:,.1f} core hours; opening: {images * f.open_s / 3600:,.2f} core hours")
    print(f"- read: {windows * f.image_bytes_per_window / 1e9:,.1f} GB (with overviews)")
    print(
        f"- kept: {windows * f.label_bytes_per_window / 1e9:,.2f} GB of label rasters, or "
        f"{windows * f.stored_bytes_per_window / 1e9:,.2f} GB in a store"
    )
    if gpu_windows:
        cores = gpu_windows / f.read_windows_per_core_s
        print(f"- a GPU of {gpu_windows:,.0f} windows/s: {windows / gpu_windows / 3600:,.2f} h with {cores:,.0f} cores")
    print()


def serving(figures: Figures, tiles_s: float, gpu_windows: float | None) -> None:
    """Print what cold tiles of zoom 18 take."""
    f = figures
    lat = 30.0
    tile_m = 40_075_016.7 / 2**18 * math.cos(math.radians(lat))
    windows = (tile_m / f.chunk_m) ** 2
    need = tiles_s * windows
    print(
        f"{tiles_s:,.0f} cold tiles/s of zoom 18 at {lat:.0f} degrees: {windows:.1f} windows each, {need:,.0f} a second"
    )
    print(f"- encoders: {need / f.encode_windows_s:,.0f} machines as this one")
    if gpu_windows:
        print(f"- or {need / gpu_windows:,.1f} GPUs of {gpu_windows:,.0f} windows/s")
    print(f"- readers: {need / f.read_windows_per_core_s:,.0f} cores")
    print(f"- drawing: {tiles_s / f.draw_tiles_per_core_s:,.1f} cores")
    print(f"- from the sources: {need * f.image_bytes_per_window * 8 / 1e9:,.1f} Gbit/s")
    pixels = 3 * (2 * f.chunk_m / 0.25) ** 2
    print(f"- pixels from ingress to encoders, windows sent once: {need * pixels * 8 / 1e9:,.0f} Gbit/s")
    print(f"- to Redis: {need * f.stored_bytes_per_window * 8 / 1e6:,.0f} Mbit/s, {need:,.0f} writes/s in batches")
    print(f"- to clients: {tiles_s * f.tile_bytes * 8 / 1e6:,.0f} Mbit/s")


if __name__ == "__main__":
    main()
