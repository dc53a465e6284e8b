"""Likeness: what an image adds to all of its tokens counts for less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_images import settings

from geocentroids_fit.likeness import IMAGE_SHARE, image_means, likeness_vectors, natural_colors
from geocentroids_fit.shards import SHARDS_DIR, FeatureManifest, Features, FeatureStore, write_shard

THINGS = np.array([[0.0, 0, 4], [0, 4, 0]])
LIGHTS = np.array([[8.0, 0, 0], [-8, 0, 0]])
CENTROIDS = (THINGS[[0, 1, 0, 1]] + LIGHTS[[0, 0, 1, 1]]).astype(np.float32)
LABELS = np.repeat(np.arange(4), 5).astype(np.uint16)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two things in two images that differ in light, five patches of each; an image without patches between them."""
    records = []
    for image, kept in ((0, 10), (2, 0), (1, 10)):
        thing = np.repeat([0, 1], 5)[:kept]
        label = 2 * image + thing
        features = Features(
            tokens=(THINGS[thing] + LIGHTS[image % 2]).astype(np.float16),
            rgb=np.repeat(10 * label[:, None], 3, axis=1).astype(np.uint8),
            row=np.zeros(kept, np.int64),
            col=np.arange(kept),
        )
        records.append(write_shard(tmp_path / SHARDS_DIR, f"{image}.tif", "1", features))
    return FeatureStore(tmp_path, FeatureManifest(settings=settings(), images=tuple(records)))


def test_by_hand(store: FeatureStore) -> None:
    means = LIGHTS + THINGS.mean(axis=0)
    expected = CENTROIDS - IMAGE_SHARE * means[[0, 0, 1, 1]]
    found = likeness_vectors(store, CENTROIDS, LABELS, image_means(store.parts(), "l2"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_cosine_leaves_out_the_mean_of_unit_vectors(store: FeatureStore) -> None:
    lengths = np.linalg.norm(CENTROIDS, axis=1, keepdims=True)
    means = (CENTROIDS / lengths).reshape(2, 2, 3).mean(axis=1)
    expected = CENTROIDS - IMAGE_SHARE * means[[0, 0, 1, 1]]
    found = likeness_vectors(store, CENTROIDS, LABELS, image_means(store.parts(), "cosine"))
    assert found == pytest.approx(expected, abs=1e-6)


def test_light_counts_for_less(store: FeatureStore) -> None:
    vectors = likeness_vectors(store, CENTROIDS, LABELS, image_means(store.parts(), "l2"))
    across_images, before = np.linalg.norm(vectors[0] - vectors[2]), np.linalg.norm(LIGHTS[0] - LIGHTS[1])
    assert across_images == pytest.approx((1 - IMAGE_SHARE) * before)
    assert np.linalg.norm(vectors[0] - vectors[1]) == pytest.approx(np.linalg.norm(THINGS[0] - THINGS[1]))


def test_a_centroid_of_several_images_leaves_out_the_mean_of_their_means(store: FeatureStore) -> None:
    labels = np.tile(np.repeat([0, 1], 5), 2).astype(np.uint16)
    vectors = likeness_vectors(store, THINGS.astype(np.float32), labels, image_means(store.parts(), "l2"))
    assert vectors == pytest.approx(THINGS - IMAGE_SHARE * THINGS.mean(axis=0), abs=1e-6)


def test_an_unused_centroid_stays_as_it_is(store: FeatureStore) -> None:
    more = np.concatenate([CENTROIDS, [[7, 7, 7]]]).astype(np.float32)
    assert likeness_vectors(store, more, LABELS, image_means(store.parts(), "l2"))[4].tolist() == [7, 7, 7]


def test_natural_colours_are_the_patches_means(store: FeatureStore) -> None:
    assert natural_colors(store, LABELS, 5)[:, 0].tolist() == [0, 10, 20, 30, 0]
