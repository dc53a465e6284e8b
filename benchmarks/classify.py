"""Label a whole image on the command line: wall time, peak memory, and whether the tiles show the same labels.

Every tile of the image is fetched from the application, and the colour of each of its pixels is compared with the
colour of the label under it in the file that `geocentroids classify` wrote; the place of the pixel is computed with
rasterio, not with our own code.

    python benchmarks/classify.py IMAGE.tif
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import morecantile
import numpy as np
import rasterio
from fastapi.testclient import TestClient
from PIL import Image
from rasterio.warp import transform

from geocentroids_tiler.app import create_app
from geocentroids_tiler.settings import Settings


def compare(source: Path, labels: Path, codebook: str, zoom: int) -> tuple[int, int]:
    """Return the pixels of all tiles of a zoom level, and how many differ from the label file."""
    tms = morecantile.tms.get("WebMercatorQuad")
    settings = Settings(root=source.parent, codebook=codebook, tile_budget_s=600)
    compared = different = 0
    with TestClient(create_app(settings)) as client, rasterio.open(labels) as raster:
        ids, inverse = raster.read(1), ~raster.transform
        palette = np.zeros((65536, 4), np.uint8)
        for label, color in raster.colormap(1).items():
            palette[label] = color
        palette[65535] = 0
        bounds = client.get(f"/cog/geocentroids/WebMercatorQuad/tilejson.json?url={source.name}").json()["bounds"]
        for tile in tms.tiles(*bounds, zoom):
            address = f"/cog/geocentroids/tiles/WebMercatorQuad/{zoom}/{tile.x}/{tile.y}.png"
            answer = client.get(address, params={"url": source.name})
            shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))
            left, bottom, right, top = tms.xy_bounds(tile)
            x = left + (np.arange(256) + 0.5) / 256 * (right - left)
            y = top - (np.arange(256) + 0.5) / 256 * (top - bottom)
            xx, yy = np.meshgrid(x, y)
            gx, gy = transform("EPSG:3857", raster.crs, xx.ravel(), yy.ravel())
            col, row = inverse * (np.array(gx), np.array(gy))
            inside = (row >= 0) & (row < raster.height) & (col >= 0) & (col < raster.width)
            # Within 2 % of a patch's edge the two ways of placing a pixel may choose different sides.
            clear = (np.abs(row - np.rint(row)) > 0.02) & (np.abs(col - np.rint(col)) > 0.02)
            use = inside & clear
            expected = palette[ids[np.floor(row[use]).astype(int), np.floor(col[use]).astype(int)]]
            compared += int(use.sum())
            different += int((shown.reshape(-1, 4)[use] != expected).any(axis=1).sum())
    return compared, different


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("--codebook", default="nano")
    parser.add_argument("--zoom", type=int, default=18)
    arguments = parser.parse_args()
    source = arguments.image.resolve()
    with tempfile.TemporaryDirectory() as folder:
        labels = Path(folder) / "labels.tif"
        command = [sys.executable, "-m", "geocentroids_tiler.cli", "classify", str(source), str(labels)]
        start = time.perf_counter()
        subprocess.run([*command, "--codebook", arguments.codebook], check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        with rasterio.open(source) as raster, rasterio.open(labels) as written:
            patches = int((written.read(1) != 65535).sum())
            print(f"{source.name}: {raster.width} x {raster.height} px, {patches} patches labelled")
        print(
            f"classify: {seconds:.1f} s on {os.cpu_count()} cores, {patches / seconds:.0f} patches/s, "
            f"peak memory {peak_mib:.0f} MiB"
        )
        compared, different = compare(source, labels, arguments.codebook, arguments.zoom)
        print(f"tiles of zoom {arguments.zoom}: {compared} pixels compared, {different} differ")


if __name__ == "__main__":
    main()
