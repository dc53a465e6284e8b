"""Shapes that painters share: turned rectangles, ribbons along a path, convex polygons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from geocentroids_tiler.scene.canvas import GSD_M, Canvas, Floats, Point, Window

Path = NDArray[np.float64]
"""(N, 2) positions in metres: a line, or the corners of a polygon in order."""

FAR_M = 1e5


@dataclass(frozen=True)
class Frame:
    """A turned coordinate system: ``along`` and ``across`` an axis, origin at ``centre``."""

    centre: Point
    angle: float

    def to_ground(self, along: float, across: float) -> Point:
        """Return the ``(row, col)`` of a position in this frame."""
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return float(self.centre[0] + along * sin + across * cos), float(self.centre[1] + along * cos - across * sin)

    def axes(self, window: Window) -> tuple[Floats, Floats]:
        """Return ``along`` and ``across`` of every pixel of a window, each (h, w) in metres."""
        cos, sin = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        row, col = window.row_m - np.float32(self.centre[0]), window.col_m - np.float32(self.centre[1])
        return row * sin + col * cos, row * cos - col * sin

    def at(self, along: float, across: float, turn: float = 0.0) -> Frame:
        """Return a frame with its origin at a position in this one, turned by ``turn`` radians."""
        return Frame(self.to_ground(along, across), self.angle + turn)

    def line(self, start: Point, stop: Point) -> Path:
        """Return the line between two ``(along, across)`` in pieces short enough for `ribbon`."""
        a, b = np.array(self.to_ground(*start)), np.array(self.to_ground(*stop))
        return np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 20))

    def box(self, canvas: Canvas, length_m: float, width_m: float, pad_m: float = 1.0) -> Window | None:
        """Return the window around a rectangle of this size centred in this frame."""
        cos, sin = abs(np.cos(self.angle)), abs(np.sin(self.angle))
        rows, cols = (length_m * sin + width_m * cos) / 2, (length_m * cos + width_m * sin) / 2
        row, col = self.centre
        return canvas.window((row - rows, col - cols), (row + rows, col + cols), pad_m)


def inside_rectangle(along: ArrayLike, across: ArrayLike, length_m: float, width_m: float) -> Floats:
    """Return how far inside a centred rectangle each position lies, in metres, negative outside."""
    to_end = np.float32(length_m / 2) - np.abs(np.asarray(along, np.float32))
    to_side = np.float32(width_m / 2) - np.abs(np.asarray(across, np.float32))
    return np.minimum(to_end, to_side)


@dataclass(frozen=True)
class Ribbon:
    """Surroundings of a path: for every pixel of a window the nearest place on the path.

    Attributes:
        window: where.
        along: (h, w) metres from the start of the path.
        across: (h, w) metres from the path, positive to its right; `FAR_M` beyond the reach.
    """

    window: Window
    along: Floats
    across: Floats


def ribbon(canvas: Canvas, path: Path, reach_m: float) -> Ribbon | None:
    """Return the ribbon of ``path``, reliable up to ``reach_m`` on each side; None if it is not in view."""
    low, high = path.min(axis=0), path.max(axis=0)
    window = canvas.window((low[0], low[1]), (high[0], high[1]), reach_m)
    if window is None:
        return None
    shape = (window.row_m.size, window.col_m.size)
    along, across = np.zeros(shape, np.float32), np.full(shape, FAR_M, np.float32)
    first_row, first_col = window.slices[0].start, window.slices[1].start
    start_m = 0.0
    for a, b in pairwise(path):
        length = float(np.hypot(*(b - a)))
        part = canvas.window((min(a[0], b[0]), min(a[1], b[1])), (max(a[0], b[0]), max(a[1], b[1])), reach_m)
        if part is not None:
            rows, cols = part.slices
            here = (
                slice(rows.start - first_row, rows.stop - first_row),
                slice(cols.start - first_col, cols.stop - first_col),
            )
            dr, dc = (b - a).astype(np.float32) / np.float32(length)
            row, col = part.row_m - np.float32(a[0]), part.col_m - np.float32(a[1])
            t = np.clip(row * dr + col * dc, 0.0, np.float32(length))
            side = row * dc - col * dr
            off = np.hypot(row - t * dr, col - t * dc)
            nearer = off < np.abs(across[here])
            across[here][nearer] = np.copysign(off, side)[nearer]
            along[here][nearer] = (start_m + t)[nearer]
        start_m += length
    return Ribbon(window, along, across)


def smooth_path(points: list[Point], step_m: float = 8.0) -> Path:
    """Return a Catmull-Rom curve through ``points``, sampled about every ``step_m`` metres."""
    knots = np.asarray([points[0], *points, points[-1]], np.float64)
    pieces = []
    for p0, p1, p2, p3 in zip(knots, knots[1:], knots[2:], knots[3:], strict=False):
        count = max(2, int(np.hypot(*(p2 - p1)) / step_m))
        t = np.linspace(0, 1, count, endpoint=False)[:, None]
        pieces.append(
            0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
        )
    return np.concatenate([*pieces, knots[-1:]])


def walk(path: Path, spacing_m: float) -> Iterator[tuple[Point, float]]:
    """Yield ``(point, heading)`` every ``spacing_m`` metres; the heading is the angle of a `Frame`."""
    steps = np.diff(path, axis=0)
    reached = np.concatenate([[0.0], np.cumsum(np.hypot(steps[:, 0], steps[:, 1]))])
    for at in np.arange(spacing_m / 2, reached[-1], spacing_m):
        i = min(int(np.searchsorted(reached, at, side="right")) - 1, len(steps) - 1)
        row, col = path[i] + steps[i] * (at - reached[i]) / (reached[i + 1] - reached[i])
        yield (float(row), float(col)), float(np.arctan2(steps[i, 0], steps[i, 1]))


def split_polygon(polygon: Path, area_m2: float, rng: np.random.Generator) -> list[Path]:
    """Cut a convex polygon across its longer axis, again and again, into parts of about ``area_m2``."""
    if _area(polygon) < area_m2 * rng.uniform(0.8, 2.2):
        return [polygon]
    centred = polygon - polygon.mean(axis=0)
    _, _, axes = np.linalg.svd(centred)
    turn = rng.normal(0, 0.07)
    normal = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ axes[0]
    distance = centred @ normal
    distance = distance - rng.uniform(-0.15, 0.15) * np.ptp(distance)
    parts = []
    for sign in (1.0, -1.0):
        part = _keep_positive(polygon, distance * sign)
        parts += split_polygon(part, area_m2, rng) if len(part) >= 3 else []
    return parts


def inside_polygon(window: Window, polygon: Path) -> Floats:
    """Return how far inside a convex polygon each pixel lies, (h, w) in metres, negative outside."""
    inside = np.full((window.row_m.size, window.col_m.size), np.inf, np.float32)
    centre = polygon.mean(axis=0)
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        direction = b - a
        length = float(np.hypot(*direction))
        if length < GSD_M:
            continue
        normal = np.array([direction[1], -direction[0]]) / length
        if (centre - a) @ normal < 0:
            normal = -normal
        off = (window.row_m - a[0]) * np.float32(normal[0]) + (window.col_m - a[1]) * np.float32(normal[1])
        np.minimum(inside, off, out=inside, casting="same_kind")
    return inside


def _area(polygon: Path) -> float:
    row, col = polygon.T
    return 0.5 * abs(float(row @ np.roll(col, -1) - col @ np.roll(row, -1)))


def _keep_positive(polygon: Path, distance: NDArray[np.float64]) -> Path:
    kept = []
    for i, (point, here) in enumerate(zip(polygon, distance, strict=True)):
        following, there = polygon[(i + 1) % len(polygon)], distance[(i + 1) % len(polygon)]
        if here >= 0:
            kept.append(point)
        if (here >= 0) != (there >= 0):
            kept.append(point + (following - point) * here / (here - there))
    return np.asarray(kept)
