"""How well colours show likeness, ours against a plain stretch of each t-SNE axis to 0..255, and how long it takes.

    python benchmarks/colors.py                    # the embedded codebook
    python benchmarks/colors.py --size 6144        # made-up centroids at the size of the published codebook

Higher is better: Spearman's rank correlation of feature distance and colour difference (OKLab), and the share of each
centroid's nearest 15 whose colours are among its nearest 15.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.color import color_centroids
from geocentroids_fit.tree import ward_tree
from geocentroids_tiler.codebook import load_codebook
from geocentroids_tiler.importing import EMBEDDED_DIR


def made_up(k: int, dim: int) -> NDArray[np.float32]:
    """Return centroids in groups of groups, as land cover has them, with few strong directions."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(np.arange(1, dim + 1))
    groups = rng.normal(0, 4, (12, dim))[rng.integers(0, 12, 96)] + rng.normal(0, 2, (96, dim))
    points = groups[rng.integers(0, 96, k)] + rng.normal(0, 1, (k, dim))
    return (points * scale).astype(np.float32)


def main() -> None:
    """Print seconds and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codebook", default=str(EMBEDDED_DIR / "nano"), help="codebook directory")
    parser.add_argument("--size", type=int, help="made-up centroids instead, this many")
    parser.add_argument("--dim", type=int, default=768)
    options = parser.parse_args()
    if options.size:
        vectors, counts = made_up(options.size, options.dim), np.ones(options.size)
    else:
        codebook = load_codebook(options.codebook)
        vectors = codebook.centroids.astype(np.float32)
        counts = np.ones(len(vectors)) if codebook.counts is None else codebook.counts.clip(min=1)
    start = time.perf_counter()
    found = color_centroids(vectors, seed=0)
    colored = time.perf_counter()
    ward_tree(vectors, counts)
    merged = time.perf_counter()
    print(
        f"{vectors.shape[0]} x {vectors.shape[1]}: colours {colored - start:.1f} s, merge tree {merged - colored:.1f} s"
    )
    for name, score in (("ours", found.score), ("stretch", found.stretch)):
        print(f"{name}: rank correlation {score.rank_correlation:.3f}, nearest 15 kept {score.neighbours:.3f}")


if __name__ == "__main__":
    main()
