"""What the routes share: from parameters to codebooks, datasets and engines, and from areas to answers."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Literal, TypeVar

import numpy as np
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from morecantile import TileMatrixSet
from starlette.requests import Request

from geocentroids_tiler.area import Area, area_of_geometry
from geocentroids_tiler.codebook import NODATA_LABEL, Classes, Codebook
from geocentroids_tiler.errors import BusyError, GeocentroidsError, InputError, http_headers, http_status, short
from geocentroids_tiler.geojson_size import check_geojson_size
from geocentroids_tiler.labels.engine import LabelEngine
from geocentroids_tiler.labels.export import label_geotiff
from geocentroids_tiler.labels.futures import follow
from geocentroids_tiler.labels.reading import DatasetLabels
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.params import ReadParams, StyleParams
from geocentroids_tiler.render import MEDIA_TYPE, ImageFormat, encode_indexed, palette_index, transparent_tile
from geocentroids_tiler.responses import ExemplarLink, area_statistics, exemplar_info, with_statistics
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset
from geocentroids_tiler.tiles import zoom_range

logger = logging.getLogger(__name__)
T = TypeVar("T")

RasterFormat = Literal["tif", "png"]
ExemplarFormat = Literal["webp", "json"]
CLIENT_GONE = 499
"""Status in the access log of a request whose client went away; nobody receives it."""
REASON_HEADER = "X-Geocentroids-Empty"
"""Says why a tile is transparent: ``outside`` the image, or ``below-minzoom N``."""
EMPTY_CACHE_CONTROL = "public, max-age=60"
"""A tile below minzoom may hold data soon, on a faster device or after a restart."""


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


async def run(pool: Executor, function: Callable[..., T], *args: Any) -> T:
    """Run a function in a pool of threads."""
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)


async def find_codebook(service: Service, read: ReadParams) -> Codebook:
    """Return the codebook of a request, reading it from disk once."""
    known = service.known_codebook(read.codebook)
    return known if known is not None else await run(service.working, service.codebook, read.codebook)


async def find_classes(service: Service, codebook: Codebook, n: int | None) -> Classes:
    """Return the classes of a codebook, cutting its tree once for each ``n``."""
    known = service.known_classes(codebook, n)
    return known if known is not None else await run(service.working, service.classes, codebook, n)


async def find_dataset(service: Service, url: str, read: ReadParams, codebook: Codebook) -> Dataset:
    """Return the dataset of a request."""
    known = service.known_dataset(url, read.options, codebook)
    if known is None:  # in a thread: a local file's folder may be far away
        known = await asyncio.wrap_future(await run(service.working, service.dataset, url, read.options, codebook))
    return known


async def find_engine(service: Service, codebook: Codebook) -> LabelEngine:
    """Return the engine of a codebook, waiting for its encoder to load."""
    loading = service.engine(codebook)
    return loading.result() if loading.done() else await asyncio.wrap_future(follow(loading))


async def find_labels(service: Service, dataset: Dataset, codebook: Codebook) -> DatasetLabels:
    """Return where the labels of a dataset come from."""
    engine = await find_engine(service, codebook)
    kept = None if service.kept is None else await run(service.working, service.kept.find, dataset, codebook)
    return DatasetLabels(dataset, engine, kept)


async def open_all(service: Service, url: str, read: ReadParams) -> tuple[Codebook, DatasetLabels]:
    """Return the codebook of a request, and its dataset with the labels."""
    codebook = await find_codebook(service, read)
    dataset = await find_dataset(service, url, read, codebook)
    return codebook, await find_labels(service, dataset, codebook)


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


def zooms_of(service: Service, labels: DatasetLabels, tms: TileMatrixSet) -> tuple[int, int]:
    """Return minzoom and maxzoom of a dataset on this server: all from the first if its labels are kept."""
    return zoom_range(tms, labels.dataset, labels.seconds_per_chunk, service.settings.tile_budget_s)


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


def area_of_feature(feature: Mapping[str, Any], dataset: Dataset) -> Area:
    """Find the patches of a GeoJSON feature.

    Raises:
        InputError: if it has no geometry, or one that is not a polygon.
    """
    geometry = feature.get("geometry")
    if not isinstance(geometry, dict):
        raise InputError(f"the geometry is {_short(geometry)}; a Polygon or MultiPolygon is needed")
    return area_of_geometry(geometry, dataset.grid, dataset.footprint)


async def export(
    service: Service, labels: DatasetLabels, area: Area, look: StyleParams, raster_format: RasterFormat
) -> Response:
    """Return the labels of an area as a file, one pixel per patch.

    Raises:
        InputError: if the area holds no patch of the image, or too many.
    """
    if area.empty:
        raise InputError("the area holds no patch of the image; see bounds in /info")
    codebook = labels.engine.codebook
    style = look.style(codebook)
    classes = await find_classes(service, codebook, look.classes)
    _check_cost(service, _chunks_of(labels, area))
    timeout_s = service.settings.export_timeout_s
    block = await labels.every_patch(area.patches, service.exporting, timeout_s=timeout_s, over=service.closing.is_set)

    def written() -> Response:
        inside = np.where(area.inside, block.labels, np.uint16(NODATA_LABEL))
        if raster_format == "tif":
            content = label_geotiff(classes.of_labels(inside), area.patches, labels.dataset.grid, codebook, classes)
            return Response(
                content,
                media_type="image/tiff; application=geotiff",
                headers={"Content-Disposition": 'attachment; filename="classes.tif"'},
            )
        index, palette = palette_index(inside, block.similarity, classes, style, codebook.similarity_range())
        return Response(encode_indexed(index, palette, "png"), media_type=MEDIA_TYPE["png"])

    return await run(service.exporting, written)


async def statistics_of(
    service: Service, labels: DatasetLabels, features: Sequence[dict[str, Any]], classes: Classes
) -> list[dict[str, Any]]:
    """Return features with the area of every class inside each.

    Raises:
        InputError: if one is not a polygon, or all together hold too many patches.
    """
    deadline_s = time.monotonic() + service.settings.export_timeout_s
    areas = await run(service.exporting, _areas_of, service, labels, features)
    patch_area_m2 = labels.dataset.grid.patch_area_m2
    answered = []
    for feature, area in zip(features, areas, strict=True):
        left_s = max(0.0, deadline_s - time.monotonic())
        block = await labels.every_patch(area.patches, service.exporting, timeout_s=left_s, over=service.closing.is_set)
        statistics = await run(service.exporting, area_statistics, block, area, classes, patch_area_m2)
        answered.append(with_statistics(feature, statistics))
    return answered


def _areas_of(service: Service, labels: DatasetLabels, features: Sequence[dict[str, Any]]) -> list[Area]:
    """Find the patches of features, as long as they are not too many together."""
    areas: list[Area] = []
    chunks = 0
    for feature in features:
        areas.append(area_of_feature(feature, labels.dataset))
        chunks += _chunks_of(labels, areas[-1])
        _check_cost(service, chunks)  # as they come: each takes memory
    return areas


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


def _chunks_of(labels: DatasetLabels, area: Area) -> int:
    rows, cols = area.patches.chunk_range(labels.engine.layout.stride_patches).shape
    return rows * cols


def _check_cost(service: Service, chunks: int) -> None:
    """Raise InputError if a request needs more chunks than one may have computed."""
    if chunks > service.settings.max_chunks:
        raise InputError(
            f"the area needs {chunks} chunks; this server computes at most {service.settings.max_chunks} in one "
            "request. Split it, or use geocentroids classify"
        )


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
