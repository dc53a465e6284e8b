"""Colours for centroids: a t-SNE cloud turned and fitted into the colours a screen can show, so that likeness shows.

The cloud keeps its shape: it is moved, turned and scaled in OKLab, where distance is about what the eye sees. A stretch
of each axis to 0..255 in RGB fills the cube's corners with black and white instead and distorts what is near to what.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openTSNE import TSNE
from openTSNE.initialization import rescale
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, pdist
from scipy.spatial.transform import Rotation
from scipy.stats import rankdata
from sklearn.neighbors import NearestNeighbors

from geocentroids_tiler.colors import oklab_to_linear, oklab_to_srgb, srgb_to_oklab
from geocentroids_tiler.errors import InputError

LIGHTNESS = (0.36, 0.92)
"""OKLab lightness that colours keep to: black and white mean no data."""
MIDDLE = np.array([0.67, 0.0, 0.02])
"""Where the cloud's centre goes: around there the gamut is widest."""
KNEE = 0.9
"""Share of the room along lightness and chroma that is left as it is; beyond, colours are pressed together softly."""
NEIGHBOURS = 15
ROTATIONS = 48
"""Orientations of the cloud that are tried, each also mirrored."""
RADII = (0.14, 0.17, 0.20, 0.24, 0.28)
"""Radius (90th percentile) of the cloud in OKLab that are tried."""
NEIGHBOURS_WEIGHT = 6.0
"""What keeping all neighbours is worth, in units of correlation."""
SPREAD_WEIGHT = 1.0
"""What 1 of mean colour difference (OKLab) is worth, likewise."""
NATURAL_WEIGHT = 0.25
"""What perfect agreement with natural colours is worth, likewise."""
SEARCH_SAMPLE = 400
"""Centroids that a candidate is scored on."""
MEASURE_SAMPLE = 2048
"""Centroids that rank correlation is measured on: it takes all pairs."""
LEAST_CENTROIDS = 8
"""With fewer there is no cloud; colours are spread around the hues."""


@dataclass(frozen=True, slots=True)
class ColorScore:
    """How well colours show likeness.

    Attributes:
        rank_correlation: Spearman's, between the distance of features and the difference of colours in OKLab.
        neighbours: share of the 15 nearest centroids that are also among the 15 with the nearest colours.
        spread: mean difference between two colours, in OKLab.
    """

    rank_correlation: float
    neighbours: float
    spread: float


@dataclass(frozen=True)
class Coloring:
    """Colours and their measures.

    Attributes:
        colors: of shape (K, 3), uint8.
        score: of these colours.
        stretch: of the plain mapping that stretches each axis of the same cloud to 0..255 in RGB.
        cloud: the t-SNE coordinates, of shape (K, 3), float64; zeros where there are too few centroids for one.
    """

    colors: NDArray[np.uint8]
    score: ColorScore
    stretch: ColorScore
    cloud: NDArray[np.float64]


@dataclass(frozen=True)
class Anchor:
    """Colours of earlier centroids, for those that are like them.

    Attributes:
        colors: sRGB colour of the earlier centroid most like each, of shape (K, 3), uint8.
        closeness: how like it is, of shape (K,): 1 for the same, towards 0 for one beyond its neighbourhood.
    """

    colors: NDArray[np.uint8]
    closeness: NDArray[np.float64]


def anchor_to(
    centroids: NDArray[np.floating[Any]], earlier: NDArray[np.floating[Any]], colors: NDArray[np.uint8]
) -> Anchor:
    """Find for each centroid the earlier one most like it.

    Args:
        centroids: of shape (K, D).
        earlier: of shape (E, D), from the same encoder.
        colors: of the earlier ones, of shape (E, 3), uint8.
    """
    old = np.asarray(earlier, np.float64)
    distance, nearest = NearestNeighbors(n_neighbors=1).fit(old).kneighbors(np.asarray(centroids, np.float64))
    others = NearestNeighbors(n_neighbors=min(2, len(old))).fit(old).kneighbors(old)[0][:, -1]
    neighbourhood = max(float(np.median(others)), 1e-12)
    return Anchor(colors[nearest[:, 0]], np.exp(-np.square(distance[:, 0] / neighbourhood)))


def color_centroids(
    vectors: NDArray[np.floating[Any]],
    *,
    natural: NDArray[np.floating[Any]] | None = None,
    anchor: Anchor | None = None,
    seed: int = 0,
) -> Coloring:
    """Choose a colour for each centroid: like colours for like centroids.

    Args:
        vectors: what centroids are compared by, of shape (K, D).
        natural: mean sRGB colour of what each stands for, of shape (K, 3), 0 to 255. Of all orientations of the cloud
            that show likeness about equally well, one that leans to these colours is taken. None: any.
        anchor: colours that centroids keep, the more the closer they are to the earlier ones. None: a fresh start.
        seed: of t-SNE and of the search.

    Returns:
        Colours and their measures; the same for the same input.
    """
    points = np.asarray(vectors, np.float64)
    if len(np.unique(points, axis=0)) < LEAST_CENTROIDS:
        colors = _hue_circle(len(points))
        none = ColorScore(0.0, 0.0, 0.0)
        return Coloring(colors, none, none, np.zeros((len(points), 3)))
    if anchor is not None:
        kept = srgb_to_oklab(anchor.colors)
        cloud = embed(points, seed, start=kept)
        colors = oklab_to_srgb(fit_anchor(cloud, kept, anchor.closeness))
    else:
        cloud = embed(points, seed)
        target = None if natural is None else srgb_to_oklab(natural)
        colors = oklab_to_srgb(fit_gamut(cloud, points, natural=target, seed=seed))
    return Coloring(colors, score_colors(points, colors), score_colors(points, stretch_axes(cloud)), cloud)


def embed(points: NDArray[np.float64], seed: int, start: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """Return t-SNE coordinates of points (K, D), of shape (K, 3); from ``start`` (K, 3), or by PCA."""
    if len(points) < LEAST_CENTROIDS:
        raise InputError(f"t-SNE of {len(points)} centroids; at least {LEAST_CENTROIDS} are needed")
    model = TSNE(
        n_components=3,
        perplexity=min(30.0, (len(points) - 1) / 3),
        initialization="pca" if start is None else rescale(start),
        negative_gradient_method="bh",
        neighbors="exact",
        n_jobs=1,  # sums of several threads come in any order
        random_state=seed,
    )
    return np.asarray(model.fit(points), np.float64)


def fit_gamut(
    cloud: NDArray[np.float64],
    points: NDArray[np.float64],
    *,
    natural: NDArray[np.float64] | None = None,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Turn and scale a cloud so that it shows as much likeness as possible in colours that a screen has.

    Args:
        cloud: of shape (K, 3).
        points: what it stands for, of shape (K, D).
        natural: natural colours in OKLab, of shape (K, 3), or None.
        seed: of the rotations that are tried and of the sample they are scored on.

    Returns:
        OKLab colours inside sRGB and inside ``LIGHTNESS``, of shape (K, 3).
    """
    base = _standardise(cloud)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(len(base), min(SEARCH_SAMPLE, len(base)), replace=False))
    target = _Target(
        sample=sample,
        rank=_standard(rankdata(pdist(points[sample]))),
        near=np.argsort(cdist(points[sample], points), axis=1, kind="stable")[:, 1 : NEIGHBOURS + 1],
        natural=natural,
    )
    best, best_value = base, -np.inf
    for turn in _turns(base, natural, rng):
        turned = base @ turn.T
        for radius in RADII:
            lab = _into_gamut(MIDDLE + radius * turned)
            if (value := _value(lab, target)) > best_value:
                best, best_value = lab, value
    return best


def fit_anchor(
    cloud: NDArray[np.float64], kept: NDArray[np.float64], closeness: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Lay a cloud on colours that are to be kept, by the turn, scale and shift that bring close points nearest.

    Args:
        cloud: of shape (K, 3).
        kept: OKLab colours to keep, of shape (K, 3).
        closeness: how much each is to be kept, 0 to 1, of shape (K,).

    Returns:
        OKLab colours inside sRGB and inside ``LIGHTNESS`` where they are not kept, of shape (K, 3).

    Source: Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966, with weights and scale.
    """
    weight = np.maximum(closeness, 1e-3)[:, None]
    middle, aim = (weight * cloud).sum(axis=0) / weight.sum(), (weight * kept).sum(axis=0) / weight.sum()
    moved = cloud - middle
    u, stretch, v = np.linalg.svd((weight * (kept - aim)).T @ moved)
    scale = stretch.sum() / max(float((weight * np.square(moved)).sum()), 1e-12)
    share = closeness[:, None]
    return share * kept + (1 - share) * _into_gamut(aim + scale * moved @ (u @ v).T)


def stretch_axes(cloud: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Stretch each axis of a cloud (K, 3) to 0..255: the plain mapping that ours is compared with."""
    low, high = cloud.min(axis=0), cloud.max(axis=0)
    scaled = (cloud - low) / np.where(high > low, high - low, 1)
    return np.asarray(np.rint(scaled * 255), np.uint8)


def score_colors(points: NDArray[np.float64], colors: NDArray[np.uint8]) -> ColorScore:
    """Measure how well sRGB colours (K, 3) show the likeness of points (K, D)."""
    lab = srgb_to_oklab(colors)
    step = -(-len(points) // MEASURE_SAMPLE)
    difference = pdist(lab[::step])
    correlation = float(np.mean(_standard(rankdata(pdist(points[::step]))) * _standard(rankdata(difference))))
    k = min(NEIGHBOURS, len(points) - 1)
    of_points = cKDTree(points).query(points, k + 1)[1][:, 1:]
    of_colors = cKDTree(lab).query(lab, k + 1)[1][:, 1:]
    kept = np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(of_points, of_colors, strict=True)])
    return ColorScore(correlation, float(kept), float(difference.mean()))


def _standardise(cloud: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move a cloud to its median and scale it so that nine tenths of it lie within a radius of 1."""
    moved = cloud - np.median(cloud, axis=0)
    radius = float(np.quantile(np.linalg.norm(moved, axis=1), 0.9))
    return moved / radius if radius > 0 else moved


def _turns(
    base: NDArray[np.float64], natural: NDArray[np.float64] | None, rng: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Return rotations and reflections to try, each of shape (3, 3)."""
    turns: list[NDArray[np.float64]] = []
    for turn in Rotation.random(ROTATIONS, rng=rng).as_matrix():
        turns += [turn, turn * [[-1.0], [1.0], [1.0]]]
    if natural is not None:  # the orientation nearest to the natural colours (Procrustes), and others near it
        u, _, v = np.linalg.svd(_relative(natural).T @ base)
        turns += [u @ v, *(near @ u @ v for near in _small_rotations(rng))]
    return turns


def _small_rotations(rng: np.random.Generator) -> NDArray[np.float64]:
    turns: NDArray[np.float64] = Rotation.from_rotvec(rng.normal(0, 0.35, (ROTATIONS, 3))).as_matrix()
    return turns


def _relative(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return OKLab colours relative to their mean; hues of the ground are weak and count more."""
    relative: NDArray[np.float64] = (lab - lab.mean(axis=0)) * np.array([1.0, 3.0, 3.0])
    return relative


@dataclass(frozen=True)
class _Target:
    """What candidate colours are compared with.

    Attributes:
        sample: centroids that are looked at, of shape (n,).
        rank: standardised ranks of the distances between their features, of shape (n * (n - 1) / 2,).
        near: nearest of all centroids to each, of shape (n, k).
        natural: natural colours of all centroids in OKLab, of shape (K, 3), or None.
    """

    sample: NDArray[np.int64]
    rank: NDArray[np.float64]
    near: NDArray[np.int64]
    natural: NDArray[np.float64] | None


def _value(lab: NDArray[np.float64], target: _Target) -> float:
    """Return how good candidate colours (K, 3) are, as bytes show them."""
    shown = srgb_to_oklab(oklab_to_srgb(lab))
    own = shown[target.sample]
    difference = pdist(own)
    value = float(np.mean(target.rank * _standard(rankdata(difference))))
    k = target.near.shape[1]
    near = cKDTree(shown).query(own, k + 1)[1][:, 1:]
    value += NEIGHBOURS_WEIGHT * float((near[:, :, None] == target.near[:, None, :]).sum() / near.size)
    value += SPREAD_WEIGHT * float(difference.mean())
    if target.natural is not None:
        a, b = _relative(target.natural[target.sample]), _relative(own)
        length = float(np.linalg.norm(a) * np.linalg.norm(b))
        value += NATURAL_WEIGHT * float((a * b).sum()) / max(length, 1e-12)
    return value


def _standard(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return values with mean 0 and standard deviation 1."""
    deviation = float(values.std())
    standard: NDArray[np.float64] = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    return standard


def _into_gamut(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """Press OKLab colours (K, 3) softly into ``LIGHTNESS`` and, at that lightness and their hue, into sRGB."""
    low, high = LIGHTNESS
    half = (high - low) / 2
    lightness = low + half + half * _soft((lab[:, 0] - low - half) / half)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    room = _room(lightness, np.arctan2(lab[:, 2], lab[:, 1]))
    factor = room * _soft(chroma / room) / np.maximum(chroma, 1e-12)
    return np.stack([lightness, lab[:, 1] * factor, lab[:, 2] * factor], axis=1)


def _soft(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Press values into -1..1: unchanged up to ``KNEE``, then ever more slowly towards the end."""
    size = np.abs(share)
    pressed = KNEE + (1 - KNEE) * np.tanh((size - KNEE) / (1 - KNEE))
    return np.sign(share) * np.where(size > KNEE, pressed, size)


def _room(lightness: NDArray[np.float64], hue: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest chroma that sRGB has at a lightness and a hue, from a table of it."""
    table = _chroma_table()
    rows, cols = table.shape
    low, high = LIGHTNESS
    row = ((lightness - low) / (high - low) * (rows - 1)).clip(0, rows - 1)
    col = (hue + np.pi) / (2 * np.pi) * (cols - 1)
    r, c = np.minimum(row.astype(np.intp), rows - 2), np.minimum(col.astype(np.intp), cols - 2)
    corners = np.stack([table[r, c], table[r + 1, c], table[r, c + 1], table[r + 1, c + 1]])
    return np.asarray(corners.min(axis=0))


@lru_cache(maxsize=1)
def _chroma_table() -> NDArray[np.float64]:
    """Return the largest chroma in sRGB for 97 steps of ``LIGHTNESS`` and 361 of hue (-pi to pi), by bisection."""
    lightness, hue = np.meshgrid(np.linspace(*LIGHTNESS, 97), np.linspace(-np.pi, np.pi, 361), indexing="ij")
    inside, outside = np.zeros_like(hue), np.full_like(hue, 0.5)
    for _ in range(24):
        middle = (inside + outside) / 2
        linear = oklab_to_linear(np.stack([lightness, middle * np.cos(hue), middle * np.sin(hue)], axis=-1))
        fits = ((linear >= 0) & (linear <= 1)).all(axis=-1)
        inside, outside = np.where(fits, middle, inside), np.where(fits, outside, middle)
    return inside


def _hue_circle(k: int) -> NDArray[np.uint8]:
    hue = 2 * np.pi * np.arange(k) / max(k, 1)
    return oklab_to_srgb(np.stack([np.full(k, 0.7), 0.1 * np.cos(hue), 0.1 * np.sin(hue)], axis=1))
