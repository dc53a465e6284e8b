"""What runs on the nodes of a cluster while features are clustered: a share of the rows, mapped from the shared folder.

Rows stay on their node; sums and counts leave it, labels at the end, and the few rows that centroids start from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_fit.blocks import Rows
from geocentroids_fit.cluster import similarities_of
from geocentroids_fit.devices import find_device
from geocentroids_fit.files import map_array
from geocentroids_fit.kmeans import NotFiniteError, Survey, Totals
from geocentroids_fit.likeness import image_means
from geocentroids_fit.shards import SHARDS_DIR, ShardRecord, shard_problem
from geocentroids_fit.tables import LocalTable
from geocentroids_tiler.codebook import Metric
from geocentroids_tiler.errors import InputError


@dataclass(frozen=True)
class Share:
    """Some of the shards, one after the other.

    Attributes:
        folder: of the features, where all nodes see it.
        shards: their records.
        first_image: number of the first one's image among all images.
        scaled: whether rows are scaled to length 1.
        device: name of the device wanted.
        threads: of torch.
    """

    folder: Path
    shards: tuple[ShardRecord, ...]
    first_image: int
    scaled: bool
    device: str
    threads: int

    def __len__(self) -> int:
        return sum(record.features for record in self.shards)


@dataclass(frozen=True)
class Opened:
    """What a node says of its share once it is open: its device, and whether that is fast in bfloat16."""

    device_type: str
    has_bfloat16: bool


@dataclass(frozen=True)
class NotFinite:
    """A row that is not finite: ``row`` of the image with number ``image``."""

    image: int
    row: int


class NodeRows:
    """A share of the rows on a node, as a Ray actor."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._table: LocalTable | None = None

    def open(self) -> Opened | str:
        """Map the shards and check that they are those of their records; return what is wrong as a sentence."""
        share = self._share
        torch.set_num_threads(share.threads)
        for record in share.shards:
            if problem := shard_problem(share.folder / SHARDS_DIR, record, verify=True):
                return problem
        try:
            device = find_device(share.device)
        except InputError as error:
            return str(error)
        parts = [map_array(share.folder / SHARDS_DIR / record.file, "tokens") for record in share.shards]
        self._table = LocalTable(Rows(parts, device, share.scaled))
        return Opened(self._table.device_type, self._table.has_bfloat16)

    def survey(self, spherical: bool) -> Survey | NotFinite:
        """Look at all rows once."""
        try:
            return self._rows.survey(spherical=spherical)
        except NotFiniteError as error:
            return NotFinite(self._share.first_image + error.part, error.row)

    def assign(
        self, centroids: NDArray[np.float32], mean: NDArray[np.float64], spherical: bool, coarse: bool
    ) -> Totals:
        """Find the nearest centroid of each row; labels stay here."""
        found = self._rows.assign(centroids, mean, spherical=spherical, coarse=coarse)
        return Totals(found.counts, found.residuals, found.inertias)

    def labels(self) -> NDArray[np.uint16]:
        """Return the labels of the last assignment."""
        return self._rows.labels()

    def similarities(self, centroids: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
        """Return how well each row fits the centroid of its label."""
        table = self._rows
        return similarities_of(table.rows, centroids, table.labels(), metric)

    def image_means(self) -> NDArray[np.float64]:
        """Return the mean of the rows of each shard, of shape (shards, D)."""
        return image_means(self._rows.rows.parts, "cosine" if self._share.scaled else "l2")

    def members(self, clusters: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of clusters of the last assignment."""
        return self._rows.members(clusters, numbers)

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by number."""
        return self._rows.take(index)

    @property
    def _rows(self) -> LocalTable:
        if self._table is None:
            raise RuntimeError("the share is not open")
        return self._table


def shares_of(
    folder: Path, records: Sequence[ShardRecord], count: int, *, scaled: bool, device: str, threads: Sequence[int]
) -> list[Share]:
    """Cut the shards into at most ``count`` contiguous shares of about as many rows.

    Args:
        folder: of the features.
        records: of all images, in their order.
        count: shares wanted; there are fewer where there are fewer shards.
        scaled: whether rows are scaled to length 1.
        device: name of the device wanted.
        threads: of torch, for each share.
    """
    ends = np.cumsum([record.features for record in records])
    middles = ends - np.array([record.features for record in records]) / 2
    of_share = np.minimum((middles * count / max(int(ends[-1]), 1)).astype(int), count - 1)
    shares: list[Share] = []
    for number in range(count):
        images = np.flatnonzero((of_share == number) & (np.diff(ends, prepend=0) > 0))
        if len(images):
            first, last = int(images[0]), int(images[-1])
            own = tuple(records[first : last + 1])
            shares.append(Share(folder, own, first, scaled, device, threads[len(shares)]))
    return shares
