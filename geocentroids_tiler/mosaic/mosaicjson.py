"""MosaicJSON: images by the quadkeys of the tiles that they touch.

Source: https://github.com/developmentseed/mosaicjson-spec, versions 0.0.1 to 0.0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import shapely

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.mosaic.members import Member, member_url

MAX_ZOOM = 30


def read_mosaicjson(document: Mapping[str, Any], resolve: Callable[[str], str], max_members: int) -> tuple[Member, ...]:
    """Read a MosaicJSON.

    Args:
        document: as it was read.
        resolve: makes addresses absolute.
        max_members: the most images; what is more is not looked at.

    Returns:
        Its images in the order in which they are named first, each with the tiles that it is named for.

    Raises:
        MosaicError: if it is not one.
    """
    tiles = document.get("tiles")
    if not isinstance(tiles, dict):
        raise MosaicError(f"tiles of the MosaicJSON is {short(tiles)}; an object of quadkeys is needed")
    prefix = document.get("asset_prefix") or ""
    if not isinstance(prefix, str):
        raise MosaicError(f"asset_prefix of the MosaicJSON is {short(prefix)}; a text is needed")
    places: dict[str, list[Any]] = {}
    for quadkey, assets in tiles.items():
        shape = quadkey_box(quadkey)
        if not isinstance(assets, list):
            raise MosaicError(f"tile {short(quadkey)} of the MosaicJSON is {short(assets)}; a list of images is needed")
        for asset in assets:
            url = resolve(prefix + member_url(asset, f"tile {quadkey!r} of the MosaicJSON"))
            places.setdefault(url, []).append(shape)
            if len(places) > max_members:
                raise MosaicError(f"the MosaicJSON names more images than the {max_members} that this server takes")
    return tuple(Member(url, shapely.union_all(shapes)) for url, shapes in places.items())


def quadkey_box(quadkey: str) -> Any:
    """Return the shape, in longitude and latitude, of a tile of Web Mercator.

    Source: https://learn.microsoft.com/bingmaps/articles/bing-maps-tile-system.

    Raises:
        MosaicError: if it is not a quadkey.
    """
    if not 0 < len(quadkey) <= MAX_ZOOM or set(quadkey) - set("0123"):
        raise MosaicError(f"{short(quadkey)} is not a quadkey; accepted: 1 to {MAX_ZOOM} digits 0 to 3")
    digits = [int(digit) for digit in quadkey]
    col = sum((digit & 1) << place for place, digit in enumerate(reversed(digits)))
    row = sum((digit >> 1) << place for place, digit in enumerate(reversed(digits)))
    count = 2 ** len(digits)
    west, east = (360 * x / count - 180 for x in (col, col + 1))
    north, south = (math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * y / count)))) for y in (row, row + 1))
    return shapely.box(west, south, east, north)
