"""From images to a codebook by commands: all steps, what is skipped, and what is said when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from small_images import write_bands, write_image

from geocentroids_fit.cli import main
from geocentroids_fit.shards import MANIFEST_FILE, open_features
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook, file_sha256, load_codebook
from geocentroids_tiler.encoder import encoder_source, load_encoder
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.device import DeviceLabeller
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.store import LabelStore
from geocentroids_tiler.source import ReadOptions, open_dataset, resolve_source, source_identity

CONFIG = """
out = "made/tiny"
seed = 0
[images]
folder = "imagery"
exclude = ["*/mask/*"]
[[sources]]
match = "town/*"
licence = "CC BY 4.0"
attribution = "Town survey"
[encoder]
model = "encoder"
[windows]
window_patches = 8
margin_patches = 1
stride_patches = 3
[sample]
per_image = 300
[cluster]
k = 24
metric = "l2"
[codebook]
name = "tiny"
region = "nowhere"
"""


@pytest.fixture(scope="module")
def project(encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, encoder and configuration, fitted once."""
    root = tmp_path_factory.mktemp("project")
    write_image(root / "imagery" / "a.tif", 1)
    write_image(root / "imagery" / "town" / "b.TIFF", 2, left=561_000.0)
    write_image(root / "imagery" / "town" / "mask" / "b.tif", 3)
    write_bands(root / "imagery" / "coarse.tif", np.full((3, 20, 20), 90, np.uint8), pixel_m=10)
    shutil.copytree(encoder_dir, root / "encoder")
    (root / "fit.toml").write_text(CONFIG)
    result = fit("run", str(root / "fit.toml"))
    assert result.exit_code == 0, result.output
    (root / "first.txt").write_text(result.output)
    return root


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A copy of the fitted project that a test may change."""
    root = tmp_path / "project"
    shutil.copytree(project, root, copy_function=shutil.copy2)
    return root


def fit(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def said(result: Result, step: str) -> list[str]:
    assert result.exit_code == 0, result.output
    return [line for line in result.stdout.splitlines() if line.startswith(f"{step}:")]


def test_all_steps_are_told(project: Path) -> None:
    output = (project / "first.txt").read_text()
    assert "extract: 600 features of 2 images, 0 of them kept" in output
    assert "left out: coarse.tif: the image has 10 m per pixel" in output
    assert "cluster: 24 of 600 features by l2" in output
    assert "color: by likeness: rank correlation" in output
    assert "tree: 23 merges" in output
    assert "exemplars: 24 sheets" in output
    assert "pack: " in output
    assert "evaluate: " in output
    assert (project / "made" / "tiny.work" / "report" / "report.html").is_file()


def test_the_codebook_is_whole(project: Path) -> None:
    codebook = load_codebook(project / "made" / "tiny")
    assert len(codebook) == 24
    assert codebook.encoder_path is not None
    assert codebook.counts is not None
    assert codebook.counts.sum() == 600
    assert len(codebook.classes(5)) == 5
    assert codebook.manifest.attribution == "Town survey"
    assert codebook.manifest.training["images"] == 2
    card = (project / "made" / "tiny" / "README.md").read_text()
    assert "| Town survey | 1 | 300 | CC BY 4.0 |" in card
    assert "| not stated | 1 | 300 | not stated |" in card
    assert "`coarse.tif`: the image has 10 m per pixel" in card
    item = json.loads((project / "made" / "tiny" / "item.json").read_text())
    west, south, east, north = item["bbox"]
    assert -57 < west < east < -56
    assert -35 < south < north < -34
    assert codebook.exemplars is not None
    assert len(codebook.exemplars.sheets) == np.count_nonzero(codebook.counts)
    index = json.loads((project / "made" / "tiny" / "exemplars" / "index.json").read_text())
    assert {entry["image"]: entry["licence"] for entry in index["images"]} == {"a.tif": "", "town/b.TIFF": "CC BY 4.0"}


def test_serving_gives_the_labels_of_the_fit(project: Path) -> None:
    codebook = load_codebook(project / "made" / "tiny")
    labels, dataset = served(codebook, project / "imagery", "a.tif")
    assert (labels[:, :4] == NODATA_LABEL).all()
    store = open_features(project / "made" / "tiny.work" / "features")
    features = store.origin(0)
    distance = np.linalg.norm(features.tokens[:, None].astype(np.float64) - codebook.centroids[None], axis=2)
    own = labels[features.row - dataset.footprint.row_start, features.col - dataset.footprint.col_start]
    # Features are rounded to fp16, so a near tie may turn.
    assert (distance.argmin(axis=1) == own).mean() > 0.99


def served(codebook: Codebook, folder: Path, name: str) -> tuple[np.ndarray, object]:
    source = encoder_source(codebook.manifest.encoder, codebook.manifest.preprocess, codebook.encoder_path)
    engine = LabelEngine(
        codebook,
        DeviceLabeller(codebook, load_encoder(source), token_cache_bytes=2**22),
        LabelStore(2**20),
        read_threads=1,
    )
    try:
        found = resolve_source(name, folder)
        dataset = open_dataset(found, source_identity(found), ReadOptions(), codebook)
        return engine.block(dataset, dataset.footprint).labels, dataset
    finally:
        engine.close()


def test_a_second_run_does_nothing(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (copy / "made" / "tiny").rglob("*")}
    result = fit("run", str(copy / "fit.toml"))
    assert said(result, "cluster")[-1].endswith("(kept)")
    assert all(line.endswith("(kept)") for line in said(result, "color"))
    assert said(result, "tree") == ["tree: 23 merges (kept)"]
    assert said(result, "exemplars") == ["exemplars: kept"]
    assert said(result, "pack")[-1].endswith("tiny kept")
    assert said(result, "evaluate")[-1].endswith("kept")
    assert "2 of them kept" in said(result, "extract")[-1]
    assert {path: path.stat().st_mtime_ns for path in (copy / "made" / "tiny").rglob("*")} == before


def test_a_changed_option_redoes_what_depends_on_it(copy: Path) -> None:
    config = str(copy / "fit.toml")
    result = fit("run", "--k", "20", config)
    assert result.exit_code == 1
    assert "made of other inputs" in result.stderr
    assert len(load_codebook(copy / "made" / "tiny")) == 24  # nothing is lost
    assert "2 of them kept" in result.stdout
    result = fit("run", "--k", "20", "--overwrite", config)
    assert said(result, "cluster")[-1].endswith("(kept)")
    assert len(load_codebook(copy / "made" / "tiny")) == 20


def test_a_new_image_is_the_only_one_computed(copy: Path) -> None:
    write_image(copy / "imagery" / "c.tif", 9, left=562_000.0)
    result = fit("extract", str(copy / "fit.toml"))
    assert "extract: 900 features of 3 images, 2 of them kept" in said(result, "extract")[1]


def test_the_same_command_makes_the_same_codebook(project: Path, encoder_dir: Path, tmp_path: Path) -> None:
    flags = ["--window", "8", "--margin", "1", "--stride", "3", "--k", "24", "--per-image", "300", "--metric", "l2"]
    where = ["--out", str(tmp_path / "again"), "--encoder", str(encoder_dir), "--name", "tiny", "--region", "nowhere"]
    arguments = ["run", *flags, *where, "--exclude", "*/mask/*", "--attribution", "Town survey"]
    assert fit(*arguments, str(project / "imagery")).exit_code == 0
    assert load_codebook(tmp_path / "again").digest == load_codebook(project / "made" / "tiny").digest


def test_steps_one_by_one(copy: Path) -> None:
    whole = load_codebook(copy / "made" / "tiny").digest
    shutil.rmtree(copy / "made")
    for step in ("extract", "cluster", "color", "tree", "exemplars", "pack"):
        assert said(fit(step, str(copy / "fit.toml")), step)
    assert load_codebook(copy / "made" / "tiny").digest == whole


def test_a_refit_keeps_colours_that_anchor_it(project: Path, tmp_path: Path) -> None:
    anchor = project / "made" / "tiny"
    options = ["--anchor", str(anchor), "--out", str(tmp_path / "refit"), "--seed", "3", "--no-exemplars"]
    work = tmp_path / "work"
    shutil.copytree(project / "made" / "tiny.work" / "features", work / "features")
    shutil.copytree(project / "made" / "tiny.work" / "encoder", work / "encoder")
    (work / "features" / "settings.json").unlink()
    result = fit("run", *options, "--work", str(work), str(project / "fit.toml"))
    assert result.exit_code == 0, result.output
    old, new = load_codebook(anchor), load_codebook(tmp_path / "refit")
    distance = np.linalg.norm(new.centroids[:, None] - old.centroids[None], axis=2)
    same = distance.min(axis=1) < 1e-4
    assert same.any()
    difference = new.colors[same].astype(int) - old.colors[distance.argmin(axis=1)][same]
    assert np.abs(difference).max() <= 1
    assert not (tmp_path / "refit" / "exemplars").exists()


def test_a_prepared_run(copy: Path) -> None:
    result = fit("run", "--prepare", "--out", str(copy / "prepared"), str(copy / "fit.toml"))
    assert said(result, "prepare") == ["prepare: 2 images, 0 of them as they were"]
    assert "left out: coarse.tif" in result.stdout
    assert "600 features of 2 images" in said(result, "extract")[1]
    assert load_codebook(copy / "prepared").manifest.attribution == "Town survey"


def test_prepare_and_evaluate_as_commands(project: Path, tmp_path: Path) -> None:
    result = fit("prepare", "--exclude", "*/mask/*", str(project / "imagery"), str(tmp_path / "cogs"))
    assert result.exit_code == 0, result.output
    assert "2 images, 0 of them as they were; 1 left out" in result.stdout
    arguments = ["evaluate", str(project / "made" / "tiny"), str(tmp_path / "cogs"), "--out", str(tmp_path / "report")]
    assert "report.html" in fit(*arguments).stdout
    assert json.loads((tmp_path / "report" / "report.json").read_text())
    result = fit(*arguments, "--masks", "-", "--masks", "-")
    assert result.exit_code == 1
    assert "--masks is given 2 times for 1 IMAGES" in result.stderr


def test_the_report_is_on_this_codebook_whatever_its_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)  # nano is also the name of a built-in codebook
    result = fit("run", "--out", "nano", "--work", "made/tiny.work", "fit.toml")
    assert result.exit_code == 0, result.output
    report = copy / "made" / "tiny.work" / "report"
    assert json.loads((report / "report.json").read_text())["codebook"]["digest"] == load_codebook(copy / "nano").digest
    assert said(fit("run", "--out", "nano", "--work", "made/tiny.work", "fit.toml"), "evaluate")[0].endswith("kept")


def test_card_of_ones_own(copy: Path) -> None:
    (copy / "card.md").write_text("# Mine\n")
    result = fit(
        "pack",
        "--card",
        str(copy / "card.md"),
        "--out",
        str(copy / "own"),
        "--work",
        str(copy / "made" / "tiny.work"),
        str(copy / "fit.toml"),
    )
    assert result.exit_code == 0, result.output
    assert (copy / "own" / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--k", "5000"], "k is 5000, but there are 600 features"),
        (["--k", "0"], "cluster.k = 0: Input should be greater than or equal to 1"),
        (["--stride", "4"], "stride_patches 4 does not divide the core of 6 patches"),
        (["--name", "Not A Name"], "codebook.name = 'Not A Name'"),
        (["--exclude", "*"], "holds no GeoTIFF"),
        (["--encoder", "nowhere/at/all"], "nowhere/at/all"),
        (["--anchor", "absent"], "absent"),
    ],
)
def test_errors_are_one_sentence(copy: Path, more: list[str], text: str) -> None:
    result = fit(
        "run", *more, "--out", str(copy / "out"), "--work", str(copy / "made" / "tiny.work"), str(copy / "fit.toml")
    )
    assert result.exit_code == 1
    assert text in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (copy / "out").exists()


@pytest.mark.parametrize("step", ["cluster", "color", "tree", "exemplars", "pack"])
def test_a_step_too_early_says_which_is_missing(copy: Path, step: str) -> None:
    shutil.rmtree(copy / "made")
    result = fit(step, str(copy / "fit.toml"))
    assert result.exit_code == 1
    assert "is missing: run geocentroids-fit" in result.stderr


def test_a_truncated_shard_is_named_and_the_rest_kept(copy: Path) -> None:
    features = copy / "made" / "tiny.work" / "features"
    shard = next((features / "shards").glob("b-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    result = fit("cluster", str(copy / "fit.toml"))
    assert result.exit_code == 1
    assert f"{shard} has " in result.stderr
    assert "run geocentroids-fit extract again" in result.stderr
    assert "1 of them kept" in said(fit("extract", str(copy / "fit.toml")), "extract")[1]
    assert said(fit("cluster", str(copy / "fit.toml")), "cluster")[-2].endswith("(kept)")


def test_features_that_are_not_numbers_are_named(copy: Path) -> None:
    features = copy / "made" / "tiny.work" / "features"
    store = open_features(features)
    shard = features / "shards" / store.manifest.images[1].file
    tokens = store.parts()[1]
    content = bytearray(shard.read_bytes())
    content[tokens.offset : tokens.offset + 2] = np.float16("nan").tobytes()
    shard.write_bytes(content)
    result = fit("cluster", str(copy / "fit.toml"))
    assert "SHA-256" in result.stderr  # damaged on the disk
    manifest = json.loads((features / MANIFEST_FILE).read_text())
    manifest["images"][1]["sha256"] = file_sha256(shard)
    (features / MANIFEST_FILE).write_text(json.dumps(manifest))
    result = fit("cluster", str(copy / "fit.toml"))  # so computed by the encoder
    assert result.exit_code == 1
    assert "not finite" in result.stderr
    assert "town/b.TIFF" in result.stderr


def test_an_image_that_changed_after_its_features_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "made" / "tiny.work" / "exemplars")
    write_image(copy / "imagery" / "a.tif", 77)
    result = fit("exemplars", str(copy / "fit.toml"))
    assert result.exit_code == 1
    assert "a.tif has changed since its features were extracted; run geocentroids-fit extract again" in result.stderr


def test_what_is_there_is_not_overwritten(project: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    result = fit("run", "--out", str(tmp_path / "out"), str(project / "fit.toml"))
    assert result.exit_code == 1
    assert "exists already" in result.stderr
    assert not (tmp_path / "out.work").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("out = ", "is not TOML"),
        ("out = 'x'\n[images]\nfolder='i'\n[encoder]\nmodel='m'", "codebook = "),
        (CONFIG + "colour = 3\n", "codebook.colour = 3: Extra inputs are not permitted"),
        (CONFIG.replace("[images]", "images = 3\n[other]"), "images = 3"),
    ],
)
def test_configuration_errors_name_the_value(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fit.toml").write_text(text)
    result = fit("run", str(tmp_path / "fit.toml"))
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in fit("run", str(tmp_path / "absent.toml")).stderr


def test_debug_shows_the_error(tmp_path: Path) -> None:
    result = fit("--debug", "run", "--out", str(tmp_path / "o"), "--name", "x", str(tmp_path))
    assert isinstance(result.exception, InputError)


def test_a_fault_of_ours_is_one_sentence_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr("geocentroids_fit.pipeline.run", fail)
    result = fit("run", str(project / "fit.toml"))
    assert result.exit_code == 1
    assert result.stderr == "Error: unexpected RuntimeError: a fault (geocentroids-fit --debug shows where)\n"
