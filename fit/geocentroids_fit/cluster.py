"""K-Means: k-means++ on a sample, Lloyd's iterations on everything, no empty clusters, the same result every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import kmeans_plusplus
from tqdm import tqdm

from geocentroids_tiler.codebook import Metric
from geocentroids_tiler.errors import InputError

ROWS_PER_BLOCK = 8192
"""Features compared with all centroids at once: (rows, K) scores stay near 200 MB at K = 6144."""
INIT_SAMPLE_PER_CENTROID = 30
"""Features that k-means++ draws from, per centroid; more cost time and gain nothing that iterations do not."""


@dataclass(frozen=True)
class Clustering:
    """Centroids and how the features they were fitted on fall to them.

    Attributes:
        centroids: of shape (K, D), float32; of length 1 for cosine and inner_product.
        labels: nearest centroid of each feature, of shape (N,), int64.
        counts: features of each centroid, of shape (K,), int64.
        inertia: sum of squared distances to the nearest centroid (of unit vectors for cosine and inner_product).
        iterations: Lloyd iterations done.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.int64]
    counts: NDArray[np.int64]
    inertia: float
    iterations: int


def kmeans(
    features: NDArray[np.floating[Any]],
    k: int,
    *,
    metric: Metric = "l2",
    seed: int = 0,
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> Clustering:
    """Cluster features.

    For ``cosine`` and ``inner_product`` this is spherical K-Means: features and centroids are scaled to length 1. With
    centroids of one length the largest inner product is also the largest cosine, so the two differ in serving only.

    Args:
        features: of shape (N, D), finite.
        k: number of centroids, at most N.
        metric: how nearness is measured.
        seed: of initialisation.
        max_iterations: Lloyd iterations at most.
        tolerance: iterations end once inertia falls by less than this share.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``k`` is out of range or a feature is not finite.
    """
    if not 1 <= k <= len(features):
        raise InputError(f"k is {k}, but there are {len(features)} features; k must be between 1 and that number")
    data: NDArray[np.float32] = np.ascontiguousarray(features, np.float32)
    if not np.isfinite(data).all():
        raise InputError("the features hold values that are not finite; K-Means needs finite ones")
    spherical = metric != "l2"
    if spherical:
        data = unit(data)
    return _lloyd(data, _initial(data, k, seed), spherical, max_iterations, tolerance, progress)


def unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of shape (N, D) scaled to length 1; a zero row stays zero."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, np.float32(1)), np.float32)


def nearest(data: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the nearest centroid of each row in Euclidean distance, and the squared distance, both of shape (N,)."""
    labels = np.empty(len(data), np.int64)
    squares = np.empty(len(data), np.float32)
    bias = np.square(centroids).sum(axis=1) / 2
    for start in range(0, len(data), ROWS_PER_BLOCK):
        block = data[start : start + ROWS_PER_BLOCK]
        best = (block @ centroids.T - bias).argmax(axis=1)
        labels[start : start + len(block)] = best
        squares[start : start + len(block)] = np.square(block - centroids[best]).sum(axis=1)
    return labels, squares


def similarities(features: NDArray[np.floating[Any]], clustering: Clustering, metric: Metric) -> NDArray[np.float32]:
    """Return how well each feature fits its centroid, as serving reports it, of shape (N,)."""
    data = np.asarray(features, np.float32)
    if metric == "cosine":
        data = unit(data)
    own = clustering.centroids[clustering.labels]
    if metric == "l2":
        return np.asarray(-np.linalg.norm(data - own, axis=1))
    return np.asarray((data * own).sum(axis=1))


def _initial(data: NDArray[np.float32], k: int, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    size = min(len(data), INIT_SAMPLE_PER_CENTROID * k)
    sample = data[np.sort(rng.choice(len(data), size, replace=False))]
    centroids, _ = kmeans_plusplus(sample, k, random_state=seed)
    return np.asarray(centroids, np.float32)


def _lloyd(
    data: NDArray[np.float32],
    centroids: NDArray[np.float32],
    spherical: bool,
    max_iterations: int,
    tolerance: float,
    progress: bool,
) -> Clustering:
    previous = np.inf
    labels, squares = nearest(data, centroids)
    with tqdm(total=max_iterations, unit="iteration", disable=not progress) as bar:
        for iteration in range(1, max_iterations + 1):  # noqa: B007 - reported below
            centroids = _means(data, labels, squares, len(centroids), spherical)
            labels, squares = nearest(data, centroids)
            inertia = float(squares.sum(dtype=np.float64))
            bar.set_postfix_str(f"inertia {inertia:.5g}", refresh=False)
            bar.update()
            if previous - inertia <= tolerance * inertia:
                break
            previous = inertia
    counts = np.bincount(labels, minlength=len(centroids))
    return Clustering(centroids, labels, counts, inertia, iteration)


def _means(
    data: NDArray[np.float32],
    labels: NDArray[np.int64],
    squares: NDArray[np.float32],
    k: int,
    spherical: bool,
) -> NDArray[np.float32]:
    """Return the mean of each cluster; an empty one starts again at one of the worst fitting features."""
    total = np.zeros((k, data.shape[1]))
    counts = np.bincount(labels, minlength=k)
    for start in range(0, len(data), ROWS_PER_BLOCK):
        block = data[start : start + ROWS_PER_BLOCK]
        one = np.ones(len(block), np.float32)
        member = sparse.csr_array((one, (labels[start : start + len(block)], np.arange(len(block)))), (k, len(block)))
        total += member @ block
    centroids = (total / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        worst = np.argsort(-squares, kind="stable")[: len(empty)]
        centroids[empty] = data[worst]
    return unit(centroids) if spherical else centroids
