"""Answers to requests for tiles: from the cache, from kept labels, or computed for as long as the client waits."""

from __future__ import annotations

import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import Response
from morecantile import Tile, TileMatrixSet
from starlette.requests import Request

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Classes, Codebook
from geocentroids_tiler.handlers import empty_tile, find_labels, run, while_connected, zooms_of
from geocentroids_tiler.hot import HotTiles
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.meters import timed
from geocentroids_tiler.labels.reading import DatasetLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.render import MEDIA_TYPE, ImageFormat, Style
from geocentroids_tiler.source import Dataset
from geocentroids_tiler.tiles import TileCache, TileKey, TileView, draw_tile, tile_view

MAX_MINZOOMS = 1024


@dataclass(frozen=True)
class TileRequest:
    """What a tile is to show.

    Attributes:
        tms: the TileMatrixSet.
        tile: x, y and z.
        size_px: pixels a side.
        image_format: png or webp.
        dataset: the image.
        codebook: its classes' codebook.
        classes: the classes.
        merged: to how many classes they are merged, None for all.
        style: how they are drawn.
    """

    tms: TileMatrixSet
    tile: Tile
    size_px: int
    image_format: ImageFormat
    dataset: Dataset
    codebook: Codebook
    classes: Classes
    merged: int | None
    style: Style


@dataclass
class ServerTiming:
    """How long the parts of a request took, for its ``Server-Timing`` header."""

    _last_s: float = field(default_factory=time.perf_counter)
    _parts: list[str] = field(default_factory=list)

    def mark(self, name: str) -> None:
        """End a part that began where the last one ended."""
        now_s = time.perf_counter()
        self._parts.append(f"{name};dur={(now_s - self._last_s) * 1000:.1f}")
        self._last_s = now_s

    def note(self, text: str) -> None:
        """Add an entry without a time."""
        self._parts.append(text)

    def __str__(self) -> str:
        return ", ".join(self._parts)


class TileAnswers:
    """Answers requests for tiles. One for each set of routes; safe for several event loops."""

    def __init__(self, service: Service, hot: HotTiles) -> None:
        """Share the service's labels and threads, and tell ``hot`` what was answered."""
        self._service = service
        self._hot = hot
        self._minzooms: ByteCache[Hashable, int] = ByteCache(MAX_MINZOOMS, lambda _: 1)
        self.cache: TileCache = service.caches.setdefault("tiles", TileCache(service.settings.tile_cache_bytes))  # type: ignore[assignment]

    async def answer(self, request: Request, wanted: TileRequest, timing: ServerTiming) -> Response:
        """Return a tile, or 304 if the client has it.

        Args:
            request: the request.
            wanted: the tile.
            timing: begun when the request came.

        Raises:
            BusyError: if its labels cannot be computed now or in time.
            HTTPException: if the client goes away.
        """
        service = self._service
        labels = await find_labels(service, wanted.dataset, wanted.codebook)
        key = self._key(wanted, labels)
        headers = {"ETag": key.etag, "Cache-Control": service.settings.cache_control}
        timing.mark("open")
        if key.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = self.cache.get(key)
        if content is not None:
            timing.note("cache;desc=hit")
        else:
            rank = service.viewports.rank(
                request.client.host if request.client else "", (wanted.dataset.key, wanted.tile.z)
            )
            made = await while_connected(service, request, self._make(wanted, labels, rank, timing))
            if isinstance(made, Response):
                return made
            content = made
            self.cache.put(key, content)
        fresh_until_s = service.fresh_until(wanted.dataset)
        media_type = MEDIA_TYPE[wanted.image_format]
        if fresh_until_s is not None:
            known = {**headers, "Content-Type": media_type, "Server-Timing": "cache;desc=hit"}
            self._hot.remember(request.scope, key, known, fresh_until_s, self.cache)
        return Response(content, media_type=media_type, headers={**headers, "Server-Timing": str(timing)})

    def _key(self, wanted: TileRequest, labels: DatasetLabels) -> TileKey:
        return TileKey(
            *wanted.dataset.key,
            wanted.codebook.digest,
            labels.version,
            wanted.tms.id or "",
            wanted.tile.z,
            wanted.tile.x,
            wanted.tile.y,
            wanted.size_px,
            wanted.image_format,
            wanted.merged,
            wanted.style,
        )

    async def _make(
        self, wanted: TileRequest, labels: DatasetLabels, rank: Rank, timing: ServerTiming
    ) -> bytes | Response:
        """Draw a tile, or return one without data that says why it has none."""
        service, dataset = self._service, wanted.dataset
        minzoom = self._minzoom(wanted, labels)
        view = await run(
            service.drawing, tile_view, wanted.tms, wanted.tile, wanted.size_px, dataset.grid, dataset.footprint
        )
        if view is None:
            return empty_tile(wanted.size_px, wanted.image_format, "outside")
        if wanted.tile.z < minzoom and not labels.at_hand(view.patches):
            return empty_tile(wanted.size_px, wanted.image_format, f"below-minzoom {minzoom}")
        timing.mark("place")
        block = await labels.block_async(
            view.patches,
            service.working,
            cell=view.cell,
            similarity=wanted.style.layer == "similarity",
            rank=rank,
            timeout_s=service.settings.request_timeout_s,
        )
        timing.mark("labels")
        content = await run(service.drawing, self._draw, wanted, view, block)
        timing.mark("draw")
        return content

    def _minzoom(self, wanted: TileRequest, labels: DatasetLabels) -> int:
        key = (wanted.dataset.key, wanted.codebook.digest, labels.seconds_per_chunk, wanted.tms.id)
        known = self._minzooms.get(key)
        if known is None:
            known = zooms_of(self._service, labels, wanted.tms)[0]
            self._minzooms.put(key, known)
        return known

    def _draw(self, wanted: TileRequest, view: TileView, block: Any) -> bytes:
        with timed(self._service.meters.render_seconds):
            similarity_range = wanted.codebook.similarity_range()
            return draw_tile(view, block, wanted.classes, wanted.style, similarity_range, wanted.image_format)
