"""Measures of an evaluation, by hand on small arrays and against scikit-learn and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, normalized_mutual_info_score

from geocentroids_fit.evaluate.landcover import (
    UNKNOWN,
    Sample,
    compare,
    cover_map,
    folds_of,
    majority_cover,
    places_of,
    predict_crosswise,
    score_of,
)
from geocentroids_fit.evaluate.measures import (
    Seam,
    agreement,
    histogram_edges,
    seam_along,
    similarity_of,
    usage_of,
)


def test_similarity_by_hand() -> None:
    values = np.linspace(0, 1, 101, dtype=np.float32)
    found = similarity_of(values, (0.095, 0.895), np.linspace(0.2, 0.8, 4))
    assert found.mean == pytest.approx(0.5)
    assert found.percentiles == pytest.approx({1: 0.01, 5: 0.05, 25: 0.25, 50: 0.5, 75: 0.75, 95: 0.95, 99: 0.99})
    assert (found.below_range, found.above_range) == pytest.approx((10 / 101, 11 / 101))
    assert sum(found.histogram) == 101  # what lies beyond the bins is counted at their ends
    assert found.histogram[1] == pytest.approx(20, abs=1)


def test_histograms_hold_the_range_and_nearly_all_similarities() -> None:
    values = np.concatenate([np.full(9999, 0.5), [-40.0]]).astype(np.float32)
    edges = histogram_edges(values, (0.4, 0.9))
    assert (edges[0], edges[-1]) == pytest.approx((0.4, 0.9))
    assert (np.diff(edges) > 0).all()
    edges = histogram_edges(values + 3, (0.4, 0.9))
    assert (edges[0], edges[-1]) == pytest.approx((0.4, 3.5))


def test_usage_by_hand() -> None:
    a, b = np.array([0, 0, 1, 1, 3], np.uint16), np.array([1, 1, 3, 1], np.uint16)
    found = usage_of([a, b], 5)
    share = np.array([2, 5, 2]) / 9
    assert found.used == 3
    assert found.used_share == 0.6
    assert found.effective == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)))
    assert (found.largest_patches, found.largest_share) == (5, 5 / 9)
    assert found.median_images == 2  # of 1, 2, 2
    assert usage_of([np.arange(5, dtype=np.uint16)], 5).effective == pytest.approx(5)
    assert usage_of([np.zeros(9, np.uint16)], 5).effective == pytest.approx(1)


def test_seam_by_hand() -> None:
    lab = np.zeros((4, 1, 3))
    lab[:, 0, 0] = [0, 1, 1.5, 4.5]  # differences 1, 0.5 and 3 between rows 9 and 12
    labelled = np.ones((4, 1), bool)
    found = seam_along(lab, labelled, first=9, stride_patches=10, axis=0)
    assert found == Seam(across=1, across_pairs=1, inside=3.5, inside_pairs=2)
    assert found.index == pytest.approx(1 / 1.75)
    labelled[2] = False
    assert seam_along(lab, labelled, first=9, stride_patches=10, axis=0) == Seam(1, 1, 0, 0)
    assert Seam(1, 1, 0, 0).index is None
    assert (Seam(1, 2, 3, 4) + Seam(10, 20, 30, 40)) == Seam(11, 22, 33, 44)


@pytest.mark.parametrize("axis", [0, 1])
def test_seam_against_brute_force(axis: int) -> None:
    rng = np.random.default_rng(axis)
    lab, labelled, first = rng.normal(size=(23, 17, 3)), rng.random((23, 17)) < 0.8, -31
    sums = {True: [0.0, 0], False: [0.0, 0]}
    for row in range(23):
        for col in range(17):
            other = (row - 1, col) if axis == 0 else (row, col - 1)
            if min(other) < 0 or not labelled[row, col] or not labelled[other]:
                continue
            border = (first + (row, col)[axis]) % 5 == 0
            sums[border][0] += math.dist(lab[row, col], lab[other])
            sums[border][1] += 1
    found = seam_along(lab, labelled, first, 5, axis)
    assert (found.across, found.inside) == pytest.approx((sums[True][0], sums[False][0]))
    assert (found.across_pairs, found.inside_pairs) == (sums[True][1], sums[False][1])


def test_seam_index_of_windows_that_show_is_above_one() -> None:
    rng = np.random.default_rng(0)
    lab = rng.normal(0, 0.01, (40, 40, 3))
    assert (seam_along(lab, np.ones((40, 40), bool), 0, 5, 0).index or 0) == pytest.approx(1, abs=0.1)
    lab[..., 0] += 0.1 * (np.arange(40) // 5 % 2)[:, None]
    assert (seam_along(lab, np.ones((40, 40), bool), 0, 5, 0).index or 0) > 3
    assert (seam_along(lab, np.ones((40, 40), bool), 2, 5, 0).index or 9) < 1  # borders sought elsewhere


def test_agreement() -> None:
    assert agreement(np.array([1, 2, 3, 4], np.uint16), np.array([1, 2, 9, 4], np.uint16)) == 0.75
    assert agreement(np.empty(0, np.uint16), np.empty(0, np.uint16)) is None


def test_majority_of_samples() -> None:
    rng = np.random.default_rng(0)
    values, known = rng.integers(0, 4, (5, 4, 6, 4)), rng.random((5, 4, 6, 4)) < 0.55
    found = majority_cover(values, known)
    expected = np.full((5, 6), UNKNOWN)
    for row in range(5):
        for col in range(6):
            inside = [v for v, k in zip(values[row, :, col].ravel(), known[row, :, col].ravel(), strict=True) if k]
            if len(inside) >= 8:
                expected[row, col] = max(sorted(set(inside)), key=inside.count)  # the lowest of several
    np.testing.assert_array_equal(found, expected)
    assert 0 < (expected == UNKNOWN).sum() < 20
    assert (majority_cover(values, np.zeros_like(known)) == UNKNOWN).all()


def test_exactly_half_of_the_samples_is_enough() -> None:
    values, known = np.full((1, 2, 1, 2), 7), np.zeros((1, 2, 1, 2), bool)
    known[0, 0] = True
    assert majority_cover(values, known).tolist() == [[7]]
    known[0, 0, 0, 0] = False
    assert majority_cover(values, known).tolist() == [[UNKNOWN]]


def test_folds() -> None:
    wide, tall = folds_of((24, 40)), folds_of((41, 30))
    assert not wide["halves"][:, :20].any()
    assert wide["halves"][:, 20:].all()
    assert not tall["halves"][:21].any()
    assert tall["halves"][21:].all()
    blocks = wide["blocks"]
    assert not blocks[:12, :12].any()
    assert blocks[:12, 12:24].all()
    assert blocks[12:, :12].all()
    assert not blocks[12:, 12:24].any()


def test_map_of_classes_to_covers() -> None:
    ids = np.array([0, 0, 0, 1, 1, 3, 3, 3])
    cover = np.array([5, 5, 2, 9, 2, 5, 5, 5])
    assert cover_map(ids, cover, 5).tolist() == [5, 2, 5, 5, 5]  # a tie to the lower, the unseen to the commonest
    assert cover_map(ids[:0], cover[:0], 2).tolist() == [UNKNOWN, UNKNOWN]


def test_each_part_is_predicted_from_the_other() -> None:
    ids = np.array([0, 1, 1, 0, 1, 2])
    cover = np.array([4, 6, 6, 8, 6, 4])
    fold = np.array([False, False, False, True, True, True])
    assert predict_crosswise(ids, cover, fold, 3).tolist() == [8, 6, 6, 4, 6, 6]
    assert predict_crosswise(ids, cover, np.zeros(6, bool), 3).tolist() == [UNKNOWN] * 6


def test_scores_against_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    cover = rng.integers(0, 4, 400)
    predicted = np.where(rng.random(400) < 0.6, cover, rng.integers(0, 6, 400))
    found = score_of(predicted, cover)
    assert found is not None
    assert found.overall_accuracy == pytest.approx(accuracy_score(cover, predicted))
    each = f1_score(cover, predicted, labels=[0, 1, 2, 3], average=None)
    assert found.f1 == pytest.approx(dict(enumerate(each)))  # 4 and 5 do not occur
    assert found.mean_f1 == pytest.approx(each.mean())
    predicted[:100] = UNKNOWN
    assert (part := score_of(predicted, cover)) is not None
    assert part.patches == 300
    assert part.overall_accuracy == pytest.approx(accuracy_score(cover[100:], predicted[100:]))
    assert score_of(np.full(400, UNKNOWN), cover) is None


def test_places() -> None:
    names = ["town/a_00.tif", "town/a_01.tif", "town/b_7.tif", "a_00.tif", "plain.tif"]
    assert places_of(names) == ["town/a", "town/a", "town/b", "a", "plain"]
    assert places_of(["a_00.tif", "a_01.tif"]) == ["a_00.tif", "a_01.tif"]


def sample(name: str, labels: list[int], cover: list[int], halves: list[int] | None = None) -> Sample:
    alternate = np.arange(len(labels)) % 2 == 1
    folds = {"blocks": alternate, "halves": alternate if halves is None else np.array(halves, bool)}
    return Sample(name, np.array(labels, np.uint16), np.array(cover), folds)


def test_one_map_for_images_that_disagree_is_inconsistent() -> None:
    # Class 0 is cover 1 in the first image and cover 2 in the others; class 1 is cover 3 in all.
    a = sample("a_0.tif", [0, 0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 3, 3, 3, 3])
    b = sample("b_0.tif", [0, 0, 0, 0, 0, 0, 1, 1], [2, 2, 2, 2, 2, 2, 3, 3])
    c = sample("b_1.tif", [0, 0, 0, 0], [2, 2, 2, 2])
    found = compare([a, b, c], {2: np.array([0, 1], np.uint16)})
    assert found is not None
    assert (found.patches, found.places) == (20, 2)
    assert found.shares == pytest.approx({1: 0.2, 2: 0.5, 3: 0.3})
    assert found.commonest.overall_accuracy == 0.5
    split = found.cuts[2].splits["blocks"]
    assert split is not None
    assert split.own_maps.overall_accuracy == 1
    assert split.one_map.overall_accuracy == 0.8  # the four patches of cover 1 are taken for 2
    assert split.consistency == 0.8
    # b_0 and b_1 are one place: a from b's map has cover 2 for class 0, b from a's has cover 1.
    transfer = found.cuts[2].transfer
    assert transfer is not None
    assert transfer.overall_accuracy == pytest.approx((4 + 2) / 20)
    labels = [*a.labels, *b.labels, *c.labels]
    cover = [*a.cover, *b.cover, *c.cover]
    assert found.cuts[2].nmi == pytest.approx(normalized_mutual_info_score(cover, labels))


def test_fewer_classes_are_compared_as_merged() -> None:
    one = sample("a.tif", [0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2])
    found = compare([one], {3: np.arange(3, dtype=np.uint16), 1: np.zeros(3, np.uint16)})
    assert found is not None
    assert found.cuts[3].transfer is None
    splits = [found.cuts[n].splits["blocks"] for n in (3, 1)]
    assert [split.one_map.overall_accuracy for split in splits if split] == [1, pytest.approx(4 / 6)]
    assert (found.cuts[3].nmi > 0.5, found.cuts[1].nmi) == (True, 0)


def test_an_image_with_one_part_only_gives_no_score_for_it() -> None:
    lone = sample("a_0.tif", [0, 0], [1, 1], halves=[0, 0])
    found = compare([lone], {2: np.array([0, 1], np.uint16)})
    assert found is not None
    assert found.cuts[2].splits["halves"] is None
    assert found.cuts[2].splits["blocks"] is not None
    # Beside another image it is left out of both maps' scores, so that these stay comparable.
    both = compare([lone, sample("b_0.tif", [0, 0], [1, 1])], {2: np.array([0, 1], np.uint16)})
    assert both is not None
    assert (split := both.cuts[2].splits["halves"]) is not None
    assert split.one_map.patches == split.own_maps.patches == 2
    assert compare([], {2: np.array([0, 1], np.uint16)}) is None
