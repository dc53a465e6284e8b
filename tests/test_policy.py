"""Which strings may be opened: every case is decided before GDAL sees it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.env import get_gdal_config

from geocentroids_tiler.errors import GeocentroidsError, SourceRefusedError, SourceUnavailableError
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Remote, gdal_options, open_remote, resolve_source

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

PRIVATE_HOSTS = [
    "127.0.0.1",
    "127.1",
    "0",
    "0.0.0.0",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "0177.0.0.1",
    "017700000001",
    "127.0.0.1.",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "198.18.0.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]",
    "[0:0:0:0:0:ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:a9fe:a9fe::1]",
    "[2606:4700::5efe:127.0.0.1]",
    "[2606:4700::200:5efe:10.0.0.1]",
    "[fe80::1]",
    "[fe80::1%25eth0]",
    "[fec0::1]",
    "[fc00::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[2001:db8::1]",
    "[100::1]",
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


@pytest.fixture(scope="module")
def anywhere() -> Iterator[Remote]:
    """What refuses no host, port or scheme: only the form of a URL counts."""
    remote = open_remote(Settings(source_http=True, source_networks=["0.0.0.0/0", "::/0"]))
    yield remote
    remote.close()


@pytest.mark.parametrize("url", REFUSED, ids=repr)
@pytest.mark.parametrize("with_root", [True, False])
def test_refused(url: str, with_root: bool, root: Path, anywhere: Remote) -> None:
    with pytest.raises(SourceRefusedError) as caught:
        resolve_source(url, root if with_root else None, anywhere)
    assert str(root) not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ACCEPTED_REMOTE, ids=repr)
def test_remote_urls_are_kept_as_written(url: str, root: Path, anywhere: Remote) -> None:
    for folder in (root, None):
        source = resolve_source(url, folder, anywhere)
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
def test_texts_say_what_was_found_and_what_is_accepted(url: str, text: str, root: Path, anywhere: Remote) -> None:
    with pytest.raises(SourceRefusedError, match=text.replace("(", r"\(")):
        resolve_source(url, root, anywhere)


@given(st.text(max_size=40))
def test_any_text_is_a_file_below_the_root_or_a_sentence(anywhere: Remote, url: str) -> None:
    root = Path(__file__).parent
    try:
        source = resolve_source(url, root, anywhere)
    except GeocentroidsError:
        return
    assert source.path is None or source.path.is_relative_to(root.resolve())


@given(st.text(max_size=40).map("http://".__add__))
def test_any_http_text_has_one_plain_host_or_is_refused(anywhere: Remote, url: str) -> None:
    try:
        source = resolve_source(url, None, anywhere)
    except SourceRefusedError:
        return
    assert not set(source.url) & set("\x00\n\r\t \\#")
    assert "@" not in source.url.split("/")[2]


@pytest.fixture(scope="module")
def strict() -> Iterator[Remote]:
    """What refuses all that a server on the internet refuses if its operator says nothing."""
    remote = open_remote(Settings())
    yield remote
    remote.close()


class TestPublicHostsOnly:
    """What a server on the internet opens if its operator says nothing."""

    @pytest.mark.parametrize("host", PRIVATE_HOSTS)
    def test_private_addresses_in_every_notation(self, host: str, strict: Remote) -> None:
        with pytest.raises(SourceRefusedError, match=r"not a public address|is not a URL"):
            resolve_source(f"https://{host}/image.tif", None, strict)

    @pytest.mark.parametrize("host", ["example.com", "8.8.8.8", "[2606:4700::1111]", "1.1.1.1."])
    def test_public_hosts(self, host: str, strict: Remote) -> None:
        assert resolve_source(f"https://{host}/image.tif", None, strict).remote is strict

    def test_schemes(self, strict: Remote) -> None:
        with pytest.raises(SourceRefusedError, match="accepted: https \\(GEOCENTROIDS_SOURCE_HTTP allows http"):
            resolve_source("http://example.com/image.tif", None, strict)

    @pytest.mark.parametrize(("port", "good"), [(443, True), (8443, True), (22, False), (6379, False), (65535, False)])
    def test_ports(self, port: int, good: bool, strict: Remote) -> None:
        url = f"https://example.com:{port}/image.tif"
        if good:
            assert resolve_source(url, None, strict).host == f"example.com:{port}"
        else:
            with pytest.raises(SourceRefusedError, match=f"port {port} is not opened.*accepted: 80, 443, 8080, 8443"):
                resolve_source(url, None, strict)

    @pytest.mark.parametrize(
        ("host", "good"),
        [
            ("tiles.example.org", True),
            ("TILES.example.org.", True),
            ("a.b.example.com", True),
            ("example.com", False),
            ("notexample.com", False),
            ("example.com.evil.net", False),
            ("tiles.example.org.evil.net", False),
        ],
    )
    def test_list_of_hosts(self, host: str, good: bool) -> None:
        remote = open_remote(Settings(source_hosts=["tiles.example.org", "*.Example.com"]))
        try:
            if good:
                resolve_source(f"https://{host}/image.tif", None, remote)
            else:
                with pytest.raises(SourceRefusedError, match="is not on this server's list of hosts"):
                    resolve_source(f"https://{host}/image.tif", None, remote)
        finally:
            remote.close()

    def test_networks_are_the_operators_choice(self) -> None:
        remote = open_remote(Settings(source_networks=["10.1.0.0/16", "fd00:1::/32"]))
        try:
            for host in ("10.1.2.3", "[::ffff:10.1.2.3]", "[fd00:1::5]", "10.1.515"):
                resolve_source(f"https://{host}:9000/image.tif", None, remote)
            for host in ("10.2.0.1", "[fd00:2::5]", "127.0.0.1"):
                with pytest.raises(SourceRefusedError, match="not a public address"):
                    resolve_source(f"https://{host}/image.tif", None, remote)
        finally:
            remote.close()


def test_options_are_known_to_gdal() -> None:
    """rasterio takes them all; what they prevent is tested with files (test_source)."""
    with rasterio.Env(**gdal_options()) as env:
        assert env.options["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"


def test_gdals_cache_of_blocks_is_large_enough_for_windows_and_bounded() -> None:
    with rasterio.Env(**gdal_options()):  # rasterio takes bytes where GDAL's own option takes MB
        assert get_gdal_config("GDAL_CACHEMAX") == 256 * 2**20
