"""K-Means against scikit-learn, empty clusters, spherical metrics, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from geocentroids_fit.cluster import _means, kmeans, nearest, similarities
from geocentroids_tiler.errors import InputError


def blobs(k: int, each: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(rng.normal(0, 8, dim), 1, (each, dim)) for _ in range(k)]).astype(np.float32)


def test_inertia_is_as_low_as_scikit_learns() -> None:
    data = blobs(12, 80, 8)
    ours = kmeans(data, 20, seed=3, progress=False)
    theirs = KMeans(20, n_init=1, random_state=3).fit(data)
    # Different starts end in different minima: measured 0.99.
    assert ours.inertia <= 1.05 * theirs.inertia_


def test_labels_counts_and_inertia_belong_to_the_centroids() -> None:
    data = blobs(5, 50, 6)
    found = kmeans(data, 9, progress=False)
    distance = np.linalg.norm(data[:, None].astype(np.float64) - found.centroids[None], axis=2)
    assert (found.labels == distance.argmin(axis=1)).all()
    assert (found.counts == np.bincount(found.labels, minlength=9)).all()
    assert found.inertia == pytest.approx((distance.min(axis=1) ** 2).sum(), rel=1e-5)
    assert similarities(data, found, "l2") == pytest.approx(-distance.min(axis=1), abs=1e-4)


def test_well_separated_blobs_are_found() -> None:
    data = blobs(6, 40, 10)
    found = kmeans(data, 6, seed=1, progress=False)
    assert sorted(found.counts) == [40] * 6


def test_the_seed_decides() -> None:
    data = blobs(4, 100, 5)
    first, second = kmeans(data, 16, seed=5, progress=False), kmeans(data, 16, seed=5, progress=False)
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert first.centroids.tobytes() != kmeans(data, 16, seed=6, progress=False).centroids.tobytes()


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
def test_spherical_ignores_length(metric: str) -> None:
    data = blobs(5, 40, 6)
    longer = data * np.random.default_rng(1).uniform(0.5, 4, (len(data), 1)).astype(np.float32)
    plain, scaled = (kmeans(rows, 5, metric=metric, seed=2, progress=False) for rows in (data, longer))
    assert (plain.labels == scaled.labels).all()
    assert np.linalg.norm(plain.centroids, axis=1) == pytest.approx(1, abs=1e-6)
    assert similarities(longer, scaled, "cosine").max() <= 1 + 1e-6


def test_an_empty_cluster_starts_again_at_the_worst_fit() -> None:
    data = np.array([[0, 0], [0, 1], [9, 9]], np.float32)
    means = _means(data, np.array([0, 0, 0]), np.array([1, 2, 50], np.float32), 2, spherical=False)
    assert means.tolist() == [[3, pytest.approx(10 / 3)], [9, 9]]


def test_as_many_clusters_as_features() -> None:
    data = blobs(1, 12, 4)
    found = kmeans(data, 12, progress=False)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert (nearest(data, found.centroids)[0] == found.labels).all()
    assert (found.counts == 1).all()


@pytest.mark.parametrize("k", [0, 13])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}, but there are 12 features"):
        kmeans(blobs(1, 12, 4), k, progress=False)


def test_not_a_number_is_refused() -> None:
    data = blobs(1, 12, 4)
    data[3, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        kmeans(data, 2, progress=False)
