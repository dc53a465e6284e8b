"""What centroids are compared by for colours and merging: what they stand for, apart from which image it came from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from geocentroids_fit.cluster import unit
from geocentroids_fit.shards import FeatureStore
from geocentroids_tiler.codebook import Metric

IMAGE_SHARE = 0.5
"""How much of the mean token of a patch's image is left out. Light, camera and season colour every token of an image
(49 % of the variance with the small encoder), so with 0 a road is more like a roof beside it than like a road
elsewhere; with 1 water and forest, if they fill images of their own, become alike. Chosen by eye."""
_ROWS = 65_536


def likeness_vectors(
    store: FeatureStore, centroids: NDArray[np.float32], labels: NDArray[np.uint16], means: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return for each centroid its own vector less a share of the mean tokens of the images it comes from.

    Args:
        store: what was clustered.
        centroids: of shape (K, D).
        labels: nearest centroid of each feature, of shape (N,).
        means: of the images' tokens, of shape (images, D); see ``image_means``.

    Returns:
        Of shape (K, D), float32.
    """
    k, images = len(centroids), len(store.images)
    image = np.repeat(np.arange(images), np.diff(store.starts))
    share = sparse.csr_array((np.ones(len(labels), np.float32), (labels, image)), (k, images))  # repeated ones add up
    shift = (share @ means) / np.maximum(np.bincount(labels, minlength=k), 1)[:, None]
    vectors: NDArray[np.float32] = (centroids - IMAGE_SHARE * shift).astype(np.float32)
    return vectors


def image_means(parts: Iterable[NDArray[np.floating[Any]]], metric: Metric) -> NDArray[np.float64]:
    """Return the mean token of each image, of shape (images, D).

    Args:
        parts: tokens of each image, of shapes (n_i, D).
        metric: of the clustering; with cosine tokens are scaled to length 1 first.
    """
    return np.stack([_mean(tokens, metric) for tokens in parts])


def natural_colors(store: FeatureStore, labels: NDArray[np.uint16], k: int) -> NDArray[np.float32]:
    """Return the mean colour of each centroid's patches, of shape (K, 3), float32, 0 to 255."""
    total = np.zeros((k, 3))
    for image, start in enumerate(store.starts[:-1]):
        rgb = store.origin(image).rgb
        own = labels[start : start + len(rgb)]
        total += np.stack([np.bincount(own, rgb[:, i], minlength=k) for i in range(3)], axis=1)
    counts = np.bincount(labels, minlength=k)
    mean: NDArray[np.float32] = (total / np.maximum(counts, 1)[:, None]).astype(np.float32)
    return mean


def _mean(tokens: NDArray[np.floating[Any]], metric: Metric) -> NDArray[np.float64]:
    """Return the mean of rows (n, D), of shape (D,)."""
    total = np.zeros(tokens.shape[1])
    for start in range(0, len(tokens), _ROWS):
        rows = np.asarray(tokens[start : start + _ROWS], np.float32)
        total += (unit(rows) if metric == "cosine" else rows).sum(axis=0, dtype=np.float64)
    return total / max(len(tokens), 1)
