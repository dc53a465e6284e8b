"""Likeness: what an image adds to all of its tokens counts for less."""

from __future__ import annotations

import numpy as np
import pytest

from geocentroids_fit.cluster import Clustering
from geocentroids_fit.extract import Features
from geocentroids_fit.likeness import IMAGE_SHARE, likeness_vectors, natural_colors

THINGS = np.array([[0.0, 0, 4], [0, 4, 0]])
LIGHTS = np.array([[8.0, 0, 0], [-8, 0, 0]])


def scene() -> tuple[Features, Clustering]:
    """Two things in two images that differ in light; a cluster for each thing in each image."""
    image, thing = np.repeat([0, 0, 1, 1], 5), np.tile(np.repeat([0, 1], 5), 2)
    tokens = THINGS[thing] + LIGHTS[image]
    labels = 2 * image + thing
    features = Features(
        tokens=tokens.astype(np.float16),
        rgb=np.repeat(10 * labels[:, None], 3, axis=1).astype(np.uint8),
        image=image.astype(np.int32),
        row=np.zeros(20, np.int64),
        col=np.arange(20),
        images=("a.tif", "b.tif"),
    )
    centroids = (THINGS[[0, 1, 0, 1]] + LIGHTS[[0, 0, 1, 1]]).astype(np.float32)
    return features, Clustering(centroids, labels, np.bincount(labels), 0.0, 1)


def test_by_hand() -> None:
    features, clustering = scene()
    means = LIGHTS + THINGS.mean(axis=0)
    expected = clustering.centroids - IMAGE_SHARE * means[[0, 0, 1, 1]]
    assert likeness_vectors(features, clustering, "l2") == pytest.approx(expected, abs=1e-6)


def test_light_counts_for_less() -> None:
    features, clustering = scene()
    vectors = likeness_vectors(features, clustering, "l2")
    across_images, before = np.linalg.norm(vectors[0] - vectors[2]), np.linalg.norm(LIGHTS[0] - LIGHTS[1])
    assert across_images == pytest.approx((1 - IMAGE_SHARE) * before)
    assert np.linalg.norm(vectors[0] - vectors[1]) == pytest.approx(np.linalg.norm(THINGS[0] - THINGS[1]))


def test_natural_colours_are_the_patches_means() -> None:
    features, clustering = scene()
    assert natural_colors(features, clustering)[:, 0].tolist() == [0, 10, 20, 30]
