"""Lists of images labelled with a fake encoder, against labels by brute force and pystac's schemas."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
from fakes import FakeEncoder, brute_force, fake_service, open_image, write_codebooks
from httpd import Served, serve
from pyproj import CRS
from pystac.validation import RegisteredValidator
from rasterio.transform import Affine
from rasterio.warp import transform
from rasters import LEFT, TOP, texture, write_tif
from shapely.geometry import shape

from geocentroids_tiler.bulk.folder import LabelFolder
from geocentroids_tiler.bulk.image_list import ListedImage, read_list
from geocentroids_tiler.bulk.items import as_json, time_taken
from geocentroids_tiler.bulk.run import Report, Run
from geocentroids_tiler.bulk.workers import LocalWorkers
from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.source import ReadOptions

NAMES = ("a.tif", "b.tif", "c.tif", "d.tif")
CORE = Affine(0.25, 0, LEFT + 1.25, 0, -0.25, TOP - 0.5)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, size) in enumerate(zip(NAMES, (150, 180, 110, 130), strict=True)):
        tags = {"": {"TIFFTAG_DATETIME": "2021:05:06 07:08:09"}} if name == "b.tif" else {}
        write_tif(folder / name, texture(size, 140, seed), transform=CORE, photometric="RGB", tags=tags)
    holed = texture(160, 160, 9)
    holed[:, 50:120, 60:150] = 0
    write_tif(folder / "hole.tif", holed, transform=CORE, nodata=0, photometric="RGB")
    (folder / "broken.tif").write_bytes((folder / "a.tif").read_bytes()[:3000])
    (folder / "text.tif").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_codebooks(tmp_path_factory.mktemp("codebooks"))


@pytest.fixture
def fakes(images: Path, codebooks: Path) -> Iterator[tuple[Service, FakeEncoder]]:
    service, loader = fake_service(images, codebooks, label_cache_bytes=0, token_cache_bytes=0)
    service.engine(service.codebook(None)).result()
    yield service, loader.made["blend"]
    service.close()


def listed(folder: Path, *names: str) -> tuple[ListedImage, ...]:
    file = folder / "list.txt"
    file.write_text("\n".join(names))
    return read_list(file).images


def run(service: Service, images: tuple[ListedImage, ...], out: Path, **options: Any) -> Report:
    codebook = service.codebook(options.pop("codebook", None))
    read = options.pop("read", ReadOptions())
    classes = options.pop("classes", None)
    workers = LocalWorkers(service.engine(codebook).result(), service.remote, read, classes)
    folder = LabelFolder(out)
    with folder.writing():
        run = Run(images, folder, workers, service.remote, codebook, read, classes, progress=False, **options)
        return run.to_the_end()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def item_of(out: Path, name: str) -> dict[str, Any]:
    (file,) = out.glob(f"{Path(name).stem}-*.json")
    return dict(json.loads(file.read_text()))


def test_labels_are_those_of_brute_force(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    report = run(service, listed(images, "hole.tif", "c.tif"), tmp_path)
    assert (report.labelled, report.reused, report.failures) == (2, 0, ())
    for name in ("hole.tif", "c.tif"):
        dataset = open_image(service, name)
        expected, apart = brute_force(dataset, service.codebook(None))
        item = item_of(tmp_path, name)
        with rasterio.open(tmp_path / item["assets"]["labels"]["href"]) as raster:
            found = raster.read(1)
            assert raster.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert item["properties"]["proj:code"] == raster.crs.to_string()
            assert item["properties"]["proj:shape"] == list(raster.shape)
            assert item["properties"]["proj:transform"] == list(raster.transform)[:6]
        clear = apart > 1e-6
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(found[clear], expected[clear])
        values, counts = np.unique(found[found != NODATA_LABEL], return_counts=True)
        properties = item["properties"]
        assert properties["geocentroids:histogram"] == dict(zip(map(str, values), counts.tolist(), strict=True))
        assert properties["geocentroids:labelled_patches"] == counts.sum()
        assert properties["geocentroids:labelled_area_m2"] == pytest.approx(counts.sum() * 3.5**2, rel=0.01)
    assert (found == NODATA_LABEL).mean() < 0.2


def test_the_catalogue_is_stac(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    run(service, listed(images, *NAMES), tmp_path)
    collection = pystac.Collection.from_file(str(tmp_path / "collection.json"))
    items = list(collection.get_items())
    assert len(items) == len(NAMES)
    validator = RegisteredValidator.get_validator()
    validator.validate_core(
        json.loads((tmp_path / "collection.json").read_text()), pystac.STACObjectType.COLLECTION, "1.1.0"
    )
    codebook = service.codebook(None)
    for item in items:
        content = json.loads((tmp_path / f"{item.id}.json").read_text())
        validator.validate_core(content, pystac.STACObjectType.ITEM, "1.1.0")
        assert pystac.extensions.projection.ProjectionExtension.get_schema_uri() in item.stac_extensions
        assert item.ext.proj.code == "EPSG:32721"
        assert item.get_parent() is collection
        assert item.collection_id == collection.id
        assert item.properties["geocentroids:codebook_digest"] == codebook.digest
        assert item.properties["geocentroids:codebook"] == codebook.name
        assert item.properties["geocentroids:device"] == "fake/numpy/fp64"
        labels = item.assets["labels"]
        assert labels.roles == ["data"]
        assert labels.media_type == pystac.MediaType.COG
        path = Path(str(labels.get_absolute_href()))
        assert item.assets["labels"].ext.file.size == path.stat().st_size
        assert item.assets["image"].roles == ["visual"]
        with rasterio.open(item.assets["image"].href) as image:
            outline = shape(item.geometry)
            lon, lat = transform(image.crs, "EPSG:4326", *([value] for value in image.xy(50, 60)))
            assert outline.contains(shape({"type": "Point", "coordinates": (lon[0], lat[0])}))
            assert item.assets["image"].ext.proj.shape == list(image.shape)
        assert outline.area < 0.9999 * shape(outline.envelope).area, "the outline, not its box"
        assert item.bbox == pytest.approx(outline.bounds)
    dates = {item.properties["title"]: item.datetime for item in items}
    assert dates["b.tif"] is not None
    assert dates["b.tif"].isoformat() == "2021-05-06T07:08:09+00:00"
    assert dates["a.tif"] is None
    every = pystac.ItemCollection.from_file(str(tmp_path / "items.json"))
    assert [item.id for item in every] == [item.id for item in items] == sorted(item.id for item in items)
    west, south, east, north = collection.extent.spatial.bboxes[0]
    boxes = np.array([item.bbox for item in items])
    assert [west, south] == list(boxes[:, :2].min(axis=0))
    assert [east, north] == list(boxes[:, 2:].max(axis=0))


def test_places_that_are_out_of_the_ordinary(fakes: tuple[Service, FakeEncoder], tmp_path: Path) -> None:
    """An image across the antimeridian, and one whose CRS has no code; their items are valid STAC."""
    pixels = texture(120, 140)
    across, nameless = Affine(0.25, 0, 817_570, 0, -0.25, 8_000_000), "+proj=utm +zone=21 +south +ellps=intl +units=m"
    write_tif(tmp_path / "across.tif", pixels, crs="EPSG:32760", transform=across, gsd_m=0.25, photometric="RGB")
    write_tif(tmp_path / "nameless.tif", pixels, crs=nameless, photometric="RGB")
    out = tmp_path / "out"
    assert not run(fakes[0], listed(tmp_path, "across.tif", "nameless.tif"), out).failures
    validator = RegisteredValidator.get_validator()
    for name in ("across", "nameless"):
        validator.validate_core(item_of(out, name), pystac.STACObjectType.ITEM, "1.1.0")
    item = item_of(out, "across")
    assert item["geometry"]["type"] == "MultiPolygon"
    assert item["bbox"][0] > 179.99
    assert item["bbox"][2] < -179.99
    item = item_of(out, "nameless")
    assert item["properties"]["proj:code"] is None
    assert item["assets"]["image"]["proj:code"] is None
    stated = CRS.from_wkt(item["properties"]["proj:wkt2"])
    with rasterio.open(out / item["assets"]["labels"]["href"]) as raster:
        assert stated == CRS.from_wkt(raster.crs.to_wkt())


def test_a_second_run_computes_nothing(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, encoder = fakes
    every = listed(images, *NAMES)
    run(service, every, tmp_path)
    before = content(tmp_path)
    encoder.forget()
    report = run(service, every, tmp_path)
    assert (report.labelled, report.reused) == (0, len(NAMES))
    assert not encoder.runs
    assert content(tmp_path) == before


@pytest.mark.parametrize("harm", ["no item", "cut labels", "changed labels", "no labels", "item cut off", "left over"])
def test_what_is_not_whole_is_done_again(
    harm: str, fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path
) -> None:
    service, _ = fakes
    every = listed(images, *NAMES)
    run(service, every, tmp_path)
    before = content(tmp_path)
    item, labels = (next(tmp_path.glob(f"c-*{ending}")) for ending in (".json", ".tif"))
    if harm == "no item":
        item.unlink()
    elif harm == "cut labels":
        labels.write_bytes(labels.read_bytes()[:-10])
    elif harm == "changed labels":
        labels.write_bytes(labels.read_bytes()[:-1] + b"!")
    elif harm == "no labels":
        labels.unlink()
    elif harm == "item cut off":
        item.write_bytes(item.read_bytes()[:-100])
    else:
        (tmp_path / ".work").mkdir()
        (tmp_path / ".work" / "c.tif").write_bytes(b"half")
        (tmp_path / ".lock").touch()
    report = run(service, every, tmp_path)
    assert report.labelled == (0 if harm == "left over" else 1)
    assert content(tmp_path) == before


def test_a_changed_image_is_done_again(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    source = tmp_path / "own.tif"
    shutil.copyfile(images / "a.tif", source)
    out = tmp_path / "out"
    run(service, listed(tmp_path, "own.tif"), out)
    before = item_of(out, "own.tif")["properties"]["geocentroids:histogram"]
    shutil.copyfile(images / "b.tif", source)
    assert run(service, listed(tmp_path, "own.tif"), out).labelled == 1
    assert item_of(out, "own.tif")["properties"]["geocentroids:histogram"] != before


def test_labels_made_in_another_way_are_kept_unless_told_so(
    fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path
) -> None:
    service, _ = fakes
    every = listed(images, "a.tif", "c.tif")
    run(service, every, tmp_path)
    before = content(tmp_path)
    for other, found in (
        ({"classes": 6}, "classes None instead of 6"),
        ({"codebook": "plain"}, "codebook digest .* instead of"),
        ({"read": ReadOptions(bidx=(3, 2, 1))}, r"bidx None instead of \(3, 2, 1\)"),
        ({"read": ReadOptions(rescale=(0, 100))}, r"rescale None instead of \(0.0, 100.0\)"),
    ):
        with pytest.raises(InputError, match=f"'a.tif' with {found}.*--overwrite"):
            run(service, every, tmp_path, **other)
        assert content(tmp_path) == before
    assert run(service, every, tmp_path, classes=6, overwrite=True).labelled == 2
    item = item_of(tmp_path, "a.tif")
    with rasterio.open(tmp_path / item["assets"]["labels"]["href"]) as raster:
        assert raster.tags()["GEOCENTROIDS_CLASSES"] == "6"
        assert set(np.unique(raster.read(1))) <= {*range(6), NODATA_LABEL}
    assert (
        item["properties"]["geocentroids:histogram"]
        == json.loads(before[f"{item['id']}.json"])["properties"]["geocentroids:histogram"]
    ), "of the codebook's labels all the same"
    assert run(service, every, tmp_path, classes=6, overwrite=True).reused == 2


def test_failures_are_listed_and_tried_again(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    names = ("a.tif", "missing.tif", "text.tif", "s3://bucket/x.tif", "https://user:secret@host/x.tif", "c.tif")
    report = run(service, listed(images, *names), tmp_path)
    assert report.labelled == 2
    reasons = [failure.reason for failure in report.failures]
    assert "missing.tif' " in reasons[0] + " "
    assert "cannot open" in reasons[1]
    assert "GEOCENTROIDS_SOURCE_BUCKETS" in reasons[2]
    assert "credentials" in reasons[3]
    listing = json.loads((tmp_path / "failures.json").read_text())["failures"]
    assert [entry["line"] for entry in listing] == [2, 3, 4, 5]
    assert [entry["reason"] for entry in listing] == reasons
    assert "secret" not in " ".join(reasons)
    shutil.copyfile(images / "b.tif", images / "missing.tif")
    try:
        report = run(service, listed(images, *names), tmp_path)
    finally:
        (images / "missing.tif").unlink()
    assert (report.labelled, report.reused, len(report.failures)) == (1, 2, 3)


def test_an_image_that_breaks_off_leaves_the_others(
    fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path
) -> None:
    service, encoder = fakes
    (failure,) = run(service, listed(images, "broken.tif", "c.tif"), tmp_path).failures
    assert failure.image.name == "broken.tif"
    assert sorted(path.stem[:2] for path in tmp_path.glob("*.tif")) == ["c-"]
    encoder.forget()
    run(service, listed(images, "c.tif"), tmp_path / "whole")
    encoder.poison = set(list(encoder.encoded)[:1])
    (failure,) = run(service, listed(images, "c.tif"), tmp_path / "other").failures
    assert failure.reason == "unexpected PoisonError: poisoned"
    assert not list((tmp_path / "other").glob("*.tif"))


def test_every_image_failed(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    report = run(fakes[0], listed(images, "text.tif"), tmp_path)
    assert len(report.failures) == 1
    assert set(content(tmp_path)) == {"failures.json"}


def test_two_images_are_in_work_at_once(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    seen: dict[str, int] = {}
    codebook = service.codebook(None)
    workers = LocalWorkers(service.engine(codebook).result(), service.remote, ReadOptions(), None)
    most, original = 0, workers.one

    def one(*arguments: Any) -> Any:
        nonlocal most
        seen[arguments[0].image.name] = 1
        most = max(most, sum(seen.values()))
        try:
            return original(*arguments)
        finally:
            seen[arguments[0].image.name] = 0

    workers.one = one  # type: ignore[method-assign]
    folder, every = LabelFolder(tmp_path), listed(images, *NAMES)
    with folder.writing():
        Run(every, folder, workers, service.remote, codebook, ReadOptions(), progress=False).to_the_end()
    assert most == 2


def test_remote_images(fakes: tuple[Service, FakeEncoder], images: Path, tmp_path: Path) -> None:
    service, _ = fakes
    with serve() as server:
        server.files["/a.tif"] = Served((images / "a.tif").read_bytes(), {"ETag": '"1"'})
        every = listed(tmp_path, f"{server.url}/a.tif", f"{server.url}/nothing.tif")
        report = run(service, every, tmp_path / "out")
    assert [failure.image.name for failure in report.failures] == [f"{server.url}/nothing.tif"]
    item = item_of(tmp_path / "out", "a.tif")
    assert item["assets"]["image"]["href"] == f"{server.url}/a.tif"
    run(service, listed(images, "a.tif"), tmp_path / "local")
    local = item_of(tmp_path / "local", "a.tif")
    assert item["properties"]["geocentroids:histogram"] == local["properties"]["geocentroids:histogram"]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        LabelFolder(tmp_path).writing(),
        pytest.raises(InputError, match="another process writes to"),
        LabelFolder(tmp_path).writing(),
    ):
        pass
    (tmp_path / "collection.json").write_text(as_json({"type": "Collection", "id": "mine"}))
    with pytest.raises(InputError, match="collection of something else"), LabelFolder(tmp_path).writing():
        pass
    assert set(content(tmp_path)) == {"collection.json"}


def test_lists(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(
        "\ufeff# images\n\na.tif\n  sub/../a.tif \r\nhttps://x.org/a.tif\n/b c.tif\na.tif\n", encoding="utf-8"
    )
    found = read_list(file)
    assert [(image.line, image.url) for image in found.images] == [
        (3, str(tmp_path / "a.tif")),
        (5, "https://x.org/a.tif"),
        (6, "/b c.tif"),
    ]
    assert [(again.line, again.first) for again in found.repeated] == [(4, 3), (7, 3)]
    assert [image.is_file for image in found.images] == [True, False, True]
    ids = [image.id for image in found.images]
    assert len(set(ids)) == 3
    assert [name.rpartition("-")[0] for name in ids] == ["a", "a", "b_c"]
    for text in ("", "\n # nothing\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="names no image"):
            read_list(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_list(file)


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("2021:05:06 07:08:09", "2021-05-06T07:08:09+00:00"),
        ("2021:13:06 07:08:09", None),
        ("0000:00:00 00:00:00", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_dates(tag: str | None, expected: str | None) -> None:
    found = time_taken(tag)
    assert (found and found.isoformat()) == expected
