"""Built places outside the village: a business park, a farmstead."""

from __future__ import annotations

import numpy as np

from geocentroids_tiler.scene.buildings import (
    CARS,
    METAL,
    TILES,
    paint_box,
    paint_car,
    paint_car_park,
    paint_gable,
    paint_hall,
    paint_patch,
)
from geocentroids_tiler.scene.canvas import BARE, GRASS, ROAD, Canvas, Colour
from geocentroids_tiler.scene.plants import BROADLEAF, DARK, Crown, choose, plant
from geocentroids_tiler.scene.shapes import Frame
from geocentroids_tiler.scene.village import LAWNS, build_house, reserve

CONTAINERS: tuple[Colour, ...] = (
    (78, 112, 158),
    (164, 84, 66),
    (196, 150, 96),
    (200, 200, 192),
    (126, 152, 138),
    (148, 112, 96),
)


def build_business_park(canvas: Canvas, crowns: list[Crown], frame: Frame, size_m: tuple[float, float]) -> None:
    """Build large halls on a paved yard, with a car park, lorries, containers and a row of trees."""
    rng, (length, width) = canvas.rng, size_m
    reserve(canvas, frame, size_m)
    paint_patch(canvas, frame, (length, width), (134, 139, 86), GRASS, 1.0)
    paint_patch(canvas, frame.at(0, 2), (length - 10, width - 14), (168, 165, 156), ROAD, 0.6)
    count = max(1, int(length // 62))
    for i in range(count):
        along = (i + 0.5) * length / count - length / 2
        hall = (min(length / count - 12, 62.0), min(width * 0.42, float(rng.uniform(34, 50))))
        paint_hall(canvas, frame.at(along, -width / 2 + hall[1] / 2 + 9), hall, choose(canvas, METAL))
        paint_patch(canvas, frame.at(along + hall[0] / 2 + 6, -width / 2 + 24), (5, 30), LAWNS[0], GRASS)
        for k in range(int(rng.integers(1, 5))):
            lorry = frame.at(along - 14 + 6.5 * k, -width / 2 + hall[1] + 19, np.pi / 2 + rng.normal(0, 0.04))
            paint_car(canvas, lorry, choose(canvas, (*METAL, (152, 62, 54), (70, 98, 142))), 13.0, 3.6)
    park = (length * 0.6, min(26.5, width * 0.25))
    paint_car_park(canvas, frame.at(-length * 0.14, width / 2 - park[1] / 2 - 8), park, 0.55)
    if width > 70:  # in a small scene there is no room beside the halls
        _stack_containers(canvas, frame.at(length * 0.36, width / 2 - 20), length * 0.2)
    for along in np.arange(-length / 2 + 4, length / 2 - 3, 8.5):
        spot = frame.to_ground(along + rng.normal(0, 0.5), width / 2 - 3)
        if abs(along) > 8:  # the way in
            plant(canvas, crowns, spot, float(rng.uniform(1.9, 3.0)), choose(canvas, BROADLEAF))


def _stack_containers(canvas: Canvas, frame: Frame, length_m: float) -> None:
    """Stack shipping containers in two rows, with gaps."""
    rng = canvas.rng
    for across in (-7.0, 7.0):
        for along in np.arange(-length_m / 2, length_m / 2, 2.9):
            if rng.random() < 0.75:
                spot = frame.at(float(along), across + rng.normal(0, 0.3), np.pi / 2)
                paint_box(canvas, spot, (12.2, 2.45), choose(canvas, CONTAINERS), 2.6 * float(rng.integers(1, 3)))


def build_farm(canvas: Canvas, crowns: list[Crown], frame: Frame) -> None:
    """Build a farmstead: house, two barns around a dirt yard, tall trees on the weather side."""
    rng = canvas.rng
    reserve(canvas, frame, (64, 52))
    paint_patch(canvas, frame, (62, 50), (124, 133, 80), GRASS, 6.0)
    paint_patch(canvas, frame.at(2, 2), (38, 28), (178, 157, 124), BARE, 5.0)
    paint_hall(canvas, frame.at(-2, 17), (30.0, 12.0), choose(canvas, METAL))
    paint_gable(canvas, frame.at(22, -1, np.pi / 2), (22.0, 9.5), choose(canvas, TILES), 3.6, hipped=False)
    build_house(canvas, frame.at(-20, -4, np.pi / 2), (13.0, 9.0))
    for _ in range(3):
        parked = frame.at(rng.uniform(-10, 12), rng.uniform(-6, 8), rng.uniform(0, 3))
        paint_car(canvas, parked, choose(canvas, CARS))
    for along in np.arange(-30, 31, 5.5):
        for across in (-23.0, -18.5):
            spot = frame.to_ground(along + rng.normal(0, 1.2), across + rng.normal(0, 1.0))
            plant(canvas, crowns, spot, float(rng.uniform(2.0, 4.4)), choose(canvas, DARK + BROADLEAF[:2]))
