"""Images of all sorts to COGs on the ground grid; the oracle is rasterio."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.enums import ColorInterp, Resampling
from rasterio.shutil import copy as copy_raster
from rasterio.transform import Affine
from rasterio.warp import reproject

from geocentroids_fit import ground_cog
from geocentroids_fit.prepare import PrepareReport, list_rasters, output_names, prepare
from geocentroids_tiler.codebook import AssignmentSection, Codebook, EncoderSection, Manifest, PreprocessSection
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.source import ReadOptions, open_dataset, read_windows, resolve_source, source_identity

IMAGERY = Path(__file__).parents[3] / "shared" / "imagery"
needs_imagery = pytest.mark.skipif(
    not IMAGERY.is_dir(), reason="the folder of real imagery is not beside the repository"
)
UTM = "EPSG:32721"
LEFT, TOP = 560_000.0, 6_140_001.0
"""A corner that lies on the grid of 3.5 m patches, in Uruguay."""
GRID = Affine(0.25, 0, LEFT, 0, -0.25, TOP)
SIDE = 14 * 20


def texture(rows: int = SIDE, cols: int = SIDE, seed: int = 0) -> NDArray[np.uint8]:
    """Return (3, rows, cols): coarse areas and some noise, never near black or white."""
    rng = np.random.default_rng(seed)
    areas = np.kron(rng.integers(60, 200, (3, 8, 8)), np.ones((1, rows // 8 + 1, cols // 8 + 1)))[:, :rows, :cols]
    return (areas + rng.integers(-20, 20, areas.shape)).astype(np.uint8)


def write(path: Path, bands: NDArray[Any], *, mask: NDArray[np.bool_] | None = None, **options: Any) -> Path:
    """Write bands (N, rows, cols) as a GeoTIFF."""
    count, rows, cols = bands.shape
    profile = {"driver": "GTiff", "crs": UTM, "transform": GRID, "dtype": bands.dtype} | options
    colors = profile.pop("colors", None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(path, "w", count=count, height=rows, width=cols, **profile) as raster,
    ):
        if colors:
            raster.colorinterp = colors
        raster.write(bands)
        if mask is not None:
            raster.write_mask(mask)
    return path


def run(folder: Path, **options: Any) -> PrepareReport:
    return prepare(folder / "in", folder / "out", progress=False, **{"compress": "lossless", "workers": 1} | options)


def read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    with rasterio.open(path) as raster:
        return raster.read(), raster.dataset_mask() > 0


def contents(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def codebook() -> Codebook:
    encoder = EncoderSection(source="x", architecture="x", dim=3, patch_px=14, register_tokens=0, sha256="0" * 64)
    pre = PreprocessSection(gsd_m=0.25, window_patches=8, margin_patches=1, stride_patches=6)
    assignment = AssignmentSection(metric="l2")
    names = {"name": "tiny", "version": "1", "title": "", "licence": "", "attribution": ""}
    manifest = Manifest(**names, encoder=encoder, preprocess=pre, assignment=assignment)
    return Codebook(manifest=manifest, centroids=np.ones((1, 3), np.float32), colors=np.zeros((1, 3), np.uint8))


def reason(report: PrepareReport, name: str) -> str:
    return next(skipped.reason for skipped in report.skipped if skipped.name == name)


def test_an_aligned_image_keeps_its_pixels_and_is_read_as_it_is(tmp_path: Path) -> None:
    bands = texture(rows=14 * 70, cols=14 * 150)  # more than one block each way, and overviews
    write(tmp_path / "in" / "town" / "a.tif", bands)
    report = run(tmp_path)
    (image,) = report.prepared
    assert (image.output, image.width_px, image.height_px) == ("town/a.tif", 14 * 150, 14 * 70)
    assert (image.crs_before, image.crs, image.resampling) == (UTM, UTM, "bilinear")
    assert image.gsd_before_m == pytest.approx(0.25, rel=1e-3)
    path = tmp_path / "out" / "town" / "a.tif"
    pixels, valid = read(path)
    assert np.array_equal(pixels, bands)
    assert valid.all()
    with rasterio.open(path) as raster:
        assert raster.transform.almost_equals(GRID)
        assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert raster.overviews(1) == [2, 4, 8]
        assert raster.files == [str(path)]
    source = resolve_source("town/a.tif", tmp_path / "out")
    dataset = open_dataset(source, source_identity(source), ReadOptions(), codebook())
    assert (dataset.warped, dataset.overview, dataset.collars) == (False, None, ())
    assert dataset.gsd_m == pytest.approx(0.25, rel=1e-3)
    top, left = dataset.footprint.row_start, dataset.footprint.col_start
    windows = [w for w in dataset.footprint.chunks(6) if top < w.row * 6 < top + 60 and left < w.col * 6 < left + 140]
    for window, got in zip(windows, read_windows(dataset, windows, 14), strict=True):
        row, col = (window.row * 6 - 1 - top) * 14, (window.col * 6 - 1 - left) * 14
        assert np.array_equal(got.pixels, bands[:, row : row + 112, col : col + 112].transpose(1, 2, 0))
        assert got.labelled.all()
    assert len(windows) > 100


def test_jpeg_is_near_to_the_image_and_does_not_ring_at_the_edge_of_data(tmp_path: Path) -> None:
    smooth = np.broadcast_to(np.linspace(90, 160, SIDE).astype(np.uint8), (3, SIDE, SIDE)).copy()
    valid = np.tril(np.ones((SIDE, SIDE), bool))
    write(tmp_path / "in" / "a.tif", np.where(valid, smooth, 0).astype(np.uint8), mask=valid)
    run(tmp_path, compress="jpeg")
    pixels, mask = read(tmp_path / "out" / "a.tif")
    with rasterio.open(tmp_path / "out" / "a.tif") as raster:
        assert raster.tags(ns="IMAGE_STRUCTURE")["COMPRESSION"] == "YCbCr JPEG"
    assert np.array_equal(mask, valid)
    error = np.abs(pixels.astype(int) - smooth)[:, valid]
    assert error.max() <= 4  # measured 2; black beside the edge would ring by 30


CROSS = (-56.3200, -34.8800)


@pytest.mark.parametrize(
    ("crs", "step"),
    [("EPSG:3857", 0.3), ("EPSG:4326", 2.7e-6), ("EPSG:2263", 0.9)],
    ids=["mercator", "degrees", "feet"],
)
def test_other_coordinate_systems_are_warped_to_utm(tmp_path: Path, crs: str, step: float) -> None:
    lon, lat = (-73.95, 40.75) if crs == "EPSG:2263" else CROSS
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    bands = np.full((3, 401, 401), 90, np.uint8)
    bands[:, 197:204] = bands[:, :, 197:204] = 250
    transform = Affine(step, 0, x - 200.5 * step, 0, -step, y + 200.5 * step)
    write(tmp_path / "in" / "a.tif", bands, crs=crs, transform=transform)
    (image,) = run(tmp_path).prepared
    utm = "EPSG:32618" if crs == "EPSG:2263" else UTM
    assert (image.crs_before, image.crs) == (crs, utm)
    pixels, valid = read(tmp_path / "out" / "a.tif")
    with rasterio.open(tmp_path / "out" / "a.tif") as raster:
        assert raster.crs == rasterio.CRS.from_string(utm)
        assert (raster.transform.a, raster.transform.e) == (0.25, -0.25)
        assert raster.transform.c % 3.5 == raster.transform.f % 3.5 == 0
        to_px = ~raster.transform
        expected = np.zeros_like(pixels)
        reproject(
            bands,
            expected,
            src_crs=crs,
            src_transform=transform,
            dst_crs=utm,
            dst_transform=raster.transform,
            resampling=Resampling.bilinear,
        )
    col, row = to_px @ Transformer.from_crs("EPSG:4326", utm, always_xy=True).transform(lon, lat)
    rows, cols = np.nonzero((pixels[0] > 200) & valid)
    near = (np.abs(rows - row) < 30) & (np.abs(cols - col) < 30)
    assert rows[near].mean() + 0.5 == pytest.approx(row, abs=1.4)  # a tenth of a patch
    assert cols[near].mean() + 0.5 == pytest.approx(col, abs=1.4)
    inside = valid & (expected[0] > 0)
    assert np.abs(pixels.astype(int) - expected)[:, inside].mean() < 0.5  # measured 0.02


def test_finer_images_are_averaged_and_overviews_are_not_trusted(tmp_path: Path) -> None:
    bands = texture(rows=SIDE * 4, cols=SIDE * 4)
    path = write(tmp_path / "in" / "a.tif", bands, transform=GRID @ Affine.scale(0.25), tiled=True)
    with rasterio.open(path, "r+") as raster:
        raster.build_overviews([2, 4], Resampling.nearest)
    write(tmp_path / "in" / "finest.tif", bands, transform=GRID @ Affine.scale(0.125))
    write(tmp_path / "in" / "near.tif", texture(), transform=GRID @ Affine.scale(0.8))
    report = run(tmp_path)
    assert [image.resampling for image in report.prepared] == ["average", "average", "bilinear"]
    for name, factor in (("a.tif", 4), ("finest.tif", 8)):
        side = SIDE * 4 // factor
        pixels, valid = read(tmp_path / "out" / name)
        mean = bands.reshape(3, side, factor, side, factor).mean(axis=(2, 4))
        assert valid.all()
        assert np.abs(pixels - mean).max() <= 1  # Pillow rounds rows, then columns


def test_collars_are_masked_and_a_dark_river_is_not(tmp_path: Path) -> None:
    bands = texture()
    bands[:, :, :60] = 0
    bands[:, 120:150, 150:200] = 0
    write(tmp_path / "in" / "a.tif", bands)
    run(tmp_path)
    _, valid = read(tmp_path / "out" / "a.tif")
    expected = np.ones((SIDE, SIDE), bool)
    expected[:, :60] = False
    assert np.array_equal(valid, expected)


@pytest.mark.parametrize("how", ["nodata", "alpha", "mask", "sidecar"])
def test_what_a_file_says_of_its_validity_is_carried_over(tmp_path: Path, how: str) -> None:
    bands, path = texture(), tmp_path / "in" / "a.tif"
    valid = np.ones((SIDE, SIDE), bool)
    valid[33:77, 44:205] = False
    if how == "alpha":
        colors = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        write(path, np.concatenate([bands, valid[None] * np.uint8(255)]), colors=colors)
    elif how == "nodata":
        write(path, np.where(valid, bands, 7).astype(np.uint8), nodata=7)
    else:
        write(path, bands, mask=valid if how == "mask" else None)
    if how == "sidecar":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as raster:
            raster.write_mask(valid)
        assert path.with_suffix(".tif.msk").exists()
    run(tmp_path)
    pixels, mask = read(tmp_path / "out" / "a.tif")
    assert np.array_equal(mask, valid)
    assert np.array_equal(pixels[:, valid], bands[:, valid])
    assert pixels[:, ~valid].min() > 20  # filled from around


@pytest.mark.parametrize("driver", ["PNG", "JP2OpenJPEG"])
def test_other_formats_go_through_a_copy_that_is_removed(tmp_path: Path, driver: str) -> None:
    bands = texture()
    tif = write(tmp_path / "a.tif", bands)
    (tmp_path / "in").mkdir()
    options = {"QUALITY": 100, "REVERSIBLE": "YES"} if driver != "PNG" else {"WORLDFILE": "YES"}
    copy_raster(tif, tmp_path / "in" / f"a.{driver[:3].lower()}", driver=driver, **options)
    run(tmp_path)
    pixels, _ = read(tmp_path / "out" / "a.tif")
    assert np.array_equal(pixels, bands)
    assert sorted(contents(tmp_path / "out")) == ["a.tif", "prepare.json"]


def test_a_large_image_in_strips_goes_through_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ground_cog, "MAX_PX_WITHOUT_OVERVIEWS", 100 * 100)
    bands = texture()
    write(tmp_path / "in" / "a.tif", bands)
    copied = []
    monkeypatch.setattr(ground_cog, "_copy", lambda *args, copy=ground_cog._copy: (copied.append(args), copy(*args)))
    run(tmp_path)
    pixels, _ = read(tmp_path / "out" / "a.tif")
    assert len(copied) == 1
    assert np.array_equal(pixels, bands)


def test_images_that_cannot_be_used_are_skipped_with_a_reason(tmp_path: Path) -> None:
    images, bands = tmp_path / "in", texture()
    write(images / "good.tif", bands)
    write(images / "coarse.tif", bands, transform=GRID @ Affine.scale(5))
    write(images / "no_crs.tif", bands, crs=None)
    write(images / "nothing.tif", bands, mask=np.zeros((SIDE, SIDE), bool))
    write(images / "deep.tif", bands.astype(np.uint16) * 9)
    write(images / "grey.tif", bands[:1])
    (images / "corrupt.tif").write_bytes(b"II*\0" + bytes(range(200)))
    (images / "empty.jp2").write_bytes(b"")
    for name, options in (("cut", {}), ("cut_jpeg", {"compress": "jpeg", "photometric": "ycbcr"})):
        path = write(images / f"{name}.tif", bands, tiled=True, blockxsize=128, blockysize=128, **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for suffix, driver in (("png", "PNG"), ("jpg", "JPEG"), ("jp2", "JP2OpenJPEG")):
        path = images / f"cut.{suffix}"
        copy_raster(images / "good.tif", path, driver=driver)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (images / "notes.txt").write_text("no image")
    (images / ".hidden.tif").write_text("no image")
    lines: list[str] = []
    report = run(tmp_path, say=lines.append)
    assert [image.name for image in report.prepared] == ["good.tif"]
    assert len(report.skipped) == len(lines) == 12
    assert "1.25 m per pixel" in reason(report, "coarse.tif")
    assert "no coordinate reference system" in reason(report, "no_crs.tif")
    assert reason(report, "nothing.tif") == "no pixel of the image is data"
    assert "say which values are black and white with rescale" in reason(report, "deep.tif")
    assert "not red, green and blue" in reason(report, "grey.tif")
    for name in ("corrupt.tif", "empty.jp2", "cut.tif", "cut_jpeg.tif", "cut.png", "cut.jpg", "cut.jp2"):
        assert "it cannot be read (" in reason(report, name)
    assert not any("\n" in line or str(tmp_path / "out") in line for line in lines)
    assert sorted(contents(tmp_path / "out")) == ["good.tif", "prepare.json"]


def test_rescale_and_bidx_choose_what_becomes_rgb(tmp_path: Path) -> None:
    bands = texture()
    write(tmp_path / "in" / "a.tif", np.concatenate([bands, bands[:1]]).astype(np.uint16) * 10)
    run(tmp_path, bidx=(4, 2, 3), rescale=(0, 2550))
    assert np.array_equal(read(tmp_path / "out" / "a.tif")[0], bands)


def test_a_second_run_keeps_what_is_finished_and_writes_the_same_report(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / "in" / f"{name}.tif", texture(seed=ord(name)))
    assert run(tmp_path).reused == 0
    before = contents(tmp_path / "out")
    again = run(tmp_path)
    assert again.reused == len(again.prepared) == 3
    assert contents(tmp_path / "out") == before
    report = json.loads(before["prepare.json"])
    assert [image["name"] for image in report["prepared"]] == ["a.tif", "b.tif", "c.tif"]
    stat = (tmp_path / "in" / "a.tif").stat()
    assert report["prepared"][0]["identity"] == f"{stat.st_mtime_ns}-{stat.st_size}"

    changed = texture(seed=9)
    write(tmp_path / "in" / "b.tif", changed)
    assert run(tmp_path).reused == 2
    assert np.array_equal(read(tmp_path / "out" / "b.tif")[0], changed)
    assert run(tmp_path, gsd_m=0.5).reused == 0
    assert run(tmp_path, gsd_m=0.5, compress="jpeg").reused == 0


def test_an_output_whose_image_can_no_longer_be_used_goes_and_one_without_an_image_is_named(tmp_path: Path) -> None:
    for name in "abc":
        write(tmp_path / "in" / f"{name}.tif", texture())
    run(tmp_path)
    (tmp_path / "in" / "a.tif").write_bytes(b"broken")
    (tmp_path / "in" / "b.tif").unlink()
    lines: list[str] = []
    run(tmp_path, say=lines.append)
    assert sorted(contents(tmp_path / "out")) == ["b.tif", "c.tif", "prepare.json"]
    assert lines[1].startswith(f"{tmp_path / 'out' / 'b.tif'}: is not made of any of these images")


@pytest.mark.parametrize(("moment", "workers"), [("cog", 1), ("between", 2)])
def test_a_killed_run_loses_only_unfinished_images(tmp_path: Path, moment: str, workers: int) -> None:
    for n in range(4):
        write(tmp_path / "in" / f"{n}.tif", texture(rows=14 * 40, cols=14 * 40, seed=n))
    program = (
        "import sys; from pathlib import Path; from geocentroids_fit.prepare import prepare;"
        "prepare(Path(sys.argv[1]), Path(sys.argv[2]), compress='lossless', workers=int(sys.argv[3]), progress=False)"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "in"), str(out), str(workers)])
    awaited = {"cog": ".prepare/*/cog.tif*", "between": "[1-3].tif"}[moment]
    deadline = time.monotonic() + 20
    while not any(out.glob(awaited)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "prepare.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    report = run(tmp_path)
    assert report.reused == len(finished) < 4
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    shutil.move(out, tmp_path / "first")
    run(tmp_path)
    assert contents(out) == contents(tmp_path / "first")


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcd":
        write(tmp_path / "in" / f"{name}.tif", texture())

    def full(source: Path, target: Path, **options: Any) -> None:
        if any((tmp_path / "out").glob("*.tif")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        copy_raster(source, target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ground_cog, "copy_raster", full)
        with pytest.raises(InputError, match=r"b\.tif cannot be written .*No space left.*; free space and run"):
            run(tmp_path)
    assert sorted(contents(tmp_path / "out")) == ["a.tif"]
    assert run(tmp_path).reused == 1


def test_a_file_that_gdal_left_unfinished_without_an_error_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GDAL closes a file on a full disk without a word: seen on a tmpfs, where the end of the file was missing."""
    write(tmp_path / "in" / "a.tif", texture(rows=1400, cols=1400))

    def cut(source: Path, target: Path, **options: Any) -> None:
        copy_raster(source, target, **options)
        os.truncate(target, target.stat().st_size - 4096)

    monkeypatch.setattr(ground_cog, "copy_raster", cut)
    with pytest.raises(InputError, match=r"a\.tif cannot be written"):
        run(tmp_path)
    assert not contents(tmp_path / "out")


def test_two_runs_do_not_write_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a.tif", texture())
    refused = []

    def second(source: Path, target: Path, **options: Any) -> None:
        with pytest.raises(InputError, match="another run prepares images") as error:
            run(tmp_path)
        refused.append(error)
        copy_raster(source, target, **options)

    monkeypatch.setattr(ground_cog, "copy_raster", second)
    assert len(run(tmp_path).prepared) == len(refused) == 1


def test_names_of_outputs_differ(tmp_path: Path) -> None:
    names = ["a.jp2", "a.png", "a.tif", "a.png.tif", "A.TIF", "b/a.png", "v1.2.jpg"]
    outputs = output_names(names)
    assert outputs["a.tif"] == "a.tif"
    assert outputs["b/a.png"] == "b/a.tif"
    assert outputs["v1.2.jpg"] == "v1.2.tif"
    assert len({output.lower() for output in outputs.values()}) == len(names)
    assert outputs == output_names(names[::-1])


def test_parameters_and_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="in is not a folder"):
        run(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        run(tmp_path)
    write(tmp_path / "in" / "mask" / "a.tif", texture())
    with pytest.raises(InputError, match=r"leaves out all 1\)"):
        run(tmp_path, exclude=["mask/*"])
    assert list_rasters(tmp_path / "in") == ["mask/a.tif"]
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/\xff.tif"))
    odd.touch()
    with pytest.raises(InputError, match=r"'\\udcff\.tif', a name .* not in UTF-8; rename it"):
        run(tmp_path)
    odd.unlink()
    for options in ({"gsd_m": 0}, {"rescale": (5, 5)}, {"compress": "webp"}, {"workers": 0}):
        with pytest.raises(InputError, match=r"gsd_m|rescale|compress|workers"):
            run(tmp_path, **options)
    for out in (tmp_path / "in" / "out", tmp_path / "in", tmp_path):
        with pytest.raises(InputError, match="choose a folder of outputs apart"):
            prepare(tmp_path / "in", out, progress=False)
    assert not (tmp_path / "out").exists()


@needs_imagery
def test_real_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copyfile(IMAGERY / "kampala_web_mercator_7cm.tif", tmp_path / "in" / "kampala.tif")
    with rasterio.open(IMAGERY / "south_america" / "bolivia_river_town.tif") as raster:
        window = rasterio.windows.Window(2400, 1200, 1100, 900)  # a corner of the black collar, and town
        part = raster.read(window=window)
        write(
            tmp_path / "in" / "bolivia.tif",
            part,
            crs=raster.crs,
            transform=raster.transform @ Affine.translation(2400, 1200),
        )
    bolivia, kampala = run(tmp_path).prepared
    assert (kampala.crs_before, kampala.crs, kampala.resampling) == ("EPSG:3857", "EPSG:32636", "average")
    assert kampala.gsd_before_m == pytest.approx(0.0744, abs=1e-3)
    pixels, valid = read(tmp_path / "out" / "kampala.tif")
    with (
        rasterio.open(IMAGERY / "kampala_web_mercator_7cm.tif") as raster,
        rasterio.open(tmp_path / "out" / "kampala.tif") as prepared,
    ):
        expected = np.zeros_like(pixels)
        reproject(
            raster.read(),
            expected,
            src_crs=raster.crs,
            src_transform=raster.transform,
            dst_crs=prepared.crs,
            dst_transform=prepared.transform,
            resampling=Resampling.average,
        )
    assert np.abs(pixels.astype(int) - expected)[:, valid].mean() < 2
    assert bolivia.resampling == "bilinear"
    _, valid = read(tmp_path / "out" / "bolivia.tif")
    dark = (part.max(axis=0) <= 16).mean()
    assert 0.05 < dark < 0.9
    assert 1 - valid.sum() / part[0].size == pytest.approx(dark, abs=0.02)
