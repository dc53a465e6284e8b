"""K-Means of more features than memory holds: the same result every time, no empty clusters, goes on where it stopped.

Iterations run in bfloat16 while that helps, then in float32 to the end; labels and inertia are float32 always.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import kmeans_plusplus
from tqdm import tqdm

from geocentroids_fit.blocks import Rows, unit
from geocentroids_fit.devices import find_device
from geocentroids_fit.files import digest_of, read_arrays, write_arrays
from geocentroids_fit.kmeans import NotFiniteError, Survey, means, split
from geocentroids_fit.tables import LocalTable, Table
from geocentroids_tiler.codebook import Metric
from geocentroids_tiler.errors import InputError

__all__ = ["Clustering", "Init", "NotFiniteError", "kmeans", "similarities", "unit"]

Init = Literal["auto", "k-means++", "random"]
Phase = Literal["bfloat16", "float32", "done"]

MAX_K = 65_535
"""Labels are uint16."""
PLUSPLUS_MAX_K = 1024
"""Most centroids that init="auto" chooses with k-means++; its time grows with K^2, and its gain is small:
at K = 6144 random features end within 0.2 to 2.4 % in 1/166 of the time."""
PLUSPLUS_ROWS_PER_CENTROID = 30
"""Features that k-means++ draws from, per centroid; more cost time and gain nothing that iterations do not."""
COARSE_MIN_PRODUCTS = 2**32
"""N K D from which bfloat16 is tried; below it a fit takes seconds either way."""
CHECKPOINT_VERSION = 1


@dataclass(frozen=True)
class Clustering:
    """Centroids and how the features they were fitted on fall to them.

    Attributes:
        centroids: of shape (K, D), float32; of length 1 for cosine and inner_product.
        labels: nearest centroid of each feature, of shape (N,), uint16.
        counts: features of each centroid, of shape (K,), int64.
        inertia: sum of squared distances to the nearest centroid (of features of length 1 for cosine).
        iterations: Lloyd iterations done.
        curve: inertia in each iteration, before its centroids moved.
        reseeded: empty clusters that were started again, in all iterations.
    """

    centroids: NDArray[np.float32]
    labels: NDArray[np.uint16]
    counts: NDArray[np.int64]
    inertia: float
    iterations: int
    curve: tuple[float, ...]
    reseeded: int


@dataclass(frozen=True)
class _State:
    """Where iterations are: all that the next one depends on beside the data and the parameters."""

    centroids: NDArray[np.float32]
    phase: Phase
    iteration: int = 0
    curve: tuple[float, ...] = ()
    reseeded: int = 0


def kmeans(
    parts: Sequence[NDArray[np.floating[Any]]],
    k: int,
    *,
    metric: Metric = "l2",
    seed: int = 0,
    init: Init | NDArray[np.float32] = "auto",
    max_iterations: int = 50,
    tolerance: float = 1e-4,
    device: str = "auto",
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Clustering:
    """Cluster features of this machine.

    Squared distances are minimised. For ``cosine`` features and centroids are scaled to length 1, for
    ``inner_product`` centroids only (spherical K-Means as in faiss, in which long features weigh more). The result is
    the same, bit for bit, on one machine with one number of threads, however features are cut into parts and however
    often the run was interrupted.

    Args:
        parts: features, of shapes (n_i, D), float16 or float32, finite; memory maps are not loaded as a whole.
        k: number of centroids, at most N and 65,535.
        metric: how nearness is measured.
        seed: of everything random.
        init: "random" features, "k-means++" on a sample, "auto" (k-means++ up to K = 1024), or the centroids
            themselves, of shape (K, D).
        max_iterations: Lloyd iterations at most.
        tolerance: iterations end once inertia falls by less than this share (of what it could fall by).
        device: "auto", "cpu", "cuda" or "cuda:N".
        checkpoint: file that iterations are kept in; a run of the same data and parameters goes on from there, and
            removes it when done.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``k``, ``init`` or ``device`` is out of range, or the checkpoint cannot be written.
        NotFiniteError: if a feature is not finite; it says in which part and row.
    """
    table = LocalTable(Rows(parts, find_device(device), scaled=metric == "cosine"))
    return kmeans_of_table(
        table,
        k,
        metric=metric,
        seed=seed,
        init=init,
        max_iterations=max_iterations,
        tolerance=tolerance,
        checkpoint=checkpoint,
        identity=None,
        progress=progress,
    )


def kmeans_of_table(
    table: Table,
    k: int,
    *,
    metric: Metric,
    seed: int,
    init: Init | NDArray[np.float32],
    max_iterations: int,
    tolerance: float,
    checkpoint: Path | None,
    identity: str | None,
    progress: bool,
) -> Clustering:
    """Cluster rows wherever they are; see ``kmeans``.

    Args:
        table: the rows, scaled to length 1 for ``cosine``.
        k: number of centroids.
        metric: how nearness is measured.
        seed: of everything random.
        init: how to start.
        max_iterations: Lloyd iterations at most.
        tolerance: least gain of an iteration.
        checkpoint: file that iterations are kept in.
        identity: of the data, for the checkpoint; None: their number and mean.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``k`` or ``init`` is out of range, or the checkpoint cannot be written.
        NotFiniteError: if a feature is not finite.
    """
    _check_k(k, len(table))
    spherical = metric != "l2"
    seen = table.survey(spherical=spherical)
    coarse = table.has_bfloat16 and len(table) * k * table.dim >= COARSE_MIN_PRODUCTS
    start = init if isinstance(init, str) else init.tolist()
    parameters = [CHECKPOINT_VERSION, k, metric, seed, start, max_iterations, tolerance, table.device_type, coarse]
    fingerprint = digest_of([*parameters, len(table), seen.mean.tolist() if identity is None else identity])
    state = _load(checkpoint, fingerprint) if checkpoint else None
    if state is None:
        state = _State(_initial(table, k, init, seed, spherical), "bfloat16" if coarse else "float32")
    with tqdm(total=max_iterations, initial=state.iteration, unit="iteration", disable=not progress) as bar:
        while state.phase != "done" and state.iteration < max_iterations:
            began = time.perf_counter()
            state = _iterate(table, seen, state, spherical, tolerance, seed)
            if checkpoint:
                _save(checkpoint, fingerprint, state)
            speed = len(table) / (time.perf_counter() - began)
            bar.set_postfix_str(f"objective {state.curve[-1]:.5g}, {speed:.3g} features/s", refresh=False)
            bar.update()
    found = table.assign(state.centroids, seen.mean, spherical=spherical)
    labels = table.labels()
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return Clustering(
        state.centroids, labels, found.counts, found.inertia, state.iteration, state.curve, state.reseeded
    )


def similarities(
    parts: Sequence[NDArray[np.floating[Any]]], clustering: Clustering, metric: Metric
) -> NDArray[np.float32]:
    """Return how well each feature fits its centroid, as serving reports it, of shape (N,).

    That is minus the distance for l2, the cosine for cosine, the inner product for inner_product.
    """
    rows = Rows(parts, torch.device("cpu"), scaled=metric == "cosine")
    return similarities_of(rows, clustering.centroids, clustering.labels, metric)


def similarities_of(
    rows: Rows, centroids: NDArray[np.float32], labels: NDArray[np.uint16], metric: Metric
) -> NDArray[np.float32]:
    """Return how well each row fits the centroid of its label, as serving reports it, of shape (N,)."""
    values = np.empty(len(rows), np.float32)
    for start, block in rows.blocks():
        own = torch.from_numpy(centroids[labels[start : start + len(block)]])
        fit = -torch.linalg.vector_norm(block.cpu() - own, dim=1) if metric == "l2" else (block.cpu() * own).sum(dim=1)
        values[start : start + len(block)] = fit.numpy()
    return values


def _iterate(table: Table, seen: Survey, state: _State, spherical: bool, tolerance: float, seed: int) -> _State:
    """Assign rows and move centroids once, and decide how to go on."""
    coarse = state.phase == "bfloat16"
    found = table.assign(state.centroids, seen.mean, spherical=spherical, coarse=coarse)
    rng = np.random.default_rng((seed, state.iteration))
    moved = means(state.centroids, found, spherical=spherical)
    centroids, reseeded = split(table.members, moved, found, rng, spherical=spherical)
    phase = state.phase
    if state.curve and state.curve[-1] - found.inertia <= tolerance * (found.inertia - seen.least):
        if coarse:
            phase = "float32"
        elif not reseeded:  # clusters just started again have not shown yet what they gain
            phase = "done"
    return _State(centroids, phase, state.iteration + 1, (*state.curve, found.inertia), state.reseeded + reseeded)


def _initial(table: Table, k: int, init: Init | NDArray[np.float32], seed: int, spherical: bool) -> NDArray[np.float32]:
    """Return the centroids to start from, of shape (K, D)."""
    if not isinstance(init, str):
        if init.shape != (k, table.dim):
            raise InputError(f"init has shape {init.shape}; it must be {(k, table.dim)}, a row for each centroid")
        centroids = init.astype(np.float32)
    elif init not in get_args(Init):
        raise InputError(f"init is {init!r}; it must be one of {', '.join(get_args(Init))} or an array of centroids")
    else:
        plusplus = init == "k-means++" or (init == "auto" and k <= PLUSPLUS_MAX_K)
        size = min(len(table), PLUSPLUS_ROWS_PER_CENTROID * k) if plusplus else k
        centroids = table.take(np.sort(np.random.default_rng(seed).choice(len(table), size, replace=False)))
        if plusplus:
            centroids = kmeans_plusplus(centroids, k, random_state=seed)[0]
    return unit(centroids) if spherical else centroids


def _save(path: Path, fingerprint: str, state: _State) -> None:
    record = {**asdict(state), "fingerprint": fingerprint}
    record.pop("centroids")
    text = np.frombuffer(json.dumps(record).encode(), np.uint8)
    write_arrays(path, {"centroids": state.centroids, "record": text})


def _load(path: Path, fingerprint: str) -> _State | None:
    """Return the state in a checkpoint, or None if there is none, it is broken or of something else."""
    try:
        arrays = read_arrays(path, "")
        record = json.loads(arrays["record"].tobytes())
        if record.pop("fingerprint") != fingerprint:
            return None
        state = _State(arrays["centroids"], **record)
        return replace(state, curve=tuple(state.curve))
    except (InputError, ValueError, KeyError, TypeError):
        return None


def _check_k(k: int, features: int) -> None:
    if not 1 <= k <= features:
        raise InputError(f"k is {k}, but there are {features} features; k must be between 1 and that number")
    if k > MAX_K:
        raise InputError(f"k is {k}, but labels have 16 bits; k must be between 1 and {MAX_K}")
