"""From labels to pictures. Pure functions on arrays; no device, no network."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from geocentroids_tiler.codebook import NODATA_LABEL, Classes
from geocentroids_tiler.colors import oklab_to_srgb, srgb_to_oklab

Layer = Literal["classes", "similarity"]
ImageFormat = Literal["png", "webp"]
MEDIA_TYPE: dict[ImageFormat, str] = {"png": "image/png", "webp": "image/webp"}

DIMMED_ALPHA = 48
"""Opacity of classes that are not highlighted."""
RAMP_STOPS = ((68, 20, 84), (160, 40, 100), (240, 120, 70), (250, 230, 130), (240, 250, 240))
"""Colours of layer=similarity from the worst to the best fit."""
RAMP_STEPS = 255


@dataclass(frozen=True, slots=True)
class Style:
    """How labels are drawn.

    Attributes:
        layer: classes in their colours, or how well each patch fits its centroid.
        highlight: class ids that keep their colour while all others are dimmed; empty: none is dimmed.
    """

    layer: Layer = "classes"
    highlight: frozenset[int] = frozenset()


def class_palette(classes: Classes, highlight: frozenset[int]) -> NDArray[np.uint8]:
    """Return RGBA of each class, of shape (n + 1, 4), uint8; the last row, for no data, is transparent."""
    palette = np.zeros((len(classes) + 1, 4), np.uint8)
    palette[:-1, :3] = classes.colors
    palette[:-1, 3] = 255
    if highlight:
        palette[:-1, 3] = DIMMED_ALPHA
        palette[sorted(highlight), 3] = 255
    return palette


def similarity_palette() -> NDArray[np.uint8]:
    """Return RGBA of each step of similarity, of shape (256, 4), uint8; the last row, for no data, is transparent."""
    stops = srgb_to_oklab(RAMP_STOPS)
    position = np.linspace(0, len(stops) - 1, RAMP_STEPS)
    lab = np.stack([np.interp(position, np.arange(len(stops)), stops[:, i]) for i in range(3)], axis=1)
    palette = np.zeros((RAMP_STEPS + 1, 4), np.uint8)
    palette[:-1, :3] = oklab_to_srgb(lab)
    palette[:-1, 3] = 255
    return palette


def palette_index(
    labels: NDArray[np.uint16],
    similarity: NDArray[np.float32],
    classes: Classes,
    style: Style,
    similarity_range: tuple[float, float],
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Turn labels into indices of a palette.

    Args:
        labels: of any shape, uint16.
        similarity: of the same shape, float32.
        classes: classes of the labels.
        style: what to draw.
        similarity_range: similarities of the ends of the ramp.

    Returns:
        Indices of the shape of ``labels``, uint16, and a palette of shape (n + 1, 4), uint8, whose last row is for
        no data.
    """
    if style.layer == "classes":
        palette = class_palette(classes, style.highlight)
        index = classes.of_labels(labels)
        return np.minimum(index, np.uint16(len(palette) - 1)), palette
    low, high = similarity_range
    step = np.rint((np.nan_to_num(similarity) - low) / (high - low) * (RAMP_STEPS - 1)).clip(0, RAMP_STEPS - 1)
    return np.where(labels == NODATA_LABEL, RAMP_STEPS, step).astype(np.uint16), similarity_palette()


def sample(
    index: NDArray[np.uint16], rows: NDArray[np.int32], cols: NDArray[np.int32], nodata: int
) -> NDArray[np.uint16]:
    """Look up a block at places, which may lie outside of it.

    Args:
        index: of shape (H, W), uint16.
        rows: of any shape, relative to the block.
        cols: of the same shape.
        nodata: answer outside the block.

    Returns:
        Of the shape of ``rows``.
    """
    height, width = index.shape
    if not index.size:
        return np.full(rows.shape, nodata, np.uint16)
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    found = index[rows.clip(0, height - 1), cols.clip(0, width - 1)]
    return np.where(inside, found, np.uint16(nodata))


def average_colors(index: NDArray[np.uint16], palette: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average the colours of each ``factor`` x ``factor`` square, weighted by their opacity.

    Args:
        index: of shape (H * factor, W * factor), uint16.
        palette: RGBA of shape (n, 4), uint8.
        factor: samples a side of a pixel.

    Returns:
        RGBA of shape (H, W, 4), uint8.
    """
    colors = _premultiplied(palette)
    return _mean_of_squares(lambda i, j: colors[index[i::factor, j::factor]], factor)


def cell_colors(index: NDArray[np.uint16], palette: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Return the average colour of each ``factor`` x ``factor`` square, multiplied by its opacity.

    Args:
        index: of shape (H * factor, W * factor), uint16.
        palette: RGBA of shape (n, 4), uint8.
        factor: indices a side of a square.

    Returns:
        Premultiplied RGBA of shape (H, W, 4), uint8, rounded to whole levels.
    """
    colors = np.rint(_premultiplied(palette)).astype(np.uint8)[index]
    if factor == 1:
        return colors
    # As four channels without a meaning: Pillow would multiply those of RGBA by opacity once more.
    picture = Image.frombuffer("CMYK", index.shape[::-1], np.ascontiguousarray(colors), "raw", "CMYK", 0, 1)
    return np.asarray(picture.reduce(factor))


def average_samples(
    colors: NDArray[np.uint8], rows: NDArray[np.int32], cols: NDArray[np.int32], samples: int
) -> NDArray[np.uint8]:
    """Average the colours of cells under each pixel.

    Args:
        colors: premultiplied RGBA of cells, of shape (H, W, 4), uint8.
        rows: row of the cell at each sample, of shape (h * samples, w * samples); outside of ``colors`` for none.
        cols: its column, of the same shape.
        samples: samples a side of a pixel.

    Returns:
        RGBA of shape (h, w, 4), uint8.
    """
    height, width = colors.shape[:2]
    padded = np.zeros((height + 1, width + 1, 4), np.uint8)  # the last row and column are transparent
    padded[:-1, :-1] = colors
    inside = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    at = np.where(inside, rows * (width + 1) + cols, padded.shape[0] * padded.shape[1] - 1)
    found = padded.view(np.uint32).ravel()[at].view(np.uint8).reshape(*rows.shape, 4)
    return _mean_of_squares(lambda i, j: found[i::samples, j::samples], samples)


def _premultiplied(palette: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return RGBA of shape (n, 4) whose colours are multiplied by their opacity."""
    colors = palette.astype(np.float32)
    colors[:, :3] *= colors[:, 3:] / 255
    return colors


def _mean_of_squares(part: Callable[[int, int], NDArray[Any]], side: int) -> NDArray[np.uint8]:
    """Average premultiplied colours and undo the multiplication.

    Args:
        part: returns of each square the colour in row i and column j, of shape (H, W, 4).
        side: rows and columns of a square.

    Returns:
        RGBA of shape (H, W, 4), uint8.
    """
    total = part(0, 0).astype(np.float32)
    for i, j in [(i, j) for i in range(side) for j in range(side)][1:]:
        total += part(i, j)
    total /= side**2
    alpha = total[..., 3:]
    color = np.divide(total[..., :3] * 255, alpha, out=np.zeros_like(total[..., :3]), where=alpha > 0)
    rgba: NDArray[np.uint8] = np.rint(np.concatenate([color, alpha], axis=-1)).clip(0, 255).astype(np.uint8)
    return rgba


def encode_indexed(index: NDArray[np.uint16], palette: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Encode a picture of palette indices without loss; a palette PNG where at most 256 colours are in use.

    Args:
        index: of shape (H, W), uint16.
        palette: RGBA of shape (n, 4), uint8.
        image_format: png or webp.
    """
    used = np.unique(index)
    if image_format != "png" or len(used) > 256:
        return encode_rgba(palette[index], image_format)
    narrow = np.zeros(len(palette), np.uint8)
    narrow[used] = np.arange(len(used), dtype=np.uint8)
    image = Image.fromarray(narrow[index])
    image.putpalette(palette[used, :3].tobytes(), "RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, transparency=palette[used, 3].tobytes())
    return buffer.getvalue()


def encode_rgba(rgba: NDArray[np.uint8], image_format: ImageFormat) -> bytes:
    """Encode RGBA of shape (H, W, 4), uint8, without loss; a PNG without opacity where all of it is opaque."""
    buffer = io.BytesIO()
    if image_format == "png":
        opaque = bool((rgba[..., 3] == 255).all())
        image = Image.fromarray(np.ascontiguousarray(rgba[..., :3] if opaque else rgba))
        image.save(buffer, "PNG", compress_level=1)
    else:
        image = Image.fromarray(np.ascontiguousarray(rgba))
        image.save(buffer, "WEBP", lossless=True, quality=20, method=0, exact=False)
    return buffer.getvalue()


def transparent_tile(size_px: int, image_format: ImageFormat) -> bytes:
    """Return a picture without any data."""
    return encode_indexed(np.zeros((size_px, size_px), np.uint16), np.zeros((1, 4), np.uint8), image_format)
