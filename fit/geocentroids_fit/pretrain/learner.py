"""The network in training: the student, its heads, and whole images seen by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from geocentroids_fit.pretrain.config import PATCH_PX, PretrainConfig
from geocentroids_fit.pretrain.losses import Prototypes
from geocentroids_fit.pretrain.model import Student
from geocentroids_fit.pretrain.scenes import Scene
from geocentroids_fit.pretrain.views import crop
from geocentroids_tiler.source.fill import fill_invalid

WINDOWS_PER_RUN = 8


class Learner(nn.Module):
    """A student with what its tokens are turned into.

    Attributes:
        student: the encoder.
        bank: from tokens to the statistics of the bank.
        prototypes: from tokens to scores of prototypes.
    """

    def __init__(self, config: PretrainConfig, statistics: int) -> None:
        super().__init__()
        self.student = Student(config.model)
        self.bank = nn.Linear(config.model.width, statistics)
        self.prototypes = Prototypes(config.model.width, config.prototypes)


def normalised(pixels: Tensor, config: PretrainConfig) -> Tensor:
    """Return pixels (B, 3, H, W) in [0, 1] as the encoder takes them."""
    pre = config.preprocess
    mean, std = (torch.tensor(value, device=pixels.device).view(1, 3, 1, 1) for value in (pre.mean, pre.std))
    return (pixels - mean) / std


def autocast(device: torch.device, config: PretrainConfig) -> AbstractContextManager[None]:
    """Return a context in which matrices are multiplied in bf16, if that is asked for."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@torch.no_grad()
def token_maps(student: Student, scenes: Sequence[Scene], config: PretrainConfig) -> list[Tensor]:
    """Return the tokens of whole scenes, blended over windows that overlap by half: (R, C, D) each, on the CPU.

    A patch's tokens count the more, the farther it lies from the border of their window.
    """
    device = next(student.parameters()).device
    side = config.model.grid_patches
    tent = torch.minimum(torch.arange(side) + 0.5, side - torch.arange(side) - 0.5)
    weight = (tent[:, None] * tent)[..., None]  # (N, N, 1)
    maps = []
    for scene in scenes:
        rows, cols = scene.labelled.shape
        total = torch.zeros(rows + 2 * side, cols + 2 * side, config.model.width)
        weights = torch.zeros(*total.shape[:2], 1)
        for places in _runs(rows, cols, side):
            pixels = np.stack([_window(scene, row, col, side) for row, col in places])
            seen = normalised(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float() / 255, config)
            with autocast(device, config):
                tokens = student(seen).float().cpu()  # (B, N, N, D)
            for (row, col), own in zip(places, tokens, strict=True):
                at = slice(row + side, row + 2 * side), slice(col + side, col + 2 * side)
                total[at] += weight * own
                weights[at] += weight
        inside = slice(side, side + rows), slice(side, side + cols)
        maps.append((total[inside] / weights[inside]).half())
    return maps


def _runs(rows: int, cols: int, side: int) -> Iterator[list[tuple[int, int]]]:
    """Yield first patches of windows, some at a time."""
    half = side // 2
    places = [(row, col) for row in range(-half, rows, half) for col in range(-half, cols, half)]
    for start in range(0, len(places), WINDOWS_PER_RUN):
        yield places[start : start + WINDOWS_PER_RUN]


def _window(scene: Scene, row: int, col: int, side: int) -> NDArray[np.uint8]:
    """Return the pixels of a window, of shape (S, S, 3), filled as served ones are."""
    pixels, valid = crop(scene, (row * PATCH_PX, col * PATCH_PX), side * PATCH_PX)
    return fill_invalid(pixels, valid)
