"""MosaicJSON: images by the quadkeys of the tiles that they touch.

Source: https://github.com/developmentseed/mosaicjson-spec, versions 0.0.1 to 0.0.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.mosaic.members import Member, member_url

MAX_ZOOM = 30
REFERENCES_PER_MEMBER = 100
"""Tiles that name an image, on average."""
MAX_TILES = 64
"""Tiles of one image whose shape is kept."""


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
    bounds = shapely.bounds([quadkey_box(quadkey) for quadkey in tiles]).reshape(-1, 4)
    places: dict[str, list[int]] = {}
    references = 0
    for number, (quadkey, assets) in enumerate(tiles.items()):
        if not isinstance(assets, list):
            raise MosaicError(f"tile {short(quadkey)} of the MosaicJSON is {short(assets)}; a list of images is needed")
        references += len(assets)
        for asset in assets:
            places.setdefault(member_url(asset, f"tile {quadkey!r} of the MosaicJSON"), []).append(number)
        if len(places) > max_members or references > REFERENCES_PER_MEMBER * max_members:
            raise MosaicError(f"the MosaicJSON names more images, or names them more often, than {max_members} allow")
    return tuple(Member(resolve(prefix + asset), _union(bounds[numbers])) for asset, numbers in places.items())


def _union(bounds: NDArray[np.float64]) -> Any:
    """Return the shape of tiles; of very many the rectangle around them."""
    if len(bounds) > MAX_TILES:
        return shapely.box(*bounds[:, :2].min(axis=0), *bounds[:, 2:].max(axis=0))
    return shapely.union_all(shapely.box(*bounds.T))


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
