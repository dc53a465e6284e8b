from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codebooks import DIM, K, make_codebook, make_manifest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage

from geocentroids_tiler.codebook import (
    NODATA_LABEL,
    AssignmentSection,
    Codebook,
    EncoderSection,
    PreprocessSection,
    cut_tree,
    file_sha256,
    load_codebook,
    save_codebook,
)
from geocentroids_tiler.colors import oklab_to_srgb, srgb_to_oklab
from geocentroids_tiler.errors import CodebookError, InputError

EMBEDDED = EncoderSection(source="encoder.onnx", architecture="x", dim=DIM)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_codebook(make_codebook(), tmp_path / "sample", card="# Sample\n").path or tmp_path


# --- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("counts", [True, False])
def test_round_trip(tmp_path: Path, tree: bool, dtype: type[np.floating[Any]], counts: bool) -> None:
    original = make_codebook(tree=tree)
    original = replace(original, centroids=original.centroids.astype(dtype), counts=original.counts if counts else None)
    loaded = save_codebook(original, tmp_path / "new" / "sample", card="# Sample\n")
    assert loaded.path == tmp_path / "new" / "sample"
    assert loaded.manifest == original.manifest
    assert loaded.names == original.names
    for key in ("centroids", "colors", "counts", "tree"):
        before, after = getattr(original, key), getattr(loaded, key)
        assert (before is None) == (after is None)
        if before is not None:
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
    assert loaded.digest == original.digest == load_codebook(loaded.path).digest
    assert (loaded.path / "README.md").read_text() == "# Sample\n"


def test_one_centroid(tmp_path: Path) -> None:
    single = Codebook(make_manifest(), np.ones((1, DIM), np.float32), np.zeros((1, 3), np.uint8), tree=np.zeros((0, 4)))
    codebook = save_codebook(single, tmp_path / "one", card="")
    assert len(codebook) == 1
    assert codebook.classes(1).lookup.tolist() == [0]
    assert codebook.neighbours(0, 5) == []


def test_properties(saved: Path) -> None:
    codebook = load_codebook(saved)
    assert (codebook.name, len(codebook), codebook.patch_m, codebook.encoder_path) == ("sample", K, 3.5, None)


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"encoder.onnx is missing"):
        save_codebook(make_codebook(encoder=EMBEDDED), tmp_path / "sample", card="")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    save_codebook(make_codebook(), tmp_path / "empty", card="")
    for name in ("empty", "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(CodebookError, match=r"exists already"):
            save_codebook(make_codebook(), tmp_path / name, card="")


def test_everyone_may_read_what_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = save_codebook(make_codebook(), tmp_path / "sample", card="").path
    finally:
        os.umask(before)
    assert path is not None
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {0o644}
    assert path.stat().st_mode & 0o777 == 0o755


def test_embedded_encoder(tmp_path: Path) -> None:
    onnx = tmp_path / "model.onnx"
    onnx.write_bytes(b"one")
    codebook = save_codebook(make_codebook(encoder=EMBEDDED), tmp_path / "a", card="", encoder=onnx)
    assert codebook.encoder_path == tmp_path / "a" / "encoder.onnx"
    assert codebook.manifest.encoder.sha256 == file_sha256(onnx)
    onnx.write_bytes(b"two")
    other = save_codebook(make_codebook(encoder=EMBEDDED), tmp_path / "b", card="", encoder=onnx)
    assert other.digest != codebook.digest, "labels of another encoder are other labels"
    shutil.copyfile(onnx, tmp_path / "a" / "encoder.onnx")
    with pytest.raises(CodebookError, match=rf"encoder.onnx has SHA-256 {file_sha256(onnx)}; codebook.json allows"):
        load_codebook(tmp_path / "a")


def test_embedded_encoder_without_a_stated_digest_still_counts(tmp_path: Path) -> None:
    digests = set()
    for content in (b"one", b"two"):
        path = tmp_path / content.decode()
        (tmp_path / "model.onnx").write_bytes(content)
        save_codebook(make_codebook(encoder=EMBEDDED), path, card="", encoder=tmp_path / "model.onnx")
        edit_manifest(path, lambda content: content["encoder"].update(sha256=None))
        digests.add(load_codebook(path).digest)
    assert len(digests) == 2


# --- digest ----------------------------------------------------------------------------------------------------------


def test_digest_ignores_where_and_when_and_in_what_order(saved: Path, tmp_path: Path) -> None:
    before = load_codebook(saved).digest
    copy = shutil.copytree(saved, tmp_path / "elsewhere")
    arrays = load_file(copy / "arrays.safetensors")
    (copy / "arrays.safetensors").unlink()
    save_file(dict(reversed(arrays.items())), copy / "arrays.safetensors", metadata={"note": "x"})
    manifest = json.loads((copy / "codebook.json").read_text())
    (copy / "codebook.json").write_text(json.dumps(dict(reversed(manifest.items()))))
    (copy / "README.md").write_text("other words")
    for file in copy.rglob("*"):
        os.utime(file, (0, 0))
    assert load_codebook(copy).digest == before


@pytest.mark.parametrize(
    "change",
    [
        {"centroids": np.ones((K, DIM), np.float32)},
        {"centroids": make_codebook().centroids.astype(np.float16).astype(np.float32)},
        {"colors": np.zeros((K, 3), np.uint8)},
        {"counts": None},
        {"counts": np.zeros(K, np.int64)},
        {"tree": None},
        {"names": {}},
        {"names": {None: {0: "road", 3: "Wiese"}, 4: {1: "forest"}}},
        {"manifest": make_manifest(version="2")},
        {"manifest": make_manifest(metric="cosine")},
        {"manifest": make_manifest(training={})},
        {"manifest": make_manifest(assignment=AssignmentSection(metric="inner_product", similarity_range=(0, 1)))},
    ],
)
def test_digest_sees_every_change(change: dict[str, Any]) -> None:
    codebook = make_codebook()
    assert replace(codebook, **change).digest != codebook.digest


def test_digest_tells_dtypes_apart() -> None:
    zeros = Codebook(make_manifest(), np.zeros((K, DIM), np.float32), np.zeros((K, 3), np.uint8))
    assert replace(zeros, centroids=np.zeros((K, DIM), np.float16)).digest != zeros.digest


# --- what is refused -------------------------------------------------------------------------------------------------


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / "codebook.json").read_text())
    change(content)
    (path / "codebook.json").write_text(json.dumps(content))


def manifest_with(section: str | None, **values: Any) -> Callable[[Path], None]:
    return lambda path: edit_manifest(path, lambda content: (content[section] if section else content).update(values))


def manifest_without(section: str | None, key: str) -> Callable[[Path], None]:
    return lambda path: edit_manifest(path, lambda content: (content[section] if section else content).pop(key))


def arrays_with(**arrays: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = load_file(path / "arrays.safetensors") | arrays
        save_file({key: array for key, array in content.items() if array is not None}, path / "arrays.safetensors")

    return change


def changed(key: str, index: Any, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = load_file(path / "arrays.safetensors")
        content[key] = content[key].copy()
        content[key][index] = value
        save_file(content, path / "arrays.safetensors")

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda path: (path / name).write_bytes(raw) and None


def bfloat16(path: Path) -> None:
    header = json.dumps({"centroids": {"dtype": "BF16", "shape": [1, 1], "data_offsets": [0, 2]}}).encode()
    (path / "arrays.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")


ARRAYS, MANIFEST = "arrays.safetensors", "codebook.json"
WRONG: list[tuple[str, Callable[[Path], None], str, str]] = [
    # id, what to spoil, file that the text must name, what it must say of what was found and what is allowed
    (
        "no manifest",
        lambda p: (p / MANIFEST).unlink(),
        MANIFEST,
        "is missing; a codebook directory holds codebook.json",
    ),
    ("no arrays", lambda p: (p / ARRAYS).unlink(), ARRAYS, "is missing; a codebook directory holds"),
    ("not JSON", text(MANIFEST, "{"), MANIFEST, "not readable JSON"),
    ("not UTF-8", text(MANIFEST, b"\xff\xfe{}"), MANIFEST, "not readable JSON"),
    ("deep JSON", text(MANIFEST, "[" * 100_000), MANIFEST, "not readable JSON"),
    ("a list", text(MANIFEST, "[]"), MANIFEST, "format 'list'; only 'geocentroids-codebook/1'"),
    ("format 2", manifest_with(None, format="geocentroids-codebook/2"), MANIFEST, "'geocentroids-codebook/2'; only"),
    ("no name", manifest_without(None, "name"), MANIFEST, "name = .*Field required"),
    ("name with slash", manifest_with(None, name="../x"), MANIFEST, r"name = '../x'.*pattern"),
    ("name in capitals", manifest_with(None, name="Nano"), MANIFEST, "name = 'Nano'.*pattern"),
    ("name and newline", manifest_with(None, name="nano\n"), MANIFEST, r"name = 'nano\\n'.*pattern"),
    ("unknown field", manifest_with(None, colour="red"), MANIFEST, "colour = 'red'.*not permitted"),
    ("unknown metric", manifest_with("assignment", metric="dot"), MANIFEST, "metric = 'dot'.*'inner_product', 'l2' or"),
    ("unknown resampling", manifest_with("preprocess", resampling="lanczos"), MANIFEST, "'lanczos'.*'nearest'"),
    ("gsd zero", manifest_with("preprocess", gsd_m=0), MANIFEST, "gsd_m = 0: Input should be greater than 0"),
    ("gsd NaN", manifest_with("preprocess", gsd_m=float("nan")), MANIFEST, "NaN is not a JSON number"),
    (
        "mean infinite",
        manifest_with("preprocess", mean=[0, 0, float("inf")]),
        MANIFEST,
        "Infinity is not a JSON number",
    ),
    ("std zero", manifest_with("preprocess", std=[1, 0, 1]), MANIFEST, r"std \(1.0, 0.0, 1.0\) must be above 0"),
    ("two means", manifest_with("preprocess", mean=[0, 0]), MANIFEST, r"mean\.2.*Field required"),
    (
        "margin eats the window",
        manifest_with("preprocess", margin_patches=8),
        MANIFEST,
        "margin_patches 8 leaves nothing",
    ),
    (
        "stride",
        manifest_with("preprocess", stride_patches=7),
        MANIFEST,
        "stride_patches 7 does not divide the core of 10",
    ),
    (
        "similarity",
        manifest_with("assignment", similarity_range=[1, 0]),
        MANIFEST,
        r"\(1.0, 0.0\) must be \(low, high\)",
    ),
    ("sha256", manifest_with("encoder", sha256="abc"), MANIFEST, "sha256 = 'abc'.*pattern"),
    (
        "no embedded encoder",
        manifest_with("encoder", source="encoder.onnx"),
        "encoder.onnx",
        "missing.*names it as the",
    ),
    ("dim", manifest_with("encoder", dim=6), ARRAYS, r"centroids has shape \(12, 5\).*allowed are shape \(12, 6\)"),
    ("junk arrays", text(ARRAYS, b"junk"), ARRAYS, "not a readable safetensors file"),
    ("empty arrays", text(ARRAYS, b""), ARRAYS, "not a readable safetensors file"),
    ("pickle", text(ARRAYS, b"\x80\x04]q\x00."), ARRAYS, "not a readable safetensors file"),
    ("unknown dtype", bfloat16, ARRAYS, "not a readable safetensors file|centroids and colors are required"),
    ("no colours", arrays_with(colors=None), ARRAYS, "centroids and colors are required"),
    ("another array", arrays_with(bias=np.zeros(3)), ARRAYS, "'bias'.*no others are allowed"),
    ("no rows", arrays_with(centroids=np.zeros((0, DIM), np.float32)), ARRAYS, "0 rows; allowed are 1 to 65535"),
    (
        "too many rows",
        arrays_with(centroids=np.zeros((65536, DIM), np.float16), colors=np.zeros((65536, 3), np.uint8)),
        ARRAYS,
        "65536 rows; allowed are 1 to 65535",
    ),
    ("scalar centroids", arrays_with(centroids=np.ones((), np.float32)), ARRAYS, "0 rows"),
    (
        "flat centroids",
        arrays_with(centroids=np.zeros(K, np.float32)),
        ARRAYS,
        r"shape \(12,\).*allowed are shape \(12, 5\)",
    ),
    ("float64 centroids", arrays_with(centroids=np.zeros((K, DIM))), ARRAYS, "dtype float64; .*float16 or float32"),
    ("float colours", arrays_with(colors=np.zeros((K, 3), np.float32)), ARRAYS, "colors has .*dtype float32; .*uint8"),
    (
        "one colour less",
        arrays_with(colors=np.zeros((K - 1, 3), np.uint8)),
        ARRAYS,
        r"\(11, 3\).*allowed are shape \(12, 3\)",
    ),
    ("RGBA colours", arrays_with(colors=np.zeros((K, 4), np.uint8)), ARRAYS, r"shape \(12, 4\)"),
    ("NaN", changed("centroids", (2, 1), np.nan), ARRAYS, "centroids has 1 values that are not finite"),
    ("infinite", changed("centroids", (slice(None), 0), np.inf), ARRAYS, "centroids has 12 values that are not finite"),
    ("int32 counts", arrays_with(counts=np.zeros(K, np.int32)), ARRAYS, "counts has .*int32; .*int64"),
    ("negative counts", changed("counts", 4, -3), ARRAYS, "counts has the negative value -3"),
    (
        "tree shape",
        arrays_with(tree=np.zeros((K, 4))),
        ARRAYS,
        r"tree has shape \(12, 4\).*allowed are shape \(11, 4\)",
    ),
    ("tree dtype", arrays_with(tree=np.zeros((K - 1, 4), np.float32)), ARRAYS, "tree has .*float32; .*float64"),
    ("tree NaN", changed("tree", (0, 2), np.nan), ARRAYS, "tree has 1 values that are not finite"),
    ("tree uses a leaf twice", changed("tree", (0, 0), 0), ARRAYS, "not a merge tree of 12 centroids"),
    ("tree from the future", arrays_with(tree=np.zeros((K - 1, 4))), ARRAYS, "not a merge tree"),
    ("tree of fractions", changed("tree", (0, 0), 0.5), ARRAYS, "not a merge tree"),
    ("tree below zero", changed("tree", (0, 0), -1), ARRAYS, "not a merge tree"),
    ("falling heights", changed("tree", (-1, 2), 0), ARRAYS, r"heights \(column 2\) of tree must not fall"),
    ("names not JSON", text("names/labels.json", "{"), "labels.json", "not a legend pack.*expected"),
    ("names a list", text("names/labels.json", "[]"), "labels.json", "not a legend pack"),
    ("names without classes", text("names/x.json", '{"names": {}}'), "x.json", "not a legend pack.*KeyError"),
    (
        "names of no number",
        text("names/x.json", '{"classes": null, "names": {"a": "b"}}'),
        "x.json",
        "not a legend pack",
    ),
    (
        "names of class 12",
        text("names/x.json", '{"classes": null, "names": {"12": "b"}}'),
        "x.json",
        "class 12; .* 0 to 11",
    ),
    (
        "names of class -1",
        text("names/x.json", '{"classes": 4, "names": {"-1": "b"}}'),
        "x.json",
        "class -1; .* 0 to 3",
    ),
    ("names of 13 classes", text("names/x.json", '{"classes": 13, "names": {}}'), "x.json", "classes = 13; .* 1 to 12"),
    ("names of true", text("names/x.json", '{"classes": true, "names": {}}'), "x.json", "classes = True; allowed"),
    ("name null", text("names/x.json", '{"classes": 4, "names": {"0": null}}'), "x.json", "class 0 the name None"),
    ("names deep", text("names/x.json", "[" * 100_000), "x.json", "not a legend pack"),
]


@pytest.mark.parametrize(
    ("spoil", "file", "message"), [case[1:] for case in WRONG], ids=[case[0].replace(" ", "-") for case in WRONG]
)
def test_wrong_files(saved: Path, spoil: Callable[[Path], None], file: str, message: str) -> None:
    spoil(saved)
    with pytest.raises(CodebookError, match=f"(?s){message}") as caught:
        load_codebook(saved)
    assert file in str(caught.value)
    assert str(saved) in str(caught.value), "the text says which directory"


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CodebookError, match=r"codebook.json is missing"):
        load_codebook(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CodebookError, match=r"codebook.json is missing"):
        load_codebook(tmp_path / "file")


def test_cosine_needs_directions() -> None:
    centroids = np.ones((K, DIM), np.float32)
    centroids[7] = 0
    colors = np.zeros((K, 3), np.uint8)
    with pytest.raises(CodebookError, match=r"centroids row 7 is all zero"):
        Codebook(make_manifest(metric="cosine"), centroids, colors)
    Codebook(make_manifest(metric="l2"), centroids, colors)


def test_arrays_are_read_only_and_the_callers_stay_as_they_were() -> None:
    centroids = np.zeros((K, DIM), np.float32)
    codebook = Codebook(make_manifest(), centroids, np.zeros((K, 3), np.uint8))
    with pytest.raises(ValueError, match=r"read-only"):
        codebook.centroids[0, 0] = 1
    with pytest.raises(AttributeError):
        codebook.centroids = centroids  # type: ignore[misc]
    assert centroids.flags.writeable


@pytest.mark.parametrize("key", ["centroids", "colors", "counts", "tree"])
def test_loaded_arrays_are_read_only(saved: Path, key: str) -> None:
    array = getattr(load_codebook(saved), key)
    with pytest.raises(ValueError, match=r"read-only"):
        array[0] = 0


# --- classes ---------------------------------------------------------------------------------------------------------


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([a, b]), axis=1).T)
    return pairs == len(np.unique(a)) == len(np.unique(b))


@pytest.mark.parametrize("method", ["ward", "average", "single", "complete"])
def test_cut_tree_agrees_with_scipy(method: str) -> None:
    points = np.random.default_rng(3).standard_normal((60, 4))
    tree = linkage(points, method)
    for n in (1, 2, 3, 10, 37, 59, 60):
        lookup = cut_tree(tree, n)
        assert lookup.dtype == np.uint16
        assert same_partition(lookup, fcluster(tree, n, "maxclust"))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.data())
def test_cuts_are_nested_and_numbered_by_their_lowest_leaf(k: int, seed: int, data: st.DataObject) -> None:
    points = np.random.default_rng(seed).standard_normal((k, 2))
    tree = linkage(points, "ward") if k > 1 else np.zeros((0, 4))
    n = data.draw(st.integers(1, k))
    lookup = cut_tree(tree, n)
    classes, first = np.unique(lookup, return_index=True)
    assert classes.tolist() == list(range(n))
    assert (np.diff(first) > 0).all()
    if n > 1:
        coarser = cut_tree(tree, n - 1)
        assert len(np.unique(np.stack([lookup, coarser]), axis=1).T) == n, "merging never splits a class"


def test_cut_of_a_chain_is_quick() -> None:
    k = 65535
    tree = np.zeros((k - 1, 4))
    tree[:, 0], tree[:, 1] = np.r_[0, np.arange(k, 2 * k - 2)], np.arange(1, k)
    start = time.perf_counter()
    lookup = cut_tree(tree, 2)
    assert time.perf_counter() - start < 2  # measured 0.08 s; a walk of single steps takes minutes
    assert (lookup == np.r_[np.zeros(k - 1), 1]).all()


def test_labels_as_classes() -> None:
    codebook = make_codebook()
    classes = codebook.classes()
    assert len(classes) == K
    np.testing.assert_array_equal(classes.lookup, np.arange(K))
    np.testing.assert_array_equal(classes.colors, codebook.colors)
    np.testing.assert_array_equal(classes.counts, codebook.counts)
    assert classes.names == ("road", None, None, "Wiese äöü", *[None] * 8)


@pytest.mark.parametrize("n", [1, 4, 7, K])
def test_merged_classes(n: int) -> None:
    codebook = make_codebook()
    assert codebook.tree is not None
    assert codebook.counts is not None
    classes = codebook.classes(n)
    assert len(classes) == len(classes.names) == n
    assert classes.counts is not None
    assert classes.counts.sum() == codebook.counts.sum()
    for i in range(n):  # one class at a time, in plain words
        members = np.flatnonzero(cut_tree(codebook.tree, n) == i)
        weights = np.maximum(codebook.counts[members], 1)
        lab = np.average(srgb_to_oklab(codebook.colors[members]), axis=0, weights=weights)
        assert classes.colors[i].tolist() == oklab_to_srgb(lab).tolist()
        assert classes.counts[i] == codebook.counts[members].sum()
    assert classes.names == ((None, "forest", None, None) if n == 4 else (None,) * n)


def test_all_classes_is_the_labels_again() -> None:
    codebook = make_codebook()
    np.testing.assert_array_equal(codebook.classes(K).lookup, codebook.classes().lookup)
    np.testing.assert_array_equal(codebook.classes(K).colors, codebook.colors)


def test_merging_without_counts_weighs_alike() -> None:
    codebook = replace(make_codebook(), counts=None)
    classes = codebook.classes(1)
    assert classes.counts is None
    expected = oklab_to_srgb(srgb_to_oklab(codebook.colors).mean(axis=0))
    np.testing.assert_array_equal(classes.colors[0], expected)


def test_merging_centroids_nobody_counted_does_not_divide_by_zero() -> None:
    codebook = replace(make_codebook(), counts=np.zeros(K, np.int64))
    assert codebook.classes(3).colors.shape == (3, 3)


@pytest.mark.parametrize("n", [0, -1, K + 1])
def test_number_of_classes_out_of_range(n: int) -> None:
    with pytest.raises(InputError, match=rf"classes={n}: .* 1 to {K} classes"):
        make_codebook().classes(n)


def test_classes_without_a_tree() -> None:
    with pytest.raises(InputError, match=r"has no merge tree"):
        make_codebook(tree=False).classes(4)


def test_classes_of_labels() -> None:
    classes = make_codebook().classes(4)
    labels = np.array([[0, 11, NODATA_LABEL], [3, 3, 12]], np.uint16)
    found = classes.of_labels(labels)
    assert found.dtype == np.uint16
    assert found[0, :2].tolist() == classes.lookup[[0, 11]].tolist()
    assert (found[0, 2], found[1, 2]) == (NODATA_LABEL, NODATA_LABEL), "no data, and what is no label, stay no data"


def test_names_of_several_packs_come_together(saved: Path) -> None:
    (saved / "names" / "more.json").write_text('{"classes": null, "names": {"3": "meadow", "5": "roof"}}')
    assert load_codebook(saved).names == {None: {0: "road", 3: "meadow", 5: "roof"}, 4: {1: "forest"}}


# --- neighbours and similarity ---------------------------------------------------------------------------------------


def similarity(metric: str, a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    if metric == "l2":
        return -float(np.sqrt(((a - b) ** 2).sum()))
    return float((a * b).sum() / (np.sqrt((a**2).sum() * (b**2).sum()) if metric == "cosine" else 1))


@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_neighbours_against_brute_force(metric: str, dtype: type[np.floating[Any]]) -> None:
    codebook = make_codebook(k=50, metric=metric, tree=False)
    codebook = replace(codebook, centroids=codebook.centroids.astype(dtype))
    for label in (0, 17, 49):
        expected = sorted(
            ((similarity(metric, row, codebook.centroids[label]), i) for i, row in enumerate(codebook.centroids)),
            key=lambda pair: (-pair[0], pair[1]),
        )
        expected = [pair for pair in expected if pair[1] != label][:6]
        found = codebook.neighbours(label, 6)
        assert [i for i, _ in found] == [i for _, i in expected]
        np.testing.assert_allclose([s for _, s in found], [s for s, _ in expected], rtol=1e-12)
    assert len(codebook.neighbours(0, 1000)) == 49


def test_similarity_range() -> None:
    centroids = np.tile(np.float32([3, 4, 0, 0, 0]), (K, 1))
    colors = np.zeros((K, 3), np.uint8)
    for metric, expected in {"cosine": (0, 1), "inner_product": (0, 25), "l2": (-5, 0)}.items():
        assert Codebook(make_manifest(metric=metric), centroids, colors).similarity_range() == pytest.approx(expected)
    stated = AssignmentSection(metric="l2", similarity_range=(-3, -1))
    assert Codebook(make_manifest(assignment=stated), centroids, colors).similarity_range() == (-3, -1)


# --- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 30),
    dim=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    names=st.dictionaries(st.integers(0, 0), st.text(max_size=20)),
    title=st.text(max_size=30),
)
def test_any_codebook_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, k: int, dim: int, seed: int, names: dict[int, str], title: str
) -> None:
    rng = np.random.default_rng(seed)
    codebook = Codebook(
        make_manifest(dim=dim, title=title),
        rng.standard_normal((k, dim)).astype(np.float32),
        rng.integers(0, 256, (k, 3), dtype=np.uint8),
        names={None: names},
    )
    loaded = save_codebook(codebook, tmp_path_factory.mktemp("any") / "sample", card="")
    assert loaded.digest == codebook.digest
    assert loaded.names == codebook.names


@settings(max_examples=200, deadline=None)
@given(window=st.integers(1, 64), margin=st.integers(0, 40), stride=st.integers(1, 70))
def test_windows_are_accepted_if_strides_tile_their_core(window: int, margin: int, stride: int) -> None:
    core = window - 2 * margin
    fits = core >= 1 and core % stride == 0
    try:
        PreprocessSection(gsd_m=1, window_patches=window, margin_patches=margin, stride_patches=stride)
    except ValueError:
        assert not fits
    else:
        assert fits


def test_the_published_size_loads_quickly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codebook = Codebook(
        make_manifest(dim=768),
        rng.standard_normal((6144, 768), dtype=np.float32),
        rng.integers(0, 256, (6144, 3), dtype=np.uint8),
    )
    save_codebook(codebook, tmp_path / "big", card="")
    start = time.perf_counter()
    load_codebook(tmp_path / "big")
    assert time.perf_counter() - start < 1  # measured 0.016 s on two cores
