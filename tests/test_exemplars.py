"""Exemplars: in a codebook that may come from anybody, and over HTTP."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from codebooks import K, make_codebook, sheet_color, write_exemplars
from fakes import fake_codebook, fake_service, open_image, write_images
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from scipy.cluster.hierarchy import fcluster
from titiler.core.factory import TilerFactory

from geocentroids_tiler.app import create_app
from geocentroids_tiler.codebook import heaviest, load_codebook, save_codebook
from geocentroids_tiler.errors import CodebookError
from geocentroids_tiler.exemplars import MAX_INDEX_BYTES, MAX_SHEET_BYTES, MAX_SHEETS_BYTES
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.tiler import GeocentroidsExtension

API = "/cog/geocentroids"
SECRET = b"secret of the server"
MISSING = {2, 9}
"""Labels of the codebook "pictured" that have no sheet."""


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    return write_exemplars(tmp_path / "sheets", [0, 3, 11])


@pytest.fixture
def saved(tmp_path: Path, sheets: Path) -> Path:
    return save_codebook(make_codebook(), tmp_path / "sample", card="", exemplars=sheets).path or tmp_path


class TestFormat:
    def test_round_trip(self, tmp_path: Path, sheets: Path) -> None:
        before = os.umask(0o022)
        try:
            extra = {"item.json": '{"name": "Ä"}', "NOTICE": "text"}
            codebook = save_codebook(make_codebook(), tmp_path / "new", card="", exemplars=sheets, extra=extra)
        finally:
            os.umask(before)
        assert codebook.path is not None
        assert codebook.exemplars is not None
        written = load_file(sheets / "sheets.safetensors")
        assert written.keys() == {"0", "3", "11"}
        for label in range(K):
            sheet = written.get(str(label))
            assert codebook.exemplars.read(label) == (None if sheet is None else sheet.tobytes())
            assert codebook.has_exemplar(label) == (sheet is not None)
        assert [image.image for image in codebook.exemplars.images] == ["a.tif", "b/c.tif"]
        assert codebook.exemplars.patches[3] == ((0, -3, 5), (1, 7, 3), (0, -3, 9))
        assert {name: (codebook.path / name).read_text(encoding="utf-8") for name in extra} == extra
        files = [file for file in codebook.path.rglob("*") if file.is_file()]
        assert {file.stat().st_mode & 0o777 for file in files} == {0o644}

    def test_digest_is_that_of_the_labels_alone(self, saved: Path, tmp_path: Path) -> None:
        bare = save_codebook(make_codebook(), tmp_path / "bare", card="")
        assert bare.exemplars is None
        assert not bare.has_exemplar(0)
        assert load_codebook(saved).digest == bare.digest

    @pytest.mark.parametrize("name", ["../item.json", "/item.json", "a/b", "..", "", "codebook.json", "exemplars"])
    def test_further_files_replace_nothing(self, tmp_path: Path, sheets: Path, name: str) -> None:
        with pytest.raises(CodebookError, match="cannot be added"):
            save_codebook(make_codebook(), tmp_path / "out" / "x", card="", exemplars=sheets, extra={name: "x"})
        assert list((tmp_path / "out").iterdir()) == []

    def test_saving_is_whole_or_not_at_all(self, tmp_path: Path, sheets: Path) -> None:
        (sheets / "index.json").unlink()
        with pytest.raises(CodebookError, match=r"index.json is missing"):
            save_codebook(make_codebook(), tmp_path / "out" / "x", card="", exemplars=sheets)
        assert list((tmp_path / "out").iterdir()) == []


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = json.loads((folder / "index.json").read_text())
        change(content)
        (folder / "index.json").write_text(json.dumps(content))

    return spoil


def add_sheet(name: str, array: NDArray[Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        sheets = load_file(folder / "sheets.safetensors")
        save_file(sheets | {name: array}, folder / "sheets.safetensors")

    return spoil


def edit_header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = (folder / "sheets.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = change(content[8 : 8 + size])
        (folder / "sheets.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])

    return spoil


def as_lists(header: bytes) -> bytes:
    """Write a header in another form that the library reads too."""
    return json.dumps({name: list(entry.values()) for name, entry in json.loads(header).items()}).encode()


def make_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def cut_off(folder: Path) -> None:
    file = folder / "sheets.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def webp(size_bytes: int) -> NDArray[np.uint8]:
    return np.frombuffer(b"RIFF....WEBP".ljust(size_bytes), np.uint8)


HOSTILE: list[tuple[Callable[[Path], object], str]] = [
    (add_sheet("12", webp(20)), "has a sheet named '12'; allowed are the labels 0 to 11"),
    (add_sheet("03", webp(20)), "has a sheet named '03'"),
    (add_sheet("../item.json", webp(20)), "has a sheet named '../item.json'"),
    (add_sheet("a\n" + 99 * "b", webp(20)), r"has a sheet named 'a\\nbbb.*\.\.\.; allowed"),
    (add_sheet("4", webp(20).astype(np.int8)), r"sheet 4 has shape \[20\] and dtype I8; allowed are 1 to 65536 bytes"),
    (add_sheet("4", webp(20)[None]), r"sheet 4 has shape \[1, 20\] and dtype U8"),
    (add_sheet("4", np.zeros((), np.uint8)), r"sheet 4 has shape \[\] and dtype U8"),
    (add_sheet("4", webp(20)[:0]), r"sheet 4 has shape \[0\] and dtype U8"),
    (add_sheet("4", webp(MAX_SHEET_BYTES + 1)), r"sheet 4 has shape \[65537\] and dtype U8"),
    (add_sheet("4", webp(20)[:11]), "sheet 4 is not WebP"),
    (add_sheet("4", np.frombuffer(b"RIFF....WAVE" + bytes(8), np.uint8)), "sheet 4 is not WebP"),
    (add_sheet("4", np.frombuffer(b"<html>..WEBP" + bytes(8), np.uint8)), "sheet 4 is not WebP"),
    (cut_off, "sheets.safetensors is not a readable safetensors file: .*not fully covered"),
    (edit_header(lambda header: header.rstrip()[:-1]), "sheets.safetensors is not a readable safetensors file"),
    (edit_header(lambda header: header.replace(b'"0"', rb'"a\nb"').replace(b"[0,", b"[1,")), r"tensor `a\\nb`"),
    (edit_header(as_lists), "sheets.safetensors is not a readable safetensors file: .list indices"),
    (lambda folder: (folder / "sheets.safetensors").write_bytes(b""), "is not a readable safetensors file"),
    (lambda folder: os.truncate(folder / "sheets.safetensors", MAX_SHEETS_BYTES + 1), "has .* bytes; allowed are"),
    (lambda folder: make_fifo(folder / "sheets.safetensors"), "sheets.safetensors is missing or not a file"),
    (lambda folder: (folder / "index.json").unlink(), "index.json is missing or not a file"),
    (lambda folder: make_fifo(folder / "index.json"), "index.json is missing or not a file"),
    (lambda folder: os.truncate(folder / "index.json", MAX_INDEX_BYTES + 1), "index.json has .* bytes; allowed are"),
    (lambda folder: (folder / "index.json").write_bytes(b"\xff{"), "not an index of exemplars: file: Invalid JSON"),
    (lambda folder: (folder / "index.json").write_text("[" * 100_000), "not an index of exemplars"),
    (edit_index(lambda index: index["images"][0].update(url="javascript:alert(1)")), r"images.0.url: String should"),
    (edit_index(lambda index: index["images"][0].update(more=1)), r"images.0.more: Extra inputs are not permitted"),
    (edit_index(lambda index: index["images"].pop()), "names image 1; allowed are 0 to 0"),
    (edit_index(lambda index: index["patches"]["3"].append([-1, 0, 0])), "names image -1; allowed are 0 to 1"),
    (edit_index(lambda index: index["patches"].update({"x": []})), "patches.x"),
]


class TestHostile:
    @pytest.mark.parametrize(("spoil", "message"), HOSTILE)
    def test_is_refused(self, saved: Path, spoil: Callable[[Path], object], message: str) -> None:
        spoil(saved / "exemplars")
        with pytest.raises(CodebookError, match=message) as caught:
            load_codebook(saved)
        assert str(saved / "exemplars") in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_the_largest_sheet(self, saved: Path) -> None:
        add_sheet("4", webp(MAX_SHEET_BYTES))(saved / "exemplars")
        exemplars = load_codebook(saved).exemplars
        assert exemplars is not None
        assert exemplars.read(4) == webp(MAX_SHEET_BYTES).tobytes()

    def test_out_of_a_cache_made_of_links(self, saved: Path, tmp_path: Path) -> None:
        for file in [file for file in saved.rglob("*") if file.is_file()]:
            blob = tmp_path / f"blob-{file.name}"
            file.rename(blob)
            file.symlink_to(blob)
        exemplars = load_codebook(saved).exemplars
        assert exemplars is not None
        assert (exemplars.read(3) or b"")[8:12] == b"WEBP"

    @pytest.mark.parametrize("name", ["3.webp", "sheets.safetensors.part"])
    def test_other_names_are_never_looked_at(self, tmp_path: Path, name: str) -> None:
        path = save_codebook(make_codebook(), tmp_path / "sample", card="").path or tmp_path
        (path / "exemplars").mkdir()
        os.mkfifo(path / "exemplars" / name)
        assert load_codebook(path).exemplars is None


@pytest.mark.parametrize("seed", range(20))
def test_heaviest_centroid_of_each_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 12))
    lookup = rng.permutation(np.concatenate([np.arange(n), rng.integers(0, n, 30)])).astype(np.uint16)
    counts = rng.integers(0, 4, len(lookup))
    members = [np.flatnonzero(lookup == i).tolist() for i in range(n)]
    assert heaviest(lookup, counts).tolist() == [max(own, key=lambda label: (counts[label], -label)) for own in members]
    assert heaviest(lookup, None).tolist() == [min(own) for own in members]


# --- HTTP ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    codebooks = tmp_path_factory.mktemp("codebooks")
    plain = fake_codebook("plain")
    save_codebook(plain, codebooks / "plain", card="")
    pictured = replace(plain, manifest=plain.manifest.model_copy(update={"name": "pictured"}))
    labels = sorted(set(range(len(plain))) - MISSING)
    sheets = write_exemplars(tmp_path_factory.mktemp("made") / "sheets", labels)
    save_codebook(pictured, codebooks / "pictured", card="", exemplars=sheets)
    root = write_images(tmp_path_factory.mktemp("images"))
    service, _ = fake_service(root, codebooks, codebook="pictured")
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service: Service) -> TestClient:
    return TestClient(create_app(service=service))


def colour_of(answer: httpx.Response) -> tuple[int, int, int]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/webp"
    picture = Image.open(io.BytesIO(answer.content))
    assert (picture.format, picture.size) == ("WEBP", (192, 48))
    colours = picture.convert("RGB").getcolors()
    assert colours is not None
    assert len(colours) == 1
    return colours[0][1]


def merged(service: Service, n: int) -> tuple[list[int], list[int]]:
    """Return, by scipy, the class of each label and the heaviest label of each class."""
    codebook = service.codebook("pictured")
    assert codebook.tree is not None
    assert codebook.counts is not None
    flat = fcluster(codebook.tree, n, "maxclust").tolist()
    order = list(dict.fromkeys(flat))
    lookup = [order.index(each) for each in flat]
    counts = codebook.counts.tolist()
    return lookup, [
        max((label for label, own in enumerate(lookup) if own == i), key=lambda label: counts[label]) for i in range(n)
    ]


def place(service: Service) -> tuple[float, float]:
    west, south, east, north = open_image(service, "whole.tif").geographic_bounds
    return (west + east) / 2, (south + north) / 2


class TestLinks:
    def test_legend(self, client: TestClient) -> None:
        classes = client.get(f"{API}/legend").json()["classes"]
        assert {item["label"] for item in classes if item["exemplar"] is None} == MISSING
        for item in classes:
            if item["exemplar"] is not None:
                assert item["exemplar"] == f"http://testserver{API}/exemplars/{item['label']}.webp"
                assert colour_of(client.get(item["exemplar"])) == sheet_color(item["label"])

    @pytest.mark.parametrize("n", [1, 6, 20])
    def test_a_merged_class_shows_its_heaviest_centroid(self, client: TestClient, service: Service, n: int) -> None:
        _, heaviest_labels = merged(service, n)
        classes = client.get(f"{API}/legend", params={"classes": n}).json()["classes"]
        for item, label in zip(classes, heaviest_labels, strict=True):
            assert (item["exemplar"] is None) == (label in MISSING)
            if item["exemplar"] is not None:
                assert f"classes={n}" in item["exemplar"]
                assert colour_of(client.get(item["exemplar"])) == sheet_color(label)
                told = client.get(item["exemplar"].replace(".webp", ".json")).json()
                assert (told["label"], told["centroid"], told["picture"]) == (item["label"], label, item["exemplar"])

    @pytest.mark.parametrize("n", [None, 8])
    def test_point(self, client: TestClient, service: Service, n: int | None) -> None:
        lon, lat = place(service)
        query = {"url": "whole.tif", "codebook": "pictured", "bidx": [1, 2, 3], "rescale": "0,255"}
        found = client.get(f"{API}/point/{lon},{lat}", params=query | ({"classes": n} if n else {})).json()
        shown = merged(service, n)[1] if n else list(range(24))
        assert len(found["neighbours"]) == 5
        for item in (found, *found["neighbours"]):
            label = shown[item["label"]]
            assert (item["exemplar"] is None) == (label in MISSING)
            if item["exemplar"] is not None:
                expected = f"{API}/exemplars/{item['label']}.webp?codebook=pictured"
                assert item["exemplar"] == f"http://testserver{expected}" + (f"&classes={n}" if n else "")
                assert colour_of(client.get(item["exemplar"])) == sheet_color(label)

    def test_point_without_data(self, client: TestClient) -> None:
        found = client.get(f"{API}/point/0,0", params={"url": "whole.tif"}).json()
        assert (found["label"], found["exemplar"]) == (None, None)

    def test_codebook_without_exemplars(self, client: TestClient, service: Service) -> None:
        classes = client.get(f"{API}/legend", params={"codebook": "plain"}).json()["classes"]
        assert {item["exemplar"] for item in classes} == {None}
        lon, lat = place(service)
        found = client.get(f"{API}/point/{lon},{lat}", params={"url": "whole.tif", "codebook": "plain"}).json()
        assert {item["exemplar"] for item in (found, *found["neighbours"])} == {None}
        for name, available in (("plain", False), ("pictured", True)):
            assert client.get(f"/geocentroids/codebooks/{name}").json()["exemplars_available"] is available

    def test_in_another_application(self, service: Service) -> None:
        app = FastAPI()
        factory = TilerFactory(router_prefix="/a/b", extensions=[GeocentroidsExtension(service=service)])
        app.include_router(factory.router, prefix="/a/b")
        client = TestClient(app, root_path="/api")
        legend = client.get("/a/b/geocentroids/legend", params={"key": "of the host"}).json()
        address = legend["classes"][3]["exemplar"]
        assert address == "http://testserver/api/a/b/geocentroids/exemplars/3.webp?key=of+the+host"
        assert colour_of(client.get(address.removeprefix("http://testserver/api"))) == sheet_color(3)


class TestAnswers:
    def test_headers(self, client: TestClient, service: Service) -> None:
        for address, media_type in (
            (f"{API}/exemplars/3.webp", "image/webp"),
            (f"{API}/exemplars/3.json", "application/json"),
        ):
            answer = client.get(address)
            assert answer.headers["content-type"] == media_type
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == service.settings.cache_control
            etag = answer.headers["etag"]
            assert etag.startswith('"')
            for sent in (etag, f'"other", {etag}', f"W/{etag}"):
                again = client.get(address, headers={"If-None-Match": sent})
                assert (again.status_code, again.content) == (304, b"")
                assert again.headers["etag"] == etag
            assert client.get(address, headers={"If-None-Match": '"other"'}).status_code == 200
            assert client.get(address.replace("/3.", "/4.")).headers["etag"] != etag

    def test_sources(self, client: TestClient) -> None:
        assert client.get(f"{API}/exemplars/3.json").json() == {
            "label": 3,
            "centroid": 3,
            "picture": f"http://testserver{API}/exemplars/3.webp",
            "images": [
                {
                    "image": "a.tif",
                    "licence": "CC BY 4.0",
                    "attribution": "Anna Ä",
                    "url": "https://anna.example/a",
                    "patches": [[-3, 5], [-3, 9]],
                },
                {"image": "b/c.tif", "licence": "", "attribution": "", "url": "", "patches": [[7, 3]]},
            ],
        }

    @pytest.mark.parametrize(
        ("path", "query", "status", "message"),
        [
            ("2.webp", {}, 404, "codebook 'pictured' has no exemplar of class 2"),
            ("2.json", {}, 404, "codebook 'pictured' has no exemplar of class 2"),
            ("24.webp", {}, 404, "no exemplar of class 24"),
            ("65534.json", {}, 404, "no exemplar of class 65534"),
            ("6.webp", {"classes": 6}, 404, "no exemplar of class 6"),
            ("3.webp", {"codebook": "plain"}, 404, "codebook 'plain' has no exemplar of class 3"),
            ("3.webp", {"codebook": "none"}, 404, "there is no codebook 'none'"),
            ("3.webp", {"classes": 99}, 400, "can be cut into 1 to 24 classes"),
            ("-1.webp", {}, 422, "label='-1'"),
            ("65535.webp", {}, 422, "label='65535'"),
            ("x.webp", {}, 422, "label='x'"),
            ("3.png", {}, 422, "format='png'"),
            ("..%2f..%2fcodebook.json", {}, 404, ""),
            ("index.json", {}, 422, "label='index'"),
        ],
    )
    def test_refused(self, client: TestClient, path: str, query: dict[str, Any], status: int, message: str) -> None:
        answer = client.get(f"{API}/exemplars/{path}", params=query)
        assert answer.status_code == status, answer.text
        if message:
            assert message in answer.json()["detail"]
            assert answer.headers["cache-control"] == "no-store"
            assert "etag" not in answer.headers

    def test_a_file_that_was_swapped(self, tmp_path: Path) -> None:
        codebook = fake_codebook("plain")
        sheets = write_exemplars(tmp_path / "sheets", [3, 4])
        path = save_codebook(codebook, tmp_path / "books" / "plain", card="", exemplars=sheets).path or tmp_path
        service, _ = fake_service(tmp_path, tmp_path / "books", codebook="plain")
        client = TestClient(create_app(service=service))
        assert client.get(f"{API}/exemplars/3.webp").status_code == 200
        file = path / "exemplars" / "sheets.safetensors"
        for spoil in (lambda: file.write_bytes(SECRET * 100), lambda: os.truncate(file, 10), file.unlink):
            spoil()
            answer = client.get(f"{API}/exemplars/3.webp")
            assert answer.status_code == 500
            assert answer.headers["cache-control"] == "no-store"
            assert SECRET not in answer.content
            assert "sheets.safetensors" in answer.json()["detail"]
        service.close()
