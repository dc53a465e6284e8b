"""Where things are: the plan of a scene, painted from the ground up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geocentroids_tiler.scene.buildings import CARS, paint_car, paint_pitch
from geocentroids_tiler.scene.canvas import Canvas, Point
from geocentroids_tiler.scene.land import (
    BRIDGE,
    DIRT_ROAD,
    FIELD_KINDS,
    LANE,
    MAIN_ROAD,
    STREET,
    FieldKind,
    paint_farm_track,
    paint_field,
    paint_meadow,
    paint_river,
    paint_road,
)
from geocentroids_tiler.scene.plants import (
    BROADLEAF,
    DARK,
    Crown,
    choose,
    grow_crowns,
    paint_forest_floor,
    plant_forest,
    plant_wild,
)
from geocentroids_tiler.scene.shapes import Frame, Path, smooth_path, split_polygon, walk
from geocentroids_tiler.scene.sites import build_business_park, build_farm
from geocentroids_tiler.scene.village import StreetGrid, build_village, reserve


@dataclass(frozen=True)
class Plan:
    """The lines that everything else follows, in metres."""

    main_road: Path
    lane: Path
    dirt_road: Path
    drives: list[Path]
    river: Path
    fields: list[Path]
    village: Frame
    grid: StreetGrid
    park: Frame
    farm: Frame
    pitch: Frame


def draw_plan(canvas: Canvas) -> Plan:
    """Draw the plan of a scene: the same arrangement at every size, moved about a little by the seed."""
    rng, extent = canvas.rng, canvas.extent_m

    def place(row: float, col: float) -> Point:
        return extent * (row + rng.normal(0, 0.008)), extent * (col + rng.normal(0, 0.008))

    main = smooth_path([place(0.42, -0.08), place(0.44, 0.2), place(0.53, 0.45), place(0.585, 0.7), place(0.56, 1.08)])
    river = smooth_path(
        [
            place(0.70, -0.12), place(0.705, 0.10), place(0.79, 0.22), place(0.765, 0.40),
            place(0.86, 0.55), place(0.845, 0.72), place(0.94, 0.84), place(1.12, 0.88),
        ]
    )  # fmt: skip
    village = Frame(place(0.285, 0.67), 0.13 + float(rng.normal(0, 0.03)))
    park = Frame(place(0.255, 0.2), 0.2)
    farm = Frame(place(0.70, 0.83), float(rng.normal(0.3, 0.1)))
    lane = smooth_path(
        [main[len(main) * 2 // 5], place(0.62, 0.36), place(0.76, 0.335), place(0.9, 0.3), place(1.1, 0.33)]
    )
    dirt = smooth_path([main[len(main) * 3 // 4], place(0.64, 0.755), farm.to_ground(-8, -10), farm.to_ground(2, 2)])
    grid = StreetGrid.filling((extent * 0.5, extent * 0.34))
    drives = [
        _drive_to(main, park, 0.0, extent * 0.05),
        *(_drive_to(main, village, along, grid.street_at(grid.rows - 1)) for along in grid.gates()),
    ]
    around = Frame((extent / 2, extent / 2), float(rng.normal(0.28, 0.05)))
    half = extent * 0.85
    square = np.array(
        [
            around.to_ground(along, across)
            for along, across in ((-half, -half), (half, -half), (half, half), (-half, half))
        ]
    )
    fields = split_polygon(square, max(extent**2 / 34, 900.0), rng)
    pitch = Frame(place(0.635, 0.53), 0.24)
    return Plan(main, lane, dirt, drives, river, fields, village, grid, park, farm, pitch)


def _drive_to(road: Path, frame: Frame, along_m: float, across_m: float) -> Path:
    """Return the way from a place in a frame, straight on across it, to the road."""
    start = np.array(frame.to_ground(along_m, across_m))
    ahead = np.array(frame.to_ground(along_m, across_m + 1.0)) - start
    beside = (road - start) @ np.array([ahead[1], -ahead[0]])
    end = road[int(np.abs(beside).argmin())]
    return np.linspace(start, end, 12)


def paint_scene(canvas: Canvas) -> None:
    """Paint a whole scene on an empty canvas."""
    plan, extent = draw_plan(canvas), canvas.extent_m
    crowns = grow_crowns(canvas)
    paint_meadow(canvas)
    woods = _paint_fields(canvas, plan)
    for wood in woods:
        paint_forest_floor(canvas, wood)
    for field in plan.fields[::4]:
        paint_farm_track(canvas, field[:3])
    paint_river(canvas, plan.river, min(19.0, extent * 0.028))
    paint_road(canvas, plan.dirt_road, DIRT_ROAD)
    paint_road(canvas, plan.lane, LANE)
    _bridge_river(canvas, plan)
    if extent > 400:
        reserve(canvas, plan.pitch, (104, 70))
        paint_pitch(canvas, plan.pitch)
    for drive in plan.drives:
        paint_road(canvas, drive, STREET)
    build_business_park(canvas, crowns, plan.park, (extent * 0.29, extent * 0.165))
    build_village(canvas, crowns, plan.village, plan.grid)
    paint_road(canvas, plan.main_road, MAIN_ROAD)
    build_farm(canvas, crowns, plan.farm)
    _drive(canvas, plan)
    for wood in woods:
        plant_forest(canvas, crowns, wood)
    _plant_countryside(canvas, crowns, plan)


def _paint_fields(canvas: Canvas, plan: Plan) -> list[Path]:
    """Paint the fields, each unlike the one before, and return those that are to be forest."""
    extent, woods = canvas.extent_m, []
    last: FieldKind | None = None
    for polygon in plan.fields:
        row, col = polygon.mean(axis=0) / extent
        if np.hypot(row - 0.02, col - 0.45) < 0.13 or np.hypot(row - 0.97, col - 0.55) < 0.16:
            woods.append(polygon)
        kinds = [kind for kind in FIELD_KINDS if kind is not last]
        last = kinds[int(canvas.rng.integers(len(kinds)))]
        side = polygon[1] - polygon[0]
        paint_field(canvas, polygon, last, float(np.arctan2(side[0], side[1])))
    return woods


def _bridge_river(canvas: Canvas, plan: Plan) -> None:
    """Carry the lane over the river on a deck that throws a shadow."""
    gaps = np.min(np.hypot(*(plan.lane[:, None, :] - plan.river[None, :, :]).transpose(2, 0, 1)), axis=1)
    over = np.flatnonzero(gaps < 30)
    if over.size > 1:
        paint_road(canvas, plan.lane[over[0] : over[-1] + 1], BRIDGE)


def _drive(canvas: Canvas, plan: Plan) -> None:
    """Put traffic on the main road and the lane, on the right-hand side."""
    for path, every_m, off_m in ((plan.main_road, 26.0, 2.0), (plan.lane, 60.0, 1.3)):
        for point, heading in walk(path, every_m):
            if canvas.rng.random() < 0.45:
                side = float(canvas.rng.choice((-1, 1)))
                frame = Frame(point, heading).at(canvas.rng.uniform(-9, 9), side * off_m)
                lorry = canvas.rng.random() < 0.12
                paint_car(canvas, frame, choose(canvas, CARS), 12.0 if lorry else 4.4, 3.6 if lorry else 1.4)


def _plant_countryside(canvas: Canvas, crowns: list[Crown], plan: Plan) -> None:
    """Plant hedges on some field edges, trees along the river and the roads, and some that stand alone."""
    rng, extent = canvas.rng, canvas.extent_m
    for polygon in plan.fields:
        if rng.random() < 0.75:
            first = int(rng.integers(len(polygon)))
            hedge = np.array([polygon[first], polygon[(first + 1) % len(polygon)]])
            _plant_along(canvas, crowns, hedge, 2.6, 0.0, (0.9, 3.6) if rng.random() < 0.6 else (0.8, 1.7), 0.85)
    for side in (-1, 1):
        for off_m in (24.0, 28.5, 34.0):
            _plant_along(canvas, crowns, plan.river, 4.5, side * off_m, (1.4, 4.6), 0.55)
        _plant_along(canvas, crowns, plan.main_road, 9.0, side * 9.5, (1.8, 3.2), 0.6)
        _plant_along(canvas, crowns, plan.lane, 11.0, side * 7.0, (1.5, 3.5), 0.4)
    alone = rng.uniform(0, extent, (int(extent**2 / 5200), 2))
    plant_wild(canvas, crowns, [(float(r), float(c)) for r, c in alone], (1.2, 5.2), BROADLEAF + DARK)


def _plant_along(
    canvas: Canvas,
    crowns: list[Crown],
    path: Path,
    spacing_m: float,
    off_m: float,
    radius_m: tuple[float, float],
    share: float,
) -> None:
    """Plant a loose row of trees beside a path, with gaps where the ground is soft noise above ``share``."""
    points = []
    for point, heading in walk(path, spacing_m):
        gap = float(canvas.soft(point[0] * 0.6 + off_m, point[1] * 0.6))
        if canvas.rng.random() < share and gap < 0.9:
            jitter = canvas.rng.normal(0, 0.22 * spacing_m, 2)
            points.append(Frame(point, heading).to_ground(float(jitter[0]), off_m + float(jitter[1])))
    plant_wild(canvas, crowns, points, radius_m, BROADLEAF + DARK[:2])
