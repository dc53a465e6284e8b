"""The service over HTTP with a fake encoder: one patch has one label, whichever way it is asked for."""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import httpx
import morecantile
import numpy as np
import pytest
import rasterio
from fakes import (
    PATIENCE_S,
    K,
    Loader,
    PoisonError,
    brute_force,
    distinct_colors,
    fake_codebook,
    fake_service,
    labels_of_colors,
    open_image,
    part_of,
    write_codebooks,
    write_images,
)
from fastapi.testclient import TestClient
from httpd import Served, serve
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pyproj import CRS, Geod, Transformer
from rasters import LEFT, TOP, UTM, texture, write_tif
from scipy.cluster.hierarchy import fcluster
from shapely import contains_xy
from shapely.geometry import Point, box, mapping, shape

from geocentroids_tiler.app import create_app
from geocentroids_tiler.codebook import NODATA_LABEL, save_codebook
from geocentroids_tiler.errors import EncoderError, InputError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels import engine as engine_module
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.export import classify
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.render import Style, palette_index
from geocentroids_tiler.source import Dataset

# What may differ, what was measured, and why.
TIE = 1e-6
"""Lead of the best centroid below which float64 may choose another, as blending weights are float32. Measured: no
label differs, and the smallest lead in these images is 1e-5."""
EDGE_PATCHES = 0.03
"""Pixel centres are placed to 0.02 of a patch; nearer to a patch's edge than this they may be given to its neighbour.
Measured: none of these images' pixels is."""
CENTRE_PATCHES = 0.1
"""Required of a class's centre. Measured: 0.0004, a pixel of the tile is 0.02."""
SAMPLED_LEVELS = 0.5
"""Average of the samples that a tile takes, whole levels of colour and opacity. Measured: 0.14."""
AVERAGE_LEVELS = 16.0
"""The same against a fine raster of samples, with colours as different as they can be. Measured: 10.6."""
AREA_SHARE = 0.01
"""Area of a circle of 240 m against the ellipsoid: patches are whole, so it depends on the edge. Measured: 0.0015."""
SCALE_SHARE = 1e-6
"""Area of whole patches against the ellipsoid; their scale is that of the image's centre. Measured: 5e-9."""
PATCH_M = 3.5
API = "/cog/geocentroids"
GRID_CRS = "EPSG:32721"
COLORS = distinct_colors()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_codebooks(tmp_path_factory.mktemp("codebooks"))
    for name, stride in (("dim-plain", 6), ("dim-blend", 3)):
        codebook = fake_codebook("plain", stride=stride)
        save_codebook(
            replace(
                codebook,
                manifest=codebook.manifest.model_copy(update={"name": name}),
                centroids=np.array([[0, 0, 0, 0.16, 0], [0.8, 0.8, 0.8, 0.94, 0]], np.float32),  # dark, bright
                colors=COLORS[:2],
                counts=None,
                tree=None,
                names={},
            ),
            folder / name,
            card="For tests.",
        )
    return folder


@dataclass
class App:
    """A running application. Every request has an event loop of its own, as TestClient is not entered."""

    client: TestClient
    service: Service
    loader: Loader

    def get(self, path: str, status: int = 200, **query: Any) -> httpx.Response:
        answer = self.client.get(path, params={"url": "whole.tif"} | query)
        assert answer.status_code == status, answer.text
        return answer

    def post(self, path: str, body: Any, status: int = 200, **query: Any) -> httpx.Response:
        answer = self.client.post(path, content=json.dumps(body), params={"url": "whole.tif"} | query)
        assert answer.status_code == status, answer.text
        return answer

    def tile(self, z: int, x: int, y: int, tms: str = "WebMercatorQuad", **query: Any) -> httpx.Response:
        return self.get(f"{API}/tiles/{tms}/{z}/{x}/{y}.png", **query)

    def forget(self) -> None:
        for encoder in self.loader.made.values():
            encoder.forget()


@contextmanager
def starting(images: Path, codebooks: Path) -> Iterator[Callable[..., App]]:
    """Yield what starts applications with given settings; they end with the ``with`` block."""
    made = []

    def start(**settings: Any) -> App:
        service, loader = fake_service(images, codebooks, **settings)
        made.append(service)
        return App(TestClient(create_app(service=service)), service, loader)

    yield start
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def start(images: Path, codebooks: Path) -> Iterator[Callable[..., App]]:
    with starting(images, codebooks) as start:
        yield start


@pytest.fixture(scope="module")
def app(start: Callable[..., App]) -> App:
    """One that many tests use."""
    return start()


@dataclass(frozen=True)
class Truth:
    """Labels of an image, from an engine of its own."""

    dataset: Dataset
    block: LabelBlock

    def at(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.uint16]:
        area = self.block.patches
        inside = (rows >= area.row_start) & (rows < area.row_stop) & (cols >= area.col_start) & (cols < area.col_stop)
        r, c = np.where(inside, rows - area.row_start, 0), np.where(inside, cols - area.col_start, 0)
        return np.where(inside, self.block.labels[r, c], np.uint16(NODATA_LABEL))

    @property
    def area(self) -> PatchRange:
        return self.block.patches


@pytest.fixture(scope="module")
def truth(images: Path, codebooks: Path) -> Iterator[Callable[..., Truth]]:
    service, _ = fake_service(images, codebooks)

    @lru_cache
    def look_up(image: str = "whole.tif", codebook: str = "blend") -> Truth:
        dataset = open_image(service, image, codebook)
        engine = service.engine(service.codebook(codebook)).result()
        return Truth(dataset, engine.block(dataset, dataset.footprint))

    yield look_up
    service.close()


def rgba(answer: httpx.Response) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))


def colors_of(answer: httpx.Response) -> dict[int, tuple[int, ...]]:
    with rasterio.io.MemoryFile(answer.content) as memory, memory.open() as raster:
        return dict(raster.colormap(1))


def read_tif(answer: httpx.Response) -> tuple[NDArray[np.uint16], PatchRange, dict[str, Any]]:
    """Return ids, which patches they are of, and the file's profile."""
    with rasterio.io.MemoryFile(answer.content) as memory, memory.open() as raster:
        ids = raster.read(1)
        t = raster.transform
        row, col = -t.f / PATCH_M, t.c / PATCH_M
        assert row == round(row)
        assert col == round(col)
        assert (t.a, t.b, t.d, t.e) == (PATCH_M, 0, 0, -PATCH_M)
        area = PatchRange(round(row), round(row) + raster.height, round(col), round(col) + raster.width)
        profile = {**raster.profile, "tags": raster.tags()}
    return ids, area, profile


@lru_cache
def transformer(source: str, target: str) -> Transformer:
    return Transformer.from_crs(source, target, always_xy=True)


@lru_cache
def patches_of_tile(
    tms_id: str, z: int, x: int, y: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return row and column of the patch under each pixel centre by pyproj, and which pixels are clear of an edge."""
    tms = morecantile.tms.get(tms_id)
    left, bottom, right, top = tms.xy_bounds(morecantile.Tile(x, y, z))
    i = (np.arange(size) + 0.5) / size
    px, py = np.meshgrid(left + i * (right - left), top + i * (bottom - top))
    east, north = transformer(tms.rasterio_crs.to_wkt(), GRID_CRS).transform(px, py)
    u, v = east / PATCH_M, -north / PATCH_M
    clear = np.minimum(np.minimum(u % 1, 1 - u % 1), np.minimum(v % 1, 1 - v % 1)) > EDGE_PATCHES
    return np.floor(v).astype(np.int64), np.floor(u).astype(np.int64), clear


def lonlat(rows: Any, cols: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return longitudes and latitudes of patch centres."""
    return transformer(GRID_CRS, "EPSG:4326").transform(
        (np.asarray(cols) + 0.5) * PATCH_M, -(np.asarray(rows) + 0.5) * PATCH_M
    )


def outline(area: PatchRange, inset: float = 0.0) -> list[list[float]]:
    """Return the ring of longitudes and latitudes around patches, ``inset`` patches inside their edge."""
    left, right = area.col_start + inset, area.col_stop - inset
    top, bottom = area.row_start + inset, area.row_stop - inset
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return [list(transformer(GRID_CRS, "EPSG:4326").transform(u * PATCH_M, -v * PATCH_M)) for u, v in corners]


def feature_of(area: PatchRange, inset: float = 0.0, **members: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [outline(area, inset)]}
    return {"type": "Feature", "properties": {}, "geometry": geometry, **members}


def bbox_path(area: PatchRange, extension: str = "tif", inset: float = 0.0) -> str:
    """Return the path of a box in the grid's CRS; ask with coord_crs=EPSG:32721."""
    left, right = (area.col_start + inset) * PATCH_M, (area.col_stop - inset) * PATCH_M
    top, bottom = -(area.row_start + inset) * PATCH_M, -(area.row_stop - inset) * PATCH_M
    return f"{API}/bbox/{left},{bottom},{right},{top}.{extension}"


def tiles_over(area: PatchRange, z: int, tms_id: str = "WebMercatorQuad") -> list[morecantile.Tile]:
    tms = morecantile.tms.get(tms_id)
    ring = np.array(outline(area))
    west, south, east, north = *ring.min(axis=0), *ring.max(axis=0)
    return list(tms.tiles(west, south, east, north, [z]))


@dataclass
class Seen:
    """Labels that answers gave to patches; each has to be that of the truth.

    Attributes:
        count: patches, or pixels of tiles, compared.
    """

    truth: Truth
    count: int = 0
    labels: set[int] = field(default_factory=set)

    def compare(self, rows: Any, cols: Any, labels: Any) -> None:
        rows, cols, labels = np.atleast_1d(rows), np.atleast_1d(cols), np.atleast_1d(labels)
        np.testing.assert_array_equal(labels, self.truth.at(rows, cols))
        self.count += labels.size
        self.labels |= set(np.unique(labels).tolist())

    def tile(self, app: App, image: str, tms: str, z: int, x: int, y: int, size: int) -> None:
        labels = labels_of_colors(rgba(app.tile(z, x, y, tms, url=image, tilesize=size)), COLORS)
        rows, cols, clear = patches_of_tile(tms, z, x, y, size)
        assert clear.mean() > 0.8
        self.compare(rows[clear], cols[clear], labels[clear])

    def raster(self, ids: NDArray[np.uint16], area: PatchRange) -> None:
        self.compare(*np.mgrid[area.row_start : area.row_stop, area.col_start : area.col_stop], ids)

    def bbox(self, app: App, image: str, area: PatchRange) -> None:
        answer = app.get(bbox_path(area), url=image, coord_crs=GRID_CRS)
        self.raster(*read_tif(answer)[:2])

    def feature(self, app: App, image: str, area: PatchRange) -> None:
        ids, found, _ = read_tif(app.post(f"{API}/feature.tif", feature_of(area, 0.2), url=image))
        assert found == area.intersect(self.truth.area)
        self.raster(ids, found)

    def picture(self, app: App, image: str, area: PatchRange) -> None:
        answer = app.get(bbox_path(area, "png"), url=image, coord_crs=GRID_CRS)
        self.raster(labels_of_colors(rgba(answer), COLORS), area.intersect(self.truth.area))

    def point(self, app: App, image: str, row: int, col: int) -> None:
        lon, lat = lonlat(row, col)
        found = app.get(f"{API}/point/{lon},{lat}", url=image).json()
        label = NODATA_LABEL if found["label"] is None else found["label"]
        if found["label"] is not None:
            assert found["color"] == "#{:02x}{:02x}{:02x}".format(*COLORS[label])
            assert found["centroid"] == label
        self.compare(row, col, np.uint16(label))

    def statistics(self, app: App, image: str, area: PatchRange) -> None:
        found = app.post(f"{API}/statistics", feature_of(area, 0.2), url=image).json()["properties"]["statistics"]
        own = part_of(self.truth.block.labels, self.truth.area, area.intersect(self.truth.area))
        ids, counts = np.unique(own[own != NODATA_LABEL], return_counts=True)
        patch_m2 = self.truth.dataset.grid.patch_area_m2
        assert {item["label"]: round(item["area_m2"] / patch_m2) for item in found["classes"]} == dict(
            zip(ids.tolist(), counts.tolist(), strict=True)
        )


def jobs(seen: Seen, app: App, image: str, rng: random.Random) -> list[Callable[[], None]]:
    """Return many ways to ask for the labels of an image."""
    area = seen.truth.area

    def some() -> PatchRange:
        row = rng.randrange(area.row_start, area.row_stop - 8)
        col = rng.randrange(area.col_start, area.col_stop - 8)
        return PatchRange(row, row + rng.randrange(1, 9), col, col + rng.randrange(1, 9))

    todo: list[Callable[[], None]] = []
    kinds = [
        ("WebMercatorQuad", 17, 256),
        ("WebMercatorQuad", 18, 300),
        ("WebMercatorQuad", 19, 100),
        ("WebMercatorQuad", 20, 256),
        ("WebMercatorQuad", 16, 512),
        ("WorldCRS84Quad", 17, 256),
        ("WorldMercatorWGS84Quad", 18, 200),
    ]
    for tms, z, size in kinds:
        for tile in rng.sample(found := tiles_over(area, z, tms), min(2, len(found))):
            todo.append(partial(seen.tile, app, image, tms, z, tile.x, tile.y, size))
    for ask in (seen.bbox, seen.feature, seen.picture, seen.statistics):
        todo += [partial(ask, app, image, some()) for _ in range(3)]
    for _ in range(8):
        row, col = rng.randrange(area.row_start, area.row_stop), rng.randrange(area.col_start, area.col_stop)
        todo.append(partial(seen.point, app, image, row, col))
    rng.shuffle(todo)
    return todo


class TestOneLabelForAPatch:
    @pytest.mark.parametrize("image", ["whole.tif", "hole.tif", "mercator.tif", "degrees.tif"])
    def test_in_any_order_cold_and_warm(
        self, start: Callable[..., App], truth: Callable[..., Truth], image: str
    ) -> None:
        app, seen = start(tile_cache_bytes=0), Seen(truth(image))
        todo = jobs(seen, app, image, random.Random(image))
        for job in todo:
            job()
        assert seen.count > 50_000
        assert len(seen.labels) > 10
        assert NODATA_LABEL in seen.labels
        app.forget()
        for job in reversed(todo):
            job()
        assert not app.loader.made["blend"].runs, "all of it was known"

    def test_with_caches_that_hold_almost_nothing(self, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        app = start(tile_cache_bytes=0, label_cache_bytes=4000, token_cache_bytes=0, batch_windows=3, read_threads=2)
        seen = Seen(truth("hole.tif"))
        for job in jobs(seen, app, "hole.tif", random.Random(5)):
            job()
        assert seen.count > 50_000

    def test_the_truth_is_true(self, truth: Callable[..., Truth], codebooks: Path, app: App) -> None:
        """What all of this compares with is what brute force gives for the whole image."""
        expected, lead = brute_force(truth("hole.tif").dataset, app.service.codebook("blend"))
        clear = lead > TIE
        np.testing.assert_array_equal(truth("hole.tif").block.labels[clear], expected[clear])

    def test_classify(self, app: App, truth: Callable[..., Truth], tmp_path: Path) -> None:
        for image in ("whole.tif", "degrees.tif"):
            ids, area = classified(app, tmp_path, image)
            assert area == truth(image).area
            np.testing.assert_array_equal(ids, truth(image).block.labels)

    def test_webp(self, app: App, truth: Callable[..., Truth]) -> None:
        tile = tiles_over(truth().area, 19)[0]
        webp = app.get(f"{API}/tiles/WebMercatorQuad/19/{tile.x}/{tile.y}.webp")
        assert webp.headers["content-type"] == "image/webp"
        png = app.get(f"{API}/tiles/WebMercatorQuad/19/{tile.x}/{tile.y}")
        assert png.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(rgba(webp), rgba(png))


def classified(
    app: App, folder: Path, image: str, n: int | None = None, *, codebook: str | None = None, **options: Any
) -> Any:
    """Run classify and return ids and patches."""
    found = app.service.codebook(codebook)
    dataset = open_image(app.service, image, codebook)
    path = folder / f"{image}-{n}.tif"
    engine = app.service.engine(found).result()
    classify(engine, dataset, app.service.classes(found, n), path, **options)
    with rasterio.open(path) as raster:
        return raster.read(1), PatchRange(
            round(-raster.transform.f / PATCH_M),
            round(-raster.transform.f / PATCH_M) + raster.height,
            round(raster.transform.c / PATCH_M),
            round(raster.transform.c / PATCH_M) + raster.width,
        )


class TestMosaic:
    @pytest.mark.parametrize(("image", "z"), [("whole.tif", 18), ("degrees.tif", 19)])
    def test_no_seam(self, app: App, truth: Callable[..., Truth], image: str, z: int) -> None:
        """Tiles side by side are one raster of labels, sampled at the centres of all pixels."""
        t, size = truth(image), 256
        tiles = tiles_over(t.area, z)
        assert len(tiles) >= 4
        cols, rows = sorted({tile.x for tile in tiles}), sorted({tile.y for tile in tiles})
        picture, expected, clear = (np.zeros((len(rows) * size, len(cols) * size), kind) for kind in ("u2", "u2", bool))
        for tile in tiles:
            at = np.s_[(tile.y - rows[0]) * size :, (tile.x - cols[0]) * size :]
            part = labels_of_colors(rgba(app.tile(z, tile.x, tile.y, url=image)), COLORS)
            picture[at][:size, :size] = part
            patch_rows, patch_cols, clear[at][:size, :size] = patches_of_tile(
                "WebMercatorQuad", z, tile.x, tile.y, size
            )
            expected[at][:size, :size] = t.at(patch_rows, patch_cols)
        np.testing.assert_array_equal(picture[clear], expected[clear])
        assert (expected != NODATA_LABEL).mean() > 0.1
        # A pixel on an edge shows the patch on one side of it: what a pixel beside it shows.
        padded = np.pad(expected, 1, mode="edge")
        around = [padded[i : i + len(picture), j : j + picture.shape[1]] for i in range(3) for j in range(3)]
        assert np.any([picture == other for other in around], axis=0).all()

    @pytest.mark.parametrize(("size", "samples", "fine"), [(256, 2, 6), (128, 3, 16), (64, None, 32)])
    def test_where_a_pixel_covers_several_patches_colours_average(
        self, app: App, truth: Callable[..., Truth], size: int, samples: int | None, fine: int
    ) -> None:
        """Pixels of 3.9, 7.8 and 15.7 m: an average of one sample for each patch's width, or for each two."""
        t, z = truth(), 15
        (tile, *_) = tiles_over(t.area, z)
        picture = rgba(app.tile(z, tile.x, tile.y, tilesize=size)).astype(float)
        palette = np.vstack([np.column_stack([COLORS, np.full(K, 255)]), np.zeros(4)]).astype(float)
        shown = np.dstack([picture[..., :3] * picture[..., 3:] / 255, picture[..., 3]])  # as if drawn on black
        for n, limit in ((samples, SAMPLED_LEVELS), (fine, AVERAGE_LEVELS)):
            if n is None:
                continue
            rows, cols, _ = patches_of_tile("WebMercatorQuad", z, tile.x, tile.y, size * n)
            expected = palette[np.minimum(t.at(rows, cols), K)].reshape(size, n, size, n, 4).mean(axis=(1, 3))
            touched = (expected[..., 3] > 0) | (picture[..., 3] > 0)
            assert touched.sum() > 20
            assert np.abs(shown - expected)[touched].mean() < limit


class TestPlace:
    """A bright square of 3 x 3 patches, seen by the ground it covers, has to be where it is."""

    ROW, COL = -1754280, 160012
    SQUARE = PatchRange(ROW, ROW + 3, COL, COL + 3)

    def write(self, path: Path, crs: str) -> Path:
        """Write an image whose pixels are bright where their centre is in the square."""
        corners = transformer(UTM, crs).transform([LEFT, LEFT + 110], [TOP - 105, TOP])
        (left, right), (bottom, top) = corners
        cols, rows = 550, 525  # 0.2 m
        transform = rasterio.Affine((right - left) / cols, 0, left, 0, (bottom - top) / rows, top)
        x, y = np.meshgrid(left + (np.arange(cols) + 0.5) * transform.a, top + (np.arange(rows) + 0.5) * transform.e)
        east, north = transformer(crs, UTM).transform(x, y)
        u, v = east / PATCH_M, -north / PATCH_M
        s = self.SQUARE
        bright = (u >= s.col_start) & (u < s.col_stop) & (v >= s.row_start) & (v < s.row_stop)
        bands = np.broadcast_to(np.where(bright, 240, 40).astype(np.uint8), (3, rows, cols))
        return write_tif(path, bands, crs=crs, transform=transform, photometric="RGB")

    @pytest.mark.parametrize("crs", [UTM, "EPSG:3857", "EPSG:4326"])
    @pytest.mark.parametrize("codebook", ["dim-plain", "dim-blend"])
    def test_centre_of_a_class(self, app: App, images: Path, crs: str, codebook: str) -> None:
        name = f"cross-{crs.rpartition(':')[2]}.tif"
        self.write(images / name, crs)
        lon, lat = lonlat(self.ROW + 1, self.COL + 1)
        assert app.get(f"{API}/point/{lon},{lat}", url=name, codebook=codebook).json()["label"] == 1
        z, size = 20, 512
        total, weight, dark = np.zeros(2), 0, 0
        for tile in tiles_over(self.SQUARE, z):
            labels = labels_of_colors(
                rgba(app.tile(z, tile.x, tile.y, url=name, codebook=codebook, tilesize=size)), COLORS
            )
            bounds = morecantile.tms.get("WebMercatorQuad").xy_bounds(tile)
            i, j = np.nonzero(labels == 1)
            pixel = (bounds.right - bounds.left) / size
            x, y = bounds.left + (j + 0.5) * pixel, bounds.top - (i + 0.5) * pixel
            east, north = transformer("EPSG:3857", UTM).transform(x, y)
            total += np.sum(east), np.sum(north)
            weight += len(i)
            dark += (labels == 0).sum()
        assert dark > 0, "the background is of another class"
        centre = total / weight / PATCH_M
        assert centre[0] == pytest.approx(self.COL + 1.5, abs=CENTRE_PATCHES)
        assert -centre[1] == pytest.approx(self.ROW + 1.5, abs=CENTRE_PATCHES)
        area = weight * (pixel * np.cos(np.radians(lat))) ** 2 / PATCH_M**2
        assert area == pytest.approx(9, rel=0.02), "3 x 3 patches"


class TestMergedClasses:
    N = 6

    @pytest.fixture
    def lookup(self, app: App) -> NDArray[np.int64]:
        """Class of each label by scipy, numbered by their lowest label."""
        flat = fcluster(app.service.codebook(None).tree, self.N, "maxclust")
        order = list(dict.fromkeys(flat.tolist()))
        return np.array([order.index(i) for i in flat])

    def test_same_ids_everywhere(self, app: App, truth: Callable[..., Truth], lookup: NDArray[np.int64]) -> None:
        assert len(set(lookup.tolist())) == self.N
        n = self.N
        t = truth("hole.tif")
        expected = np.append(lookup, np.full(NODATA_LABEL + 1 - K, NODATA_LABEL)).astype(np.uint16)
        legend = app.get(f"{API}/legend", classes=n).json()["classes"]
        assert [item["label"] for item in legend] == list(range(n))
        assert legend[1]["name"] == "forest"
        colors = np.array([[int(item["color"][i : i + 2], 16) for i in (1, 3, 5)] for item in legend], np.uint8)
        counts = app.service.codebook(None).counts
        assert [item["count"] for item in legend] == [int(counts[lookup == i].sum()) for i in range(n)]

        area = t.area
        answer = app.get(bbox_path(area), url="hole.tif", coord_crs=GRID_CRS, classes=n)
        ids, found, _ = read_tif(answer)
        assert found == area
        np.testing.assert_array_equal(ids, expected[t.block.labels])
        table = colors_of(answer)
        assert [table[i][:3] for i in range(n)] == [tuple(color) for color in colors.tolist()]

        picture = rgba(app.get(bbox_path(area, "png"), url="hole.tif", coord_crs=GRID_CRS, classes=n))
        np.testing.assert_array_equal(labels_of_colors(picture, colors), ids)

        ids, found, _ = read_tif(app.post(f"{API}/feature.tif", feature_of(area, 0.2), url="hole.tif", classes=n))
        np.testing.assert_array_equal(ids, part_of(expected[t.block.labels], area, found))

        for tile in tiles_over(area, 18)[:2]:
            pixels = labels_of_colors(rgba(app.tile(18, tile.x, tile.y, url="hole.tif", classes=n)), colors)
            rows, cols, clear = patches_of_tile("WebMercatorQuad", 18, tile.x, tile.y, 256)
            np.testing.assert_array_equal(pixels[clear], expected[t.at(rows, cols)][clear])

        for row, col in ((area.row_start + 3, area.col_start + 4), (area.row_stop - 4, area.col_stop - 5)):
            lon, lat = lonlat(row, col)
            point = app.get(f"{API}/point/{lon},{lat}", url="hole.tif", classes=n).json()
            label = int(t.at(np.array([row]), np.array([col]))[0])
            assert (point["label"], point["centroid"]) == (lookup[label], label)
            assert point["color"] == legend[lookup[label]]["color"]

        sent = app.post(f"{API}/statistics", feature_of(area, 0.2), url="hole.tif", classes=n)
        statistics = sent.json()["properties"]["statistics"]
        labels = t.block.labels[t.block.labels != NODATA_LABEL]
        shares = np.bincount(lookup[labels], minlength=n) / len(labels)
        assert {item["label"]: item["share"] for item in statistics["classes"]} == pytest.approx(
            {i: share for i, share in enumerate(shares) if share}
        )

    def test_classify(self, app: App, truth: Callable[..., Truth], lookup: NDArray[np.int64], tmp_path: Path) -> None:
        ids, _ = classified(app, tmp_path, "whole.tif", self.N)
        labels = truth().block.labels
        np.testing.assert_array_equal(
            ids, np.where(labels == NODATA_LABEL, NODATA_LABEL, lookup[np.minimum(labels, K - 1)])
        )

    def test_tiles_of_other_classes_are_other_tiles(self, app: App, truth: Callable[..., Truth]) -> None:
        (tile, *_) = tiles_over(truth().area, 18)
        answers = [app.tile(18, tile.x, tile.y, **query) for query in ({}, {"classes": 6}, {"classes": 2}, {})]
        assert answers[0].content == answers[3].content
        assert len({answer.content for answer in answers}) == 3
        assert len({answer.headers["etag"] for answer in answers}) == 3


class TestStyle:
    def test_highlight(self, app: App, truth: Callable[..., Truth]) -> None:
        (tile, *_) = tiles_over(truth().area, 18)
        plain, lit = (rgba(app.tile(18, tile.x, tile.y, **q)) for q in ({}, {"highlight": "20,21"}))
        labels = labels_of_colors(plain, COLORS)
        np.testing.assert_array_equal(lit[..., :3][labels != NODATA_LABEL], plain[..., :3][labels != NODATA_LABEL])
        chosen = np.isin(labels, (20, 21))
        assert chosen.any()
        assert (lit[..., 3][chosen] == 255).all()
        others = ~chosen & (labels != NODATA_LABEL)
        assert others.any()
        assert set(lit[..., 3][others].tolist()) == {48}
        assert (lit[..., 3][labels == NODATA_LABEL] == 0).all()

    def test_similarity(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth("hole.tif")
        codebook = app.service.codebook(None)
        picture = rgba(app.get(bbox_path(t.area, "png"), url="hole.tif", coord_crs=GRID_CRS, layer="similarity"))
        index, palette = palette_index(
            t.block.labels, t.block.similarity, codebook.classes(), Style("similarity"), codebook.similarity_range()
        )
        np.testing.assert_array_equal(picture, palette[index])
        brightness = picture[..., :3].sum(axis=-1)[t.block.labels != NODATA_LABEL]
        order = np.argsort(t.block.similarity[t.block.labels != NODATA_LABEL])
        assert brightness[order[-1]] > brightness[order[0]], "a better fit is brighter"
        (tile, *_) = tiles_over(t.area, 18)
        pixels = rgba(app.tile(18, tile.x, tile.y, url="hole.tif", layer="similarity"))
        rows, cols, clear = patches_of_tile("WebMercatorQuad", 18, tile.x, tile.y, 256)
        inside = clear & (t.at(rows, cols) != NODATA_LABEL)
        expected = palette[index][rows[inside] - t.area.row_start, cols[inside] - t.area.col_start]
        np.testing.assert_array_equal(pixels[inside], expected)

    def test_point_knows_the_similarity_and_what_else_it_is_like(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth()
        row, col = 9, 12
        lon, lat = lonlat(t.area.row_start + row, t.area.col_start + col)
        found = app.get(f"{API}/point/{lon},{lat}").json()
        assert found["similarity"] == pytest.approx(float(t.block.similarity[row, col]))
        codebook = app.service.codebook(None)
        distances = np.linalg.norm(
            codebook.centroids.astype(float) - codebook.centroids[found["label"]].astype(float), axis=1
        )
        assert [item["label"] for item in found["neighbours"]] == np.argsort(distances)[1:6].tolist()
        assert found["coordinates"] == [lon, lat]
        merged = app.get(f"{API}/point/{lon},{lat}", classes=4).json()
        others = [item["label"] for item in merged["neighbours"]]
        lookup = codebook.classes(4).lookup
        assert sorted([merged["label"], *others]) == [0, 1, 2, 3], "the other classes, each once"
        assert others == [lookup[item["centroid"]] for item in merged["neighbours"]]
        first = {label: next(i for i in np.argsort(distances) if lookup[i] == label) for label in others}
        assert [item["centroid"] for item in merged["neighbours"]] == [first[label] for label in others]


class TestCaching:
    def test_etag(self, app: App, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        (tile, *_) = tiles_over(truth().area, 18)
        path = f"{API}/tiles/WebMercatorQuad/18/{tile.x}/{tile.y}.png"
        first = app.get(path)
        etag = first.headers["etag"]
        assert re.fullmatch(r'"[0-9a-f]{32}"', etag)
        assert first.headers["cache-control"] == "public, max-age=3600"
        for sent in (etag, f"W/{etag}", f'"other", {etag}'):
            again = app.client.get(path, params={"url": "whole.tif"}, headers={"If-None-Match": sent})
            assert again.status_code == 304
            assert again.content == b""
            assert again.headers["etag"] == etag
            assert again.headers["cache-control"] == "public, max-age=3600"
        other = app.client.get(path, params={"url": "whole.tif"}, headers={"If-None-Match": '"other"'})
        assert other.status_code == 200
        worker = start(cache_control="no-cache").get(path)
        assert (worker.headers["etag"], worker.content) == (etag, first.content), "two workers agree"
        assert worker.headers["cache-control"] == "no-cache"

    def test_everything_that_changes_a_tile_changes_its_etag(self, app: App, truth: Callable[..., Truth]) -> None:
        (tile, *_) = tiles_over(truth().area, 18)
        path = f"{API}/tiles/WebMercatorQuad/18/{tile.x}/{tile.y}"
        queries: list[dict[str, Any]] = [
            {},
            {"url": "hole.tif"},
            {"codebook": "plain"},
            {"bidx": [3, 2, 1]},
            {"rescale": "0,200"},
            {"classes": 5},
            {"highlight": "1"},
            {"highlight": "1,2"},
            {"layer": "similarity"},
            {"tilesize": 128},
        ]
        tags = [app.get(path, **query).headers["etag"] for query in queries]
        (next_zoom, *_) = tiles_over(truth().area, 19)
        tags += [app.get(f"{path}.webp").headers["etag"], app.tile(19, next_zoom.x, next_zoom.y).headers["etag"]]
        assert len(set(tags)) == len(tags)
        assert app.get(path, highlight="2,1").headers["etag"] == app.get(path, highlight="1,2").headers["etag"]

    def test_a_changed_image_has_another_etag(
        self, start: Callable[..., App], images: Path, truth: Callable[..., Truth]
    ) -> None:
        app = start(source_ttl_s=0)
        (tile, *_) = tiles_over(truth().area, 18)
        write_tif(images / "changing.tif", texture(300, 300, 1), photometric="RGB")
        first = app.tile(18, tile.x, tile.y, url="changing.tif")
        write_tif(images / "changing.tif", texture(301, 300, 2), photometric="RGB")
        headers = {"If-None-Match": first.headers["etag"]}
        path = f"{API}/tiles/WebMercatorQuad/18/{tile.x}/{tile.y}.png"
        second = app.client.get(path, params={"url": "changing.tif"}, headers=headers)
        assert second.status_code == 200
        assert second.content != first.content

    def test_the_second_answer_comes_from_memory(self, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        app = start()
        (tile, *_) = tiles_over(truth().area, 18)
        first = app.tile(18, tile.x, tile.y)
        app.forget()
        assert app.tile(18, tile.x, tile.y).content == first.content
        assert app.tile(18, tile.x, tile.y, tilesize=512).status_code == 200
        assert not app.loader.made["blend"].runs

    def test_an_answer_to_a_stranger(self, app: App) -> None:
        answer = app.client.get(f"{API}/info", params={"url": "whole.tif"}, headers={"Origin": "https://example.org"})
        assert answer.headers["access-control-allow-origin"] == "*"
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert "etag" in exposed
        assert "x-geocentroids-empty" in exposed
        asked = app.client.options(
            f"{API}/statistics",
            headers={
                "Origin": "https://example.org",
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            },
        )
        assert asked.status_code == 200
        assert "POST" in asked.headers["access-control-allow-methods"]

    def test_origins_of_the_operator(self, start: Callable[..., App]) -> None:
        app = start(cors_origins=["https://mine.example"])
        for origin, allowed in (("https://mine.example", True), ("https://other.example", False)):
            answer = app.client.get("/healthz", headers={"Origin": origin})
            assert ("access-control-allow-origin" in answer.headers) == allowed


class TestEmptyTiles:
    def assert_empty(self, answer: httpx.Response, reason: str, size: int = 256) -> None:
        assert answer.headers["x-geocentroids-empty"] == reason
        assert answer.headers["content-type"] == "image/png"
        assert "etag" not in answer.headers
        assert answer.headers["cache-control"] == "public, max-age=60"
        assert rgba(answer).shape == (size, size, 4)
        assert not rgba(answer)[..., 3].any()

    def test_outside(self, app: App) -> None:
        app.forget()
        self.assert_empty(app.tile(18, 5, 5), "outside")
        self.assert_empty(app.tile(3, 100, -2, tilesize=64), "outside", 64)
        self.assert_empty(app.tile(18, 5, 5, "UTM31WGS84Quad"), "outside")
        assert not app.loader.made["blend"].runs

    def test_below_minzoom(self, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        app = start(tile_budget_s=1e-9)
        info = app.get(f"{API}/info").json()
        assert info["minzoom"] == info["maxzoom"] == 19
        encoder = app.loader.made["blend"]
        encoder.forget()
        (tile, *_) = tiles_over(truth().area, 18)
        self.assert_empty(app.tile(18, tile.x, tile.y), "below-minzoom 19")
        assert not encoder.runs
        (tile, *_) = tiles_over(truth().area, 19)
        assert rgba(app.tile(19, tile.x, tile.y))[..., 3].any()
        assert app.get(f"{API}/WebMercatorQuad/tilejson.json").json()["minzoom"] == 19

    def test_other_formats_and_sets(self, app: App) -> None:
        webp = app.get(f"{API}/tiles/WebMercatorQuad/18/5/5.webp")
        assert webp.headers["content-type"] == "image/webp"
        assert not rgba(webp)[..., 3].any()
        assert app.tile(-5, 0, 0, "CDB1GlobalGrid").status_code == 200


TILE = f"{API}/tiles/WebMercatorQuad/18/90044/158203.png"
BOX = f"{API}/bbox/-56.3434,-34.8815,-56.3422,-34.8806"


@dataclass(frozen=True)
class Bad:
    path: str
    status: int
    says: str
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", f"{self.path.removeprefix(API)}-{self.query or self.body}")[:80]


def polygon(*points: tuple[float, float]) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [list(points)]}}


def geometry(kind: Any, coordinates: Any) -> dict[str, Any]:
    return {"type": "Feature", "properties": {}, "geometry": {"type": kind, "coordinates": coordinates}}


STATISTICS, FEATURE = f"{API}/statistics", f"{API}/feature.tif"
TRIANGLE = polygon((-56.3434, -34.8815), (-56.3422, -34.8815), (-56.3422, -34.8806), (-56.3434, -34.8815))
NEEDED = "a GeoJSON Feature or FeatureCollection"
ERRORS = [
    Bad(TILE, 404, "there is no codebook 'nope'", {"codebook": "nope"}),
    Bad(TILE, 404, "there is no codebook '../blend'", {"codebook": "../blend"}),
    Bad(TILE, 422, "codebook=", {"codebook": "x" * 65}),
    Bad(TILE, 400, r"bidx=\[1\] is not three band numbers", {"bidx": [1]}),
    Bad(TILE, 400, "bidx=", {"bidx": [0, 1, 2]}),
    Bad(TILE, 422, r"bidx \(1, 2, 9\) is not in the image; it has bands 1 to 3", {"bidx": [1, 2, 9]}),
    Bad(TILE, 422, "bidx='red'", {"bidx": "red"}),
    Bad(TILE, 400, "rescale='5' is not LOW,HIGH", {"rescale": "5"}),
    Bad(TILE, 400, "LOW must be less than HIGH", {"rescale": "9,1"}),
    Bad(TILE, 400, "both finite", {"rescale": "0,inf"}),
    Bad(TILE, 400, "both finite", {"rescale": "nan,1"}),
    Bad(TILE, 400, "highlight=24 is not a class; accepted: 0 to 23", {"highlight": "3,24"}),
    Bad(TILE, 400, "highlight=5 is not a class; accepted: 0 to 4", {"highlight": "5", "classes": 5}),
    Bad(TILE, 400, "highlight=-1 is not a class", {"highlight": "-1"}),
    Bad(TILE, 400, "highlight='road' is not a list", {"highlight": "road"}),
    Bad(TILE, 422, "classes='0'", {"classes": 0}),
    Bad(TILE, 422, "classes='many'", {"classes": "many"}),
    Bad(TILE, 400, "classes=25: codebook 'blend' can be cut into 1 to 24 classes", {"classes": 25}),
    Bad(TILE, 400, "classes=4: codebook 'bare' has no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(BOX + ".tif", 400, "no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(f"{API}/legend", 400, "no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(f"{API}/point/-56.343,-34.881", 400, "no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(f"{API}/WebMercatorQuad/tilejson.json", 400, "no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(f"{API}/WMTSCapabilities.xml", 400, "no merge tree", {"classes": 4, "codebook": "bare"}),
    Bad(STATISTICS, 400, "no merge tree", {"classes": 4, "codebook": "bare"}, TRIANGLE),
    Bad(TILE, 422, "layer='height'", {"layer": "height"}),
    Bad(TILE, 422, "tilesize='15'", {"tilesize": 15}),
    Bad(TILE, 422, "tilesize='1025'", {"tilesize": 1025}),
    Bad(TILE.replace("png", "jpg"), 422, "format='jpg': Input should be 'png' or 'webp'"),
    Bad(
        TILE.replace("WebMercatorQuad", "Nope"), 400, "'Nope' is not a TileMatrixSet here; accepted: .*WebMercatorQuad"
    ),
    Bad(f"{API}/Nope/tilejson.json", 400, "'Nope' is not a TileMatrixSet"),
    Bad(f"{API}/Nope/map.html", 400, "'Nope' is not a TileMatrixSet"),
    Bad(TILE.replace("/18/", "/25/"), 400, "zoom 25 is not in WebMercatorQuad; accepted: 0 to 24"),
    Bad(TILE.replace("/18/", "/-1/"), 400, "zoom -1 is not in WebMercatorQuad"),
    Bad(TILE.replace("/18/", "/99/"), 422, "z='99'"),
    Bad(TILE.replace("90044", "a"), 422, "x='a'"),
    Bad(TILE, 422, "url is missing", {"url": None}),
    Bad(f"{API}/info", 422, "url is missing", {"url": None}),
    Bad(TILE, 404, "cannot open 'none.tif'", {"url": "none.tif"}),
    Bad(TILE, 400, "'/etc/passwd' is not a relative path", {"url": "/etc/passwd"}),
    Bad(TILE, 400, r"'\.\./codebooks0/x' leads out", {"url": "../codebooks0/x"}),
    Bad(TILE, 400, "starts with 'file:'", {"url": "file:///etc/passwd"}),
    Bad(TILE, 400, "url has 0 characters", {"url": ""}),
    Bad(TILE, 422, "url=", {"url": "x" * 5000}),
    Bad(TILE, 422, "rescale", {"url": "float.tif"}),
    Bad(f"{API}/point/200,0", 422, "lon='200'"),
    Bad(f"{API}/point/nan,0", 422, "lon='nan'"),
    Bad(f"{API}/point/0,91", 422, "lat='91'"),
    Bad(f"{API}/bbox/1,2,3,4.tif", 400, "the area holds no patch of the image"),
    Bad(f"{API}/bbox/5,2,3,4.tif", 400, "is not minx,miny,maxx,maxy"),
    Bad(f"{API}/bbox/179,-35,-179,-34.tif", 400, "split a box that crosses the antimeridian in two"),
    Bad(f"{API}/bbox/nan,2,3,4.tif", 400, "bbox nan"),
    Bad(f"{API}/bbox/-inf,2,inf,4.tif", 400, "bbox -inf"),
    Bad(f"{API}/bbox/a,2,3,4.tif", 422, "minx='a'"),
    Bad(f"{API}/bbox/1,2,3,4.jpg", 422, "format='jpg': Input should be 'tif' or 'png'"),
    Bad(BOX + ".tif", 400, "'EPSG:1' is not a known CRS", {"coord_crs": "EPSG:1"}),
    Bad(BOX + ".tif", 400, "'WGS84' is not a CRS", {"coord_crs": "WGS84"}),
    Bad(BOX + ".tif", 400, "does not place points on a map", {"coord_crs": "EPSG:5773"}),
    Bad(BOX + ".tif", 400, "the area needs 110 chunks; this server computes at most 30 in one request"),
    Bad(FEATURE, 400, "the area needs", body=TRIANGLE),
    Bad(STATISTICS, 400, "the area needs", body=TRIANGLE),
    Bad(
        STATISTICS,
        400,
        "the area needs 3[1-9] chunks",
        body={
            "type": "FeatureCollection",
            "features": [
                polygon((-56.3434, -34.8815), (-56.3430, -34.8815), (-56.3430, -34.8812), (-56.3434, -34.8815))
            ]
            * 3,
        },
    ),
    Bad(STATISTICS, 400, "the body is not JSON", body=b"{"),
    Bad(STATISTICS, 400, "the body is not JSON", body=b""),
    Bad(STATISTICS, 400, "the body is not JSON", body=b"\xff\xfe"),
    Bad(STATISTICS, 400, "the body is not JSON", body=b"[" * 100_000),
    Bad(STATISTICS, 400, rf"the body is \[\]; {NEEDED}", body=b"[]"),
    Bad(STATISTICS, 400, rf"the body is 'Polygon'; {NEEDED}", body=TRIANGLE["geometry"]),
    Bad(STATISTICS, 400, f"features is null; {NEEDED}", body={"type": "FeatureCollection"}),
    Bad(STATISTICS, 400, f"one of the features is 5; {NEEDED}", body={"type": "FeatureCollection", "features": [5]}),
    Bad(STATISTICS, 400, "properties is 5", body=TRIANGLE | {"properties": 5}),
    Bad(
        STATISTICS, 400, "the geometry is null; a Polygon or MultiPolygon is needed", body=TRIANGLE | {"geometry": None}
    ),
    Bad(STATISTICS, 400, "the geometry is 'x'", body=TRIANGLE | {"geometry": "x"}),
    Bad(STATISTICS, 400, "geometry is a LineString; accepted", body=geometry("LineString", [[0, 0], [1, 1]])),
    Bad(FEATURE, 400, "geometry is a Point; accepted: Polygon and MultiPolygon", body=geometry("Point", [0, 0])),
    Bad(FEATURE, 400, "geometry is a", body=geometry(["Polygon"], [0, 0])),
    Bad(FEATURE, 400, "send one Feature", body={"type": "FeatureCollection", "features": [TRIANGLE]}),
    Bad(STATISTICS, 400, "it is empty", body=geometry("Polygon", [])),
    Bad(STATISTICS, 400, "at least 4 coordinates", body=geometry("Polygon", [[[0, 0], [1, 1]]])),
    Bad(STATISTICS, 400, "Self-intersection", body=polygon((0, 0), (1, 1), (1, 0), (0, 1), (0, 0))),
    Bad(STATISTICS, 400, "not a readable Polygon", body=geometry("Polygon", [[["a", 0], [1, 1], [1, 2], ["a", 0]]])),
    Bad(STATISTICS, 400, "NaN is not a finite number", body=json.dumps(TRIANGLE).replace("-34.8806", "NaN").encode()),
    Bad(FEATURE, 400, "NaN is not a finite number", body=json.dumps(TRIANGLE).replace("-34.8806", "NaN").encode()),
    Bad(STATISTICS, 400, "1e400 is not a finite", body=json.dumps(TRIANGLE).replace("-34.8806", "1e400").encode()),
    Bad("/geocentroids/codebooks/nope", 404, "there is no codebook 'nope'"),
    Bad(f"{API}/viewer/nope.js", 404, "the viewer has no file 'nope.js'"),
    Bad(f"{API}/WMTSCapabilities.xml", 404, "cannot open", {"url": "none.tif"}),
]


@pytest.fixture(scope="module")
def strict(start: Callable[..., App], images: Path) -> App:
    """One that computes little for a request."""
    write_tif(images / "float.tif", texture(60, 60).astype(np.float32), photometric="RGB")
    return start(max_chunks=30)


class TestErrors:
    @pytest.mark.parametrize("bad", ERRORS, ids=str)
    def test_one_clear_sentence(self, strict: App, bad: Bad) -> None:
        query = {name: value for name, value in ({"url": "whole.tif"} | bad.query).items() if value is not None}
        if bad.body is None:
            answer = strict.client.get(bad.path, params=query)
        else:
            body = bad.body if isinstance(bad.body, bytes) else json.dumps(bad.body).encode()
            answer = strict.client.post(bad.path, params=query, content=body)
        assert answer.status_code == bad.status, answer.text
        assert answer.headers["cache-control"] == "no-store"
        detail = answer.json()["detail"]
        assert re.search(bad.says, detail), detail
        assert "\n" not in detail
        assert len(detail) < 400
        assert "Traceback" not in detail

    def test_a_source_that_fails_is_asked_again(self, start: Callable[..., App], images: Path) -> None:
        with serve() as httpd:
            app, url = start(failure_ttl_s=0), f"{httpd.url}/a.tif"
            refused = app.get(f"{API}/info", 404, url=url)
            assert refused.headers["cache-control"] == "no-store"
            httpd.files["/a.tif"] = Served((images / "whole.tif").read_bytes())
            assert app.get(f"{API}/info", url=url).json()["width_px"] == 420

    def test_an_encoder_that_does_not_load(self, images: Path, codebooks: Path) -> None:
        service, _ = fake_service(images, codebooks)
        broken = True

        def load(*args: Any) -> Any:
            if broken:
                raise EncoderError("no ONNX Runtime here")
            return Loader()(*args)

        service._load = load
        app = App(TestClient(create_app(service=service)), service, Loader())
        assert app.get(f"{API}/info", 503).json() == {"detail": "no ONNX Runtime here"}
        assert app.client.get("/readyz").status_code == 503
        assert app.client.get("/healthz").status_code == 200
        broken = False
        app.get(f"{API}/info")
        assert app.client.get("/readyz").status_code == 200
        service.close()


class TestLabelRasters:
    def test_profile(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth("hole.tif")
        answer = app.get(bbox_path(t.area), url="hole.tif", coord_crs=GRID_CRS)
        assert answer.headers["content-type"] == "image/tiff; application=geotiff"
        ids, area, profile = read_tif(answer)
        assert area == t.area
        np.testing.assert_array_equal(ids, t.block.labels)
        assert (ids == NODATA_LABEL).any()
        assert (profile["dtype"], profile["nodata"], profile["count"]) == ("uint16", 65535, 1)
        assert CRS.from_wkt(profile["crs"].to_wkt()).equals(CRS.from_user_input(GRID_CRS))
        table = colors_of(answer)
        assert [table[i] for i in range(K)] == [(*color, 255) for color in COLORS.tolist()]
        assert profile["tags"]["GEOCENTROIDS_CODEBOOK"] == "blend"
        assert profile["tags"]["GEOCENTROIDS_DIGEST"] == app.service.codebook("blend").digest

    @pytest.mark.parametrize("image", ["whole.tif", "mercator.tif"])
    def test_overlaps_agree(self, app: App, truth: Callable[..., Truth], image: str) -> None:
        area = truth(image).area
        one = PatchRange(area.row_start, area.row_start + 12, area.col_start + 2, area.col_start + 13)
        two = PatchRange(area.row_start + 6, area.row_stop, area.col_start + 7, area.col_stop)
        (a, area_a, _), (b, area_b, _) = (
            read_tif(app.get(bbox_path(part), url=image, coord_crs=GRID_CRS)) for part in (one, two)
        )
        both = area_a.intersect(area_b)
        assert both.shape == (6, 6)
        np.testing.assert_array_equal(part_of(a, area_a, both), part_of(b, area_b, both))

    def test_a_patch_belongs_to_the_area_by_its_centre(self, app: App, truth: Callable[..., Truth]) -> None:
        area = truth().area
        inner = PatchRange(area.row_start + 4, area.row_start + 9, area.col_start + 5, area.col_start + 11)
        for inset, expected in (
            (0.49, inner),
            (-0.49, inner),
            (0.51, PatchRange(inner.row_start + 1, inner.row_stop - 1, inner.col_start + 1, inner.col_stop - 1)),
        ):
            for answer in (
                app.get(bbox_path(inner, inset=inset), coord_crs=GRID_CRS),
                app.post(f"{API}/feature.tif", feature_of(inner, inset)),
            ):
                assert read_tif(answer)[1] == expected

    def test_a_polygon_leaves_the_rest_out(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth()
        area = t.area
        ring = outline(area, 0.2)
        triangle = polygon(*(tuple(point) for point in (ring[0], ring[1], ring[2], ring[0])))
        ids, found, _ = read_tif(app.post(f"{API}/feature.tif", triangle))
        rows, cols = np.mgrid[found.row_start : found.row_stop, found.col_start : found.col_stop]
        lon, lat = lonlat(rows, cols)
        inside = contains_xy(shape(triangle["geometry"]), lon, lat)
        np.testing.assert_array_equal(ids != NODATA_LABEL, inside & (t.at(rows, cols) != NODATA_LABEL))
        np.testing.assert_array_equal(ids[inside], t.at(rows, cols)[inside])

    def test_box_in_degrees_is_the_default(self, app: App, truth: Callable[..., Truth]) -> None:
        area = truth().area
        ring = np.array(outline(area, -2))
        west, south, east, north = *ring.min(axis=0), *ring.max(axis=0)
        path = f"{API}/bbox/{west},{south},{east},{north}.tif"
        assert read_tif(app.get(path))[1] == area
        x, y = transformer("EPSG:4326", "EPSG:3857").transform([west, east], [south, north])
        there = f"{API}/bbox/{x[0]},{y[0]},{x[1]},{y[1]}.tif"
        assert app.get(there, coord_crs="EPSG:3857").content == app.get(path).content


class TestStatistics:
    def test_members_and_ids_stay(self, app: App, truth: Callable[..., Truth]) -> None:
        area = truth().area
        part = PatchRange(area.row_start + 2, area.row_start + 9, area.col_start + 2, area.col_start + 12)
        first = feature_of(part, 0.1, id="field 1", title="Mine", bbox=[1, 2, 3, 4])
        first["properties"] = {"owner": "Ann", "half": "\ud83d", "nested": {"a": [1, None, 2.5]}}
        second = feature_of(part, 0.1, id=7) | {"properties": None}
        collection = {"type": "FeatureCollection", "name": "fields", "features": [first, second], "crs": {"x": 1}}
        answer = app.post(f"{API}/statistics", collection)
        assert answer.headers["content-type"] == "application/geo+json"
        found = answer.json()
        for sent, got in zip((first, second), found["features"], strict=True):
            statistics = got["properties"].pop("statistics")
            assert got == sent | {"properties": sent["properties"] or {}}
            assert statistics["classes"]
        assert {key: value for key, value in found.items() if key != "features"} == {
            key: value for key, value in collection.items() if key != "features"
        }
        alone = app.post(f"{API}/statistics", second).json()
        assert (
            alone["properties"]["statistics"]
            == app.post(f"{API}/statistics", collection).json()["features"][1]["properties"]["statistics"]
        )

    def test_sums(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth("hole.tif")
        body = feature_of(t.area, 0.2)
        found = app.post(f"{API}/statistics", body, url="hole.tif").json()["properties"]["statistics"]
        rows, cols = t.area.shape
        patch_m2 = t.dataset.grid.patch_area_m2
        labelled = (t.block.labels != NODATA_LABEL).sum()
        assert found["area_m2"] == pytest.approx(rows * cols * patch_m2)
        assert found["labelled_m2"] == pytest.approx(labelled * patch_m2)
        assert found["labelled_m2"] < found["area_m2"]
        assert sum(item["area_m2"] for item in found["classes"]) == pytest.approx(found["labelled_m2"])
        assert sum(item["share"] for item in found["classes"]) == pytest.approx(1)
        areas = [item["area_m2"] for item in found["classes"]]
        assert areas == sorted(areas, reverse=True)
        ids, counts = np.unique(t.block.labels[t.block.labels != NODATA_LABEL], return_counts=True)
        assert {item["label"]: round(item["area_m2"] / patch_m2) for item in found["classes"]} == dict(
            zip(ids.tolist(), counts.tolist(), strict=True)
        )

    @pytest.mark.parametrize(
        ("crs", "place"),
        [
            ("EPSG:32721", (560_000, 6_140_000)),
            ("EPSG:32721", (760_000, 6_140_000)),
            ("EPSG:3857", (-6_270_000, -4_140_000)),
        ],
    )
    def test_area_on_the_ellipsoid(
        self, start: Callable[..., App], images: Path, crs: str, place: tuple[float, float]
    ) -> None:
        """At the edge of a UTM zone and in Web Mercator a square metre of the map is none on the ground."""
        name = f"large-{crs[-4:]}-{place[0]}.tif"
        cell = 0.9 if crs != "EPSG:3857" else 1.1
        write_tif(
            images / name,
            np.full((3, 300, 300), 90, np.uint8),
            crs=crs,
            transform=rasterio.Affine(cell, 0, place[0], 0, -cell, place[1]),
            photometric="RGB",
            compress="deflate",
        )
        circle = Point(place[0] + 150, place[1] - 150).buffer(120, quad_segs=32)
        ring = [list(transformer(crs, "EPSG:4326").transform(x, y)) for x, y in circle.exterior.coords]
        body = polygon(*(tuple(point) for point in ring))
        app = start()
        found = app.post(f"{API}/statistics", body, url=name, codebook="plain").json()["properties"]["statistics"]
        expected = abs(Geod(ellps="WGS84").geometry_area_perimeter(shape(body["geometry"]))[0])
        assert found["area_m2"] == pytest.approx(expected, rel=AREA_SHARE)
        assert found["labelled_m2"] == found["area_m2"]

    @pytest.mark.parametrize("easting", [500_000, 930_000])
    def test_area_of_patches(self, start: Callable[..., App], images: Path, easting: int) -> None:
        """In the middle of a UTM zone and far outside of it: the map is 0.08 % too small, and 0.37 % too large."""
        name = f"square-{easting}.tif"
        at = rasterio.Affine(0.25, 0, easting, 0, -0.25, 6_140_000)
        write_tif(images / name, np.full((3, 400, 400), 90, np.uint8), transform=at, photometric="RGB")
        app = start()
        grid = app.get(f"{API}/info", url=name).json()["grid"]
        assert grid["crs"] == GRID_CRS
        (top, bottom), (left, right) = grid["rows"], grid["cols"]
        body = feature_of(PatchRange(top + 1, bottom - 1, left + 1, right - 1))
        found = app.post(f"{API}/statistics", body, url=name).json()["properties"]["statistics"]
        expected = abs(Geod(ellps="WGS84").geometry_area_perimeter(shape(body["geometry"]))[0])
        assert found["area_m2"] == pytest.approx(expected, rel=SCALE_SHARE)

    def test_beyond_the_image(self, app: App) -> None:
        body = {"type": "Feature", "properties": {}, "geometry": mapping(box(0, 0, 1, 1))}
        found = app.post(f"{API}/statistics", body).json()["properties"]["statistics"]
        assert found == {"area_m2": 0, "labelled_m2": 0, "classes": []}

    def test_nothing_but_no_data(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth("hole.tif")
        row, col = (int(value) for value in np.argwhere(t.block.labels[10:-5, 10:-5] == NODATA_LABEL)[20] + 10)
        patch = PatchRange(
            t.area.row_start + row, t.area.row_start + row + 1, t.area.col_start + col, t.area.col_start + col + 1
        )
        found = app.post(f"{API}/statistics", feature_of(patch, 0.2), url="hole.tif").json()["properties"]["statistics"]
        assert found["labelled_m2"] == 0
        assert found["classes"] == []
        assert found["area_m2"] == pytest.approx(t.dataset.grid.patch_area_m2)

    def test_no_features(self, app: App) -> None:
        empty = {"type": "FeatureCollection", "features": []}
        assert app.post(f"{API}/statistics", empty).json() == empty


class TestClassify:
    def test_cloud_optimized(self, app: App, truth: Callable[..., Truth], images: Path, tmp_path: Path) -> None:
        write_tif(images / "wide.tif", texture(150, 1100, 4), gsd_m=0.98, photometric="RGB", compress="deflate")
        done: list[int] = []
        ids, _ = classified(app, tmp_path, "wide.tif", codebook="plain", progress=done.append)
        dataset = open_image(app.service, "wide.tif", "plain")
        assert sum(done) == dataset.chunk_count
        path = tmp_path / "wide.tif-None.tif"
        with rasterio.open(path) as raster:
            assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert raster.profile["nodata"] == 65535
            assert raster.block_shapes == [(256, 256)]
            assert raster.overviews(1)[0] == 2
            assert raster.colormap(1)[3] == (*COLORS[3].tolist(), 255)
            assert CRS.from_wkt(raster.crs.to_wkt()).equals(CRS.from_user_input(GRID_CRS))
        with rasterio.open(path, overview_level=0) as raster:
            overview = raster.read(1)
        assert ids.shape == (42, 308), "even, so that four patches make one of the overview"
        rows, cols = 21, 154
        fours = ids[: rows * 2, : cols * 2].reshape(rows, 2, cols, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
        shown = overview[:rows, :cols].reshape(-1)
        counts = (fours[:, :, None] == fours[:, None, :]).sum(axis=2)  # (n, 4): how often each of the four occurs
        counts[fours == NODATA_LABEL] = 0
        own = np.where(fours == shown[:, None], counts, 0).max(axis=1)
        assert (own == counts.max(axis=1)).all(), "an overview shows one of the most frequent classes"
        assert (counts.max(axis=1) >= 2).mean() > 0.5
        assert path.stat().st_mode & 0o044 == 0o044, "others may read it"

    def test_a_run_that_fails_leaves_nothing_behind(
        self, start: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        app = start()
        app.get(f"{API}/info")
        app.forget()

        def fail(chunks: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            classified(app, tmp_path, "whole.tif", progress=fail)
        assert list(tmp_path.iterdir()) == []
        encoder = app.loader.made["blend"]
        encoder.poison = {next(iter(encoder.encoded))}
        app.service.store._cache.clear()
        app.service.engines()[0].labeller._tokens._keeper._cache.clear()
        (tmp_path / "whole.tif-None.tif").write_text("older")
        with pytest.raises(PoisonError):
            classified(app, tmp_path, "whole.tif")
        assert [path.name for path in tmp_path.iterdir()] == ["whole.tif-None.tif"]
        assert (tmp_path / "whole.tif-None.tif").read_text() == "older"

    def test_the_folder_has_to_exist(self, app: App, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            classified(app, tmp_path / "nowhere", "whole.tif")

    def test_chunks_in_flight_are_bounded(
        self, start: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine_module, "CHUNKS_AHEAD", 7)
        app = start()
        engine = app.service.engine(app.service.codebook(None)).result()
        asked: list[Any] = []
        most, ask = 0, engine.claim

        def counted(*args: Any) -> Any:
            nonlocal most
            asked.append(ask(*args))
            most = max(most, sum(not claim.future.done() for claim in asked))
            return asked[-1]

        monkeypatch.setattr(engine, "claim", counted)
        classified(app, tmp_path, "whole.tif")
        assert len(asked) == 110
        assert 1 <= most <= 7


class TestAround:
    def test_health(self, start: Callable[..., App]) -> None:
        app = start()
        assert app.client.get("/healthz").json() == {"status": "ok"}
        waiting = app.client.get("/readyz")
        assert waiting.status_code == 503
        assert waiting.json() == {"status": "not ready", "detail": "the encoder is loading"}
        app.service.engine(app.service.codebook(None)).result()
        ready = app.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ok"})
        assert {answer.headers["cache-control"] for answer in (waiting, ready)} == {"no-store"}

    def test_nothing_short_waits_for_exports(self, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        app = start()
        app.tile(18, 90044, 158203)
        encoder = app.loader.made["blend"]
        encoder.gate.clear()
        with ThreadPoolExecutor(10) as pool:
            body = feature_of(truth().area, 0.2)
            exports = [
                pool.submit(app.get, bbox_path(truth().area), coord_crs=GRID_CRS, bidx=[3, 2, 1]) for _ in "abcd"
            ]
            exports += [pool.submit(app.post, f"{API}/statistics", body, bidx=[3, 2, 1]) for _ in "ab"]
            try:
                encoder.await_run()
                short = [
                    pool.submit(app.client.get, "/readyz"),
                    pool.submit(app.get, f"{API}/point/-56.343,-34.881"),
                    pool.submit(app.get, f"{API}/legend", classes=7),
                    pool.submit(app.tile, 18, 90044, 158203, classes=8),
                ]
                assert {answer.result(PATIENCE_S / 2).status_code for answer in short} == {200}
                assert not any(export.done() for export in exports), "they still wait for the device"
            finally:
                encoder.gate.set()
            assert {export.result(PATIENCE_S).status_code for export in exports} == {200}

    def test_no_default_codebook(self, start: Callable[..., App]) -> None:
        app = start(codebook="missing")
        answer = app.client.get("/readyz")
        assert answer.status_code == 503
        assert "there is no codebook 'missing'" in answer.json()["detail"]

    def test_starting_loads_the_encoder_and_stopping_ends_all(self, images: Path, codebooks: Path) -> None:
        service, loader = fake_service(images, codebooks)
        with TestClient(create_app(service=service)) as client:
            service.engine(service.codebook(None)).result()
            assert loader.loads == 1
            assert client.get("/readyz").status_code == 200
        with pytest.raises(RuntimeError, match="shutdown"):
            service.working.submit(print)

    def test_metrics(self, start: Callable[..., App], truth: Callable[..., Truth]) -> None:
        app = start()

        def read() -> dict[tuple[str, str], float]:
            answer = app.client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            families = list(text_string_to_metric_families(answer.text))
            assert len({family.name for family in families}) == len(families)
            assert all(family.documentation for family in families)
            return {
                (sample.name, sample.labels.get("codebook") or sample.labels.get("cache") or ""): sample.value
                for family in families
                for sample in family.samples
                if not sample.name.endswith(("_bucket", "_created"))
            }

        before = read()
        assert not any(value for (name, _), value in before.items() if name != "geocentroids_requests_total")
        assert not any(codebook == "blend" for _, codebook in before)
        t = truth()
        (tile, *_) = tiles_over(t.area, 18)
        for _ in range(3):
            app.tile(18, tile.x, tile.y)
        app.get(bbox_path(t.area), coord_crs=GRID_CRS)
        after = read()
        assert after["geocentroids_cache_bytes", "labels"] == app.service.store.nbytes > 0
        assert after["geocentroids_cache_bytes", "tiles"] > 0
        assert after["geocentroids_cache_hits_total", "tiles"] == 2
        assert after["geocentroids_cache_misses_total", "tiles"] == 1
        encoder = app.loader.made["blend"]
        measured = 3 * encoder.batch_windows
        encoded = sum(encoder.runs) - measured
        assert after["geocentroids_windows_encoded_total", "blend"] == encoded
        assert after["geocentroids_batch_windows_sum", ""] == encoded
        assert after["geocentroids_encode_seconds_count", ""] == len(encoder.runs) - 3
        assert after["geocentroids_windows_read_total", ""] >= encoded
        assert after["geocentroids_render_seconds_count", ""] == 1
        for name in ("read", "encode", "assign", "render"):
            assert after[f"geocentroids_{name}_seconds_sum", ""] > 0
        for name in ("windows_to_read", "windows_waiting", "device_queue", "windows_given_up_total"):
            assert after[f"geocentroids_{name}", "blend"] == 0
        assert 0 < after["geocentroids_seconds_per_chunk", "blend"] < 10
        assert after["geocentroids_requests_total", ""] == 5, "of status 200"

    def test_codebooks(self, app: App) -> None:
        listed = {item["name"]: item for item in app.client.get("/geocentroids/codebooks").json()["codebooks"]}
        assert listed["blend"]["default"]
        assert listed["blend"]["installed"]
        assert listed["blend"]["classes"] == K
        assert not listed["plain"]["default"]
        assert not listed["southamerica-6k"]["installed"]
        one = app.client.get("/geocentroids/codebooks/bare").json()
        assert (one["name"], one["centroids"], one["classes_available"]) == ("bare", K, False)
        assert one["digest"] == app.service.codebook("bare").digest
        assert app.client.get("/geocentroids/codebooks/plain").json()["classes_available"]

    def test_legend(self, app: App) -> None:
        found = app.client.get(f"{API}/legend").json()
        assert found["codebook"] == "blend"
        codebook = app.service.codebook("blend")
        assert found["classes"][5] == {
            "label": 5,
            "color": "#{:02x}{:02x}{:02x}".format(*COLORS[5]),
            "name": "Wiese äöü",
            "count": int(codebook.counts[5]),
            "exemplar": None,
        }
        assert len(found["classes"]) == K
        bare = app.client.get(f"{API}/legend", params={"codebook": "bare"}).json()["classes"]
        assert bare[5] == {**found["classes"][5], "name": None, "count": None}

    def test_info(self, app: App, truth: Callable[..., Truth]) -> None:
        t = truth()
        found = app.get(f"{API}/info").json()
        assert found["grid"] == {
            "crs": GRID_CRS,
            "patch_m": PATCH_M,
            "rows": [t.area.row_start, t.area.row_stop],
            "cols": [t.area.col_start, t.area.col_stop],
        }
        assert found["chunks"] == 110
        assert found["seconds"] == pytest.approx(110 * found["seconds_per_chunk"])
        assert (found["width_px"], found["height_px"]) == (420, 400)
        assert found["gsd_m"] == pytest.approx(0.25, rel=1e-3)
        assert found["warnings"] == []
        assert found["bounds"] == pytest.approx([-56.343421, -34.881508, -56.342265, -34.880600], abs=1e-6)

    def test_tilejson(self, app: App, truth: Callable[..., Truth]) -> None:
        document = app.get(f"{API}/WebMercatorQuad/tilejson.json", classes=6, tile_format="webp").json()
        assert document["tilejson"] == "3.0.0"
        assert document["attribution"] == "nobody"
        assert document["minzoom"] == 0
        assert document["maxzoom"] == 19
        assert document["bounds"] == app.get(f"{API}/info").json()["bounds"]
        (tile, *_) = tiles_over(truth().area, 18)
        address = document["tiles"][0].format(z=18, x=tile.x, y=tile.y)
        answer = app.client.get(address)
        assert answer.headers["content-type"] == "image/webp"
        assert rgba(answer).shape == (512, 512, 4)
        np.testing.assert_array_equal(rgba(answer), rgba(app.tile(18, tile.x, tile.y, classes=6, tilesize=512)))
        assert len(app.client.get(document["legend"]).json()["classes"]) == 6
