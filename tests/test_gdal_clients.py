"""Other programs read the service as a raster: GDAL's TMS and WMTS drivers (which QGIS uses), and TileJSON clients."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.warp import transform_bounds
from rasterio.windows import from_bounds

from geocentroids_tiler.scene import make_scene, write_scene

ZOOM = 18
TMS_XML = """<GDAL_WMS>
  <Service name="TMS">
    <ServerUrl>{endpoint}/tiles/WebMercatorQuad/${{z}}/${{x}}/${{y}}.png?url=scene.tif</ServerUrl>
  </Service>
  <DataWindow>
    <UpperLeftX>-20037508.342789244</UpperLeftX><UpperLeftY>20037508.342789244</UpperLeftY>
    <LowerRightX>20037508.342789244</LowerRightX><LowerRightY>-20037508.342789244</LowerRightY>
    <TileLevel>18</TileLevel><TileCountX>1</TileCountX><TileCountY>1</TileCountY><YOrigin>top</YOrigin>
  </DataWindow>
  <Projection>EPSG:3857</Projection><BlockSizeX>256</BlockSizeX><BlockSizeY>256</BlockSizeY><BandsCount>4</BandsCount>
  <Cache><Path>{cache}</Path></Cache>
</GDAL_WMS>"""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running ``geocentroids serve`` on loopback."""
    folder = tmp_path_factory.mktemp("gdal-clients")
    write_scene(folder / "scene.tif", make_scene(1024))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "geocentroids_tiler.cli", "serve", "--port", str(port), "--root", str(folder)]
    environment = {**os.environ, "GEOCENTROIDS_TILE_BUDGET_S": "600", "GEOCENTROIDS_CODEBOOK": "nano"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{base}/readyz", timeout=5).status == 200:
                    break
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not get ready"
            time.sleep(0.2)
        yield f"{base}/cog/geocentroids"
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.fixture(scope="module")
def document(endpoint: str) -> dict[str, object]:
    return httpx.get(f"{endpoint}/WebMercatorQuad/tilejson.json?url=scene.tif&tilesize=256", timeout=60).json()


def read_middle(raster: rasterio.DatasetReader, bounds: tuple[float, ...]) -> np.ndarray:
    """Read the middle fifth of an area given in degrees, at about the size of two tiles."""
    left, bottom, right, top = transform_bounds("EPSG:4326", raster.crs, *bounds)
    width, height = right - left, top - bottom
    window = from_bounds(
        left + 0.4 * width, bottom + 0.4 * height, right - 0.4 * width, top - 0.4 * height, raster.transform
    )
    return raster.read(window=window.round_offsets().round_lengths())


def test_tms_driver(endpoint: str, document: dict[str, object], tmp_path: Path) -> None:
    xml = TMS_XML.format(endpoint=endpoint, cache=tmp_path / "cache")
    with rasterio.open(xml) as raster:
        assert raster.crs == CRS.from_epsg(3857)
        assert raster.count == 4
        pixels = read_middle(raster, document["bounds"])
    assert (pixels[3] == 255).all()
    assert len(np.unique(pixels[:3].reshape(3, -1), axis=1).T) > 10


def test_wmts_driver(endpoint: str, document: dict[str, object]) -> None:
    address = f"{endpoint}/WMTSCapabilities.xml?url=scene.tif"
    layer = "geocentroids_WebMercatorQuad_default"
    with rasterio.open(f"WMTS:{address},layer={layer},zoom_level={ZOOM}") as raster:
        assert raster.crs == CRS.from_epsg(3857)
        west, south, east, north = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
        bounds = document["bounds"]
        assert west <= bounds[0] + 1e-6
        assert south <= bounds[1] + 1e-6
        assert east >= bounds[2] - 1e-6
        assert north >= bounds[3] - 1e-6
        pixels = read_middle(raster, bounds)
    assert (pixels[3] == 255).all()
    assert len(np.unique(pixels[:3].reshape(3, -1), axis=1).T) > 10


def test_both_drivers_see_the_same_pixels(endpoint: str, document: dict[str, object], tmp_path: Path) -> None:
    xml = TMS_XML.format(endpoint=endpoint, cache=tmp_path / "cache")
    address = f"WMTS:{endpoint}/WMTSCapabilities.xml?url=scene.tif,layer=geocentroids_WebMercatorQuad_default"
    west, south, east, north = document["bounds"]
    left, bottom, right, top = transform_bounds("EPSG:4326", "EPSG:3857", west, south, east, north)
    middle = ((left + right) / 2, (bottom + top) / 2)
    samples = []
    for name in (xml, f"{address},zoom_level={ZOOM}"):
        with rasterio.open(name) as raster:
            samples.append([tuple(next(raster.sample([(middle[0] + d, middle[1] - d)]))) for d in range(-40, 41, 5)])
    assert samples[0] == samples[1]


def test_tilejson_client(endpoint: str, document: dict[str, object]) -> None:
    """What leafmap and other TileJSON clients do: take tiles, zooms and bounds from the document and fetch a tile."""
    import morecantile

    west, south, east, north = document["bounds"]
    assert document["tilejson"] == "3.0.0"
    assert 0 <= document["minzoom"] <= ZOOM <= document["maxzoom"]
    tile = morecantile.tms.get("WebMercatorQuad").tile((west + east) / 2, (south + north) / 2, document["maxzoom"])
    address = document["tiles"][0].format(z=tile.z, x=tile.x, y=tile.y)
    answer = httpx.get(address, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
