"""Tiles that were answered before, answered again before a route is looked for: for a server of many map clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.tiles import TileCache, TileKey

MAX_BYTES = 16 * 2**20
"""Memory for addresses; the tiles themselves are in the tile cache."""
_ENTRY_OVERHEAD_BYTES = 1024

_Address = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class _Entry:
    key: TileKey
    etag: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    fresh_until_s: float
    cache: TileCache
    nbytes: int


class HotTiles:
    """Remembers which address shows which tile, for as long as the tile's source needs not be asked again.

    Args:
        clock: tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: ByteCache[_Address, _Entry] = ByteCache(MAX_BYTES, lambda entry: entry.nbytes)

    def remember(
        self, scope: Scope, key: TileKey, headers: Mapping[str, str], fresh_until_s: float, cache: TileCache
    ) -> None:
        """Remember the tile that answers a request.

        Args:
            scope: of the request.
            key: the tile.
            headers: of its answer, its ETag among them.
            fresh_until_s: when its source has to be asked again.
            cache: holds the tile.
        """
        address = (scope["path"], scope["query_string"])
        raw = tuple((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items())
        size = len(address[0]) + len(address[1]) + _ENTRY_OVERHEAD_BYTES
        self._entries.put(address, _Entry(key, headers["ETag"].encode(), raw, fresh_until_s, cache, size))

    def find(self, scope: Scope) -> tuple[_Entry, bytes] | None:
        """Return what is known of a request's address and the tile, or None."""
        entry = self._entries.get((scope["path"], scope["query_string"]))
        if entry is None or self._clock() >= entry.fresh_until_s:
            return None
        content = entry.cache.get(entry.key)
        return None if content is None else (entry, content)


class HotTilesMiddleware:
    """Answers requests for tiles that ``hot`` knows; all others go on to the application.

    It stands before all dependencies of routes: use it only where none of them decides who may see a tile, and where
    path and query alone decide which tile it is. Add it before what adds headers, as ``CORSMiddleware`` does.
    """

    def __init__(self, app: ASGIApp, hot: HotTiles) -> None:
        self._app = app
        self._hot = hot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        found = self._hot.find(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        entry, content = found
        if any(name == b"if-none-match" and entry.etag in value for name, value in scope["headers"]):
            headers = [header for header in entry.headers if header[0] != b"content-type"]
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        headers = [*entry.headers, (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
