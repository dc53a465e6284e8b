"""What is taught at the end: a unit vector for each patch of the ground.

It joins two descriptions, the bank of statistics and the tokens of the encoder as it is by then, both computed for
whole images: tokens are blended over windows that overlap, so that what is taught knows of no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from geocentroids_fit.pretrain.scenes import Scene
from geocentroids_fit.pretrain.texture import texture_bank

SAMPLE = 100_000
"""Patches that means, deviations and directions are learnt of."""


@dataclass(frozen=True)
class Standard:
    """How descriptions are standardised.

    Attributes:
        mean: of shape (F,).
        std: of shape (F,).
    """

    mean: Tensor
    std: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Return values (..., F) less their mean, divided by their deviation."""
        return (values.float() - self.mean) / self.std


def texture_maps(scenes: Sequence[Scene]) -> list[Tensor]:
    """Describe all patches of scenes by the bank, each map of shape (R, C, F), float16."""
    found = []
    for scene in scenes:
        pixels = torch.from_numpy(scene.pixels).permute(2, 0, 1)[None].float() / 255
        found.append(texture_bank(pixels)[0].permute(1, 2, 0).contiguous().half())
    return found


def sample(maps: Sequence[Tensor], scenes: Sequence[Scene], seed: int) -> Tensor:
    """Return descriptions of random patches with data, of shape (n, F)."""
    places = [torch.from_numpy(np.flatnonzero(scene.labelled)) for scene in scenes]
    ends = torch.tensor([len(own) for own in places]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(int(ends[-1]), generator=generator)[:SAMPLE].sort().values
    number = torch.searchsorted(ends, chosen, right=True)
    rows = []
    for scene, (own, at) in enumerate(zip(maps, places, strict=True)):
        first = int(ends[scene]) - len(at)
        rows.append(own.flatten(0, 1)[at[chosen[number == scene] - first]].float())
    return torch.cat(rows)


def standard_of(values: Tensor) -> Standard:
    """Return how values of shape (n, F) are standardised."""
    return Standard(values.mean(0), values.std(0).clamp_min(1e-3))


def join(bank: Sequence[Tensor], tokens: Sequence[Tensor], scenes: Sequence[Scene], seed: int) -> list[Tensor]:
    """Join two descriptions into unit vectors as long as tokens.

    Both are standardised and scaled to length 1, so that they weigh the same, and projected to the directions in which
    they vary most. These are turned to lie as near to the tokens as they can, so that an encoder has least to learn.

    Args:
        bank: for each scene, of shape (R, C, F).
        tokens: for each scene, of shape (R, C, D).
        scenes: the scenes.
        seed: of the patches that this is learnt of.

    Returns:
        For each scene, of shape (R, C, D), float16.

    Source:
        The turn: Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika 1966.
    """
    scales = [standard_of(sample(maps, scenes, seed)) for maps in (bank, tokens)]

    def joined(of_bank: Tensor, of_tokens: Tensor) -> Tensor:
        return torch.cat(
            [functional.normalize(scales[0](of_bank), dim=-1), functional.normalize(scales[1](of_tokens), dim=-1)],
            dim=-1,
        )

    some_tokens = sample(tokens, scenes, seed)
    both = joined(sample(bank, scenes, seed), some_tokens)  # (n, F + D)
    mean = both.mean(0)
    width = some_tokens.shape[1]
    directions = torch.linalg.eigh(torch.cov((both - mean).T.double()))[1].flip(1)[:, :width].float()  # (F + D, D)
    u, _, v = torch.linalg.svd(((both - mean) @ directions).T @ (some_tokens - some_tokens.mean(0)))
    matrix = directions @ u @ v
    return [
        functional.normalize((joined(one, other) - mean) @ matrix, dim=-1).half()
        for one, other in zip(bank, tokens, strict=True)
    ]
