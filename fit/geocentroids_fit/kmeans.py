"""The numeric core of K-Means: nearest centroids of rows, the next centroids, empty clusters.

All metrics minimise the squared distance of rows to centroids, with centroids of length 1 for the spherical ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_fit.blocks import Blocks, Rows, unit
from geocentroids_tiler.errors import InputError

SPLIT_STEP = 1 / 16
"""How far the halves of a split cluster start from its mean, on the way to one of its rows. A row of 768 independent
values is 28 standard deviations from the mean, so this is 1.7 of them, where the halves' own means will be about 0.8;
more drives rows off to other clusters, less is lost in the rounding of bfloat16."""


Members = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
"""From clusters and numbers of their rows, both of shape (n,), to the rows, of shape (n, D)."""


class NotFiniteError(InputError):
    """A row holds a value that is not finite, or too large to be squared in float32.

    Attributes:
        part: number of the array, from 0.
        row: number of the row in it, from 0.
    """

    def __init__(self, part: int, row: int) -> None:
        super().__init__(
            f"row {row} of features part {part} (counted from 0) is not finite, or too large for its square; "
            "K-Means needs finite features"
        )
        self.part = part
        self.row = row


@dataclass(frozen=True)
class Survey:
    """What one look at all rows tells.

    Attributes:
        mean: of the rows, of shape (D,), float64.
        least: inertia that no centroids can undercut: 0, but if centroids have length 1 and rows have not, the sum of
            squared distances of rows from length 1.
    """

    mean: NDArray[np.float64]
    least: float


@dataclass(frozen=True)
class Totals:
    """What the next centroids depend on.

    Attributes:
        counts: rows of each centroid, of shape (K,), int64.
        residuals: sum over the rows of each centroid of row minus centroid, of shape (K, D), float32 or float64.
        inertias: sum over the rows of each centroid of the squared distance, of shape (K,), float64.
    """

    counts: NDArray[np.int64]
    residuals: NDArray[np.floating[Any]]
    inertias: NDArray[np.float64]

    @property
    def inertia(self) -> float:
        """Sum of squared distances."""
        return float(self.inertias.sum())


@dataclass(frozen=True)
class Assignment(Totals):
    """Rows and their nearest centroids.

    Attributes:
        labels: of shape (N,), uint16.
    """

    labels: NDArray[np.uint16]

    def members(self, clusters: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which rows are members of clusters: of ``clusters[i]`` the one before which come ``numbers[i]``."""
        by_cluster = np.argsort(self.labels, kind="stable")  # rows of cluster 0, then of cluster 1 and so on
        first = np.cumsum(self.counts) - self.counts
        index: NDArray[np.int64] = by_cluster[first[clusters] + numbers]
        return index


def survey(rows: Rows, *, spherical: bool) -> Survey:
    """Look at all rows once.

    Raises:
        NotFiniteError: if a row is not finite.
    """
    sums = np.empty((len(rows.block_starts), rows.dim))  # of each block, so that threads do not change the total
    least = np.empty(len(rows.block_starts))

    def look(blocks: Blocks) -> None:
        for start, block in blocks:
            length = torch.linalg.vector_norm(block, dim=1)
            if not (finite := torch.isfinite(length)).all():
                row = start + int(finite.to(torch.uint8).argmin())
                part = int(np.searchsorted(rows.starts, row, side="right")) - 1
                raise NotFiniteError(part, row - int(rows.starts[part]))
            number = start // rows.block_starts.step
            sums[number] = block.sum(dim=0, dtype=torch.float64).cpu().numpy()
            least[number] = float((length.double() - 1).square().sum())

    rows.map_blocks(look)
    return Survey(sums.sum(axis=0) / len(rows), float(least.sum()) if spherical and not rows.scaled else 0.0)


def assign(
    rows: Rows, centroids: NDArray[np.float32], mean: NDArray[np.float64], *, spherical: bool, coarse: bool = False
) -> Assignment:
    """Find the nearest centroid of each row.

    The score of row x and centroid c is x.c - |c|^2 / 2, largest where |x - c|^2 is least. It is computed of rows less
    their mean and centroids less theirs, which adds the same to all scores of a row and leaves little to round off.

    Args:
        rows: of shape (N, D).
        centroids: of shape (K, D).
        mean: of the rows, of shape (D,).
        spherical: whether centroids have length 1, so that |c|^2 need not be subtracted (a zero one then stays last).
        coarse: whether scores are computed in bfloat16; distances from the centroids so chosen are float32 always.
    """
    with _full_float32():
        return _assign(rows, centroids, mean, spherical, coarse)


def _assign(
    rows: Rows, centroids: NDArray[np.float32], mean: NDArray[np.float64], spherical: bool, coarse: bool
) -> Assignment:
    dtype = torch.bfloat16 if coarse else torch.float32
    exact = centroids.astype(np.float64)
    bias = exact @ mean - (0.0 if spherical else np.square(exact).sum(axis=1) / 2)
    weights = _on(exact - exact.mean(axis=0), rows.device).to(dtype).T
    offset = _on(bias - bias.mean(), rows.device).to(dtype)
    centred, shift = _on(exact - mean, rows.device), _on(mean, rows.device)

    labels = np.empty(len(rows), np.uint16)

    def compare(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
        residuals = torch.zeros_like(centred)
        inertias = torch.zeros(len(centred), dtype=torch.float64, device=rows.device)
        scores = torch.empty((rows.block_starts.step, len(centred)), dtype=dtype, device=rows.device)
        for start, block in blocks:
            block -= shift
            best = torch.addmm(offset, block.to(dtype), weights, out=scores[: len(block)]).max(dim=1).indices
            labels[start : start + len(block)] = best.cpu().numpy()
            block -= centred[best]
            with _deterministic(rows.device):
                residuals.index_add_(0, best, block)
                inertias.index_add_(0, best, torch.linalg.vector_norm(block, dim=1).double().square())
        return residuals.cpu(), inertias.cpu()

    residuals, inertias = (sum(shares[1:], shares[0]) for shares in zip(*rows.map_blocks(compare), strict=True))
    counts = np.bincount(labels, minlength=len(centroids))
    return Assignment(counts, residuals.numpy(), inertias.numpy(), labels)


def means(centroids: NDArray[np.float32], found: Totals, *, spherical: bool) -> NDArray[np.float32]:
    """Return the mean of each centroid's rows, scaled to length 1 if spherical; one without rows stays where it is."""
    counts = found.counts[:, None].astype(np.float64)
    if not spherical:
        return (centroids + found.residuals / np.maximum(counts, 1)).astype(np.float32)
    total = counts * centroids + found.residuals
    return np.where((total != 0).any(axis=1, keepdims=True), unit(total), centroids).astype(np.float32)


def split(
    members: Members, centroids: NDArray[np.float32], found: Totals, rng: np.random.Generator, *, spherical: bool
) -> tuple[NDArray[np.float32], int]:
    """Start empty clusters again by splitting those of the largest inertia in two halves.

    Args:
        members: returns rows of clusters, of shape (n, D): of each the one before which come so many.
        centroids: means of the assignment, of shape (K, D).
        found: the assignment.
        rng: chooses the row of a cluster that its halves are split along.
        spherical: whether centroids have length 1.

    Returns:
        Centroids of shape (K, D), and how many clusters were started again: not more than can be split.
    """
    empty = np.flatnonzero(found.counts == 0)
    if not len(empty):
        return centroids, 0
    donors = np.argsort(-found.inertias, kind="stable")[: len(empty)]
    donors = donors[(found.counts[donors] > 1) & (found.inertias[donors] > 0)]
    empty = empty[: len(donors)]
    towards = members(donors, rng.integers(found.counts[donors]))
    step = SPLIT_STEP * ((unit(towards) if spherical else towards) - centroids[donors])
    halves = np.concatenate([centroids[donors] - step, centroids[donors] + step])
    result = centroids.copy()
    result[np.concatenate([donors, empty])] = unit(halves) if spherical else halves
    return result, len(empty)


def _on(array: NDArray[np.float64], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(device)


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Add in a fixed order on CUDA, as on CPUs, and leave the choice of others as it was."""
    if device.type == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep others' leave to multiply float32 in fewer bits out of here."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
