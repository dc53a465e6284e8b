"""Small codebooks for tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from geocentroids_tiler.codebook import AssignmentSection, Codebook, EncoderSection, Manifest, PreprocessSection

K, DIM = 12, 5


def make_manifest(name: str = "sample", *, dim: int = DIM, metric: str = "inner_product", **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "name": name,
        "version": "1",
        "title": "Sample",
        "licence": "MIT",
        "attribution": "nobody",
        "encoder": EncoderSection(source="owner/encoder", architecture="dinov2_with_registers", dim=dim),
        "preprocess": PreprocessSection(gsd_m=0.25, window_patches=16, margin_patches=3, stride_patches=10),
        "assignment": AssignmentSection.model_validate({"metric": metric}),
        "training": {"images": 3},
    }
    return Manifest(**(fields | changes))


def make_codebook(
    name: str = "sample", *, k: int = K, dim: int = DIM, seed: int = 0, tree: bool = True, **changes: Any
) -> Codebook:
    rng = np.random.default_rng(seed)
    centroids = rng.standard_normal((k, dim)).astype(np.float32)
    linkage = None
    if tree:
        from scipy.cluster.hierarchy import linkage as scipy_linkage

        linkage = scipy_linkage(centroids, "ward") if k > 1 else np.zeros((0, 4))
    return Codebook(
        manifest=make_manifest(name, dim=dim, **changes),
        centroids=centroids,
        colors=rng.integers(0, 256, (k, 3), dtype=np.uint8),
        counts=rng.integers(0, 1000, k),
        tree=linkage,
        names={None: {0: "road", 3: "Wiese äöü"}, 4: {1: "forest"}},
    )
