"""Who may ask: API keys, and signatures that open one image. Off unless a key or a signing key is set.

A signature is the HMAC-SHA256, in URL-safe base64 without padding, of three lines: ``geocentroids-access-1``, the
``expires`` parameter (empty if there is none) and the ``url`` parameter. One signature serves every tile, TileJSON and
export of an image, as nothing else is in it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from urllib.parse import quote, urlencode

from pydantic import SecretStr
from starlette.datastructures import QueryParams
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from geocentroids_tiler.errors import AccessDeniedError
from geocentroids_tiler.refusals import refuse
from geocentroids_tiler.settings import Settings

SIGNATURE_PARAMETERS = frozenset({"expires", "signature"})
_VERSION = "geocentroids-access-1"
_REFUSAL = (
    "this needs a key (Authorization: Bearer KEY, or X-API-Key: KEY) or an address with a valid signature of its image"
)
_EXPIRES = re.compile(r"[0-9]{1,12}")

# Whole paths, and what is not listed is closed: "." and "[^/]" take no line's end, which a route's own pattern would
# let pass at the end of a path.
_OPEN = (
    r"/|/healthz|/readyz|/geocentroids/codebooks(/[^/\s]+)?",
    r"{prefix}/geocentroids/([^/\s]+/map\.html|viewer/[^/\s]+|legend|exemplars/[^/\s]+)",
)
"""Read no source and cost little; the viewer asks for a signature itself."""
_OF_AN_IMAGE = (
    r"{prefix}/geocentroids/(tiles/.+|[^/\s]+/tilejson\.json|WMTSCapabilities\.xml|info|footprints|point/.+|bbox/.+|feature\..+"
    r"|statistics)",
    r"{prefix}/(?!geocentroids(/|\s|$)).+",
)
"""What a signature opens: data of the image in ``url``."""
_SIGNED_METHODS = ("GET", "HEAD", "POST")


def is_protected(settings: Settings) -> bool:
    """Tell whether anybody is asked for a key or a signature."""
    return bool(settings.api_keys) or settings.signing_key is not None


def signature(key: SecretStr, url: str, expires: str = "") -> str:
    """Return the signature of an image's address.

    Args:
        key: the signing key.
        url: the image's address as the ``url`` parameter has it, decoded.
        expires: Unix time in seconds at which it ends to be valid, as ``expires`` has it; empty: never.
    """
    message = "\n".join((_VERSION, expires, url))
    digest = hmac.new(key.get_secret_value().encode(), message.encode("utf-8", "surrogatepass"), hashlib.sha256)
    return urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()


def signed_query(key: SecretStr, url: str, expires: int | None = None) -> str:
    """Return the query string that opens an image: ``url``, ``expires`` if it ends, and ``signature``."""
    text = "" if expires is None else str(expires)
    query = {"url": url, **({"expires": text} if text else {}), "signature": signature(key, url, text)}
    return urlencode(query, quote_via=quote, safe="")


class AccessMiddleware:
    """Asks for a key or a signature before anything answers: add it so that it stands before ``HotTilesMiddleware``.

    What was given out to a key is for that client alone, so shared caches are told not to keep it (``private``). What
    a signature opened may be kept by whoever sees its address, which holds the signature, but never for longer than
    the signature is valid.

    Args:
        app: what is protected.
        settings: hold the keys.
        prefix: of the ``TilerFactory``.
        clock: tells the Unix time in seconds.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings, prefix: str = "/cog", clock: Callable[[], float] = time.time
    ) -> None:
        self._app = app
        self._keys = [_digest(key.get_secret_value().encode()) for key in settings.api_keys]
        self._signing_key = settings.signing_key
        self._clock = clock
        self._open = _pattern(_OPEN, prefix)
        self._of_an_image = _pattern(_OF_AN_IMAGE, prefix)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on and see to it that its answer is not kept where it must not be."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = _path_of(scope)
        if scope["type"] == "http" and self._open.fullmatch(path):
            await self._app(scope, receive, send)
            return
        if self._has_key(scope):
            await self._app(scope, receive, _with_cache_control(send, private))
            return
        left_s = self._signed_for_s(scope, path)
        if left_s is None:
            await refuse(AccessDeniedError(_REFUSAL), scope, receive, send)
            return
        await self._app(scope, receive, _with_cache_control(send, lambda value: fresh_for(value, left_s)))

    def _has_key(self, scope: Scope) -> bool:
        found = False
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                given = given.strip() if scheme.lower() == b"bearer" else b""
            elif name == b"x-api-key":
                given = value.strip()
            else:
                continue
            digest = _digest(given)
            for key in self._keys:  # all of them, so that the time tells nothing of which
                found |= hmac.compare_digest(digest, key)
        return found

    def _signed_for_s(self, scope: Scope, path: str) -> float | None:
        """Return for how long a request's signature is still valid, or None if it does not open this path."""
        if self._signing_key is None or scope["type"] != "http" or scope["method"] not in _SIGNED_METHODS:
            return None
        query = QueryParams(scope["query_string"])
        given = {name: query.getlist(name) for name in ("url", "expires", "signature")}
        if not self._of_an_image.fullmatch(path) or any(len(values) > 1 for values in given.values()):
            return None
        url, expires, signed = ("".join(values) for values in given.values())
        if not given["url"] or (given["expires"] and not _EXPIRES.fullmatch(expires)):
            return None
        expected = signature(self._signing_key, url, expires)
        valid = hmac.compare_digest(expected.encode(), signed.encode("utf-8", "surrogatepass"))
        left_s = float(expires) - self._clock() if expires else float("inf")
        return left_s if valid and left_s > 0 else None


def private(value: str | None) -> str:
    """Return a ``Cache-Control`` that lets no shared cache keep an answer, else as it was."""
    directives = _directives(value)
    if "no-store" in directives:
        return ", ".join(directives)
    kept = [each for each in directives if each not in ("public", "private") and not each.startswith("s-maxage")]
    return ", ".join(["private", *kept])


def fresh_for(value: str | None, left_s: float) -> str:
    """Return a ``Cache-Control`` under which an answer is used for ``left_s`` seconds at most.

    Without one, an answer is kept by nobody but the client: nothing says for how long it would be fresh.
    """
    directives = _directives(value)
    if not directives:
        return "private"
    if left_s == float("inf"):
        return ", ".join(directives)
    capped = []
    for directive in directives:
        name, _, given = directive.partition("=")
        if name in ("max-age", "s-maxage"):
            seconds = int(given) if given.isdigit() else 0
            capped.append(f"{name}={min(seconds, int(left_s))}")
        elif name not in ("immutable", "stale-while-revalidate", "stale-if-error"):  # they go on beyond max-age
            capped.append(directive)
    return ", ".join(capped)


def _with_cache_control(send: Send, change: Callable[[str | None], str]) -> Send:
    async def changed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            given = [value.decode("latin-1") for name, value in headers if name == b"cache-control"]
            if message["status"] < 400 or given:  # errors without one get theirs elsewhere
                kept = [header for header in headers if header[0] != b"cache-control"]
                value = change(", ".join(given) or None)
                message = {**message, "headers": [*kept, (b"cache-control", value.encode("latin-1"))]}
        await send(message)

    return changed


def _directives(value: str | None) -> list[str]:
    return [part.strip().lower() for part in (value or "").split(",") if part.strip()]


def _path_of(scope: Scope) -> str:
    """Return the path that the router looks at, without what a proxy's ``root_path`` puts before it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path[len(root) :] if root and path.startswith(root + "/") else path


def _pattern(parts: Sequence[str], prefix: str) -> re.Pattern[str]:
    return re.compile("|".join(part.replace("{prefix}", re.escape(prefix)) for part in parts))


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()
