"""What the routes share: from parameters to codebooks, datasets and engines, and from areas to answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from morecantile import TileMatrixSet
from starlette.requests import Request

from geocentroids_tiler.area import Region, region_of_geometry
from geocentroids_tiler.codebook import NODATA_LABEL, Classes, Codebook
from geocentroids_tiler.errors import BusyError, GeocentroidsError, InputError, http_headers, http_status, short
from geocentroids_tiler.geojson_size import check_geojson_size
from geocentroids_tiler.grounds import Budget, Opened, ground_of_export, grounds_of_statistics
from geocentroids_tiler.labels.export import label_geotiff
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.layers import Layer, find_classes, run
from geocentroids_tiler.params import StyleParams
from geocentroids_tiler.render import MEDIA_TYPE, ImageFormat, encode_indexed, palette_index, transparent_tile
from geocentroids_tiler.responses import ClassTally, ExemplarLink, exemplar_info, with_statistics
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.tiles import Extent, zoom_range

logger = logging.getLogger(__name__)
T = TypeVar("T")

RasterFormat = Literal["tif", "png"]
ExemplarFormat = Literal["webp", "json"]
CLIENT_GONE = 499
"""Status in the access log of a request whose client went away; nobody receives it."""
REASON_HEADER = "X-Geocentroids-Empty"
"""Says why a tile is transparent: ``outside`` the image, ``below-minzoom N`` or ``too-many-images N``."""
EMPTY_CACHE_CONTROL = "public, max-age=60"
"""A tile below minzoom may hold data soon, on a faster device or after a restart; one that lacks an image, too."""
MISSING_HEADER = "X-Geocentroids-Missing"
"""How many images of a mosaic an answer lacks because they cannot be read."""


class NoStoreRoute(APIRoute):
    """A route whose errors are JSON, with the status of the error table, and are never cached."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Wrap the route's handler."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                response: Response = await handler(request)
            except GeocentroidsError as error:
                status = http_status(error)
                if status >= 500 and not isinstance(error, BusyError):
                    logger.error("%s answered with %d", request.url.path, status, exc_info=error)
                return _error(str(error), status, http_headers(error))
            except HTTPException as error:
                return _error(error.detail, error.status_code, error.headers)
            except RequestValidationError as error:
                return _error("; ".join(map(_problem, error.errors())), 422)
            return response

        return handle


async def while_connected(service: Service, request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``, which is cancelled if the client goes away before it is there.

    Raises:
        HTTPException: if it does; the request is counted as cancelled.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        service.meters.cancelled.inc()
        raise HTTPException(CLIENT_GONE, "the client has gone")
    finally:
        for future in (task, gone):
            future.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def zooms_of(
    service: Service, layer: Layer, codebook: Codebook, seconds_per_chunk: float, tms: TileMatrixSet
) -> tuple[int, int]:
    """Return minzoom and maxzoom of a layer on this server: all from the first if its labels are kept."""
    extent = Extent.of(layer, codebook.manifest.preprocess)
    settings = service.settings
    return zoom_range(tms, extent, seconds_per_chunk, settings.tile_budget_s, settings.mosaic_opened)


def read_geojson(body: bytes, settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read a GeoJSON Feature or FeatureCollection.

    Args:
        body: as it came.
        settings: bound its size.

    Returns:
        What was sent, as it came, and its features.

    Raises:
        InputError: if it is anything else, or too large.
    """
    needed = "a GeoJSON Feature or FeatureCollection with polygons is needed"
    document = _parse_json(body)
    if not isinstance(document, dict) or document.get("type") not in ("Feature", "FeatureCollection"):
        found = document.get("type") if isinstance(document, dict) else document
        raise InputError(f"the body is {_short(found)}; {needed}")
    check_geojson_size(document, settings)
    features = document.get("features") if document["type"] == "FeatureCollection" else [document]
    if not isinstance(features, list):
        raise InputError(f"features is {_short(features)}; {needed}")
    for feature in features:
        if not isinstance(feature, dict) or feature.get("type") != "Feature":
            raise InputError(f"one of the features is {_short(feature)}; {needed}")
        if not isinstance(feature.get("properties"), dict | None):
            raise InputError(f"properties is {_short(feature['properties'])}; an object or null is needed")
    return document, features


def read_feature(body: bytes, settings: Settings) -> dict[str, Any]:
    """Read a GeoJSON Feature.

    Args:
        body: as it came.
        settings: bound its size.

    Raises:
        InputError: if it is anything else, or too large.
    """
    document, _ = read_geojson(body, settings)
    if document["type"] != "Feature":
        raise InputError("the body is a FeatureCollection; send one Feature")
    return document


def empty_tile(size_px: int, image_format: ImageFormat, reason: str) -> Response:
    """Return a transparent tile with status 200 (QGIS retries errors) and a header that says why it is empty."""
    headers = {REASON_HEADER: reason, "Cache-Control": EMPTY_CACHE_CONTROL}
    return Response(transparent_tile(size_px, image_format), media_type=MEDIA_TYPE[image_format], headers=headers)


def region_of_feature(feature: Mapping[str, Any]) -> Region:
    """Return the region of a GeoJSON feature.

    Raises:
        InputError: if it has no geometry, or one that is not a polygon.
    """
    geometry = feature.get("geometry")
    if not isinstance(geometry, dict):
        raise InputError(f"the geometry is {_short(geometry)}; a Polygon or MultiPolygon is needed")
    return region_of_geometry(geometry)


async def export(
    service: Service, found: Opened, region: Region, look: StyleParams, raster_format: RasterFormat
) -> Response:
    """Return the labels of a region as a file, one pixel per patch.

    Raises:
        InputError: if the region holds no patch of the layer, or too many.
    """
    codebook = found.codebook
    style = look.style(codebook)
    classes = await find_classes(service, codebook, look.classes)
    budget = Budget(service)
    ground = await ground_of_export(service, found, region, budget)
    if ground is None or ground.area.empty:
        raise InputError("the area holds no patch of the image; see bounds in /info")
    area, timeout_s = ground.area, service.settings.export_timeout_s
    block, missing = await ground.labels(service, timeout_s)

    def written() -> Response:
        inside = np.where(area.inside, block.labels, np.uint16(NODATA_LABEL))
        lacking = {MISSING_HEADER: str(len(missing))} if missing else {}
        if raster_format == "tif":
            content = label_geotiff(classes.of_labels(inside), area.patches, ground.grid, codebook, classes)
            return Response(
                content,
                media_type="image/tiff; application=geotiff",
                headers={"Content-Disposition": 'attachment; filename="classes.tif"', **lacking},
            )
        index, palette = palette_index(inside, block.similarity, classes, style, codebook.similarity_range())
        return Response(encode_indexed(index, palette, "png"), media_type=MEDIA_TYPE["png"], headers=lacking)

    return await run(service.exporting, written)


async def statistics_of(
    service: Service, found: Opened, features: Sequence[dict[str, Any]], classes: Classes
) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Return features with the area of every class inside each, and the images that this lacks.

    Raises:
        InputError: if one is not a polygon, or all together hold too many patches.
    """
    deadline_s = time.monotonic() + service.settings.export_timeout_s
    budget = Budget(service)
    regions = await run(service.exporting, lambda: [region_of_feature(feature) for feature in features])
    grounds = [await grounds_of_statistics(service, found, region, budget) for region in regions]
    answered: list[dict[str, Any]] = []
    lacking: set[str] = set()
    for feature, parts in zip(features, grounds, strict=True):
        tally = ClassTally(classes)
        for ground in parts:
            left_s = max(0.0, deadline_s - time.monotonic())
            block, missing = await ground.labels(service, left_s)
            lacking.update(missing)
            await run(service.exporting, tally.add, block, ground.area, ground.grid.patch_area_m2)
        answered.append(with_statistics(feature, tally.statistics()))
    return answered, sorted(lacking)


def exemplar(
    codebook: Codebook, classes: Classes, label: int, link: ExemplarLink, exemplar_format: ExemplarFormat
) -> bytes | None:
    """Return the exemplar of a class, or as JSON whose images it was cut from; None if the class has none.

    Raises:
        CodebookError: if the file is no longer what was loaded.
    """
    info = exemplar_info(codebook, classes, label, link(label)) if label < len(classes) else None
    if info is None or codebook.exemplars is None:
        return None
    return info.model_dump_json().encode() if exemplar_format == "json" else codebook.exemplars.read(info.centroid)


def _parse_json(body: bytes) -> Any:
    """Read JSON, without the NaN and Infinity that Python takes for numbers and JSON does not have."""

    def finite(text: str) -> float:
        if math.isfinite(number := float(text)):
            return number
        raise InputError(f"{text} is not a finite number")

    try:
        return json.loads(body, parse_constant=finite, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error


def _problem(item: Mapping[str, Any]) -> str:
    """Say in one sentence what is wrong with a parameter."""
    name = item["loc"][1] if len(item["loc"]) > 1 else item["loc"][0]
    if item["type"] == "missing":
        return f"{name} is missing"
    return f"{name}={_short(item['input'])}: {item['msg']}"


def _short(value: object) -> str:
    """Return a value that came as JSON as an error message shows it."""
    return "null" if value is None else short(value)


def _error(detail: Any, status: int, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers={**(headers or {}), "Cache-Control": "no-store"})
