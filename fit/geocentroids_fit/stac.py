"""A codebook and its encoder as a STAC item with the Machine Learning Model extension, for catalogues of models.

Source: https://github.com/stac-extensions/mlm/tree/v1.5.0 (fields), https://github.com/radiantearth/stac-spec (v1.1.0).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import shapely
from shapely.geometry.polygon import orient

from geocentroids_tiler.codebook import (
    ARRAYS_FILE,
    CARD_FILE,
    ENCODER_FILE,
    MANIFEST_FILE,
    Codebook,
    Manifest,
    Resampling,
)
from geocentroids_tiler.colors import hex_color
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.exemplars import EXEMPLARS_DIR, INDEX_FILE
from geocentroids_tiler.grid import Bounds

STAC_VERSION = "1.1.0"
MLM_SCHEMA = "https://stac-extensions.github.io/mlm/v1.5.0/schema.json"
PROJECT_URL = "https://github.com/geocentroids/geocentroids-tiler"
EVER = datetime(1900, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""A period that is not known, as the extension's best practices advise to write it."""
BANDS = ("red", "green", "blue")
DEGREE_DECIMALS = 6
"""A tenth of a metre."""
_RESIZE: dict[Resampling, str] = {
    "nearest": "interpolation-nearest",
    "bilinear": "interpolation-linear",
    "cubic": "interpolation-cubic",
    "average": "interpolation-area",
}
_LICENCE = re.compile(r"[\w.+-]+")
"""What STAC takes for a licence: the identifier of one, or ``other``."""


def mlm_item(
    codebook: Codebook,
    *,
    bounds: Sequence[Bounds],
    period: tuple[datetime, datetime] = EVER,
    total_parameters: int | None = None,
    exemplars: bool = False,
) -> dict[str, Any]:
    """Describe a codebook as a STAC item. The same arguments give the same item.

    Args:
        codebook: the codebook; its directory need not exist yet.
        bounds: west, south, east, north in degrees of each training image. The item lies where they do.
        period: when the training images were taken: first and last moment, with time zones. An item must have a date;
            where it is not known, it is the widest one (1900 to 9999).
        total_parameters: of the encoder, if known.
        exemplars: whether the codebook is to have exemplars.

    Raises:
        InputError: if there are no bounds, or the period has no time zones or ends before it begins.
    """
    manifest = codebook.manifest
    geometry, bbox = _place(bounds)
    licence = manifest.licence.replace(" ", "-")
    properties = {
        "title": manifest.title or manifest.name,
        "description": f"{len(codebook)} classes of ground, found without labels: the nearest of {len(codebook)} "
        f"centroids ({manifest.assignment.metric}) to the encoder's vector for each patch of {codebook.patch_m:g} m.",
        **_times(period),
        "license": licence if _LICENCE.fullmatch(licence) else "other",
        **({"providers": [{"name": manifest.attribution}]} if manifest.attribution else {}),
        "gsd": manifest.preprocess.gsd_m,
        "bands": [{"name": name, "data_type": "uint8"} for name in BANDS],
        **_model(codebook, total_parameters),
    }
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [MLM_SCHEMA],
        "id": f"{manifest.name}-{manifest.version}",
        "geometry": geometry,
        "bbox": bbox,
        "properties": properties,
        "links": [
            {"rel": "about", "href": PROJECT_URL, "type": "text/html", "title": "geocentroids-tiler"},
            {"rel": "license", "href": f"./{CARD_FILE}", "type": "text/markdown", "title": "Model card"},
        ],
        "assets": _assets(manifest, exemplars),
    }


def _place(bounds: Sequence[Bounds]) -> tuple[dict[str, Any], list[float]]:
    """Return the union of rectangles as GeoJSON, and its bounds."""
    if not bounds:
        raise InputError("the item has no place: the bounds of at least one training image are needed")
    union = shapely.union_all([shapely.box(*each) for each in bounds])
    parts = [orient(part) for part in shapely.get_parts(union.normalize())]
    polygons = [
        [[[round(value, DEGREE_DECIMALS) for value in point] for point in ring.coords] for ring in rings]
        for rings in ((part.exterior, *part.interiors) for part in parts)
    ]
    geometry: dict[str, Any] = {"type": "MultiPolygon", "coordinates": polygons}
    if len(polygons) == 1:
        geometry = {"type": "Polygon", "coordinates": polygons[0]}
    return geometry, [round(value, DEGREE_DECIMALS) for value in union.bounds]


def _times(period: tuple[datetime, datetime]) -> dict[str, str | None]:
    """Return the date of an item: one moment, or none and the ends of a period."""
    start, end = period
    if start.tzinfo is None or end.tzinfo is None or start > end:
        raise InputError(
            f"period {start} to {end} is not one; two moments with time zones are needed, the earlier first"
        )
    first, last = (f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" for moment in period)
    return {"datetime": first if start == end else None, "start_datetime": first, "end_datetime": last}


def _model(codebook: Codebook, total_parameters: int | None) -> dict[str, Any]:
    """Return the fields of the extension."""
    manifest = codebook.manifest
    encoder, pre = manifest.encoder, manifest.preprocess
    embedded = encoder.source == ENCODER_FILE
    window_px = pre.window_patches * encoder.patch_px
    # An embedded encoder takes pixels as they are and normalises them itself; others take normalised ones.
    pixels: dict[str, Any] = {
        "shape": [-1, window_px, window_px, 3] if embedded else [-1, 3, window_px, window_px],
        "dim_order": ["batch", "height", "width", "bands"] if embedded else ["batch", "bands", "height", "width"],
        "data_type": "uint8" if embedded else "float32",
    }
    scaling = [
        {"type": "z-score", "mean": round(255 * mean, 4), "stddev": round(255 * std, 4)}
        for mean, std in zip(pre.mean, pre.std, strict=True)
    ]
    patches: dict[str, Any] = {
        "shape": [-1, pre.window_patches, pre.window_patches],
        "dim_order": ["batch", "height", "width"],
    }
    return {
        "mlm:name": f"geocentroids {manifest.name}".rstrip("._-"),
        "mlm:architecture": encoder.architecture,
        "mlm:tasks": ["semantic-segmentation", "similarity-search"],
        "mlm:framework": "ONNX" if embedded else "PyTorch",
        "mlm:accelerator": None,
        **({} if total_parameters is None else {"mlm:total_parameters": total_parameters}),
        **({} if embedded else {"mlm:pretrained": True, "mlm:pretrained_source": encoder.source}),
        "mlm:input": [
            {
                "name": "windows",
                "description": f"Windows of {pre.window_patches} x {pre.window_patches} patches at {pre.gsd_m:g} m per "
                "pixel, on the ground grid.",
                "bands": list(BANDS),
                "input": pixels,
                **({} if embedded else {"value_scaling": scaling}),
                "resize_type": _RESIZE[pre.resampling],
                "pre_processing_function": {
                    "format": "python",
                    "expression": "geocentroids_tiler.source:read_windows",
                },
            }
        ],
        "mlm:output": [
            {
                "name": "tokens",
                "description": "The encoder's vector for each patch.",
                "tasks": ["similarity-search"],
                "result": {
                    "shape": [*patches["shape"], encoder.dim],
                    "dim_order": [*patches["dim_order"], "embedding"],
                    "data_type": "float32",
                },
            },
            {
                "name": "labels",
                "description": "The centroid nearest to each patch's vector, blended over windows that overlap.",
                "tasks": ["semantic-segmentation"],
                "result": {**patches, "data_type": "uint16"},
                "classification:classes": _classes(codebook),
                "post_processing_function": {
                    "format": "python",
                    "expression": "geocentroids_tiler.labels.engine:LabelEngine",
                },
            },
        ],
        "mlm:hyperparameters": {
            "k": len(codebook),
            "dim": encoder.dim,
            **manifest.assignment.model_dump(mode="json", exclude_none=True),
            "patch_px": encoder.patch_px,
            "register_tokens": encoder.register_tokens,
            **pre.model_dump(mode="json"),
            "training": manifest.training,
        },
    }


def _classes(codebook: Codebook) -> list[dict[str, Any]]:
    """Return the labels as classes of STAC's classification extension."""
    classes = codebook.classes()
    return [
        {
            "value": label,
            "name": f"class-{label}",
            "description": classes.names[label] or f"class {label}",
            "color_hint": hex_color(classes.colors[label])[1:].upper(),
        }
        for label in range(len(classes))
    ]


def _assets(manifest: Manifest, exemplars: bool) -> dict[str, Any]:
    """Return the files of a codebook; the model is the encoder, and the centroids are what it is used with."""
    encoder = manifest.encoder
    if encoder.source == ENCODER_FILE:
        model = {"href": f"./{ENCODER_FILE}", "type": "application/octet-stream; framework=onnx", "artifact": "onnx"}
    else:
        model = {
            "href": f"https://huggingface.co/{encoder.source}/resolve/{encoder.revision or 'main'}/model.safetensors",
            "type": "application/octet-stream; framework=pytorch",
            "artifact": "safetensors.torch.save_file",
        }
    artifact = model.pop("artifact")
    assets: dict[str, Any] = {
        "encoder": {
            **model,
            "title": "Encoder",
            "roles": ["mlm:model", "mlm:weights"],
            "mlm:artifact_type": artifact,
            "bands": [{"name": name} for name in BANDS],  # STAC: an item has bands only if an asset has
        },
        "codebook": {
            "href": f"./{ARRAYS_FILE}",
            "type": "application/octet-stream; framework=safetensors",
            "title": "Centroids, colours, counts and merge tree",
            "roles": ["mlm:weights", "data"],
        },
        "manifest": {
            "href": f"./{MANIFEST_FILE}",
            "type": "application/json",
            "title": "Manifest",
            "roles": ["metadata"],
        },
        "card": {
            "href": f"./{CARD_FILE}",
            "type": "text/markdown",
            "title": "Model card",
            "roles": ["metadata"],
        },
    }
    if exemplars:
        assets["exemplars"] = {
            "href": f"./{EXEMPLARS_DIR}/{INDEX_FILE}",
            "type": "application/json",
            "title": "Typical patches of each class, and whose images they were cut from",
            "roles": ["metadata"],
        }
    return assets
