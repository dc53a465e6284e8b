"""The main job in a minute, with nothing installed but the package, its cpu extra and pytest: any supported Python."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from fastapi.testclient import TestClient
from PIL import Image

from geocentroids_tiler.app import create_app
from geocentroids_tiler.scene import make_scene, write_scene
from geocentroids_tiler.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smoke")
    write_scene(path / "scene.tif", make_scene(1024))
    return path


def test_a_tile_of_the_embedded_codebook(folder: Path) -> None:
    with TestClient(create_app(Settings(root=folder, codebook="nano", tile_budget_s=600))) as client:
        document = client.get("/cog/geocentroids/WebMercatorQuad/tilejson.json?url=scene.tif").json()
        west, south, east, north = document["bounds"]
        point = client.get(f"/cog/geocentroids/point/{(west + east) / 2},{(south + north) / 2}?url=scene.tif").json()
        assert point["label"] is not None
        import morecantile

        tile = morecantile.tms.get("WebMercatorQuad").tile((west + east) / 2, (south + north) / 2, 19)
        answer = client.get(f"/cog/geocentroids/tiles/WebMercatorQuad/19/{tile.x}/{tile.y}.png?url=scene.tif")
        assert answer.status_code == 200
        pixels = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))
        assert pixels.shape == (256, 256, 4)
        assert (pixels[..., 3] == 255).all()
        assert len(np.unique(pixels.reshape(-1, 4), axis=0)) > 3


def test_classify_from_the_command_line(folder: Path) -> None:
    labels = folder / "labels.tif"
    command = [sys.executable, "-m", "geocentroids_tiler.cli", "classify", str(folder / "scene.tif"), str(labels)]
    subprocess.run([*command, "--codebook", "nano"], check=True, capture_output=True)
    with rasterio.open(labels) as raster:
        ids = raster.read(1)
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert len(np.unique(ids)) > 10


def test_serving_imports_nothing_heavy() -> None:
    code = (
        "import geocentroids_tiler.app, sys; print([m for m in ('torch', 'sklearn', 'openTSNE') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == "[]"
    assert importlib.util.find_spec("geocentroids_tiler") is not None
