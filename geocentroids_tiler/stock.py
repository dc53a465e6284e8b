"""TiTiler's own routes, bounded: they work in threads of which there are few, and read what they are told to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi.responses import Response
from fastapi.routing import APIRoute
from rasterio._err import CPLE_BaseError  # GDAL's errors, some of which rasterio passes on as they are
from rasterio.errors import RasterioError
from rio_tiler.errors import RioTilerError, TileOutsideBounds
from starlette.requests import Request
from titiler.core.errors import DEFAULT_STATUS_CODES

from geocentroids_tiler.errors import InputError, SourceUnavailableError
from geocentroids_tiler.gate import Gate
from geocentroids_tiler.geojson_size import check_bbox, check_geojson_size
from geocentroids_tiler.handlers import NoStoreRoute, empty_tile
from geocentroids_tiler.render import MEDIA_TYPE
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.stock_params import check_stock_request

logger = logging.getLogger(__name__)

PER_SOURCE = 4
"""Requests of one source at once, so that one that is silent leaves the others threads to work in."""
_UNUSABLE = (RioTilerError, ValueError, TypeError, AssertionError, LookupError, ArithmeticError, RecursionError)
"""What TiTiler and rio-tiler end with where a combination of parameters and image makes no sense."""


def stock_route(settings: Settings) -> type[APIRoute]:
    """Return a class of routes that share one bound.

    Args:
        settings: hold the bounds; a request that finds no room waits as long as it might wait for its source.
    """
    gate = Gate(settings.stock_requests, PER_SOURCE, "GEOCENTROIDS_STOCK_REQUESTS")

    class Bounded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                query = request.query_params
                coverage = request.method == "POST" and self.path.endswith("/statistics")
                check_stock_request(query.multi_items(), request.path_params, coverage)
                if request.method == "POST":
                    _check_body(await request.body(), settings)
                async with gate.enter(query.get("url", ""), settings.source_timeout_s):
                    try:
                        response: Response = await handler(request)
                    except TileOutsideBounds:
                        return _empty_tile(request)
                    except RasterioError as error:  # GDAL's words are not for those who chose the address
                        logger.warning("%s could not be read", request.url.path, exc_info=error)
                        raise SourceUnavailableError(f"cannot open {query.get('url')!r}") from error
                    except (*_UNUSABLE, CPLE_BaseError) as error:
                        if isinstance(error, RioTilerError) and _status(error) < 500:
                            raise  # TiTiler knows it
                        logger.warning("%s answered with 400", request.url.path, exc_info=error)
                        raise InputError(f"the image cannot be shown like that: {error}") from error
                    return response

            return handle

    class StockRoute(NoStoreRoute, Bounded):
        """One of TiTiler's routes, whose errors are those of our routes."""

    return StockRoute


def _status(error: RioTilerError) -> int:
    """Return the status that TiTiler has for an error."""
    return next(DEFAULT_STATUS_CODES[cls] for cls in type(error).__mro__ if cls in DEFAULT_STATUS_CODES)


def _empty_tile(request: Request) -> Response:
    """Return what our own tiles are outside an image: its bounds in degrees hold tiles that it does not touch.

    Raises:
        TileOutsideBounds: if the format has no transparency.
    """
    image_format = request.path_params.get("format", "png")
    if image_format not in MEDIA_TYPE:
        raise TileOutsideBounds(f"the tile lies outside of the image, and {image_format} has no transparency")
    return empty_tile(int(request.query_params.get("tilesize", 256)), image_format, "outside")


def _check_body(body: bytes, settings: Settings) -> None:
    """Check the size of GeoJSON; what is no JSON is TiTiler's to refuse."""
    try:
        document = json.loads(body)
    except RecursionError:
        raise InputError("the body is not GeoJSON: it is nested too deeply") from None
    except ValueError:
        return
    check_geojson_size(document, settings)
    check_bbox(document)
