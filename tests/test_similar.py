"""Which images look alike: the measure by hand and by a loop, and the command on a folder made with a fake encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from codebooks import make_codebook
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from geocentroids_tiler.bulk.items import (
    EXTENSIONS,
    Histogram,
    Making,
    as_json,
    collection_id,
    item_name,
    labels_name,
    read_record,
)
from geocentroids_tiler.bulk.likeness import BANDWIDTH, likeness, smoothed
from geocentroids_tiler.cli import main
from geocentroids_tiler.codebook import Codebook, Metric, save_codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.source import ReadOptions

K = 12


def by_hand(counts: NDArray[np.int64], other: NDArray[np.int64], centroids: NDArray[Any], metric: str) -> float:
    """Return the likeness of two images as the documentation words it, one label after the other."""
    points = [c / np.linalg.norm(c) if metric != "l2" else c for c in centroids.astype(np.float64)]
    nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(points) if j != i) for i, a in enumerate(points)]
    sigma = BANDWIDTH * np.median(nearest)
    result = []
    for smooth in (False, True):
        shares = []
        for histogram in (counts, other):
            share = histogram / histogram.sum()
            if smooth:
                spread = np.zeros(len(points))
                for i, a in enumerate(points):
                    weights = np.array([np.exp(-(np.linalg.norm(a - b) ** 2) / (2 * sigma**2)) for b in points])
                    spread += share[i] * weights / weights.sum()
                share = spread
            shares.append(share)
        result.append(sum(np.sqrt(a * b) for a, b in zip(*shares, strict=True)))
    return float(np.mean(result))


@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
def test_likeness_by_hand(metric: Metric) -> None:
    rng = np.random.default_rng(1)
    centroids = rng.standard_normal((K, 5)).astype(np.float16)
    counts = rng.integers(0, 9, (6, K)) * rng.integers(0, 2, (6, K))
    counts[:, 0] += 1
    found = likeness(counts[0], counts[1:], centroids, metric)
    assert found == pytest.approx([by_hand(counts[0], other, centroids, metric) for other in counts[1:]], abs=1e-9)


def test_like_centroids_count() -> None:
    """Labels 0 and 1 lie close together, 2 and 3 far from all: a patch of 1 is more like one of 0 than one of 2 is."""
    centroids = np.array([[1, 0, 0], [0.99, 0.14, 0], [0, 1, 0], [0, 0, 1], [0, 0.14, 0.99]], np.float32)
    one, close, far = np.eye(5, dtype=np.int64)[:3] * 7
    same, near, none = likeness(one, np.stack([one * 3, close, far]), centroids, "cosine")
    assert same == pytest.approx(1)
    assert 0.2 < near < 0.5, "half of it is for the same labels"
    assert none < 1e-6


@given(st.integers(1, 40), st.integers(0, 1000))
def test_smoothing_keeps_all_patches(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.random((3, k))
    spread = smoothed(shares, rng.standard_normal((k, 4)), "cosine")
    assert (spread >= 0).all()
    assert spread.sum(axis=1) == pytest.approx(shares.sum(axis=1))


def test_doubled_centroids_do_no_harm() -> None:
    centroids = np.ones((4, 3))
    shares = np.array([[0.5, 0.5, 0, 0]])
    np.testing.assert_array_equal(smoothed(shares, centroids, "l2"), shares)


def write_item(folder: Path, name: str, counts: dict[int, int], codebook: Codebook) -> None:
    """Write an item with what ``similar`` reads of it."""
    histogram = Histogram(len(codebook))
    for label, number in counts.items():
        histogram.counts[label] = number
    making = Making.of(codebook, "fake", None, ReadOptions())
    item = {
        "type": "Feature",
        "stac_extensions": EXTENSIONS,
        "id": name,
        "properties": {
            "geocentroids:source": f"/images/{name}.tif",
            "geocentroids:source_identity": "1",
            "geocentroids:codebook": codebook.name,
            "geocentroids:codebook_version": codebook.manifest.version,
            "geocentroids:histogram": histogram.sparse(),
            **making.model_dump(mode="json", by_alias=True),
        },
        "assets": {"labels": {"href": labels_name(name), "file:size": 1, "file:checksum": "1220" + 64 * "0"}},
        "collection": collection_id(codebook.name, codebook.manifest.version),
    }
    (folder / item_name(name)).write_text(as_json(item))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of items of two codebooks, of which one is installed."""
    installed, other = make_codebook("sample"), make_codebook("sample", seed=1)
    save_codebook(installed, tmp_path / "codebooks" / "sample", card="")
    monkeypatch.setenv("GEOCENTROIDS_CODEBOOKS_DIR", str(tmp_path / "codebooks"))
    out = tmp_path / "out"
    out.mkdir()
    write_item(out, "town", {0: 50, 1: 50}, installed)
    write_item(out, "village", {0: 30, 1: 60, 2: 10}, installed)
    write_item(out, "sea", {7: 100}, installed)
    write_item(out, "empty", {}, installed)
    write_item(out, "elsewhere", {0: 50, 1: 50}, other)
    (out / "collection.json").write_text("{}")
    (out / "notes.json").write_text("[1]")
    return out


def similar(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["similar", *map(str, arguments)])


def test_images_that_look_alike(folder: Path) -> None:
    result = similar("town", folder, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [one["id"] for one in found] == ["village", "sea"]
    assert found[0]["likeness"] > 0.9 > found[1]["likeness"]
    assert found[0]["source"] == "/images/village.tif"
    assert found[0]["labels"] == str(folder / "village.tif")
    assert "2 images of" in result.stderr
    assert "another codebook" in result.stderr
    shown = similar(folder / "town.json", folder, "--top", 1).stdout.splitlines()
    assert len(shown) == 1
    assert shown[0].split()[1:] == ["village", "/images/village.tif"]


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    def error(*arguments: object) -> str:
        result = similar(*arguments)
        assert result.exit_code == 1
        assert "Traceback" not in result.output
        return str(result.stderr)

    assert "'elsewhere' was labelled with codebook sample 1" in error("elsewhere", folder)
    assert "label it again" in error("elsewhere", folder)
    assert "neither an item" in error("nowhere", folder)
    assert "is no item that geocentroids" in error("notes.json", folder)
    assert "has no labelled patch" in error("empty", folder)
    assert "holds no items" in error("town", tmp_path)
    for name in ("village", "sea"):
        (folder / item_name(name)).unlink()
    assert "nothing to compare" in error("town", folder)
    assert "there is no codebook 'nope'" in error("town", folder, "--codebook", "nope")


def test_labels_that_a_codebook_has_not(folder: Path) -> None:
    item = (folder / "town.json").read_text().replace('"1": 50', '"12": 50')
    found = read_record(item)
    assert found is not None
    with pytest.raises(InputError, match="50 patches of label 12; its codebook has labels 0 to 11"):
        found[1].counts(K)
