from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from geocentroids_tiler.colors import hex_color, oklab_to_linear, oklab_to_srgb, srgb_to_oklab

# Source: Björn Ottosson, https://bottosson.github.io/posts/oklab/, "Table of example XYZ and Oklab pairs", to the three
# digits it gives. His XYZ is relative to D65 white.
OTTOSSON_XYZ = [
    ([0.950, 1.000, 1.089], [1.000, 0.000, 0.000]),
    ([1.000, 0.000, 0.000], [0.450, 1.236, -0.019]),
    ([0.000, 1.000, 0.000], [0.922, -0.671, 0.263]),
    ([0.000, 0.000, 1.000], [0.153, -1.415, -0.449]),
]
# Source: IEC 61966-2-1, linear sRGB to XYZ.
XYZ_FROM_RGB = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


@pytest.mark.parametrize(("xyz", "lab"), OTTOSSON_XYZ)
def test_the_authors_table(xyz: list[float], lab: list[float]) -> None:
    # The inverse is checked: it takes colours outside of sRGB. Tolerance: both sides have three digits and the cube
    # triples an error of 0.0005; measured 0.0019.
    found = oklab_to_linear(lab) @ XYZ_FROM_RGB.T
    np.testing.assert_allclose(found, xyz, atol=3e-3)


# The page's C code, run on its own in float64.
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 255, 255), (1.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((255, 0, 0), (0.627955, 0.224863, 0.125846)),
        ((0, 255, 0), (0.866440, -0.233888, 0.179498)),
        ((0, 0, 255), (0.452014, -0.032457, -0.311528)),
        ((128, 128, 128), (0.599871, 0.0, 0.0)),
    ],
)
def test_known_colours(rgb: tuple[int, int, int], lab: tuple[float, float, float]) -> None:
    np.testing.assert_allclose(srgb_to_oklab(rgb), lab, atol=2e-6)
    assert tuple(oklab_to_srgb(lab)) == rgb


@given(arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(0, 4), st.just(3))))
def test_round_trip_is_exact(rgb: np.ndarray) -> None:
    lab = srgb_to_oklab(rgb)
    assert lab.shape == rgb.shape
    np.testing.assert_array_equal(oklab_to_srgb(lab), rgb)


def test_round_trip_of_a_grid_over_all_of_srgb() -> None:
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    rgb = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
    np.testing.assert_array_equal(oklab_to_srgb(srgb_to_oklab(rgb)), rgb)


def test_every_grey_is_grey_and_brightness_rises() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    lab = srgb_to_oklab(grey)
    assert np.abs(lab[:, 1:]).max() < 1e-6  # measured 6e-8: the rows of the published matrices sum to 1 that closely
    assert (np.diff(lab[:, 0]) > 0).all()


@given(
    st.tuples(st.floats(-1, 2, allow_nan=False), st.floats(-1, 1, allow_nan=False), st.floats(-1, 1, allow_nan=False))
)
def test_out_of_gamut_is_clipped(lab: tuple[float, float, float]) -> None:
    linear = oklab_to_linear(lab)
    rgb = oklab_to_srgb(lab)
    assert rgb.dtype == np.uint8
    assert (rgb[linear <= 0] == 0).all()
    assert (rgb[linear >= 1] == 255).all()


def test_hex() -> None:
    assert hex_color(np.array([1, 171, 255], np.uint8)) == "#01abff"
    assert hex_color((0, 0, 0)) == "#000000"
