"""Small codebooks for tests."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

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


def sheet_color(label: int) -> tuple[int, int, int]:
    """Return the colour of the sheet that ``write_exemplars`` writes for a label."""
    return 10 * (label % 25), 40 + label % 200, 255 - 10 * (label // 25)


def write_exemplars(folder: Path, labels: Iterable[int]) -> Path:
    """Write sheets of one colour each, two patches each of two images, and their index."""
    folder.mkdir()
    sheets, patches = {}, {}
    for label in labels:
        content = io.BytesIO()
        Image.new("RGB", (192, 48), sheet_color(label)).save(content, "WEBP", lossless=True)
        sheets[str(label)] = np.frombuffer(content.getvalue(), np.uint8)
        patches[str(label)] = [[0, -label, 5], [1, 7, label], [0, -label, 9]]
    save_file(sheets, folder / "sheets.safetensors")
    images = [
        {"image": "a.tif", "licence": "CC BY 4.0", "attribution": "Anna Ä", "url": "https://anna.example/a"},
        {"image": "b/c.tif", "licence": "", "attribution": "", "url": ""},
    ]
    (folder / "index.json").write_text(json.dumps({"images": images, "patches": patches}))
    return folder
