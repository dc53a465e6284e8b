"""A member of a mosaic: an image, and what a document says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import shapely

from geocentroids_tiler.errors import MosaicError, short
from geocentroids_tiler.grid import Bounds

MAX_URL = 4096


@dataclass(frozen=True, slots=True)
class Member:
    """An image of a mosaic.

    Attributes:
        url: of the image, absolute or relative to the root folder.
        footprint: a shape in longitude and latitude that holds the image; None: the document does not say.
        taken_at: when it was taken; None: unknown.
        crs: its coordinate system, ``AUTHORITY:code``; None: the document does not say.
    """

    url: str
    footprint: Any | None = None
    taken_at: datetime | None = None
    crs: str | None = None


def member_url(value: object, what: str) -> str:
    """Return the address of an image as a document gives it.

    Raises:
        MosaicError: if it is none.
    """
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_URL:
        raise MosaicError(f"{what} names {short(value)} as an image; a URL of up to {MAX_URL} characters is needed")
    return value.strip()


def box(values: Sequence[Any], what: str) -> Any:
    """Return the shape of west, south, east, north; two boxes where it crosses the antimeridian.

    Raises:
        MosaicError: if these are not bounds in degrees.
    """
    try:
        west, south, east, north = (float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise MosaicError(f"{what} has bounds {short(list(values))}; west, south, east, north are needed") from None
    bounds: Bounds = (west, south, east, north)
    inside = all(math.isfinite(value) for value in bounds) and -90 <= south <= north <= 90
    if not inside or not (-180 <= west <= 180 and -180 <= east <= 180):
        raise MosaicError(f"{what} has bounds {list(bounds)}; west, south, east, north in degrees are needed")
    if west <= east:
        return shapely.box(*bounds)
    return shapely.multipolygons([shapely.box(west, south, 180, north), shapely.box(-180, south, east, north)])


def moment(value: object, what: str) -> datetime | None:
    """Return a date and time as RFC 3339 or ISO 8601 writes it, of UTC where it does not say; None for none.

    Raises:
        MosaicError: if it is anything else.
    """
    if value is None or value == "":
        return None
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        raise MosaicError(f"{what} has the date {short(value)}; accepted: 2024-05-31 or 2024-05-31T12:00:00Z") from None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
