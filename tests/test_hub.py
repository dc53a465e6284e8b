from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import httpx
import huggingface_hub
import numpy as np
import pytest
from codebooks import make_codebook, make_manifest, write_exemplars
from hub_standin import COMMIT, StandIn, git_blob, serve_stand_in
from huggingface_hub import file_download
from onnx_files import with_external_weight, write_encoder
from safetensors.numpy import load

from geocentroids_tiler import download, hub, importing
from geocentroids_tiler.codebook import (
    AssignmentSection,
    EncoderSection,
    PreprocessSection,
    file_sha256,
    load_codebook,
    save_codebook,
)
from geocentroids_tiler.download import Digest, Retry, digest_problem, fetch_file
from geocentroids_tiler.errors import CodebookError, CodebookNotFoundError, DownloadError, InputError
from geocentroids_tiler.hub import Remotes, find_codebook, import_codebook, list_codebooks, pull_codebook
from geocentroids_tiler.recipes import RECIPES, SOUTHAMERICA_6K

QUICK = Retry(attempts=3, wait_s=0.0, timeout_s=5)
PRE = PreprocessSection(gsd_m=0.25, window_patches=16, margin_patches=3, stride_patches=10)
WEIGHTS = b"weights" * 5000


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test reach anything but the loopback interface."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert address[0] in ("127.0.0.1", "::1"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)  # the grain of the hub client's resume
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with serve_stand_in() as stand_in:
        yield stand_in
        huggingface_hub.close_session()


@pytest.fixture
def remotes(server: StandIn, tmp_path: Path) -> Remotes:
    return Remotes(
        github_url=server.url,
        hub_endpoint=server.url,
        hub_cache_dir=tmp_path / "hub-cache",
        retry=QUICK,
        progress=False,
    )


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return tmp_path / "library"


def installed(library: Path, name: str = "sample", **changes: Any) -> Path:
    return save_codebook(make_codebook(name, **changes), library / name, card="# Sample\n").path or library


# --- find and list ---------------------------------------------------------------------------------------------------


def test_finds_installed_by_name(library: Path) -> None:
    installed(library)
    assert find_codebook("sample", library).name == "sample"


def test_embedded_wins_over_installed(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_DIR", tmp_path / "embedded")
    built_in = installed(tmp_path / "embedded", "nano", seed=1)
    installed(library, "nano", seed=2)
    assert find_codebook("nano", library).path == built_in
    nano, _, hidden = list_codebooks(library)
    assert (nano.name, nano.origin, nano.error) == ("nano", "built in", None)
    assert (hidden.path, hidden.error is not None) == (library / "nano", True)


def test_not_found_says_what_there_is_and_how_to_get_it(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_DIR", tmp_path / "none")
    with pytest.raises(CodebookNotFoundError, match=r"'x'.*none is installed"):
        find_codebook("x", library)
    installed(library)
    with pytest.raises(CodebookNotFoundError, match=r"'x' \(installed: sample\)"):
        find_codebook("x", library)
    for name in ("southamerica-6k", "owner/name"):
        with pytest.raises(CodebookNotFoundError, match=f"geocentroids codebook pull {name} .*sample"):
            find_codebook(name, library)


@pytest.mark.parametrize("form", ["{path}", "../library/sample", "./sample", "library/sample", "sample/", "~", ""])
def test_a_client_never_opens_a_path(library: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = installed(library)
    monkeypatch.chdir(library.parent)
    with pytest.raises(CodebookNotFoundError):
        find_codebook(form.format(path=path), library)


def test_the_operator_may_name_a_path(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = installed(tmp_path / "elsewhere")
    path.rename(tmp_path / "other-name")
    assert find_codebook(str(tmp_path / "other-name"), library, allow_path=True).name == "sample"
    monkeypatch.chdir(tmp_path)
    assert find_codebook("./other-name", library, allow_path=True).name == "sample"
    with pytest.raises(CodebookNotFoundError):
        find_codebook("./nothing", library, allow_path=True)


def test_directory_must_have_the_name_of_its_codebook(library: Path) -> None:
    installed(library).rename(library / "renamed")
    with pytest.raises(CodebookError, match=r"'sample'.*'renamed' only"):
        find_codebook("renamed", library)


def test_list_shows_broken_and_available(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "EMBEDDED_DIR", tmp_path / "none")
    path = installed(library)
    (library / "broken").mkdir()
    (library / ".partial").mkdir()
    (library / "notes.txt").write_text("not a codebook")
    broken, sample, known = list_codebooks(library)
    assert (broken.name, broken.origin) == ("broken", "installed")
    assert broken.error is not None
    assert "codebook.json is missing" in broken.error
    assert sample.size_bytes == sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert (sample.classes, sample.dim, sample.metric, sample.gsd_m) == (12, 5, "inner_product", 0.25)
    assert (sample.version, sample.title, sample.encoder, sample.path) == ("1", "Sample", "owner/encoder", path)
    assert (known.name, known.origin, known.classes, known.path) == ("southamerica-6k", "available", 6144, None)


def test_list_without_a_folder(tmp_path: Path) -> None:
    assert "southamerica-6k" in [entry.name for entry in list_codebooks(tmp_path / "none")]


# --- one file --------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000
SHA = Digest(git_blob=git_blob(CONTENT))


def get(server: StandIn, target: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {"digest": SHA, "max_bytes": 2**20, "retry": QUICK, "progress": False}
    return fetch_file(f"{server.url}/file", target, **(options | changes))


def test_fetches_whole(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    target = get(server, tmp_path / "new" / "file")
    assert target.read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["file"]
    assert "Range" not in server.asked("/file")[0]
    get(server, target)
    assert len(server.requests) == 1, "what is there and right is not fetched again"


def test_interrupted_transfer_resumes_in_the_same_call(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.cut_after["/file"] = [300_000, 200_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    _, second, third = server.asked("/file")
    assert second["Range"] == "bytes=300000-"
    assert third["Range"] == "bytes=500000-"
    assert third["If-Range"].startswith('"')


def test_interrupted_transfer_resumes_in_the_next_call(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.cut_after["/file"] = [300_000]
    with pytest.raises(DownloadError, match=r"broke off after 300000 bytes.*run the same command again"):
        get(server, tmp_path / "file", retry=Retry(attempts=1, wait_s=0))
    assert not (tmp_path / "file").exists()
    assert (tmp_path / "file.part").stat().st_size == 300_000
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked("/file")[1]["Range"] == "bytes=300000-"


def test_changed_content_starts_again(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = b"old" * 200_000
    server.cut_after["/file"] = [300_000]
    with pytest.raises(DownloadError):
        get(server, tmp_path / "file", retry=Retry(attempts=1, wait_s=0))
    server.raw["/file"] = CONTENT
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_without_etag_starts_again(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"], server.etags = CONTENT, False
    server.cut_after["/file"] = [300_000]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert "Range" not in server.asked("/file")[1]


def test_complete_part_is_not_fetched_again(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.cut_after["/file"] = [300_000]
    with pytest.raises(DownloadError):
        get(server, tmp_path / "file", retry=Retry(attempts=1, wait_s=0))
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_overlong_part_starts_again(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.cut_after["/file"] = [300_000]
    with pytest.raises(DownloadError):
        get(server, tmp_path / "file", retry=Retry(attempts=1, wait_s=0))
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.corrupt.add("/file")
    with pytest.raises(DownloadError, match=r"not the expected file: it has git object id [0-9a-f]{40} instead of"):
        get(server, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_refusal_is_one_sentence(server: StandIn, tmp_path: Path, status: int) -> None:
    server.raw["/file"] = CONTENT
    server.status["/file"] = [status]
    with pytest.raises(DownloadError, match=f"/file answered with status {status}$"):
        get(server, tmp_path / "file")
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_busy_server_is_asked_again(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    server.status["/file"] = [503, 429]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    server.status["/file"] = [503, 503, 503]
    with pytest.raises(DownloadError, match=r"the server answered 503"):
        get(server, tmp_path / "again")


def test_too_large_is_refused(server: StandIn, tmp_path: Path) -> None:
    server.raw["/file"] = CONTENT
    with pytest.raises(DownloadError, match=r"has 1024000 bytes; at most 1000 are accepted"):
        get(server, tmp_path / "file", max_bytes=1000)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_connection_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be reached: .*refused"):
        fetch_file(f"http://127.0.0.1:{free_port()}/file", tmp_path / "file", digest=SHA, max_bytes=9, retry=QUICK)


@pytest.mark.parametrize(
    ("hops", "refused"),
    [
        (["https://a.test/x", "https://b.test/x"], None),
        (["https://a.test/x", "http://b.test/x"], "http://b.test/x"),
        (["https://a.test/x", "https://b.test/x", "http://a.test/x"], "http://a.test/x"),
        (["http://a.test/x", "https://b.test/x"], None),
        (["http://a.test/x", "http://b.test/x"], None),
    ],
)
def test_redirect_from_https_to_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hops: list[str], refused: str | None
) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        following = hops[len(asked) :]
        return (
            httpx.Response(302, headers={"Location": following[0]}) if following else httpx.Response(200, content=b"x")
        )

    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **kw: client(transport=httpx.MockTransport(answer), **kw))
    digest = Digest(sha256=hashlib.sha256(b"x").hexdigest())
    if refused is None:
        assert fetch_file(hops[0], tmp_path / "x", digest=digest, max_bytes=9, retry=QUICK).read_bytes() == b"x"
        assert asked == hops
        return
    with pytest.raises(DownloadError, match=rf"{hops[0]} redirects to {refused}; from https only https is followed"):
        fetch_file(hops[0], tmp_path / "x", digest=digest, max_bytes=9, retry=QUICK)
    assert asked == hops[:-1], "what is refused is not asked for"


@pytest.mark.parametrize("url", ["not a url", "ftp://127.0.0.1/x", "http://[::1"])
def test_odd_urls(tmp_path: Path, url: str) -> None:
    with pytest.raises(DownloadError):
        fetch_file(url, tmp_path / "file", digest=SHA, max_bytes=9, retry=QUICK)


def test_silent_server(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file"
        with pytest.raises(DownloadError, match=r"broke off after 0 bytes: timed out"):
            fetch_file(
                url, tmp_path / "file", digest=SHA, max_bytes=9, retry=Retry(attempts=2, wait_s=0, timeout_s=0.1)
            )


def test_disk_full(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.raw["/file"] = CONTENT
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(DownloadError, match=r"has 5 bytes free; 1024000 are needed"):
        get(server, tmp_path / "file")
    monkeypatch.undo()
    full = Path("/dev/full")
    if full.exists():
        (tmp_path / "file.part").symlink_to(full)
        with pytest.raises(DownloadError, match=r"cannot be written: No space left on device"):
            get(server, tmp_path / "file")


def test_folder_that_cannot_be_made(server: StandIn, tmp_path: Path) -> None:
    (tmp_path / "blocker").write_text("")
    with pytest.raises(DownloadError, match=r"blocker.* cannot be written"):
        get(server, tmp_path / "blocker" / "file")


def test_published_colour_map_has_the_pinned_digests() -> None:
    path = Path(__file__).parents[1].parent / "shared" / "reference" / "color_map_rgb_6k.npy"
    if not path.is_file():
        pytest.skip("the published colour map is not beside this checkout")
    assert digest_problem(path, SOUTHAMERICA_6K.colors.digest) is None


# --- pull: the known codebook ----------------------------------------------------------------------------------------


@pytest.fixture
def published(server: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Serve small arrays in place of the published ones, pinned the same way."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "c.npy", rng.standard_normal((40, 768)).astype(np.float16))
    np.save(tmp_path / "m.npy", rng.integers(0, 256, (40, 3), dtype=np.uint8))
    centroids, colors = (tmp_path / "c.npy").read_bytes(), (tmp_path / "m.npy").read_bytes()
    recipe = replace(
        SOUTHAMERICA_6K,
        centroids=replace(SOUTHAMERICA_6K.centroids, digest=Digest(git_blob=git_blob(centroids))),
        colors=replace(SOUTHAMERICA_6K.colors, digest=Digest(sha256=file_sha256(tmp_path / "m.npy"))),
    )
    monkeypatch.setitem(RECIPES, recipe.name, recipe)
    base = f"/{recipe.repository}/{recipe.commit}"
    server.raw |= {f"{base}/centroids_6k.npy": centroids, f"{base}/color_map_rgb_6k.npy": colors}
    server.repos["facebook/dinov2-with-registers-base"] = {
        "config.json": b'{"model_type": "dinov2_with_registers"}',
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"a pickle",
        "README.md": b"card",
    }
    return server


CENTROIDS_PATH = f"/{SOUTHAMERICA_6K.repository}/{SOUTHAMERICA_6K.commit}/centroids_6k.npy"


def test_pulls_the_known_codebook(published: StandIn, remotes: Remotes, library: Path) -> None:
    codebook = pull_codebook("southamerica-6k", library, remotes=remotes)
    manifest = codebook.manifest
    assert codebook.path == library / "southamerica-6k"
    assert (codebook.centroids.shape, codebook.centroids.dtype) == ((40, 768), np.float16)
    assert manifest.encoder == EncoderSection(
        source="facebook/dinov2-with-registers-base",
        revision=COMMIT,
        architecture="dinov2_with_registers",
        dim=768,
        register_tokens=4,
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
    )
    assert manifest.preprocess == PreprocessSection(
        gsd_m=0.21875, resampling="cubic", window_patches=16, margin_patches=3, stride_patches=5
    )
    assert manifest.assignment == AssignmentSection(metric="inner_product")
    assert manifest.licence == "MIT"
    assert manifest.training["commit"] == SOUTHAMERICA_6K.commit
    assert codebook.path is not None
    assert "OpenAerialMap" in (codebook.path / "README.md").read_text()
    assert {path.name for path in codebook.path.iterdir()} == {"codebook.json", "arrays.safetensors", "README.md"}
    assert list((library / ".partial").iterdir()) == []
    assert find_codebook("southamerica-6k", library).digest == codebook.digest
    fetched = {path.rsplit("/", 1)[1] for _, path, _ in published.requests if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors"}, "never a pickle"


def test_pulling_again_needs_no_network(published: StandIn, remotes: Remotes, library: Path) -> None:
    first = pull_codebook("southamerica-6k", library, remotes=remotes)
    published.requests.clear()
    assert pull_codebook("southamerica-6k", library, remotes=remotes).digest == first.digest
    assert published.requests == []
    pull_codebook("southamerica-6k", library, remotes=remotes, force=True)
    assert published.asked(CENTROIDS_PATH)


def test_pulling_again_brings_back_a_lost_encoder(published: StandIn, remotes: Remotes, library: Path) -> None:
    pull_codebook("southamerica-6k", library, remotes=remotes)
    assert remotes.hub_cache_dir is not None
    shutil.rmtree(remotes.hub_cache_dir)
    pull_codebook("southamerica-6k", library, remotes=remotes)
    assert list(remotes.hub_cache_dir.rglob("model.safetensors"))


def test_force_replaces_a_broken_one(published: StandIn, remotes: Remotes, library: Path) -> None:
    (library / "southamerica-6k").mkdir(parents=True)
    with pytest.raises(CodebookError, match=r"codebook.json is missing.*--force"):
        pull_codebook("southamerica-6k", library, remotes=remotes)
    assert len(pull_codebook("southamerica-6k", library, remotes=remotes, force=True)) == 40


def test_interrupted_pull_goes_on(published: StandIn, remotes: Remotes, library: Path) -> None:
    published.cut_after[CENTROIDS_PATH] = [10_000]
    with pytest.raises(DownloadError, match=r"broke off"):
        pull_codebook("southamerica-6k", library, remotes=replace(remotes, retry=Retry(attempts=1, wait_s=0)))
    assert [entry.name for entry in list_codebooks(library) if entry.origin == "installed"] == []
    pull_codebook("southamerica-6k", library, remotes=remotes)
    assert published.asked(CENTROIDS_PATH)[-1]["Range"] == "bytes=10000-"
    assert len(published.asked(CENTROIDS_PATH.replace("centroids_6k", "color_map_rgb_6k"))) == 1, (
        "kept from the first time"
    )


def test_interrupted_encoder_goes_on(published: StandIn, remotes: Remotes, library: Path) -> None:
    path = f"/facebook/dinov2-with-registers-base/resolve/{COMMIT}/model.safetensors"
    published.cut_after[path] = [10_000]
    pull_codebook("southamerica-6k", library, remotes=remotes)
    assert [headers.get("Range") for headers in published.asked(path)] == [None, "bytes=10000-"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda server: server.corrupt.add(CENTROIDS_PATH), "centroids_6k.npy is not the expected file"),
        (lambda server: server.raw.pop(CENTROIDS_PATH), "centroids_6k.npy answered with status 404"),
        (lambda server: server.repos.clear(), "dinov2-with-registers-base does not exist"),
        (
            lambda server: server.repos["facebook/dinov2-with-registers-base"].pop("model.safetensors"),
            "has no model.safetensors",
        ),
        (
            lambda server: server.corrupt.add(
                f"/facebook/dinov2-with-registers-base/resolve/{COMMIT}/model.safetensors"
            ),
            "model.safetensors of hub repository .* is not the expected file: it has SHA-256",
        ),
    ],
)
def test_failed_pull_installs_nothing(
    published: StandIn, remotes: Remotes, library: Path, spoil: Any, message: str
) -> None:
    spoil(published)
    with pytest.raises(DownloadError, match=message) as caught:
        pull_codebook("southamerica-6k", library, remotes=remotes)
    assert "\n" not in str(caught.value)
    assert not (library / "southamerica-6k").exists()
    with pytest.raises(CodebookNotFoundError):
        find_codebook("southamerica-6k", library)


def test_failed_pull_keeps_the_installed_one(published: StandIn, remotes: Remotes, library: Path) -> None:
    before = pull_codebook("southamerica-6k", library, remotes=remotes)
    published.corrupt.add(CENTROIDS_PATH)
    with pytest.raises(DownloadError):
        pull_codebook("southamerica-6k", library, remotes=remotes, force=True)
    assert find_codebook("southamerica-6k", library).digest == before.digest


def test_failed_move_keeps_the_installed_one(
    published: StandIn, remotes: Remotes, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pull_codebook("southamerica-6k", library, remotes=remotes)
    move = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "southamerica-6k" and Path(target) == library / "southamerica-6k":
            raise OSError(28, "No space left on device", str(target))
        return move(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(DownloadError, match=r"No space left on device"):
        pull_codebook("southamerica-6k", library, remotes=remotes, force=True)
    assert find_codebook("southamerica-6k", library).digest == before.digest


def test_hub_refuses_connection(published: StandIn, remotes: Remotes, library: Path) -> None:
    with pytest.raises(DownloadError, match=r"facebook/dinov2-with-registers-base cannot be fetched: .*refused"):
        pull_codebook(
            "southamerica-6k", library, remotes=replace(remotes, hub_endpoint=f"http://127.0.0.1:{free_port()}")
        )


# --- pull: repositories in format 1 ----------------------------------------------------------------------------------


def publish(
    server: StandIn, tmp_path: Path, name: str = "sample", repo_id: str = "Owner/Sample", **changes: Any
) -> Path:
    """Put a codebook and its encoder on the server."""
    path = tmp_path / f"made-{len(server.repos)}" / name
    exemplars = write_exemplars(tmp_path / f"exemplars-{len(server.repos)}", [0, 3])
    save_codebook(
        make_codebook(name, **changes),
        path,
        card="# Sample\n",
        exemplars=exemplars,
        extra={"item.json": json.dumps({"id": name})},
    )
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    files |= {"exemplars/0.webp": b"webp", "weights.pkl": b"a pickle", ".gitattributes": b"", "names/notes.txt": b"x"}
    server.repos[repo_id] = files
    server.repos["owner/encoder"] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    return path


def test_pulls_a_repository(server: StandIn, remotes: Remotes, library: Path, tmp_path: Path) -> None:
    original = load_codebook(publish(server, tmp_path))
    codebook = pull_codebook("Owner/Sample", library, remotes=remotes)
    assert codebook.path == library / "sample"
    np.testing.assert_array_equal(codebook.centroids, original.centroids)
    assert codebook.names == original.names
    assert codebook.manifest.encoder.revision == COMMIT, "the encoder is pinned"
    files = {str(file.relative_to(codebook.path)) for file in codebook.path.rglob("*") if file.is_file()}
    assert files == {
        "codebook.json",
        "arrays.safetensors",
        "README.md",
        "origin.json",
        "item.json",
        "exemplars/sheets.safetensors",
        "exemplars/index.json",
        "names/labels.json",
        "names/classes-4.json",
    }
    assert json.loads((codebook.path / "item.json").read_text()) == {"id": "sample"}
    assert codebook.exemplars is not None
    published = load(server.repos["Owner/Sample"]["exemplars/sheets.safetensors"])
    assert codebook.exemplars.read(3) == published["3"].tobytes()
    assert find_codebook("Owner/Sample", library).digest == codebook.digest
    assert find_codebook("sample", library).digest == codebook.digest
    origin = json.loads((codebook.path / "origin.json").read_text())
    assert (origin["repository"], origin["commit"]) == ("Owner/Sample", COMMIT)
    assert set(origin["sha256"]) == files - {"origin.json"}
    for file, digest in origin["sha256"].items():
        assert digest == hashlib.sha256(server.repos["Owner/Sample"][file]).hexdigest(), "as published"
    assert list((library / ".partial").iterdir()) == []
    for name in ("Owner/Sample", "sample"):
        assert pull_codebook(name, library, remotes=remotes, force=True).digest == codebook.digest


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_pull_says_which_commit_it_takes(
    server: StandIn,
    remotes: Remotes,
    library: Path,
    tmp_path: Path,
    revision: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(server, tmp_path)
    codebook = pull_codebook("Owner/Sample", library, revision=revision, remotes=replace(remotes, progress=True))
    said = capsys.readouterr().err
    assert f"owner/encoder: main is commit {COMMIT}" in said
    assert (f"Owner/Sample: main is commit {COMMIT}" in said) == (revision != COMMIT)
    assert codebook.manifest.encoder.revision == COMMIT
    taken = [path for _, path, _ in server.requests if "/resolve/" in path]
    assert taken
    assert all(f"/resolve/{COMMIT}/" in path for path in taken), "files are asked for by commit, not by branch"


def test_repository_with_embedded_encoder(server: StandIn, remotes: Remotes, library: Path, tmp_path: Path) -> None:
    publish(server, tmp_path)
    onnx = write_encoder(tmp_path / "encoder.onnx")
    section = EncoderSection(source="encoder.onnx", architecture="x", dim=5)
    path = tmp_path / "embedded"
    save_codebook(make_codebook(encoder=section), path, card="", encoder=onnx)
    server.repos["a/b"] = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    codebook = pull_codebook("a/b", library, remotes=remotes)
    assert codebook.encoder_path is not None
    assert codebook.manifest.encoder.sha256 == file_sha256(onnx)
    assert codebook.path is not None
    written = json.loads((codebook.path / "codebook.json").read_text())
    assert written["encoder"]["sha256"] == file_sha256(onnx), "the digest is pinned"


@pytest.mark.parametrize("source", ["encoder.onnx", "owner/encoder"])
def test_repository_with_an_encoder_in_two_files(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path, source: str
) -> None:
    publish(server, tmp_path)
    path = tmp_path / "embedded"
    encoder = write_encoder(tmp_path / "encoder.onnx", with_external_weight())
    section = EncoderSection(source=source, architecture="x", dim=5)
    save_codebook(make_codebook(encoder=section), path, card="", encoder=encoder)
    server.repos["a/b"] = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    with pytest.raises(CodebookError, match=r"repository a/b .*encoder.onnx: keeps 'weight' in another file"):
        pull_codebook("a/b", library, remotes=remotes)
    assert not (library / "sample").exists()
    assert not list((library / ".partial").iterdir())


def test_interrupted_repository_goes_on(server: StandIn, remotes: Remotes, library: Path, tmp_path: Path) -> None:
    publish(server, tmp_path)
    path = f"/Owner/Sample/resolve/{COMMIT}/arrays.safetensors"
    server.cut_after[path] = [100]
    pull_codebook("Owner/Sample", library, remotes=remotes)
    assert [headers.get("Range") for headers in server.asked(path)] == [None, "bytes=100-"]


def test_failed_encoder_keeps_what_was_fetched(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path
) -> None:
    publish(server, tmp_path)
    encoder = server.repos.pop("owner/encoder")
    with pytest.raises(DownloadError, match=r"owner/encoder does not exist"):
        pull_codebook("Owner/Sample", library, remotes=remotes)
    assert not (library / "sample").exists()
    server.repos["owner/encoder"] = encoder
    pull_codebook("Owner/Sample", library, remotes=remotes)
    assert len(server.asked(f"/Owner/Sample/resolve/{COMMIT}/arrays.safetensors")) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"arrays.safetensors": None}, DownloadError, "has no arrays.safetensors"),
        ({"codebook.json": b"{}"}, CodebookError, "format None"),
        ({"arrays.safetensors": b"junk"}, CodebookError, "not a readable safetensors"),
        ({"names/../../x.json": b"{}"}, DownloadError, "'names/../../x.json'; such names are refused"),
        ({"names/a b.json": b"{}"}, DownloadError, "such names are refused"),
        ({"exemplars/sheets.safetensors": b"junk"}, CodebookError, "sheets.safetensors is not a readable safetensors"),
        ({"exemplars/index.json": None}, CodebookError, "index.json is missing"),
    ],
)
def test_bad_repository_installs_nothing(
    server: StandIn,
    remotes: Remotes,
    library: Path,
    tmp_path: Path,
    change: dict[str, bytes | None],
    error: type[Exception],
    message: str,
) -> None:
    publish(server, tmp_path)
    for path, content in change.items():
        if content is None:
            del server.repos["Owner/Sample"][path]
        else:
            server.repos["Owner/Sample"][path] = content
    with pytest.raises(error, match=message):
        pull_codebook("Owner/Sample", library, remotes=remotes)
    assert [path.name for path in library.rglob("*") if path.is_dir() and path.name == "sample"] == []


@pytest.mark.parametrize("source", ["/etc", "../elsewhere", "~/model", "C:\\model", "a/b/c"])
def test_repository_may_not_name_a_local_encoder(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path, source: str
) -> None:
    publish(server, tmp_path, encoder=EncoderSection(source=source, architecture="x", dim=5))
    with pytest.raises(CodebookError, match=r"allowed are encoder.onnx and hub ids"):
        pull_codebook("Owner/Sample", library, remotes=remotes)


def test_repository_may_not_take_a_name(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "EMBEDDED_DIR", tmp_path / "embedded")
    installed(tmp_path / "embedded", "nano")
    publish(server, tmp_path, "nano", "evil/nano")
    publish(server, tmp_path, "southamerica-6k", "evil/southamerica")
    publish(server, tmp_path, "sample", "evil/sample")
    installed(library, "sample", seed=5)
    for force in (False, True):
        with pytest.raises(InputError, match=r"name of a built-in"):
            pull_codebook("evil/nano", library, remotes=remotes, force=force)
    with pytest.raises(InputError, match=r"another codebook"):
        pull_codebook("evil/southamerica", library, remotes=remotes)
    with pytest.raises(InputError, match=r"'sample' is installed"):
        pull_codebook("evil/sample", library, remotes=remotes)
    assert pull_codebook("evil/sample", library, remotes=remotes, force=True).name == "sample"


def test_encoder_other_than_the_codebook_was_made_with(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path
) -> None:
    section = EncoderSection(source="owner/encoder", architecture="x", dim=5, sha256="0" * 64)
    publish(server, tmp_path, encoder=section)
    with pytest.raises(DownloadError, match=f"the codebook allows {'0' * 64} only"):
        pull_codebook("Owner/Sample", library, remotes=remotes)


def test_unknown_revision_and_repository(server: StandIn, remotes: Remotes, library: Path, tmp_path: Path) -> None:
    publish(server, tmp_path)
    with pytest.raises(DownloadError, match=r"Owner/Sample has no such revision"):
        pull_codebook("Owner/Sample", library, revision="gone", remotes=remotes)
    with pytest.raises(DownloadError, match=r"Owner/Other does not exist"):
        pull_codebook("Owner/Other", library, remotes=remotes)


def test_too_large_repository(
    server: StandIn, remotes: Remotes, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(server, tmp_path)
    monkeypatch.setattr(hub, "MAX_CODEBOOK_BYTES", 1000)
    with pytest.raises(DownloadError, match=r"at most 1000 are accepted"):
        pull_codebook("Owner/Sample", library, remotes=remotes)
    assert not [path for _, path, _ in server.requests if "/resolve/" in path]


@pytest.mark.parametrize("name", ["unknown", "../x", "a/b/c", "https://example.org/x", ""])
def test_names_that_cannot_be_pulled(library: Path, remotes: Remotes, name: str) -> None:
    with pytest.raises(InputError, match=r"neither a codebook known by name"):
        pull_codebook(name, library, remotes=remotes)


# --- import ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[Path, Path]:
    codebook = make_codebook()
    np.save(tmp_path / "centroids.npy", codebook.centroids)
    np.save(tmp_path / "colors.npy", codebook.colors)
    return tmp_path / "centroids.npy", tmp_path / "colors.npy"


def do_import(arrays: tuple[Path, Path], library: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "name": "mine",
        "encoder": "owner/encoder",
        "preprocess": PRE,
        "codebooks_dir": library,
        **changes,
    }
    return import_codebook(*arrays, **options)


def test_imports(arrays: tuple[Path, Path], library: Path) -> None:
    codebook = do_import(arrays, library, metric="cosine", title="Mine", training={"images": 2})
    np.testing.assert_array_equal(codebook.centroids, np.load(arrays[0]))
    np.testing.assert_array_equal(codebook.colors, np.load(arrays[1]))
    assert codebook.manifest.title == "Mine"
    assert codebook.manifest.assignment.metric == "cosine"
    assert codebook.manifest.encoder.architecture == "dinov2_with_registers"
    assert find_codebook("mine", library).digest == codebook.digest
    with pytest.raises(InputError, match=r"'mine' is installed"):
        do_import(arrays, library)
    assert do_import(arrays, library, force=True).manifest.title == "mine"


def test_import_ignores_layout_in_memory(arrays: tuple[Path, Path], library: Path) -> None:
    plain = do_import(arrays, library, name="a").digest
    np.save(arrays[0], np.asfortranarray(np.load(arrays[0])).astype(">f4"))
    np.save(arrays[1], np.asfortranarray(np.load(arrays[1])))
    other = do_import(arrays, library, name="a", force=True)
    assert other.digest == plain
    assert other.centroids.dtype.isnative


def test_import_stores_float64_as_float32(arrays: tuple[Path, Path], library: Path) -> None:
    values = np.load(arrays[0])
    np.save(arrays[0], values.astype(np.float64))
    np.testing.assert_array_equal(do_import(arrays, library).centroids, values)


def test_import_of_a_checkpoint_directory(arrays: tuple[Path, Path], library: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "dinov2", "hidden_size": 5, "patch_size": 16}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CodebookError, match=r"model.safetensors is missing"):
        do_import(arrays, library, encoder=str(model))
    (model / "model.safetensors").write_bytes(WEIGHTS)
    section = do_import(arrays, library, encoder=str(model)).manifest.encoder
    assert (section.source, section.architecture) == (str(model), "dinov2")
    assert (section.patch_px, section.register_tokens) == (16, 0)
    assert section.sha256 == file_sha256(model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config | {"hidden_size": 6}))
    with pytest.raises(CodebookError, match=r"hidden_size 6; centroids allow 5"):
        do_import(arrays, library, encoder=str(model), force=True)
    (model / "config.json").write_text("[]")
    with pytest.raises(CodebookError, match=r"config.json holds list"):
        do_import(arrays, library, encoder=str(model), force=True)


def test_import_embeds_an_onnx_file(arrays: tuple[Path, Path], library: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected an .onnx file"):
        do_import(arrays, library, encoder=str(tmp_path / "none.onnx"))
    encoder = write_encoder(tmp_path / "e.onnx", with_external_weight())
    with pytest.raises(CodebookError, match=r"e.onnx: keeps 'weight' in another file"):
        do_import(arrays, library, encoder=str(encoder))
    encoder.write_bytes(b"onnx")
    with pytest.raises(CodebookError, match=r"e.onnx: is not an ONNX model"):
        do_import(arrays, library, encoder=str(encoder))
    assert not library.exists()
    write_encoder(encoder)
    codebook = do_import(arrays, library, encoder=str(encoder))
    assert codebook.encoder_path is not None
    assert codebook.encoder_path.read_bytes() == encoder.read_bytes()


def test_pull_completes_an_import(server: StandIn, remotes: Remotes, arrays: tuple[Path, Path], library: Path) -> None:
    server.repos["owner/encoder"] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    before = do_import(arrays, library)
    after = pull_codebook("mine", library, remotes=remotes)
    assert after.manifest.encoder.revision == COMMIT
    assert after.digest != before.digest, "labels of another encoder are not in its caches"
    with pytest.raises(InputError, match=r"cannot be fetched again"):
        pull_codebook("mine", library, remotes=remotes, force=True)


@pytest.mark.parametrize(
    ("which", "content", "message"),
    [
        (0, np.array([{}, {}], object), "not a readable .npy file .pickled objects are refused"),
        (0, np.zeros(5, np.float32), r"shape \(5,\) and dtype float32; allowed are shape \(K, D\)"),
        (0, np.zeros((12, 5), np.int32), "dtype int32; allowed .* float16, float32 or float64"),
        (0, np.zeros((12, 0), np.float32), r"shape \(12, 0\)"),
        (0, np.zeros((0, 5), np.float32), "has 0 rows; allowed are 1 to 65535"),
        (0, np.zeros((65536, 1), np.float16), "has 65536 rows"),
        (0, np.full((12, 5), np.nan, np.float32), "has 60 values that are not finite"),
        (0, np.full((12, 5), 1e300), "has 60 values that are not finite"),
        (0, np.zeros((11, 5), np.float32), r"colors.npy has shape \(12, 3\).*allowed are shape \(11, 3\)"),
        (1, np.zeros((12, 3), np.float32), "colors.npy has shape .* dtype float32; allowed .* uint8"),
        (1, np.zeros((12, 3), np.int64), "dtype int64"),
        (1, np.zeros((12, 4), np.uint8), r"shape \(12, 4\)"),
        (0, b"", "not a readable .npy file"),
        (0, b"not numpy at all", "not a readable .npy file"),
        (0, b"\x80\x04]q\x00.", "not a readable .npy file"),
        (1, None, "colors.npy is missing"),
    ],
)
def test_wrong_arrays(arrays: tuple[Path, Path], library: Path, which: int, content: Any, message: str) -> None:
    if content is None:
        arrays[which].unlink()
    elif isinstance(content, bytes):
        arrays[which].write_bytes(content)
    else:
        np.save(arrays[which], content, allow_pickle=True)
    with pytest.raises(CodebookError, match=message) as caught:
        do_import(arrays, library)
    assert str(arrays[which].parent) in str(caught.value)
    assert not (library / "mine").exists()


def test_truncated_and_archive(arrays: tuple[Path, Path], library: Path) -> None:
    arrays[0].write_bytes(arrays[0].read_bytes()[:-10])
    with pytest.raises(CodebookError, match=r"not a readable .npy file"):
        do_import(arrays, library)
    with arrays[0].open("wb") as file:
        np.savez(file, a=np.zeros(3))
    with pytest.raises(CodebookError, match=r"is an .npz archive"):
        do_import(arrays, library)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "No Good"}, "name 'No Good' is not allowed"),
        ({"name": "../x"}, "is not allowed"),
        ({"metric": "dot"}, "metric = 'dot'"),
        ({"encoder": "no-such-thing"}, "neither a hub id OWNER/NAME, nor a directory"),
        ({"register_tokens": -1}, "register_tokens = -1"),
        ({"version": ""}, "version = ''"),
    ],
)
def test_wrong_options(arrays: tuple[Path, Path], library: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        do_import(arrays, library, **change)


def test_recipe_agrees_with_the_format() -> None:
    manifest = make_manifest("southamerica-6k", encoder=SOUTHAMERICA_6K.encoder)
    assert manifest.name == SOUTHAMERICA_6K.name
    assert SOUTHAMERICA_6K.preprocess.window_patches - 2 * SOUTHAMERICA_6K.preprocess.margin_patches == 10
    assert str(SOUTHAMERICA_6K.classes // 1000) in SOUTHAMERICA_6K.name
