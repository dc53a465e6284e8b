"""A village: streets, lots with houses and gardens, a green."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geocentroids_tiler.scene.buildings import (
    CARS,
    FLAT,
    METAL,
    TILES,
    paint_box,
    paint_car,
    paint_flat_roof,
    paint_gable,
    paint_patch,
    paint_pool,
)
from geocentroids_tiler.scene.canvas import BARE, GRASS, ROAD, TREE, Canvas, Colour, edge
from geocentroids_tiler.scene.land import STREET, paint_road
from geocentroids_tiler.scene.plants import BROADLEAF, DARK, Crown, choose, plant
from geocentroids_tiler.scene.shapes import Frame, inside_rectangle

LAWNS: tuple[Colour, ...] = ((128, 137, 84), (137, 142, 92), (117, 130, 77), (152, 148, 104), (143, 138, 96))
PAVING: tuple[Colour, ...] = ((182, 175, 162), (168, 164, 156), (176, 152, 132))
STREET_GAP_M = 66.0
BLOCK_M = 132.0
KERB_M = 5.4  # half of a street and its pavement


@dataclass(frozen=True)
class Lot:
    """A garden with its house; the street lies towards negative ``across`` of the frame."""

    frame: Frame
    width_m: float
    depth_m: float


@dataclass(frozen=True)
class StreetGrid:
    """The blocks of a village in its frame: ``columns`` along the streets, ``rows`` across them."""

    columns: int
    rows: int

    @classmethod
    def filling(cls, size_m: tuple[float, float]) -> StreetGrid:
        """Return the grid that fits an area of this size (along, across) best."""
        return cls(max(1, round(size_m[0] / BLOCK_M)), max(1, round(size_m[1] / STREET_GAP_M)))

    def row_length(self, row: int) -> int:
        """Return how many blocks a row has: the last row ends early, as villages do."""
        return self.columns - 1 if self.columns > 1 and row == self.rows - 1 else self.columns

    def edge_at(self, column: int) -> float:
        """Return ``along`` of the near edge of a column of blocks."""
        return (column - self.columns / 2) * BLOCK_M

    def street_at(self, row: int) -> float:
        """Return ``across`` of the street in the middle of a row of blocks."""
        return (row - (self.rows - 1) / 2) * STREET_GAP_M

    def gates(self) -> list[float]:
        """Return ``along`` of the cross streets, by which the village is entered."""
        return [self.edge_at(column) for column in range(1, self.columns)]


def reserve(canvas: Canvas, frame: Frame, size_m: tuple[float, float]) -> None:
    """Mark a rectangle as built, so that nothing grows wild in it."""
    window = frame.box(canvas, *size_m)
    if window is not None:
        canvas.built[window.slices] |= inside_rectangle(*frame.axes(window), *size_m) > 0


def build_village(canvas: Canvas, crowns: list[Crown], frame: Frame, grid: StreetGrid) -> None:
    """Build a village: parallel streets with lots on both sides, cross streets, a green with a school."""
    lots: list[Lot] = []
    greens: list[Frame] = []
    for row in range(grid.rows):
        for column in range(grid.row_length(row)):
            block = frame.at(grid.edge_at(column) + BLOCK_M / 2, grid.street_at(row))
            reserve(canvas, block, (BLOCK_M + 2, STREET_GAP_M + 2))
            lots += _parcel(canvas, block.at(0, 0, np.pi))
            if grid.rows > 2 and (column, row) == (grid.columns // 2, 1):
                greens.append(block)
            else:
                lots += _parcel(canvas, block)
    for lot in lots:
        _lay_garden(canvas, lot)
    _lay_streets(canvas, frame, grid)
    for lot in lots:
        if canvas.rng.random() < 0.94:
            _build_lot(canvas, crowns, lot)
    for green in greens:
        _lay_green(canvas, crowns, green)
    _line_streets(canvas, crowns, frame, grid)


def _parcel(canvas: Canvas, block: Frame) -> list[Lot]:
    """Cut the side of a block towards positive ``across`` into lots of 13 m to 21 m along the street."""
    depth = STREET_GAP_M / 2 - KERB_M
    lots, at = [], -BLOCK_M / 2 + KERB_M
    while at < BLOCK_M / 2 - KERB_M - 8:
        width = min(float(canvas.rng.uniform(13, 21)), BLOCK_M / 2 - KERB_M - at)
        lots.append(Lot(block.at(at + width / 2, KERB_M + depth / 2), width, depth))
        at += width
    return lots


def _lay_garden(canvas: Canvas, lot: Lot) -> None:
    """Paint the ground of a lot, with beds and worn places, and a hedge or a fence around it."""
    rng, size = canvas.rng, (lot.width_m, lot.depth_m)
    paint_patch(canvas, lot.frame, size, choose(canvas, LAWNS), GRASS)
    for _ in range(int(rng.integers(0, 4))):
        spot = lot.frame.at(rng.uniform(-0.35, 0.35) * lot.width_m, rng.uniform(-0.1, 0.42) * lot.depth_m)
        colour = choose(canvas, (*PAVING, (150, 130, 100), (104, 113, 66), (126, 112, 84)))
        paint_patch(canvas, spot, (float(rng.uniform(2, 7)), float(rng.uniform(2, 6))), colour, BARE, 1.0)
    window = lot.frame.box(canvas, *size)
    if window is None:
        return
    inside = inside_rectangle(*lot.frame.axes(window), *size)
    if rng.random() < 0.45:
        ragged = 0.25 * canvas.soft(window.row_m * 3, window.col_m * 3)
        hedge = edge(0.8 - np.abs(inside - 0.5) + ragged, 0.5)
        lumps = canvas.tinted(window, (88, 104, 60), 11, 5)
        canvas.paint(window, hedge, lumps, TREE, 1.7)
    else:
        canvas.paint(window, edge(0.16 - np.abs(inside - 0.2)) * 0.8, (178, 172, 160), None, None)
        canvas.height_m[window.slices][np.abs(inside - 0.2) < 0.16] = 1.3


def _lay_streets(canvas: Canvas, frame: Frame, grid: StreetGrid) -> None:
    """Pave a street through the middle of each row of blocks, and cross streets between them."""
    for row in range(grid.rows):
        across, stop = grid.street_at(row), grid.edge_at(grid.row_length(row))
        paint_road(canvas, frame.line((grid.edge_at(0) + 4, across), (stop - 4, across)), STREET)
    for along in grid.gates():
        ends = (along, grid.street_at(0)), (along, grid.street_at(grid.rows - 1) + STREET_GAP_M / 2)
        paint_road(canvas, frame.line(*ends), STREET)


def _lay_green(canvas: Canvas, crowns: list[Crown], block: Frame) -> None:
    """Lay out a park with paths under trees, and beside it a school with its court and car park."""
    depth = STREET_GAP_M / 2 - KERB_M
    middle = block.at(0, KERB_M + depth / 2)
    paint_patch(canvas, middle, (BLOCK_M - 2 * KERB_M, depth), (126, 138, 82), GRASS)
    paint_patch(canvas, middle.at(-30, 0), (50, 1.8), (190, 176, 148), BARE)
    paint_patch(canvas, middle.at(-32, 0, 1.1), (24, 1.8), (190, 176, 148), BARE)
    paint_patch(canvas, middle.at(28, 0), (58, depth - 3), (172, 168, 158), ROAD)
    paint_patch(canvas, middle.at(8, 2), (13, 19), (158, 104, 82), ROAD)
    paint_flat_roof(canvas, middle.at(36, 4), (34, 13), FLAT[2], 7.0)
    paint_flat_roof(canvas, middle.at(24, -3, np.pi / 2), (16, 10), FLAT[0], 4.0)
    for along in canvas.rng.uniform(-58, -4, 26):
        spot = middle.to_ground(float(along), float(canvas.rng.uniform(-0.45, 0.45)) * depth)
        if canvas.cover_at(spot) in (GRASS, TREE):
            plant(canvas, crowns, spot, float(canvas.rng.uniform(1.8, 5.0)), choose(canvas, BROADLEAF + DARK))


def _build_lot(canvas: Canvas, crowns: list[Crown], lot: Lot) -> None:
    """Build a house with its drive, and what else belongs to it, on one lot."""
    rng, frame = canvas.rng, lot.frame
    front = -lot.depth_m / 2
    depth = float(rng.uniform(8.0, 11.5))
    width = float(min(lot.width_m - rng.uniform(3.5, 5.5), 15.0))
    setback = float(rng.uniform(3.5, 6.5))
    side = int(rng.choice((-1, 1)))
    house = frame.at(-side * (lot.width_m - width) / 2 * 0.7, front + setback + depth / 2)
    drive = side * (lot.width_m / 2 - 1.7)
    reach = setback + float(rng.uniform(1.0, depth))
    paint_patch(canvas, frame.at(drive, front + reach / 2), (2.9, reach), choose(canvas, PAVING), BARE)
    if rng.random() < 0.6:
        car = frame.at(drive, front + reach - 3.0, np.pi / 2 + rng.normal(0, 0.05))
        paint_car(canvas, car, choose(canvas, CARS))
    build_house(canvas, house, (width, depth))
    _furnish_garden(canvas, crowns, lot, front + setback + depth + 1.5)


def build_house(canvas: Canvas, house: Frame, size_m: tuple[float, float]) -> None:
    """Build a house under a pitched or a flat roof, some with a wing at a right angle."""
    rng, (width, depth) = canvas.rng, size_m
    if rng.random() < 0.22:
        paint_flat_roof(canvas, house, size_m, choose(canvas, FLAT), float(rng.uniform(3.2, 6.5)))
        return
    colour, eave, hipped = choose(canvas, TILES), float(rng.uniform(2.8, 5.0)), bool(rng.random() < 0.45)
    if width < depth:
        house, width, depth = house.at(0, 0, np.pi / 2), depth, width
    paint_gable(canvas, house, (width, depth), colour, eave, hipped)
    if rng.random() < 0.45:
        wing = float(rng.uniform(4.5, 6.0))
        along = float(rng.choice((-1, 1))) * (width - wing) / 2
        paint_gable(canvas, house.at(along, depth * 0.35, np.pi / 2), (depth * 0.9, wing), colour, eave - 0.4, hipped)


def _furnish_garden(canvas: Canvas, crowns: list[Crown], lot: Lot, back_m: float) -> None:
    """Put a shed, a pool and trees behind the house, and a bush or two in front."""
    rng, frame = canvas.rng, lot.frame
    room = lot.depth_m / 2 - back_m
    if room > 5 and rng.random() < 0.4:
        corner = frame.at(float(rng.choice((-1, 1))) * (lot.width_m / 2 - 2.6), lot.depth_m / 2 - 2.4)
        paint_box(canvas, corner, (3.6, 2.8), choose(canvas, (*METAL, *TILES)), 2.4)
    if room > 8 and rng.random() < 0.1:
        paint_pool(canvas, frame.at(rng.uniform(-1.5, 1.5), back_m + 4.0), (7.5, 3.6))
    for _ in range(int(rng.integers(1, 6))):
        spot = frame.to_ground(
            rng.uniform(-0.5, 0.5) * lot.width_m, rng.uniform(back_m + 0.5, max(back_m + 1, lot.depth_m / 2))
        )
        if canvas.cover_at(spot) in (GRASS, TREE):
            plant(canvas, crowns, spot, float(rng.uniform(0.8, 3.4)), choose(canvas, BROADLEAF + DARK[:2]))
    for _ in range(int(rng.integers(0, 3))):
        spot = frame.to_ground(rng.uniform(-0.45, 0.45) * lot.width_m, -lot.depth_m / 2 + rng.uniform(0.8, 3.0))
        if canvas.cover_at(spot) == GRASS:
            plant(canvas, crowns, spot, float(rng.uniform(0.6, 1.7)), choose(canvas, BROADLEAF))


def _line_streets(canvas: Canvas, crowns: list[Crown], frame: Frame, grid: StreetGrid) -> None:
    """Park cars along the kerbs and plant street trees on the pavements."""
    rng = canvas.rng
    for row in range(grid.rows):
        leafy = rng.random() < 0.6
        street, stop = grid.street_at(row), grid.edge_at(grid.row_length(row))
        for side in (-1, 1):
            for along in np.arange(grid.edge_at(0) + 10, stop - 8, 7.5):
                draw = rng.random()
                if draw < 0.18:
                    car = frame.at(along, street + side * 2.2, rng.normal(0, 0.02))
                    paint_car(canvas, car, choose(canvas, CARS))
                elif leafy and draw > 0.55:
                    spot = frame.to_ground(along, street + side * 4.5)
                    if canvas.cover_at(spot) == BARE:
                        plant(canvas, crowns, spot, float(rng.uniform(1.4, 2.7)), choose(canvas, BROADLEAF[:3]))
