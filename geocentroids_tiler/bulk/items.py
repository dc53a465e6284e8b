"""What is written beside the labels of an image: a STAC item, and a collection of all items.

Source: https://github.com/radiantearth/stac-spec (v1.1.0) and its extensions projection (v2.0.0) and file (v2.1.0).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from pyproj import CRS

from geocentroids_tiler import __version__
from geocentroids_tiler.bulk.image_list import ListedImage
from geocentroids_tiler.bulk.outline import bbox_of_all, footprint_of
from geocentroids_tiler.codebook import NODATA_LABEL, Codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import authority_code
from geocentroids_tiler.source import Dataset, ReadOptions

STAC_VERSION = "1.1.0"
EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/file/v2.1.0/schema.json",
)
COG_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"
COLLECTION_FILE, ITEMS_FILE = "collection.json", "items.json"
SHA256_MULTIHASH = "1220"
"""What a SHA-256 begins with in the file extension: the code of the function, and its 32 bytes."""
EVER = "1900-01-01T00:00:00Z", "9999-12-31T23:59:59Z"
"""A period that is not known, as the codebook's own STAC item writes it: an item must have a date."""
PREFIX = "geocentroids:"
_LICENCE = re.compile(r"[\w.+-]+")
"""What STAC takes for a licence: the identifier of one, or ``other``."""
_DATETIME = re.compile(r"(\d{4}):(\d\d):(\d\d) (\d\d):(\d\d):(\d\d)\0?")


class Making(BaseModel):
    """What the labels of an image depend on beside the image.

    Attributes:
        codebook_digest: of the codebook's content.
        device: what computed them, as ``LabelEngine.device_name``.
        classes: number of classes that labels were merged to; None: none were.
        bidx: bands read as red, green and blue; None: by their colour interpretation.
        rescale: values that became black and white; None: the image is of 8 bits.
    """

    model_config = ConfigDict(frozen=True)

    codebook_digest: str = Field(alias=PREFIX + "codebook_digest")
    device: str = Field(alias=PREFIX + "device")
    classes: int | None = Field(alias=PREFIX + "classes")
    bidx: tuple[int, int, int] | None = Field(alias=PREFIX + "bidx")
    rescale: tuple[float, float] | None = Field(alias=PREFIX + "rescale")

    @classmethod
    def of(cls, codebook: Codebook, device: str, classes: int | None, options: ReadOptions) -> Self:
        """Return how labels are made with some options."""
        return cls(
            **{
                PREFIX + "codebook_digest": codebook.digest,
                PREFIX + "device": device,
                PREFIX + "classes": classes,
                PREFIX + "bidx": options.bidx,
                PREFIX + "rescale": options.rescale,
            }
        )

    def difference(self, other: Making) -> str | None:
        """Say in which respect two ways to make labels differ, first this one's value; None if they do not."""
        for name in Making.model_fields:
            own, others = getattr(self, name), getattr(other, name)
            if own != others:
                return f"{name.replace('_', ' ')} {own} instead of {others}"
        return None


class LabelledRecord(Making):
    """What an item that was read says of labels.

    Attributes:
        identity: of the image's content when it was labelled.
        histogram: patches of each label that occurs.
    """

    source: str = Field(alias=PREFIX + "source")
    identity: str = Field(alias=PREFIX + "source_identity")
    histogram: dict[int, int] = Field(alias=PREFIX + "histogram")
    codebook: str = Field(alias=PREFIX + "codebook")
    codebook_version: str = Field(alias=PREFIX + "codebook_version")

    def counts(self, k: int) -> NDArray[np.int64]:
        """Return the patches of each of ``k`` labels, of shape (k,).

        Raises:
            InputError: if it has others.
        """
        counts = np.zeros(k, np.int64)
        for label, number in self.histogram.items():
            if not (0 <= label < k and number > 0):
                raise InputError(
                    f"the item of {self.source!r} has {number} patches of label {label}; its codebook has labels 0 to "
                    f"{k - 1}"
                )
            counts[label] = number
        return counts


@dataclass(frozen=True, slots=True)
class LabelFile:
    """The labels of an image on disk."""

    size_bytes: int
    sha256: str


class Histogram:
    """Counts the labels of an image while they come."""

    def __init__(self, k: int) -> None:
        self.counts: NDArray[np.int64] = np.zeros(k, np.int64)

    def add(self, labels: NDArray[np.uint16]) -> None:
        """Count labels; those of patches without data are left out."""
        self.counts += np.bincount(labels[labels != NODATA_LABEL], minlength=len(self.counts))

    def sparse(self) -> dict[str, int]:
        """Return the patches of each label that occurs, by the label as JSON has it."""
        return {str(label): int(self.counts[label]) for label in np.flatnonzero(self.counts)}


def label_item(
    image: ListedImage,
    dataset: Dataset,
    taken_at: datetime | None,
    codebook: Codebook,
    making: Making,
    histogram: Histogram,
    file: LabelFile,
) -> dict[str, Any]:
    """Describe the labels of an image as a STAC item. The same labels of the same image give the same item.

    Args:
        image: the image.
        dataset: it, as it was opened.
        taken_at: when the image was taken, if it says so.
        codebook: whose labels they are.
        making: what else they depend on.
        histogram: of the codebook's labels, also where they were merged.
        file: the labels' file.
    """
    footprint = footprint_of(dataset.crs, dataset.transform, dataset.width_px, dataset.height_px)
    labelled = int(histogram.counts.sum())
    properties = {
        "title": image.name,
        **_time(taken_at),
        "gsd": codebook.patch_m,
        **_projection(dataset.grid.crs, dataset.footprint.shape, dataset.grid.transform_of(dataset.footprint)),
        PREFIX + "source": image.url,
        PREFIX + "source_identity": dataset.identity,
        PREFIX + "codebook": codebook.name,
        PREFIX + "codebook_version": codebook.manifest.version,
        **making.model_dump(mode="json", by_alias=True),
        PREFIX + "version": __version__,
        PREFIX + "labelled_patches": labelled,
        PREFIX + "labelled_area_m2": round(labelled * dataset.grid.patch_area_m2, 2),
        PREFIX + "histogram": histogram.sparse(),
    }
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": list(EXTENSIONS),
        "id": image.id,
        "geometry": footprint.geometry,
        "bbox": list(footprint.bbox),
        "properties": properties,
        "links": [
            {"rel": rel, "href": f"./{COLLECTION_FILE}", "type": "application/json"}
            for rel in ("root", "parent", "collection")
        ],
        "assets": {
            "labels": {
                "href": f"./{labels_name(image.id)}",
                "type": COG_TYPE,
                "title": "Labels" if making.classes is None else f"Labels merged to {making.classes} classes",
                "roles": ["data"],
                "data_type": "uint16",
                "nodata": NODATA_LABEL,
                "file:size": file.size_bytes,
                "file:checksum": SHA256_MULTIHASH + file.sha256,
            },
            "image": {
                "href": image.url,
                "type": "image/tiff; application=geotiff",
                "title": "Image",
                "roles": ["visual"],
                "gsd": round(dataset.gsd_m, 4),
                **_projection(dataset.crs, (dataset.height_px, dataset.width_px), dataset.transform),
            },
        },
        "collection": collection_id(codebook.name, codebook.manifest.version),
    }


def label_collection(items: Iterable[Mapping[str, Any]], codebook: Codebook) -> dict[str, Any]:
    """Return the STAC collection of items; there is at least one.

    Args:
        items: the items, in the order of the links.
        codebook: whose labels they are.
    """
    boxes, starts, ends, links = [], [], [], []
    for item in items:
        properties = item["properties"]
        boxes.append(item["bbox"])
        starts.append(properties["datetime"] or properties["start_datetime"])
        ends.append(properties["datetime"] or properties["end_datetime"])
        links.append(
            {"rel": "item", "href": f"./{item_name(item['id'])}", "type": "application/geo+json", "title": item["id"]}
        )
    manifest = codebook.manifest
    licence = manifest.licence.replace(" ", "-")
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "id": collection_id(manifest.name, manifest.version),
        "title": f"Labels of codebook {manifest.name} {manifest.version}",
        "description": f"Images in which every patch of {codebook.patch_m:g} m of ground has a label: the nearest of "
        f"the {len(codebook)} centroids of {manifest.title or manifest.name}. The licence is that of the codebook; "
        "images have their own.",
        "license": licence if _LICENCE.fullmatch(licence) else "other",
        **({"providers": [{"name": manifest.attribution}]} if manifest.attribution else {}),
        "extent": {
            "spatial": {"bbox": [list(bbox_of_all(boxes))]},
            "temporal": {"interval": [[min(starts), max(ends)]]},
        },
        "links": [
            {"rel": "root", "href": f"./{COLLECTION_FILE}", "type": "application/json"},
            {"rel": "items", "href": f"./{ITEMS_FILE}", "type": "application/geo+json", "title": "All items"},
            *links,
        ],
    }


def collection_id(codebook: str, version: str) -> str:
    """Return the name of the collection of a codebook's labels."""
    return f"geocentroids-{codebook}-{version}"


def item_name(image_id: str) -> str:
    """Return the name of an image's item."""
    return f"{image_id}.json"


def labels_name(image_id: str) -> str:
    """Return the name of an image's labels."""
    return f"{image_id}.tif"


def label_file_of(item: Mapping[str, Any]) -> LabelFile:
    """Return what an item that is valid says of its labels' file."""
    asset = item["assets"]["labels"]
    return LabelFile(asset["file:size"], asset["file:checksum"].removeprefix(SHA256_MULTIHASH))


def read_record(text: str | bytes) -> tuple[dict[str, Any], LabelledRecord] | None:
    """Return an item and what it says of labels, or None if it is no item of ours.

    Args:
        text: content of its file.
    """
    try:
        item = json.loads(text)
        record = LabelledRecord.model_validate(item["properties"])
        file = label_file_of(item)
        whole = isinstance(item["id"], str) and isinstance(file.size_bytes, int)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return (item, record) if whole else None


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """Return a value as it is written to files."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def time_taken(tag: str | None) -> datetime | None:
    """Return the moment that a TIFF's date tag states, taken as UTC since it has no time zone; None if it is none."""
    match = _DATETIME.fullmatch((tag or "").strip())
    if match is None:
        return None
    try:
        return datetime(*map(int, match.groups()), tzinfo=UTC)  # type: ignore[misc, arg-type]
    except ValueError:
        return None


def _time(taken_at: datetime | None) -> dict[str, str | None]:
    if taken_at is not None:
        return {"datetime": f"{taken_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"}
    return {"datetime": None, "start_datetime": EVER[0], "end_datetime": EVER[1]}


def _projection(crs: CRS, shape: tuple[int, int], transform: Sequence[float]) -> dict[str, Any]:
    """Return the fields of the projection extension."""
    code = authority_code(crs)
    return {
        "proj:code": code,
        **({"proj:wkt2": crs.to_wkt()} if code is None else {}),
        "proj:shape": list(shape),
        "proj:transform": [float(value) for value in transform],
    }
