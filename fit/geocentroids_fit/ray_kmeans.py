"""K-Means on a Ray cluster: each node keeps a share of the rows, and what is added up here are sums and counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geocentroids_fit.kmeans import NotFiniteError, Survey, Totals
from geocentroids_fit.node_rows import NodeRows, NotFinite, Opened, Share, shares_of
from geocentroids_fit.shards import FeatureStore
from geocentroids_tiler.codebook import Metric
from geocentroids_tiler.distributed import Node, alive_nodes, import_ray, on_node
from geocentroids_tiler.errors import ClusterError, InputError

MAX_LOSSES = 5
"""How often the process that holds a share may end during one question, before the run does."""
RETRY_S = 2.0
"""How long a lost share waits before another node is looked for again: a cluster takes a while to notice."""
PIECE_BYTES = 32 * 2**20
"""Rows that travel in one object."""


class RemoteTable:
    """Features on the nodes of a cluster; see ``Table``.

    A share whose process ends is opened again, on another node if need be, and answers what was asked of it then: its
    sums are the same, since they depend on the share and not on the node.
    """

    def __init__(self, store: FeatureStore, nodes: Sequence[Node], metric: Metric, device: str) -> None:
        """Give each GPU, or each node, a share of the shards.

        Args:
            store: the features, in a folder that all nodes see under the same path.
            nodes: of the cluster.
            metric: rows are scaled to length 1 for ``cosine``.
            device: ``auto``, ``cpu`` or ``cuda``.

        Raises:
            InputError: if ``device`` is another.
            ClusterError: if a node has no such device, or does not see the shards as they are.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device is {device!r}; on a cluster it must be auto, cpu or cuda")
        self._on_gpus = device != "cpu" and any(node.gpus >= 1 for node in nodes)
        places = [node for node in nodes for _ in range(self._places(node))]
        if not places:
            raise ClusterError(f"none of the {len(nodes)} nodes offers a CPU to compute with")
        wanted = "cpu" if device == "auto" and not self._on_gpus else device
        self._shares = shares_of(
            store.path.resolve(),
            store.manifest.images,
            len(places),
            scaled=metric == "cosine",
            device=wanted,
            threads=[max(1, int(node.cpus / self._places(node))) for node in places],
        )
        self._metric = metric
        self._dim, self._images = store.dim, len(store.manifest.images)
        self._starts = np.cumsum([0, *(len(share) for share in self._shares)])
        self._nodes = places[: len(self._shares)]
        self._actors = [self._start(share, node) for share, node in zip(self._shares, self._nodes, strict=True)]
        self._counts = np.zeros((len(self._shares), 0), np.int64)
        self._last: tuple[Any, ...] | None = None
        opened = list(self._ask("open", [()] * len(self._shares)))
        for node, found in zip(self._nodes, opened, strict=True):
            _check_open(node, found)
        self._opened: list[Opened] = opened

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        """Length D of a row."""
        return self._dim

    @property
    def device_type(self) -> str:
        """Kind of device that computes."""
        return self._opened[0].device_type

    @property
    def has_bfloat16(self) -> bool:
        """Whether products in bfloat16 are faster on all nodes."""
        return all(opened.has_bfloat16 for opened in self._opened)

    @property
    def nodes(self) -> int:
        """Number of nodes that hold shares."""
        return len({node.id for node in self._nodes})

    def survey(self, *, spherical: bool) -> Survey:
        """Look at all rows once."""
        mean, least = np.zeros(self._dim), 0.0
        for share, found in zip(self._shares, self._ask("survey", [(spherical,)] * len(self._shares)), strict=True):
            if isinstance(found, NotFinite):
                raise NotFiniteError(found.image, found.row)
            mean += found.mean * (len(share) / len(self))
            least += found.least
        return Survey(mean, least)

    def assign(
        self, centroids: NDArray[np.float32], mean: NDArray[np.float64], *, spherical: bool, coarse: bool = False
    ) -> Totals:
        """Find the nearest centroid of each row, and add up what the shares found in their order, in float64."""
        self._last = None
        arguments = (import_ray().put(centroids), mean, spherical, coarse)
        self._counts = np.empty((len(self._shares), len(centroids)), np.int64)
        residuals = np.zeros(centroids.shape)
        inertias = np.zeros(len(centroids))
        for number, found in enumerate(self._ask("assign", [arguments] * len(self._shares))):
            self._counts[number] = found.counts
            residuals += found.residuals
            inertias += found.inertias
        self._last = arguments
        return Totals(self._counts.sum(axis=0), residuals, inertias)

    def labels(self) -> NDArray[np.uint16]:
        """Return the labels of the last assignment."""
        return np.concatenate(list(self._ask("labels", [()] * len(self._shares))))

    def similarities(self, centroids: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how well each row fits the centroid of its label, of shape (N,)."""
        arguments = (import_ray().put(centroids), self._metric)
        return np.concatenate(list(self._ask("similarities", [arguments] * len(self._shares))))

    def image_means(self) -> NDArray[np.float64]:
        """Return the mean of each image's rows, of shape (images, D); zeros for an image without."""
        means = np.zeros((self._images, self._dim))
        for share, found in zip(self._shares, self._ask("image_means", [()] * len(self._shares)), strict=True):
            means[share.first_image : share.first_image + len(found)] = found
        return means

    def members(self, clusters: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows of clusters of the last assignment."""
        before = np.cumsum(self._counts, axis=0) - self._counts
        share = (numbers >= before[:, clusters]).sum(axis=0) - 1
        rows = np.empty((len(clusters), self._dim), np.float32)
        own = [np.flatnonzero(share == number) for number in range(len(self._shares))]
        wanted = [(clusters[index], numbers[index] - before[i, clusters[index]]) for i, index in enumerate(own)]
        for index, found in zip(own, self._ask("members", wanted), strict=True):
            rows[index] = found
        return rows

    def take(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return rows by number; they travel in pieces, so that many do not fill an object store."""
        rows = np.empty((len(index), self._dim), np.float32)
        size = max(1, PIECE_BYTES // (4 * self._dim))
        for at in range(0, len(index), size):
            piece = index[at : at + size]
            share = np.searchsorted(self._starts, piece, side="right") - 1
            own = [np.flatnonzero(share == number) for number in range(len(self._shares))]
            wanted = [(piece[where] - self._starts[number],) for number, where in enumerate(own)]
            for where, found in zip(own, self._ask("take", wanted), strict=True):
                rows[at + where] = found
        return rows

    def _ask(self, question: str, arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Ask all shares at the same time and yield their answers in order; a lost share is opened and asked again."""
        ray = import_ray()
        asked = [getattr(actor, question).remote(*given) for actor, given in zip(self._actors, arguments, strict=True)]
        for number in range(len(asked)):
            for losses in range(MAX_LOSSES):
                try:
                    answer = ray.get(asked[number])
                    break
                except ray.exceptions.RayTaskError as error:
                    raise ClusterError(f"node {self._nodes[number]}: {error.cause!r}") from error
                except ray.exceptions.RayError as error:
                    if losses == MAX_LOSSES - 1:
                        raise ClusterError(
                            f"the process on node {self._nodes[number]} that holds a share of the features ended "
                            f"{MAX_LOSSES} times ({type(error).__name__}); run the same command again: finished "
                            "iterations are kept"
                        ) from error
                    self._open_again(number, question)
                    asked[number] = getattr(self._actors[number], question).remote(*arguments[number])
            asked[number] = None  # its object may go from the store
            yield answer

    def _open_again(self, number: int, question: str) -> None:
        """Open a lost share on the node that holds least, and bring it to where it was."""
        time.sleep(RETRY_S)
        held = Counter(node.id for i, node in enumerate(self._nodes) if i != number)
        able = [node for node in alive_nodes() if self._places(node)]
        if not able:
            raise ClusterError(
                "no node is left that can hold features; start nodes and run the same command again: finished "
                "iterations are kept"
            )
        node = min(able, key=lambda node: held[node.id] / self._places(node))
        self._nodes[number], self._actors[number] = node, self._start(self._shares[number], node)
        if question != "open":
            ray = import_ray()
            try:
                _check_open(node, ray.get(self._actors[number].open.remote()))
            except ray.exceptions.RayError:
                return  # it has ended as well: the question will tell
        if self._last is not None:
            self._actors[number].assign.remote(*self._last)  # labels; questions are answered in their order

    def _start(self, share: Share, node: Node) -> Any:
        ray = import_ray()
        actor_class = ray.remote(num_cpus=0, num_gpus=int(self._on_gpus))(NodeRows)
        return actor_class.options(scheduling_strategy=on_node(node)).remote(share)

    def _places(self, node: Node) -> int:
        """Return how many shares a node holds: one for each GPU, or one."""
        return int(node.gpus) if self._on_gpus else int(node.cpus >= 1)


def _check_open(node: Node, found: Opened | str) -> None:
    if isinstance(found, str):
        raise ClusterError(
            f"node {node}: {found}; every node must see the folder of features under the same path, as it is here"
        )
