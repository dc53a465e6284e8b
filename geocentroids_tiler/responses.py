"""JSON answers, as pydantic models and the functions that fill them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np
import shapely
import shapely.geometry
from numpy.typing import NDArray
from pydantic import BaseModel

from geocentroids_tiler.area import Area
from geocentroids_tiler.codebook import NODATA_LABEL, Classes, Codebook
from geocentroids_tiler.colors import hex_color
from geocentroids_tiler.exemplars import ExemplarImage
from geocentroids_tiler.grid import authority_code
from geocentroids_tiler.labels.engine import LabelBlock, LabelEngine
from geocentroids_tiler.labels.kept import KeptDataset
from geocentroids_tiler.mosaic import Member, Mosaic, Overlap, Problem
from geocentroids_tiler.source import Dataset
from geocentroids_tiler.tiles import Extent

ExemplarLink = Callable[[int], str]
"""From a class to the address of its exemplar."""
NEIGHBOURS = 5
"""Classes that ``point`` names beside the patch's own."""


class ClassInfo(BaseModel):
    """A class: a label, or a merged class with ``classes=N``."""

    label: int
    color: str
    name: str | None = None
    count: int | None = None
    exemplar: str | None = None


class Legend(BaseModel):
    """All classes of a codebook."""

    codebook: str
    classes: list[ClassInfo]


class Neighbour(BaseModel):
    """Another class, its centroid most like the patch's own, and how like that is (metric of the codebook)."""

    label: int
    centroid: int
    color: str
    name: str | None = None
    similarity: float
    exemplar: str | None = None


class PointInfo(BaseModel):
    """What is known of the patch at a place. All but the coordinates is null where there is no data.

    ``image`` is the image of a mosaic that the label is from.
    """

    coordinates: tuple[float, float]
    label: int | None
    centroid: int | None
    color: str | None
    name: str | None
    similarity: float | None
    exemplar: str | None = None
    image: str | None = None
    neighbours: list[Neighbour]


class ExemplarSource(ExemplarImage):
    """An image that an exemplar was cut from, with row and column of each patch on the image's ground grid."""

    patches: list[tuple[int, int]]


class ExemplarInfo(BaseModel):
    """What the exemplar of a class shows: patches of one centroid, for a merged class of its heaviest."""

    label: int
    centroid: int
    picture: str
    images: list[ExemplarSource]


class ClassArea(BaseModel):
    """Area of one class inside a feature."""

    label: int
    color: str
    name: str | None = None
    area_m2: float
    share: float


class AreaStatistics(BaseModel):
    """Area per class inside a feature, largest first.

    ``area_m2`` counts the patches of the image whose centre lies in the feature, ``labelled_m2`` those with a label;
    shares are of the latter.
    """

    area_m2: float
    labelled_m2: float
    classes: list[ClassArea]


class GridInfo(BaseModel):
    """The ground grid of an image."""

    crs: str
    patch_m: float
    rows: tuple[int, int]
    cols: tuple[int, int]


class CodebookInfo(BaseModel):
    """A codebook."""

    name: str
    version: str
    title: str
    licence: str
    attribution: str
    digest: str
    centroids: int
    dim: int
    metric: str
    encoder: str
    gsd_m: float
    window_patches: int
    margin_patches: int
    stride_patches: int
    classes_available: bool
    exemplars_available: bool
    similarity_range: tuple[float, float]


class DeviceState(BaseModel):
    """What the encoder runs on."""

    backend: str
    provider: str
    device: str
    precision: str


class ImageInfo(BaseModel):
    """An image as a codebook sees it, and what labelling all of it would cost.

    ``labels`` tells whether they are kept on disk, and since when, or computed when they are asked for.
    """

    kind: Literal["image"] = "image"
    url: str
    bounds: tuple[float, float, float, float]
    minzoom: int
    maxzoom: int
    width_px: int
    height_px: int
    gsd_m: float
    warped: bool
    grid: GridInfo
    codebook: CodebookInfo
    device: DeviceState
    chunks: int
    seconds_per_chunk: float
    seconds: float
    labels: Literal["kept", "computed"]
    labels_made_at: datetime | None
    warnings: list[str]


class MosaicGrid(BaseModel):
    """A ground grid of a mosaic, and how many of its images touch it."""

    crs: str
    patch_m: float
    images: int


class MosaicProblem(BaseModel):
    """An image of a mosaic that is left out, and why."""

    url: str
    reason: str


class MosaicInfo(BaseModel):
    """A mosaic as a codebook sees it, and what labelling all of it would cost.

    ``overlap`` says whose label a patch gets that several images show. ``problems`` are the images that cannot be used:
    of a large mosaic those that were met so far.
    """

    kind: Literal["mosaic"] = "mosaic"
    url: str
    bounds: tuple[float, float, float, float]
    minzoom: int
    maxzoom: int
    images: int
    overlap: Overlap
    grids: list[MosaicGrid]
    codebook: CodebookInfo
    device: DeviceState
    chunks: int
    seconds_per_chunk: float
    seconds: float
    problems: list[MosaicProblem]
    warnings: list[str]


class FootprintProperties(BaseModel):
    """An image, and when it was taken if that is known."""

    url: str
    datetime: datetime | None


class Footprint(BaseModel):
    """Where an image lies, as far as is known without opening it."""

    type: Literal["Feature"] = "Feature"
    bbox: tuple[float, float, float, float]
    geometry: dict[str, Any]
    properties: FootprintProperties


class Footprints(BaseModel):
    """Where images lie, in longitude and latitude."""

    type: Literal["FeatureCollection"] = "FeatureCollection"
    features: list[Footprint]


def codebook_info(codebook: Codebook) -> CodebookInfo:
    """Describe a codebook."""
    manifest, pre = codebook.manifest, codebook.manifest.preprocess
    return CodebookInfo(
        name=manifest.name,
        version=manifest.version,
        title=manifest.title,
        licence=manifest.licence,
        attribution=manifest.attribution,
        digest=codebook.digest,
        centroids=len(codebook),
        dim=manifest.encoder.dim,
        metric=manifest.assignment.metric,
        encoder=manifest.encoder.source,
        gsd_m=pre.gsd_m,
        window_patches=pre.window_patches,
        margin_patches=pre.margin_patches,
        stride_patches=pre.stride_patches,
        classes_available=codebook.tree is not None,
        exemplars_available=codebook.exemplars is not None,
        similarity_range=codebook.similarity_range(),
    )


def image_info(
    dataset: Dataset, engine: LabelEngine, zooms: tuple[int, int], kept: KeptDataset | None = None
) -> ImageInfo:
    """Describe a dataset and the cost of labelling it.

    Args:
        dataset: the dataset.
        engine: what labels it.
        zooms: its minzoom and maxzoom.
        kept: its labels, if they are kept.
    """
    footprint = dataset.footprint
    return ImageInfo(
        url=dataset.source.url,
        bounds=dataset.geographic_bounds,
        minzoom=zooms[0],
        maxzoom=zooms[1],
        width_px=dataset.width_px,
        height_px=dataset.height_px,
        gsd_m=dataset.gsd_m,
        warped=dataset.warped,
        grid=GridInfo(
            crs=authority_code(dataset.grid.crs) or dataset.grid.crs.to_wkt(),
            patch_m=dataset.grid.patch_m,
            rows=(footprint.row_start, footprint.row_stop),
            cols=(footprint.col_start, footprint.col_stop),
        ),
        codebook=codebook_info(engine.codebook),
        device=_device_state(engine),
        chunks=dataset.chunk_count,
        seconds_per_chunk=engine.seconds_per_chunk,
        seconds=dataset.chunk_count * engine.seconds_per_chunk,
        labels="computed" if kept is None else "kept",
        labels_made_at=None if kept is None else kept.record.made_at,
        warnings=list(dataset.warnings),
    )


def mosaic_info(
    mosaic: Mosaic,
    engine: LabelEngine,
    extent: Extent,
    zooms: tuple[int, int],
    overlap: Overlap,
    problems: Sequence[Problem],
) -> MosaicInfo:
    """Describe a mosaic and the cost of labelling it.

    Args:
        mosaic: the mosaic.
        engine: what labels it.
        extent: how much ground it has.
        zooms: its minzoom and maxzoom.
        overlap: whose label a patch gets.
        problems: images that cannot be used.
    """
    some = f"{len(problems)} of its {len(mosaic.members) + len(mosaic.problems)} images cannot be used: see problems"
    return MosaicInfo(
        url=mosaic.url,
        bounds=mosaic.geographic_bounds,
        minzoom=zooms[0],
        maxzoom=zooms[1],
        images=len(mosaic.members) + len(mosaic.problems),
        overlap=overlap,
        grids=[MosaicGrid(crs=zone.code, patch_m=zone.grid.patch_m, images=len(zone.members)) for zone in mosaic.zones],
        codebook=codebook_info(engine.codebook),
        device=_device_state(engine),
        chunks=extent.chunks,
        seconds_per_chunk=engine.seconds_per_chunk,
        seconds=extent.chunks * engine.seconds_per_chunk,
        problems=[MosaicProblem(url=problem.url, reason=problem.reason) for problem in problems],
        warnings=[some] if problems else [],
    )


def _device_state(engine: LabelEngine) -> DeviceState:
    device = engine.device
    return DeviceState(
        backend=device.backend, provider=device.provider, device=device.device, precision=device.precision
    )


def footprints(layer: Dataset | Mosaic) -> Footprints:
    """Say where an image lies, or each image of a mosaic."""
    if isinstance(layer, Dataset):
        members: Sequence[Member] = [Member(layer.source.url, shapely.box(*layer.geographic_bounds))]
    else:
        members = layer.members
    return Footprints(
        features=[
            Footprint(
                bbox=member.footprint.bounds,
                geometry=shapely.geometry.mapping(member.footprint),
                properties=FootprintProperties(url=member.url, datetime=member.taken_at),
            )
            for member in members
            if member.footprint is not None
        ]
    )


def legend(codebook: Codebook, classes: Classes, link: ExemplarLink) -> Legend:
    """List the classes of a codebook."""
    return Legend(
        codebook=codebook.name,
        classes=[
            ClassInfo(
                label=i,
                color=hex_color(classes.colors[i]),
                name=classes.names[i],
                count=None if classes.counts is None else int(classes.counts[i]),
                exemplar=_exemplar(codebook, classes, i, link),
            )
            for i in range(len(classes))
        ],
    )


def point_info(
    codebook: Codebook,
    classes: Classes,
    coordinates: tuple[float, float],
    centroid: int,
    similarity: float,
    link: ExemplarLink,
) -> PointInfo:
    """Describe the patch at a place.

    Args:
        codebook: the codebook.
        classes: classes of its labels.
        coordinates: longitude and latitude.
        centroid: the patch's label, 65535 for no data.
        similarity: how well it fits.
        link: addresses of exemplars.
    """
    if centroid == NODATA_LABEL:
        return PointInfo(
            coordinates=coordinates, label=None, centroid=None, color=None, name=None, similarity=None, neighbours=[]
        )
    label = int(classes.lookup[centroid])
    return PointInfo(
        coordinates=coordinates,
        label=label,
        centroid=centroid,
        color=hex_color(classes.colors[label]),
        name=classes.names[label],
        similarity=similarity,
        exemplar=_exemplar(codebook, classes, label, link),
        neighbours=_neighbours(codebook, classes, centroid, link),
    )


def exemplar_info(codebook: Codebook, classes: Classes, label: int, picture: str) -> ExemplarInfo | None:
    """Tell whose images the exemplar of a class was cut from, or return None if it has none.

    Args:
        codebook: the codebook.
        classes: classes of its labels.
        label: one of the classes.
        picture: address of the exemplar.
    """
    centroid = int(classes.typical[label])
    if codebook.exemplars is None or not codebook.has_exemplar(centroid):
        return None
    patches: dict[int, list[tuple[int, int]]] = {}
    for image, row, col in codebook.exemplars.patches.get(centroid, ()):
        patches.setdefault(image, []).append((row, col))
    images = [
        ExemplarSource(**codebook.exemplars.images[image].model_dump(), patches=places)
        for image, places in patches.items()
    ]
    return ExemplarInfo(label=label, centroid=centroid, picture=picture, images=images)


def _exemplar(codebook: Codebook, classes: Classes, label: int, link: ExemplarLink) -> str | None:
    """Return the address of the exemplar of a class, or None if it has none."""
    return link(label) if codebook.has_exemplar(int(classes.typical[label])) else None


def _neighbours(codebook: Codebook, classes: Classes, centroid: int, link: ExemplarLink) -> list[Neighbour]:
    """Return the classes most like a centroid's own, each by its centroid most like it, best first."""
    seen = {int(classes.lookup[centroid])}
    found: list[Neighbour] = []
    for other, similarity in codebook.neighbours(centroid, len(codebook) - 1):
        label = int(classes.lookup[other])
        if label in seen:
            continue
        seen.add(label)
        found.append(
            Neighbour(
                label=label,
                centroid=other,
                color=hex_color(classes.colors[label]),
                name=classes.names[label],
                similarity=similarity,
                exemplar=_exemplar(codebook, classes, label, link),
            )
        )
        if len(found) == NEIGHBOURS:
            break
    return found


class ClassTally:
    """Sums up the area of each class, over the patches of one grid after the other.

    Args:
        classes: classes of the labels.
    """

    def __init__(self, classes: Classes) -> None:
        self._classes = classes
        self._area_m2 = self._labelled_m2 = 0.0
        self._of_class_m2 = np.zeros(len(classes))

    def add(self, block: LabelBlock, area: Area, patch_area_m2: float) -> None:
        """Add the patches of an area.

        Args:
            block: labels of ``area.patches``.
            area: which of them count.
            patch_area_m2: area of a patch on the ground.
        """
        ids: NDArray[np.uint16] = self._classes.of_labels(block.labels[area.inside])
        counts = np.bincount(ids[ids != NODATA_LABEL], minlength=len(self._classes))
        self._area_m2 += int(area.inside.sum()) * patch_area_m2
        self._labelled_m2 += int(counts.sum()) * patch_area_m2
        self._of_class_m2 += counts * patch_area_m2

    def statistics(self) -> AreaStatistics:
        """Return what was added up, the largest class first."""
        areas_m2 = self._of_class_m2
        present = sorted(np.flatnonzero(areas_m2).tolist(), key=lambda i: (-areas_m2[i], i))
        return AreaStatistics(
            area_m2=self._area_m2,
            labelled_m2=self._labelled_m2,
            classes=[
                ClassArea(
                    label=i,
                    color=hex_color(self._classes.colors[i]),
                    name=self._classes.names[i],
                    area_m2=float(areas_m2[i]),
                    share=float(areas_m2[i]) / self._labelled_m2,
                )
                for i in present
            ],
        )


def with_statistics(feature: dict[str, Any], statistics: AreaStatistics) -> dict[str, Any]:
    """Return a GeoJSON feature with ``statistics`` among its properties; everything else stays as it is."""
    properties = {**(feature.get("properties") or {}), "statistics": statistics.model_dump()}
    return {**feature, "properties": properties}
