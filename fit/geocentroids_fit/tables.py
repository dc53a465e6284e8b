"""The rows that centroids are fitted to, wherever they are: what K-Means asks of them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.blocks import Rows
from geocentroids_fit.devices import has_bfloat16
from geocentroids_fit.kmeans import Assignment, Survey, Totals, assign, survey


class Table(Protocol):
    """N rows of D values."""

    def __len__(self) -> int:
        """Return the number of rows N."""
        ...

    @property
    def dim(self) -> int:
        """Length D of a row."""
        ...

    @property
    def device_type(self) -> str:
        """Kind of device that computes: ``cpu`` or ``cuda``."""
        ...

    @property
    def has_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster there."""
        ...

    def survey(self, *, spherical: bool) -> Survey:
        """Look at all rows once.

        Raises:
            NotFiniteError: if a row is not finite.
        """
        ...

    def assign(
        self, centroids: NDArray[np.float32], mean: NDArray[np.float64], *, spherical: bool, coarse: bool = False
    ) -> Totals:
        """Find the nearest centroid of each row; see ``kmeans.assign``. Labels stay where the rows are."""
        ...

    def labels(self) -> NDArray[np.uint16]:
        """Return the labels of the last assignment, of shape (N,)."""
        ...

    def members(self, clusters: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of clusters of the last assignment, of shape (n, D): of each the one before which come so many.

        Args:
            clusters: of shape (n,).
            numbers: of shape (n,), each less than its cluster's count.
        """
        ...

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by number, of shape (len(index), D)."""
        ...


class LocalTable:
    """Rows of this process; see ``Table``."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._last: Assignment | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        """Length D of a row."""
        return self.rows.dim

    @property
    def device_type(self) -> str:
        """Kind of device that computes."""
        return self.rows.device.type

    @property
    def has_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster there."""
        return has_bfloat16(self.rows.device)

    def survey(self, *, spherical: bool) -> Survey:
        """Look at all rows once."""
        return survey(self.rows, spherical=spherical)

    def assign(
        self, centroids: NDArray[np.float32], mean: NDArray[np.float64], *, spherical: bool, coarse: bool = False
    ) -> Assignment:
        """Find the nearest centroid of each row."""
        self._last = assign(self.rows, centroids, mean, spherical=spherical, coarse=coarse)
        return self._last

    def labels(self) -> NDArray[np.uint16]:
        """Return the labels of the last assignment."""
        return self._assigned.labels

    def members(self, clusters: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of clusters of the last assignment."""
        return self.rows.take(self._assigned.members(clusters, numbers))

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by number."""
        return self.rows.take(index)

    @property
    def _assigned(self) -> Assignment:
        if self._last is None:
            raise RuntimeError("rows have not been assigned yet")
        return self._last
