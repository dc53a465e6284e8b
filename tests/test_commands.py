"""The commands that open images, as a user runs them, with the embedded codebook."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner, Result
from rasters import texture, write_tif

from geocentroids_tiler.cli import main


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("commands") / "image.tif"
    write_tif(path, texture(400, 400))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """Return the one line of an error."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def test_info(image: Path) -> None:
    found = json.loads(run("info", image, "--json").stdout)
    assert found["width_px"] == found["height_px"] == 400
    assert found["gsd_m"] == pytest.approx(0.25, rel=1e-3)
    assert found["grid"] == {
        "crs": "EPSG:32721",
        "patch_m": 3.5,
        "rows": found["grid"]["rows"],
        "cols": found["grid"]["cols"],
    }
    assert found["codebook"]["name"] == "nano"
    assert found["chunks"] > 0
    assert "codebook:" in run("info", image).stdout


def test_classify(image: Path, tmp_path: Path) -> None:
    assert run("classify", image, tmp_path / "labels.tif").exit_code == 0
    assert run("classify", image, tmp_path / "merged.tif", "--classes", 8).exit_code == 0
    with rasterio.open(tmp_path / "labels.tif") as labels, rasterio.open(tmp_path / "merged.tif") as merged:
        assert labels.dtypes == ("uint16",)
        assert labels.nodata == 65535
        assert labels.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert labels.transform.a == 3.5
        all_labels, eight = labels.read(1), merged.read(1)
    assert ((all_labels == 65535) == (eight == 65535)).all()
    assert set(np.unique(eight)) <= {*range(8), 65535}
    for label in np.unique(all_labels):
        assert len(np.unique(eight[all_labels == label])) == 1, "merged classes are unions of labels"


def test_an_existing_file_is_kept(image: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.tif"
    kept.write_bytes(b"mine")
    assert "exists already" in error_of(run("classify", image, kept))
    assert kept.read_bytes() == b"mine"
    assert run("classify", image, kept, "--overwrite").exit_code == 0
    assert kept.read_bytes() != b"mine"


def test_info_of_many_images(image: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{image.name}\nnone.tif")
    (tmp_path / image.name).write_bytes(image.read_bytes())
    found = json.loads(run("info", tmp_path / "list.txt", "--json").stdout)
    assert (found["kind"], found["images"]) == ("mosaic", 2)
    assert found["problems"] == [{"url": "none.tif", "reason": "cannot open 'none.tif'"}]
    text = run("info", tmp_path / "list.txt").stdout
    assert "problems:\n  url none.tif, reason cannot open 'none.tif'" in text
    assert "cannot open" in error_of(run("info", tmp_path / "missing.json"))


@pytest.mark.parametrize("command", ["info", "classify"])
def test_bad_input(command: str, image: Path, tmp_path: Path) -> None:
    rest = [tmp_path / "out.tif"] if command == "classify" else []
    assert "cannot open 'missing.tif'" in error_of(run(command, tmp_path / "missing.tif", *rest))
    assert "three band numbers" in error_of(run(command, image, *rest, "--bidx", "1,2"))
    assert "bands 1 to 3" in error_of(run(command, image, *rest, "--bidx", "1,2,9"))
    assert "rescale" in error_of(run(command, image, *rest, "--rescale", "9,1"))
    assert "there is no codebook 'nope'" in error_of(run(command, image, *rest, "--codebook", "nope"))
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_a_server_that_cannot_start_says_why(command: str, tmp_path: Path) -> None:
    folder = ["--folder", tmp_path] if command == "demo" else []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in error_of(run(command, "--port", port, *folder))
    assert "there is no codebook 'nope'" in error_of(run("serve", "--port", 0, "--codebook", "nope"))
