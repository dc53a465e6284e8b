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
    (nearest-neighbour chain), with sizes that start at ``weights``. Takes 8 K * K bytes: 302 MB for 6,144 centroids.

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
    return _number(*_chain_merges(_squares(points, mass), mass))


def _squares(points: NDArray[np.float64], mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared Ward distance of all pairs, of shape (K, K), infinite on the diagonal."""
    centred = points - points.mean(axis=0)  # so that little is lost where large squares cancel
    length = np.square(centred).sum(axis=1)
    square = centred @ centred.T
    square *= -2
    square += length
    square += length[:, None]
    np.maximum(square, 0, out=square)
    square *= 2 * mass / (mass + mass[:, None]) * mass[:, None]
    np.fill_diagonal(square, np.inf)
    return np.asarray(square)


def _chain_merges(
    square: NDArray[np.float64], mass: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return pairs of leaves whose clusters were merged, of shape (K - 1, 2), and the heights, in no order.

    A merged cluster lives on in the slot of its second leaf; ``square`` and ``mass`` are overwritten.
    """
    k = len(mass)
    active = np.ones(k, bool)
    pairs = np.empty((k - 1, 2), np.int64)
    heights = np.empty(k - 1)
    chain: list[int] = []
    for step in range(k - 1):
        if not chain:
            chain.append(int(np.argmax(active)))
        while True:
            row = square[chain[-1]]
            other = int(np.argmin(row))
            if len(chain) > 1 and row[chain[-2]] <= row[other]:  # at a tie the chain must not go in circles
                other = chain[-2]
                break
            chain.append(other)
        left, right = sorted((chain.pop(), chain.pop()))
        pairs[step] = left, right
        heights[step] = np.sqrt(square[left, right])
        merged = _merged(square[left], square[right], square[left, right], mass, left, right)
        active[left] = False
        mass[right] += mass[left]
        square[left] = square[:, left] = np.inf
        square[right] = square[:, right] = np.where(active, merged, np.inf)
        square[right, right] = np.inf
    return pairs, heights


def _merged(
    to_left: NDArray[np.float64],
    to_right: NDArray[np.float64],
    between: float,
    mass: NDArray[np.float64],
    left: int,
    right: int,
) -> NDArray[np.float64]:
    """Return the squared distance of every cluster to two merged ones, of shape (K,).

    Source: Lance and Williams, "A general theory of classificatory sorting strategies", 1967, with Ward's factors.
    """
    a, b = mass[left], mass[right]
    return np.asarray(((a + mass) * to_left + (b + mass) * to_right - mass * between) / (a + b + mass))


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
