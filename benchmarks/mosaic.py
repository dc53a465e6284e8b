"""A layer of many images against one image of the same ground: what opening it costs, and a tile.

    python benchmarks/mosaic.py [--footprints 10000] [--side 6] [--rounds 3]

The sample scene is cut into SIDE x SIDE images; a list, a MosaicJSON and STAC items name them among FOOTPRINTS, the
others somewhere else and without a file: they must never be opened. Tiles are asked for in one process, over ASGI:
hot (answered before), drawn (labels in memory, the tile anew) and cold (labels computed, with a cache of nothing).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import morecantile
import numpy as np
import rasterio
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from geocentroids_tiler.app import create_app
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.metrics import exposition
from geocentroids_tiler.mosaic import Mosaic, read_document
from geocentroids_tiler.scene import ensure_demo_scene
from geocentroids_tiler.settings import Settings

TMS = morecantile.tms.get("WebMercatorQuad")
ZOOM = 18
Bounds = tuple[float, float, float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--footprints", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = ensure_demo_scene(folder)
        members = cut(scene, folder, options.side) + elsewhere(options.footprints - options.side**2)
        documents = write_documents(folder, members)
        opening(documents)
        asyncio.run(tiles(folder, scene.name, documents, members[: options.side**2], options.rounds))


def cut(scene: Path, folder: Path, side: int) -> list[tuple[str, Bounds]]:
    """Write a scene as side x side images, and return their names and bounds in degrees."""
    found = []
    with rasterio.open(scene) as raster:
        rows = np.linspace(0, raster.height, side + 1).astype(int)
        cols = np.linspace(0, raster.width, side + 1).astype(int)
        for i in range(side):
            for j in range(side):
                window = Window(cols[j], rows[i], cols[j + 1] - cols[j], rows[i + 1] - rows[i])
                path = folder / f"part-{i}-{j}.tif"
                profile = raster.profile | {
                    "driver": "COG",
                    "width": window.width,
                    "height": window.height,
                    "transform": raster.window_transform(window),
                }
                with rasterio.open(path, "w", **{k: v for k, v in profile.items() if not k.startswith("block")}) as out:
                    out.write(raster.read(window=window))
                    bounds = transform_bounds(out.crs, "EPSG:4326", *out.bounds)
                found.append((path.name, bounds))
    return found


def elsewhere(count: int) -> list[tuple[str, Bounds]]:
    """Return images all over the world, 500 m wide, that do not exist."""
    rng = np.random.default_rng(0)
    lon, lat = rng.uniform(-179, 178, count), rng.uniform(-60, 70, count)
    return [(f"none-{i}.tif", (x, y, x + 0.005, y + 0.005)) for i, (x, y) in enumerate(zip(lon, lat, strict=True))]


def write_documents(folder: Path, members: Sequence[tuple[str, Bounds]]) -> dict[str, Path]:
    """Write the same images as a table, as a MosaicJSON and as STAC items."""
    table = ["url,west,south,east,north", *(",".join([name, *map(repr, map(float, box))]) for name, box in members)]
    quadkeys: dict[str, list[str]] = {}
    for name, box in members:
        for tile in TMS.tiles(*box, [14]):
            quadkeys.setdefault(TMS.quadkey(tile), []).append(name)
    items = {"type": "FeatureCollection", "features": [item(name, box) for name, box in members]}
    contents = {
        "table": ("table.csv", "\n".join(table)),
        "MosaicJSON": ("mosaic.json", json.dumps({"mosaicjson": "0.0.3", "quadkey_zoom": 14, "tiles": quadkeys})),
        "STAC items": ("items.json", json.dumps(items)),
    }
    paths = {}
    for kind, (name, text) in contents.items():
        paths[kind] = folder / name
        paths[kind].write_text(text)
    return paths


def item(name: str, box: Bounds) -> dict[str, Any]:
    west, south, east, north = map(float, box)
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "id": name,
        "bbox": [west, south, east, north],
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"datetime": "2024-05-31T12:00:00Z", "gsd": 0.25, "title": f"image {name}"},
        "links": [],
        "assets": {"visual": {"href": name, "type": "image/tiff; application=geotiff", "roles": ["visual"]}},
    }


def opening(documents: dict[str, Path]) -> None:
    """Print what reading a document and finding images in it cost."""
    print("| document | size | read | index | images under a tile |\n|---|---|---|---|---|")
    for kind, path in documents.items():
        content = path.read_bytes()
        start = time.perf_counter()
        document = read_document(content, path.name, 2**30, 10**6)
        read_s = time.perf_counter() - start
        start = time.perf_counter()
        mosaic = Mosaic(path.name, "1", document.members, 3.5)
        zones = mosaic.zones
        zone = next(zone for zone in zones if 0 in zone.members)
        west, south, east, north = document.members[0].footprint.bounds
        patches = patches_at(zone, (west + east) / 2, (south + north) / 2)
        mosaic.under(patches, zone.grid, "first")
        index_s = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(100):
            mosaic.under(patches, zone.grid, "first")
        under_s = (time.perf_counter() - start) / 100
        print(
            f"| {kind}, {len(document.members)} images | {len(content) / 1e6:.1f} MB | {read_s * 1e3:.0f} ms | "
            f"{index_s * 1e3:.0f} ms ({len(zones)} grids) | {under_s * 1e3:.2f} ms |"
        )


def patches_at(zone: Any, lon: float, lat: float) -> Any:
    from geocentroids_tiler.grid import WGS84, PatchRange, project

    row, col = (int(value) for value in zone.grid.patch_of(*project(WGS84, zone.grid.crs, lon, lat)))
    return PatchRange(row, row + 44, col, col + 44)


async def tiles(
    folder: Path, scene: str, documents: dict[str, Path], members: Sequence[tuple[str, Bounds]], rounds: int
) -> None:
    """Print what tiles cost."""
    boxes = np.array([box for _, box in members])
    bounds = *boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)
    wanted = list(TMS.tiles(*(float(value) for value in bounds), [ZOOM]))
    names = {"one image": scene, **{kind: path.name for kind, path in documents.items()}}
    first: dict[str, float] = {}
    cold: dict[str, list[float]] = {name: [] for name in names}
    drawn: dict[str, list[float]] = {name: [] for name in names}
    hot: dict[str, list[float]] = {name: [] for name in names}
    windows: dict[str, float] = {}
    for _ in range(rounds):
        for name, url in names.items():
            service = Service(Settings(root=folder, tile_budget_s=600))
            app = create_app(service=service)
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=600) as client:
                service.engine(service.codebook(None)).result()
                first[name] = min(first.get(name, 1e9), await timed(client, f"/cog/geocentroids/footprints?url={url}"))
                cold[name] += [await timed(client, address(tile, url)) for tile in wanted]
                drawn[name] += [await timed(client, address(tile, url, size)) for size in (257, 258) for tile in wanted]
                hot[name] += [await timed(client, address(tile, url)) for tile in wanted]
            windows[name] = windows_encoded(service)
            service.close()
    print(f"\n{len(wanted)} tiles of zoom {ZOOM}, {rounds} rounds; p50 (ratio to one image)\n")
    print("| layer | opened | hot | drawn | cold | windows |\n|---|---|---|---|---|---|")
    for name in names:
        parts = [f"| {name} | {first[name] * 1e3:.0f} ms"]
        for times in (hot, drawn, cold):
            own, peer = statistics.median(times[name]), statistics.median(times["one image"])
            parts.append(f" {own * 1e3:.2f} ms ({own / peer:.2f})")
        parts.append(f" {windows[name]:.0f} ({windows[name] / windows['one image']:.2f})")
        print(" |".join(parts) + " |")


def windows_encoded(service: Service) -> float:
    """Return how many windows the device encoded."""
    lines = exposition(service).decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith("geocentroids_windows_encoded_total")
    )


def address(tile: morecantile.Tile, url: str, size: int = 256) -> str:
    place = f"{tile.z}/{tile.x}/{tile.y}"
    return f"/cog/geocentroids/tiles/WebMercatorQuad/{place}.png?url={url}&tilesize={size}"


async def timed(client: httpx.AsyncClient, path: str) -> float:
    start = time.perf_counter()
    answer = await client.get(path)
    answer.raise_for_status()
    assert "X-Geocentroids-Missing" not in answer.headers, path
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
