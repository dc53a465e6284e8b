"""Many images as one layer over HTTP, with a fake encoder: against the labels of each image, merged by the rule."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import morecantile
import numpy as np
import pytest
import rasterio
from fakes import PATIENCE_S, distinct_colors, fake_service, labels_of_colors, open_image, until, write_codebooks
from fastapi.testclient import TestClient
from httpd import Served, serve
from numpy.typing import NDArray
from pyproj import Geod, Transformer
from rasterio.transform import Affine
from rasterio.warp import transform_bounds
from rasters import LEFT, TOP, UTM, texture, write_tif
from shapely.geometry import shape
from test_http import (
    API,
    PATCH_M,
    App,
    bbox_path,
    feature_of,
    patches_of_tile,
    read_tif,
    rgba,
    starting,
    tiles_over,
    transformer,
)

from geocentroids_tiler.app import create_app
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.grid import PatchRange, utm_codes
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.export import strips
from geocentroids_tiler.source import ReadOptions

COLORS = distinct_colors()
SIDE = 300
"""Pixels a side of an image, 21 patches."""
STEP_M = 35.0
"""From one image to the next: so neighbours overlap by half."""
NAMES = ("a.tif", "b.tif", "c.tif", "far.tif")
DATES = {"a.tif": "2024-01-01", "b.tif": "2024-03-01", "c.tif": "2024-02-01", "far.tif": ""}
BORDER = -54.0
"""Longitude of the border of UTM zones 21 and 22."""
BORDER_LAT = -34.9


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images in a row that overlap, the second with a hole; one far away; two at a border of zones."""
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        pixels = texture(SIDE, SIDE, seed=number + 1)
        if name == "b.tif":
            pixels[:, 60:200, 40:120] = 0
        left = LEFT + 1.25 + number * STEP_M + (5000 if name == "far.tif" else 0)
        at = Affine(0.25, 0, left, 0, -0.25, TOP - 0.5)
        write_tif(folder / name, pixels, transform=at, nodata=0, photometric="RGB")
    for name, crs, lon in (("west.tif", "EPSG:32721", BORDER - 0.0002), ("east.tif", "EPSG:32722", BORDER + 0.0003)):
        x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, BORDER_LAT)
        at = Affine(0.25, 0, x - SIDE / 8, 0, -0.25, y + SIDE / 8)
        write_tif(folder / name, texture(SIDE, SIDE, seed=len(name)), crs=crs, transform=at, photometric="RGB")
    (folder / "row.txt").write_text("\n".join(NAMES))
    (folder / "border.txt").write_text("west.tif\neast.tif")
    (folder / "table.csv").write_text(table(folder, NAMES))
    (folder / "broken.tif").write_bytes(b"II*\0 this was an image")
    return folder


def table(folder: Path, names: tuple[str, ...]) -> str:
    """Return a list that says where images lie."""
    rows = ["url,west,south,east,north,datetime"]
    for name in names:
        with rasterio.open(folder / name) as raster:
            bounds = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
        rows.append(",".join([name, *map(repr, bounds), DATES.get(name, "")]))
    return "\n".join(rows)


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture(scope="module")
def start(images: Path, codebooks: Path) -> Iterator[Callable[..., App]]:
    with starting(images, codebooks) as start:
        yield start


@pytest.fixture(scope="module")
def app(start: Callable[..., App]) -> App:
    return start()


@pytest.fixture(scope="module")
def alone(images: Path, codebooks: Path) -> Iterator[Callable[..., LabelBlock]]:
    """Labels of single images, from an engine of its own."""
    service, _ = fake_service(images, codebooks)

    @lru_cache
    def block(name: str, grid: str | None = None) -> LabelBlock:
        dataset = open_image(service, name, grid=grid)
        return service.engine(service.codebook(None)).result().block(dataset, dataset.footprint)

    yield block
    service.close()


def merged(blocks: list[LabelBlock], rule: str) -> tuple[NDArray[np.uint16], PatchRange]:
    """Merge labels patch by patch, as the rule is worded."""
    areas = [block.patches for block in blocks]
    hull = PatchRange(
        min(area.row_start for area in areas),
        max(area.row_stop for area in areas),
        min(area.col_start for area in areas),
        max(area.col_stop for area in areas),
    )
    labels = np.full(hull.shape, NODATA_LABEL, np.uint16)
    best = np.full(hull.shape, -np.inf)
    for block in blocks:
        for (i, j), label in np.ndenumerate(block.labels):
            at = i + block.patches.row_start - hull.row_start, j + block.patches.col_start - hull.col_start
            if label == NODATA_LABEL:
                continue
            if labels[at] == NODATA_LABEL or (rule == "similarity" and block.similarity[i, j] > best[at]):
                labels[at], best[at] = label, block.similarity[i, j]
    return labels, hull


def in_order(alone: Callable[..., LabelBlock], rule: str) -> list[LabelBlock]:
    names = ["b.tif", "c.tif", "a.tif"] if rule == "newest" else ["a.tif", "b.tif", "c.tif"]
    return [alone(name) for name in names]


RULES = ("first", "newest", "similarity")


@contextmanager
def dripping_server() -> Iterator[str]:
    """Serve a document that never ends, a byte at a time."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while not over.wait(0.05):
                    self.wfile.write(b"a")

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    over.set()
    server.shutdown()
    server.server_close()


class TestOneGrid:
    @pytest.mark.parametrize("rule", RULES)
    def test_export(self, app: App, alone: Callable[..., LabelBlock], rule: str) -> None:
        labels, area = merged(in_order(alone, rule), rule)
        answer = app.get(bbox_path(area, inset=0.1), url="table.csv", overlap=rule, coord_crs="EPSG:32721")
        found, where, _ = read_tif(answer)
        assert where == area
        assert np.array_equal(found, labels)
        assert len(np.unique(labels)) > 10
        assert "X-Geocentroids-Missing" not in answer.headers

    def test_the_rules_differ(self, alone: Callable[..., LabelBlock]) -> None:
        pictures = [merged(in_order(alone, rule), rule)[0] for rule in RULES]
        assert (pictures[0] != pictures[1]).mean() > 0.05
        assert (pictures[0] != pictures[2]).mean() > 0.05

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("z", [18, 19, 21])
    def test_tiles(self, app: App, alone: Callable[..., LabelBlock], rule: str, z: int) -> None:
        labels, area = merged(in_order(alone, rule), rule)
        compared = 0
        for tile in tiles_over(area, z)[:6]:
            picture = labels_of_colors(rgba(app.tile(z, tile.x, tile.y, url="table.csv", overlap=rule)), COLORS)
            rows, cols, clear = patches_of_tile("WebMercatorQuad", z, tile.x, tile.y, 256)
            inside = (rows >= area.row_start) & (rows < area.row_stop)
            inside &= (cols >= area.col_start) & (cols < area.col_stop)
            expected = np.full(picture.shape, NODATA_LABEL, np.uint16)
            expected[inside] = labels[rows[inside] - area.row_start, cols[inside] - area.col_start]
            clear = clear & (cols < area.col_stop + 100)  # the image far away is not in the truth
            assert np.array_equal(picture[clear], expected[clear])
            compared += int((expected[clear] != NODATA_LABEL).sum())
        assert compared > 1000

    def test_statistics(self, app: App, alone: Callable[..., LabelBlock]) -> None:
        labels, area = merged(in_order(alone, "first"), "first")
        feature = app.post(f"{API}/statistics", feature_of(area, 0.1), url="table.csv").json()
        statistics = feature["properties"]["statistics"]
        patch_m2 = statistics["labelled_m2"] / (labels != NODATA_LABEL).sum()
        assert patch_m2 == pytest.approx(PATCH_M**2, rel=1e-3)
        found = {each["label"]: round(each["area_m2"] / patch_m2) for each in statistics["classes"]}
        values, counts = np.unique(labels[labels != NODATA_LABEL], return_counts=True)
        assert found == dict(zip(values.tolist(), counts.tolist(), strict=True))

    def test_point(self, app: App, alone: Callable[..., LabelBlock]) -> None:
        first, second = alone("a.tif"), alone("b.tif")
        row, col = 10, 20  # of the first image, and of the second one right of its hole
        at = first.patches.row_start + row, first.patches.col_start + col
        lon, lat = transformer(UTM, "EPSG:4326").transform((at[1] + 0.5) * PATCH_M, -(at[0] + 0.5) * PATCH_M)
        own = second.labels[at[0] - second.patches.row_start, at[1] - second.patches.col_start]
        assert own != NODATA_LABEL
        found = app.get(f"{API}/point/{lon},{lat}", url="table.csv").json()
        assert (found["centroid"], found["image"]) == (first.labels[row, col], "a.tif")
        found = app.get(f"{API}/point/{lon},{lat}", url="table.csv", overlap="newest").json()
        assert (found["centroid"], found["image"]) == (own, "b.tif")
        assert app.get(f"{API}/point/0,0", url="table.csv").json()["label"] is None
        assert app.get(f"{API}/point/{lon},{lat}", url="a.tif").json()["image"] is None

    def test_labels_are_those_of_the_single_images(self, start: Callable[..., App]) -> None:
        """They share the cache: after the images, the mosaic needs no window."""
        app = start()
        area = open_image(app.service, "a.tif").footprint
        for name in NAMES[:3]:
            app.get(bbox_path(area, inset=0.1), url=name, coord_crs="EPSG:32721")
        app.forget()
        app.get(bbox_path(area, inset=0.1), url="table.csv", coord_crs="EPSG:32721")
        assert not app.loader.made["blend"].encoded

    def test_no_more_is_computed_than_is_shown(self, start: Callable[..., App]) -> None:
        """Where the first image has all labels the others are not read, and those elsewhere are not opened."""
        app, other = start(), start()
        left = open_image(other.service, "a.tif").footprint
        area = PatchRange(left.row_start + 1, left.row_stop - 1, left.col_start + 1, left.col_stop - 1)
        app.get(bbox_path(area, inset=0.1), url="table.csv", coord_crs="EPSG:32721")
        other.get(bbox_path(area, inset=0.1), url="a.tif", coord_crs="EPSG:32721")
        assert app.loader.made["blend"].encoded == other.loader.made["blend"].encoded
        codebook = app.service.codebook(None)
        opened = [name for name in NAMES if app.service.known_dataset(name, ReadOptions(), codebook) is not None]
        assert "a.tif" in opened
        assert "far.tif" not in opened


class TestDocuments:
    def items(self, images: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
        found = []
        for line in table(images, names).splitlines()[1:]:
            name, *bounds, date = line.split(",")
            found.append(
                {
                    "type": "Feature",
                    "id": name,
                    "bbox": [float(value) for value in bounds],
                    "geometry": None,
                    "properties": {"datetime": date or None},
                    "assets": {"visual": {"href": name, "type": "image/tiff"}},
                }
            )
        return found

    def mosaicjson(self, images: Path) -> dict[str, Any]:
        tms = morecantile.tms.get("WebMercatorQuad")
        tiles: dict[str, list[str]] = {}
        for each in self.items(images, NAMES):
            for tile in tms.tiles(*each["bbox"], [17]):
                tiles.setdefault(tms.quadkey(tile), []).append(each["id"])
        return {"mosaicjson": "0.0.3", "quadkey_zoom": 17, "tiles": tiles}

    def test_all_kinds_name_the_same_layer(self, app: App, images: Path, alone: Callable[..., LabelBlock]) -> None:
        (images / "mosaic.json").write_text(json.dumps(self.mosaicjson(images)))
        collection = {"type": "FeatureCollection", "features": self.items(images, NAMES)}
        (images / "items.geojson").write_text(json.dumps(collection))
        labels, area = merged(in_order(alone, "first"), "first")
        for name in ("row.txt", "table.csv", "mosaic.json", "items.geojson"):
            found, _, _ = read_tif(app.get(bbox_path(area, inset=0.1), url=name, coord_crs="EPSG:32721"))
            assert np.array_equal(found, labels), name
        (images / "item.json").write_text(json.dumps(self.items(images, NAMES)[1]))
        found, _, _ = read_tif(app.get(bbox_path(area, inset=0.1), url="item.json", coord_crs="EPSG:32721"))
        assert np.array_equal(found, alone("b.tif").labels)

    def test_whole_paths_below_the_root(self, app: App, images: Path, alone: Callable[..., LabelBlock]) -> None:
        """As in the items that classify --list writes."""
        items = self.items(images, NAMES[:3])
        for each in items:
            each["assets"]["visual"]["href"] = str(images / each["id"])
        (images / "sub").mkdir(exist_ok=True)
        (images / "sub" / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        labels, area = merged(in_order(alone, "first"), "first")
        answer = app.get(bbox_path(area, inset=0.1), url="sub/items.json", coord_crs="EPSG:32721")
        assert np.array_equal(read_tif(answer)[0], labels)
        (images / "sub" / "list.txt").write_text("/etc/passwd\n../a.tif")
        problems = app.get(f"{API}/info", url="sub/list.txt").json()["problems"]
        assert [problem["url"] for problem in problems] == ["/etc/passwd"]

    def test_a_search_elsewhere(self, app: App, images: Path, alone: Callable[..., LabelBlock]) -> None:
        """Its pages come from a server without ranges, its images from beside it."""
        labels, area = merged(in_order(alone, "first"), "first")
        items = self.items(images, NAMES)
        with serve() as server:
            for name in NAMES:
                server.files[f"/images/{name}"] = Served((images / name).read_bytes(), {"ETag": f'"{name}"'})
            for each in items:
                each["assets"]["visual"]["href"] = f"../images/{each['id']}"
            for page, (features, links) in enumerate(
                [(items[:2], [{"rel": "next", "href": f"{server.url}/v1/more/search?page=1"}]), (items[2:], [])]
            ):
                body = json.dumps({"type": "FeatureCollection", "features": features, "links": links}).encode()
                path = ("/v1/search", "/v1/more/search")[page]
                server.files[path] = Served(body, ranges=False)
            for name in NAMES:
                server.files[f"/v1/images/{name}"] = server.files[f"/images/{name}"]
            answer = app.get(bbox_path(area, inset=0.1), url=f"{server.url}/v1/search?limit=2", coord_crs="EPSG:32721")
            found, _, _ = read_tif(answer)
            assert np.array_equal(found, labels)
            assert [target for _, target in server.requests[:2]] == ["/v1/search?limit=2", "/v1/more/search?page=1"]

    @pytest.mark.parametrize(
        ("link", "status", "problem"),
        [
            ("/v1/search?page=1", 422, "the pages of .* do not end"),
            ("http://10.0.0.1/search", 400, "'10.0.0.1' is not a public address"),
            ("/v1/none/search", 404, "cannot open"),
        ],
    )
    def test_pages_that_lead_astray(self, start: Callable[..., App], link: str, status: int, problem: str) -> None:
        app = start()
        links = [{"rel": "next", "href": link}]
        with serve() as server:
            body = json.dumps({"type": "FeatureCollection", "features": [], "links": links}).encode()
            server.files["/v1/search"] = Served(body, ranges=False)
            answer = app.get(f"{API}/info", status, url=f"{server.url}/v1/search?page=1")
        assert re.search(problem, answer.json()["detail"])

    def test_a_document_that_drips(self, start: Callable[..., App]) -> None:
        """It has a deadline as a whole, as bytes of images have."""
        app = start(source_total_timeout_s=0.5, source_timeout_s=5)
        with dripping_server() as url:
            began = time.monotonic()
            app.get(f"{API}/info", 404, url=f"{url}/list.txt")
            assert time.monotonic() - began < PATIENCE_S

    @pytest.mark.parametrize(
        ("content", "settings", "status", "problem"),
        [
            ("{", {}, 422, "is not JSON"),
            ('{"type": "Catalog"}', {}, 422, "STAC Catalog"),
            ("", {}, 422, "names no image"),
            ("a.tif\nb.tif\nc.tif", {"mosaic_images": 2}, 422, "names more images than this server takes"),
            ("a.tif\nb.tif\nc.tif", {"mosaic_unplaced": 2}, 422, "opens at most 2 to find out; name them with their"),
            ("a" * 2000, {"mosaic_bytes": 1024}, 422, "has more than 1024 bytes"),
            ("broken.tif\nmissing.tif\n/etc/passwd", {}, 422, "none of the 3 images of .* can be used"),
            ("https://10.0.0.1/a.tif", {}, 422, "none of the 1 images"),
        ],
    )
    def test_what_cannot_be_used(
        self, start: Callable[..., App], images: Path, content: str, settings: dict[str, Any], status: int, problem: str
    ) -> None:
        (images / "bad.json").write_text(content)
        app = start(**settings)
        for path in (f"{API}/info", f"{API}/tiles/WebMercatorQuad/18/1/1.png", f"{API}/WebMercatorQuad/tilejson.json"):
            answer = app.get(path, status, url="bad.json")
            assert re.search(problem, answer.json()["detail"])
            assert answer.headers["Cache-Control"] == "no-store"

    def test_missing_document(self, app: App) -> None:
        assert "cannot open 'none.json'" in app.get(f"{API}/info", 404, url="none.json").json()["detail"]
        assert "leads out" in app.get(f"{API}/info", 400, url="../x/../../none.json").json()["detail"]

    def test_jobs_and_stock_routes_take_images(self, start: Callable[..., App], tmp_path: Path) -> None:
        app = start(labels_dir=tmp_path)
        assert "names many images" in app.post(f"{API}/jobs", None, 400, url="row.txt").json()["detail"]
        app.get("/cog/info", 404, url="row.txt")


class TestChanges:
    def test_tiles_follow_the_images_under_them(self, codebooks: Path, images: Path, tmp_path: Path) -> None:
        for name in ("a.tif", "far.tif"):
            (tmp_path / name).write_bytes((images / name).read_bytes())
        (tmp_path / "m.csv").write_text(table(images, ("a.tif", "far.tif")))
        service, loader = fake_service(tmp_path, codebooks, source_ttl_s=0)
        app = App(TestClient(create_app(service=service)), service, loader)
        tile = tiles_over(open_image(service, "a.tif").footprint, 18)[0]
        get = lambda: app.tile(18, tile.x, tile.y, url="m.csv")  # noqa: E731
        first = get()
        assert get().headers["ETag"] == first.headers["ETag"]
        assert app.client.get(first.request.url, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
        os.utime(tmp_path / "far.tif", (1, 1))
        assert get().headers["ETag"] == first.headers["ETag"]
        write_tif(tmp_path / "a.tif", texture(SIDE, SIDE, seed=9), transform=Affine(0.25, 0, LEFT, 0, -0.25, TOP))
        assert get().headers["ETag"] != first.headers["ETag"]
        (tmp_path / "m.csv").write_text(table(tmp_path, ("far.tif",)))
        assert get().headers["X-Geocentroids-Empty"] == "outside"
        service.close()


class TestBroken:
    @pytest.fixture
    def broken(self, images: Path, tmp_path: Path, codebooks: Path) -> Iterator[tuple[App, Path]]:
        """The middle one of three images breaks off; the document says where it would lie."""
        for name in NAMES[:3]:
            (tmp_path / name).write_bytes((images / name).read_bytes())
        (tmp_path / "m.csv").write_text(table(images, NAMES[:3]))
        (tmp_path / "b.tif").write_bytes(b"II*\0 this was an image")
        service, loader = fake_service(tmp_path, codebooks, source_ttl_s=0, failure_ttl_s=0)
        yield App(TestClient(create_app(service=service)), service, loader), tmp_path
        service.close()

    def test_the_rest_is_served(self, broken: tuple[App, Path], images: Path, alone: Callable[..., LabelBlock]) -> None:
        app, folder = broken
        labels, area = merged([alone("a.tif"), alone("c.tif")], "first")
        answer = app.get(bbox_path(area, inset=0.1), url="m.csv", coord_crs="EPSG:32721")
        found, where, _ = read_tif(answer)
        assert where == area
        assert np.array_equal(found, labels)
        assert answer.headers["X-Geocentroids-Missing"] == "1"
        statistics = app.post(f"{API}/statistics", feature_of(area, 0.1), url="m.csv")
        assert statistics.headers["X-Geocentroids-Missing"] == "1"
        tile = tiles_over(open_image(app.service, "c.tif").footprint, 18)[0]
        for _ in range(2):
            picture = app.tile(18, tile.x, tile.y, url="m.csv")
            assert picture.headers["X-Geocentroids-Missing"] == "1"
            assert picture.headers["Cache-Control"] == "public, max-age=60"
            assert "ETag" not in picture.headers
        info = app.get(f"{API}/info", url="m.csv").json()
        assert info["images"] == 3
        assert info["problems"] == [{"url": "b.tif", "reason": "cannot open 'b.tif'"}]
        assert "1 of its 3 images cannot be used" in info["warnings"][0]
        # Mended, it is there at once.
        (folder / "b.tif").write_bytes((images / "b.tif").read_bytes())
        whole, _ = merged([alone(name) for name in NAMES[:3]], "first")
        answer = app.get(bbox_path(area, inset=0.1), url="m.csv", coord_crs="EPSG:32721")
        assert np.array_equal(read_tif(answer)[0], whole)
        assert "X-Geocentroids-Missing" not in answer.headers
        assert app.get(f"{API}/info", url="m.csv").json()["problems"] == []
        assert "ETag" in app.tile(18, tile.x, tile.y, url="m.csv").headers

    def test_an_image_that_breaks_while_it_is_read(
        self, broken: tuple[App, Path], images: Path, alone: Callable[..., LabelBlock]
    ) -> None:
        app, folder = broken
        content = bytearray((images / "b.tif").read_bytes())
        with rasterio.open(images / "b.tif") as raster:
            offset = int(raster.tags(1, ns="TIFF").get("BLOCK_OFFSET_0_0", 0)) or len(content) // 2
        del content[max(offset, len(content) // 3) :]
        (folder / "b.tif").write_bytes(content)
        labels, area = merged([alone("a.tif"), alone("c.tif")], "first")
        answer = app.get(bbox_path(area, inset=0.1), url="m.csv", coord_crs="EPSG:32721")
        assert answer.headers["X-Geocentroids-Missing"] == "1"
        assert np.array_equal(read_tif(answer)[0], labels)

    def test_an_image_without_a_place_is_asked_for_again(
        self, images: Path, tmp_path: Path, codebooks: Path, alone: Callable[..., LabelBlock]
    ) -> None:
        """The list does not say where it lies, so until it can be opened all answers may lack it."""
        (tmp_path / "a.tif").write_bytes((images / "a.tif").read_bytes())
        (tmp_path / "m.txt").write_text("a.tif\nb.tif")
        service, loader = fake_service(tmp_path, codebooks, source_ttl_s=0, failure_ttl_s=0)
        app = App(TestClient(create_app(service=service)), service, loader)
        area = alone("a.tif").patches
        answer = app.get(bbox_path(area, inset=0.1), url="m.txt", coord_crs="EPSG:32721")
        assert answer.headers["X-Geocentroids-Missing"] == "1"
        tile = tiles_over(area, 18)[0]
        picture = app.tile(18, tile.x, tile.y, url="m.txt")
        assert picture.headers["X-Geocentroids-Missing"] == "1"
        assert picture.headers["Cache-Control"] == "public, max-age=60"
        (tmp_path / "b.tif").write_bytes((images / "b.tif").read_bytes())
        whole, where = merged([alone("a.tif"), alone("b.tif")], "first")
        answer = app.get(bbox_path(where, inset=0.1), url="m.txt", coord_crs="EPSG:32721")
        assert "X-Geocentroids-Missing" not in answer.headers
        assert np.array_equal(read_tif(answer)[0], whole)
        service.close()

    def test_statistics_and_points_say_what_they_lack(
        self, broken: tuple[App, Path], alone: Callable[..., Any]
    ) -> None:
        """Also where nothing is left."""
        app, folder = broken
        for name in ("a.tif", "c.tif"):
            (folder / name).unlink()
        area = alone("b.tif").patches
        answer = app.post(f"{API}/statistics", feature_of(area, 0.1), url="m.csv")
        assert answer.headers["X-Geocentroids-Missing"] == "3"
        assert answer.json()["properties"]["statistics"]["area_m2"] == 0
        place = ((area.col_start + 5) * PATCH_M, -(area.row_start + 5) * PATCH_M)
        lon, lat = transformer(UTM, "EPSG:4326").transform(*place)
        answer = app.get(f"{API}/point/{lon},{lat}", url="m.csv")
        assert int(answer.headers["X-Geocentroids-Missing"]) >= 1
        assert answer.json()["label"] is None


class TestZoneBorder:
    def test_info(self, app: App) -> None:
        info = app.get(f"{API}/info", url="border.txt").json()
        assert [grid["crs"] for grid in info["grids"]] == ["EPSG:32721", "EPSG:32722"]
        assert info["kind"] == "mosaic"
        assert info["minzoom"] <= info["maxzoom"] == 19

    def truth(
        self, alone: Callable[..., LabelBlock], lon: NDArray[Any], lat: NDArray[Any]
    ) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """Return the label at each place by the words: of the grid of its zone, first west.tif, then east.tif."""
        expected = np.full(lon.shape, NODATA_LABEL, np.uint16)
        clear = np.ones(lon.shape, bool)
        codes = utm_codes(lon, lat)
        assert set(np.unique(codes)) <= {32721, 32722}
        assert np.array_equal(codes == 32721, lon < BORDER)
        for code, own in ((32721, "west.tif"), (32722, "east.tif")):
            x, y = transformer("EPSG:4326", f"EPSG:{code}").transform(lon, lat)
            u, v = x / PATCH_M, -y / PATCH_M
            mine = codes == code
            edge = np.minimum(np.minimum(u % 1, 1 - u % 1), np.minimum(v % 1, 1 - v % 1))
            clear[mine] = edge[mine] > 0.03
            for name in ("west.tif", "east.tif"):
                block = alone(name, None if name == own else f"EPSG:{code}")
                rows, cols = np.floor(v).astype(int), np.floor(u).astype(int)
                area = block.patches
                inside = mine & (rows >= area.row_start) & (rows < area.row_stop)
                inside &= (cols >= area.col_start) & (cols < area.col_stop) & (expected == NODATA_LABEL)
                expected[inside] = block.labels[rows[inside] - area.row_start, cols[inside] - area.col_start]
        return expected, clear

    @pytest.mark.parametrize("z", [18, 19, 20])
    def test_tiles(self, app: App, alone: Callable[..., LabelBlock], z: int) -> None:
        tms = morecantile.tms.get("WebMercatorQuad")
        seen = set()
        for tile in tms.tiles(BORDER - 0.0005, BORDER_LAT - 0.0003, BORDER + 0.0005, BORDER_LAT + 0.0003, [z]):
            left, bottom, right, top = tms.xy_bounds(tile)
            i = (np.arange(256) + 0.5) / 256
            x, y = np.meshgrid(left + i * (right - left), top + i * (bottom - top))
            lon, lat = transformer("EPSG:3857", "EPSG:4326").transform(x, y)
            expected, clear = self.truth(alone, lon, lat)
            clear &= np.abs(lon - BORDER) > 1e-9
            picture = labels_of_colors(rgba(app.tile(z, tile.x, tile.y, url="border.txt")), COLORS)
            assert np.array_equal(picture[clear], expected[clear])
            labelled = expected != NODATA_LABEL
            seen |= {bool(side) for side in np.unique((lon < BORDER)[labelled])}
        assert seen == {True, False}

    def test_no_gap_at_the_border(self, app: App) -> None:
        """All pixels of a small tile on the border have a label: no sliver between the grids is empty."""
        tms = morecantile.tms.get("WebMercatorQuad")
        tile = tms.tile(BORDER - 1e-7, BORDER_LAT, 22)
        for x in (tile.x, tile.x + 1):
            assert (rgba(app.tile(22, x, tile.y, url="border.txt"))[..., 3] == 255).all()

    def test_point(self, app: App, alone: Callable[..., LabelBlock]) -> None:
        lon = np.array([BORDER - 2e-5, BORDER + 2e-5])
        lat = np.full(2, BORDER_LAT + 1e-5)
        expected, _ = self.truth(alone, lon, lat)
        for place, label in zip(lon, expected, strict=True):
            assert app.get(f"{API}/point/{place},{lat[0]}", url="border.txt").json()["centroid"] == label

    def test_statistics_count_every_place_once(self, app: App, alone: Callable[..., LabelBlock]) -> None:
        """Against labels looked up at places 0.2 m apart."""
        west, south, east, north = BORDER - 0.0002, BORDER_LAT - 0.0002, BORDER + 0.0002, BORDER_LAT + 0.0002
        lon, lat = np.meshgrid(np.linspace(west, east, 201)[:-1] + 1e-6, np.linspace(south, north, 201)[:-1] + 1e-6)
        expected, _ = self.truth(alone, lon, lat)
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}}
        statistics = app.post(f"{API}/statistics", feature, url="border.txt").json()["properties"]["statistics"]
        total, _ = Geod(ellps="WGS84").polygon_area_perimeter(*np.array(ring).T)
        assert statistics["area_m2"] == pytest.approx(total, rel=0.1)  # patches are whole
        shares = {each["label"]: each["share"] for each in statistics["classes"]}
        values, counts = np.unique(expected[expected != NODATA_LABEL], return_counts=True)
        for value, count in zip(values, counts, strict=True):
            assert shares.get(int(value), 0) == pytest.approx(count / counts.sum(), abs=0.04)

    def test_an_export_has_one_grid(self, app: App, alone: Callable[..., LabelBlock]) -> None:
        bounds = f"{BORDER - 0.0001},{BORDER_LAT - 0.0001},{BORDER + 0.0003},{BORDER_LAT + 0.0001}"
        answer = app.get(f"{API}/bbox/{bounds}.tif", url="border.txt")
        found, area, profile = read_tif(answer)
        assert profile["crs"].to_epsg() == 32722, "that of its centre"
        west, east = alone("west.tif", "EPSG:32722"), alone("east.tif")
        for (i, j), label in np.ndenumerate(found):
            row, col = area.row_start + i, area.col_start + j
            place = PatchRange(row, row + 1, col, col + 1)
            expected = NODATA_LABEL
            for block in (west, east):
                if not place.intersect(block.patches).empty and expected == NODATA_LABEL:
                    expected = int(block.labels[place.within(block.patches)][0, 0])
            lon, lat = transformer("EPSG:32722", "EPSG:4326").transform((col + 0.5) * PATCH_M, -(row + 0.5) * PATCH_M)
            inside = BORDER - 0.0001 <= lon < BORDER + 0.0003 and abs(lat - BORDER_LAT) < 0.0001
            assert label == (expected if inside else NODATA_LABEL)


class TestKeptLabels:
    def test_those_of_an_image_are_not_used_on_another_grid(
        self, start: Callable[..., App], alone: Callable[..., LabelBlock], tmp_path: Path
    ) -> None:
        """west.tif has kept labels on its own grid, and lies in the next zone, too."""
        app = start(labels_dir=tmp_path)
        for name in ("west.tif", "east.tif"):
            dataset = open_image(app.service, name)
            engine = app.service.engine(app.service.codebook(None)).result(PATIENCE_S)
            with app.service.kept.writer(dataset, engine.codebook, engine.device_name) as writer:
                for strip in strips(engine, dataset, dataset.footprint):
                    writer.write(strip)
                writer.finish()
        bounds = f"{BORDER - 0.0001},{BORDER_LAT - 0.0001},{BORDER + 0.0003},{BORDER_LAT + 0.0001}"
        with_kept = read_tif(app.get(f"{API}/bbox/{bounds}.tif", url="border.txt"))[0]
        without = read_tif(start().get(f"{API}/bbox/{bounds}.tif", url="border.txt"))[0]
        assert np.array_equal(with_kept, without)
        west = alone("west.tif", "EPSG:32722")
        assert (west.labels != NODATA_LABEL).any()


class TestManyImages:
    def test_chunks_are_counted_for_each_image(self, start: Callable[..., App]) -> None:
        """Where all images are read, all count."""
        area = open_image(start().service, "b.tif").footprint
        rows, cols = area.chunk_range(3).shape
        app = start(max_chunks=rows * cols + 5)
        app.get(bbox_path(area, inset=0.1), url="b.tif", coord_crs="EPSG:32721")
        answer = app.get(bbox_path(area, inset=0.1), 400, url="table.csv", overlap="similarity", coord_crs="EPSG:32721")
        assert "this server computes at most" in answer.json()["detail"]

    def test_one_deadline_for_images_that_wait_for_each_other(self, start: Callable[..., App]) -> None:
        app = start(export_timeout_s=0.3)
        app.service.engine(app.service.codebook(None)).result(PATIENCE_S)
        app.loader.made["blend"].gate.clear()
        area = open_image(app.service, "b.tif").footprint
        began = time.monotonic()
        app.get(bbox_path(area, inset=0.1), 503, url="table.csv", overlap="newest", coord_crs="EPSG:32721")
        app.loader.made["blend"].gate.set()
        assert time.monotonic() - began < PATIENCE_S

    def test_more_than_one_request_may_open(self, start: Callable[..., App]) -> None:
        app = start(mosaic_opened=2)
        area = open_image(app.service, "b.tif").footprint
        detail = app.get(bbox_path(area), 400, url="table.csv", coord_crs="EPSG:32721").json()["detail"]
        assert "3 images of the mosaic lie there; one request opens at most 2" in detail
        tile = tiles_over(area, 16)[0]
        answer = app.tile(16, tile.x, tile.y, url="table.csv")
        assert answer.headers["X-Geocentroids-Empty"] == "too-many-images 3"

    def test_footprints(self, app: App, images: Path) -> None:
        found = app.get(f"{API}/footprints", url="table.csv", overlap="newest").json()
        assert found["type"] == "FeatureCollection"
        assert [each["properties"]["url"] for each in found["features"]] == list(NAMES)
        for name, each in zip(NAMES, found["features"], strict=True):
            with rasterio.open(images / name) as raster:
                bounds = transform_bounds(raster.crs, "EPSG:4326", *raster.bounds)
            assert each["bbox"] == pytest.approx(bounds, abs=1e-9)
            assert shape(each["geometry"]).bounds == pytest.approx(bounds, abs=1e-9)
            assert (each["properties"]["datetime"] or "")[:10] == DATES[name]
        (one,) = app.get(f"{API}/footprints", url="a.tif").json()["features"]
        assert one["bbox"] == pytest.approx(found["features"][0]["bbox"], abs=1e-9)

    def test_tilejson_and_wmts(self, app: App) -> None:
        found = app.get(f"{API}/WebMercatorQuad/tilejson.json", url="border.txt", overlap="newest").json()
        west, south, east, north = found["bounds"]
        assert west < BORDER < east
        assert south < BORDER_LAT < north
        assert "overlap=newest" in found["tiles"][0]
        assert "url=border.txt" in found["tiles"][0]
        capabilities = app.get(f"{API}/WMTSCapabilities.xml", url="border.txt")
        assert "geocentroids_WebMercatorQuad_default" in capabilities.text

    def test_a_cancelled_or_failed_merge_leaves_nothing_running(self, start: Callable[..., App]) -> None:
        app = start(request_timeout_s=0.05)
        area = open_image(app.service, "a.tif").footprint
        engine = app.service.engine(app.service.codebook(None)).result(PATIENCE_S)
        encoder = app.loader.made["blend"]
        encoder.gate.clear()
        tile = tiles_over(area, 18)[0]
        assert app.tile(18, tile.x, tile.y, status=503, url="table.csv").headers["Retry-After"]
        encoder.gate.set()
        engine_is_idle = lambda: engine.windows_waiting == 0  # noqa: E731
        until(engine_is_idle)
