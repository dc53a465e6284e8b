"""Answers to requests for tiles: from the cache, from kept labels, or computed for as long as the client waits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from fastapi.responses import Response
from morecantile import Tile, TileMatrixSet
from numpy.typing import NDArray
from starlette.requests import Request

from geocentroids_tiler.cache import ByteCache
from geocentroids_tiler.codebook import Classes, Codebook
from geocentroids_tiler.errors import TooManyImagesError
from geocentroids_tiler.handlers import EMPTY_CACHE_CONTROL, MISSING_HEADER, empty_tile, while_connected, zooms_of
from geocentroids_tiler.hot import HotTiles
from geocentroids_tiler.labels.batching import Rank
from geocentroids_tiler.labels.engine import LabelBlock
from geocentroids_tiler.labels.kept import KeptBlock
from geocentroids_tiler.labels.meters import timed
from geocentroids_tiler.labels.reading import DatasetLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import Layer, MosaicPart, find_engine, find_labels, open_part, run
from geocentroids_tiler.mosaic import Mosaic, Zone
from geocentroids_tiler.params import LayerParams
from geocentroids_tiler.render import MEDIA_TYPE, ImageFormat, Style
from geocentroids_tiler.source import ReadOptions
from geocentroids_tiler.tiles import TileCache, TileKey, TileView, draw_tile, draw_zones, pixel_places, tile_view

MAX_MINZOOMS = 1024
MAX_MOSAIC_PATCHES = 2**22
"""Patches of a tile of a mosaic, which has no overviews: 4 million, 25 MB."""
OPENED_BELOW_MINZOOM = 16
"""Images that are opened to see whether a tile below minzoom has its labels at hand."""
OUTLINE_PX = 16
"""Places a side of a tile that are looked at to find out which grids it touches."""


@dataclass(frozen=True)
class TileRequest:
    """What a tile is to show.

    Attributes:
        tms: the TileMatrixSet.
        tile: x, y and z.
        size_px: pixels a side.
        image_format: png or webp.
        layer: the image or mosaic.
        read: how it is read.
        codebook: its classes' codebook.
        classes: the classes.
        merged: to how many classes they are merged, None for all.
        style: how they are drawn.
    """

    tms: TileMatrixSet
    tile: Tile
    size_px: int
    image_format: ImageFormat
    layer: Layer
    read: LayerParams
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
        shown: ShownImage | ShownMosaic
        if isinstance(wanted.layer, Mosaic):
            opened = await while_connected(service, request, self._open_mosaic(wanted, wanted.layer))
            if isinstance(opened, str):
                return empty_tile(wanted.size_px, wanted.image_format, opened)
            shown = opened
        else:
            shown = ShownImage(service, await find_labels(service, wanted.layer, wanted.codebook))
        key = self._key(wanted, shown)
        headers = {"ETag": key.etag, "Cache-Control": service.settings.cache_control}
        if shown.unplaced:  # they may lie here, and may be found any time
            headers |= {"Cache-Control": EMPTY_CACHE_CONTROL, MISSING_HEADER: str(shown.unplaced)}
        timing.mark("open")
        if not shown.missing and key.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        content = None if shown.missing else self.cache.get(key)
        media_type = MEDIA_TYPE[wanted.image_format]
        if content is not None:
            timing.note("cache;desc=hit")
        else:
            rank = service.viewports.rank(
                request.client.host if request.client else "", (wanted.layer.key, wanted.tile.z)
            )
            made = await while_connected(service, request, self._make(wanted, shown, rank, timing))
            if isinstance(made, str):
                return empty_tile(wanted.size_px, wanted.image_format, made)
            content, missing = made
            if missing:  # not the tile that it would be, so it is nobody's to keep for long
                count = len(missing) + shown.unplaced
                incomplete = {"Cache-Control": EMPTY_CACHE_CONTROL, MISSING_HEADER: str(count)}
                return Response(content, media_type=media_type, headers={**incomplete, "Server-Timing": str(timing)})
            self.cache.put(key, content)
        fresh_until_s = shown.fresh_until(wanted)
        if fresh_until_s is not None and not shown.unplaced:
            known = {**headers, "Content-Type": media_type, "Server-Timing": "cache;desc=hit"}
            self._hot.remember(request.scope, key, known, fresh_until_s, self.cache)
        return Response(content, media_type=media_type, headers={**headers, "Server-Timing": str(timing)})

    def _key(self, wanted: TileRequest, shown: ShownImage | ShownMosaic) -> TileKey:
        return TileKey(
            *shown.key,
            wanted.codebook.digest,
            shown.version,
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
        self, wanted: TileRequest, shown: ShownImage | ShownMosaic, rank: Rank, timing: ServerTiming
    ) -> tuple[bytes, Sequence[str]] | str:
        """Draw a tile and say which images it lacks, or say why there is nothing to draw."""
        views = await shown.views(wanted)
        if not views:
            return "outside"
        minzoom = self._minzoom(wanted, shown.seconds_per_chunk)
        if wanted.tile.z < minzoom and not shown.at_hand(views):
            return f"below-minzoom {minzoom}"
        timing.mark("place")
        blocks, missing = await shown.labels(wanted, views, rank)
        timing.mark("labels")
        content = await run(self._service.drawing, self._draw, wanted, shown, views, blocks)
        timing.mark("draw")
        return content, missing

    def _minzoom(self, wanted: TileRequest, seconds_per_chunk: float) -> int:
        key = (wanted.layer.key, wanted.codebook.digest, seconds_per_chunk, wanted.tms.id)
        known = self._minzooms.get(key)
        if known is None:
            known = zooms_of(self._service, wanted.layer, wanted.codebook, seconds_per_chunk, wanted.tms)[0]
            self._minzooms.put(key, known)
        return known

    def _draw(
        self,
        wanted: TileRequest,
        shown: ShownImage | ShownMosaic,
        views: Sequence[TileView],
        blocks: Sequence[LabelBlock | KeptBlock],
    ) -> bytes:
        with timed(self._service.meters.render_seconds):
            look = wanted.classes, wanted.style, wanted.codebook.similarity_range(), wanted.image_format
            if len(views) == 1:
                return draw_tile(views[0], blocks[0], *look)
            if not isinstance(shown, ShownMosaic):
                raise TypeError("a single image has one grid")
            return draw_zones(list(zip(views, blocks, shown.own_pixels(wanted), strict=True)), *look)

    async def _open_mosaic(self, wanted: TileRequest, mosaic: Mosaic) -> ShownMosaic | str:
        """Open the images of a mosaic that lie under a tile, or say why they are not shown."""
        service, codebook = self._service, wanted.codebook
        placed = await run(service.drawing, views_of_zones, mosaic, wanted.tms, wanted.tile, wanted.size_px)
        if not placed:
            return "outside"
        engine = await find_engine(service, codebook)
        if any(view.patches.shape[0] * view.patches.shape[1] > MAX_MOSAIC_PATCHES for _, view in placed):
            return f"below-minzoom {self._minzoom(wanted, engine.seconds_per_chunk)}"
        left = limit = service.settings.mosaic_opened
        if wanted.tile.z < (minzoom := self._minzoom(wanted, engine.seconds_per_chunk)):
            left = limit = min(limit, OPENED_BELOW_MINZOOM)
        found = []
        try:
            for zone, view in placed:
                part = await open_part(service, mosaic, zone.code, zone.grid, view.patches, wanted.read, codebook, left)
                left -= len(part.images) + len(part.missing)
                if part.any_image:
                    found.append((zone, view, part))
        except TooManyImagesError as error:
            below = limit < service.settings.mosaic_opened
            return f"below-minzoom {minzoom}" if below else f"too-many-images {error.count}"
        return ShownMosaic(service, mosaic, found) if found else "outside"


@dataclass(frozen=True)
class ShownImage:
    """What a tile shows of one image."""

    service: Service
    source: DatasetLabels

    missing = ()
    unplaced = 0

    @property
    def key(self) -> tuple[str, str, ReadOptions]:
        """What the tile's content depends on, apart from codebook, device and place."""
        return self.source.dataset.key

    @property
    def version(self) -> str:
        """What labels depend on apart from dataset and codebook."""
        return self.source.version

    @property
    def seconds_per_chunk(self) -> float:
        """What labelling a chunk takes."""
        return self.source.seconds_per_chunk

    def fresh_until(self, wanted: TileRequest) -> float | None:
        """Return when the source has to be asked again; None if that is not known."""
        return self.service.fresh_until(self.source.dataset)

    async def views(self, wanted: TileRequest) -> list[TileView]:
        """Return the patches under the tile's pixels; none if it lies outside."""
        dataset = self.source.dataset
        place = wanted.tms, wanted.tile, wanted.size_px, dataset.grid, dataset.footprint
        view = await run(self.service.drawing, tile_view, *place)
        return [] if view is None else [view]

    def at_hand(self, views: Sequence[TileView]) -> bool:
        """Tell whether the labels are there without computing any."""
        return self.source.at_hand(views[0].patches)

    async def labels(
        self, wanted: TileRequest, views: Sequence[TileView], rank: Rank
    ) -> tuple[list[LabelBlock | KeptBlock], Sequence[str]]:
        """Return the labels, and which images they lack."""
        block = await self.source.block_async(
            views[0].patches,
            self.service.working,
            cell=views[0].cell,
            similarity=wanted.style.layer == "similarity",
            rank=rank,
            timeout_s=self.service.settings.request_timeout_s,
        )
        return [block], ()


@dataclass(frozen=True)
class ShownMosaic:
    """What a tile shows of a mosaic: of each grid under it the patches under the pixels, and the images there."""

    service: Service
    mosaic: Mosaic
    parts: Sequence[tuple[Zone, TileView, MosaicPart]]

    @property
    def unplaced(self) -> int:
        """How many images could not be opened to learn where they lie."""
        return len(self.mosaic.problems)

    @property
    def missing(self) -> Sequence[str]:
        """Images under the tile that could not be opened."""
        return [url for _, _, part in self.parts for url in part.missing]

    @property
    def key(self) -> tuple[str, str, ReadOptions]:
        """What the tile's content depends on, apart from codebook, device and place: the images under it, in order."""
        # Where patches are averaged, cells start where the zone does.
        starts = [
            (zone.footprint.row_start, zone.footprint.col_start) if view.cell > 1 else ()
            for zone, view, _ in self.parts
        ]
        text = repr((starts, [part.content for _, _, part in self.parts]))
        return self.mosaic.url, hashlib.sha256(text.encode()).hexdigest()[:32], ReadOptions()

    @property
    def version(self) -> str:
        """Nothing: what made the labels of each image is in the key."""
        return "mosaic"

    @property
    def seconds_per_chunk(self) -> float:
        """What labelling a chunk of one of the images takes."""
        return max((image.seconds_per_chunk for _, _, part in self.parts for image in part.images), default=0.0)

    def fresh_until(self, wanted: TileRequest) -> float | None:
        """Return when the document or an image has to be asked again; None if that is not known."""
        known = [self.service.mosaics.fresh_until(self.mosaic, wanted.read.options, wanted.codebook)]
        known += [self.service.fresh_until(image.dataset) for _, _, part in self.parts for image in part.images]
        times = [each for each in known if each is not None]
        return min(times) if len(times) == len(known) else None

    async def views(self, wanted: TileRequest) -> list[TileView]:
        """Return the patches under the tile's pixels, of each grid."""
        return [view for _, view, _ in self.parts]

    def at_hand(self, views: Sequence[TileView]) -> bool:
        """Tell whether the labels are there without computing any."""
        return all(part.at_hand() for _, _, part in self.parts)

    async def labels(
        self, wanted: TileRequest, views: Sequence[TileView], rank: Rank
    ) -> tuple[list[LabelBlock | KeptBlock], Sequence[str]]:
        """Return the labels of each grid, and which images they lack."""
        timeout_s = self.service.settings.request_timeout_s
        found = [
            await part.labels(self.service, view.patches, self.service.working, rank=rank, timeout_s=timeout_s)
            for _, view, part in self.parts
        ]
        return [block for block, _, _ in found], [url for _, _, missing in found for url in missing]

    def own_pixels(self, wanted: TileRequest) -> list[NDArray[np.bool_]]:
        """Return for each grid which pixels are drawn from it: those whose centre lies in its zone."""
        lon, lat = pixel_places(wanted.tms, wanted.tile, wanted.size_px)
        return [self.mosaic.in_zone(zone, lon, lat) for zone, _, _ in self.parts]


def views_of_zones(mosaic: Mosaic, tms: TileMatrixSet, tile: Tile, size_px: int) -> list[tuple[Zone, TileView]]:
    """Return the grids of a mosaic that a tile touches, with the patches under its pixels."""
    zones = mosaic.zones
    if len(zones) > 1:
        lon, lat = pixel_places(tms, tile, OUTLINE_PX)
        near = np.isfinite(lon) & np.isfinite(lat)
        step = 2 / OUTLINE_PX  # of the tile: what lies between the places that are looked at
        west, east = float(lon[near].min(initial=np.inf)), float(lon[near].max(initial=-np.inf))
        south, north = float(lat[near].min(initial=np.inf)), float(lat[near].max(initial=-np.inf))
        slack = step * max(east - west, north - south, 0.0)
        zones = tuple(
            zone for zone in zones if mosaic.touches(zone, (west - slack, south - slack, east + slack, north + slack))
        )
    found = [(zone, tile_view(tms, tile, size_px, zone.grid, zone.footprint)) for zone in zones]
    return [(zone, view) for zone, view in found if view is not None]
