"""Things that people put on the ground: houses, halls, cars, pools, car parks and pitches."""

from __future__ import annotations

import numpy as np

from geocentroids_tiler.scene.canvas import (
    BARE,
    GRASS,
    ROAD,
    ROOF,
    SUN_TOWARDS,
    WATER,
    Canvas,
    Colour,
    Floats,
    Window,
    edge,
    facing,
)
from geocentroids_tiler.scene.plants import choose
from geocentroids_tiler.scene.shapes import Frame, inside_rectangle

TILES: tuple[Colour, ...] = (
    (164, 101, 76),
    (152, 92, 70),
    (173, 116, 88),
    (141, 97, 80),
    (120, 112, 106),
    (104, 101, 100),
    (148, 142, 134),
)
FLAT: tuple[Colour, ...] = ((198, 194, 184), (168, 165, 158), (226, 222, 212), (182, 156, 137))
METAL: tuple[Colour, ...] = ((240, 240, 234), (232, 234, 232), (188, 202, 212), (224, 218, 204), (163, 171, 174))
CARS: tuple[Colour, ...] = (
    (236, 237, 235),
    (232, 232, 229),
    (165, 168, 171),
    (122, 126, 130),
    (62, 64, 68),
    (55, 62, 78),
    (148, 48, 44),
    (72, 90, 128),
)


def paint_patch(
    canvas: Canvas, frame: Frame, size_m: tuple[float, float], colour: Colour, cover: int, soft_m: float = 0.5
) -> None:
    """Paint a level rectangle ``size_m`` (along, across) of ground: lawn, paving, yard, drive."""
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    inside = inside_rectangle(*frame.axes(window), *size_m)
    canvas.paint(window, edge(inside, soft_m), canvas.tinted(window, colour, 4, 4), cover)


def _lit(frame: Frame, rise_along: Floats | float, rise_across: Floats | float) -> Floats:
    """Return the brightness of a roof plane from its slopes in the frame of the house."""
    cos, sin = np.cos(frame.angle), np.sin(frame.angle)
    return facing(
        np.asarray(rise_along) * sin + np.asarray(rise_across) * cos,
        np.asarray(rise_along) * cos - np.asarray(rise_across) * sin,
    )


def paint_gable(
    canvas: Canvas, frame: Frame, size_m: tuple[float, float], colour: Colour, eave_m: float, hipped: bool
) -> None:
    """Paint a pitched roof, its ridge along the frame, with tile courses, ridge caps and a chimney."""
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    length, width = size_m
    along, across = frame.axes(window)
    inside = inside_rectangle(along, across, length, width)
    to_side, to_end = width / 2 - np.abs(across), length / 2 - np.abs(along)
    pitch = np.float32(canvas.rng.uniform(0.4, 0.6))
    end_face = (to_end < to_side) & hipped
    rise_across = np.where(end_face, 0.0, -np.sign(across) * pitch)
    rise_along = np.where(end_face, -np.sign(along) * pitch, 0.0)
    run = np.minimum(to_side, to_end) if hipped else to_side
    courses = 0.025 * np.sin(run * np.float32(2 * np.pi / 0.8)) + 0.02 * canvas.fine(along, across * 0.3)
    ridge = 0.16 * edge(0.22 - np.abs(across)) * ~end_face
    if hipped:
        ridge = np.maximum(ridge, 0.10 * edge(0.2 - 0.7 * np.abs(to_side - to_end)))
    light = _lit(frame, rise_along, rise_across) + courses + ridge - 0.12 * edge(0.25 - inside)
    shade = canvas.tinted(window, colour, 2.5, 5) * light[..., None]
    canvas.paint(window, edge(inside, 0.3), shade, ROOF, (eave_m + pitch * run).astype(np.float32))
    if canvas.rng.random() < 0.6:
        spot = frame.at(canvas.rng.uniform(-0.3, 0.3) * length, canvas.rng.uniform(-0.15, 0.15) * width)
        paint_box(canvas, spot, (0.9, 0.7), (150, 118, 102), eave_m + float(pitch) * width / 2 + 0.8)


def paint_box(
    canvas: Canvas, frame: Frame, size_m: tuple[float, float], colour: Colour, height_m: float, cover: int = ROOF
) -> None:
    """Paint a plain block: a chimney, an air conditioner, a container, a wall."""
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    inside = inside_rectangle(*frame.axes(window), *size_m)
    canvas.paint(window, edge(inside, 0.3), colour, cover, height_m)


def paint_flat_roof(canvas: Canvas, frame: Frame, size_m: tuple[float, float], colour: Colour, top_m: float) -> None:
    """Paint a flat roof with stains, a bright parapet and what stands on such roofs."""
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    along, across = frame.axes(window)
    inside = inside_rectangle(along, across, *size_m)
    canvas.paint(window, edge(inside, 0.3), canvas.tinted(window, colour, 3, 8), ROOF, top_m)
    rim = edge(inside, 0.3) * edge(0.35 - inside, 0.3)
    canvas.paint(window, rim, (214, 210, 201), ROOF, top_m + 0.5)
    for _ in range(int(canvas.rng.integers(1, 4))):
        along_m, across_m = canvas.rng.uniform(-0.35, 0.35, 2) * size_m
        size = (float(canvas.rng.uniform(0.8, 2.2)), float(canvas.rng.uniform(0.8, 1.6)))
        paint_box(canvas, frame.at(along_m, across_m), size, (190, 192, 190), top_m + 1.2)


def paint_hall(canvas: Canvas, frame: Frame, size_m: tuple[float, float], colour: Colour) -> None:
    """Paint a large metal hall: low pitch, sheet seams, skylight strips, sometimes solar panels."""
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    length, width = size_m
    along, across = frame.axes(window)
    inside = inside_rectangle(along, across, length, width)
    seams = 0.02 * np.sin(along * np.float32(2 * np.pi / 1.1)) - 0.03 * edge(0.2 - np.abs(np.mod(along, 6.0) - 3))
    dirt = 0.025 * canvas.fine(along * 0.6, across * 0.05) + 0.015 * canvas.soft(along, across)
    light = _lit(frame, 0.0, -np.sign(across) * np.float32(0.12)) + seams + dirt
    light += 0.08 * edge(0.3 - np.abs(across)) - 0.1 * edge(0.3 - inside)
    body = np.asarray(colour, np.float32) * light[..., None]
    strip = edge(0.5 - np.abs(np.mod(along, 12.0) - 6.0)) * edge(width * 0.16 - np.abs(np.abs(across) - width / 4))
    body += strip[..., None] * (np.array([150, 168, 172], np.float32) - body) * 0.8
    top = 7.0 + 0.12 * (width / 2 - np.abs(across))
    canvas.paint(window, edge(inside, 0.3), body, ROOF, top.astype(np.float32))
    if canvas.rng.random() < 0.5:
        _paint_solar(canvas, window, frame, (length * 0.7, width * 0.3), width * 0.25)


def _paint_solar(canvas: Canvas, window: Window, frame: Frame, size_m: tuple[float, float], offset_m: float) -> None:
    """Paint rows of dark panels on the half of a roof that faces the sun."""
    sunny = np.cos(frame.angle) * SUN_TOWARDS[0] - np.sin(frame.angle) * SUN_TOWARDS[1]
    along, across = frame.axes(window)
    across = across - np.float32(np.sign(sunny) * offset_m)
    inside = inside_rectangle(along, across, *size_m)
    frames = np.minimum(np.abs(np.mod(along, 1.1) - 0.55), np.abs(np.mod(across, 2.2) - 1.1))
    aisles = np.abs(np.mod(across, 4.4) - 2.2) > 0.4
    glass = np.array([66, 78, 102], np.float32) + 22 * edge(0.08 - frames)[..., None]
    canvas.paint(window, edge(inside, 0.3) * aisles, glass, height_m=None)


def paint_car(canvas: Canvas, frame: Frame, colour: Colour, length_m: float = 4.4, height_m: float = 1.4) -> None:
    """Paint a car, heading along the frame: body, rounded corners, dark windscreens."""
    width = 1.85 if length_m < 6 else 2.5
    window = frame.box(canvas, length_m, width)
    if window is None:
        return
    along, across = frame.axes(window)
    inside = inside_rectangle(along, across, length_m, width)
    corner = 0.5 - np.hypot(
        np.maximum(np.abs(along) - length_m / 2 + 0.5, 0), np.maximum(np.abs(across) - width / 2 + 0.5, 0)
    )
    body = np.asarray(colour, np.float32) * (1.0 - 0.25 * edge(0.2 - inside, 0.5))[..., None]
    if length_m < 6:
        glass = np.maximum(edge(0.35 - np.abs(along - 0.75), 0.3), edge(0.3 - np.abs(along + 1.45), 0.3))
        body += (0.85 * glass * edge(0.75 - np.abs(across)))[..., None] * (np.float32(48) - body)
    road_m = float(canvas.height_m[window.slices].min())  # more than 0 on a bridge
    canvas.paint(window, edge(np.minimum(inside, corner), 0.3), body, ROAD, road_m + height_m)


def paint_car_park(canvas: Canvas, frame: Frame, size_m: tuple[float, float], full: float) -> None:
    """Paint an asphalt car park with rows of bays, a share ``full`` of them taken."""
    length, width = size_m
    paint_patch(canvas, frame, size_m, (139, 138, 133), ROAD, 0.3)
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    along, across = frame.axes(window)
    centres = np.arange(-width / 2 + 2.9, width / 2 - 2.0, 8.2)
    in_row = np.min([np.abs(across - np.float32(c)) for c in centres], axis=0) < 2.5
    lines = edge(0.07 - np.abs(np.mod(along, 2.6) - 1.3)) * in_row * (np.abs(along) < length / 2 - 1.4)
    canvas.paint(window, (0.65 * lines).astype(np.float32), (224, 222, 212), height_m=None)
    for across_m in centres:
        for along_m in np.arange(2.6 * np.ceil((2.0 - length / 2) / 2.6), length / 2 - 2.0, 2.6):
            if canvas.rng.random() < full:
                turn = np.pi / 2 * canvas.rng.choice((-1, 1)) + canvas.rng.normal(0, 0.03)
                paint_car(canvas, frame.at(along_m, across_m + canvas.rng.normal(0, 0.15), turn), choose(canvas, CARS))


def paint_pool(canvas: Canvas, frame: Frame, size_m: tuple[float, float]) -> None:
    """Paint a swimming pool in its paving."""
    paint_patch(canvas, frame, (size_m[0] + 3.0, size_m[1] + 3.0), (199, 189, 170), BARE)
    window = frame.box(canvas, *size_m)
    if window is None:
        return
    inside = inside_rectangle(*frame.axes(window), *size_m)
    canvas.paint(window, edge(inside, 0.3), canvas.tinted(window, (96, 158, 172), 3, 2), WATER)


def paint_pitch(canvas: Canvas, frame: Frame) -> None:
    """Paint a football pitch of 92 m x 58 m, mown in stripes, worn before the goals."""
    length, width = 92.0, 58.0
    paint_patch(canvas, frame, (length + 8, width + 8), (127, 138, 82), GRASS, 2.0)
    window = frame.box(canvas, length, width)
    if window is None:
        return
    along, across = frame.axes(window)
    inside = inside_rectangle(along, across, length, width)
    stripes = np.where(np.mod(along, 11.5) < 5.75, 5.0, -5.0)[..., None]
    worn = np.exp(-((np.abs(along) - length / 2 + 4) ** 2 + across**2) / 60)[..., None]
    turf = canvas.tinted(window, (115, 136, 74), 4, 4) + stripes * (1 - worn) + worn * np.array([52, 18, 28])
    canvas.paint(window, edge(inside + 1.5, 1.0), turf.astype(np.float32), GRASS)
    off = np.minimum(np.abs(inside), np.where(inside > 0, np.abs(along), 9.0))
    off = np.minimum(off, np.abs(np.hypot(along, across) - 9.15))
    box = inside_rectangle(np.abs(along) - length / 2 + 8.25, across, 16.5, 40.3)
    off = np.minimum(off, np.abs(box))
    canvas.paint(window, 0.8 * edge((0.1 - off).astype(np.float32)), (226, 228, 216), height_m=None)
