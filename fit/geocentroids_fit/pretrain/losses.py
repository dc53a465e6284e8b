"""What the student is asked: the bank's statistics, what is hidden, and what another view of the same ground shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from geocentroids_fit.pretrain.views import Views

PROJECTED = 64
"""Length of the vectors that are compared with prototypes."""
HIDDEN = 256
STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURES = (0.07, 0.04)
"""At the first and at the last step."""
SINKHORN_ROUNDS = 3
SAME_GROUND_PATCHES = 0.54
"""Patches of two views whose middles are nearer than this show the same ground."""


class Prototypes(nn.Module):
    """Scores of tokens against prototypes: cosines of a projection.

    Prototypes are random directions that stay as they are, and projections have no common part. Else a student can
    make all prototypes alike and guess each of them as often, and soon does.
    """

    directions: Tensor

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, PROJECTED))
        self.register_buffer("directions", functional.normalize(torch.randn(count, PROJECTED), dim=1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores of shape (n, count) of tokens of shape (n, D)."""
        projected = self.project(tokens).float()
        projected = functional.normalize(functional.batch_norm(projected, None, None, training=True), dim=-1)
        with torch.autocast(tokens.device.type, enabled=False):  # bf16 is too coarse for what a temperature divides
            return functional.linear(projected, self.directions)


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """Return soft assignments in which all prototypes are used alike.

    Args:
        scores: of shape (n, K).
        temperature: the lower, the harder.

    Returns:
        Of shape (n, K), float32; rows sum to 1.

    Source:
        Caron et al., "Unsupervised learning of visual features by contrasting cluster assignments", NeurIPS 2020.
    """
    shares = torch.exp((scores.float() - scores.max()) / temperature)
    for _ in range(SINKHORN_ROUNDS):
        shares = shares / shares.sum(0, keepdim=True).clamp_min(1e-12)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1e-12)
    return shares


def surprise(guess: Tensor, shares: Tensor) -> Tensor:
    """Return the mean cross-entropy of scores (n, K) to soft assignments (n, K)."""
    if not len(guess):
        return guess.sum()
    return -(shares * functional.log_softmax(guess.float() / STUDENT_TEMPERATURE, dim=-1)).sum(-1).mean()


def same_ground(one: Views, other: Views) -> tuple[Tensor, Tensor]:
    """Return patches of pairs of views that show the same ground, as numbers among all patches of each.

    Patches of which one has no data are left out.
    """
    firsts, seconds = [], []
    sizes = one.valid[0].numel(), other.valid[0].numel()
    for number in range(len(one.valid)):
        middles = one.centres[number].flatten(0, 1), other.centres[number].flatten(0, 1)
        distance = torch.cdist(*middles, compute_mode="donot_use_mm_for_euclid_dist")  # products lose the digits
        nearest = distance.min(1)
        same = one.valid[number].flatten() & other.valid[number].flatten()[nearest.indices]
        at = torch.nonzero(same & (nearest.values < SAME_GROUND_PATCHES))[:, 0]
        firsts.append(at + number * sizes[0])
        seconds.append(nearest.indices[at] + number * sizes[1])
    return torch.cat(firsts), torch.cat(seconds)
