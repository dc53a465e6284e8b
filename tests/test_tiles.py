"""Tiles against exact pyproj computation, pixel by pixel."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codebooks import make_codebook
from morecantile import Tile, TileMatrixSet
from morecantile import tms as all_tms
from morecantile.errors import PointOutsideTMSBounds
from numpy.typing import NDArray
from PIL import Image
from pyproj import CRS, Transformer
from rasters import codebook_for

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import WGS84, Grid, PatchRange, project, utm_crs
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.render import Style
from geocentroids_tiler.source import ReadOptions
from geocentroids_tiler.tiles import (
    Extent,
    TileCache,
    TileKey,
    TileView,
    check_zoom,
    draw_tile,
    tile_view,
    tms_crs,
    zoom_range,
)


@dataclass(frozen=True)
class Tolerance:
    limit: float
    measured: float
    reason: str


TOLERANCES = {
    "place": Tolerance(
        0.02, 0.0003, "patches beyond the border of the one chosen; a tenth is promised, 0.02 asked for"
    ),
}


def within(name: str, difference: float) -> None:
    """Assert that a difference is within the table's limit."""
    assert float(difference) <= TOLERANCES[name].limit


MERCATOR = all_tms.get("WebMercatorQuad")
URUGUAY, KAMPALA, NETHERLANDS, FIJI = (-56.35, -34.88), (32.58, 0.31), (5.39, 52.16), (-179.9, -16.5)


def grid_at(place: tuple[float, float], epsg: int | None = None) -> Grid:
    return Grid(CRS.from_epsg(epsg) if epsg else utm_crs(*place), 3.5)


def footprint_at(grid: Grid, place: tuple[float, float], side: int = 400) -> PatchRange:
    row, col = (int(v) for v in grid.patch_of(*project(WGS84, grid.crs, *place)))
    return PatchRange(row - side // 2, row + side // 2, col - side // 2, col + side // 2)


def exact_places(
    tms: TileMatrixSet, tile: Tile, size_px: int, samples: int, grid: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return patch rows and columns, as fractions, under every sample of a tile."""
    left, bottom, right, top = tms.xy_bounds(tile)
    at = (np.arange(size_px * samples) + 0.5) / (size_px * samples)
    x, y = np.meshgrid(left + at * (right - left), top + at * (bottom - top))
    gx, gy = Transformer.from_crs(tms_crs(tms), grid.crs, always_xy=True).transform(x, y)
    return -gy / grid.patch_m, gx / grid.patch_m


def places_of(view: TileView) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the patch rows and columns at the samples of a view."""
    rows, cols = view.places
    return rows.astype(np.int64) + view.patches.row_start, cols.astype(np.int64) + view.patches.col_start


def whole(view: TileView) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of a view at all samples of the tile; -2**40 where the view has no pixel."""
    n, s = view.size_px, view.samples
    found = []
    for part in places_of(view):
        full = np.full((n * s, n * s), -(2**40))
        pixels = view.pixels
        full[pixels.row_start * s : pixels.row_stop * s, pixels.col_start * s : pixels.col_stop * s] = part
        found.append(full)
    return found[0], found[1]


def check_tile(tms: TileMatrixSet, tile: Tile, size_px: int, grid: Grid, footprint: PatchRange) -> TileView | None:
    """Compare a view with exact computation: every sample whose place is clear of the borders of its patch."""
    view = tile_view(tms, tile, size_px, grid, footprint)
    samples = view.samples if view else 1
    rows, cols = exact_places(tms, tile, size_px, samples, grid)
    with np.errstate(invalid="ignore"):
        inside = (rows >= footprint.row_start) & (rows < footprint.row_stop)
        inside &= (cols >= footprint.col_start) & (cols < footprint.col_stop)
    if view is None:
        assert not inside.any()
        return None
    found_rows, found_cols = whole(view)
    for exact, found in ((rows, found_rows), (cols, found_cols)):
        off = np.maximum(found - exact, exact - (found + 1))[inside]  # how far the place is from the patch chosen
        within("place", off.max(initial=0))
    part = view.patches
    inner = part.intersect(footprint)
    assert inner == part or view.cell > 1
    for start, stop, origin in (
        (part.row_start, part.row_stop, footprint.row_start),
        (part.col_start, part.col_stop, footprint.col_start),
    ):
        assert (start - origin) % view.cell == (stop - origin) % view.cell == 0, "whole cells, the same for all tiles"
    assert max(a - b for a, b in zip(part.shape, inner.shape, strict=True)) < view.cell
    clear = inside & (np.abs(rows - np.rint(rows)) > 0.1) & (np.abs(cols - np.rint(cols)) > 0.1)
    if clear.any():
        assert part.row_start <= np.floor(rows[clear]).min()
        assert np.floor(rows[clear]).max() < part.row_stop
        assert part.col_start <= np.floor(cols[clear]).min()
        assert np.floor(cols[clear]).max() < part.col_stop
    return view


class TestPlace:
    @pytest.mark.parametrize("zoom", [13, 15, 16, 17, 18, 19, 21])
    @pytest.mark.parametrize("place", [URUGUAY, KAMPALA, NETHERLANDS])
    def test_web_mercator(self, zoom: int, place: tuple[float, float]) -> None:
        grid = grid_at(place)
        assert check_tile(MERCATOR, MERCATOR.tile(*place, zoom), 128, grid, footprint_at(grid, place)) is not None

    @pytest.mark.parametrize("name", all_tms.list())
    def test_every_tile_matrix_set_that_covers_the_place(self, name: str) -> None:
        tms = all_tms.get(name)
        west, south, east, north = tms.bbox
        places = [
            URUGUAY,
            NETHERLANDS,
            (4.0, 52.0),
            (174.8, -41.3),
            (0.0, -75.0),
            ((west + east) / 2, (south + north) / 2),
        ]
        covered = 0
        for place in places:
            zoom = next(
                (z for z in range(tms.minzoom, tms.maxzoom + 1) if tms.matrix(z).scaleDenominator < 9_000), tms.maxzoom
            )
            try:
                tile = tms.tile(*place, zoom)
            except PointOutsideTMSBounds:
                continue
            if -80 <= place[1] <= 84:
                grid = grid_at(place)
                covered += check_tile(tms, tile, 64, grid, footprint_at(grid, place)) is not None
        assert covered

    @pytest.mark.parametrize("size_px", [16, 256, 512, 700])
    def test_sizes(self, size_px: int) -> None:
        grid = grid_at(URUGUAY)
        view = check_tile(MERCATOR, MERCATOR.tile(*URUGUAY, 17), size_px, grid, footprint_at(grid, URUGUAY))
        assert view is not None
        assert view.size_px == size_px

    @pytest.mark.parametrize("epsg", [None, 28992, 3035])
    @pytest.mark.parametrize("place", [NETHERLANDS])
    @pytest.mark.parametrize("zoom", range(13))
    def test_low_zooms_hold_the_image(self, zoom: int, place: tuple[float, float], epsg: int | None) -> None:
        """An image of 1.4 km is found in a tile of half the world, in few samples.

        In the tile of the whole world it lies between two samples, and would be 1 % opaque if it did not.
        """
        grid = grid_at(place, epsg)
        footprint = footprint_at(grid, place)
        view = tile_view(MERCATOR, MERCATOR.tile(*place, zoom), 512, grid, footprint)
        if view is None:
            assert 40_075_017 * 0.61 / 2**zoom / 512 / 2 > 1400
            return
        view_rows, view_cols = places_of(view)
        assert view_rows.size <= 4 * 400 * 400 * 4
        assert (view.samples > 1) == (zoom < 15)
        assert not view.patches.empty
        rows, cols = exact_places_of(view, MERCATOR, MERCATOR.tile(*place, zoom), grid)
        pixel = 40_075_017 / 2**zoom / 512 / 3.5 / view.samples  # a sample's side in patches, at most
        assert np.abs(view_rows - np.floor(rows)).max() <= max(1, 0.1 * pixel)
        assert np.abs(view_cols - np.floor(cols)).max() <= max(1, 0.1 * pixel)

    def test_across_the_antimeridian(self) -> None:
        grid = Grid(CRS.from_epsg(32701), 3.5)
        place = (180.0, -16.5)
        footprint = footprint_at(grid, place, 200)
        for lon, zoom in itertools.product((179.999, -179.999), (15, 16, 18)):
            assert check_tile(MERCATOR, MERCATOR.tile(lon, -16.5, zoom), 64, grid, footprint) is not None

    @pytest.mark.parametrize(
        "tile", [Tile(0, 0, 17), Tile(-1, 5, 4), Tile(16, 5, 4), Tile(5, 16, 4), Tile(5, -1, 4), Tile(2**40, 0, 10)]
    )
    def test_outside_is_none(self, tile: Tile) -> None:
        grid = grid_at(URUGUAY)
        assert tile_view(MERCATOR, tile, 256, grid, footprint_at(grid, URUGUAY)) is None

    def test_tiles_share_out_the_image(self) -> None:
        """Every patch that a tile of zoom 18 shows belongs to a tile next to it or to itself; none is left out."""
        grid = grid_at(URUGUAY)
        footprint = footprint_at(grid, URUGUAY, 120)
        seen = np.zeros(footprint.shape, bool)
        middle = MERCATOR.tile(*URUGUAY, 18)
        for x, y in itertools.product(range(middle.x - 4, middle.x + 5), range(middle.y - 4, middle.y + 5)):
            view = tile_view(MERCATOR, Tile(x, y, 18), 256, grid, footprint)
            if view is not None:
                view_rows, view_cols = places_of(view)
                rows, cols = view_rows - footprint.row_start, view_cols - footprint.col_start
                inside = (rows >= 0) & (rows < 120) & (cols >= 0) & (cols < 120)
                seen[rows[inside], cols[inside]] = True
        assert seen.all()


def exact_places_of(
    view: TileView, tms: TileMatrixSet, tile: Tile, grid: Grid
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return patch rows and columns, as fractions, under the samples of a view alone."""
    left, bottom, right, top = tms.xy_bounds(tile)
    n, s = view.size_px * view.samples, view.samples
    u = (np.arange(view.pixels.col_start * s, view.pixels.col_stop * s) + 0.5) / n
    v = (np.arange(view.pixels.row_start * s, view.pixels.row_stop * s) + 0.5) / n
    x, y = np.meshgrid(left + u * (right - left), top + v * (bottom - top))
    gx, gy = Transformer.from_crs(tms_crs(tms), grid.crs, always_xy=True).transform(x, y)
    return -gy / grid.patch_m, gx / grid.patch_m


class TestSamples:
    @pytest.mark.parametrize(
        ("zoom", "cell", "samples"),
        [(19, 1, 1), (16, 1, 1), (15, 1, 2), (14, 1, 3), (13, 2, 3), (11, 8, 3), (9, 32, 3), (4, 1024, 3)],
    )
    def test_two_to_four_cells_a_side_of_a_pixel(self, zoom: int, cell: int, samples: int) -> None:
        """Side of a 256 px pixel at 34.88 degrees: 156,543 m x 0.82 / 2^zoom; 1.12 patches at zoom 15."""
        side = 156_543 * np.cos(np.radians(34.88)) / 2**zoom / 3.5
        assert samples == (1 if side <= 1 else np.ceil(side / cell))
        grid = grid_at(URUGUAY)
        view = tile_view(MERCATOR, MERCATOR.tile(*URUGUAY, zoom), 256, grid, footprint_at(grid, URUGUAY))
        assert view is not None
        assert (view.cell, view.samples) == (cell, samples)

    def test_longer_side_counts(self) -> None:
        """At 60 degrees north a pixel of a geographic tile is twice as high as it is wide."""
        place = (25.0, 60.0)
        grid = grid_at(place)
        tms = all_tms.get("WorldCRS84Quad")
        zoom = 14
        height_m = tms.matrix(zoom).cellSize * 111_412
        view = tile_view(tms, tms.tile(*place, zoom), 256, grid, footprint_at(grid, place))
        assert view is not None
        assert height_m / 2 < 3.5 < height_m
        assert view.samples == 2


def draw(view: TileView, labels: NDArray[np.uint16], footprint: PatchRange, image_format: Any = "png") -> Any:
    part = view.patches
    block = np.full(part.shape, 65535, np.uint16)
    inner = part.intersect(footprint)
    block[inner.within(part)] = labels[inner.within(footprint)]
    content = draw_tile(
        view,
        LabelBlock(part, block, np.zeros(block.shape, np.float32)),
        CODEBOOK.classes(),
        Style(),
        (0.0, 1.0),
        image_format,
    )
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA"))


CODEBOOK = make_codebook(k=12)


class TestDrawing:
    @pytest.mark.parametrize(("zoom", "side"), [(18, 100), (14, 100), (10, 1500)])
    @pytest.mark.parametrize("image_format", ["png", "webp"])
    def test_pixels_are_the_patches_colours(self, zoom: int, side: int, image_format: str) -> None:
        """Each pixel: the mean of the colours of the cells under it, weighted by opacity, from exact places."""
        grid = grid_at(URUGUAY)
        footprint = footprint_at(grid, URUGUAY, side)
        labels = np.random.default_rng(1).integers(0, 12, footprint.shape).astype(np.uint16)
        labels[:10] = 65535
        tile = MERCATOR.tile(*URUGUAY, zoom)
        view = tile_view(MERCATOR, tile, 64, grid, footprint)
        assert view is not None
        found = draw(view, labels, footprint, image_format)
        cells = -(-side // view.cell)  # a side
        padded = np.full((cells * view.cell, cells * view.cell), 65535)
        padded[:side, :side] = labels
        known = padded != 65535
        colors = np.zeros((*padded.shape, 4))
        colors[known] = np.concatenate([CODEBOOK.colors, np.full((12, 1), 255)], axis=1)[padded[known]]
        colors = colors.reshape(cells, view.cell, cells, view.cell, 4).mean(axis=(1, 3))  # premultiplied
        rows, cols = (
            np.floor((places - start) / view.cell).astype(int)
            for places, start in zip(
                exact_places(MERCATOR, tile, 64, view.samples, grid),
                (footprint.row_start, footprint.col_start),
                strict=True,
            )
        )
        inside = (rows >= 0) & (rows < cells) & (cols >= 0) & (cols < cells)
        rgba = np.where(inside[..., None], colors[rows.clip(0, cells - 1), cols.clip(0, cells - 1)], 0)
        mean = rgba.reshape(64, view.samples, 64, view.samples, 4).mean(axis=(1, 3))
        shown = np.zeros((64, 64), bool)
        shown[view.pixels.row_start : view.pixels.row_stop, view.pixels.col_start : view.pixels.col_stop] = True
        assert not found[~shown].any(), "the last cells may reach beyond the image; no pixel does"
        alpha = np.where(shown, mean[..., 3], 0)
        color = mean[..., :3] * 255 / np.maximum(alpha, 1e-9)[..., None]
        opaque = alpha > 40  # a whole level of a faint colour is many of a full one
        close = (np.abs(found[..., 3] - alpha) <= 2) & ((np.abs(found[..., :3] - color).max(axis=2) <= 6) | ~opaque)
        assert close[alpha > 0].mean() > 0.97  # a sample may fall on the other side of a patch's border
        assert (alpha > 0).any()

    def test_outside_of_the_image_is_transparent(self) -> None:
        grid = grid_at(URUGUAY)
        footprint = footprint_at(grid, URUGUAY, 20)
        view = tile_view(MERCATOR, MERCATOR.tile(*URUGUAY, 16), 256, grid, footprint)
        assert view is not None
        found = draw(view, np.zeros(footprint.shape, np.uint16), footprint)
        assert found.shape == (256, 256, 4)
        share = (20 * 3.5 / 256 / (156_543 * np.cos(np.radians(34.88)) / 2**16)) ** 2
        assert (found[..., 3] > 0).mean() == pytest.approx(share, rel=0.1)


def dataset_at(place: tuple[float, float], side: int, **preprocess: Any) -> Any:
    """Return the extent of an image."""
    grid = grid_at(place)
    footprint = footprint_at(grid, place, side)
    pre = codebook_for(**preprocess).manifest.preprocess
    rows, cols = footprint.chunk_range(pre.stride_patches).shape
    return Extent(grid, footprint, (-180, -90, 180, 90), rows * cols, pre)


class TestZoomRange:
    def test_maxzoom_has_pixels_no_larger_than_the_codebooks(self) -> None:
        for place in (URUGUAY, KAMPALA, NETHERLANDS, FIJI):
            _, maxzoom = zoom_range(MERCATOR, dataset_at(place, 4000), 0.1, 1.0)
            gsd = 156_543.03 * np.cos(np.radians(place[1])) / 2.0 ** np.array([maxzoom - 1, maxzoom])
            assert gsd[0] > 0.25 * 1.005
            assert gsd[1] <= 0.25 * 1.015

    def test_image_across_the_antimeridian(self) -> None:
        """Zooms are those of the place, not of longitude 0."""
        _, beside = zoom_range(MERCATOR, dataset_at((-179.5, -60.0), 400), 0.1, 1.0)
        assert zoom_range(MERCATOR, dataset_at((180.0, -60.0), 400), 0.1, 1.0)[1] == beside == 19

    @pytest.mark.parametrize("name", ["WebMercatorQuad", "WorldCRS84Quad", "EuropeanETRS89_LAEAQuad", "UTM31WGS84Quad"])
    def test_faster_devices_and_larger_budgets_reach_lower_zooms(self, name: str) -> None:
        tms = all_tms.get(name)
        dataset = dataset_at((4.0, 52.0), 20_000)
        zooms = [zoom_range(tms, dataset, seconds, 3.0) for seconds in (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 1e3)]
        assert [low for low, _ in zooms] == sorted(low for low, _ in zooms)
        assert len({high for _, high in zooms}) == 1
        assert all(low <= high for low, high in zooms)
        assert len({low for low, _ in zooms}) > 4
        assert zoom_range(tms, dataset, 0.1, 3.0) == zoom_range(tms, dataset, 0.2, 6.0)

    def test_small_image_is_shown_from_zoom_0(self) -> None:
        dataset = dataset_at(URUGUAY, 50)
        assert zoom_range(MERCATOR, dataset, 0.01, 3.0)[0] == 0
        assert zoom_range(MERCATOR, dataset, 0.2, 3.0)[0] > 10  # 36 chunks take longer than 3 s

    def test_minzoom_tile_is_within_the_budget_and_the_next_is_not(self) -> None:
        dataset = dataset_at(KAMPALA, 40_000)
        affordable = 30.0
        low, _ = zoom_range(MERCATOR, dataset, 0.1, 0.1 * affordable)
        for zoom, within in ((low, True), (low - 1, False)):
            side_m = 40_075_017 / 2**zoom
            assert ((side_m / 35 + 1) ** 2 <= affordable) is within

    def test_check_zoom(self) -> None:
        check_zoom(MERCATOR, 0)
        check_zoom(MERCATOR, 24)
        for zoom in (-1, 25):
            with pytest.raises(InputError, match=rf"zoom {zoom} is not in WebMercatorQuad; accepted: 0 to 24"):
                check_zoom(MERCATOR, zoom)


KEY = TileKey(
    url="http://example.com/a.tif",
    identity="1",
    options=ReadOptions(),
    codebook_digest="abc",
    device="onnx/cpu/fp32",
    tms="WebMercatorQuad",
    z=17,
    x=1,
    y=2,
    size_px=256,
    image_format="png",
    classes=None,
    style=Style("classes", frozenset({3, 100, 57, 12})),
)
OTHERS: dict[str, list[Any]] = {
    "url": ["http://example.com/b.tif"],
    "identity": ["2", ""],
    "options": [
        ReadOptions((1, 2, 3)),
        ReadOptions((3, 2, 1)),
        ReadOptions(None, (0.0, 1.0)),
        ReadOptions(None, (0.0, 2.0)),
    ],
    "codebook_digest": ["abd"],
    "device": ["torch/cpu/fp32"],
    "tms": ["WorldCRS84Quad"],
    "z": [18],
    "x": [2, 12],
    "y": [1],
    "size_px": [512],
    "image_format": ["webp"],
    "classes": [1, 12],
    "style": [Style(), Style("similarity"), Style("classes", frozenset({3})), Style("similarity", frozenset({3}))],
}


class TestKey:
    def test_every_field_changes_the_etag(self) -> None:
        assert set(OTHERS) == {field.name for field in fields(TileKey)}
        tags = [KEY.etag]
        for name, values in OTHERS.items():
            tags += [replace(KEY, **{name: value}).etag for value in values]
        assert len(set(tags)) == len(tags)

    def test_fields_do_not_run_together(self) -> None:
        assert replace(KEY, x=1, y=11).etag != replace(KEY, x=11, y=1).etag
        assert replace(KEY, url="a", identity="bc").etag != replace(KEY, url="ab", identity="c").etag

    def test_is_an_entity_tag(self) -> None:
        assert KEY.etag.startswith('"')
        assert KEY.etag.endswith('"')
        assert KEY.etag[1:-1].isalnum()

    def test_is_the_same_in_other_processes(self) -> None:
        code = "from test_tiles import KEY; print(KEY.etag)"
        for seed in ("1", "2"):
            path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
            found = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=True,
            )
            assert found.stdout.strip() == KEY.etag


class TestCache:
    def test_is_bounded_in_bytes(self) -> None:
        cache = TileCache(10_000)
        for x in range(20):
            cache.put(replace(KEY, x=x), bytes(1000))
            assert cache.nbytes <= 10_000
        assert cache.get(replace(KEY, x=0)) is None
        assert cache.get(replace(KEY, x=19)) == bytes(1000)

    def test_least_recently_used_goes_first(self) -> None:
        cache = TileCache(3 * 2024)
        for x in range(3):
            cache.put(replace(KEY, x=x), bytes(1000))
        assert cache.get(replace(KEY, x=0)) is not None
        cache.put(replace(KEY, x=3), bytes(1000))
        assert [cache.get(replace(KEY, x=x)) is not None for x in range(4)] == [True, False, True, True]

    def test_tile_larger_than_the_cache_is_not_kept(self) -> None:
        cache = TileCache(5000)
        cache.put(KEY, bytes(1000))
        cache.put(replace(KEY, x=9), bytes(6000))
        assert cache.get(replace(KEY, x=9)) is None
        assert cache.get(KEY) is not None
