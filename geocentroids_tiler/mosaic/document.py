"""Documents that name images: MosaicJSON, STAC items and searches, lists. From their bytes to members; no network."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

from shapely.errors import ShapelyError

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.mosaic.lists import read_list
from geocentroids_tiler.mosaic.members import Member
from geocentroids_tiler.mosaic.mosaicjson import read_mosaicjson
from geocentroids_tiler.mosaic.stac import next_page, read_item

__all__ = ["Document", "Member", "is_document", "read_document"]

ACCEPTED = (
    "a MosaicJSON, a STAC item, an item collection or a search that answers with one, or a list with a URL in each line"
)
_SUFFIXES = re.compile(r"\.(json|geojson|txt|csv)(\.gz)?$", re.IGNORECASE)
_STAC_API = re.compile(r"/(search|collections/[^/]+/items(/[^/]+)?)/?$")
PARTS_PER_DOCUMENT, PARTS_PER_MEMBER = 10_000, 100
"""Objects and arrays of a JSON document; each takes memory that its few bytes do not tell of."""
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class Document:
    """What a document says.

    Attributes:
        kind: ``mosaicjson``, ``stac`` or ``list``.
        members: the images, in the document's order.
        next_url: where the next page of a search is; None: there is none.
    """

    kind: str
    members: tuple[Member, ...]
    next_url: str | None = None


def is_document(url: str) -> bool:
    """Tell by its address whether a URL or path names a document and not an image.

    Those end in .json, .geojson, .txt or .csv (and .gz, if compressed), or are the items or the search of a STAC API.
    """
    try:
        path = urlsplit(url).path if "://" in url else url
    except ValueError:  # whoever opens it says what is wrong with it
        return False
    return bool(_SUFFIXES.search(path) or ("://" in url and _STAC_API.search(path)))


def read_document(content: bytes, url: str, max_bytes: int, max_members: int) -> Document:
    """Read a document.

    Args:
        content: its bytes, as they came or compressed with gzip.
        url: where it is; relative addresses in it start there.
        max_bytes: the most that it may unpack to.
        max_members: the most images that it may name.

    Raises:
        MosaicError: if it is no such document, names too many images, or one of them in a way that cannot be used.
    """
    text = _text_of(content, url, max_bytes)
    try:
        return _read(text, url, max_members)
    except (ValueError, OverflowError, RecursionError, ShapelyError) as error:  # odd numbers, addresses and shapes
        raise MosaicError(f"{url!r} cannot be read: {error}") from error


def _read(text: str, url: str, max_members: int) -> Document:
    resolve = _resolver(url)
    if text.lstrip()[:1] not in ("{", "["):
        return _checked(Document("list", read_list(text, resolve, max_members)), url, max_members)
    if text.count("[") + text.count("{") > PARTS_PER_DOCUMENT + PARTS_PER_MEMBER * max_members:
        raise MosaicError(f"{url!r} has too many parts for {max_members} images; leave out what is not needed")
    found = _json_of(text, url)
    kind = found.get("type")
    if "mosaicjson" in found or ("tiles" in found and kind is None):
        return _checked(Document("mosaicjson", read_mosaicjson(found, resolve, max_members)), url, max_members)
    if kind == "Feature":
        return Document("stac", (read_item(found, resolve),))
    if kind == "FeatureCollection" and isinstance(found.get("features"), list):
        items = found["features"]
        _check_count(len(items), url, max_members)
        return Document("stac", tuple(read_item(item, resolve) for item in items), next_page(found, url))
    if kind in ("Collection", "Catalog"):
        raise MosaicError(f"{url!r} is a STAC {kind}; accepted: its items, as an item collection or a search")
    raise MosaicError(f"{url!r} is JSON of type {short(kind)}; accepted: {ACCEPTED}")


def _text_of(content: bytes, url: str, max_bytes: int) -> str:
    if content.startswith(_GZIP):
        try:
            with gzip.open(io.BytesIO(content)) as unpacked:
                content = unpacked.read(max_bytes + 1)
        except (OSError, EOFError) as error:
            raise MosaicError(f"{url!r} cannot be unpacked: {error}") from error
    if len(content) > max_bytes:
        raise MosaicError(f"{url!r} has more than {max_bytes} bytes (GEOCENTROIDS_MOSAIC_BYTES)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MosaicError(f"{url!r} is no text; accepted: {ACCEPTED}") from error


def _json_of(text: str, url: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MosaicError(f"{url!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise MosaicError(f"{url!r} is a JSON {type(found).__name__}; accepted: {ACCEPTED}")
    return found


def _resolver(url: str) -> Callable[[str], str]:
    """Return what turns an address in a document into one that does not depend on it.

    What a document on a server names is on servers too, never a file of ours.
    """
    remote = "://" in url
    folder = url.rpartition("/")[0]

    def resolve(address: str) -> str:
        if remote:
            found = urljoin(url, address)
            if "://" in found:
                return found
            if address.startswith("/") or ":" in address:  # of a bucket, which urljoin does not know
                raise MosaicError(f"{short(address)} in {url!r} is no address beside it; accepted: a URL, or a name")
            return f"{folder}/{address.removeprefix('./')}"
        if "://" in address or address.startswith("/") or not folder:
            return address.removeprefix("./")
        return f"{folder}/{address.removeprefix('./')}"

    return resolve


def _checked(document: Document, url: str, max_members: int) -> Document:
    _check_count(len(document.members), url, max_members)
    if not document.members:
        raise MosaicError(f"{url!r} names no image; accepted: {ACCEPTED}")
    return document


def _check_count(count: int, url: str, max_members: int) -> None:
    if count > max_members:
        raise MosaicError(f"{url!r} names more images than this server takes as one layer (GEOCENTROIDS_MOSAIC_IMAGES)")
