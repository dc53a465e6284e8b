"""A finished scene, and the GeoTIFFs it is kept in."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.scene.canvas import GSD_M, LAND_COVER, Canvas, expose
from geocentroids_tiler.scene.layout import paint_scene

SCENE_VERSION = 1
"""Part of the file name: raise it when the generator draws something else, and demos are written anew."""

SMALLEST_PX, LARGEST_PX = 1024, 6144

# Farmland west of Montevideo. The sun in the north-west fits the southern hemisphere.
_CRS = "EPSG:32721"
_ORIGIN_M = (556_320.0, 6_147_680.0)

_CLASS_COLOURS = {
    0: (176, 152, 118),
    1: (150, 178, 92),
    2: (214, 196, 92),
    3: (46, 104, 52),
    4: (52, 108, 168),
    5: (120, 120, 124),
    6: (196, 78, 62),
}


@dataclass(frozen=True)
class Scene:
    """An aerial image that was drawn, so that what it shows is known.

    Attributes:
        rgb: (H, W, 3) uint8.
        land_cover: (H, W) uint8, index into `LAND_COVER`. A shadow belongs to the ground it falls on.
        transform: pixel (col, row) to metres in ``crs``.
        crs: projected CRS in metres.
    """

    rgb: NDArray[np.uint8]
    land_cover: NDArray[np.uint8]
    transform: Affine
    crs: str


def make_scene(size_px: int = 3072, seed: int = 0) -> Scene:
    """Draw a scene of ``size_px`` x ``size_px`` pixels of 0.25 m; the same seed gives the same scene.

    Raises:
        InputError: ``size_px`` is too small to hold a landscape, or too large to be drawn in memory.
    """
    if not SMALLEST_PX <= size_px <= LARGEST_PX:
        raise InputError(f"size_px is {size_px}; a scene has {SMALLEST_PX} to {LARGEST_PX} pixels a side.")
    canvas = Canvas(size_px, seed)
    paint_scene(canvas)
    transform = Affine(GSD_M, 0.0, _ORIGIN_M[0], 0.0, -GSD_M, _ORIGIN_M[1])
    return Scene(expose(canvas), canvas.cover, transform, _CRS)


def write_scene(path: Path, scene: Scene, land_cover_path: Path | None = None) -> None:
    """Write a scene as a JPEG COG with overviews, and its land cover as a palette COG if a path is given."""
    height, width = scene.land_cover.shape
    profile = {
        "driver": "COG",
        "height": height,
        "width": width,
        "dtype": "uint8",
        "crs": scene.crs,
        "transform": scene.transform,
        "blocksize": 512,
    }
    lossy = {"compress": "JPEG", "quality": 90, "overview_quality": 85, "overview_resampling": "average"}
    with rasterio.open(path, "w", count=3, **profile, **lossy) as dataset:
        dataset.write(np.moveaxis(scene.rgb, 2, 0))
    if land_cover_path is None:
        return
    exact = {"compress": "DEFLATE", "overview_resampling": "nearest"}
    with rasterio.open(land_cover_path, "w", count=1, **profile, **exact) as dataset:
        dataset.write(scene.land_cover, 1)
        dataset.write_colormap(1, _CLASS_COLOURS)
        dataset.update_tags(CLASSES=",".join(LAND_COVER))


def ensure_demo_scene(folder: Path) -> Path:
    """Return the demo scene in ``folder``, drawn and written if it is not there; its land cover lies beside it.

    Both files appear whole or not at all. When several processes start at once, the last to finish wins, with the
    same content.
    """
    path = folder / f"demo-scene-v{SCENE_VERSION}.tif"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".demo-scene-") as unfinished:
        image, cover = Path(unfinished) / "image.tif", Path(unfinished) / "land_cover.tif"
        write_scene(image, make_scene(), cover)
        cover.replace(folder / f"demo-scene-v{SCENE_VERSION}-land-cover.tif")
        image.replace(path)  # last: this is the one whose presence says that all is there
    return path
