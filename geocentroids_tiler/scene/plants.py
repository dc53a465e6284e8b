"""Trees and bushes: crowns of many lobes, lit from one side, alone, in rows, or closed to a forest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from geocentroids_tiler.scene.canvas import (
    BARE,
    CROP,
    GRASS,
    GSD_M,
    TREE,
    Canvas,
    Colour,
    Floats,
    Point,
    Window,
    edge,
    facing,
)
from geocentroids_tiler.scene.shapes import Path, inside_polygon

BROADLEAF: tuple[Colour, ...] = ((101, 117, 67), (91, 108, 61), (112, 124, 74), (120, 131, 76), (99, 107, 72))
DARK: tuple[Colour, ...] = ((74, 90, 58), (82, 96, 62), (84, 93, 66), (69, 84, 56))


@dataclass(frozen=True)
class Crown:
    """One crown seen from above, each array (n, n): coverage, height as a share of the tree's, brightness."""

    radius_m: float
    alpha: Floats
    rise: Floats
    light: Floats


def grow_crowns(canvas: Canvas, variants: int = 5) -> list[Crown]:
    """Return crowns of 0.7 m to 6.5 m radius, several of each, for `plant` to choose from."""
    radii = (0.7, 1.0, 1.4, 1.9, 2.5, 3.2, 4.0, 5.0, 6.5)
    return [_grow_crown(canvas, radius) for radius in radii for _ in range(variants)]


def _grow_crown(canvas: Canvas, radius_m: float) -> Crown:
    """Grow one crown as a heap of leafy balls, the middle ones highest."""
    rng = canvas.rng
    half = int(np.ceil(radius_m * 1.2 / GSD_M)) + 1
    axis = np.arange(-half, half + 1, dtype=np.float32) * np.float32(GSD_M)
    row, col = axis[:, None], axis[None, :]
    top = np.full((axis.size, axis.size), -1.0, np.float32)
    for i in range(1 + int(6 * radius_m)):
        out = 0.0 if i == 0 else radius_m * 0.78 * np.sqrt(rng.random())
        turn = rng.uniform(0, 2 * np.pi)
        size = radius_m * (0.7 if i == 0 else rng.uniform(0.2, 0.42))
        square = size**2 - (row - out * np.sin(turn)) ** 2 - (col - out * np.cos(turn)) ** 2
        base = 0.75 * (radius_m - out) if i else 0.0
        top = np.maximum(top, np.where(square > 0, base + np.sqrt(np.maximum(square, 0)), -1.0))
    shift = rng.uniform(0, 100, 2)
    leaves = canvas.fine(row + shift[0], col + shift[1])
    lumpy = np.maximum(top, 0.0) + 0.10 * leaves
    light = facing(*np.gradient(lumpy * 0.8, GSD_M)) + 0.05 * leaves
    inside = np.where(top > 0, top, -0.3)
    alpha = np.clip(edge(inside.astype(np.float32) - 0.12 + 0.1 * leaves, 0.5), 0.0, 1.0)
    rise = 0.4 + 0.6 * np.clip(top / (1.45 * radius_m), 0.0, 1.0)
    return Crown(radius_m, alpha, rise.astype(np.float32), light.clip(0.35, 1.45).astype(np.float32))


def plant(canvas: Canvas, crowns: list[Crown], at: Point, radius_m: float, colour: Colour) -> None:
    """Plant one tree of about ``radius_m``; it hides what is lower and stands behind what is higher."""
    sizes = np.array([crown.radius_m for crown in crowns])
    best = np.flatnonzero(np.abs(sizes - radius_m) == np.abs(sizes - radius_m).min())
    crown = crowns[int(canvas.rng.choice(best))]
    reach = crown.alpha.shape[0] // 2
    row, col = int(at[0] / GSD_M), int(at[1] / GSD_M)
    top, left = row - reach, col - reach
    bottom, right = min(row + reach + 1, canvas.size_px), min(col + reach + 1, canvas.size_px)
    skip_row, skip_col = max(0, -top), max(0, -left)
    where = (slice(top + skip_row, bottom), slice(left + skip_col, right))
    part = (slice(skip_row, bottom - top), slice(skip_col, right - left))
    if where[0].start >= bottom or where[1].start >= right:
        return
    height = crown.rise[part] * np.float32(1.2 + 2.1 * crown.radius_m * canvas.rng.uniform(0.85, 1.2))
    alpha = crown.alpha[part] * (height > canvas.height_m[where])
    tint = np.asarray(colour, np.float32) * np.float32(canvas.rng.uniform(0.9, 1.1))
    old = canvas.colour[where]
    old += alpha[..., None] * (tint * crown.light[part][..., None] - old)
    hit = alpha > 0.5
    canvas.height_m[where][hit] = height[hit]
    canvas.cover[where][hit] = TREE


def choose(canvas: Canvas, colours: tuple[Colour, ...]) -> Colour:
    """Return one of ``colours`` by chance."""
    return colours[int(canvas.rng.integers(len(colours)))]


def plant_wild(
    canvas: Canvas,
    crowns: list[Crown],
    points: Iterable[Point],
    radius_m: tuple[float, float],
    colours: tuple[Colour, ...],
) -> None:
    """Plant a tree at each point that lies on open ground, none on roads, roofs, water or in gardens."""
    for point in points:
        if canvas.cover_at(point) in (GRASS, CROP, BARE, TREE) and not canvas.is_built(point):
            plant(canvas, crowns, point, float(canvas.rng.uniform(*radius_m)), choose(canvas, colours))


def paint_forest_floor(canvas: Canvas, polygon: Path) -> None:
    """Paint the ground that shows between the trees of `plant_forest`."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    window = canvas.window((low[0], low[1]), (high[0], high[1]))
    if window is not None:
        inside = _inside_forest(canvas, window, polygon)
        canvas.paint(window, edge(inside + 3.0, 5.0), canvas.tinted(window, (84, 91, 58), 8, 6), GRASS)


def _inside_forest(canvas: Canvas, window: Window, polygon: Path) -> Floats:
    """Return how far inside the ragged edge of a forest each pixel lies, (h, w) in metres."""
    return inside_polygon(window, polygon) - 5.0 + 3.0 * canvas.soft(window.row_m, window.col_m)


def plant_forest(canvas: Canvas, crowns: list[Crown], polygon: Path) -> None:
    """Fill a polygon with trees, the tall dark ones inside, younger and lighter ones along its edge."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    window = canvas.window((low[0], low[1]), (high[0], high[1]))
    if window is None:
        return
    inside = _inside_forest(canvas, window, polygon)
    spacing = 4.2
    rows, cols = np.mgrid[low[0] : high[0] : spacing, low[1] : high[1] : spacing]
    jitter = canvas.rng.uniform(-0.5, 0.5, (2, *rows.shape)) * spacing
    places = np.stack([rows + jitter[0], cols + jitter[1]], axis=-1).reshape(-1, 2)
    stands = canvas.soft(places[:, 0] * 0.8, places[:, 1] * 0.8)
    for (row, col), stand in zip(places, stands, strict=True):
        i, j = int(row / GSD_M) - window.slices[0].start, int(col / GSD_M) - window.slices[1].start
        if not (0 <= i < inside.shape[0] and 0 <= j < inside.shape[1]) or inside[i, j] < 0 or stand < -1.7:
            continue
        deep = inside[i, j] > 6.0
        size = (2.2, 4.6) if deep else (1.2, 3.0)
        plant_wild(canvas, crowns, [(row, col)], size, DARK if stand > -0.2 and deep else BROADLEAF)
