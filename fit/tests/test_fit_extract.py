"""Features: what serving computes, sampled evenly, in shards that survive whatever ends a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
from httpd import Served, serve
from small_images import LAYOUT, MeanEncoder, close_remote, folder_of, settings, write_bands, write_image

from geocentroids_fit import extract as extract_module
from geocentroids_fit import reading
from geocentroids_fit.extract import Extraction, extract
from geocentroids_fit.images import list_images
from geocentroids_fit.pack import draft_codebook
from geocentroids_fit.shards import MANIFEST_FILE, SHARDS_DIR, FeatureSettings, open_features, shard_file
from geocentroids_fit.stream import blend
from geocentroids_tiler.errors import InputError

A, B = "a.tif", "town/b.TIFF"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagery")
    write_image(root / A, 1)
    write_image(root / B, 2, left=561_000.0)
    write_image(root / "town" / "mask" / "b.tif", 3)
    (root / "notes.txt").write_text("no image")
    return root


def run(
    folder: Path,
    out: Path,
    *names: str,
    wanted: FeatureSettings | None = None,
    encoder: MeanEncoder | None = None,
) -> Extraction:
    wanted = wanted or settings()
    images = folder_of(folder, *(names or (A, B)))
    return extract(images, encoder or MeanEncoder(), draft_codebook(wanted), wanted, out, progress=False)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_list_images(folder: Path) -> None:
    assert list_images(folder) == [A, B, "town/mask/b.tif"]
    assert list_images(folder, ["*/mask/*"]) == [A, B]


def test_nothing_to_list_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no GeoTIFF"):
        list_images(tmp_path)
    with pytest.raises(InputError, match="leaves out all 3"):
        list_images(folder, ["*"])
    with pytest.raises(InputError, match="not a folder"):
        list_images(tmp_path / "absent")


def test_blend_of_equal_windows_is_the_window() -> None:
    flat = np.full((8, 8, 2), 3, np.float32)
    assert blend([flat] * 4, LAYOUT) == pytest.approx(np.full((3, 3, 2), 3), rel=1e-6)
    with pytest.raises(ValueError, match="zip"):
        blend([flat], LAYOUT)


def test_tokens_are_blended_and_come_from_their_patch(folder: Path, tmp_path: Path) -> None:
    store = run(folder, tmp_path, A, wanted=settings(per_image=10_000)).store
    features = store.origin(0)
    with rasterio.open(folder / A) as raster:
        bands = raster.read().astype(np.float64)
    dataset = folder_of(folder, A).open(A, draft_codebook(settings()))
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
    assert np.abs(np.diff(windows_share[row == 12], axis=0)).max() < 10


def test_no_image_dominates_and_the_seed_decides(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path / "1").store
    assert [record.features for record in first.manifest.images] == [40, 40]
    assert content(tmp_path / "1") == (run(folder, tmp_path / "2"), content(tmp_path / "2"))[1]
    other = run(folder, tmp_path / "3", wanted=settings(seed=1)).store
    assert not np.array_equal(first.origin(0).row, other.origin(0).row)
    alone = run(folder, tmp_path / "4", B).store
    assert (alone.origin(0).tokens == first.origin(1).tokens).all()


def test_the_sample_is_spread_over_the_image(folder: Path, tmp_path: Path) -> None:
    features = run(folder, tmp_path, A, wanted=settings(per_image=200)).store.origin(0)
    assert len(set(zip(features.row, features.col, strict=True))) == 200
    row, col = features.row - features.row.min(), features.col - features.col.min()
    quarters = np.bincount(2 * (row >= 13) + (col >= 11), minlength=4)
    assert quarters.min() > 30
    assert (np.lexsort((features.col, features.row)) == np.arange(200)).all()


def test_each_window_is_encoded_once(folder: Path, tmp_path: Path) -> None:
    encoder = MeanEncoder()
    run(folder, tmp_path, A, wanted=settings(per_image=10_000), encoder=encoder)
    dataset = folder_of(folder, A).open(A, draft_codebook(settings()))
    rows, cols = dataset.footprint.chunk_range(3).shape
    # One more row and column of windows above and left; a column of chunks lies on the collar.
    assert encoder.windows <= (rows + 1) * (cols + 1)


def test_what_is_finished_is_kept(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, A)
    before = (tmp_path / SHARDS_DIR / shard_file(A)).stat().st_mtime_ns
    encoder = MeanEncoder()
    again = run(folder, tmp_path, A, B, encoder=encoder)
    assert again.reused == 1
    assert (tmp_path / SHARDS_DIR / shard_file(A)).stat().st_mtime_ns == before
    assert encoder.windows > 0
    encoder = MeanEncoder()
    assert run(folder, tmp_path, A, B, encoder=encoder).reused == 2
    assert encoder.windows == 0


def test_a_changed_image_is_computed_anew(tmp_path: Path) -> None:
    write_image(tmp_path / A, 1)
    write_image(tmp_path / B, 2)
    out = tmp_path / "features"
    before = run(tmp_path, out).store.origin(0).rgb.copy()
    write_image(tmp_path / A, 5)
    os.utime(tmp_path / A, ns=(1, 1))  # the clock may be coarse
    again = run(tmp_path, out)
    assert again.reused == 1
    assert not np.array_equal(again.store.origin(0).rgb, before)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "record"])
def test_a_broken_shard_is_named_and_computed_anew(folder: Path, tmp_path: Path, damage: str) -> None:
    run(folder, tmp_path)
    whole = content(tmp_path)
    path = tmp_path / SHARDS_DIR / shard_file(B)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "flip":
        path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    elif damage == "remove":
        path.unlink()
    else:
        path.with_suffix(".json").write_text("{")
    if damage != "record":
        with pytest.raises(InputError, match=rf"{path.name} (has|is missing).*run geocentroids-fit extract again"):
            open_features(tmp_path)
    assert run(folder, tmp_path).reused == 1
    assert content(tmp_path) == whole


def test_features_of_other_settings_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    before = content(tmp_path)
    with pytest.raises(InputError, match="made with another per_image; name another work folder"):
        run(folder, tmp_path, wanted=settings(per_image=41))
    with pytest.raises(InputError, match="made with another encoder"):
        run(folder, tmp_path, wanted=settings(encoder="other"))
    assert content(tmp_path) == before


def test_no_features_yet_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"features\.json is missing: run geocentroids-fit extract"):
        open_features(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text('{"format": "other"}')
    with pytest.raises(InputError, match=r"features\.json is not a manifest: .*format"):
        open_features(tmp_path)


def test_images_that_cannot_be_used_are_left_out_with_a_reason(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_image(images / A, 1)
    write_bands(images / "coarse.tif", np.full((3, 20, 20), 90, np.uint8), pixel_m=10)
    (images / "corrupt.tif").write_bytes(b"II*\0 not a tiff")
    whole = (images / A).read_bytes()
    (images / "truncated.tif").write_bytes(whole[: len(whole) // 2])
    names = list_images(images)
    extraction = run(images, tmp_path / "features", *names, "gone.tif")
    assert extraction.store.images == (A,)
    reasons = {skipped.image: skipped.reason for skipped in extraction.store.manifest.skipped}
    assert list(reasons) == ["coarse.tif", "corrupt.tif", "truncated.tif", "gone.tif"]
    assert "10 m per pixel" in reasons["coarse.tif"]
    assert all("cannot open" in reasons[name] for name in ("corrupt.tif", "truncated.tif", "gone.tif"))


def test_images_without_data_are_one_sentence(tmp_path: Path) -> None:
    write_bands(tmp_path / "empty.tif", np.zeros((3, 200, 200), np.uint8), nodata=0)
    with pytest.raises(InputError, match="no patch of the 1 images has data"):
        run(tmp_path, tmp_path / "features", "empty.tif")
    with pytest.raises(InputError, match=r"no patch .*there is nothing to fit \(gone\.tif: "):
        run(tmp_path, tmp_path / "features", "gone.tif")


def test_an_image_without_data_gives_an_empty_shard(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_image(images / A, 1)
    write_bands(images / "empty.tif", np.zeros((3, 200, 200), np.uint8), nodata=0)
    run(images, tmp_path / "features", A, "empty.tif")
    store = open_features(tmp_path / "features")
    assert store.starts.tolist() == [0, 40, 40]
    assert [len(part) for part in store.parts()] == [40, 0]
    assert len(store) == 40


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name.startswith("b-"):
            write(path, data[:100])
            raise OSError(28, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"b-\w+\.safetensors could not be written: No space left .*make room.*kept"):
        run(folder, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    assert run(folder, tmp_path).reused == 1


CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from small_images import MeanEncoder, folder_of, settings
from geocentroids_fit.extract import extract
from geocentroids_fit.images import list_images
from geocentroids_fit.pack import draft_codebook
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
wanted = settings(per_image=60)
print("begins", flush=True)
images = folder_of(folder, *list_images(folder))
extract(images, MeanEncoder(0.002), draft_codebook(wanted), wanted, out, progress=False)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for number in range(6):
        write_image(images / f"{number}.tif", number)
    command = [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent)), str(images)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    killed = tmp_path / "killed"
    finished = []
    for _ in range(3):
        process = subprocess.Popen([*command, str(killed)], stdout=subprocess.PIPE)
        done = len(list(killed.rglob("*.safetensors")))
        deadline = time.monotonic() + 60
        while len(list(killed.rglob("*.safetensors"))) <= done and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finished.append(len(list(killed.rglob("*.safetensors"))))
        assert not (killed / MANIFEST_FILE).exists()
    assert finished[0] < 6
    subprocess.run([*command, str(killed)], check=True, capture_output=True)
    assert content(killed) == content(tmp_path / "whole")


def test_windows_are_read_while_the_encoder_runs_and_blended_while_it_runs_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, read_meanwhile, blending, encoding_again = (threading.Event() for _ in range(4))
    met: list[bool] = []
    calls: list[int] = []
    read = reading.read_windows

    def recorded(*args: object) -> object:
        calls.append(threading.get_ident())
        # A batch is read in two calls on one thread; all but the first wait for the encoder to be at work.
        if calls.count(calls[-1]) > 2 or calls[-1] != calls[0]:
            assert encoding.wait(60)
            read_meanwhile.set()
        return read(*args)

    class Recorded(MeanEncoder):
        def encode(self, windows: np.ndarray) -> list[np.ndarray]:
            if not encoding.is_set():
                encoding.set()
                met.append(read_meanwhile.wait(20))
            elif blending.is_set():
                encoding_again.set()
            return super().encode(windows)

        def fetch(self, tokens: np.ndarray) -> np.ndarray:
            if not blending.is_set():
                blending.set()
                met.append(encoding_again.wait(20))
            return tokens

    monkeypatch.setattr(reading, "read_windows", recorded)
    monkeypatch.setattr(extract_module, "CHUNKS_PER_BATCH", 4)
    found = run(folder, tmp_path, wanted=settings(per_image=10_000), encoder=Recorded())
    assert met == [True, True]
    assert 0 < found.busy <= 1


def test_bounds_and_identity_are_kept(folder: Path, tmp_path: Path) -> None:
    record = run(folder, tmp_path).store.manifest.images[0]
    dataset = folder_of(folder, A).open(A, draft_codebook(settings()))
    assert record.bounds == dataset.geographic_bounds
    assert record.identity == dataset.identity
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["settings"]["per_image"] == 40


def test_images_on_the_web_give_the_same_features(folder: Path, tmp_path: Path) -> None:
    with serve() as server:
        server.files["/a.tif"] = Served((folder / A).read_bytes(), {"ETag": '"1"'})
        url = f"{server.url}/a.tif"
        wanted = settings(per_image=10_000)
        far = run(folder, tmp_path / "far", url, wanted=wanted).store
        tokens = far.origin(0).tokens.copy()
        assert run(folder, tmp_path / "far", url, wanted=wanted).reused == 1
        server.files["/a.tif"] = Served((folder / B).read_bytes(), {"ETag": '"2"'})
        assert run(folder, tmp_path / "far", url, wanted=wanted).reused == 0
        with pytest.raises(InputError, match="cannot open"):
            run(folder, tmp_path / "none", f"{server.url}/absent.tif")
        close_remote()
    near = run(folder, tmp_path / "near", A, wanted=wanted).store
    assert far.images == (url,)
    assert far.manifest.images[0].bounds == near.manifest.images[0].bounds
    assert len(near) == 26 * 22
    assert (tokens == near.origin(0).tokens).all()


def test_shard_names_differ() -> None:
    assert shard_file("a/x.tif") != shard_file("b/x.tif")
    assert shard_file("https://host/über maß.tif?x=1").isascii()
    assert "/" not in shard_file("https://host/a.tif")


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_tokens_that_are_not_finite_name_the_image(folder: Path, tmp_path: Path, value: float) -> None:
    class Broken(MeanEncoder):
        def encode(self, windows: np.ndarray) -> list[np.ndarray]:
            return [np.full_like(tokens, value) for tokens in super().encode(windows)]

    with pytest.raises(InputError, match=r"^a\.tif: the encoder gives tokens that are not"):
        run(folder, tmp_path, encoder=Broken())
    assert not (tmp_path / MANIFEST_FILE).exists()
