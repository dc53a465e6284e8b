"""Which measure of likeness between images finds those of the same place? Candidates on histograms of labels.

Every label raster of a folder that ``geocentroids classify --list`` wrote is cut in two halves along its longer side.
Each half looks for the halves of other images, most alike first: its own other half, which shares its light and its
neighbourhood, is left out. "Place" is the part of an image's name before its number. A place counts if two images or
more show it. Printed for each measure: how often the first found is of the same place, and the mean average precision
of all of the same place; then how often a half finds its own other half first among all halves, which has a meaning
for places that one image shows, too.

    geocentroids classify --list FILE --out LABELS
    python benchmarks/similar.py LABELS [--codebook nano]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from geocentroids_tiler.bulk.likeness import likeness, smoothed
from geocentroids_tiler.codebook import Codebook, cut_tree
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.settings import load_settings

MIN_PATCHES = 40
Histograms = NDArray[np.float64]
Measure = Callable[[Histograms], NDArray[np.float64]]


@dataclass(frozen=True)
class Half:
    image: str
    place: str
    counts: NDArray[np.int64]


def halves_of(folder: Path, k: int) -> list[Half]:
    """Return the histograms of the halves of all images."""
    found = []
    for file in sorted(folder.glob("*.tif")):
        with rasterio.open(file) as raster:
            labels = raster.read(1)
        name = file.stem.rpartition("-")[0]
        place = re.split(r"[_\d]", name)[0]
        axis = int(labels.shape[1] > labels.shape[0])
        for part in np.array_split(labels, 2, axis=axis):
            counts = np.bincount(part[part != 65535], minlength=k)
            if counts.sum() >= MIN_PATCHES:
                found.append(Half(name, place, counts))
    return found


def shares(counts: Histograms) -> Histograms:
    return counts / counts.sum(axis=1, keepdims=True)


def bhattacharyya(counts: Histograms) -> NDArray[np.float64]:
    root = np.sqrt(shares(counts))
    return root @ root.T


def cosine(counts: Histograms) -> NDArray[np.float64]:
    unit = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    return unit @ unit.T


def intersection(counts: Histograms) -> NDArray[np.float64]:
    share = shares(counts)
    return np.stack([np.minimum(share, one).sum(axis=1) for one in share])


def merged(tree: NDArray[np.float64], n: int) -> Callable[[Histograms], Histograms]:
    lookup = cut_tree(tree, n)
    member = np.zeros((len(lookup), n))
    member[np.arange(len(lookup)), lookup] = 1
    return lambda counts: counts @ member


def candidates(codebook: Codebook) -> dict[str, Measure]:
    tree, centroids = codebook.tree, codebook.centroids.astype(np.float64)
    assert tree is not None
    k = len(codebook)
    measures: dict[str, Measure] = {
        "cosine of histograms": cosine,
        "intersection of histograms": intersection,
        "Bhattacharyya of histograms": bhattacharyya,
        "cosine of mean centroids": lambda counts: cosine(shares(counts) @ centroids - centroids.mean(axis=0)),
    }
    for n in (8, 16, 32, 64, 128, 256, 512):
        if n < k:
            fold = merged(tree, n)
            measures[f"Bhattacharyya, cut to {n}"] = lambda counts, fold=fold: bhattacharyya(fold(counts))
    for cuts in ((16, 64, 256), (64, 256, k), (8, 16, 32, 64, 128, 256, 512, k)):
        folds = [merged(tree, n) for n in cuts if n <= k]
        measures[f"mean Bhattacharyya of cuts to {', '.join(map(str, cuts))}"] = lambda counts, folds=folds: np.mean(
            [bhattacharyya(fold(counts)) for fold in folds], axis=0
        )
    metric = codebook.manifest.assignment.metric
    for width in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0):
        measures[f"Bhattacharyya, smoothed {width:g}"] = lambda counts, width=width: bhattacharyya(
            smoothed(shares(counts), centroids, metric, width)
        )
    measures["geocentroids similar: mean of plain and smoothed 0.7"] = lambda counts: np.stack(
        [likeness(one, counts.astype(np.int64), centroids, metric) for one in counts.astype(np.int64)]
    )
    return measures


def evaluate(halves: list[Half], measure: Measure) -> tuple[float, float, float, int]:
    """Return the figures of a measure.

    Returns:
        How often the first found is of the same place, mean average precision, how often a half finds its other half,
        and over how many halves the first two are.
    """
    alike = measure(np.stack([half.counts for half in halves]).astype(np.float64))
    images, places = np.array([half.image for half in halves]), np.array([half.place for half in halves])
    first, precision, own = [], [], []
    for i in range(len(halves)):
        same_image = images == images[i]
        if same_image.sum() == 2:
            others = np.where(np.arange(len(halves)) == i, -np.inf, alike[i])
            own.append(bool(same_image[np.argmax(others)]))
        right = places[~same_image] == places[i]
        if right.any():
            ranked = right[np.argsort(-alike[i][~same_image], kind="stable")]
            first.append(bool(ranked[0]))
            precision.append(float((np.cumsum(ranked)[ranked] / (np.flatnonzero(ranked) + 1)).mean()))
    return float(np.mean(first)), float(np.mean(precision)), float(np.mean(own)), len(first)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--codebook", default="nano")
    arguments = parser.parse_args()
    codebook = find_codebook(arguments.codebook, load_settings().codebooks_dir, allow_path=True)
    halves = halves_of(arguments.labels, len(codebook))
    sets = {
        "all": halves,
        "without forest plots": [half for half in halves if half.place not in ("HARV", "OSBS", "TEAK", "SJER", "ABBY")],
    }
    for title, chosen in sets.items():
        places = {half.place: len({other.image for other in chosen if other.place == half.place}) for half in chosen}
        print(f"\n{title}: {len(chosen)} halves; images of each place: {places}")
        print(f"{'measure':58} first  mAP    own half")
        for name, measure in candidates(codebook).items():
            first, precision, own, _ = evaluate(chosen, measure)
            print(f"{name:58} {first:.3f}  {precision:.3f}  {own:.3f}")


if __name__ == "__main__":
    main()
