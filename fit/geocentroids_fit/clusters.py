"""Clusters of features: centroids, the label of every feature, and what the clusters stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Clusters:
    """Centroids and what is known of them.

    Attributes:
        centroids: of shape (K, D), float32.
        labels: nearest centroid of each feature, of shape (N,), uint16.
        counts: features of each centroid, of shape (K,), int64.
        similarity: how well each feature fits its centroid (metric of the codebook), of shape (N,), float32.
        likeness: what centroids are compared by for colours and merging, of shape (K, D), float32.
        rgb: mean colour of each centroid's patches, of shape (K, 3), float32, 0 to 255.
        record: how they were made: ``inputs``, and the ``objective`` of each iteration.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.uint16]
    counts: NDArray[np.int64]
    similarity: NDArray[np.float32]
    likeness: NDArray[np.float32]
    rgb: NDArray[np.float32]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.centroids)
