"""Which strings may be opened: every case is decided before GDAL sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.env import get_gdal_config

from geocentroids_tiler.errors import GeocentroidsError, SourceRefusedError, SourceUnavailableError
from geocentroids_tiler.source import gdal_options, resolve_source

REFUSED = [
    # local files by other names
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file:image.tif",
    "/etc/passwd",
    "//host/share/image.tif",
    "~/image.tif",
    "~root/image.tif",
    "C:\\images\\image.tif",
    "C:/images/image.tif",
    "\\\\host\\share\\image.tif",
    "sub\\image.tif",
    # GDAL's file systems, drivers and documents
    "/vsicurl/http://example.com/image.tif",
    "/vsicurl?header_file=/etc/passwd&url=http://example.com/",
    "/vsicurl/gopher://127.0.0.1:6379/x",
    "/vsis3/bucket/image.tif",
    "/vsizip/image.zip/image.tif",
    "/vsisubfile/0_100,image.tif",
    "/vsimem/image.tif",
    "/vsistdin/",
    "GTIFF_DIR:1:image.tif",
    "gtiff_dir:1:/etc/passwd",
    "GTIFF_RAW:image.tif",
    "vrt://image.tif",
    "vrt:///etc/passwd?bands=1",
    "WMS:http://example.com/",
    "NETCDF:image.nc:x",
    "zip://image.zip!image.tif",
    "zip+https://example.com/image.zip!image.tif",
    "<VRTDataset></VRTDataset>",
    '<GDAL_WMS><Service name="TMS"/></GDAL_WMS>',
    '{"type":"gdal"}:x',
    # other schemes
    "s3://bucket/image.tif",
    "gs://bucket/image.tif",
    "az://container/image.tif",
    "ftp://example.com/image.tif",
    "gopher://example.com/",
    "data:image/tiff;base64,SUkq",
    "javascript:alert(1)",
    # http(s), but not one absolute URL without more
    "http:",
    "http://",
    "http:///image.tif",
    "http:/example.com/image.tif",
    "http:example.com/image.tif",
    "https://:443/image.tif",
    "http://user:secret@example.com/image.tif",
    "http://user@example.com/image.tif",
    "http://user:secret@example.com:99999/image.tif",
    "http://user:secret@exam ple.com/image.tif",
    "HTTP:\\\\user:secret@example.com/image.tif",
    "http:user:secret@example.com",
    "http://user@inner:secret@example.com/",
    "http://@example.com/image.tif",
    "http://:@example.com/image.tif",
    "http://example.com:99999/image.tif",
    "http://example.com:port/image.tif",
    "http://[::1/image.tif",
    "http://example.com/image.tif#part",
    "http://example.com/image.tif#",
    "http://example.com/a b.tif",
    "http://example.com/a\tb.tif",
    "http://example.com/a\r\nX-Header: 1",
    "http://example.com/a\x00.tif",
    "http://example.com/a\x7f.tif",
    "http://example.com/a\x85.tif",
    "http://example.com/a\xa0.tif",
    "http://example.com/a\u2028.tif",
    "http://example.com\\@127.0.0.1/image.tif",
    "http:\\\\example.com\\image.tif",
    " http://example.com/image.tif",
    "\x00http://example.com/image.tif",
    "http://example.com/image.tif\n",
    # out of the folder
    "../outside.tif",
    "sub/../../outside.tif",
    "..",
    "sub/../..",
    "link.tif",
    "linked/outside.tif",
    # nothing, or too much
    "",
    "http://example.com/" + "a" * 4096,
    # control characters in paths
    "image.tif\x00.png",
    "image\n.tif",
    "\timage.tif",
]

ACCEPTED_REMOTE = [
    "http://example.com/image.tif",
    "https://example.com/image.tif",
    "HTTPS://Example.com/Image.TIF",
    "https://example.com:8443/a/b.tif?token=a%20b&x=/vsicurl/#"[:-1],
    "https://example.com/a%2Fb%00.tif",
    "http://[2001:db8::1]:80/image.tif",
    "http://192.0.2.1/image.tif",
    "https://example.com/~user/../image.tif",
    "https://example.com/größe.tif",
    "https://example.com",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    inside = folder / "root"
    (inside / "sub").mkdir(parents=True)
    for path in (
        inside / "image.tif",
        inside / "sub" / "a b.tif",
        inside / "sub" / "ü,#?=.tif",
        folder / "outside.tif",
    ):
        path.write_bytes(b"II*\0")
    (inside / "link.tif").symlink_to(folder / "outside.tif")
    (inside / "linked").symlink_to(folder)
    (inside / "within.tif").symlink_to(inside / "image.tif")
    (inside / "circle.tif").symlink_to(inside / "circle.tif")
    return inside


@pytest.mark.parametrize("url", REFUSED, ids=repr)
@pytest.mark.parametrize("with_root", [True, False])
def test_refused(url: str, with_root: bool, root: Path) -> None:
    with pytest.raises(SourceRefusedError) as caught:
        resolve_source(url, root if with_root else None)
    assert str(root) not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ACCEPTED_REMOTE, ids=repr)
def test_remote_urls_are_kept_as_written(url: str, root: Path) -> None:
    for folder in (root, None):
        source = resolve_source(url, folder)
        assert (source.url, source.path) == (url, None)


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("image.tif", "image.tif"),
        ("./image.tif", "image.tif"),
        ("sub/../image.tif", "image.tif"),
        ("sub/a b.tif", "sub/a b.tif"),
        ("sub/ü,#?=.tif", "sub/ü,#?=.tif"),
        ("within.tif", "image.tif"),
    ],
)
def test_paths_below_the_root(url: str, file: str, root: Path) -> None:
    assert resolve_source(url, root).path == (root / file).resolve()


def test_root_may_itself_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    assert resolve_source("image.tif", tmp_path / "alias").path == root.resolve() / "image.tif"


@pytest.mark.parametrize(
    "url",
    ["missing.tif", "sub", ".", "image.tif/x", "circle.tif", "a" * 300 + ".tif", "sub/" * 900 + "x", "\udcff.tif"],
)
def test_what_is_not_a_file_reads_as_missing(url: str, root: Path) -> None:
    with pytest.raises(SourceUnavailableError) as caught:
        resolve_source(url, root)
    assert str(caught.value) == f"cannot open {url!r}"


def test_no_local_file_without_a_root() -> None:
    with pytest.raises(SourceRefusedError, match="without a folder of local files"):
        resolve_source("image.tif", None)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket/image.tif", "starts with 's3:'; accepted: an absolute http"),
        ("/etc/passwd", "is not a relative path; accepted: an absolute http"),
        ("../outside.tif", "leads out of the folder"),
        ("http://user:secret@example.com/a.tif", "carries a user name or password"),
        ("http:///a.tif", "names no host; accepted"),
        ("http://example.com/a b.tif", "white space, a control character or a backslash"),
        ("http://example.com/a.tif#x", "has a fragment"),
        ("http://example.com:99999/", "is not a URL"),
        ("", "has 0 characters; accepted: 1 to 4096"),
    ],
)
def test_texts_say_what_was_found_and_what_is_accepted(url: str, text: str, root: Path) -> None:
    with pytest.raises(SourceRefusedError, match=text.replace("(", r"\(")):
        resolve_source(url, root)


@given(st.text(max_size=40))
def test_any_text_is_a_file_below_the_root_or_a_sentence(url: str) -> None:
    root = Path(__file__).parent
    try:
        source = resolve_source(url, root)
    except GeocentroidsError:
        return
    assert source.path is None or source.path.is_relative_to(root.resolve())


@given(st.text(max_size=40).map("http://".__add__))
def test_any_http_text_has_one_plain_host_or_is_refused(url: str) -> None:
    try:
        source = resolve_source(url, None)
    except SourceRefusedError:
        return
    assert not set(source.url) & set("\x00\n\r\t \\#")
    assert "@" not in source.url.split("/")[2]


def test_options_are_known_to_gdal_as_strings_and_numbers() -> None:
    """rasterio takes them all; what they prevent is tested with files (test_source)."""
    with rasterio.Env(**gdal_options(3.2)) as env:
        assert env.options["GDAL_HTTP_TIMEOUT"] == 3
        assert env.options["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"
    assert gdal_options(0.1)["GDAL_HTTP_TIMEOUT"] == 1  # 0 means no limit


def test_gdals_cache_of_blocks_is_large_enough_for_windows_and_bounded() -> None:
    with rasterio.Env(**gdal_options(5)):  # rasterio takes bytes where GDAL's own option takes MB
        assert get_gdal_config("GDAL_CACHEMAX") == 256 * 2**20
