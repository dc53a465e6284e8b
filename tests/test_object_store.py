"""Files in buckets: read with the server's credentials, and only from buckets that the operator named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from httpd import Httpd, Served, serve
from rasters import texture, write_tif

from geocentroids_tiler.errors import SourceRefusedError, SourceUnavailableError
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Remote, open_raster, open_remote, resolve_source, source_identity

pytest.importorskip("obstore")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Httpd]:
    """What speaks like Amazon S3, as far as reading goes."""
    with serve() as httpd:
        for name, value in {
            "AWS_ENDPOINT_URL": httpd.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "nowhere",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "geheim",
        }.items():
            monkeypatch.setenv(name, value)
        yield httpd


@pytest.fixture
def remote(service: Httpd) -> Iterator[Remote]:
    remote = open_remote(Settings(source_buckets=["s3://ours"], source_timeout_s=5, source_http=True))
    yield remote
    remote.close()


def test_a_file_of_a_named_bucket(service: Httpd, remote: Remote, tmp_path: Path) -> None:
    path = write_tif(tmp_path / "image.tif", texture(300, 300), photometric="RGB")
    headers = {"ETag": '"1"', "Last-Modified": "Mon, 06 May 2024 10:00:00 GMT"}
    service.files["/ours/a/image.tif"] = Served(path.read_bytes(), headers)
    source = resolve_source("s3://ours/a/image.tif", None, remote)
    with open_raster(source, source_identity(source)) as far, rasterio.open(path) as near:
        assert np.array_equal(far.read(), near.read())
    assert {asked for _, asked in service.requests} == {"/ours/a/image.tif"}


@pytest.mark.parametrize(
    "url", ["s3://theirs/image.tif", "s3://ours.evil/image.tif", "gs://ours/image.tif", "s3://ours"]
)
def test_other_buckets_are_refused(url: str, service: Httpd, remote: Remote) -> None:
    with pytest.raises(SourceRefusedError, match="accepted: an absolute http"):
        resolve_source(url, None, remote)
    assert service.requests == []


@pytest.mark.parametrize(
    "url", ["s3://ours/../theirs/image.tif", "s3://ours/./a.tif", "s3://ours/a\\b", "s3://ours/a\n"]
)
def test_steps_up_are_refused(url: str, service: Httpd, remote: Remote) -> None:
    with pytest.raises(SourceRefusedError, match="control character"):
        resolve_source(url, None, remote)
    assert service.requests == []


def test_a_missing_file_reads_like_any_other(service: Httpd, remote: Remote) -> None:
    source = resolve_source("s3://ours/absent.tif", None, remote)
    with pytest.raises(SourceUnavailableError, match=r"cannot open 's3://ours/absent\.tif'"):
        source_identity(source)
