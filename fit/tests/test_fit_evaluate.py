"""An evaluation end to end: moved windows, masks onto patches, the report."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.transform import Affine
from scipy.cluster.hierarchy import linkage

from geocentroids_fit.evaluate import Evaluation, ImageSet, evaluate, set_names
from geocentroids_fit.evaluate.images import central_part, farthest_move, move_windows, moved
from geocentroids_fit.evaluate.landcover import UNKNOWN
from geocentroids_fit.evaluate.masks import read_cover
from geocentroids_fit.evaluate.pictures import spread
from geocentroids_fit.images import ImageFolder
from geocentroids_tiler.codebook import Codebook, EncoderSection, Manifest, PreprocessSection, save_codebook
from geocentroids_tiler.colors import srgb_to_oklab
from geocentroids_tiler.encoder import ChunkLayout, DeviceInfo
from geocentroids_tiler.errors import CodebookNotFoundError, InputError, SourceUnavailableError
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.store import LabelStore
from geocentroids_tiler.scene import make_scene
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset, read_windows

P = 14
LEFT, TOP = 560_000.0, 6_140_001.0
"""A corner that lies on the grid of 3.5 m patches."""
K = 30
WINDOW, MARGIN, STRIDE = 8, 1, 3
COLORS = np.array([[40, 90, 200], [60, 140, 60], [200, 190, 150], [150, 60, 50]])
"""Of covers 0 to 3 in the images."""
ROWS, COLS = 20, 24
NASTY = "a<script>.tif"


@dataclass
class ColorEncoder:
    """Tokens are the mean colour of a patch, and a share of its window's first patch."""

    window_share: float = 0.0
    dim: int = 3
    window_patches: int = WINDOW
    batch_windows: int = 2
    windows_at_once: int = 4
    info: ClassVar[DeviceInfo] = DeviceInfo("fake", "cpu", "fp64", "none")

    def encode(self, windows: Sequence[np.ndarray] | np.ndarray) -> list[np.ndarray]:
        patches = np.stack(list(windows)).reshape(-1, WINDOW, P, WINDOW, P, 3).mean(axis=(2, 4))
        return list(patches + self.window_share * (patches[:, :1, :1] - 128))

    def fetch(self, tokens: np.ndarray) -> np.ndarray:
        return tokens.astype(np.float32)

    def token_bytes(self) -> int:
        return WINDOW**2 * 24

    def close(self) -> None:
        pass

    def assigner(self, centroids: np.ndarray, metric: str, layout: ChunkLayout) -> ColorAssigner:
        return ColorAssigner(centroids.astype(np.float64), layout)


@dataclass
class ColorAssigner:
    centroids: np.ndarray
    layout: ChunkLayout

    def assign(self, chunks: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        return self.begin(chunks)()

    def begin(self, chunks: Sequence[Sequence[np.ndarray]]) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        s = self.layout.stride_patches
        blended = np.zeros((len(chunks), s, s, 3))
        for chunk, windows in zip(blended, chunks, strict=True):
            for part, weight, tokens in zip(self.layout.parts, self.layout.weights(), windows, strict=True):
                own = np.s_[part.token_row : part.token_row + s, part.token_col : part.token_col + s]
                chunk += tokens[own] * weight[..., None]
        distance = np.linalg.norm(blended[..., None, :] - self.centroids, axis=-1)
        result = distance.argmin(axis=-1).astype(np.uint16), -distance.min(axis=-1).astype(np.float32)
        return lambda: result


def color_codebook(tree: bool = True, stride: int = STRIDE) -> Codebook:
    centroids = np.random.default_rng(4).uniform(20, 230, (K, 3)).astype(np.float32)
    return Codebook(
        manifest=Manifest.model_validate(
            {
                "name": "colors",
                "version": "1",
                "title": "Colours <b>",
                "licence": "",
                "attribution": "",
                "encoder": EncoderSection(source="owner/encoder", architecture="fake", dim=3),
                "preprocess": PreprocessSection(
                    gsd_m=0.25, window_patches=WINDOW, margin_patches=MARGIN, stride_patches=stride
                ),
                "assignment": {"metric": "l2", "similarity_range": (-60, 0)},
            }
        ),
        centroids=centroids,
        colors=centroids.astype(np.uint8),
        tree=linkage(centroids, "ward") if tree else None,
    )


def write(path: Path, bands: np.ndarray, transform: Affine | None = None, **profile: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"count": len(bands), "height": bands.shape[1], "width": bands.shape[2], "dtype": bands.dtype}
    place = {"crs": "EPSG:32721", "transform": transform or Affine(0.25, 0, LEFT, 0, -0.25, TOP)}
    with rasterio.open(path, "w", **({"driver": "GTiff"} | shape | place | profile)) as raster:
        raster.write(bands)
    return path


def cover_of(seed: int, rows: int, cols: int) -> np.ndarray:
    """Return land cover of pixels, in squares of four patches."""
    squares = np.random.default_rng(seed).integers(0, len(COLORS), (rows // 4, cols // 4))
    return np.kron(squares, np.ones((4 * P, 4 * P), np.uint8)).astype(np.uint8)


def photograph_of(cover: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 25, (cover.shape[0] // P, cover.shape[1] // P, 3))
    rgb = COLORS[cover] + np.kron(noise, np.ones((P, P, 1)))
    return rgb.clip(25, 235).astype(np.uint8).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codebooks")
    save_codebook(color_codebook(stride=6), folder / "colors", card="For tests.")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagery")
    for number, name in enumerate((NASTY, "town_00.tif", "town_01.tif", "unmasked.tif")):
        cover = cover_of(number, ROWS, COLS)
        write(root / "img" / name, photograph_of(cover, number), photometric="RGB")
        if name != "unmasked.tif":
            cover[:20] = 255
            write(root / "mask" / name, cover[None])
    write(root / "mask" / "town_01.tif", np.full((1, ROWS * P, COLS * P), 255, np.uint8))  # says nothing
    (root / "img" / "broken.tif").write_bytes(b"no image")
    return root


def run(codebooks: Path, out: Path, *sets: ImageSet, share: float = 0.0, **options: Any) -> Evaluation:
    return evaluate(
        "colors",
        sets,
        out,
        codebooks_dir=codebooks,
        progress=False,
        settings=Settings(),
        load=lambda codebook, settings: ColorEncoder(share),
        **options,
    )


@pytest.fixture(scope="module")
def towns(folder: Path) -> ImageSet:
    return ImageSet("towns & fields", folder / "img", masks=folder / "mask", class_names={0: "<i>water</i>"})


@pytest.fixture(scope="module")
def made(folder: Path, codebooks: Path, towns: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("report") / "new"
    return run(codebooks, out, towns, ImageSet("one", folder / "img" / "unmasked.tif")), out


# Moved windows


def open_image(folder: Path, name: str, codebook: Codebook) -> Dataset:
    return ImageFolder(folder / "img", (name,)).open(name, codebook)


def test_moved_windows_show_the_ground_that_they_should(folder: Path) -> None:
    dataset = open_image(folder, "town_00.tif", color_codebook())
    with rasterio.open(folder / "img" / "town_00.tif") as raster:
        pixels = raster.read().transpose(1, 2, 0)
    by = farthest_move(STRIDE)
    assert by == 1
    there = move_windows(dataset, by)
    first = ChunkIndex(there.footprint.row_start // STRIDE + 2, there.footprint.col_start // STRIDE + 3)
    (window,) = read_windows(there, [first], P)
    row = (first.row * STRIDE - MARGIN - by - dataset.footprint.row_start) * P
    col = (first.col * STRIDE - MARGIN - by - dataset.footprint.col_start) * P
    np.testing.assert_array_equal(window.pixels, pixels[row : row + WINDOW * P, col : col + WINDOW * P])
    assert window.labelled.all()
    assert there.key != dataset.key  # caches keep them apart
    assert there.grid.bounds_of(there.footprint) == dataset.grid.bounds_of(dataset.footprint)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_labels_of_moved_windows(folder: Path, share: float) -> None:
    codebook = color_codebook()
    dataset = open_image(folder, "town_00.tif", codebook)
    engine = LabelEngine(
        codebook,
        DeviceLabeller(codebook, ColorEncoder(share), token_cache_bytes=2**20),
        LabelStore(2**20),
        read_threads=1,
    )
    try:
        labels = engine.block(dataset, dataset.footprint).labels
        again = engine.block(move_windows(dataset, 1), moved(dataset.footprint, 1)).labels
    finally:
        engine.close()
    assert labels.shape == again.shape == (ROWS, COLS)
    assert (labels < K).all()
    assert ((labels == again).mean() == 1) == (share == 0)


def test_moved_windows_of_an_image_that_is_warped(tmp_path: Path) -> None:
    turn = np.deg2rad(7)
    c, s = 0.25 * float(np.cos(turn)), 0.25 * float(np.sin(turn))
    write(tmp_path / "img" / "x.tif", photograph_of(cover_of(0, 16, 16), 0), Affine(c, s, LEFT, s, -c, TOP))
    codebook = color_codebook()
    dataset = open_image(tmp_path, "x.tif", codebook)
    assert dataset.warped
    middle = central_part(dataset.footprint, 64)  # filled pixels at the image's edge do depend on the window
    engine = LabelEngine(
        codebook, DeviceLabeller(codebook, ColorEncoder(), token_cache_bytes=2**20), LabelStore(2**20), read_threads=1
    )
    try:
        labels = engine.block(dataset, middle).labels
        again = engine.block(move_windows(dataset, 1), moved(middle, 1)).labels
    finally:
        engine.close()
    np.testing.assert_array_equal(again, labels)
    assert len(np.unique(labels)) > 3


def test_windows_that_lie_anywhere_already_cannot_be_moved() -> None:
    assert [farthest_move(stride) for stride in (1, 2, 10, 13)] == [None, 1, 5, 6]


@pytest.mark.parametrize(
    ("shape", "limit", "expected"),
    [((20, 30), 600, (20, 30)), ((20, 30), 100, (10, 10)), ((4, 300), 100, (4, 25)), ((300, 4), 100, (25, 4))],
)
def test_the_middle_of_a_large_image(shape: tuple[int, int], limit: int, expected: tuple[int, int]) -> None:
    whole = PatchRange(-7, -7 + shape[0], 11, 11 + shape[1])
    part = central_part(whole, limit)
    assert part.shape == expected
    assert part.intersect(whole) == part
    assert abs((part.row_start - whole.row_start) - (whole.row_stop - part.row_stop)) <= 1
    assert abs((part.col_start - whole.col_start) - (whole.col_stop - part.col_stop)) <= 1


# Masks


@pytest.mark.parametrize(("gsd_m", "shift_m"), [(0.25, 0.0), (0.4, 5.1), (0.1, -3.3)])
def test_cover_of_patches_against_brute_force(folder: Path, tmp_path: Path, gsd_m: float, shift_m: float) -> None:
    dataset = open_image(folder, "town_00.tif", color_codebook())
    values = np.random.default_rng(0).integers(0, 6, (22, 26)).astype(np.uint8)
    values = np.kron(values, np.ones((round(5 / gsd_m), round(5 / gsd_m)), np.uint8))
    left, top = LEFT + shift_m + 0.01, TOP - shift_m - 0.01
    mask = write(tmp_path / "m.tif", values[None], Affine(gsd_m, 0, left, 0, -gsd_m, top), nodata=5)
    area = dataset.footprint
    found = read_cover(mask, dataset, area, P, ignore=(4,))
    expected = np.full(area.shape, UNKNOWN)
    for row in range(area.shape[0]):
        for col in range(area.shape[1]):
            inside = []
            for i in range(P):
                for j in range(P):
                    y = int((top - (TOP - (row * P + i + 0.5) * 0.25)) // gsd_m)
                    x = int((LEFT + (col * P + j + 0.5) * 0.25 - left) // gsd_m)
                    if 0 <= y < values.shape[0] and 0 <= x < values.shape[1] and values[y, x] not in (4, 5):
                        inside.append(values[y, x])
            if 2 * len(inside) >= P * P:
                expected[row, col] = max(sorted(set(inside)), key=inside.count)
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) == 5


def test_a_mask_in_another_crs_lies_where_it_should(folder: Path, tmp_path: Path) -> None:
    dataset = open_image(folder, "town_00.tif", color_codebook())
    with rasterio.open(folder / "mask" / "town_00.tif") as raster:
        values = raster.read()
    # Each pixel of the mask looks up the value at its own place.
    to_image = Transformer.from_crs("EPSG:32722", "EPSG:32721", always_xy=True)
    x, y = to_image.transform(LEFT, TOP, direction="INVERSE")
    left, top = x - 20, y + 20
    east, south = np.meshgrid(left + 0.125 + np.arange(700) / 4, top - 0.125 - np.arange(700) / 4)
    x, y = to_image.transform(east, south)
    col, row = np.floor((x - LEFT) * 4).astype(int), np.floor((TOP - y) * 4).astype(int)
    inside = (col >= 0) & (col < values.shape[2]) & (row >= 0) & (row < values.shape[1])
    there = np.where(
        inside, values[0, row.clip(0, values.shape[1] - 1), col.clip(0, values.shape[2] - 1)], np.uint8(255)
    )
    mask = write(tmp_path / "m.tif", there[None], Affine(0.25, 0, left, 0, -0.25, top), crs="EPSG:32722")
    own = read_cover(folder / "mask" / "town_00.tif", dataset, dataset.footprint, P, (255,))
    far = read_cover(mask, dataset, dataset.footprint, P, (255,))
    assert (own == far).mean() > 0.97
    assert (own != UNKNOWN).mean() > 0.9


def test_a_mask_without_a_place_has_that_of_an_image_of_its_size(folder: Path, tmp_path: Path) -> None:
    dataset = open_image(folder, "town_00.tif", color_codebook())
    with rasterio.open(folder / "mask" / "town_00.tif") as raster:
        values = raster.read()
    own = read_cover(folder / "mask" / "town_00.tif", dataset, dataset.footprint, P, (255,))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        bare = write(tmp_path / "bare.tif", values, Affine.identity(), crs=None)
    np.testing.assert_array_equal(read_cover(bare, dataset, dataset.footprint, P, (255,)), own)


@pytest.mark.parametrize(
    ("values", "profile", "text"),
    [
        (np.zeros((1, 400, 500), np.float32), {}, "1 bands of float32; accepted: one band of whole numbers"),
        (np.zeros((3, 400, 500), np.uint8), {}, "3 bands of uint8"),
        (np.full((1, 400, 500), 255, np.uint8), {}, r"labels no patch here.*ignored \(255\)"),
        (np.full((1, 400, 500), -3, np.int16), {}, "holds -3; accepted: classes from 0"),
        (np.zeros((1, 9, 9), np.uint8), {"transform": Affine(1, 0, 5e5, 0, -1, 6e6)}, "does not overlap"),
        (np.zeros((1, 9, 9), np.uint8), {"crs": None}, r"no georeference and 9 x 9 px.*336 x 280"),
    ],
)
def test_a_mask_that_is_none_says_why(
    folder: Path, tmp_path: Path, values: np.ndarray, profile: dict[str, Any], text: str
) -> None:
    dataset = open_image(folder, "town_00.tif", color_codebook())
    mask = write(tmp_path / "m.tif", values, **profile)
    with pytest.raises(InputError, match=text):
        read_cover(mask, dataset, dataset.footprint, P, (255,))
    with pytest.raises(SourceUnavailableError, match="absent"):
        read_cover(tmp_path / "absent.tif", dataset, dataset.footprint, P, (255,))


# The whole


def test_numbers_of_an_evaluation(made: tuple[Evaluation, Path]) -> None:
    found, _ = made
    assert found.cuts == (30, 24, 8)
    assert found.patches == 5 * ROWS * COLS
    assert [image.name for image in found.images] == [NASTY, *["town_00.tif", "town_01.tif"], *["unmasked.tif"] * 2]
    assert found.windows.agreement == {30: 1, 24: 1, 8: 1}
    assert found.moved_patches == 3
    assert [one.name for one in found.left_out] == ["broken.tif"]
    towns, one = found.sets
    assert (towns.images, towns.images_with_masks, one.images) == (4, 2, 1)
    assert one.land_cover is None
    cover = towns.land_cover
    assert cover is not None
    assert (
        cover.patches == 2 * (ROWS - 1) * COLS
    )  # 20 px without cover take all of one row and less than half of the next
    assert cover.places == 2
    assert sum(cover.shares.values()) == pytest.approx(1)
    split = cover.cuts[30].splits["blocks"]
    assert split is not None
    assert split.one_map.overall_accuracy > 0.9  # covers have colours of their own
    assert cover.commonest.overall_accuracy < 0.5
    assert found.land_cover[30].overall_accuracy["blocks"] == split.one_map.overall_accuracy
    notes = {image.name: " ".join(image.notes) for image in found.images if image.set_name == towns.name}
    assert "cannot open 'unmasked.tif'" in notes["unmasked.tif"]
    assert "labels no patch here" in notes["town_01.tif"]
    assert notes[NASTY] == ""
    assert sum(found.similarity.histogram) == found.patches
    assert sum(share.share for share in found.legend[8]) == pytest.approx(1)


def test_windows_that_matter_are_seen(codebooks: Path, tmp_path: Path) -> None:
    at = Affine(0.25, 0, LEFT + 10.5, 0, -0.25, TOP - 17.5)  # whole patches, no border at the image's edge
    write(tmp_path / "img" / "x.tif", photograph_of(cover_of(0, ROWS, COLS), 0), at, photometric="RGB")
    windows = run(codebooks, tmp_path / "out", ImageSet("one", tmp_path / "img"), share=0.5).images[0].windows
    assert 0.2 < (windows.agreement[30] or 0) < (windows.agreement[8] or 0) < 1

    codebook = color_codebook(stride=6)
    dataset = open_image(tmp_path, "x.tif", codebook)
    engine = LabelEngine(
        codebook,
        DeviceLabeller(codebook, ColorEncoder(0.5), token_cache_bytes=2**20),
        LabelStore(2**20),
        read_threads=1,
    )
    try:
        area = dataset.footprint
        lab = srgb_to_oklab(codebook.colors[engine.block(dataset, area).labels])
    finally:
        engine.close()
    rows, cols = area.row_start + np.arange(1, ROWS), area.col_start + np.arange(1, COLS)
    down, right = np.linalg.norm(lab[1:] - lab[:-1], axis=-1), np.linalg.norm(lab[:, 1:] - lab[:, :-1], axis=-1)
    assert windows.seam_rows == pytest.approx(down[rows % 6 == 0].mean() / down[rows % 6 != 0].mean())
    assert windows.seam_cols == pytest.approx(right[:, cols % 6 == 0].mean() / right[:, cols % 6 != 0].mean())
    assert windows.seam_index is not None
    assert min(windows.seam_rows, windows.seam_cols) < windows.seam_index < max(windows.seam_rows, windows.seam_cols)
    assert {area.row_start % 6, area.col_start % 6}.isdisjoint({0})


def test_the_same_files_give_the_same_bytes(
    made: Any, codebooks: Path, folder: Path, towns: ImageSet, tmp_path: Path
) -> None:
    _, out = made
    run(codebooks, tmp_path, towns, ImageSet("one", folder / "img" / "unmasked.tif"))
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json"]


def test_scores_over_sets(codebooks: Path, folder: Path, tmp_path: Path) -> None:
    town = ImageSet("town", folder / "img" / "town_00.tif", masks=folder / "mask" / "town_00.tif")
    small = write(tmp_path / "small.tif", photograph_of(cover_of(9, 12, 8), 9), photometric="RGB")
    cover = write(tmp_path / "cover.tif", np.minimum(cover_of(9, 12, 8), 2)[None])
    found = run(codebooks, tmp_path / "out", town, ImageSet("small", small, masks=cover))
    scores = [one.land_cover.cuts[8].splits["halves"].one_map for one in found.sets]  # type: ignore[union-attr]
    assert scores[0].patches > 3 * scores[1].patches
    right = sum(score.overall_accuracy * score.patches for score in scores)
    overall = found.land_cover[8]
    assert overall.overall_accuracy["halves"] == pytest.approx(right / sum(score.patches for score in scores))
    assert overall.mean_f1["halves"] == pytest.approx((scores[0].mean_f1 + scores[1].mean_f1) / 2)
    assert overall.overall_accuracy["transfer"] is None
    assert scores[0].overall_accuracy != scores[1].overall_accuracy


def test_json_holds_all_numbers(made: tuple[Evaluation, Path]) -> None:
    found, out = made
    content = json.loads((out / "report.json").read_text())
    assert content["usage"]["30"]["effective"] == pytest.approx(found.usage[30].effective, abs=1e-6)
    assert content["images"][0]["name"] == NASTY
    assert content["images"][0]["land_cover"]["cuts"]["8"]["splits"]["halves"]["one_map"]["patches"] > 0
    assert list(content)[:3] == ["codebook", "max_patches", "moved_patches"]


class Page(HTMLParser):
    """Checks that elements close in order, and collects ids and addresses."""

    VOID = frozenset({"meta", "img", "br", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href", "srcset", "action", "data"):
                self.addresses.append(value or "")
            assert key != "style" or "url(" not in (value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.VOID

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_sound_page(made: tuple[Evaluation, Path]) -> None:
    text = (made[1] / "report.html").read_text()
    assert text.lstrip().startswith("<!DOCTYPE html>")
    page = Page(text)
    sections = ["summary", "similarity", "usage", "windows", "land-cover", "images", "left-out", "pictures", "method"]
    assert page.ids == sections
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert len(page.addresses) == 2 + 5 * 5  # plots; image, three cuts and similarity of five images
    assert "script" not in page.tags
    assert "http" not in page.text
    assert "@import" not in text
    for untrusted in (NASTY, "towns & fields", "<i>water</i>", "Colours <b>"):
        assert untrusted in page.text
        assert untrusted not in text


def test_a_codebook_without_a_tree_has_one_number_of_classes(folder: Path, tmp_path: Path) -> None:
    save_codebook(color_codebook(tree=False, stride=1), tmp_path / "flat", card="For tests.")
    before = set(threading.enumerate())
    found = evaluate(
        str(tmp_path / "flat"),
        [ImageSet("one", folder / "img" / "town_00.tif", masks=folder / "mask" / "town_00.tif")],
        tmp_path / "out",
        codebooks_dir=tmp_path / "none",
        progress=False,
        max_patches=100,
        load=lambda codebook, settings: ColorEncoder(),
    )
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("geocentroids-")]
    assert found.cuts == (30,)
    assert found.moved_patches is None
    assert found.windows.agreement == {30: None}
    assert found.patches == 100
    assert "10 x 10 of 20 x 24 patches" in found.images[0].notes[0]
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "cannot be moved" in page.text


def test_images_of_one_name_in_two_sets_are_told_apart(codebooks: Path, tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        path = write(tmp_path / name / "same.tif", photograph_of(cover_of(number, 12, 12), number), photometric="RGB")
        os.utime(path, ns=(10**18, 10**18))
    sizes = {(tmp_path / name / "same.tif").stat().st_size for name in "ab"}
    assert len(sizes) == 1  # so time and size are the same
    found = run(codebooks, tmp_path / "out", ImageSet("a", tmp_path / "a"), ImageSet("b", tmp_path / "b"))
    assert found.images[0].usage != found.images[1].usage


def test_a_file_name_that_is_no_text(codebooks: Path, tmp_path: Path) -> None:
    good = write(tmp_path / "img" / "good.tif", photograph_of(cover_of(0, 8, 8), 0), photometric="RGB")
    shutil.copyfile(good, tmp_path / "img" / os.fsdecode(b"caf\xe9.tif"))
    found = run(codebooks, tmp_path / "out", ImageSet("one", tmp_path / "img"))
    assert [image.name for image in found.images] == ["good.tif"]
    assert len(found.left_out) == 1
    assert "caf" in Page((tmp_path / "out" / "report.html").read_text()).text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["left_out"][0]["name"].startswith("caf")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_patches": 0}, "max_patches is 0"),
        ({"out": "file"}, "file: cannot be made a folder"),
        ({"images": "absent"}, "absent is not a folder"),
        ({"images": "bad"}, r"none of 1 images can be evaluated; the first, broken\.tif: cannot open"),
        ({"images": "black"}, "no patch of it has data"),
        ({"masks": "absent"}, "absent does not exist"),
        ({"masks": "file"}, "file is one mask for the folder"),
        ({"sets": 0}, "there are no images"),
        ({"sets": 2}, "'x', 'x'; each needs a name of its own"),
    ],
)
def test_errors_are_one_sentence(
    codebooks: Path, folder: Path, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.tif").write_bytes(b"no image")
    (tmp_path / "file").touch()
    write(tmp_path / "black" / "x.tif", np.zeros((3, 99, 99), np.uint8), photometric="RGB", nodata=0)
    images = tmp_path / options["images"] if "images" in options else folder / "img"
    masks = tmp_path / options["masks"] if "masks" in options else None
    sets = [ImageSet("x", images, masks=masks)] * options.get("sets", 1)
    with pytest.raises(InputError, match=text) as caught:
        run(codebooks, tmp_path / options.get("out", "out"), *sets, max_patches=options.get("max_patches", 9))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_unknown_codebook(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CodebookNotFoundError, match="there is no codebook 'absent'"):
        evaluate("absent", [ImageSet("x", folder / "img")], tmp_path, codebooks_dir=tmp_path, progress=False)


def test_pictures_are_spread_over_the_images() -> None:
    assert spread(3) == [0, 1, 2]
    assert spread(1) == [0]
    chosen = spread(100)
    assert (len(chosen), chosen[0], chosen[-1]) == (12, 0, 99)


def test_nano_knows_land_from_water(tmp_path: Path) -> None:
    """The embedded codebook, as it is served, on a drawn scene of known land cover."""
    scene = make_scene(1024, seed=0)
    part = np.s_[500:750, 300:550]
    place = Affine(0.25, 0, scene.transform.c + 300 / 4, 0, -0.25, scene.transform.f - 500 / 4)
    write(tmp_path / "scene.tif", np.moveaxis(scene.rgb[part], 2, 0), place, crs=scene.crs, photometric="RGB")
    mask = write(tmp_path / "cover.tif", scene.land_cover[part][None], place, crs=scene.crs)
    found = evaluate("nano", [ImageSet("scene", tmp_path / "scene.tif", masks=mask)], tmp_path / "out", progress=False)
    assert found.cuts == (1024, 24, 8)
    (one,) = found.sets
    assert one.land_cover is not None
    assert 17**2 <= found.patches <= 19**2
    score = one.land_cover.cuts[24].splits["blocks"]
    assert score is not None
    assert score.one_map.overall_accuracy > one.land_cover.commonest.overall_accuracy
    Page((tmp_path / "out" / "report.html").read_text())


def test_sets_are_named_by_as_much_of_their_path_as_tells_them_apart(tmp_path: Path) -> None:
    buildings, zurich = tmp_path / "buildings" / "img", tmp_path / "zurich" / "img.tif"
    buildings.mkdir(parents=True)
    zurich.parent.mkdir()
    zurich.touch()
    assert set_names([buildings, tmp_path / "zurich"]) == ["img", "zurich"]
    assert set_names([buildings, zurich]) == ["buildings/img", "zurich/img"]
    assert set_names([zurich, zurich]) == ["img.tif", "img.tif"]  # refused by check_sets
    assert set_names([]) == []
