"""HTTP parameters, parsed and bounded.

All dependencies are ``async def``: a synchronous one would make every async route wait for a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query
from titiler.core.dependencies import DefaultDependency

from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.mosaic import Overlap
from geocentroids_tiler.render import Layer, Style
from geocentroids_tiler.source import ReadOptions

MAX_TILE_PX = 1024

Url = Annotated[
    str,
    Query(
        max_length=4096,
        description="Absolute http(s) URL of a Cloud Optimized GeoTIFF, or a path below the server's root folder; or "
        "of a document that names many: MosaicJSON, STAC item, item collection or search, or a list.",
    ),
]
TileSize = Annotated[int, Query(ge=16, le=MAX_TILE_PX, description="Pixels a side of a tile.")]


async def path_param(url: Url) -> str:
    """Return the dataset's URL."""
    return url


@dataclass
class ReadParams(DefaultDependency):
    """Which codebook is used, and how an image's bands become RGB."""

    codebook: str | None = None
    bidx: tuple[int, int, int] | None = None
    rescale: tuple[float, float] | None = None

    @property
    def options(self) -> ReadOptions:
        """What the source needs of it."""
        return ReadOptions(self.bidx, self.rescale)


async def read_params(
    codebook: Annotated[
        str | None, Query(max_length=64, description="Name of an installed codebook. Default: the server's.")
    ] = None,
    bidx: Annotated[
        list[int] | None, Query(description="Three band numbers, for red, green and blue: bidx=4&bidx=3&bidx=2.")
    ] = None,
    rescale: Annotated[
        str | None,
        Query(max_length=64, description="LOW,HIGH: values that become black and white, where they are not 8-bit."),
    ] = None,
) -> ReadParams:
    """Parse codebook, bidx and rescale."""
    return ReadParams(codebook, parse_bidx(bidx), parse_rescale(rescale))


@dataclass
class LayerParams(ReadParams):
    """How images are read, and which image of a mosaic is shown where they overlap."""

    overlap: Overlap = "first"


async def layer_params(
    read: Annotated[ReadParams, Depends(read_params)],
    overlap: Annotated[
        Overlap,
        Query(
            description="Of a mosaic, where images overlap: the one that is named first, the newest, or the one whose "
            "patch fits its class best (similarity)."
        ),
    ] = "first",
) -> LayerParams:
    """Parse codebook, bidx, rescale and overlap."""
    return LayerParams(read.codebook, read.bidx, read.rescale, overlap)


@dataclass(frozen=True, slots=True)
class StyleParams:
    """How labels are merged and drawn, before the codebook is known."""

    classes: int | None
    highlight: frozenset[int]
    layer: Layer

    def style(self, codebook: Codebook) -> Style:
        """Return the style for a codebook.

        Raises:
            InputError: if a highlighted class does not exist.
        """
        count = self.classes or len(codebook)
        if outside := [label for label in self.highlight if not 0 <= label < count]:
            raise InputError(f"highlight={outside[0]} is not a class; accepted: 0 to {count - 1}")
        return Style(self.layer, self.highlight)


async def style_params(
    classes: Annotated[
        int | None, Query(ge=1, le=65535, description="Merge the codebook's labels to this many classes.")
    ] = None,
    highlight: Annotated[
        str | None, Query(max_length=4096, description="Comma-separated classes to show; all others are dimmed.")
    ] = None,
    layer: Annotated[
        Layer, Query(description="classes: in their colours. similarity: how well each patch fits its centroid.")
    ] = "classes",
) -> StyleParams:
    """Parse classes, highlight and layer."""
    return StyleParams(classes, _parse_highlight(highlight), layer)


async def classes_param(
    classes: Annotated[
        int | None, Query(ge=1, le=65535, description="Merge the codebook's labels to this many classes.")
    ] = None,
) -> int | None:
    """Parse classes."""
    return classes


def parse_bidx(bidx: list[int] | None) -> tuple[int, int, int] | None:
    """Check three band numbers.

    Raises:
        InputError: if they are anything else.
    """
    if not bidx:
        return None
    if len(bidx) != 3 or min(bidx) < 1:
        raise InputError(f"bidx={bidx} is not three band numbers from 1; write bidx=1&bidx=2&bidx=3")
    return bidx[0], bidx[1], bidx[2]


def parse_rescale(text: str | None) -> tuple[float, float] | None:
    """Parse ``LOW,HIGH``.

    Raises:
        InputError: if it is anything else, or not an interval.
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"rescale={text!r} is not LOW,HIGH, for example rescale=0,3000") from None
    if not (low < high and abs(low) < 1e30 and abs(high) < 1e30):
        raise InputError(f"rescale={text!r}: LOW must be less than HIGH, and both finite")
    return low, high


def _parse_highlight(text: str | None) -> frozenset[int]:
    if not text:
        return frozenset()
    try:
        return frozenset(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"highlight={text!r} is not a list of classes, for example highlight=12,57") from None
