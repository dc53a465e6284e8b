"""Which sources may be opened, and how GDAL is told to open them. Decided before GDAL sees the string."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from geocentroids_tiler.errors import SourceRefusedError, SourceUnavailableError
from geocentroids_tiler.source.addresses import Network, is_allowed, literal

if TYPE_CHECKING:
    from geocentroids_tiler.source.remote import Remote

ACCEPTED = "an absolute http(s) URL, or a path relative to the folder the server was started with (--root)"
MAX_URL_LENGTH = 4096
PORTS = frozenset({80, 443, 8080, 8443})
"""Ports of public hosts that are connected to: any other would make this server a tool to scan ports with."""
_USERINFO = re.compile(r"^https?:[/\\]*[^/\\?#]*@", re.IGNORECASE)
_FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029]")


@dataclass(frozen=True, slots=True)
class Source:
    """Something that may be opened.

    Attributes:
        url: as the user wrote it; names the source in messages and cache keys.
        path: the local file, or None for a remote source.
        remote: what fetches a remote source.
    """

    url: str
    path: Path | None = None
    remote: Remote | None = field(default=None, compare=False, repr=False)

    @property
    def host(self) -> str | None:
        """The server or bucket it is read from; None for a local file."""
        return None if self.remote is None else urlsplit(self.url).netloc.lower()


@dataclass(frozen=True, slots=True)
class RemotePolicy:
    """Which web servers may be read from.

    Attributes:
        allow_http: whether plain HTTP is allowed beside HTTPS.
        hosts: the only hosts allowed, ``example.com`` or ``*.example.com`` for all below it; none: every public host.
        networks: allowed although their addresses are not public; there any port is.
        ports: allowed on public addresses.
    """

    allow_http: bool = False
    hosts: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    ports: frozenset[int] = PORTS

    def check(self, url: httpx.URL) -> None:
        """Refuse a URL that may not be fetched, whether a user wrote it or a server redirects to it.

        What a name resolves to is looked at when a connection is made, not here.

        Raises:
            SourceRefusedError: if it may not.
        """
        if url.scheme != "https" and not (url.scheme == "http" and self.allow_http):
            accepted = "https and http" if self.allow_http else "https (GEOCENTROIDS_SOURCE_HTTP allows http)"
            raise SourceRefusedError(f"{url.scheme + ':'!r} URLs are not opened by this server; accepted: {accepted}")
        if url.userinfo:
            raise SourceRefusedError("a URL with a user name or password is not opened")
        host = url.host.lower().rstrip(".")
        if self.hosts and not any(_matches(host, allowed.lower()) for allowed in self.hosts):
            raise SourceRefusedError(f"host {url.host!r} is not on this server's list of hosts")
        address = literal(host)
        if address is not None and not is_allowed(address, self.networks):
            raise SourceRefusedError(f"{url.host!r} is not a public address; this server reads from public hosts only")
        port = url.port or (443 if url.scheme == "https" else 80)
        if port not in self.ports and not self.networks:
            accepted = ", ".join(map(str, sorted(self.ports)))
            raise SourceRefusedError(f"port {port} is not opened by this server; accepted: {accepted}")


def resolve_source(url: str, root: Path | None, remote: Remote | None = None) -> Source:
    """Decide whether ``url`` may be opened.

    Args:
        url: an absolute http(s) URL, a path relative to ``root``, or a file in a bucket that the operator named.
        root: folder whose files may be opened; None: no local files.
        remote: what fetches remote sources, and whose policy they have to meet; None: no remote sources.

    Raises:
        SourceRefusedError: if the policy forbids it.
        SourceUnavailableError: if a local file does not exist.
    """
    if not url or len(url) > MAX_URL_LENGTH:
        raise SourceRefusedError(f"url has {len(url)} characters; accepted: 1 to {MAX_URL_LENGTH}")
    if url.lower().startswith(("http:", "https:")):
        return _web(url, remote)
    if remote is not None and remote.in_bucket(url):
        return _bucket(url, remote)
    return _local(url, root)


def gdal_options() -> dict[str, str | int]:
    """Return the GDAL configuration under which every source is opened and read."""
    return {
        # Only the file itself: no directory listing, side-car files, world files or statistics.
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_PAM_ENABLED": "NO",
        "GDAL_GEOREF_SOURCES": "INTERNAL",
        "GDAL_CACHEMAX": 256 * 2**20,  # bytes, for rasterio; by default a share of the machine's memory
        # GDAL fetches nothing: bytes of remote sources are handed to it. Should a file make it try all the same:
        "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": "{nothing}",
        "GDAL_HTTP_NETRC": "NO",
        "AWS_NO_SIGN_REQUEST": "YES",
    }


def _matches(host: str, allowed: str) -> bool:
    return host == allowed or (allowed.startswith("*.") and host.endswith(allowed[1:]))


def _web(url: str, remote: Remote | None) -> Source:
    if _USERINFO.search(url):  # first: no other message repeats a password
        raise SourceRefusedError("the URL carries a user name or password; credentials in URLs are not accepted")
    if _FORBIDDEN.search(url):
        raise SourceRefusedError(f"{url!r} holds white space, a control character or a backslash; percent-encode it")
    try:
        parts = urlsplit(url)
        _ = parts.port
        parsed = httpx.URL(url)  # what will be fetched is what this reads in it
    except (ValueError, httpx.InvalidURL) as error:
        raise SourceRefusedError(f"{url!r} is not a URL ({error}); accepted: {ACCEPTED}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceRefusedError(f"{url!r} names no host; accepted: {ACCEPTED}")
    if "#" in url:
        raise SourceRefusedError(f"{url!r} has a fragment (#...); remove it")
    if remote is None:
        raise SourceRefusedError(f"{url!r} is a URL; here only files are opened")
    remote.policy.check(parsed)
    return Source(url, remote=remote)


def _bucket(url: str, remote: Remote) -> Source:
    if _FORBIDDEN.search(url.replace(" ", "")) or any(part in (".", "..") for part in url.split("/")):
        raise SourceRefusedError(f"{url!r} holds a control character, a backslash or a step up")
    return Source(url, remote=remote)


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
