"""Measures that need no land cover: similarity, use of classes, visibility of windows. Pure functions on arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
HISTOGRAM_BINS = 60


@dataclass(frozen=True, slots=True)
class Similarity:
    """How well patches fit their centroids.

    Attributes:
        mean: mean similarity.
        percentiles: percentile -> similarity, for each of ``PERCENTILES``.
        below_range: share of patches below the codebook's similarity range.
        above_range: share above it.
        histogram: patches per bin.
    """

    mean: float
    percentiles: dict[int, float]
    below_range: float
    above_range: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """How evenly patches use the classes.

    Attributes:
        used: classes that occur.
        used_share: the same as a share of all classes.
        effective: effective number of classes, the exponential of the entropy of their shares.
        largest_patches: patches of the class met most.
        largest_share: the same as a share of all patches.
        median_images: images in which a class occurs, the median over the classes that occur.
    """

    used: int
    used_share: float
    effective: float
    largest_patches: int
    largest_share: float
    median_images: float


@dataclass(frozen=True, slots=True)
class Seam:
    """Colour differences of neighbouring patches, summed; sums of several axes or images add up.

    Attributes:
        across: sum over pairs on two sides of a window border.
        across_pairs: their number.
        inside: sum over all other pairs.
        inside_pairs: their number.
    """

    across: float = 0.0
    across_pairs: int = 0
    inside: float = 0.0
    inside_pairs: int = 0

    def __add__(self, other: Seam) -> Seam:
        return Seam(
            self.across + other.across,
            self.across_pairs + other.across_pairs,
            self.inside + other.inside,
            self.inside_pairs + other.inside_pairs,
        )

    @property
    def index(self) -> float | None:
        """Mean difference across borders divided by that elsewhere; None where one of them is unknown or zero."""
        if not self.across_pairs or self.inside <= 0:
            return None
        return (self.across / self.across_pairs) / (self.inside / self.inside_pairs)


def histogram_edges(similarity: NDArray[np.float32], similarity_range: tuple[float, float]) -> NDArray[np.float64]:
    """Return edges of ``HISTOGRAM_BINS`` bins, of shape (bins + 1,): all but the lowest 0.1 %, and the range."""
    low = min(float(np.percentile(similarity, 0.1)), similarity_range[0])
    high = max(float(similarity.max()), similarity_range[1])
    return np.linspace(low, high, HISTOGRAM_BINS + 1)


def similarity_of(
    similarity: NDArray[np.float32], similarity_range: tuple[float, float], edges: NDArray[np.float64]
) -> Similarity:
    """Summarise similarities.

    Args:
        similarity: of labelled patches, of shape (N,), N at least 1.
        similarity_range: the codebook's.
        edges: of the histogram's bins, ascending; what lies beyond counts in the first and the last bin.
    """
    values = similarity.astype(np.float64)
    low, high = similarity_range
    return Similarity(
        mean=float(values.mean()),
        percentiles=dict(zip(PERCENTILES, np.percentile(values, PERCENTILES).tolist(), strict=True)),
        below_range=float((values < low).mean()),
        above_range=float((values > high).mean()),
        histogram=tuple(np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist()),
    )


def usage_of(images: Sequence[NDArray[np.uint16]], n: int) -> Usage:
    """Measure how classes are used.

    Args:
        images: class ids of the labelled patches of each image, of shape (N,); one of them has some.
        n: number of classes.

    Source: Jost, "Entropy and diversity", Oikos 113, 2006 (effective number of classes).
    """
    counts = np.stack([np.bincount(ids, minlength=n) for ids in images])  # (images, n)
    total = counts.sum(axis=0)
    used = total[total > 0]
    share = used / used.sum()
    return Usage(
        used=len(used),
        used_share=len(used) / n,
        effective=float(np.exp(-(share * np.log(share)).sum())),
        largest_patches=int(used.max()),
        largest_share=float(share.max()),
        median_images=float(np.median((counts > 0).sum(axis=0)[total > 0])),
    )


def seam_along(
    lab: NDArray[np.float64], labelled: NDArray[np.bool_], first: int, stride_patches: int, axis: int
) -> Seam:
    """Sum colour differences between neighbours along one axis, apart for pairs across the borders of chunks.

    Args:
        lab: OKLab colours of patches, of shape (H, W, 3).
        labelled: patches that have a label, of shape (H, W); pairs with one that has none are left out.
        first: grid index of the first row (axis 0) or column (axis 1).
        stride_patches: patches between borders; there is one before each multiple of it.
        axis: 0 for neighbours above each other, 1 for those beside each other.
    """
    lab, labelled = np.moveaxis(lab, axis, 0), np.moveaxis(labelled, axis, 0)
    difference = np.linalg.norm(lab[1:] - lab[:-1], axis=-1)  # (H - 1, W)
    pair = labelled[1:] & labelled[:-1]
    border = (first + np.arange(1, len(lab))) % stride_patches == 0
    across, inside = pair & border[:, None], pair & ~border[:, None]
    return Seam(float(difference[across].sum()), int(across.sum()), float(difference[inside].sum()), int(inside.sum()))


def agreement(ids: NDArray[np.uint16], again: NDArray[np.uint16]) -> float | None:
    """Return the share of patches with the same class in two arrays of one shape; None without patches."""
    return float((ids == again).mean()) if len(ids) else None
