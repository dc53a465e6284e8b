"""Colours: on a screen, neither black nor white, showing likeness better than a stretch of the axes."""

from __future__ import annotations

import numpy as np
import pytest

from geocentroids_fit import color
from geocentroids_fit.color import color_centroids, fit_gamut, score_colors, stretch_axes
from geocentroids_tiler.colors import oklab_to_linear, srgb_to_oklab


@pytest.fixture(scope="module")
def centroids() -> np.ndarray:
    """Groups of groups, as land cover has them, plus a few far away."""
    rng = np.random.default_rng(0)
    groups = rng.normal(0, 4, (6, 16))
    sub = np.repeat(groups, 6, axis=0) + rng.normal(0, 2, (36, 16))
    points = np.repeat(sub, 8, axis=0) + rng.normal(0, 1, (288, 16))
    return np.concatenate([points, rng.normal(0, 12, (12, 16))]).astype(np.float32)


@pytest.fixture(scope="module")
def coloring(centroids: np.ndarray) -> color.Coloring:
    return color_centroids(centroids, seed=1)


def test_better_than_the_stretch_on_both_counts(coloring: color.Coloring) -> None:
    assert coloring.score.rank_correlation > coloring.stretch.rank_correlation
    assert coloring.score.neighbours > coloring.stretch.neighbours


def test_neither_black_nor_white(coloring: color.Coloring) -> None:
    lightness = srgb_to_oklab(coloring.colors)[:, 0]
    assert lightness.min() > 0.3
    assert lightness.max() < 0.95
    assert np.ptp(lightness) > 0.25  # measured 0.32


def test_many_hues(coloring: color.Coloring) -> None:
    lab = srgb_to_oklab(coloring.colors)
    hue = np.degrees(np.arctan2(lab[:, 2], lab[:, 1])) % 360
    vivid = np.hypot(lab[:, 1], lab[:, 2]) > 0.04
    assert vivid.mean() > 0.6
    assert (np.histogram(hue[vivid], 12, (0, 360))[0] > 0).sum() >= 6


def test_the_seed_decides(centroids: np.ndarray, coloring: color.Coloring) -> None:
    assert (color_centroids(centroids, seed=1).colors == coloring.colors).all()


def test_inside_the_gamut_however_large_the_cloud() -> None:
    rng = np.random.default_rng(0)
    lab = color._into_gamut(rng.normal([0.6, 0, 0], 0.4, (5000, 3)))
    linear = oklab_to_linear(lab)
    assert linear.min() > -1e-5
    assert linear.max() < 1 + 1e-5
    assert lab[:, 0].min() >= color.LIGHTNESS[0]
    assert lab[:, 0].max() <= color.LIGHTNESS[1]


def test_what_fits_is_left_as_it_is() -> None:
    lab = np.array([[0.65, 0.03, 0.02], [0.6, -0.05, 0.01], [0.7, 0.0, 0.0]])
    assert color._into_gamut(lab) == pytest.approx(lab, abs=1e-12)


def test_pressing_keeps_hue_and_order() -> None:
    chroma = np.linspace(0.01, 0.6, 60)
    lab = color._into_gamut(np.stack([np.full(60, 0.6), 0.6 * chroma, 0.8 * chroma], axis=1))
    assert lab[:, 2] * 0.6 == pytest.approx(lab[:, 1] * 0.8, abs=1e-12)
    assert np.diff(np.hypot(lab[:, 1], lab[:, 2])).min() > -1e-12  # at the edge of the gamut all are the same


def test_natural_colours_choose_the_orientation() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(200, 3))
    natural = np.array([0.5, 0, 0]) + cloud[:, [2, 0, 1]] * [0.1, 0.02, 0.02]
    lab = fit_gamut(cloud, cloud, natural=natural)
    agreement = [np.corrcoef(lab[:, i], natural[:, i])[0, 1] for i in range(3)]
    assert min(agreement) > 0.7


def test_score_of_a_perfect_mapping() -> None:
    colors = np.random.default_rng(0).integers(60, 200, (60, 3)).astype(np.uint8)
    score = score_colors(srgb_to_oklab(colors), colors)
    assert score.rank_correlation == pytest.approx(1)
    assert score.neighbours == 1


def test_stretch_fills_each_axis() -> None:
    cloud = np.array([[0.0, 5, 1], [1, 6, 1], [4, 7, 1]])
    assert stretch_axes(cloud).tolist() == [[0, 0, 0], [64, 128, 0], [255, 255, 0]]


@pytest.mark.parametrize("k", [1, 2, 7])
def test_few_centroids_get_distinct_hues(k: int) -> None:
    colors = color_centroids(np.random.default_rng(0).normal(size=(k, 4))).colors
    assert len(np.unique(colors, axis=0)) == k


def test_centroids_all_alike() -> None:
    colors = color_centroids(np.ones((20, 4))).colors
    assert colors.shape == (20, 3)


class TestAnchor:
    """A refit keeps the colours of centroids that it finds again."""

    @pytest.fixture
    def refit(self, centroids: np.ndarray) -> np.ndarray:
        """The same centroids in another order, a little moved, and a group that was not there before."""
        rng = np.random.default_rng(5)
        moved = rng.permutation(centroids) + rng.normal(0, 0.05, centroids.shape)
        return np.concatenate([moved, rng.normal(9, 1, (20, 16))]).astype(np.float32)

    def differences(self, before: np.ndarray, colors: np.ndarray, refit: np.ndarray, now: np.ndarray) -> np.ndarray:
        nearest = np.linalg.norm(refit[: len(before), None] - before[None], axis=2).argmin(axis=1)
        lab, own = srgb_to_oklab(colors)[nearest], srgb_to_oklab(now)[: len(before)]
        return np.linalg.norm(lab - own, axis=1)

    def test_what_is_found_again_keeps_its_colour(
        self, centroids: np.ndarray, coloring: color.Coloring, refit: np.ndarray
    ) -> None:
        anchor = color.anchor_to(refit, centroids, coloring.colors)
        anchored = color_centroids(refit, anchor=anchor, seed=2)
        free = color_centroids(refit, seed=2)
        kept = self.differences(centroids, coloring.colors, refit, anchored.colors)
        assert np.median(kept) < 0.02
        assert np.median(self.differences(centroids, coloring.colors, refit, free.colors)) > 0.1
        assert anchored.score.rank_correlation > 0.8 * free.score.rank_correlation

    def test_the_same_centroids_keep_their_colours_to_the_bit(
        self, centroids: np.ndarray, coloring: color.Coloring
    ) -> None:
        anchor = color.anchor_to(centroids, centroids, coloring.colors)
        assert anchor.closeness == pytest.approx(np.ones(len(centroids)))
        assert (color_centroids(centroids, anchor=anchor, seed=9).colors == coloring.colors).all()

    def test_closeness_falls_with_distance(self) -> None:
        earlier = np.array([[0.0, 0], [1, 0], [2, 0]])
        anchor = color.anchor_to(np.array([[0.0, 0], [1.5, 0], [2, 3]]), earlier, np.eye(3, dtype=np.uint8))
        assert anchor.closeness == pytest.approx(np.exp([0, -0.25, -9]))
        assert anchor.colors[2].tolist() == [0, 0, 1]

    def test_the_cloud_is_turned_scaled_and_moved_onto_what_is_kept(self) -> None:
        rng = np.random.default_rng(0)
        kept = np.array([0.65, 0, 0]) + rng.uniform(-0.05, 0.05, (50, 3))
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        cloud = 40 * (kept - [0.3, 0.1, 0]) @ turn
        closeness = np.full(50, 0.25)
        assert color.fit_anchor(cloud, kept, closeness) == pytest.approx(kept, abs=1e-9)
