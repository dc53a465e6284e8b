"""From centroids, colours and tree to a codebook directory with its encoder and its model card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from geocentroids_fit.cluster import Clustering, similarities
from geocentroids_fit.color import Coloring
from geocentroids_fit.extract import Features
from geocentroids_tiler.codebook import (
    ENCODER_FILE,
    AssignmentSection,
    Codebook,
    EncoderSection,
    Manifest,
    Metric,
    PreprocessSection,
    save_codebook,
    validation_problems,
)
from geocentroids_tiler.errors import InputError

SIMILARITY_PERCENTILES = (1.0, 99.0)
"""Training similarities drawn as the ends of the ramp of layer=similarity."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a codebook is called and who has to be named.

    Attributes:
        name: by which it is known; lower case letters, digits and ``._-``.
        version: of the codebook.
        title: one line.
        licence: of centroids and encoder together.
        attribution: one line for the corner of a map.
        region: where the images lie, in words.
    """

    name: str
    version: str
    title: str
    licence: str
    attribution: str
    region: str


def make_manifest(
    identity: Identity,
    encoder: EncoderSection,
    preprocess: PreprocessSection,
    metric: Metric,
    similarity_range: tuple[float, float] | None = None,
    training: dict[str, JsonValue] | None = None,
) -> Manifest:
    """Return a manifest.

    Raises:
        InputError: if a value is not allowed in one.
    """
    try:
        return Manifest(
            name=identity.name,
            version=identity.version,
            title=identity.title,
            licence=identity.licence,
            attribution=identity.attribution,
            encoder=encoder,
            preprocess=preprocess,
            assignment=AssignmentSection(metric=metric, similarity_range=similarity_range),
            training=training or {},
        )
    except ValidationError as error:
        raise InputError(f"not a codebook: {validation_problems(error)}") from error


def draft_codebook(manifest: Manifest) -> Codebook:
    """Return a codebook of one centroid, to open images with before there are others."""
    centroids = np.ones((1, manifest.encoder.dim), np.float32)
    return Codebook(manifest=manifest, centroids=centroids, colors=np.zeros((1, 3), np.uint8))


def training_record(
    features: Features, clustering: Clustering, coloring: Coloring, *, region: str, seed: int
) -> dict[str, JsonValue]:
    """Return what ``codebook.json`` tells of how the codebook was made."""
    return {
        "images": len(features.images),
        "features": len(features),
        "region": region,
        "seed": seed,
        "inertia": round(clustering.inertia, 4),
        "iterations": clustering.iterations,
        "color_rank_correlation": round(coloring.score.rank_correlation, 4),
        "color_neighbours_at_15": round(coloring.score.neighbours, 4),
    }


def typical_similarities(features: Features, clustering: Clustering, metric: Metric) -> tuple[float, float]:
    """Return the similarities that all but the worst and best fitting hundredth of the features lie between."""
    values = similarities(features.tokens, clustering, metric)
    low, high = (round(float(value), 4) for value in np.percentile(values, SIMILARITY_PERCENTILES))
    return (low, high) if low < high else (low - 1e-3, low)


def write_codebook(
    out: Path,
    manifest: Manifest,
    clustering: Clustering,
    colors: NDArray[np.uint8],
    tree: NDArray[np.float64],
    *,
    encoder: Path,
    card: str,
) -> Codebook:
    """Write a codebook directory with its encoder embedded, whole or not at all.

    Raises:
        CodebookError: if ``out`` holds something already.
    """
    centroids: NDArray[Any] = clustering.centroids
    codebook = Codebook(manifest=manifest, centroids=centroids, colors=colors, counts=clustering.counts, tree=tree)
    return save_codebook(codebook, out, card=card, encoder=encoder)


def default_card(manifest: Manifest, k: int, images: tuple[str, ...], command: str) -> str:
    """Return a model card that says what is known without asking; its author adds data sources and limits."""
    pre, training = manifest.preprocess, manifest.training
    listed = "\n".join(f"- `{name}`" for name in images)
    return f"""# {manifest.title or manifest.name}

{k} classes of ground for [geocentroids-tiler](https://github.com/geocentroids/geocentroids-tiler), fitted without
labels on {training.get("features")} patches of {training.get("images")} images
({training.get("region") or "region not stated"}).

- Encoder: `{ENCODER_FILE}` ({manifest.encoder.architecture}, {manifest.encoder.dim} values a patch)
- Patches of {manifest.encoder.patch_px * pre.gsd_m:g} m, imagery at {pre.gsd_m:g} m per pixel
- Windows of {pre.window_patches} patches, margin {pre.margin_patches}, stride {pre.stride_patches}
- Nearest centroid by {manifest.assignment.metric}
- Colours: rank correlation with the distance of centroids {training.get("color_rank_correlation")},
  neighbours kept at 15 {training.get("color_neighbours_at_15")}

Licence: {manifest.licence or "not stated"}. Attribution: {manifest.attribution or "not stated"}.

## How it was made

    {command}

## Images

{listed}
"""
