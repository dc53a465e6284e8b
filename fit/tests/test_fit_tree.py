"""The merge tree against scipy with equal weights and against brute force with others."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import is_valid_linkage, linkage

from geocentroids_fit.tree import ward_tree
from geocentroids_tiler.codebook import cut_tree
from geocentroids_tiler.errors import InputError


def brute_force(points: np.ndarray, weights: np.ndarray) -> list[tuple[int, int, float, int]]:
    """Try all pairs in each step, with the means of all leaves computed anew."""
    clusters = {i: [i] for i in range(len(points))}
    merges = []
    for step in range(len(points) - 1):
        best = None
        for a in clusters:
            for b in clusters:
                if a < b:
                    wa, wb = weights[clusters[a]], weights[clusters[b]]
                    gap = np.average(points[clusters[a]], axis=0, weights=wa) - np.average(
                        points[clusters[b]], axis=0, weights=wb
                    )
                    height = np.sqrt(2 * wa.sum() * wb.sum() / (wa.sum() + wb.sum())) * np.linalg.norm(gap)
                    best = min(best or (np.inf, 0, 0), (height, a, b))
        height, a, b = best
        clusters[len(points) + step] = clusters.pop(a) + clusters.pop(b)
        merges.append((a, b, height, len(clusters[len(points) + step])))
    return merges


@pytest.mark.parametrize("k", [2, 3, 50, 300])
def test_equal_weights_give_scipys_tree(k: int) -> None:
    points = np.random.default_rng(k).normal(size=(k, 5))
    expected = linkage(points, "ward")
    expected[:, :2].sort(axis=1)
    tree = ward_tree(points, np.ones(k))
    assert (tree[:, [0, 1, 3]] == expected[:, [0, 1, 3]]).all()
    assert tree[:, 2] == pytest.approx(expected[:, 2], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_weights_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, weights = rng.normal(size=(18, 3)), rng.integers(1, 500, 18)
    tree = ward_tree(points, weights)
    expected = np.array(brute_force(points, weights))
    assert (tree[:, [0, 1, 3]] == expected[:, [0, 1, 3]]).all()
    assert tree[:, 2] == pytest.approx(expected[:, 2], rel=1e-9)


def test_equal_points_make_a_valid_tree() -> None:
    tree = ward_tree(np.repeat(np.eye(3), 7, axis=0), np.ones(21))
    assert is_valid_linkage(tree)
    assert (np.bincount(cut_tree(tree, 3)) == 7).all()


def test_a_heavy_centroid_is_merged_later() -> None:
    points = np.array([[0.0], [1.0], [2.1], [3.1]])
    assert cut_tree(ward_tree(points, np.array([1, 1, 1, 1])), 2).tolist() == [0, 0, 1, 1]
    assert cut_tree(ward_tree(points, np.array([100, 100, 1, 100])), 3).tolist() == [0, 1, 2, 2]


def test_one_centroid_has_no_merges() -> None:
    assert ward_tree(np.ones((1, 4)), np.ones(1)).shape == (0, 4)


@pytest.mark.parametrize("weights", [[1, 0, 1], [1, -2, 1], [1, np.nan, 1]])
def test_weights_must_be_positive(weights: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        ward_tree(np.eye(3), np.array(weights))


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"\(3, 3\)"):
        ward_tree(np.eye(3), np.ones(2))
