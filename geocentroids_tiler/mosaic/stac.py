"""STAC items: which of their assets is the image, where it lies, when it was taken.

Source: https://github.com/radiantearth/stac-spec (1.0 and 1.1), https://github.com/stac-extensions/projection and
https://github.com/radiantearth/stac-api-spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import shapely
from shapely.errors import ShapelyError
from shapely.geometry import shape

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.mosaic.members import Member, box, member_url, moment

MAX_VERTICES = 1000
"""Of a footprint; one with more is taken for its bounds."""
MAX_NAMES = 5
"""Assets that an error names."""
_POLYGONS = ("Polygon", "MultiPolygon")


def read_item(item: Any, resolve: Callable[[str], str]) -> Member:
    """Read a STAC item.

    The image is its asset with the role ``visual``, else the one named ``visual`` or ``image``, else its only GeoTIFF
    that is no thumbnail, overview or metadata.

    Args:
        item: as it was read.
        resolve: makes addresses absolute.

    Raises:
        MosaicError: if it is not one, or it is not clear which asset is the image.
    """
    if not isinstance(item, dict) or item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        raise MosaicError(f"one of the features is no STAC item: {short(item)}")
    what = f"item {short(item.get('id'))}"
    found = item.get("properties")
    properties: Mapping[str, Any] = found if isinstance(found, dict) else {}
    asset = _image(item["assets"], what)
    return Member(
        url=resolve(member_url(asset.get("href"), what)),
        footprint=_footprint(item, what),
        taken_at=moment(properties.get("datetime") or properties.get("start_datetime"), what),
        crs=_crs(asset) or _crs(properties),
    )


def next_page(collection: Mapping[str, Any], url: str) -> str | None:
    """Return the address of the next page of a search, or None if this is the last.

    Raises:
        MosaicError: if it can be had by POST only, or is no address of a web server.
    """
    links = collection.get("links")
    for link in links if isinstance(links, list) else []:
        if not isinstance(link, dict) or link.get("rel") != "next":
            continue
        if str(link.get("method", "GET")).upper() != "GET":
            raise MosaicError(f"the next page of {url!r} needs a POST request; ask for all items at once (limit=...)")
        address = urljoin(url, member_url(link.get("href"), "the link to the next page"))
        if urlsplit(address).scheme not in ("http", "https"):
            raise MosaicError(f"the next page of {url!r} is {short(address)}; an http(s) URL is needed")
        return address
    return None


def _image(assets: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Return the asset that is the image."""
    usable = {name: asset for name, asset in assets.items() if isinstance(asset, dict)}
    images = {name: asset for name, asset in usable.items() if _is_image(asset)}
    for group in (
        [asset for asset in images.values() if "visual" in _roles(asset)],
        [asset for name, asset in images.items() if name.lower() == "visual"],
        [asset for name, asset in images.items() if name.lower() == "image"],
        list(images.values()),
    ):
        if len(group) == 1:
            return group[0]
        if group:
            break
    names = [short(name) for name in (images or assets)]
    found = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "") or "none"
    raise MosaicError(
        f"{what} has no asset that is clearly its image (it has {found}); accepted: one GeoTIFF, or one with the role "
        "visual"
    )


def _is_image(asset: Mapping[str, Any]) -> bool:
    href, media_type = str(asset.get("href", "")), str(asset.get("type", ""))
    tiff = "tiff" in media_type.lower() or urlsplit(href).path.lower().endswith((".tif", ".tiff"))
    return tiff and not _roles(asset) & {"thumbnail", "overview", "metadata"}


def _roles(asset: Mapping[str, Any]) -> set[str]:
    roles = asset.get("roles")
    return {role for role in roles if isinstance(role, str)} if isinstance(roles, list) else set()


def _footprint(item: Mapping[str, Any], what: str) -> Any | None:
    geometry, bounds = item.get("geometry"), item.get("bbox")
    if isinstance(geometry, dict) and geometry.get("type") in _POLYGONS:
        try:
            found = shapely.force_2d(shape(geometry))
        except (ShapelyError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise MosaicError(f"the geometry of {what} cannot be read: {error}") from error
        if not found.is_empty:
            whole = box(found.bounds, what)
            simple = shapely.get_num_coordinates(found) <= MAX_VERTICES and found.is_valid
            return found if simple else whole  # to mend a shape may take for ever, and all need not be
    if isinstance(bounds, list) and len(bounds) in (4, 6):
        return box(bounds if len(bounds) == 4 else [*bounds[:2], *bounds[3:5]], what)
    return None


def _crs(fields: Mapping[str, Any]) -> str | None:
    code, number = fields.get("proj:code"), fields.get("proj:epsg")
    if isinstance(code, str) and code:
        return code
    return f"EPSG:{number}" if isinstance(number, int) and not isinstance(number, bool) else None
