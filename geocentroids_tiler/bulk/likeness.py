"""How alike images are by what is in them: their histograms of labels compared.

Two images of one place share few labels exactly, for a codebook has many centroids that mean almost the same. So
histograms are compared twice: as they are, and smoothed, where each patch counts for the centroids near its own, too.
``benchmarks/similar.py`` measures this against other ways.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import Metric

BANDWIDTH = 0.7
"""Width of the smoothing, in median distances from a centroid to its nearest other one; the best of those measured."""
_BLOCK = 1024


def likeness(
    counts: NDArray[np.int64], others: NDArray[np.int64], centroids: NDArray[np.floating], metric: Metric
) -> NDArray[np.float64]:
    """Return how alike an image is to others: the mean Bhattacharyya coefficient of plain and smoothed histograms.

    Args:
        counts: patches of each label in the image, of shape (K,), not all 0.
        others: those of the others, of shape (N, K), none all 0.
        centroids: of shape (K, D).
        metric: of the codebook; with ``l2`` distances between centroids count, otherwise angles.

    Returns:
        Likenesses of shape (N,): 1 for the same shares of all labels, 0 for nothing in common.
    """
    plain = np.concatenate([counts[None], others]).astype(np.float64)
    plain /= plain.sum(axis=1, keepdims=True)
    total = np.zeros(len(others))
    for shares in (plain, smoothed(plain, centroids, metric)):
        root = np.sqrt(shares)
        total += root[1:] @ root[0] / 2
    return np.minimum(total, 1.0)


def smoothed(
    shares: NDArray[np.float64], centroids: NDArray[np.floating], metric: Metric, bandwidth: float = BANDWIDTH
) -> NDArray[np.float64]:
    """Spread the share of each label over the labels of centroids near its own, by a Gaussian of their distance.

    Args:
        shares: of each label, of shape (N, K).
        centroids: of shape (K, D).
        metric: of the codebook.
        bandwidth: standard deviation, in median distances from a centroid to its nearest other one.

    Returns:
        Shares of shape (N, K); their sums stay as they were.
    """
    points = centroids.astype(np.float64)
    if metric != "l2":
        length = np.linalg.norm(points, axis=1, keepdims=True)
        points = points / np.where(length > 0, length, 1)
    k = len(points)
    blocks = [slice(start, min(k, start + _BLOCK)) for start in range(0, k, _BLOCK)]
    nearest = np.concatenate([_square_distances(points, block, to_itself=np.inf).min(axis=1) for block in blocks])
    width = (bandwidth * float(np.median(np.sqrt(nearest)))) ** 2
    if not 0 < width < np.inf:  # one centroid, or most are doubles of others
        return shares
    result = np.zeros_like(shares)
    for block in blocks:
        spread = np.exp(-_square_distances(points, block, to_itself=0.0) / (2 * width))
        result += shares[:, block] @ (spread / spread.sum(axis=1, keepdims=True))
    return result


def _square_distances(points: NDArray[np.float64], block: slice, to_itself: float) -> NDArray[np.float64]:
    """Return the squared distance of some points to all, of shape (block, K)."""
    own = points[block]
    square: NDArray[np.float64] = (own**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * own @ points.T
    np.maximum(square, 0, out=square)
    square[np.arange(len(own)), np.arange(block.start, block.stop)] = to_itself
    return square
