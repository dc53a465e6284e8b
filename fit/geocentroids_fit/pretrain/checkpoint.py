"""The state of a training, kept in one safetensors file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from geocentroids_fit.files import new_file
from geocentroids_fit.pretrain.learner import Learner
from geocentroids_tiler.errors import InputError


@dataclass
class State:
    """A training under way.

    Attributes:
        learner: what is trained.
        averaged: the running mean of its weights: the teacher, and what is kept in the end.
        optimizer: of the learner.
        step: steps done.
    """

    learner: Learner
    averaged: Learner
    optimizer: torch.optim.AdamW
    step: int = 0

    @classmethod
    def fresh(cls, learner: Learner, learning_rate: float, weight_decay: float) -> State:
        """Return the state before the first step."""
        decayed = [p for p in learner.parameters() if p.ndim > 1]
        others = [p for p in learner.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
        return cls(learner, copy.deepcopy(learner).requires_grad_(False), optimizer)

    @torch.no_grad()
    def average(self, weight: float) -> None:
        """Take the learner's weights into the mean."""
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.learner.parameters()), weight)


def save_state(path: Path, digest: str, state: State) -> None:
    """Write a state, whole or not at all.

    Args:
        path: the file.
        digest: of the configuration it belongs to.
        state: what to keep.

    Raises:
        InputError: if it cannot be written.
    """
    about = {"digest": digest, "step": str(state.step)}
    with new_file(path) as part:
        part.write_bytes(save({name: value.detach().cpu().contiguous() for name, value in _tensors(state)}, about))


def load_state(path: Path, state: State, digest: str) -> bool:
    """Fill a fresh state with a kept one; return whether there was one.

    Raises:
        InputError: if it is broken, or belongs to another configuration.
    """
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("digest") != digest:
                raise InputError(
                    f"{path} belongs to a training of other images or settings; choose another --out or delete it"
                )
            _prepare(state)
            for name, value in _tensors(state):
                with torch.no_grad():
                    value.copy_(file.get_tensor(name))
            state.step = int(about["step"])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be read ({error}); delete it to begin anew") from error
    return True


def _prepare(state: State) -> None:
    """Give the optimizer its tensors, as its first step would."""
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            state.optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _tensors(state: State) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a state by name."""
    for name in ("learner", "averaged"):
        for key, value in getattr(state, name).state_dict().items():
            yield f"{name}.{key}", value
    for number, group in enumerate(state.optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            for key, value in state.optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{number}.{index}.{key}", value
