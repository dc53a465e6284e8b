"""Which sources may be opened, and how GDAL is told to open them. Decided before GDAL sees the string."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from geocentroids_tiler.errors import SourceRefusedError, SourceUnavailableError

ACCEPTED = "an absolute http(s) URL, or a path relative to the folder the server was started with (--root)"
MAX_URL_LENGTH = 4096
_USERINFO = re.compile(r"^https?:[/\\]*[^/\\?#]*@", re.IGNORECASE)
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Source:
    """Something that may be opened.

    Attributes:
        url: as the user wrote it; names the source in messages and cache keys.
        path: the local file, or None for a remote source.
    """

    url: str
    path: Path | None = None


def resolve_source(url: str, root: Path | None) -> Source:
    """Decide whether ``url`` may be opened.

    Args:
        url: an absolute http(s) URL, or a path relative to ``root``.
        root: folder whose files may be opened; None: no local files.

    Raises:
        SourceRefusedError: if the policy forbids it.
        SourceUnavailableError: if a local file does not exist.
    """
    if not url or len(url) > MAX_URL_LENGTH:
        raise SourceRefusedError(f"url has {len(url)} characters; accepted: 1 to {MAX_URL_LENGTH}")
    if url.lower().startswith(("http:", "https:")):
        return _remote(url)
    return _local(url, root)


def gdal_options(timeout_s: float) -> dict[str, str | int]:
    """Return the GDAL configuration under which every source is opened and read.

    Args:
        timeout_s: longest wait for an HTTP answer, in seconds.
    """
    return {
        # Only the file itself: no directory listing, side-car files, world files or statistics.
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_PAM_ENABLED": "NO",
        "GDAL_GEOREF_SOURCES": "INTERNAL",
        "GDAL_HTTP_TIMEOUT": max(1, round(timeout_s)),
        "GDAL_HTTP_CONNECTTIMEOUT": max(1, round(timeout_s)),
        "GDAL_HTTP_MAX_RETRY": 2,
        "GDAL_HTTP_RETRY_DELAY": 1,
        "GDAL_HTTP_NETRC": "NO",
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_INGESTED_BYTES_AT_OPEN": 65536,
        "CPL_VSIL_CURL_USE_HEAD": "NO",
        "VSI_CACHE": "TRUE",
        "VSI_CACHE_SIZE": 5 * 2**20,
        "GDAL_CACHEMAX": 256 * 2**20,  # bytes, for rasterio; by default a share of the machine's memory
        "AWS_NO_SIGN_REQUEST": "YES",
    }


def _remote(url: str) -> Source:
    if _USERINFO.search(url):  # first: no other message repeats a password
        raise SourceRefusedError("the URL carries a user name or password; credentials in URLs are not accepted")
    if _FORBIDDEN.search(url):
        raise SourceRefusedError(f"{url!r} holds white space, a control character or a backslash; percent-encode it")
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise SourceRefusedError(f"{url!r} is not a URL ({error}); accepted: {ACCEPTED}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceRefusedError(f"{url!r} names no host; accepted: {ACCEPTED}")
    if "#" in url:
        raise SourceRefusedError(f"{url!r} has a fragment (#...); remove it")
    return Source(url)


def _local(url: str, root: Path | None) -> Source:
    scheme, separator, _ = url.partition(":")
    if separator and "/" not in scheme:
        raise SourceRefusedError(f"{url!r} starts with {scheme + ':'!r}; accepted: {ACCEPTED}")
    if root is None:
        raise SourceRefusedError(
            f"{url!r} is not an http(s) URL, and this server was started without a folder of local files (--root)"
        )
    if url.startswith(("/", "~", "<")) or _FORBIDDEN.search(url.replace(" ", "")):
        raise SourceRefusedError(f"{url!r} is not a relative path; accepted: {ACCEPTED}")
    base = root.resolve()
    try:
        path = (base / url).resolve()
        exists = path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # no permission, name too long, links in a circle, ...
        raise SourceUnavailableError(f"cannot open {url!r}") from error
    if not path.is_relative_to(base):
        raise SourceRefusedError(f"{url!r} leads out of the folder of local files")
    if not exists:
        raise SourceUnavailableError(f"cannot open {url!r}")
    return Source(url, path)
