"""From images to a codebook: extraction as serving computes it, and the command end to end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from rasterio.transform import Affine

from geocentroids_fit.cli import main
from geocentroids_fit.extract import blend, extract, list_images, open_images, spread_chunks
from geocentroids_fit.pack import Identity, draft_codebook, make_manifest
from geocentroids_tiler.codebook import NODATA_LABEL, EncoderSection, PreprocessSection, load_codebook
from geocentroids_tiler.encoder import ChunkLayout, DeviceInfo, EncoderSource, load_encoder
from geocentroids_tiler.errors import InputError, UnsupportedImageError
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.store import LabelStore

PRE = PreprocessSection(gsd_m=0.25, window_patches=8, margin_patches=1, stride_patches=3)
LAYOUT = ChunkLayout(8, 1, 3)
ARGUMENTS = ["--name", "tiny", "--window", "8", "--margin", "1", "--stride", "3", "--k", "24", "--per-image", "300"]


class MeanEncoder:
    """Tokens are a patch's mean colour plus a share of its window's, so that blending shows."""

    dim = 3
    window_patches = 8
    batch_windows = 2
    windows_at_once = 4
    info = DeviceInfo("fake", "cpu", "fp32", "none")

    def encode(self, windows: np.ndarray) -> list[np.ndarray]:
        patches = windows.reshape(-1, 8, 14, 8, 14, 3).mean(axis=(2, 4), dtype=np.float32)
        return list(patches + patches.mean(axis=(1, 2), keepdims=True) / 4)

    def fetch(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def token_bytes(self) -> int:
        return 8 * 8 * 3 * 4


def write_image(path: Path, seed: int, size: int = 14 * 26, left: float = 560_000.0) -> None:
    """Write smooth areas of colour with a black collar on the left."""
    rng = np.random.default_rng(seed)
    areas = np.kron(rng.integers(40, 220, (3, 7, 7)), np.ones((1, size // 7 + 1, size // 7 + 1)))[:, :size, :size]
    bands = (areas + rng.normal(0, 6, areas.shape)).clip(20, 240).astype(np.uint8)
    bands[:, :, : 14 * 4] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = Affine(0.25, 0, left, 0, -0.25, 6_139_994.0)
    profile = {"driver": "GTiff", "width": size, "height": size, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", **profile, crs="EPSG:32721", transform=transform, photometric="RGB") as raster:
        raster.write(bands)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagery")
    write_image(root / "a.tif", 1)
    write_image(root / "town" / "b.TIFF", 2, left=561_000.0)
    write_image(root / "town" / "mask" / "b.tif", 3)
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=112, initializer_range=0.3
    )
    folder = tmp_path_factory.mktemp("encoder")
    transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(folder: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("made") / "tiny"
    result = run(folder, encoder_dir, out)
    assert result.exit_code == 0, result.output
    assert "24 classes of 600 patches" in result.stdout
    return out


def run(folder: Path, encoder: Path | str, out: Path, *more: str) -> Result:
    arguments = ["run", str(folder), "--encoder", str(encoder), "--out", str(out), "--exclude", "*/mask/*"]
    return CliRunner().invoke(main, [*arguments, *ARGUMENTS, *more])


def datasets_of(folder: Path, names: list[str]) -> list:
    section = EncoderSection(source="encoder.onnx", architecture="fake", dim=3)
    manifest = make_manifest(Identity("tiny", "1", "", "", "", ""), section, PRE, "l2")
    return open_images(folder, names, draft_codebook(manifest))


def test_list_images(folder: Path) -> None:
    assert list_images(folder) == ["a.tif", "town/b.TIFF", "town/mask/b.tif"]
    assert list_images(folder, ["*/mask/*"]) == ["a.tif", "town/b.TIFF"]


def test_nothing_to_list_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no GeoTIFF"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="leaves out all 3"):
        list_images(folder, ["*"])
    with pytest.raises(InputError, match="not a folder"):
        list_images(tmp_path / "absent")


def test_spread_chunks_cover_the_area_evenly() -> None:
    area = PatchRange(-300, 300, 90, 690)  # 200 x 200 chunks of 3
    chosen = spread_chunks(area, 3, 100, np.random.default_rng(0))
    assert len(chosen) == len(set(chosen)) == 100
    cells = {((chunk.row + 100) // 20, (chunk.col - 30) // 20) for chunk in chosen}
    assert len(cells) == 100
    assert chosen == spread_chunks(area, 3, 100, np.random.default_rng(0))


def test_few_chunks_are_all_taken() -> None:
    area = PatchRange(0, 7, 0, 4)
    assert spread_chunks(area, 3, 6, np.random.default_rng(0)) == list(area.chunks(3))


def test_blend_of_equal_windows_is_the_window() -> None:
    window = np.arange(8 * 8 * 2, dtype=np.float32).reshape(8, 8, 2)
    flat = np.full_like(window, 3)
    assert blend([flat] * 4, LAYOUT) == pytest.approx(np.full((3, 3, 2), 3), rel=1e-6)
    with pytest.raises(ValueError, match="zip"):
        blend([window], LAYOUT)


def test_tokens_are_blended_and_come_from_their_patch(folder: Path) -> None:
    (dataset,) = datasets_of(folder, ["a.tif"])
    features = extract([dataset], MeanEncoder(), LAYOUT, patch_px=14, per_image=10_000, seed=0, progress=False)
    with rasterio.open(folder / "a.tif") as raster:
        bands = raster.read().astype(np.float64)
    assert features.col.min() - dataset.footprint.col_start == 4  # the collar gives nothing
    assert len(features) == 26 * 22
    own = bands.reshape(3, 26, 14, 26, 14).mean(axis=(2, 4))
    row, col = features.row - dataset.footprint.row_start, features.col - dataset.footprint.col_start
    expected = own[:, row, col].T
    assert np.abs(features.rgb - expected).max() <= 0.51
    windows_share = features.tokens.astype(np.float64) - expected
    # A quarter of the windows' mean colours, blended: a smooth share between those of black and white.
    assert windows_share.min() > 0
    assert windows_share.max() < 64
    jump = np.abs(np.diff(windows_share[row == 12], axis=0)).max()
    assert jump < 10


def test_the_cap_and_the_seed(folder: Path) -> None:
    datasets = datasets_of(folder, ["a.tif", "town/b.TIFF"])
    options = {"patch_px": 14, "per_image": 40, "progress": False}
    first, again, other = (extract(datasets, MeanEncoder(), LAYOUT, seed=seed, **options) for seed in (0, 0, 1))
    assert np.bincount(first.image).tolist() == [40, 40]
    assert first.images == ("a.tif", "town/b.TIFF")
    assert (first.tokens == again.tokens).all()
    assert not np.array_equal(first.row, other.row)
    alone = extract(datasets[1:], MeanEncoder(), LAYOUT, seed=0, **options)
    assert (alone.tokens == first.tokens[first.image == 1]).all()


def test_images_without_data_are_one_sentence(tmp_path: Path) -> None:
    profile = {"driver": "GTiff", "width": 200, "height": 200, "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(
        tmp_path / "empty.tif", "w", **profile, crs="EPSG:32721", transform=Affine(0.25, 0, 5e5, 0, -0.25, 6e6)
    ) as raster:
        raster.write(np.zeros((3, 200, 200), np.uint8))
    datasets = datasets_of(tmp_path, ["empty.tif"])
    with pytest.raises(InputError, match="no patch of the images has data"):
        extract(datasets, MeanEncoder(), LAYOUT, patch_px=14, per_image=10, seed=0, progress=False)


def test_an_image_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with rasterio.open(
        tmp_path / "coarse.tif", "w", driver="GTiff", width=20, height=20, count=3, dtype="uint8",
        crs="EPSG:32721", transform=Affine(10, 0, 5e5, 0, -10, 6e6), photometric="RGB",
    ) as raster:  # fmt: skip
        raster.write(np.full((3, 20, 20), 90, np.uint8))
    with pytest.raises(UnsupportedImageError, match=r"coarse\.tif: .*leave it out with --exclude"):
        datasets_of(tmp_path, ["coarse.tif"])


def test_run_makes_a_codebook_that_serving_loads(made: Path, folder: Path) -> None:
    codebook = load_codebook(made)
    assert len(codebook) == 24
    assert codebook.encoder_path is not None
    assert codebook.counts is not None
    assert codebook.counts.sum() == 600
    assert len(codebook.classes(5)) == 5
    section, pre = codebook.manifest.encoder, codebook.manifest.preprocess
    encoder = load_encoder(
        EncoderSource(
            codebook.encoder_path, None, None, section.architecture, section.dim, section.patch_px,
            section.register_tokens, pre.window_patches, pre.mean, pre.std, section.sha256, allow_download=False,
        )
    )  # fmt: skip
    engine = LabelEngine(codebook, encoder, LabelStore(2**20), read_threads=1, token_cache_bytes=2**22)
    try:
        (dataset,) = open_images(folder, ["a.tif"], codebook)
        labels = engine.block(dataset, dataset.footprint).labels
        features = extract([dataset], encoder, LAYOUT, patch_px=14, per_image=10_000, seed=0, progress=False)
    finally:
        engine.close()
    assert (labels[:, :4] == NODATA_LABEL).all()
    distance = np.linalg.norm(features.tokens[:, None].astype(np.float64) - codebook.centroids[None], axis=2)
    served = labels[features.row - dataset.footprint.row_start, features.col - dataset.footprint.col_start]
    # Features are rounded to fp16, so a near tie may turn.
    assert (distance.argmin(axis=1) == served).mean() > 0.99


def test_the_same_command_makes_the_same_codebook(made: Path, folder: Path, encoder_dir: Path, tmp_path: Path) -> None:
    assert run(folder, encoder_dir, tmp_path / "again").exit_code == 0
    assert load_codebook(tmp_path / "again").digest == load_codebook(made).digest


def test_card_of_ones_own(folder: Path, encoder_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n")
    assert run(folder, encoder_dir, tmp_path / "own", "--card", str(tmp_path / "card.md")).exit_code == 0
    assert (tmp_path / "own" / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--k", "5000"], "k is 5000, but there are 600 features"),
        (["--k", "0"], "--k is 0"),
        (["--stride", "4"], "stride_patches 4 does not divide the core of 6 patches"),
        (["--name", "Not A Name"], "name"),
        (["--card", "absent.md"], "absent.md: cannot be read"),
        (["--exclude", "*"], "holds no GeoTIFF"),
    ],
)
def test_errors_are_one_sentence(folder: Path, encoder_dir: Path, tmp_path: Path, more: list[str], text: str) -> None:
    result = run(folder, encoder_dir, tmp_path / "out", *more)
    assert result.exit_code == 1
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(made: Path, folder: Path, encoder_dir: Path) -> None:
    result = run(folder, encoder_dir, made)
    assert result.exit_code == 1
    assert "exists already" in result.stderr


def test_debug_shows_the_error(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["--debug", "run", str(tmp_path), "--encoder", "x", "--out", str(tmp_path / "o"), "--name", "x"]
    )
    assert isinstance(result.exception, InputError)


def test_a_fault_of_ours_is_one_sentence_too(
    folder: Path, encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("geocentroids_fit.cli.run", fail)
    arguments = ["run", str(folder), "--encoder", str(encoder_dir), "--out", str(tmp_path / "out"), "--name", "x"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr == "Error: unexpected RuntimeError: a fault (geocentroids-fit --debug shows where)\n"
