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
TOKENS_WEIGHT = 2.0
"""Of the tokens; the bank weighs 1."""
MOST_COMMON, MIXED_PATCHES = 0.5, 2000
"""Share of what an image adds that is taken away at most, and patches at which it is half of that."""


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

    Both are standardised, scaled to length 1 and weighted. Part of what the patches of an image have in common is taken
    away, so that an encoder learns to see past the light and the camera of an image. The rest is projected to the
    directions in which it varies most, turned to lie as near to the tokens as they can: then there is least to learn.

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
    joined = []
    for one, other in zip(bank, tokens, strict=True):
        parts = functional.normalize(scales[0](one), dim=-1), functional.normalize(scales[1](other), dim=-1)
        joined.append(torch.cat([parts[0], TOKENS_WEIGHT * parts[1]], dim=-1).half())
    joined = [own - common for own, common in zip(joined, common_parts(joined, scenes), strict=True)]
    some, some_tokens = sample(joined, scenes, seed), sample(tokens, scenes, seed)
    mean, width = some.mean(0), some_tokens.shape[1]
    directions = torch.linalg.eigh(torch.cov((some - mean).T.double()))[1].flip(1)[:, :width].float()  # (F + D, D)
    u, _, v = torch.linalg.svd(((some - mean) @ directions).T @ (some_tokens - some_tokens.mean(0)))
    matrix = directions @ u @ v
    return [functional.normalize((own.float() - mean) @ matrix, dim=-1).half() for own in joined]


def common_parts(maps: Sequence[Tensor], scenes: Sequence[Scene]) -> list[Tensor]:
    """Return for each scene what is taken away from all its patches, of shape (F,).

    It is a share of the mean of its image less the mean of all images. The share grows with the image, up to a half: a
    large image shows all kinds of ground and its mean tells of light and camera, a small one may be all forest.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for own, scene in zip(maps, scenes, strict=True):
        rows = own[torch.from_numpy(scene.labelled)].double()
        sums[scene.image] = sums.get(scene.image, torch.zeros(rows.shape[1], dtype=torch.float64)) + rows.sum(0)
        counts[scene.image] = counts.get(scene.image, 0) + len(rows)
    mean = torch.stack(list(sums.values())).sum(0) / sum(counts.values())
    common = {}
    for image, count in counts.items():
        share = MOST_COMMON * count / (count + MIXED_PATCHES)
        common[image] = (share * (sums[image] / count - mean)).to(maps[0].dtype)
    return [common[scene.image] for scene in scenes]
