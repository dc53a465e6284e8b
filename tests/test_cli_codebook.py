from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from codebooks import make_codebook

from geocentroids_tiler import hub
from geocentroids_tiler.cli import ErrorGroup, main
from geocentroids_tiler.codebook import load_codebook, save_codebook
from geocentroids_tiler.errors import InputError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEOCENTROIDS_CODEBOOKS_DIR", str(tmp_path / "library"))
    monkeypatch.setattr(hub, "EMBEDDED_DIR", tmp_path / "none")
    return tmp_path / "library"


@pytest.fixture
def sample(library: Path) -> Path:
    return save_codebook(make_codebook(), library / "sample", card="# Sample\n").path or library


@pytest.fixture
def arrays(tmp_path: Path) -> list[str]:
    codebook = make_codebook()
    np.save(tmp_path / "centroids.npy", codebook.centroids)
    np.save(tmp_path / "colors.npy", codebook.colors)
    return [str(tmp_path / "centroids.npy"), str(tmp_path / "colors.npy")]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def assert_one_sentence(result: Result, code: int = 1) -> None:
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1


def test_list(sample: Path) -> None:
    (sample.parent / "broken").mkdir()
    result = run("codebook", "list")
    assert result.exit_code == 0
    head, broken, line, known, *below = result.stdout.splitlines()
    assert [cell in line for cell in ("sample", "12", "5", "0.25", "inner_product", "installed", "owner/encoder")]
    assert line.index("inner_product") == head.index("METRIC"), "columns are aligned"
    assert line.index("owner/encoder") == known.index("facebook/") == head.index("ENCODER")
    assert "broken" in broken
    assert "codebook.json is missing" in below[0]
    assert below[1] == "Fetch: geocentroids codebook pull southamerica-6k"


def test_list_as_json(sample: Path) -> None:
    entries = json.loads(run("codebook", "list", "--json").stdout)
    assert [entry["name"] for entry in entries] == ["sample", "southamerica-6k"]
    assert entries[0] | {"size_bytes": None} == {
        "name": "sample",
        "origin": "installed",
        "version": "1",
        "title": "Sample",
        "classes": 12,
        "dim": 5,
        "encoder": "owner/encoder",
        "metric": "inner_product",
        "gsd_m": 0.25,
        "path": str(sample),
        "size_bytes": None,
        "error": None,
    }


def test_show(sample: Path) -> None:
    lines = run("codebook", "show", "sample").stdout.splitlines()
    fields = dict(line.split(maxsplit=1) for line in lines)
    codebook = load_codebook(sample)
    assert fields["digest"] == codebook.digest
    assert fields["classes"] == "12"
    assert fields["encoder.source"] == "owner/encoder"
    assert fields["preprocess.gsd_m"] == "0.25"
    assert fields["merge_tree"] == "yes"
    assert fields["encoder.revision"] == "-"
    assert fields["names.0.named"] == "2"
    start = max(len(line.split()[0]) for line in lines) + 2
    assert all(line[:start].endswith("  ") and line[start] != " " for line in lines), "values are aligned"


def test_show_as_json(sample: Path) -> None:
    facts = json.loads(run("codebook", "show", str(sample), "--json").stdout)
    codebook = load_codebook(sample)
    assert facts["digest"] == codebook.digest
    assert facts["names"] == [{"classes": None, "named": 2}, {"classes": 4, "named": 1}]
    manifest = codebook.manifest.model_dump(mode="json")
    assert {key: facts[key] for key in manifest} == manifest


def test_import_and_show(arrays: list[str], library: Path) -> None:
    options = "--name mine --encoder owner/encoder --gsd 0.5 --resampling cubic --window 32 --margin 4 --stride 12"
    more = "--metric cosine --title Mine --licence CC-BY-4.0 --attribution Me --version 2 --register-tokens 0"
    result = run("codebook", "import", *arrays, *options.split(), *more.split())
    assert result.exit_code == 0, result.stderr
    assert str(library / "mine") in result.stdout
    manifest = load_codebook(library / "mine").manifest
    assert manifest.preprocess.model_dump() == {
        "gsd_m": 0.5,
        "resampling": "cubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "window_patches": 32,
        "margin_patches": 4,
        "stride_patches": 12,
    }
    assert (manifest.assignment.metric, manifest.title, manifest.licence) == ("cosine", "Mine", "CC-BY-4.0")
    assert (manifest.attribution, manifest.version, manifest.encoder.register_tokens) == ("Me", "2", 0)
    assert_one_sentence(run("codebook", "import", *arrays, *options.split()))
    assert run("codebook", "import", *arrays, *options.split(), "--force").exit_code == 0


@pytest.mark.parametrize(("window", "stride"), [(16, 5), (15, 9), (32, 13)])
def test_import_without_stride_blends_where_the_core_has_a_half(
    arrays: list[str], library: Path, window: int, stride: int
) -> None:
    run("codebook", "import", *arrays, *f"--name mine --encoder a/b --gsd 0.5 --window {window}".split())
    assert load_codebook(library / "mine").manifest.preprocess.stride_patches == stride


@pytest.mark.parametrize(
    "options",
    ["--gsd -1", "--gsd nan", "--gsd 0.5 --margin 8", "--gsd 0.5 --stride 7", "--gsd 0.5 --name ../x"],
)
def test_import_with_wrong_values(arrays: list[str], library: Path, options: str) -> None:
    result = run("codebook", "import", *arrays, *f"--name mine --encoder a/b {options}".split())
    assert_one_sentence(result)
    assert not library.exists() or list(library.glob("[!.]*")) == []


def test_pull_of_one_that_is_there(library: Path) -> None:
    codebook = make_codebook()
    section = codebook.manifest.encoder.model_copy(update={"source": "encoder.onnx"})
    (library.parent / "e.onnx").write_bytes(b"onnx")
    save_codebook(make_codebook(encoder=section), library / "sample", card="", encoder=library.parent / "e.onnx")
    result = run("codebook", "pull", "sample")
    assert result.exit_code == 0
    assert result.stdout == f"sample 1 is installed in {library / 'sample'}\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["codebook", "show", "none"], "there is no codebook 'none' (none is installed)"),
        (["codebook", "show", "southamerica-6k"], "geocentroids codebook pull southamerica-6k"),
        (["codebook", "pull", "none"], "neither a codebook known by name (southamerica-6k)"),
    ],
)
def test_errors_are_one_sentence(library: Path, arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert_one_sentence(result)
    assert text in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["codebook", "show"],
        ["codebook", "import", "missing.npy", "missing.npy", "--name", "x", "--encoder", "a/b", "--gsd", "1"],
        ["codebook", "list", "--nonsense"],
        ["export-onnx", "a/b", "x.onnx", "--window-patches", "0"],
    ],
)
def test_usage_errors_exit_2(library: Path, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_wrong_setting_is_one_sentence(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOCENTROIDS_THREADS", "0")
    result = run("codebook", "list")
    assert_one_sentence(result)
    assert "GEOCENTROIDS_THREADS" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (InputError("two\nlines"), 1, "Error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.tif"), 1, "Error: a.tif: No such file or directory\n"),
        (OSError("odd"), 1, None),
        (RuntimeError("bug"), 1, "Error: unexpected RuntimeError: bug (geocentroids --debug shows where)\n"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_what_a_command_may_raise(raised: BaseException, code: int, text: str | None) -> None:
    @click.group(cls=ErrorGroup)
    @click.option("--debug", is_flag=True)
    def group(debug: bool) -> None:
        pass

    @group.command("fail")
    def fail() -> None:
        raise raised

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == code
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    if text is not None:
        assert result.stderr == text
    if isinstance(raised, Exception):
        assert CliRunner().invoke(group, ["--debug", "fail"]).exception is raised


def in_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "geocentroids_tiler.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=60,
    )


def test_a_real_process_shows_no_traceback(library: Path) -> None:
    result = in_process("codebook", "show", "none")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: there is no codebook 'none'")
    debug = in_process("--debug", "codebook", "show", "none")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr
    assert "CodebookNotFoundError" in debug.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "huggingface_hub", "httpx", "onnxruntime", "rasterio", "titiler")
    code = (
        "import sys; from click.testing import CliRunner; from geocentroids_tiler.cli import main; "
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0; "
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_version() -> None:
    assert run("--version").stdout.startswith("geocentroids, version ")
