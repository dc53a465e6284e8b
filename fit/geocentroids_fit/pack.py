"""From clusters and colours to a codebook directory in format 1, with its card and a STAC item."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydantic import JsonValue, ValidationError

from geocentroids_fit.clusters import Clusters
from geocentroids_fit.config import CodebookConfig, FitConfig
from geocentroids_fit.exemplars import ImageSource
from geocentroids_fit.shards import FeatureSettings, FeatureStore
from geocentroids_tiler.codebook import (
    AssignmentSection,
    Codebook,
    EncoderSection,
    Manifest,
    Metric,
    PreprocessSection,
    validation_problems,
)
from geocentroids_tiler.errors import InputError

SIMILARITY_PERCENTILES = (1.0, 99.0)
"""Training similarities drawn as the ends of the ramp of layer=similarity."""


def make_manifest(
    identity: CodebookConfig,
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


def draft_codebook(settings: FeatureSettings) -> Codebook:
    """Return a codebook of one centroid, to open images with before there are others."""
    manifest = make_manifest(CodebookConfig(name="draft"), settings.encoder, settings.preprocess, "l2")
    centroids = np.ones((1, settings.encoder.dim), np.float32)
    return Codebook(manifest=manifest, centroids=centroids, colors=np.zeros((1, 3), np.uint8))


def typical_similarities(clusters: Clusters) -> tuple[float, float]:
    """Return the similarities that all but the worst and best fitting hundredth of the features lie between."""
    low, high = (round(float(value), 4) for value in np.percentile(clusters.similarity, SIMILARITY_PERCENTILES))
    return (low, high) if low < high else (low - 1e-3, low)


def training_bounds(store: FeatureStore) -> list[tuple[float, float, float, float]]:
    """Return west, south, east, north of each image that gave features."""
    return [record.bounds for record in store.manifest.images if record.features and record.bounds is not None]


def make_card(codebook: Codebook, store: FeatureStore, source: Callable[[str], ImageSource], config: FitConfig) -> str:
    """Return a model card that says all that is known without asking; its author adds what it is good for.

    Args:
        codebook: the codebook.
        store: the features it was fitted on.
        source: where an image comes from.
        config: what it was made with.
    """
    manifest = codebook.manifest
    pre, training = manifest.preprocess, manifest.training
    unused = 0 if codebook.counts is None else int((codebook.counts == 0).sum())
    skipped = "".join(f"\n- `{image.image}`: {image.reason}" for image in store.manifest.skipped)
    return f"""# {manifest.title or manifest.name}

{len(codebook)} classes of ground for [geocentroids-tiler](https://github.com/geocentroids/geocentroids-tiler), fitted
without labels on {len(store)} patches of {len(store.images)} images ({training.get("region") or "region not stated"}).

| | |
|---|---|
| encoder | `{manifest.encoder.source}` ({manifest.encoder.architecture}, {manifest.encoder.dim} values a patch) |
| patches | {codebook.patch_m:g} m: {manifest.encoder.patch_px} px at {pre.gsd_m:g} m per pixel |
| windows | {pre.window_patches} patches, margin {pre.margin_patches}, stride {pre.stride_patches} |
| assignment | nearest of {len(codebook)} centroids by {manifest.assignment.metric}; {unused} of them met no patch |
| K-Means | {training.get("iterations")} iterations, objective {training.get("inertia")}, seed {training.get("seed")} |
| colours | rank correlation with likeness {training.get("color_rank_correlation")}, nearest 15 kept \
{training.get("color_neighbours_at_15")} |
| merge tree | Ward; `classes=N` cuts it |

Licence: {manifest.licence or "not stated"}. Attribution: {manifest.attribution or "not stated"}.

## Data

{_data_table(store, source)}
{f"{chr(10)}Left out:{chr(10)}{skipped}{chr(10)}" if skipped else ""}
## How it was made

`geocentroids-fit run` with this configuration; what it does not name is at its default.

```json
{_configuration(config)}
```

## Limits

- Classes are groups of like-looking patches, not land cover: nobody has named or checked them.
- Ground, seasons, cameras and pixel sizes that the images above do not have are outside of what it was fitted on;
  `layer=similarity` shows where it does not fit.
- Colours show likeness, not identity: two classes may look the same.
"""


def _configuration(config: FitConfig) -> str:
    """Return what a configuration sets, without the places of files on one machine."""
    content = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"out": True, "work": True, "images": {"folder"}, "codebook": {"card"}, "evaluate": True},
    )
    if (model := Path(config.encoder.model)).exists():
        content["encoder"]["model"] = model.name
    return json.dumps(content, indent=2, ensure_ascii=False)


def _data_table(store: FeatureStore, source: Callable[[str], ImageSource]) -> str:
    images: dict[ImageSource, int] = defaultdict(int)
    patches: dict[ImageSource, int] = defaultdict(int)
    for record in store.manifest.images:
        origin = source(record.image)
        images[origin] += 1
        patches[origin] += record.features
    rows = [
        f"| {origin.attribution or 'not stated'} | {images[origin]} | {patches[origin]} "
        f"| {origin.licence or 'not stated'} | {origin.url} |"
        for origin in images
    ]
    return "\n".join(["| source | images | patches | licence | |", "|---|---|---|---|---|", *rows])
