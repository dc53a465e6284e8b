"""What centroids are compared by for colours and merging: what they stand for, apart from which image it came from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.cluster import Clustering, unit
from geocentroids_fit.extract import Features
from geocentroids_tiler.codebook import Metric

IMAGE_SHARE = 0.5
"""How much of the mean token of a patch's image is left out. Light, camera and season colour every token of an image
(49 % of the variance with the small encoder), so with 0 a road is more like a roof beside it than like a road
elsewhere; with 1 water and forest, if they fill images of their own, become alike. Chosen by eye."""


def likeness_vectors(features: Features, clustering: Clustering, metric: Metric) -> NDArray[np.float64]:
    """Return for each centroid the mean of its tokens less a share of their images' means, of shape (K, D).

    Args:
        features: what was clustered.
        clustering: the clusters.
        metric: of the clustering; tokens are scaled to length 1 first unless it is l2.
    """
    tokens = features.tokens.astype(np.float32)
    if metric != "l2":
        tokens = unit(tokens)
    k, dim = clustering.centroids.shape
    images = len(features.images)
    total = np.zeros((images, dim))
    np.add.at(total, features.image, tokens)
    image_means = total / np.maximum(np.bincount(features.image, minlength=images), 1)[:, None]
    share = np.zeros((k, images))  # of each image in each cluster
    np.add.at(share, (clustering.labels, features.image), 1)
    share /= np.maximum(clustering.counts, 1)[:, None]
    vectors: NDArray[np.float64] = clustering.centroids - IMAGE_SHARE * (share @ image_means)
    return vectors


def natural_colors(features: Features, clustering: Clustering) -> NDArray[np.float64]:
    """Return the mean colour of each centroid's patches, of shape (K, 3), 0 to 255."""
    k = len(clustering.counts)
    total = np.stack([np.bincount(clustering.labels, features.rgb[:, i], minlength=k) for i in range(3)], axis=1)
    mean: NDArray[np.float64] = total / np.maximum(clustering.counts, 1)[:, None]
    return mean
