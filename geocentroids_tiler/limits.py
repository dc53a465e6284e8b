"""How much one request may bring along, and how many may be under way: refused before anything looks at them."""

from __future__ import annotations

from ipaddress import IPv6Address
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geocentroids_tiler.errors import (
    BodyTooLargeError,
    BusyError,
    GeocentroidsError,
    HeadersTooLargeError,
    TargetTooLongError,
    TooManyRequestsError,
)
from geocentroids_tiler.refusals import refuse
from geocentroids_tiler.settings import Settings

HEALTH_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
"""Always answered, however much is under way: a busy server is not a dead one."""
_LINE_BYTES = 4
"""The colon, the space and the end of a header's line."""
_RETRY_AFTER_S = 1.0


class LimitsMiddleware:
    """Refuses requests that are too large, or too many at once.

    The requests of a client are counted only while they are under way, so there are never more counters than
    connections. A client is an address, in IPv6 the network of 64 bits that one subscriber gets. Behind a proxy it is
    the address that a trusted proxy names (uvicorn's ``FORWARDED_ALLOW_IPS``); requests without an address, as over a
    Unix socket, count in all only.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self._clients: dict[str, int] = {}
        self._under_way = 0

    @property
    def clients(self) -> dict[str, int]:
        """How many requests of each client are under way; of no client there is a zero."""
        return dict(self._clients)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = self._too_large(scope)
        if error is None and scope["path"] in HEALTH_PATHS:
            await self._bounded(scope, receive, send)
            return
        client = client_of(scope)
        error = error or self._too_many(client)
        if error is not None:
            await refuse(error, scope, receive, send)
            return
        self._under_way += 1
        if client is not None:
            self._clients[client] = self._clients.get(client, 0) + 1
        try:
            await self._bounded(scope, receive, send)
        finally:
            self._under_way -= 1
            if client is not None:
                self._clients[client] -= 1
                if not self._clients[client]:
                    del self._clients[client]

    def _too_large(self, scope: Scope) -> GeocentroidsError | None:
        settings = self._settings
        target = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        if target > settings.max_target_bytes:
            return TargetTooLongError(
                f"path and query have {target} bytes; this server reads at most {settings.max_target_bytes} "
                "(GEOCENTROIDS_MAX_TARGET_BYTES)"
            )
        size = sum(len(name) + len(value) + _LINE_BYTES for name, value in scope["headers"])
        if size > settings.max_header_bytes:
            return HeadersTooLargeError(
                f"the headers have {size} bytes; this server reads at most {settings.max_header_bytes} "
                "(GEOCENTROIDS_MAX_HEADER_BYTES)"
            )
        if (_content_length(scope) or 0) > settings.max_body_bytes:
            return self._body_error()
        return None

    def _too_many(self, client: str | None) -> GeocentroidsError | None:
        settings = self._settings
        if self._under_way >= settings.requests_at_once:
            return BusyError(
                f"this server answers at most {settings.requests_at_once} requests at once "
                "(GEOCENTROIDS_REQUESTS_AT_ONCE)",
                _RETRY_AFTER_S,
            )
        if client is not None and self._clients.get(client, 0) >= settings.client_requests:
            return TooManyRequestsError(
                f"this server answers at most {settings.client_requests} requests of one client at once "
                "(GEOCENTROIDS_CLIENT_REQUESTS)",
                _RETRY_AFTER_S,
            )
        return None

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and end it where its body becomes too large: its length is a promise, or is not told."""
        if _has_no_body(scope):
            await self._app(scope, receive, send)
            return
        size, too_large, started = 0, False, False

        async def counted() -> Message:
            nonlocal size, too_large
            if too_large:
                return {"type": "http.disconnect"}
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.request" and size > self._settings.max_body_bytes:
                too_large = True
                return {"type": "http.disconnect"}  # for the application the client went away in the middle
            return message

        async def answer(message: Message) -> None:
            nonlocal started
            # What an application answers to half a body says nothing of use; what it has begun, it may end.
            if not too_large or started:
                started = True
                await send(message)

        try:
            await self._app(scope, counted, answer)
        except Exception:
            if not too_large:
                raise
        if too_large and not started:
            await refuse(self._body_error(), scope, receive, send)

    def _body_error(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the body is too large; this server reads at most {self._settings.max_body_bytes} bytes "
            "(GEOCENTROIDS_MAX_BODY_BYTES)"
        )


def client_of(scope: Scope) -> str | None:
    """Return what requests of one client have in common, or None where nothing is known of it."""
    client: Any = scope.get("client")
    host = str(client[0]) if client else ""
    if ":" not in host:
        return host or None
    try:
        address = IPv6Address(host)
    except ValueError:
        return host
    if address.ipv4_mapped is not None:  # all of IPv4 is in one network of 64 bits
        return str(address.ipv4_mapped)
    return address.packed[:8].hex()


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None


def _has_no_body(scope: Scope) -> bool:
    """Tell whether HTTP/1 says that a request has no body; in later versions one may come unannounced."""
    announced = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
    return not announced and scope.get("http_version", "1.1").startswith("1")
