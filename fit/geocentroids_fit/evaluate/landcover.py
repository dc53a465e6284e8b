"""Classes against land cover: which cover a class stands for, and how far that holds. Pure functions on arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score, normalized_mutual_info_score

UNKNOWN = -1
"""Land cover of a patch whose mask says too little, and prediction where there is nothing to learn from."""
BLOCK_PATCHES = 12
SPLITS = ("blocks", "halves")


@dataclass(frozen=True)
class Sample:
    """The patches of an image that have both a label and a land cover.

    Attributes:
        name: of the image.
        labels: of shape (N,), uint16.
        cover: land cover, of shape (N,), int64, 0 and up.
        folds: for each of ``SPLITS`` the part that each patch is in, of shape (N,), bool.
    """

    name: str
    labels: NDArray[np.uint16]
    cover: NDArray[np.int64]
    folds: Mapping[str, NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Score:
    """Predicted against true land cover.

    Attributes:
        patches: patches scored.
        overall_accuracy: share of them that are right.
        mean_f1: mean F1 over the covers that occur among them.
        f1: F1 of each of these covers.
    """

    patches: int
    overall_accuracy: float
    mean_f1: float
    f1: dict[int, float]


@dataclass(frozen=True, slots=True)
class SplitScore:
    """Scores on the part that the map was not made on, both ways round.

    Attributes:
        one_map: with one map of classes to covers for all images of the set.
        own_maps: on the same patches, with a map for each image.
        consistency: overall accuracy of the first divided by that of the second.
    """

    one_map: Score
    own_maps: Score
    consistency: float | None


@dataclass(frozen=True, slots=True)
class CutScores:
    """What a number of classes knows of land cover.

    Attributes:
        nmi: normalised mutual information of classes and covers, 0 to 1.
        splits: scores for each of ``SPLITS``; None where one part has no patches.
        transfer: each place with a map made from the others; None with one image.
    """

    nmi: float
    splits: dict[str, SplitScore | None]
    transfer: Score | None


@dataclass(frozen=True, slots=True)
class LandCover:
    """What classes know of land cover, for an image or a set of them.

    Attributes:
        patches: patches with a label and a cover.
        shares: share of each cover in them.
        commonest: score of always saying the commonest cover.
        places: number of places held out one by one for ``transfer``.
        cuts: scores for each number of classes.
    """

    patches: int
    shares: dict[int, float]
    commonest: Score
    places: int
    cuts: dict[int, CutScores]


def majority_cover(values: NDArray[np.int64], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the land cover of patches: the one most of their known samples have, the lowest of several.

    Args:
        values: samples of shape (H, n, W, n): n rows and n columns of them in each of H x W patches.
        known: of the same shape.

    Returns:
        Of shape (H, W); ``UNKNOWN`` where fewer than half of the samples are known.
    """
    height, n, width, _ = values.shape
    patch = np.broadcast_to(np.arange(height * width).reshape(height, 1, width, 1), values.shape)
    covers, index = np.unique(values[known], return_inverse=True)
    if not len(covers):
        return np.full((height, width), UNKNOWN, np.int64)
    counts = np.bincount(patch[known] * len(covers) + index, minlength=height * width * len(covers))
    counts = counts.reshape(height, width, len(covers))
    return np.where(2 * counts.sum(axis=2) >= n * n, covers[counts.argmax(axis=2)], UNKNOWN)


def folds_of(shape: tuple[int, int]) -> dict[str, NDArray[np.bool_]]:
    """Split a rectangle of patches in two parts for each of ``SPLITS``; arrays of shape ``shape``, bool.

    ``blocks`` is a chessboard of ``BLOCK_PATCHES`` a side, ``halves`` are the two halves of the longer side.
    """
    row, col = np.indices(shape)
    along = col if shape[1] >= shape[0] else row
    return {
        "blocks": (row // BLOCK_PATCHES + col // BLOCK_PATCHES) % 2 == 1,
        "halves": along >= max(shape) / 2,
    }


def cover_map(ids: NDArray[np.integer], cover: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the land cover that each class is met with most, of shape (n,).

    The lowest of several covers met equally often; for a class that is not met, the commonest cover of all.
    ``UNKNOWN`` if there are no patches.

    Args:
        ids: class of each patch, of shape (N,).
        cover: land cover of each patch, of shape (N,).
        n: number of classes.
    """
    if not len(cover):
        return np.full(n, UNKNOWN, np.int64)
    covers, index = np.unique(cover, return_inverse=True)
    counts = np.bincount(ids.astype(np.int64) * len(covers) + index, minlength=n * len(covers)).reshape(n, -1)
    counts[counts.sum(axis=1) == 0] = np.bincount(index)
    best: NDArray[np.int64] = covers[counts.argmax(axis=1)]
    return best


def predict_crosswise(
    ids: NDArray[np.integer], cover: NDArray[np.int64], fold: NDArray[np.bool_], n: int
) -> NDArray[np.int64]:
    """Predict the land cover of each part with a map made on the other.

    Args:
        ids: class of each patch, of shape (N,).
        cover: land cover of each patch, of shape (N,).
        fold: part of each patch, of shape (N,).
        n: number of classes.

    Returns:
        Of shape (N,); ``UNKNOWN`` where the other part is empty.
    """
    predicted = np.empty(len(ids), np.int64)
    for part in (fold, ~fold):
        predicted[part] = cover_map(ids[~part], cover[~part], n)[ids[part]]
    return predicted


def score_of(predicted: NDArray[np.int64], cover: NDArray[np.int64]) -> Score | None:
    """Score predictions of shape (N,) where there are any; None where there are none."""
    known = predicted != UNKNOWN
    if not known.any():
        return None
    predicted, cover = predicted[known], cover[known]
    present = np.unique(cover)
    f1 = f1_score(cover, predicted, labels=present, average=None, zero_division=0)
    return Score(
        patches=len(cover),
        overall_accuracy=float((predicted == cover).mean()),
        mean_f1=float(f1.mean()),
        f1=dict(zip(present.tolist(), f1.tolist(), strict=True)),
    )


def places_of(names: Sequence[str]) -> list[str]:
    """Return the place of each image: its path without suffix and a number after ``_``.

    Where that leaves one place only, each image is a place of its own.
    """
    places = [re.sub(r"_\d+$", "", str(PurePosixPath(name).with_suffix(""))) for name in names]
    return places if len(set(places)) > 1 else list(names)


def compare(samples: Sequence[Sample], cuts: Mapping[int, NDArray[np.uint16]]) -> LandCover | None:
    """Compare the classes of images with their land cover; None without patches.

    Args:
        samples: the images.
        cuts: for each number of classes the class of each label, of shape (K,).
    """
    samples = [sample for sample in samples if len(sample.cover)]
    if not samples:
        return None
    cover = np.concatenate([sample.cover for sample in samples])
    covers, counts = np.unique(cover, return_counts=True)
    commonest = score_of(np.full_like(cover, covers[counts.argmax()]), cover)
    if commonest is None:  # pragma: no cover - there are patches
        return None
    places = np.unique(places_of([sample.name for sample in samples]), return_inverse=True)[1]
    return LandCover(
        patches=len(cover),
        shares=dict(zip(covers.tolist(), (counts / len(cover)).tolist(), strict=True)),
        commonest=commonest,
        places=int(places.max()) + 1,
        cuts={n: _compare_cut(samples, places, lookup, n) for n, lookup in cuts.items()},
    )


def _compare_cut(samples: Sequence[Sample], places: NDArray[np.int64], lookup: NDArray[np.uint16], n: int) -> CutScores:
    ids = np.concatenate([lookup[sample.labels] for sample in samples])
    cover = np.concatenate([sample.cover for sample in samples])
    place = np.repeat(places, [len(sample.cover) for sample in samples])
    return CutScores(
        nmi=float(normalized_mutual_info_score(cover, ids)),
        splits={split: _score_split(samples, split, lookup, n) for split in SPLITS},
        transfer=_transfer(ids, cover, place, n),
    )


def _score_split(samples: Sequence[Sample], split: str, lookup: NDArray[np.uint16], n: int) -> SplitScore | None:
    ids = [lookup[sample.labels] for sample in samples]
    cover = np.concatenate([sample.cover for sample in samples])
    folds = [sample.folds[split] for sample in samples]
    own = np.concatenate(
        [predict_crosswise(i, sample.cover, fold, n) for i, sample, fold in zip(ids, samples, folds, strict=True)]
    )
    one = predict_crosswise(np.concatenate(ids), cover, np.concatenate(folds), n)
    one_map, own_maps = score_of(np.where(own == UNKNOWN, UNKNOWN, one), cover), score_of(own, cover)
    if one_map is None or own_maps is None:
        return None
    best = own_maps.overall_accuracy
    return SplitScore(one_map, own_maps, one_map.overall_accuracy / best if best else None)


def _transfer(ids: NDArray[np.uint16], cover: NDArray[np.int64], place: NDArray[np.int64], n: int) -> Score | None:
    """Score each place with the map of all others; None with one place."""
    held_out = np.unique(place)
    if len(held_out) < 2:
        return None
    predicted = np.empty(len(ids), np.int64)
    for number in held_out:
        own = place == number
        predicted[own] = cover_map(ids[~own], cover[~own], n)[ids[own]]
    return score_of(predicted, cover)
