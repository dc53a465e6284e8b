"""Headers that every answer has: what a browser may do with it, and that nobody keeps an error."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALL = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
_HTML = b"text/html"
_ACTIVE = (b"text/javascript", b"image/svg+xml", b"application/xml", b"text/xml")
"""Other media types that a browser runs, or that can hold what it runs. A worker has the policy of its own file."""


def page_policy(frame_ancestors: str) -> str:
    """Return the Content-Security-Policy of the viewer: its own files and this server's data, no inline code.

    Tiles are fetched and decoded, so they count as connections; MapLibre's worker is a file, not a blob; it has no
    basemap, so no other host is needed.

    Args:
        frame_ancestors: who may show the page in a frame, as the directive of that name says it.
    """
    return (
        "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'self'; "
        f"frame-ancestors {frame_ancestors}"
    )


class HeaderSet:
    """The headers that an answer should have, by what it is.

    Args:
        frame_ancestors: who may show a page in a frame.
    """

    def __init__(self, frame_ancestors: str) -> None:
        # Pages of others may draw tiles and load the viewer's files; one that isolates itself has to be told so.
        shared = (b"cross-origin-resource-policy", b"cross-origin")
        policy = (b"content-security-policy", page_policy(frame_ancestors).encode("latin-1"))
        self._page = (*_ALL, policy)
        self._active = (*_ALL, policy, shared)
        self._data = (*_ALL, shared)

    def complete(self, status: int, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer with those that were missing.

        Args:
            status: of the answer.
            headers: with names in lower case.
        """
        given = dict(headers)
        media_type = given.get(b"content-type", b"").partition(b";")[0].strip().lower()
        added = self._page if media_type == _HTML else self._active if media_type in _ACTIVE else self._data
        if status >= 400:
            added = (*added, (b"cache-control", b"no-store"))
        return [*headers, *(header for header in added if header[0] not in given)]


class SecurityHeadersMiddleware:
    """Adds the headers to answers that do not have them already."""

    def __init__(self, app: ASGIApp, frame_ancestors: str) -> None:
        self._app = app
        self._headers = HeaderSet(frame_ancestors)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and complete its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def completed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = self._headers.complete(message["status"], list(message.get("headers", ())))
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, completed)
