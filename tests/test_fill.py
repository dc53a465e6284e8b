"""Filling what is no data, by hand, against a search in plain loops, and by property."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from geocentroids_tiler.source.fill import fill_invalid

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def images(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    rows, cols = draw(shapes)
    return draw(arrays(np.uint8, (rows, cols, 3))), draw(arrays(np.bool_, (rows, cols)))


def picture(rows: int, cols: int) -> NDArray[np.uint8]:
    """Return an image in which every pixel has its own colour."""
    row, col = np.indices((rows, cols))
    return np.stack([row, col, 255 - row], axis=2).astype(np.uint8)


@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_mirrors_across_a_straight_edge(side: str) -> None:
    image = picture(20, 30)
    valid = np.ones((20, 30), bool)
    row, col = np.indices(valid.shape)
    edge = {"left": 8, "right": 21, "top": 6, "bottom": 13}[side]
    if side in ("left", "right"):
        valid[col < edge if side == "left" else col > edge] = False
        expected = image[row, np.where(valid, col, 2 * edge - col)]
    else:
        valid[row < edge if side == "top" else row > edge] = False
        expected = image[np.where(valid, row, 2 * edge - row), col]
    damaged = np.where(valid[..., None], image, 0).astype(np.uint8)
    assert np.array_equal(fill_invalid(damaged, valid), expected)


def test_takes_the_edge_where_the_mirrored_place_is_no_data() -> None:
    image = picture(1, 10)
    valid = np.zeros((1, 10), bool)
    valid[0, 6] = True
    assert (fill_invalid(image, valid) == image[0, 6]).all()


def test_corner_without_data_in_its_row_or_column() -> None:
    """A corner is filled in a second pass, from what the first one made."""
    image = picture(8, 8)
    valid = np.zeros((8, 8), bool)
    valid[4:, 4:] = True
    filled = fill_invalid(np.where(valid[..., None], image, 0).astype(np.uint8), valid)
    allowed = {tuple(color) for color in image[4:, 4:].reshape(-1, 3)}
    assert {tuple(color) for color in filled.reshape(-1, 3)} <= allowed
    assert np.array_equal(filled[3, 4:], image[5, 4:])
    assert tuple(filled[3, 3]) in {tuple(image[5, 5]), tuple(image[4, 5]), tuple(image[5, 4])}


def test_nothing_valid_is_black() -> None:
    assert not fill_invalid(picture(5, 7), np.zeros((5, 7), bool)).any()


def test_everything_valid_is_unchanged() -> None:
    image = picture(5, 7)
    assert np.array_equal(fill_invalid(image, np.ones((5, 7), bool)), image)


@given(images())
def test_valid_pixels_are_untouched(case: tuple[NDArray[np.uint8], NDArray[np.bool_]]) -> None:
    image, valid = case
    before = image.copy()
    filled = fill_invalid(image, valid)
    assert filled.dtype == np.uint8
    assert filled.shape == image.shape
    assert np.array_equal(filled[valid], image[valid])
    assert np.array_equal(image, before)


@given(images())
def test_filled_pixels_are_valid_ones(case: tuple[NDArray[np.uint8], NDArray[np.bool_]]) -> None:
    image, valid = case
    filled = fill_invalid(image, valid)
    if valid.any():
        assert {tuple(color) for color in filled.reshape(-1, 3)} == {tuple(color) for color in image[valid]}


@settings(max_examples=200)
@given(images(), st.integers(0, 255))
def test_depends_on_valid_pixels_only(case: tuple[NDArray[np.uint8], NDArray[np.bool_]], other: int) -> None:
    image, valid = case
    changed = np.where(valid[..., None], image, other).astype(np.uint8)
    assert np.array_equal(fill_invalid(image, valid), fill_invalid(changed, valid))


@given(images())
def test_turned_image_is_filled_likewise_where_there_is_one_nearest_edge(
    case: tuple[NDArray[np.uint8], NDArray[np.bool_]],
) -> None:
    """A pixel with one nearest valid pixel in its row and column takes what lies mirrored at it, in plain loops."""
    image, valid = case
    filled = fill_invalid(image, valid)
    rows, cols = valid.shape
    for r, c in zip(*np.nonzero(~valid), strict=True):
        near = []
        for dr, dc in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            steps = 1
            while 0 <= r + dr * steps < rows and 0 <= c + dc * steps < cols:
                if valid[r + dr * steps, c + dc * steps]:
                    near.append((steps, dr, dc))
                    break
                steps += 1
        near.sort()
        if not near or (len(near) > 1 and near[0][0] == near[1][0]):
            continue
        steps, dr, dc = near[0]
        mirror = r + 2 * dr * steps, c + 2 * dc * steps
        inside = 0 <= mirror[0] < rows and 0 <= mirror[1] < cols
        if inside:
            source = mirror if valid[mirror] else (r + dr * steps, c + dc * steps)
            assert np.array_equal(filled[r, c], image[source])
