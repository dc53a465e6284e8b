"""The web page: built from ``static/`` at packaging time, filled with addresses when it is served."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "static", _PACKAGE.parent / "static" / "dist")
"""Where a wheel and where a source checkout keep the built viewer."""

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

_MISSING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>geocentroids</title></head><body>
<h1>The viewer is not built</h1>
<p>This installation has no web page, because Node.js was not at hand when it was built. Everything else works.</p>
<p>To build it, install Node.js 20 or later and run <code>make viewer</code> in a checkout, then install again.</p>
<p>Meanwhile these addresses work in QGIS, Leaflet and MapLibre:</p>
<pre>{endpoint}/tiles/WebMercatorQuad/{{z}}/{{x}}/{{y}}.png?url=...
{endpoint}/WebMercatorQuad/tilejson.json?url=...
{endpoint}/WMTSCapabilities.xml?url=...</pre>
</body></html>
"""


def folder() -> Path | None:
    """Return the folder of the built viewer, or None if it was never built."""
    return next((path for path in _FOLDERS if (path / "index.html").is_file()), None)


def page(config: dict[str, Any], assets: str) -> str:
    """Return the page as HTML.

    Args:
        config: what the script needs to know; anything in it is data, never markup.
        assets: address of the folder of scripts and styles.
    """
    built = folder()
    if built is None:
        return _MISSING.format(endpoint=escape(str(config["endpoint"])))
    # Inside <script type="application/json"> only "</" and "<!--" could end or change the element.
    data = json.dumps(config).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    html = (built / "index.html").read_text(encoding="utf-8")
    return html.replace("__GEOCENTROIDS_ASSETS__", escape(assets, quote=True)).replace("__GEOCENTROIDS_CONFIG__", data)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the viewer, plain and compressed."""

    content: bytes
    gzipped: bytes
    media_type: str


@lru_cache(maxsize=64)
def asset(name: str) -> Asset | None:
    """Return a file of the viewer, or None if there is no such file."""
    built = folder()
    if built is None or name not in {path.name for path in built.iterdir() if path.is_file()}:
        return None
    content = (built / name).read_bytes()
    media_type = _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
    return Asset(content, gzip.compress(content, mtime=0), media_type)
