"""How to fill pixels that are no data: labels near a cut edge against labels of the uncut image.

Windows of real images are cut along random lines. For each way of filling, the share of patches within three patches
of the cut that keep their class is printed, for all classes and for the merge tree cut into 24.

    python benchmarks/edge_fill.py --images FOLDER
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import ReadOptions, read_windows
from geocentroids_tiler.source.fill import fill_invalid

IMAGES = ("south_america/uruguay_business_park.tif", "manila_river.tif", "europe/netherlands_epsg28992.tif")
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def black(pixels: Pixels, valid: Mask) -> Pixels:
    """Leave nothing but black."""
    return np.where(valid[..., None], pixels, np.uint8(0))


def mean(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with the mean colour of the window."""
    return np.where(valid[..., None], pixels, pixels[valid].mean(axis=0).astype(np.uint8))


def noise(pixels: Pixels, valid: Mask) -> Pixels:
    """Fill with pixels drawn from the window at random."""
    known = pixels[valid]
    drawn = known[np.random.default_rng(0).integers(0, len(known), valid.shape)]
    return np.where(valid[..., None], pixels, drawn)


FILLS: dict[str, Callable[[Pixels, Mask], Pixels]] = {
    "black": black,
    "mean": mean,
    "random": noise,
    "mirror": fill_invalid,
}


def random_cut(rng: np.random.Generator, size: int) -> Mask:
    """Return a half plane whose edge passes through the middle part of the window."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2) * size
    row, col = np.indices((size, size)) - size / 2
    return np.asarray(np.cos(angle) * col + np.sin(angle) * row > offset)


def nearest(tokens: NDArray[np.float32], codebook: Codebook) -> NDArray[np.intp]:
    """Assign tokens of shape (P, P, D) in float64."""
    t, c = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64), codebook.centroids.astype(np.float64)
    metric = codebook.manifest.assignment.metric
    if metric == "cosine":
        c = c / np.linalg.norm(c, axis=1, keepdims=True)
    score = t @ c.T - (0.5 * (c**2).sum(axis=1) if metric == "l2" else 0)
    return score.argmax(axis=1).reshape(tokens.shape[:2])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder with the test imagery")
    parser.add_argument("--codebook", default="nano")
    parser.add_argument("--windows", type=int, default=30, help="windows per image")
    arguments = parser.parse_args()
    service = Service(Settings(root=arguments.images, codebook=arguments.codebook))
    codebook = service.codebook(None)
    engine = service.engine(codebook).result()
    classes = codebook.classes(24).lookup
    margin, patch_px = engine.layout.margin_patches, codebook.manifest.encoder.patch_px
    rng = np.random.default_rng(1)
    kept: dict[str, list[tuple[float, float, int]]] = {name: [] for name in FILLS}
    for image in IMAGES:
        dataset = service.dataset(image, ReadOptions(), codebook).result()
        chunks = list(dataset.footprint.chunks(engine.layout.stride_patches))
        picked = [chunks[i] for i in rng.choice(len(chunks), min(arguments.windows, len(chunks)), replace=False)]
        for window in read_windows(dataset, picked, patch_px):
            if not window.labelled.all():
                continue
            whole = nearest(engine.encoder.fetch(engine.encoder.encode(window.pixels[None])[0]), codebook)
            valid = random_cut(rng, len(window.pixels))
            p = len(whole)
            labelled = valid.reshape(p, patch_px, p, patch_px).mean(axis=(1, 3)) >= 0.5
            padded = np.pad(labelled, 3, mode="edge")
            near = ~np.lib.stride_tricks.sliding_window_view(padded, (7, 7)).all(axis=(2, 3)) & labelled
            near[:margin] = near[-margin:] = near[:, :margin] = near[:, -margin:] = False
            if not near.any():
                continue
            for name, fill in FILLS.items():
                cut = nearest(
                    engine.encoder.fetch(engine.encoder.encode(fill(window.pixels, valid)[None])[0]), codebook
                )
                same, merged = cut[near] == whole[near], classes[cut[near]] == classes[whole[near]]
                kept[name].append((same.sum(), merged.sum(), near.sum()))
    print(f"codebook {codebook.name}, {len(kept['mirror'])} cut windows of {len(IMAGES)} images")
    print(f"{'fill':8s} {'same label':>10s} {'same of 24':>10s}")
    for name, rows in kept.items():
        label, merged, total = np.sum(rows, axis=0)
        print(f"{name:8s} {label / total:10.3f} {merged / total:10.3f}")
    service.close()


if __name__ == "__main__":
    main()
