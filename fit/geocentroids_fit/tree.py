"""The merge tree of centroids: Ward's method, each centroid as heavy as the patches it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.errors import InputError


def ward_tree(centroids: NDArray[np.floating[Any]], weights: NDArray[Any]) -> NDArray[np.float64]:
    """Merge centroids, two at a time, so that the spread within classes grows least.

    With equal weights of 1 the result is that of ``scipy.cluster.hierarchy.linkage(centroids, "ward")``. A cluster's
    nearest neighbour's nearest neighbour's ... ends in a pair that are each other's nearest, and Ward's distance lets
    such a pair be merged at once whatever the order.

    Source: Müllner, "Modern hierarchical, agglomerative clustering algorithms", 2011, https://arxiv.org/abs/1109.2378
    (nearest-neighbour chain), with sizes that start at ``weights``.

    Args:
        centroids: of shape (K, D).
        weights: of shape (K,), positive.

    Returns:
        Merges of shape (K - 1, 4), float64, as scipy's linkage has them: the two clusters, the height
        ``sqrt(2 * a * b / (a + b)) * distance`` of clusters of weights a and b, and the number of centroids in both.

    Raises:
        InputError: if a weight is not positive or the shapes differ.
    """
    points = np.array(centroids, np.float64)
    mass = np.array(weights, np.float64)
    if points.ndim != 2 or mass.shape != points.shape[:1] or not len(points):
        raise InputError(f"centroids {points.shape} and weights {mass.shape}; allowed: (K, D) and (K,), K at least 1")
    if not (np.isfinite(mass).all() and (mass > 0).all()):
        raise InputError("the weights of a merge tree must be positive")
    return _number(*_chain_merges(points, mass))


def _chain_merges(
    points: NDArray[np.float64], mass: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return pairs of leaves whose clusters were merged, of shape (K - 1, 2), and the heights, in no order.

    A merged cluster lives on in the slot of its second leaf; ``points`` and ``mass`` are overwritten.
    """
    k = len(points)
    active = np.ones(k, bool)
    pairs = np.empty((k - 1, 2), np.int64)
    heights = np.empty(k - 1)
    chain: list[int] = []
    for step in range(k - 1):
        if not chain:
            chain.append(int(np.argmax(active)))
        while True:
            last = chain[-1]
            square = 2 * mass * mass[last] / (mass + mass[last]) * np.square(points - points[last]).sum(axis=1)
            square[~active] = np.inf
            square[last] = np.inf
            other = int(np.argmin(square))
            if len(chain) > 1 and square[chain[-2]] <= square[other]:  # at a tie the chain must not go in circles
                other = chain[-2]
                break
            chain.append(other)
        del chain[-2:]
        left, right = sorted((last, other))
        pairs[step] = left, right
        heights[step] = np.sqrt(square[other])
        both = mass[left] + mass[right]
        points[right] = (mass[left] * points[left] + mass[right] * points[right]) / both
        mass[right] = both
        active[left] = False
    return pairs, heights


def _number(pairs: NDArray[np.int64], heights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sort merges by height and name each cluster as scipy does: leaves 0 to K - 1, merge i makes cluster K + i."""
    k = len(pairs) + 1
    parent = np.arange(2 * k - 1)
    size = np.ones(2 * k - 1)
    tree = np.empty((k - 1, 4))
    for i, merge in enumerate(np.argsort(heights, kind="stable")):
        left, right = sorted(_root(parent, leaf) for leaf in pairs[merge])
        parent[[left, right]] = k + i
        size[k + i] = size[left] + size[right]
        tree[i] = left, right, heights[merge], size[k + i]
    return tree


def _root(parent: NDArray[np.int64], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = int(parent[node])
    return node
