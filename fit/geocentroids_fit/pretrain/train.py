"""The training: self-distillation first, then fixed targets made of what was learnt.

In the first stage a student sees two views of the same ground, changed and partly hidden, and has to tell the
statistics of each patch as they really are, which prototype a teacher (the running mean of its weights) gives the
hidden patches, and which one it gives the same ground in the other view. In the second stage the targets are unit
vectors that are computed once for whole images (``targets.py``), so that tokens no longer depend on their window.

Source:
    Zhou et al., "iBOT", ICLR 2022 (hidden patches); Wei et al., "Masked feature prediction", CVPR 2022 (statistics).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from geocentroids_fit.images import ahead, in_pool
from geocentroids_fit.pretrain.checkpoint import State
from geocentroids_fit.pretrain.config import PretrainConfig
from geocentroids_fit.pretrain.learner import autocast, normalised
from geocentroids_fit.pretrain.losses import TEACHER_TEMPERATURES, same_ground, sinkhorn, surprise
from geocentroids_fit.pretrain.views import Sampler, Views, other_camera, sample_maps
from geocentroids_tiler.errors import InputError

MAX_GRADIENT = 1.0
"""Length that gradients are cut to."""
TEACHER_STEPS, SETTLED_STEPS = 250, 100
"""Steps over which weights are averaged in the two stages."""
EARLY_STEPS = 10
"""At first it is over the last tenth of the steps so far, for weights change fast then."""
TEACHER_STRENGTH = 0.4
"""How far cameras of the teacher's views differ, as a share of the student's."""
MASKED_SHARE, MAX_MASKED = 0.6, 0.65
"""Views with hidden patches, and the largest share of patches hidden in one."""
WEIGHTS = {"statistics": 1.0, "hidden": 0.1, "same": 0.1, "distance": 1.0}
"""Of the losses. Those on prototypes, if heavier, drown the statistics in the first steps."""
MAX_DEVIATIONS = 5.0
"""Statistics farther from their mean count as this far."""
SETTLE_STRENGTH = 0.5
"""How far cameras differ in the second stage, as a share of the first."""
SETTLE_RATE = 0.5
"""Learning rate of the second stage, as a share of the first."""
LOG_EVERY = 25

Log = Callable[[dict[str, float]], None]
S = TypeVar("S")


@dataclass(frozen=True)
class Seen:
    """Views as the student sees them.

    Attributes:
        views: the ground as it is.
        student: the same through another camera, normalised, of shape (B, 3, S, S).
        origin: where on the position grid the windows lie.
    """

    views: Views
    student: Tensor
    origin: tuple[int, int]


@dataclass(frozen=True)
class Taught(Seen):
    """Views that a teacher sees too.

    Attributes:
        teacher: as ``student``, through a camera that differs less.
        masked: patches hidden from the student, of shape (B, N, N), bool.
    """

    teacher: Tensor
    masked: Tensor


def draw_pair(sampler: Sampler, config: PretrainConfig, step: int) -> tuple[Taught, Taught]:
    """Draw the two views of a step; they depend on nothing but the step and the seed."""
    rng = np.random.default_rng([config.seed, step])
    sides = (int(rng.choice(config.sides)), int(rng.choice(config.sides)))
    count = max(1, config.batch_patches // (sides[0] ** 2 + sides[1] ** 2))
    one, other = sampler.draw_pairs(count, sides, rng)
    return _taught(one, config, rng), _taught(other, config, rng)


def draw_one(sampler: Sampler, config: PretrainConfig, step: int) -> Seen:
    """Draw the views of a step of the second stage."""
    rng = np.random.default_rng([config.seed, step])
    side = int(rng.choice(config.settle_sides))
    views = sampler.draw(max(1, config.batch_patches // side**2), side, rng)
    seen = normalised(other_camera(views.pixels, SETTLE_STRENGTH * config.strength, rng), config)
    return Seen(views, seen, _origin(side, config, rng))


def _taught(views: Views, config: PretrainConfig, rng: np.random.Generator) -> Taught:
    count, side = views.valid.shape[:2]
    student = normalised(other_camera(views.pixels, config.strength, rng), config)
    teacher = normalised(other_camera(views.pixels, TEACHER_STRENGTH * config.strength, rng), config)
    masked = _masks(count, side, rng)
    return Taught(views, student, _origin(side, config, rng), teacher, masked)


def _origin(side: int, config: PretrainConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Return a random place on the position grid."""
    room = config.model.grid_patches - side + 1
    return int(rng.integers(room)), int(rng.integers(room))


def _masks(count: int, side: int, rng: np.random.Generator) -> Tensor:
    """Return which patches are hidden: the lowest of a field that is smooth over some patches."""
    shares = rng.uniform(0, MAX_MASKED, count) * (rng.random(count) < MASKED_SHARE)
    coarse = torch.from_numpy(rng.standard_normal((count, 1, max(2, side // 3), max(2, side // 3)), np.float32))
    field = functional.interpolate(coarse, (side, side), mode="bilinear")[:, 0]
    field = field + 0.35 * torch.from_numpy(rng.standard_normal((count, side, side), np.float32))
    rank = field.flatten(1).argsort(1).argsort(1)  # (B, N * N)
    return (rank < torch.from_numpy(shares)[:, None] * side**2).view(count, side, side)


def learn_losses(
    state: State, pair: tuple[Taught, Taught], bank: Sequence[Tensor], config: PretrainConfig
) -> dict[str, Tensor]:
    """Return the losses of the first stage.

    Args:
        state: the training.
        pair: views of the same ground.
        bank: standardised statistics of the scenes, each of shape (R, C, F).
        config: the training's settings.

    Returns:
        ``statistics``, ``hidden`` and ``same``: the mean error of standardised statistics (smooth L1), and the
        cross-entropies of prototypes of hidden patches and of patches in the other view.
    """
    device = next(state.learner.parameters()).device
    done = state.step / config.learn_steps
    temperature = TEACHER_TEMPERATURES[0] + done * (TEACHER_TEMPERATURES[1] - TEACHER_TEMPERATURES[0])
    tokens, scores, codes = [], [], []
    with autocast(device, config):
        for seen in pair:
            own = state.learner.student(seen.student.to(device), seen.masked.to(device), seen.origin).flatten(0, 2)
            tokens.append(own)
            scores.append(state.learner.prototypes(own))
            with torch.no_grad():
                taught = state.averaged.student(seen.teacher.to(device), None, seen.origin).flatten(0, 2)
                codes.append(state.averaged.prototypes(taught))
        statistics = [state.learner.bank(own).float() for own in tokens]
    valid = [seen.views.valid.flatten().to(device) for seen in pair]
    shares = [torch.zeros_like(code) for code in codes]
    used = sinkhorn(torch.cat([code[known] for code, known in zip(codes, valid, strict=True)]), temperature)
    for share, known, own in zip(shares, valid, torch.split(used, [int(known.sum()) for known in valid]), strict=True):
        share[known] = own
    errors = []
    for seen, found, known in zip(pair, statistics, valid, strict=True):
        wanted = sample_maps(bank, seen.views).flatten(0, 2).to(device).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        errors.append(functional.smooth_l1_loss(found[known], wanted[known], reduction="none").mean(-1))
    hidden = [seen.masked.flatten().to(device) & known for seen, known in zip(pair, valid, strict=True)]
    first, second = (at.to(device) for at in same_ground(pair[0].views, pair[1].views))
    return {
        "statistics": torch.cat(errors).sum() / max(1, sum(map(len, errors))),
        "hidden": surprise(
            torch.cat([own[at] for own, at in zip(scores, hidden, strict=True)]),
            torch.cat([own[at] for own, at in zip(shares, hidden, strict=True)]),
        ),
        "same": (surprise(scores[0][first], shares[1][second]) + surprise(scores[1][second], shares[0][first])) / 2,
    }


def settle_losses(state: State, seen: Seen, targets: Sequence[Tensor], config: PretrainConfig) -> dict[str, Tensor]:
    """Return the loss of the second stage: ``distance``, 1 less the cosine of tokens to their targets.

    Args:
        state: the training.
        seen: views.
        targets: unit vectors of the scenes, each of shape (R, C, D).
        config: the training's settings.
    """
    device = next(state.learner.parameters()).device
    with autocast(device, config):
        tokens = state.learner.student(seen.student.to(device), None, seen.origin)
    known = seen.views.valid
    wanted = sample_maps(targets, seen.views)[known].to(device)
    likeness = functional.cosine_similarity(tokens.float()[known.to(device)], wanted, dim=-1)
    return {"distance": (1 - likeness).sum() / max(1, len(likeness))}


def learning_rate(step: int, config: PretrainConfig) -> float:
    """Return the learning rate of a step: in each stage a linear start, then half a cosine down to 3 %."""
    learning = step < config.learn_steps
    at, steps = (step, config.learn_steps) if learning else (step - config.learn_steps, config.settle_steps)
    highest = config.learning_rate * (1.0 if learning else SETTLE_RATE)
    return highest * min(1.0, (at + 1) / config.warmup_steps) * (0.515 + 0.485 * math.cos(math.pi * at / steps))


def run_steps(
    state: State,
    stop: int,
    draw: Callable[[int], S],
    losses: Callable[[S], dict[str, Tensor]],
    averaged_steps: int,
    config: PretrainConfig,
    log: Log,
    keep: Callable[[State], None],
) -> None:
    """Train up to step ``stop``.

    Args:
        state: the training.
        stop: the last step.
        draw: returns what a step sees, given its number.
        losses: returns the losses of what a step sees.
        averaged_steps: steps over which weights are averaged.
        config: the training's settings.
        log: called now and then with means of the losses.
        keep: called now and then, and at the end, with the state.
    """
    began = kept_at = time.monotonic()
    first, past = state.step, []
    with ThreadPoolExecutor(config.workers, "geocentroids-view") as pool:
        for step, drawn in ahead(in_pool(pool, draw), range(first, stop), config.workers + 1):
            rate = learning_rate(step, config)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            found = losses(drawn.result())
            state.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(torch.stack([WEIGHTS[name] * value for name, value in found.items()]).sum())
            norm = torch.nn.utils.clip_grad_norm_(state.learner.parameters(), MAX_GRADIENT)
            if not torch.isfinite(norm):
                raise InputError(
                    f"the gradient is {float(norm)} at step {step}; a lower learning rate or --precision fp32 may help"
                )
            state.optimizer.step()
            state.step = step + 1
            state.average(max(1 / averaged_steps, EARLY_STEPS / (state.step + EARLY_STEPS)))
            past.append({name: value.item() for name, value in found.items()})
            if state.step % LOG_EVERY == 0 or state.step == stop:
                means = {name: float(np.mean([one[name] for one in past])) for name in past[0]}
                log({"step": state.step, **means, "learning_rate": rate, "seconds": time.monotonic() - began})
                past = []
            if time.monotonic() - kept_at > config.keep_every_s:
                keep(state)
                kept_at = time.monotonic()
    keep(state)
