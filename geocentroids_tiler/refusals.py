"""Refusing a request before any route sees it."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from geocentroids_tiler.errors import GeocentroidsError, http_headers, http_status


def refusal(error: GeocentroidsError) -> JSONResponse:
    """Return the answer to a request that ended with ``error``: one sentence, which nobody keeps."""
    headers = {**http_headers(error), "Cache-Control": "no-store"}
    return JSONResponse({"detail": str(error)}, http_status(error), headers)


async def refuse(error: GeocentroidsError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with ``error``."""
    await refusal(error)(scope, receive, send)
