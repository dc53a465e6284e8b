"""Centroids made ready for a search by inner product; the same for every backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import ChunkLayout
from geocentroids_tiler.encoder.checks import Metric, check_centroids, check_layout, check_metric

TINY = 1e-30
"""Least length a token is divided by, so that a zero token has similarity 0 and no NaN."""

ROWS_PER_RUN = 2048
"""Patches assigned in one run of a GPU: enough to fill it, few enough that (rows, K) scores stay near 50 MB."""

MAX_CHUNKS_PER_RUN = 32
"""Keeps the number of bound tensors, and what padding wastes, small."""


@dataclass(frozen=True, slots=True)
class CentroidTable:
    """The nearest centroid of token t is ``labels[argmax(rows @ t + bias)]``.

    Attributes:
        rows: array of shape (R, D), the distinct centroids; of length 1 for cosine.
        bias: array of shape (R,), -|c|^2 / 2; only for l2.
        labels: array of shape (R,), the lowest index that each row has among the centroids.
    """

    rows: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    labels: NDArray[np.uint16]


def centroid_table(centroids: NDArray[np.float32], metric: Metric) -> CentroidTable:
    """Return the table of centroids of shape (K, D).

    Equal centroids become one row: a matrix kernel may round its last columns differently from the others
    (seen with torch on AVX-512), and then the first of equals does not win.
    """
    table = _unit_rows(centroids) if metric == "cosine" else centroids
    first = np.sort(np.unique(table + np.float32(0), axis=0, return_index=True)[1])  # -0 + 0 = 0
    rows = np.ascontiguousarray(table[first])
    bias = None
    if metric == "l2":  # argmin |t - c| = argmax t.c - |c|^2 / 2
        squares: NDArray[np.float64] = np.square(rows.astype(np.float64)).sum(axis=1)
        bias = (-0.5 * squares).astype(np.float32)
    return CentroidTable(rows=rows, bias=bias, labels=first.astype(np.uint16))


def checked_table(
    centroids: NDArray[np.float32], metric: str, layout: ChunkLayout, *, dim: int, window_patches: int
) -> tuple[CentroidTable, Metric]:
    """Return the table of centroids and the metric, checked against an encoder.

    Raises:
        EncoderError: if shape, metric or layout do not fit an encoder of tokens of length ``dim`` and windows of
            ``window_patches`` patches a side.
    """
    known = check_metric(metric)
    rows = check_centroids(centroids, dim)
    check_layout(layout, window_patches)
    return centroid_table(rows, known), known


def chunks_per_run(stride_patches: int) -> int:
    """Return how many chunks of ``stride_patches`` a side a GPU labels in one (padded) run."""
    return min(MAX_CHUNKS_PER_RUN, max(1, ROWS_PER_RUN // stride_patches**2))


def _unit_rows(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return rows of shape (K, D) scaled to length 1; a zero row stays zero."""
    rows = centroids.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(length > 0, length, 1.0)
    return unit.astype(np.float32)
