"""FastAPI's page of all routes, off unless an operator wants it: its script comes from another host."""

from __future__ import annotations

import base64
import hashlib
import re

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.requests import Request

_HOST = "https://cdn.jsdelivr.net"
_ICON_HOST = "https://fastapi.tiangolo.com"
_INLINE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_INLINE_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


def add_docs(app: FastAPI, frame_ancestors: str) -> None:
    """Add ``/docs``, with a Content-Security-Policy of its own that names what it runs."""

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """Return the page."""
        root = request.scope.get("root_path", "").rstrip("/")
        page = get_swagger_ui_html(openapi_url=f"{root}{app.openapi_url}", title=app.title)
        policy = docs_policy(bytes(page.body).decode(), frame_ancestors)
        page.headers["Content-Security-Policy"] = policy
        return page


def docs_policy(html: str, frame_ancestors: str) -> str:
    """Return a policy under which a page runs the inline code that it has now, the docs' host, and nothing else.

    Args:
        html: the page.
        frame_ancestors: who may show it in a frame.
    """
    scripts = " ".join(map(_hash, _INLINE_SCRIPT.findall(html)))
    styles = " ".join(map(_hash, _INLINE_STYLE.findall(html)))
    return (
        f"default-src 'none'; script-src {_HOST} {scripts}; style-src {_HOST} {styles}; "
        f"img-src 'self' data: {_ICON_HOST}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors {frame_ancestors}"
    )


def _hash(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
