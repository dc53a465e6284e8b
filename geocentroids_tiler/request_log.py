"""A line in the log for each request, with an id that its answer carries too."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geocentroids_tiler.labels.meters import Meters

logger = logging.getLogger("geocentroids_tiler.access")

HEADER = b"x-request-id"
_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestLogMiddleware:
    """Gives each request an id, counts it, and logs who asked for what and how it ended.

    The id is the client's ``X-Request-ID`` if that is a plain word, else a new one. Queries are not logged: a URL in
    them may carry a signature.
    """

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app = app
        self._meters = meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and log it when it has been answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.perf_counter()
        request_id = _id_of(scope)
        status, size = 500, 0

        async def record(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER, request_id)]}
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, record)
        finally:
            self._meters.requests.labels(status).inc()
            if logger.isEnabledFor(logging.INFO):
                client = scope.get("client")
                logger.info(
                    "%s %s %s %d %d B %.1f ms %s",
                    client[0] if client else "-",
                    scope["method"],
                    (scope.get("raw_path") or b"?").decode("ascii", "replace"),
                    status,
                    size,
                    (time.perf_counter() - start_s) * 1000,
                    request_id.decode(),
                )


def _id_of(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == HEADER and _ACCEPTED_ID.fullmatch(value):
            return bytes(value)
    return secrets.token_hex(8).encode()
