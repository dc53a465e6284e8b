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


def vertices_exceed(document: Any, most: int) -> bool:
    """Tell whether there are more than ``most`` vertices in a document: lists that begin with a number."""
    count, left = 0, [document]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left.extend(item.values())
        elif isinstance(item, list):
            if item and isinstance(item[0], int | float):
                count += 1
                if count > most:
                    return True
            else:
                left.extend(item)
    return False
