"""Pictures of a report as ``data:`` addresses: maps of images, and plots."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rasterio.enums import Resampling as RasterioResampling

from geocentroids_fit.evaluate.images import LabelledImage
from geocentroids_fit.evaluate.masks import on_grid
from geocentroids_fit.evaluate.measures import Similarity
from geocentroids_tiler.codebook import NODATA_LABEL, Classes
from geocentroids_tiler.colors import hex_color
from geocentroids_tiler.grid import PatchRange
from geocentroids_tiler.render import Style, average_colors, encode_indexed, encode_rgba, palette_index
from geocentroids_tiler.source import Dataset, open_raster
from geocentroids_tiler.source.dataset import to_uint8

SIDE_PX = 480
"""Longest side of a map."""
MAX_IMAGES = 12
_BLUE, _RED, _BAND = "#2f6f9f", "#b5452c", "#eef4f8"


@dataclass(frozen=True, slots=True)
class Map:
    """A map of an image: its caption and its address."""

    caption: str
    address: str


@dataclass(frozen=True, slots=True)
class ImageMaps:
    """The maps of one image, and how much of it each class of the coarsest cut takes.

    Attributes:
        set_name: name of the image's set.
        name: of the image.
        width: columns of patches.
        height: rows of patches.
        maps: the image, its classes and its similarity.
        shares: colour as ``#rrggbb`` and share of classes, largest first.
    """

    set_name: str
    name: str
    width: int
    height: int
    maps: tuple[Map, ...]
    shares: tuple[tuple[str, float], ...]


def spread(count: int, most: int = MAX_IMAGES) -> list[int]:
    """Return at most ``most`` numbers below ``count``, evenly spread."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def maps_of(image: LabelledImage, cuts: Sequence[Classes], similarity_range: tuple[float, float]) -> ImageMaps:
    """Draw the maps of an image.

    Args:
        image: with its labels.
        cuts: classes to draw, the coarsest last.
        similarity_range: similarities of the ends of the ramp.
    """
    area, dataset = image.opened.area, image.opened.dataset
    maps = [Map("the image", photograph(dataset, area))]
    for classes in cuts:
        maps.append(Map(f"{len(classes):,} classes", _label_map(image, classes, Style(), similarity_range)))
    ramp = _label_map(image, cuts[0], Style(layer="similarity"), similarity_range)
    maps.append(Map("similarity", ramp))
    coarsest = cuts[-1]
    labels = image.labels[image.labels != NODATA_LABEL]
    share = np.bincount(coarsest.lookup[labels], minlength=len(coarsest)) / len(labels)
    order = np.argsort(-share, kind="stable")[:24]
    return ImageMaps(
        set_name=image.opened.set_name,
        name=image.opened.name,
        width=area.shape[1],
        height=area.shape[0],
        maps=tuple(maps),
        shares=tuple((hex_color(coarsest.colors[i]), float(share[i])) for i in order if share[i] > 0),
    )


def photograph(dataset: Dataset, area: PatchRange, side_px: int = SIDE_PX) -> str:
    """Return part of an image, on its ground grid, as a WebP picture of at most ``side_px`` a side.

    Raises:
        SourceUnavailableError: if it cannot be read.
    """
    rows, cols = area.shape
    scale = side_px / max(rows, cols)
    shape = max(1, round(rows * scale)), max(1, round(cols * scale))
    with (
        open_raster(dataset.source, dataset.identity) as raster,
        on_grid(raster, dataset, area, shape, RasterioResampling.average) as warped,
    ):
        rgb = to_uint8(warped.read(dataset.indexes), dataset.options.rescale)  # (3, H, W)
        valid = warped.dataset_mask()
    buffer = io.BytesIO()
    Image.fromarray(np.dstack([*rgb, valid])).save(buffer, "WEBP", quality=82, method=4)
    return _address(buffer.getvalue(), "image/webp")


def similarity_plot(
    similarity: Similarity,
    edges: Sequence[float],
    similarity_range: tuple[float, float],
    sets: dict[str, Sequence[int]],
) -> str:
    """Plot the histogram of similarities with the codebook's range, as SVG.

    Args:
        similarity: of all patches.
        edges: of the histogram's bins.
        similarity_range: drawn as a band.
        sets: histogram of each set, drawn as lines if there are several.
    """
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.add_subplot()
    counts = np.asarray(similarity.histogram, float)
    axes.axvspan(*similarity_range, color=_BAND, lw=0)
    axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=_BLUE, alpha=0.85 if len(sets) < 2 else 0.35)
    if len(sets) > 1:
        for number, own in enumerate(sets.values()):
            axes.stairs(100 * np.asarray(own) / sum(own), edges, lw=1.3, color=f"C{number}", label=f"set {number + 1}")
        axes.legend(frameon=False, fontsize=8)
    axes.axvline(similarity.percentiles[50], color=_RED, lw=1.2)
    axes.set(xlabel="similarity (band: the codebook's range; line: median)", ylabel="% of patches")
    return _svg(figure)


def usage_plot(counts: NDArray[np.int64]) -> str:
    """Plot the share of each class by rank, as SVG; ``counts`` are patches of each class, of shape (n,)."""
    share = 100 * np.sort(counts[counts > 0])[::-1] / counts.sum()
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.add_subplot()
    axes.step(np.arange(len(share)) + 0.5, share, where="post", color=_BLUE)
    axes.axhline(100 / len(counts), color=_RED, lw=1.2)
    axes.set(
        xlabel="classes that occur, the one met most first (line: all classes used alike)",
        ylabel="% of patches",
        xlim=(0, len(share)),
        yscale="log",
    )
    return _svg(figure)


def _label_map(image: LabelledImage, classes: Classes, style: Style, similarity_range: tuple[float, float]) -> str:
    index, palette = palette_index(image.labels, image.similarity, classes, style, similarity_range)
    factor = math.ceil(max(index.shape) / SIDE_PX)
    if factor == 1:
        return _address(encode_indexed(index, palette, "png"), "image/png")
    pad = [(0, -size % factor) for size in index.shape]
    padded = np.pad(index, pad, constant_values=len(palette) - 1)
    return _address(encode_rgba(average_colors(padded, palette, factor), "png"), "image/png")


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "geocentroids"}):  # otherwise ids in it are random
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _address(buffer.getvalue(), "image/svg+xml")


def _address(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
