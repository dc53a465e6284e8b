"""How large a GeoJSON document may be, before anything builds geometries of it."""

from __future__ import annotations

from typing import Any

from geocentroids_tiler.errors import InputError
from geocentroids_tiler.settings import Settings


def check_geojson_size(document: Any, settings: Settings) -> None:
    """Check a Feature, a FeatureCollection or anything else that came as JSON.

    Args:
        document: as the JSON was read.
        settings: hold the bounds.

    Raises:
        InputError: if it has too many features or vertices.
    """
    features = document.get("features") if isinstance(document, dict) else None
    if isinstance(features, list) and len(features) > settings.max_features:
        raise InputError(
            f"the body has {len(features)} features; this server reads at most {settings.max_features} in one request "
            "(GEOCENTROIDS_MAX_FEATURES)"
        )
    if vertices_exceed(document, settings.max_vertices):
        raise InputError(
            f"the body has more than {settings.max_vertices} vertices, which is what this server reads in one request "
            "(GEOCENTROIDS_MAX_VERTICES)"
        )


def check_bbox(document: Any) -> None:
    """Refuse what has a bbox that does not hold it; only for what takes a bbox at its word, as rasterio does.

    Raises:
        InputError: if there is one.
    """
    if strays_from_bbox(document):
        raise InputError("the body has a bbox that does not hold all vertices of what it is the bbox of; leave it out")


def vertices_exceed(document: Any, most: int) -> bool:
    """Tell whether there are more than ``most`` vertices in a document: lists that begin with a number or a text."""
    count, left = 0, [document]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            if item and isinstance(item[0], int | float | str):
                count += 1
                if count > most:
                    return True
            else:
                left.extend(item)
    return False


def strays_from_bbox(document: Any) -> bool:
    """Tell whether something has a bbox that does not hold it; what is no number is in none.

    rasterio takes a bbox for what a geometry covers. GDAL walks along lines that leave the image pixel by pixel, for
    ever if they are long, and no other thread runs meanwhile.
    """
    left: list[tuple[Any, tuple[list[Any], ...]]] = [(document, ())]
    while left:
        item, boxes = left.pop()
        if isinstance(item, dict):
            if (box := item.get("bbox")) is not None:
                if not isinstance(box, list) or len(box) not in (4, 6) or not _are_numbers(box):
                    return True
                boxes = (*boxes, box)
            left.extend(
                (item[key], boxes) for key in ("features", "geometry", "geometries", "coordinates") & item.keys()
            )
        elif isinstance(item, list) and item and not isinstance(item[0], list | dict):
            if not all(_holds(box, item) for box in boxes):
                return True
        elif isinstance(item, list):
            left.extend((value, boxes) for value in item)
    return False


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _holds(box: list[Any], vertex: list[Any]) -> bool:
    west, south, east, north = box[0], box[1], box[len(box) // 2], box[len(box) // 2 + 1]
    return len(vertex) > 1 and _are_numbers(vertex) and west <= vertex[0] <= east and south <= vertex[1] <= north
