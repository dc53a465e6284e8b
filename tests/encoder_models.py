"""Small DINOv2 checkpoints with random weights, and scenes to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 224,
}

KINDS = ("dinov2", "registers", "giant")
"""Plain, with 4 registers, and with the gated MLP that the giant has."""


def make_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Return a model of one of ``KINDS`` in which no parameter is left at a neutral value.

    Matrices have the gain that transformers' own initialiser (0.02) gives a ViT-B.
    """
    options = TINY | changes
    if kind == "dinov2":
        model: Any = Dinov2Model(Dinov2Config(**options))
    else:
        swiglu = kind == "giant"
        config = Dinov2WithRegistersConfig(num_register_tokens=4, use_swiglu_ffn=swiglu, **options)
        model = Dinov2WithRegistersModel(config)
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        neutral = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if "lambda" in name else 0.0
        gain = 0.64 / model.config.hidden_size**0.5
        spread = 0.1 if parameter.ndim == 1 else 0.5 if "embeddings.position" in name else gain
        parameter.data = neutral + spread * noise
    return model.eval()


def save_model(folder: Path, kind: str, seed: int = 0, **changes: Any) -> Path:
    """Save a model of one of ``KINDS`` to ``folder``, as safetensors, and return the folder."""
    make_model(kind, seed, **changes).save_pretrained(folder)
    return folder


def scenes(count: int, side_px: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return images of shape (count, side_px, side_px, 3): coloured noise at six scales, and blocks with edges."""
    random = np.random.default_rng(seed)
    images = np.zeros((count, side_px, side_px, 3))
    for image in images:
        for cells in (2, 4, 9, 20, 45, 112):
            grid = random.normal(size=(cells, cells, 3))
            grid = 0.6 * grid.mean(axis=2, keepdims=True) + 0.4 * grid
            steps = np.arange(side_px) * cells // side_px
            image += grid[steps][:, steps] / np.sqrt(cells)
        for _ in range(12):
            row, col = random.integers(0, side_px - 20, 2)
            height, width = random.integers(6, 60, 2)
            image[row : row + height, col : col + width] = 0.8 * (random.normal(size=3) + random.normal())
    return np.clip(110 + 60 * images, 0, 255).astype(np.uint8)
