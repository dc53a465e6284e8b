"""Random views of the ground: crops of many sizes and places, turned, scaled, cut, and seen through other cameras."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from geocentroids_fit.pretrain.scenes import Scene
from geocentroids_tiler.source.fill import fill_invalid

SCALES = (0.78, 1.2)
"""Ground that a view of the same size may show, in its side."""
ALIGNED_SHARE = 0.4
"""Views as they are served: on the grid and at its scale."""
BEYOND_SHARE = 0.15
"""Views that may reach beyond the image."""
CUT_SHARE = 0.15
"""Views of which a part is cut away, as beside a collar."""
AREA_POWER = 0.5
"""How often a folder is seen grows with its area to this power; its images share that in proportion to theirs."""


@dataclass(frozen=True)
class Views:
    """Views of N x N patches, S = 14 N.

    Attributes:
        pixels: of shape (B, 3, S, S), float32, RGB in [0, 1].
        valid: patches that show data, of shape (B, N, N), bool.
        scene: number of the scene of each.
        centres: row and column of the patches' middles in the scene's patches (the middle of its first is 0, 0), of
            shape (B, N, N, 2), float32.
    """

    pixels: Tensor
    valid: Tensor
    scene: tuple[int, ...]
    centres: Tensor


class Sampler:
    """Draws views of scenes; what is drawn depends on nothing but the generator that is given."""

    def __init__(self, scenes: Sequence[Scene], patch_px: int) -> None:
        self._scenes, self._patch_px = scenes, patch_px
        folders = [scene.image.rpartition("/")[0] for scene in scenes]
        own = np.array([scene.labelled.sum() for scene in scenes], np.float64)
        area: dict[str, float] = {}
        for folder, patches in zip(folders, own, strict=True):
            area[folder] = area.get(folder, 0.0) + patches
        whole = np.array([area[folder] for folder in folders])
        chance = own / whole * whole**AREA_POWER
        self._chance = chance / chance.sum()
        self._places = [np.argwhere(scene.labelled) for scene in scenes]

    def draw(self, count: int, side: int, rng: np.random.Generator) -> Views:
        """Draw views of ``side`` patches a side."""
        places = [self._place(rng) for _ in range(count)]
        return self._views(places, side, rng)

    def draw_pairs(self, count: int, sides: tuple[int, int], rng: np.random.Generator) -> tuple[Views, Views]:
        """Draw pairs of views that show some of the same ground, one of each size."""
        places = [self._place(rng) for _ in range(count)]
        return self._views(places, sides[0], rng), self._views(places, sides[1], rng)

    def _place(self, rng: np.random.Generator) -> tuple[int, NDArray[np.int64]]:
        """Return a scene's number and one of its patches that has data."""
        number = int(rng.choice(len(self._scenes), p=self._chance))
        places = self._places[number]
        return number, places[rng.integers(len(places))]

    def _views(self, places: Sequence[tuple[int, NDArray[np.int64]]], side: int, rng: np.random.Generator) -> Views:
        drawn = [self._view(number, place, side, rng) for number, place in places]
        pixels, valid, centres = (torch.stack(parts) for parts in zip(*drawn, strict=True))
        return Views(pixels, valid, tuple(number for number, _ in places), centres)

    def _view(
        self, number: int, place: NDArray[np.int64], side: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, valid patches and their middles of a view that shows a patch."""
        scene, n = self._scenes[number], self._patch_px
        aligned = rng.random() < ALIGNED_SHARE
        ground = side * n if aligned else round(side * n * rng.uniform(*SCALES))  # pixels of the scene
        middle = (place + 0.5) * n
        first = np.rint(middle - ground * rng.uniform(0.05, 0.95, 2)).astype(np.int64)
        limits = np.array(scene.valid.shape) - ground
        if rng.random() >= BEYOND_SHARE:
            first = np.clip(first, np.minimum(0, limits), np.maximum(0, limits))
        if aligned:
            first = np.clip(first // n, place - side + 1, place) * n
        pixels, valid = crop(scene, first.tolist(), ground)
        if rng.random() < CUT_SHARE:
            kept = valid & _half(ground, rng)
            valid = kept if kept.any() else valid
        if not valid.all():
            pixels = fill_invalid(pixels, valid) if valid.any() else pixels
        view = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
        known = (
            functional.interpolate(torch.from_numpy(valid)[None, None].float(), (side, side), mode="area")[0, 0] >= 0.5
        )
        if ground != side * n:
            view = functional.interpolate(view, (side * n, side * n), mode="bilinear", antialias=True).clamp(0, 1)
        steps = (torch.arange(side) + 0.5) * ground / side
        centres = torch.stack(torch.meshgrid(steps + int(first[0]), steps + int(first[1]), indexing="ij"), dim=-1)
        turn = int(rng.integers(8))
        return (
            _turned(view[0], turn, (1, 2)),
            _turned(known, turn, (0, 1)),
            _turned(centres / n - 0.5, turn, (0, 1)),
        )


def crop(scene: Scene, first: Sequence[int], ground: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Cut a square; beyond the scene there is no data, but its mirror image.

    Args:
        scene: where from.
        first: its first row and column, in pixels.
        ground: its side in pixels.

    Returns:
        Pixels of shape (ground, ground, 3) and which are data, of shape (ground, ground).
    """
    at, inside = [], []
    for start, size in zip(first, scene.valid.shape, strict=True):
        index = np.arange(start, start + ground)
        inside.append((index >= 0) & (index < size))
        back = index % (2 * size)
        at.append(np.where(back < size, back, 2 * size - 1 - back))
    rows, cols = np.ix_(*at)
    return scene.pixels[rows, cols], scene.valid[rows, cols] & inside[0][:, None] & inside[1]


def _half(side: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Return a random half plane of a square, of shape (side, side)."""
    angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.3, 0.3) * side
    row, col = np.ogrid[:side, :side]
    return np.asarray(math.cos(angle) * (col - side / 2) + math.sin(angle) * (row - side / 2) > offset)


def _turned(values: Tensor, turn: int, axes: tuple[int, int]) -> Tensor:
    """Return one of the eight ways to turn or mirror a square."""
    for bit, flipped in ((1, axes[:1]), (2, axes[1:])):
        if turn & bit:
            values = values.flip(flipped)
    return values.transpose(*axes) if turn & 4 else values


def other_camera(pixels: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Return views as another camera on another day would see them.

    Resolution, gamma, exposure, contrast, saturation, white balance, haze, noise and JPEG are changed, each view for
    itself.

    Args:
        pixels: of shape (B, 3, S, S), RGB in [0, 1], on the CPU.
        strength: 1 is strong, 0 changes nothing.
        rng: draws the changes.

    Returns:
        Of the same shape, in [0, 1].
    """
    if strength <= 0:
        return pixels
    count = len(pixels)

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        drawn = rng.uniform(low * strength, high * strength, (count, channels, 1, 1))
        return torch.from_numpy(drawn.astype(np.float32))

    pixels = torch.stack([_coarser(view, strength, rng) for view in pixels])
    pixels = pixels.clamp_min(1e-3) ** torch.exp(uniform(-0.35, 0.35))
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (pixels - middle) * torch.exp(uniform(-0.4, 0.4)) + middle * torch.exp(uniform(-0.4, 0.4))
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * torch.exp(uniform(-0.7, 0.4))
    pixels = pixels * torch.exp(uniform(-0.13, 0.13, 3)) + uniform(-0.04, 0.04, 3)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    noise = torch.randn(pixels.shape, generator=generator)
    pixels = (pixels + noise * uniform(0, 0.03)).clamp(0, 1)
    return torch.stack([_jpeg(view, rng) if rng.random() < 0.25 * strength else view for view in pixels])


def _coarser(view: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Lose resolution, as of an image of 0.3 to 0.6 m pixels, now and then."""
    if rng.random() >= 0.5 * strength:
        return view
    side = view.shape[-1]
    small = round(side / rng.uniform(1.15, 2.4))
    mode = "bicubic" if rng.random() < 0.5 else "bilinear"
    coarse = functional.interpolate(view[None], (small, small), mode="bilinear", antialias=True)
    return functional.interpolate(coarse, (side, side), mode=mode)[0].clamp(0, 1)


def _jpeg(view: Tensor, rng: np.random.Generator) -> Tensor:
    content = io.BytesIO()
    array = (view.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(content, "JPEG", quality=int(rng.integers(30, 90)))
    back = np.array(Image.open(content), np.float32) / 255
    return torch.from_numpy(back).permute(2, 0, 1)


def sample_maps(maps: Sequence[Tensor], views: Views) -> Tensor:
    """Return what maps of the scenes hold at the middles of the views' patches, interpolated linearly.

    Args:
        maps: for each scene, of shape (R, C, T).
        views: the views.

    Returns:
        Of shape (B, N, N, T), float32.
    """
    found = []
    for number, centres in zip(views.scene, views.centres, strict=True):
        own = maps[number]
        limits = torch.tensor(own.shape[:2], dtype=torch.float32) - 1
        at = torch.minimum(centres.clamp_min(0), limits)  # (N, N, 2)
        low = at.floor()
        high = torch.minimum(low + 1, limits)
        part = at - low
        (r0, c0), (r1, c1) = low.long().unbind(-1), high.long().unbind(-1)
        row, col = part[..., :1], part[..., 1:]
        upper = (1 - col) * own[r0, c0].float() + col * own[r0, c1].float()
        lower = (1 - col) * own[r1, c0].float() + col * own[r1, c1].float()
        found.append((1 - row) * upper + row * lower)
    return torch.stack(found)
