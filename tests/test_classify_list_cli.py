"""``geocentroids classify --list`` as a user runs it, with the embedded codebook; ended at any moment, it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rasterio
from click.testing import CliRunner, Result
from rasterio.transform import Affine
from rasters import LEFT, TOP, texture, write_tif

from geocentroids_tiler.cli import main

COMMAND = [sys.executable, "-m", "geocentroids_tiler.cli", "classify"]
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed in range(5):
        at = Affine(0.25, 0, LEFT + 400 * seed, 0, -0.25, TOP)
        write_tif(folder / f"image{seed}.tif", texture(240 + 40 * seed, 280, seed), transform=at, photometric="RGB")
    (folder / "broken.tif").write_text("no image")
    (folder / "list.txt").write_text("".join(f"image{seed}.tif\n" for seed in range(5)))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["classify", *map(str, arguments)])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_list_with_a_broken_image_and_one_named_twice(images: Path, tmp_path: Path) -> None:
    file = images / "some.txt"
    file.write_text("# mine\nimage0.tif\nbroken.tif\n\n./image0.tif\nhttp://nowhere.example/x.tif\n")
    result = run("--list", file, "--out", tmp_path, "--classes", 8)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert f"Warning: line 5 of {file} names './image0.tif' again, after line 2" in result.stderr
    assert "1 labelled, 0 there already, 2 failed" in result.stderr
    assert "line 3, broken.tif: cannot open" in result.stderr
    assert "line 6, http://nowhere.example/x.tif: 'http:' URLs are not opened" in result.stderr
    (labels,) = tmp_path.glob("*.tif")
    one = tmp_path / "one" / "labels.tif"
    one.parent.mkdir()
    assert run(images / "image0.tif", one, "--classes", 8).exit_code == 0
    with rasterio.open(labels) as ours, rasterio.open(one) as single:
        assert (ours.read(1) == single.read(1)).all()
        assert ours.transform == single.transform
    listed = json.loads((tmp_path / "failures.json").read_text())["failures"]
    assert [entry["image"] for entry in listed] == ["broken.tif", "http://nowhere.example/x.tif"]


def test_an_image_that_is_labelled_to_be_compared(
    images: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    """A copy of an image is most like that, and an image of the folder needs no labelling."""
    for name, data in uninterrupted.items():
        (tmp_path / name).write_bytes(data)
    copy = tmp_path / "copy.tif"
    copy.write_bytes((images / "image3.tif").read_bytes())
    found = CliRunner().invoke(main, ["similar", str(copy), str(tmp_path), "--json"])
    best = json.loads(found.stdout)
    assert best[0]["source"] == str(images / "image3.tif")
    assert best[0]["likeness"] == 1
    assert len(best) == 5
    same = CliRunner().invoke(main, ["similar", str(images / "image3.tif"), str(tmp_path), "--json", "--top", "10"])
    assert json.loads(same.stdout) == best[1:]


def test_options_that_do_not_go_together(images: Path, tmp_path: Path) -> None:
    file, out = images / "list.txt", tmp_path / "out"

    def error(*arguments: object) -> str:
        result = run(*arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return str(result.stderr)

    assert "SRC and --list exclude each other" in error(images / "image0.tif", "--list", file, "--out", out)
    assert "--labels and --list exclude" in error("--list", file, "--out", out, "--labels", tmp_path)
    assert "--out is missing" in error("--list", file)
    assert "SRC is missing" in error()
    assert "--out goes with --list" in error(images / "image0.tif", "--out", out)
    assert "--ray goes with --list" in error(images / "image0.tif", "--ray", "auto")
    assert "three band numbers" in error("--list", file, "--out", out, "--bidx", "1,2")
    assert "classes=5000" in error("--list", file, "--out", out, "--classes", 5000)
    assert "no address of a Ray cluster" in error("--list", file, "--out", out, "--ray", "nowhere")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n")
    assert "names no image" in error("--list", empty, "--out", out)
    assert not out.exists() or not content(out)


def whole(images: Path, out: Path) -> str:
    """Label the list to its end and return what was said."""
    result = run("--list", images / "list.txt", "--out", out)
    assert result.exit_code == 0, result.stderr
    return str(result.stderr)


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("uninterrupted")
    whole(images, out)
    return content(out)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(
    ending: signal.Signals, images: Path, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    environment = os.environ | {"GEOCENTROIDS_THREADS": "1"}
    out = tmp_path / "out"
    command = [*COMMAND, "--list", str(images / "list.txt"), "--out", str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not list(out.glob("image*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(ending)
    _, said = process.communicate(timeout=PATIENCE_S)
    done = len(list(out.glob("image*.json")))
    assert 0 < done < 5
    if ending == signal.SIGINT:
        assert process.returncode == 130
        assert said.rstrip().endswith("Interrupted")
        assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert f"{5 - done} labelled, {done} there already, 0 failed" in whole(images, out)
    assert content(out) == uninterrupted
