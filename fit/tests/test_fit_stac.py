"""STAC items of codebooks, against the core schemas that pystac brings and the models of the extension's authors.

The extension's JSON schema is in no package; ``stac-model`` 0.4.0 is what its authors made for version 1.5.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pystac
import pytest
import shapely
from pystac.extensions.mlm import MLMExtension
from pystac.validation import RegisteredValidator
from shapely.geometry import shape
from stac_model.schema import SCHEMA_URI, MLModelProperties

from geocentroids_fit.stac import mlm_item
from geocentroids_tiler.codebook import AssignmentSection, Codebook, EncoderSection, Manifest, PreprocessSection
from geocentroids_tiler.errors import InputError

BOUNDS = [(-58.0, -34.9, -57.9, -34.8), (-57.95, -34.85, -57.8, -34.7), (10.0, 20.0, 11.0, 21.5)]
PERIOD = (datetime(2019, 5, 1, tzinfo=UTC), datetime(2021, 6, 30, 23, 59, 59, tzinfo=UTC))
EMBEDDED = {"source": "encoder.onnx", "sha256": "0" * 64}
HUB = {"source": "facebook/dinov2-base", "revision": "1" * 40}


def codebook(encoder: dict[str, Any] = EMBEDDED, k: int = 4, **changes: Any) -> Codebook:
    fields: dict[str, Any] = {
        "name": "sample",
        "version": "1.2",
        "title": "Sample",
        "licence": "CC BY 4.0",
        "attribution": "Anna",
        "encoder": EncoderSection(architecture="dinov2_with_registers", dim=5, register_tokens=4, **encoder),
        "preprocess": PreprocessSection(gsd_m=0.25, window_patches=16, margin_patches=3, stride_patches=5),
        "assignment": AssignmentSection(metric="cosine"),
        "training": {"images": 3, "region": "Uruguay"},
    }
    rng = np.random.default_rng(0)
    return Codebook(
        manifest=Manifest(**(fields | changes)),
        centroids=rng.standard_normal((k, 5)).astype(np.float32),
        colors=np.arange(3 * k, dtype=np.uint8).reshape(k, 3) * 17,
        names={None: {1: "Wiese äöü"}},
    )


def check(item: dict[str, Any]) -> MLModelProperties:
    """Raise unless an item is valid; it goes through JSON first, as it will."""
    item = json.loads(json.dumps(item, allow_nan=False))
    RegisteredValidator.get_validator().validate_core(item, pystac.STACObjectType.ITEM, "1.1.0")
    assert item["stac_extensions"] == [SCHEMA_URI] == ["https://stac-extensions.github.io/mlm/v1.5.0/schema.json"]
    models = [asset for asset in item["assets"].values() if "mlm:model" in asset["roles"]]
    assert len(models) == 1
    artifacts = [asset for asset in item["assets"].values() if "mlm:artifact_type" in asset]
    assert artifacts == models, "the schema: an artifact type belongs to a model, and a model has one"
    names = [band["name"] for band in item["properties"]["bands"]]
    for given in item["properties"]["mlm:input"]:
        assert given["bands"] == names
        assert "bands" in given["input"]["dim_order"]
    model = MLModelProperties.model_validate(item["properties"])
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", model.name), "the schema's pattern"
    return model


@pytest.mark.parametrize("encoder", [EMBEDDED, HUB])
@pytest.mark.parametrize("exemplars", [False, True])
@pytest.mark.parametrize("metric", ["inner_product", "l2", "cosine"])
def test_valid(encoder: dict[str, Any], exemplars: bool, metric: str) -> None:
    made = codebook(encoder, assignment=AssignmentSection.model_validate({"metric": metric}))
    item = mlm_item(made, bounds=BOUNDS, period=PERIOD, total_parameters=22_000_000, exemplars=exemplars)
    model = check(item)
    assert (model.name, model.architecture) == ("geocentroids sample", "dinov2_with_registers")
    assert model.total_parameters == 22_000_000
    assert [output.name for output in model.output] == ["tokens", "labels"]
    assert ("exemplars" in item["assets"]) is exemplars
    assert item["properties"]["mlm:hyperparameters"]["metric"] == metric
    assert item["properties"]["mlm:hyperparameters"]["k"] == 4
    assert item["properties"]["mlm:hyperparameters"]["training"]["region"] == "Uruguay"


def test_embedded_encoder_takes_pixels_as_they_are() -> None:
    item = mlm_item(codebook(), bounds=BOUNDS)
    given = check(item).input[0]
    assert given.input.shape == [-1, 224, 224, 3]
    assert (given.input.data_type, given.value_scaling) == ("uint8", None)
    assert given.resize_type == "interpolation-linear"
    model = item["assets"]["encoder"]
    assert (model["href"], model["mlm:artifact_type"]) == ("./encoder.onnx", "onnx")
    assert item["properties"]["mlm:framework"] == "ONNX"
    assert item["properties"]["mlm:hyperparameters"]["mean"] == [0.485, 0.456, 0.406]


def test_encoder_of_the_hub_takes_normalised_pixels() -> None:
    item = mlm_item(codebook(HUB), bounds=BOUNDS)
    given = check(item).input[0]
    assert given.input.shape == [-1, 3, 224, 224]
    assert given.input.data_type == "float32"
    assert given.value_scaling is not None
    pixels = np.array([0.0, 100.0, 255.0])
    for scaling, mean, std in zip(given.value_scaling, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True):
        np.testing.assert_allclose((pixels - scaling.mean) / scaling.stddev, (pixels / 255 - mean) / std, atol=1e-4)
    model = item["assets"]["encoder"]
    assert model["href"] == f"https://huggingface.co/facebook/dinov2-base/resolve/{'1' * 40}/model.safetensors"
    assert item["properties"]["mlm:pretrained_source"] == "facebook/dinov2-base"


def test_classes_are_the_labels() -> None:
    classes = mlm_item(codebook(), bounds=BOUNDS)["properties"]["mlm:output"][1]["classification:classes"]
    assert [item["value"] for item in classes] == [0, 1, 2, 3]
    assert [item["color_hint"] for item in classes] == ["001122", "334455", "667788", "99AABB"]
    assert [item["description"] for item in classes] == ["class 0", "Wiese äöü", "class 2", "class 3"]


def test_lies_where_the_images_lie() -> None:
    item = mlm_item(codebook(), bounds=[*BOUNDS, BOUNDS[0]])
    check(item)
    found = shape(item["geometry"])
    assert found.is_valid
    boxes = [shapely.box(*bounds) for bounds in BOUNDS]
    assert found.area == pytest.approx(0.01 + 0.0225 - 0.0025 + 1.5)
    assert all(found.buffer(1e-9).contains(each) for each in boxes)
    assert item["bbox"] == [-58.0, -34.9, 11.0, 21.5]
    assert item["geometry"]["type"] == "MultiPolygon"
    for polygon in item["geometry"]["coordinates"]:
        assert shapely.LinearRing(polygon[0]).is_ccw, "RFC 7946"
    assert mlm_item(codebook(), bounds=BOUNDS[:2])["geometry"]["type"] == "Polygon"
    assert mlm_item(codebook(), bounds=BOUNDS[::-1])["geometry"] == item["geometry"]


def test_when() -> None:
    times = ("datetime", "start_datetime", "end_datetime")

    def of(**period: Any) -> list[Any]:
        item = mlm_item(codebook(), bounds=BOUNDS, **period)
        check(item)
        return [item["properties"][key] for key in times]

    assert of() == [None, "1900-01-01T00:00:00Z", "9999-12-31T23:59:59Z"]
    assert of(period=PERIOD) == [None, "2019-05-01T00:00:00Z", "2021-06-30T23:59:59Z"]
    east = datetime(2020, 1, 1, 5, tzinfo=timezone(timedelta(hours=5)))
    assert of(period=(east, east)) == ["2020-01-01T00:00:00Z"] * 3
    naive = PERIOD[0].replace(tzinfo=None)
    for wrong in ((naive, PERIOD[1]), PERIOD[::-1]):
        with pytest.raises(InputError, match="two moments with time zones are needed"):
            of(period=wrong)


def test_needs_a_place() -> None:
    with pytest.raises(InputError, match="bounds of at least one training image"):
        mlm_item(codebook(), bounds=[])


@pytest.mark.parametrize("name", ["a", "0", "x-", "v1.", "a" * 64])
@pytest.mark.parametrize(
    ("licence", "stated"), [("MIT", "MIT"), ("CC BY 4.0", "CC-BY-4.0"), ("", "other"), ("mine, all (mine)", "other")]
)
def test_any_manifest_that_the_format_allows(name: str, licence: str, stated: str) -> None:
    made = codebook(name=name, licence=licence, title="", attribution="", training={})
    item = mlm_item(made, bounds=[(-180.0, -90.0, 180.0, 90.0)])
    check(item)
    assert item["properties"]["license"] == stated
    assert pystac.Item.from_dict(item).id == f"{name}-1.2"


def test_same_input_same_text() -> None:
    first, second = (json.dumps(mlm_item(codebook(), bounds=BOUNDS, period=PERIOD)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "spoil",
    [
        lambda item: item["properties"].pop("mlm:architecture"),
        lambda item: item["properties"].update({"mlm:tasks": ["guessing"]}),
        lambda item: item["properties"]["mlm:input"][0]["input"].update(data_type="uint9"),
        lambda item: item["properties"]["mlm:input"][0]["input"].update(shape=[3]),
        lambda item: item["properties"].pop("end_datetime"),
        lambda item: item["properties"].update(license="no licence at all"),
        lambda item: item["assets"]["encoder"].pop("bands"),
        lambda item: item.pop("bbox"),
    ],
)
def test_the_check_can_fail(spoil: Callable[[dict[str, Any]], object]) -> None:
    item = mlm_item(codebook(), bounds=BOUNDS)
    spoil(item)
    with pytest.raises((ValueError, pystac.errors.STACValidationError, KeyError)):
        check(item)


def test_pystac_reads_it() -> None:
    item = pystac.Item.from_dict(mlm_item(codebook(), bounds=BOUNDS))
    item.stac_extensions = [MLMExtension.get_schema_uri()]  # pystac knows the version before
    read = MLMExtension.ext(item)
    assert read.mlm_name == "geocentroids sample"
    assert [given.name for given in read.input] == ["windows"]
    assert [output.name for output in read.output] == ["tokens", "labels"]
