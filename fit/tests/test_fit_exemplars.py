"""Exemplars: patches that are typical, pixels that are theirs, sheets that are small."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from small_images import folder_of, settings, write_bands

from geocentroids_fit import exemplars
from geocentroids_fit.clusters import Clusters
from geocentroids_fit.exemplars import (
    ImageSource,
    choose_exemplars,
    encode_sheet,
    make_tile,
    source_of,
    write_exemplars,
)
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.shards import SHARDS_DIR, FeatureManifest, Features, FeatureStore, write_shard
from geocentroids_tiler.codebook import Codebook, save_codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.source import Dataset, PatchPixels

TILE_LEVELS = 16.0
"""Mean difference of a tile from its pixels, in levels: what WebP loses, most of it at the edges of strong colours.
Measured: 13.4 at most; 38.8 at least for the tile of the next patch, of which twice this tolerance is required."""
TOP, LEFT = -1_754_284, 160_000
"""Row and column of the patch in the upper left corner of the images, which lie on the grid exactly."""
CORNER = np.array([TOP, LEFT])
SIDE = 20
"""Patches a side of an image."""
ANNA = ImageSource("CC BY 4.0", "Anna", "https://anna.example/")


def store_of(folder: Path, places: Sequence[NDArray[np.int64]], images: Path | None = None) -> FeatureStore:
    """Write features at places of shape (n, 2), an array for each image."""
    records = []
    for number, place in enumerate(places):
        name, n = f"{number}.tif", len(place)
        identity = folder_of(images, name).identity(name) if images else "x"
        features = Features(np.zeros((n, 3), np.float16), np.zeros((n, 3), np.uint8), place[:, 0], place[:, 1])
        records.append(write_shard(folder / SHARDS_DIR, name, identity, features))
    return FeatureStore(folder, FeatureManifest(settings=settings(), images=tuple(records)))


def clusters_of(labels: NDArray[np.uint16], similarity: NDArray[np.float32], k: int) -> Clusters:
    empty = np.zeros((k, 3), np.float32)
    return Clusters(empty, labels, np.bincount(labels, minlength=k), similarity, empty, empty, {})


class TestChoice:
    @pytest.mark.parametrize("seed", range(6))
    def test_typical_and_of_many_images(self, tmp_path: Path, seed: int) -> None:
        rng = np.random.default_rng(seed)
        counts = [400, 0, 3, 900, 0, 250, 60]
        places = [rng.integers(-1000, 1000, (n, 2)) for n in counts]
        store = store_of(tmp_path, places)
        image = np.repeat(np.arange(len(counts)), counts)
        labels = rng.choice(9, len(store), p=[0.5, 0.2, 0.15, 0.1, 0.03, 0.013, 0.005, 0.002, 0]).astype(np.uint16)
        similarity = np.round(rng.random(len(store)), 2).astype(np.float32)  # with many equals
        chosen = choose_exemplars(store, clusters_of(labels, similarity, 9))
        assert np.array_equal(chosen.label, np.sort(chosen.label))
        for label in range(9):
            own = np.flatnonzero(chosen.label == label)
            members = np.flatnonzero(labels == label)
            typical = max(12, math.ceil(len(members) / 10))
            best = sorted(members.tolist(), key=lambda i: (-similarity[i], i))[:typical]
            picked = chosen.feature[own].tolist()
            assert len(set(picked)) == len(picked) == min(4, len(members))
            assert set(picked) <= set(best)
            assert picked[:1] == best[:1]
            assert len(set(image[picked])) == min(4, len(set(image[best])))
        assert np.array_equal(chosen.image, image[chosen.feature])
        place = np.concatenate(places)[chosen.feature]
        assert np.array_equal(np.stack([chosen.row, chosen.col], axis=1), place)
        again = choose_exemplars(store, clusters_of(labels, similarity, 9))
        assert all(np.array_equal(a, b) for a, b in zip(vars(chosen).values(), vars(again).values(), strict=True))

    def test_far_apart_within_an_image(self, tmp_path: Path) -> None:
        cols = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 100])
        store = store_of(tmp_path, [np.stack([np.zeros(12, int), cols], axis=1)])
        clusters = clusters_of(np.zeros(12, np.uint16), np.linspace(1, 0, 12).astype(np.float32), 1)
        assert choose_exemplars(store, clusters).col.tolist() == [0, 100, 10, 5]
        assert choose_exemplars(store, clusters, per_centroid=1).col.tolist() == [0]
        assert sorted(choose_exemplars(store, clusters, per_centroid=99).col.tolist()) == cols.tolist()

    def test_another_image_comes_before_a_better_fit(self, tmp_path: Path) -> None:
        store = store_of(tmp_path, [np.zeros((5, 2), int), np.zeros((2, 2), int), np.zeros((1, 2), int)])
        clusters = clusters_of(np.zeros(8, np.uint16), np.array([9, 8, 7, 6, 5, 1, 2, 0], np.float32), 1)
        assert choose_exemplars(store, clusters).feature.tolist() == [0, 6, 7, 1]

    def test_images_take_turns(self, tmp_path: Path) -> None:
        """The second patch of an image comes before the third of another, however far apart these lie."""
        places = [np.array([[0, 0], [0, 100], [0, 50]]), np.array([[0, 0], [0, 1]])]
        clusters = clusters_of(np.zeros(5, np.uint16), np.linspace(1, 0, 5).astype(np.float32), 1)
        assert choose_exemplars(store_of(tmp_path, places), clusters).feature.tolist() == [0, 3, 1, 4]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of areas a patch and a half wide, with a little noise."""
    for number in range(3):
        rng = np.random.default_rng(number)
        areas = np.kron(rng.integers(20, 235, (3, 14, 14)), np.ones((1, 20, 20)))
        bands = (areas + rng.normal(0, 3, areas.shape)).clip(1, 254).astype(np.uint8)
        write_bands(tmp_path / "images" / f"{number}.tif", bands)
    return tmp_path / "images"


@pytest.fixture
def store(tmp_path: Path, images: Path) -> FeatureStore:
    rng = np.random.default_rng(5)
    return store_of(tmp_path / "work", [CORNER + rng.integers(2, SIDE - 2, (40, 2)) for _ in range(3)], images)


@pytest.fixture
def clusters(store: FeatureStore) -> Clusters:
    rng = np.random.default_rng(6)
    labels = rng.choice([0, 1, 2, 4, 5], len(store), p=[0.5, 0.3, 0.18, 0.01, 0.01]).astype(np.uint16)
    labels[-2:] = 4, 5
    return clusters_of(labels, rng.random(len(store)).astype(np.float32), 6)


def codebook_of(store: FeatureStore) -> Codebook:
    return draft_codebook(store.manifest.settings)


def write(folder: Path, store: FeatureStore, clusters: Clusters, images: Path) -> list[str]:
    """Write exemplars and return the images that were opened."""
    opened: list[str] = []

    def open_image(name: str) -> Dataset:
        opened.append(name)
        return folder_of(images, *store.images).open(name, codebook_of(store))

    source = [("[01].tif", ANNA)]
    write_exemplars(folder, store, clusters, open_image, lambda name: source_of(name, source), progress=False)
    return opened


def tiles_of(folder: Path, label: int) -> NDArray[np.uint8]:
    """Return the tiles of a sheet, of shape (n, 48, 48, 3)."""
    sheet = load_file(folder / "sheets.safetensors")[str(label)]
    assert sheet.nbytes <= 1280
    with Image.open(io.BytesIO(sheet.tobytes())) as picture:
        assert picture.format == "WEBP"
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[0] == 48
    return np.stack(np.split(pixels, pixels.shape[1] // 48, axis=1))


def ground(image: Path, row: int, col: int) -> NDArray[np.uint8]:
    """Return the pixels of a patch and two more on each side, of shape (70, 70, 3), by rasterio."""
    with rasterio.open(image) as raster:
        whole = np.pad(raster.read(), ((0, 0), (28, 28), (28, 28)), constant_values=128)
    top, left = (row - TOP) * 14, (col - LEFT) * 14
    return whole[:, top : top + 70, left : left + 70].transpose(1, 2, 0)


def shrunk(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    return np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.LANCZOS), np.float64)


class TestSheets:
    def test_show_the_chosen_patches(
        self, tmp_path: Path, store: FeatureStore, clusters: Clusters, images: Path
    ) -> None:
        folder = tmp_path / "sheets"
        opened = write(folder, store, clusters, images)
        assert sorted(opened) == sorted(store.images), "each is opened once"
        chosen = choose_exemplars(store, clusters)
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        labels = [label for label in range(6) if label in clusters.labels]
        assert {path.name for path in folder.iterdir()} == {"index.json", "sheets.safetensors"}
        assert load_file(folder / "sheets.safetensors").keys() == {str(label) for label in labels}
        assert 3 not in labels
        unmarked = np.ones((48, 48), bool)
        unmarked[16:32, 16:32] = False
        for label in labels:
            own = np.flatnonzero(chosen.label == label)
            tiles = tiles_of(folder, label)
            assert len(tiles) == len(own) == len(index["patches"][str(label)])
            for tile, i, (number, row, col) in zip(tiles, own, index["patches"][str(label)], strict=True):
                name = index["images"][number]["image"]
                assert (name, row, col) == (store.images[chosen.image[i]], chosen.row[i], chosen.col[i])
                expected = shrunk(ground(images / name, row, col))
                assert np.abs(tile - expected)[unmarked].mean() < TILE_LEVELS
                assert np.abs(tile - shrunk(ground(images / name, row, col + 1)))[unmarked].mean() > 2 * TILE_LEVELS
        assert index["images"] == [
            {"image": "0.tif", "licence": "CC BY 4.0", "attribution": "Anna", "url": "https://anna.example/"},
            {"image": "1.tif", "licence": "CC BY 4.0", "attribution": "Anna", "url": "https://anna.example/"},
            {"image": "2.tif", "licence": "", "attribution": "", "url": ""},
        ]

    def test_same_input_same_bytes(self, tmp_path: Path, store: FeatureStore, clusters: Clusters, images: Path) -> None:
        contents = []
        for name in ("a", "b", "b"):
            write(tmp_path / name, store, clusters, images)
            contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        assert contents[0] == contents[1] == contents[2]

    def test_a_codebook_takes_them(self, tmp_path: Path, store: FeatureStore, clusters: Clusters, images: Path) -> None:
        write(tmp_path / "sheets", store, clusters, images)
        (tmp_path / "encoder.onnx").write_bytes(b"onnx")
        draft = codebook_of(store)
        whole = Codebook(draft.manifest, np.ones((6, 3), np.float32), np.zeros((6, 3), np.uint8))
        saved = save_codebook(
            whole, tmp_path / "codebook", card="", encoder=tmp_path / "encoder.onnx", exemplars=tmp_path / "sheets"
        )
        assert saved.exemplars is not None
        assert saved.exemplars.sheets.keys() == {0, 1, 2, 4, 5}
        assert saved.exemplars.read(2) == load_file(tmp_path / "sheets" / "sheets.safetensors")["2"].tobytes()

    def test_one_reading_for_each_image(
        self,
        tmp_path: Path,
        store: FeatureStore,
        clusters: Clusters,
        images: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        read, read_patches = [], exemplars.read_patches

        def counted(dataset: Dataset, *args: object) -> list[PatchPixels]:
            read.append(dataset.source.url)
            return read_patches(dataset, *args)

        monkeypatch.setattr(exemplars, "read_patches", counted)
        write(tmp_path / "sheets", store, clusters, images)
        assert sorted(read) == ["0.tif", "1.tif", "2.tif"]

    def test_beyond_the_image_it_is_grey(self, tmp_path: Path, images: Path) -> None:
        store = store_of(tmp_path / "work", [np.array([[TOP, LEFT]])], images)
        write(tmp_path / "sheets", store, clusters_of(np.zeros(1, np.uint16), np.ones(1, np.float32), 1), images)
        tile = tiles_of(tmp_path / "sheets", 0)[0].astype(int)
        assert np.abs(tile[:15] - 128).max() < 12
        assert np.abs(tile[:, :15] - 128).max() < 12
        assert np.abs(tile - shrunk(ground(images / "0.tif", TOP, LEFT)))[24:, 24:].mean() < TILE_LEVELS

    def test_an_image_that_has_changed(
        self, tmp_path: Path, store: FeatureStore, clusters: Clusters, images: Path
    ) -> None:
        os.utime(images / "1.tif", (1, 1))
        with pytest.raises(InputError, match=r"^1.tif has changed since its .*; run geocentroids-fit extract again"):
            write(tmp_path / "sheets", store, clusters, images)
        assert not (tmp_path / "sheets" / "index.json").exists()

    def test_no_room(self, tmp_path: Path, store: FeatureStore, clusters: Clusters, images: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"file/sheets.safetensors could not be written: .*make room"):
            write(tmp_path / "file", store, clusters, images)


class TestPictures:
    def test_marks_are_corners_around_the_patch(self) -> None:
        marked = (make_tile(np.zeros((70, 70, 3), np.uint8)) == 255).all(axis=2)
        assert np.array_equal(marked, np.rot90(marked))
        assert marked.sum() == 4 * 5
        assert np.flatnonzero(marked.any(axis=0)).tolist() == [18, 19, 20, 27, 28, 29]
        assert not marked[19:29, 19:29].any(), "the patch itself stays as it is"

    def test_a_patch_of_any_size(self) -> None:
        for size in (5, 80, 320):
            assert make_tile(np.full((size, size, 3), 7, np.uint8)).shape == (48, 48, 3)

    @pytest.mark.parametrize("kind", ["flat", "smooth", "noise", "black and white"])
    def test_small_whatever_is_shown(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        pixels = {
            "flat": np.full((48, 192, 3), 90),
            "smooth": np.linspace(0, 255, 48 * 192 * 3).reshape(48, 192, 3),
            "noise": rng.integers(0, 256, (48, 192, 3)),
            "black and white": rng.integers(0, 2, (48, 192, 1)) * [255, 255, 255],
        }[kind].astype(np.uint8)
        content = encode_sheet(pixels)
        assert len(content) <= 1280
        with Image.open(io.BytesIO(content)) as picture:
            assert (picture.format, picture.size) == ("WEBP", (192, 48))
            if kind in ("flat", "smooth"):
                assert np.abs(np.asarray(picture.convert("RGB"), int) - pixels).mean() < 3


def test_first_rule_that_fits_tells_the_source() -> None:
    other = ImageSource("CC0", "NEON")
    rules = [("neon/*", other), ("*.tif", ANNA), ("neon/a.tif", ImageSource("never"))]
    assert source_of("neon/x/a.tif", rules) == other
    assert source_of("b/c.tif", rules) == ANNA
    assert source_of("b/c.TIF", rules) == ImageSource()
    assert source_of("b.tif", []) == ImageSource("", "", "")
