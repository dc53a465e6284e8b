"""Pictures, decoded with Pillow, against numpy in float64."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
from codebooks import make_codebook
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from geocentroids_tiler.codebook import NODATA_LABEL
from geocentroids_tiler.colors import srgb_to_oklab
from geocentroids_tiler.render import (
    DIMMED_ALPHA,
    MEDIA_TYPE,
    RAMP_STEPS,
    RAMP_STOPS,
    ImageFormat,
    Style,
    average_colors,
    class_palette,
    encode_indexed,
    encode_rgba,
    palette_index,
    sample,
    similarity_palette,
    transparent_tile,
)

FORMATS: tuple[ImageFormat, ...] = ("png", "webp")
RNG = np.random.default_rng(7)
AVERAGE_LEVELS = 0.51
"""Measured 0.5003 grey levels: the average is rounded once; float32 sums of 256 samples add less than 0.001."""


@dataclass(frozen=True)
class Decoded:
    mode: str
    rgba: NDArray[np.uint8]


def decode(content: bytes, image_format: ImageFormat) -> Decoded:
    image = Image.open(io.BytesIO(content))
    assert image.format == image_format.upper()
    assert Image.MIME[image.format] == MEDIA_TYPE[image_format]
    return Decoded(image.mode, np.asarray(image.convert("RGBA")))


def random_palette(n: int) -> NDArray[np.uint8]:
    palette = RNG.integers(0, 256, (n, 4), np.uint8)
    palette[:, 3] = RNG.choice([48, 255], n)
    palette[-1] = 0
    return palette


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("shape", [(256, 256), (1, 1), (3, 70)])
@pytest.mark.parametrize("colors", [1, 2, 17, 256, 257, 6145])
def test_indexed_pictures_decode_to_their_colours(
    image_format: ImageFormat, shape: tuple[int, int], colors: int
) -> None:
    palette = random_palette(colors)
    index = RNG.integers(0, colors, shape).astype(np.uint16)
    decoded = decode(encode_indexed(index, palette, image_format), image_format)
    assert np.array_equal(decoded.rgba, palette[index])


@pytest.mark.parametrize(("used", "mode"), [(1, "P"), (255, "P"), (256, "P"), (257, "RGBA"), (600, "RGBA")])
def test_palette_png_up_to_256_colours_in_use(used: int, mode: str) -> None:
    """Those in use count, not those of the codebook; also where they are its last."""
    palette = random_palette(6145)
    index = np.resize(np.arange(6145 - used, 6145), (64, 64)).astype(np.uint16)
    decoded = decode(encode_indexed(index, palette, "png"), "png")
    assert decoded.mode == mode
    assert np.array_equal(decoded.rgba, palette[index])


@pytest.mark.parametrize("image_format", FORMATS)
def test_rgba_is_encoded_without_loss(image_format: ImageFormat) -> None:
    rgba = RNG.integers(0, 256, (40, 60, 4), np.uint8)
    rgba[rgba[..., 3] == 0] = 0
    assert np.array_equal(decode(encode_rgba(rgba[::-1], image_format), image_format).rgba, rgba[::-1])


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("size", [16, 256, 1024])
def test_transparent_tile(image_format: ImageFormat, size: int) -> None:
    decoded = decode(transparent_tile(size, image_format), image_format)
    assert decoded.rgba.shape == (size, size, 4)
    assert not decoded.rgba[..., 3].any()


@pytest.mark.parametrize("factor", [1, 2, 3, 5, 16])
def test_average_is_that_of_float64(factor: int) -> None:
    """Colours weigh as much as they are opaque; what has no data adds none."""
    palette = random_palette(300)
    index = RNG.integers(0, 300, (12 * factor, 9 * factor)).astype(np.uint16)
    index[: 2 * factor] = 299
    found = average_colors(index, palette, factor)
    blocks = palette[index].astype(np.float64).reshape(12, factor, 9, factor, 4)
    alpha = blocks[..., 3:].mean(axis=(1, 3))
    weighted = (blocks[..., :3] * blocks[..., 3:]).mean(axis=(1, 3))
    color = np.divide(weighted, alpha, out=np.zeros_like(weighted), where=alpha > 0)
    assert found.shape == (12, 9, 4)
    assert np.abs(found - np.concatenate([color, alpha], axis=2)).max() <= AVERAGE_LEVELS
    assert not found[:2].any()


def test_average_by_hand() -> None:
    """A red and a blue patch, and two without data: purple, half transparent."""
    palette = np.array([[255, 0, 0, 255], [0, 0, 255, 255], [0, 0, 0, 0]], np.uint8)
    found = average_colors(np.array([[0, 2], [2, 1]], np.uint16), palette, 2)
    assert found.tolist() == [[[128, 0, 128, 128]]]


@given(st.integers(1, 16), st.integers(0, 255), st.integers(1, 255))
def test_average_of_one_colour_is_that_colour(factor: int, level: int, alpha: int) -> None:
    palette = np.array([[level, 255 - level, 7, alpha]], np.uint8)
    found = average_colors(np.zeros((factor, factor), np.uint16), palette, factor)
    assert found[0, 0].tolist() == palette[0].tolist()


class TestSample:
    def test_inside_and_outside(self) -> None:
        index = np.arange(6, dtype=np.uint16).reshape(2, 3)
        rows, cols = np.array([0, 1, -1, 2, 0, 0, -(2**40)]), np.array([0, 2, 0, 0, -1, 3, -(2**40)])
        assert sample(index, rows, cols, 99).tolist() == [0, 5, 99, 99, 99, 99, 99]

    def test_of_nothing(self) -> None:
        found = sample(np.zeros((0, 0), np.uint16), np.zeros((2, 3), np.int64), np.zeros((2, 3), np.int64), 7)
        assert found.tolist() == [[7, 7, 7]] * 2


class TestClasses:
    CODEBOOK = make_codebook(k=12)
    LABELS = np.array([[0, 5, 11], [NODATA_LABEL, 3, 3]], np.uint16)
    NOTHING = np.full((2, 3), np.nan, np.float32)

    def draw(self, style: Style, n: int | None = None) -> NDArray[np.uint8]:
        index, palette = palette_index(self.LABELS, self.NOTHING, self.CODEBOOK.classes(n), style, (0.0, 1.0))
        assert index.dtype == np.uint16
        return palette[index]

    def test_colours_of_the_codebook(self) -> None:
        rgba = self.draw(Style())
        valid = self.LABELS != NODATA_LABEL
        assert np.array_equal(rgba[valid][:, :3], self.CODEBOOK.colors[self.LABELS[valid]])
        assert (rgba[valid][:, 3] == 255).all()
        assert not rgba[~valid].any()

    def test_merged_classes(self) -> None:
        classes = self.CODEBOOK.classes(4)
        rgba = self.draw(Style(), 4)
        valid = self.LABELS != NODATA_LABEL
        assert np.array_equal(rgba[valid][:, :3], classes.colors[classes.lookup[self.LABELS[valid]]])
        assert not rgba[~valid].any()

    def test_highlight_dims_the_others(self) -> None:
        rgba = self.draw(Style(highlight=frozenset({3, 11})))
        assert rgba[..., 3].tolist() == [[DIMMED_ALPHA, DIMMED_ALPHA, 255], [0, 255, 255]]
        assert np.array_equal(rgba[..., :3], self.draw(Style())[..., :3])

    def test_palette_ends_with_no_data(self) -> None:
        palette = class_palette(self.CODEBOOK.classes(), frozenset({0}))
        assert palette.shape == (13, 4)
        assert palette[-1].tolist() == [0, 0, 0, 0]


class TestSimilarity:
    def test_ramp_goes_through_its_stops(self) -> None:
        """In steps that look alike: each is about as long as the mean of its stretch in OKLab."""
        palette = similarity_palette()
        assert palette.shape == (RAMP_STEPS + 1, 4)
        assert palette[-1].tolist() == [0, 0, 0, 0]
        assert (palette[:-1, 3] == 255).all()
        at = np.linspace(0, RAMP_STEPS - 1, len(RAMP_STOPS))
        for position, stop in zip(at, RAMP_STOPS, strict=True):
            assert np.abs(palette[round(position), :3].astype(int) - stop).max() <= 3
        lightness = srgb_to_oklab(palette[:-1, :3])[:, 0]
        assert (np.diff(lightness) > -0.005).all()
        assert lightness[-1] - lightness[0] > 0.5

    def test_low_to_high(self) -> None:
        labels = np.zeros(7, np.uint16)
        labels[6] = NODATA_LABEL
        similarity = np.array([-5.0, -1.0, 0.0, 1.0, 9.0, np.nan, np.nan], np.float32)
        index, _ = palette_index(labels, similarity, make_codebook().classes(), Style("similarity"), (-1.0, 1.0))
        last = RAMP_STEPS - 1
        assert index.tolist() == [0, 0, last // 2, last, last, last // 2, RAMP_STEPS]

    def test_no_data_is_transparent(self) -> None:
        labels = np.full((2, 2), NODATA_LABEL, np.uint16)
        index, palette = palette_index(
            labels, np.full((2, 2), np.nan, np.float32), make_codebook().classes(), Style("similarity"), (0.0, 1.0)
        )
        assert not palette[index].any()
