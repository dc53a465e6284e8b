"""The drawn aerial scene: known land cover, a sound COG, written once and whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform_bounds

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.scene import LAND_COVER, Scene, ensure_demo_scene, files, make_scene, write_scene
from geocentroids_tiler.scene.canvas import GSD_M, SUN_SLOPE, Canvas, cast_shadows, facing
from geocentroids_tiler.scene.shapes import inside_polygon, ribbon, smooth_path, split_polygon, walk

SIZE_PX = 1024
SQUARE = np.array([[0.0, 0.0], [0.0, 100.0], [100.0, 100.0], [100.0, 0.0]])


@pytest.fixture(scope="module")
def scene() -> Scene:
    return make_scene(SIZE_PX, seed=0)


@pytest.fixture(scope="module")
def other_scene() -> Scene:
    return make_scene(SIZE_PX, seed=1)


def median_colour(scene: Scene, name: str) -> np.ndarray:
    return np.median(scene.rgb[scene.land_cover == LAND_COVER.index(name)], axis=0)


def test_scene_has_the_promised_shape(scene: Scene) -> None:
    assert scene.rgb.shape == (SIZE_PX, SIZE_PX, 3)
    assert scene.land_cover.shape == (SIZE_PX, SIZE_PX)
    assert scene.rgb.dtype == scene.land_cover.dtype == np.uint8
    assert (scene.transform.a, scene.transform.e) == (0.25, -0.25)


def test_same_seed_same_scene_other_seed_other_scene(scene: Scene, other_scene: Scene) -> None:
    again = make_scene(SIZE_PX, seed=0)
    np.testing.assert_array_equal(again.rgb, scene.rgb)
    np.testing.assert_array_equal(again.land_cover, scene.land_cover)
    assert (other_scene.land_cover != scene.land_cover).mean() > 0.1


@pytest.mark.parametrize("name", ["scene", "other_scene"])
def test_every_class_has_a_sensible_share(name: str, request: pytest.FixtureRequest) -> None:
    cover = request.getfixturevalue(name).land_cover
    shares = np.bincount(cover.ravel(), minlength=len(LAND_COVER)) / cover.size
    assert len(shares) == len(LAND_COVER)
    assert shares.min() > 0.015
    assert shares.max() < 0.6


def test_colours_agree_with_the_land_cover(scene: Scene) -> None:
    medians = {name: median_colour(scene, name) for name in LAND_COVER}
    brightness = {name: colour.mean() for name, colour in medians.items()}
    blueness = {name: colour[2] - colour[0] for name, colour in medians.items()}
    assert brightness["water"] < brightness["grass"] - 20
    assert brightness["tree"] < brightness["grass"] - 20
    assert blueness["water"] == max(blueness.values())
    assert all(medians[name][1] > medians[name][[0, 2]].max() for name in ("grass", "tree"))
    assert np.ptp(medians["road"]) < 15 < np.ptp(medians["bare"])


def test_trees_are_rougher_than_water(scene: Scene) -> None:
    grey = scene.rgb.mean(axis=2)
    rough = np.abs(np.diff(grey, axis=1))
    same = scene.land_cover[:, 1:] == scene.land_cover[:, :-1]
    water, tree = (np.median(rough[same & (scene.land_cover[:, 1:] == LAND_COVER.index(n))]) for n in ("water", "tree"))
    assert tree > 1.5 * water


def test_nothing_at_the_edge_could_be_taken_for_a_collar(scene: Scene) -> None:
    border = np.concatenate([scene.rgb[[0, -1]].reshape(-1, 3), scene.rgb[:, [0, -1]].reshape(-1, 3)])
    assert (border.max(axis=1) < 20).mean() < 0.001
    assert (border.min(axis=1) > 235).mean() < 0.02


@pytest.mark.parametrize("size_px", [0, files.SMALLEST_PX - 1, files.LARGEST_PX + 1])
def test_impossible_size_is_refused_with_the_limits(size_px: int) -> None:
    with pytest.raises(InputError, match=f"{size_px}.*{files.SMALLEST_PX} to {files.LARGEST_PX}"):
        make_scene(size_px)


def test_image_is_a_georeferenced_cog(scene: Scene, tmp_path: Path) -> None:
    write_scene(tmp_path / "scene.tif", scene)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]
    with rasterio.open(tmp_path / "scene.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.crs.to_string() == scene.crs
        assert dataset.crs.is_projected
        assert dataset.transform == scene.transform
        assert dataset.res == (GSD_M, GSD_M)
        assert dataset.block_shapes == [(512, 512)] * 3
        assert dataset.overviews(1) == [2]
        west, south, east, north = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        error = dataset.read().astype(float) - np.moveaxis(scene.rgb, 2, 0)
    assert -58.5 < west < east < -53  # Uruguay
    assert -35 < south < north < -30
    # JPEG at quality 90 with halved chroma; measured 2.8.
    assert np.sqrt(np.mean(error**2)) < 4


def test_land_cover_is_kept_exactly(scene: Scene, tmp_path: Path) -> None:
    write_scene(tmp_path / "scene.tif", scene, tmp_path / "cover.tif")
    with rasterio.open(tmp_path / "cover.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.transform == scene.transform
        assert dataset.tags()["CLASSES"].split(",") == list(LAND_COVER)
        assert len({dataset.colormap(1)[value] for value in range(len(LAND_COVER))}) == len(LAND_COVER)
        np.testing.assert_array_equal(dataset.read(1), scene.land_cover)
        overview = dataset.read(1, out_shape=(SIZE_PX // 2, SIZE_PX // 2))
    assert set(np.unique(overview)) <= set(range(len(LAND_COVER)))


def test_demo_scene_is_written_once(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "make_scene", lambda: scene)
    folder = tmp_path / "not" / "there"
    path = ensure_demo_scene(folder)
    assert sorted(entry.name for entry in folder.iterdir()) == [
        f"demo-scene-v{files.SCENE_VERSION}-land-cover.tif",
        path.name,
    ]

    def fail() -> Scene:
        raise AssertionError("drawn again")

    monkeypatch.setattr(files, "make_scene", fail)
    before = path.stat().st_mtime_ns
    assert ensure_demo_scene(folder) == path
    assert path.stat().st_mtime_ns == before


def test_new_version_is_written_beside_the_old(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "make_scene", lambda: scene)
    old = ensure_demo_scene(tmp_path)
    monkeypatch.setattr(files, "SCENE_VERSION", files.SCENE_VERSION + 1)
    assert ensure_demo_scene(tmp_path) != old


def test_failure_halfway_leaves_nothing_behind(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(path: Path, scene: Scene, land_cover_path: Path | None = None) -> None:
        path.write_bytes(b"II*")
        raise OSError("disk full")

    monkeypatch.setattr(files, "make_scene", lambda: scene)
    monkeypatch.setattr(files, "write_scene", break_off)
    with pytest.raises(OSError, match="disk full"):
        ensure_demo_scene(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_shadow_falls_away_from_the_sun_as_far_as_the_height_says() -> None:
    height = np.zeros((120, 120), np.float32)
    height[40, :] = 8.0  # a wall from west to east; 4/5 of a shadow's length is towards the south
    shade = cast_shadows(height)[:, 100] > 0.5
    shaded = np.flatnonzero(shade)
    assert shaded.min() == 41
    assert shaded.max() - 40 == pytest.approx(0.8 * 8.0 / SUN_SLOPE / GSD_M, abs=3)


def test_slopes_towards_the_sun_are_brighter() -> None:
    assert facing(0.0, 0.0) == pytest.approx(1.0)
    assert facing(0.4, 0.3) > 1.2  # rises towards the south-east, so it looks north-west
    assert facing(-0.4, -0.3) < 0.8


def test_splitting_keeps_the_area() -> None:
    parts = split_polygon(SQUARE, 800.0, np.random.default_rng(2))
    areas = [abs(np.sum(row * np.roll(col, -1) - col * np.roll(row, -1))) / 2 for row, col in (p.T for p in parts)]
    assert len(parts) > 5
    assert sum(areas) == pytest.approx(100.0**2)


def test_distance_inside_a_polygon() -> None:
    canvas = Canvas(480, seed=0)
    inside = inside_polygon(canvas.whole(), SQUARE)
    assert inside[40, 200] == pytest.approx(10.125)
    assert inside[440, 200] == pytest.approx(-10.125)


def test_ribbon_measures_along_and_across_a_path() -> None:
    near = ribbon(Canvas(480, seed=0), np.array([[50.0, 10.0], [50.0, 60.0], [50.0, 110.0]]), 8.0)
    assert near is not None
    row, col = 216 - near.window.slices[0].start, 320 - near.window.slices[1].start
    assert near.across[row, col] == pytest.approx(4.125)  # 54.125 m south of the top, so right of an eastward path
    assert near.along[row, col] == pytest.approx(70.125)


def test_curve_passes_its_points_and_is_walked_evenly() -> None:
    points = [(0.0, 0.0), (10.0, 50.0), (0.0, 100.0)]
    path = smooth_path(points)
    for point in points:
        assert np.hypot(*(path - point).T).min() < 1e-9
    steps = np.diff([point for point, _ in walk(path, 5.0)], axis=0)
    np.testing.assert_allclose(np.hypot(*steps.T), 5.0, atol=0.2)
