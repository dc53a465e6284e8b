"""Open land: pasture, crops, ploughed soil, water, and the roads through it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from geocentroids_tiler.scene.canvas import (
    BARE,
    CROP,
    GRASS,
    ROAD,
    WATER,
    Canvas,
    Colour,
    Floats,
    edge,
)
from geocentroids_tiler.scene.shapes import Path, Ribbon, inside_polygon, ribbon

GRASS_RGB: Colour = (133, 138, 88)
SOIL_RGB: Colour = (158, 134, 102)


@dataclass(frozen=True)
class FieldKind:
    """What grows in a field: two colours that alternate in rows, and how much the soil shows."""

    name: str
    cover: int
    crest: Colour
    furrow: Colour
    row_m: float
    mottle: float
    tramlines: bool


FIELD_KINDS: tuple[FieldKind, ...] = (
    FieldKind("pasture", GRASS, (141, 144, 92), (136, 139, 88), 3.0, 7.0, False),
    FieldKind("dry pasture", GRASS, (162, 153, 105), (155, 147, 99), 2.5, 9.0, False),
    FieldKind("meadow", GRASS, (118, 131, 76), (128, 139, 84), 9.0, 5.0, False),
    FieldKind("young crop", CROP, (122, 142, 82), (141, 135, 95), 1.25, 6.0, True),
    FieldKind("maize", CROP, (99, 114, 66), (86, 99, 60), 1.5, 5.0, True),
    FieldKind("wheat", CROP, (190, 172, 117), (183, 164, 110), 1.0, 5.0, True),
    FieldKind("stubble", CROP, (181, 165, 126), (168, 150, 113), 5.0, 5.0, False),
    FieldKind("ploughed", BARE, (151, 124, 95), (131, 106, 80), 1.5, 7.0, False),
    FieldKind("dark soil", BARE, (122, 103, 82), (106, 88, 70), 1.25, 6.0, False),
)


def paint_meadow(canvas: Canvas) -> None:
    """Cover the whole canvas with grass, the ground that shows between all other things."""
    window = canvas.whole()
    canvas.paint(window, np.ones_like(canvas.height_m), canvas.tinted(window, GRASS_RGB, 6, 5), GRASS)


def paint_field(canvas: Canvas, polygon: Path, kind: FieldKind, angle: float) -> None:
    """Paint one field: rows at ``angle``, turned headlands, tramlines, damp and thin patches, a grass verge."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    window = canvas.window((low[0], low[1]), (high[0], high[1]))
    if window is None:
        return
    inside = inside_polygon(window, polygon) - 1.2
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    lengthwise = window.row_m * sin + window.col_m * cos
    crosswise = window.row_m * cos - window.col_m * sin
    wobble = canvas.soft(window.row_m, window.col_m)
    place = np.where(inside > 12.0, crosswise + 0.4 * wobble, inside)  # the headland follows the edge

    # Rows under 1.5 m only just survive the pixel size, so they are partly drawn by noise stretched along them.
    ridge = 0.5 + 0.5 * np.sin(place * np.float32(2 * np.pi / kind.row_m))
    streaks = canvas.fine(lengthwise * 0.12, place) * 0.35
    vigour = canvas.soft(window.row_m + 71.0, window.col_m + 33.0)
    mix = np.clip(0.5 + (ridge - 0.5) * 0.8 + streaks + 0.18 * vigour, 0.0, 1.0)[..., None]
    colour = np.asarray(kind.furrow, np.float32) * (1 - mix) + np.asarray(kind.crest, np.float32) * mix
    light = kind.mottle * (0.75 * vigour + 0.7 * canvas.fine(window.row_m, window.col_m))
    colour += light[..., None] * np.array([1.0, 0.85, 0.7], np.float32)
    if kind.tramlines:
        colour -= _tramlines(place)[..., None] * np.array([4.0, 14.0, 2.0], np.float32)
    canvas.paint(window, edge(inside + 0.3 * wobble, 1.0), colour, kind.cover)


def _tramlines(place: ArrayLike) -> Floats:
    """Return the share of each pixel under a wheel track: pairs 1.8 m apart every 21 m."""
    off = np.abs(np.mod(place, np.float32(21.0)) - 10.5)
    return edge(0.3 - np.abs(off - 0.9), 0.4)


def paint_farm_track(canvas: Canvas, path: Path) -> None:
    """Paint a farm track: two wheel tracks with grass between them."""
    near = ribbon(canvas, path, 4.0)
    if near is None:
        return
    off = np.abs(near.across) + 0.25 * canvas.soft(near.window.row_m, near.window.col_m)
    worn = edge(0.5 - np.abs(off - 0.9), 0.8) * 0.8 + edge(1.9 - off, 1.2) * 0.2
    canvas.paint(near.window, worn.clip(0, 1), canvas.tinted(near.window, SOIL_RGB, 6, 5), BARE)


def paint_river(canvas: Canvas, path: Path, half_width_m: float) -> None:
    """Paint a river: damp banks, sand on the inner bends, shallows, dark water, a streak of sun glint."""
    near = ribbon(canvas, path, half_width_m + 30.0)
    if near is None:
        return
    window = near.window
    ragged = canvas.soft(window.row_m, window.col_m)
    off = np.abs(near.across)
    inside = half_width_m - off + 2.2 * ragged + 0.25 * canvas.fine(window.row_m, window.col_m)

    damp = edge(inside + 14.0, 16.0) * 0.75
    canvas.paint(window, damp, canvas.tinted(window, (98, 112, 64), 9, 7), GRASS)
    sandy = 2.2 + 2.5 * canvas.soft(window.row_m + 40.0, window.col_m + 90.0)
    canvas.paint(window, edge(inside + sandy, 1.0), canvas.tinted(window, (176, 160, 128), 6, 6), BARE)

    deep = np.clip(inside / 7.0, 0.0, 1.0)[..., None]
    water = np.array([93, 98, 79], np.float32) * (1 - deep) + np.array([58, 72, 70], np.float32) * deep
    water = water + (2.2 * ragged + 0.7 * canvas.fine(near.along, near.across))[..., None]
    water += _glint(canvas, near, inside)[..., None]
    canvas.paint(window, edge(inside, 0.6), water, WATER)
    canvas.built[window.slices] |= inside > -1.0


def _glint(canvas: Canvas, near: Ribbon, inside: Floats) -> Floats:
    """Return the extra light of wavelets that mirror the sun: sparse specks in patches of rough water."""
    rough = canvas.soft(near.window.row_m * 0.7 + 120.0, near.window.col_m * 0.7)
    specks = canvas.rng.random(rough.shape, dtype=np.float32)
    lit = (specks > 0.975) & (inside > 3.0)
    return np.where(lit, 130.0 * np.clip(rough - 0.6, 0.0, 1.0), 0.0).astype(np.float32)


@dataclass(frozen=True)
class RoadKind:
    """How a road is built, widths in metres on each side of its middle."""

    half_width_m: float
    surface: Colour
    shoulder_m: float
    shoulder: Colour
    marked: bool
    deck_m: float = 0.0


MAIN_ROAD = RoadKind(4.0, (128, 128, 124), 1.6, (168, 155, 128), marked=True)
BRIDGE = RoadKind(3.6, (150, 148, 141), 0.0, SOIL_RGB, marked=False, deck_m=4.0)
LANE = RoadKind(2.6, (143, 141, 134), 1.2, (150, 142, 106), marked=False)
STREET = RoadKind(3.2, (136, 135, 131), 1.9, (178, 173, 162), marked=False)
DIRT_ROAD = RoadKind(2.2, (189, 166, 130), 1.0, (158, 146, 105), marked=False)


def paint_road(canvas: Canvas, path: Path, kind: RoadKind) -> None:
    """Paint a road: shoulder, surface with worn wheel tracks and patches, and its markings."""
    near = ribbon(canvas, path, kind.half_width_m + kind.shoulder_m + 2.0)
    if near is None:
        return
    window, off = near.window, np.abs(near.across)
    ragged = 0.2 * canvas.soft(window.row_m, window.col_m) * (kind.shoulder_m > 0)
    outer = kind.half_width_m + kind.shoulder_m - off + ragged
    canvas.paint(window, edge(outer, 0.7), canvas.tinted(window, kind.shoulder, 5, 4), BARE, kind.deck_m)

    lane = np.abs(off - kind.half_width_m / 2)
    worn = 7.0 * edge(0.45 - np.abs(lane - 0.75), 0.7) - 3.0 * edge(0.3 - lane, 0.6)
    worn += 1.5 * canvas.fine(near.along * 0.08, near.across)
    # Repairs: stretches of a lane that were laid again and are darker.
    fresh = canvas.soft(near.along * 0.35, np.sign(near.across) * 40.0) > 1.25
    surface = canvas.tinted(window, kind.surface, 3, 3) + (worn - 9.0 * fresh)[..., None]
    inside = kind.half_width_m - off
    canvas.paint(window, edge(inside, 0.3), surface, ROAD, kind.deck_m)
    canvas.built[window.slices] |= outer > -0.5
    if kind.marked:
        _paint_markings(canvas, near, kind)


def _paint_markings(canvas: Canvas, near: Ribbon, kind: RoadKind) -> None:
    """Paint a dashed line in the middle, 4 m in every 10 m, and a line along each edge."""
    off = np.abs(near.across)
    dash = np.mod(near.along, np.float32(10.0)) < 4.0
    middle = edge(0.09 - off) * dash
    sides = edge(0.08 - np.abs(off - (kind.half_width_m - 0.45)))
    rubbed = 0.7 + 0.12 * canvas.fine(near.along, near.across)
    alpha = np.clip(np.maximum(middle, sides) * rubbed, 0.0, 1.0)
    canvas.paint(near.window, alpha, (228, 226, 214), height_m=None)
