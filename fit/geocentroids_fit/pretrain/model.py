"""The student: a small DINOv2 with registers whose heads look near at first, and what it learns to give."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from geocentroids_fit.pretrain.config import PATCH_PX, ModelConfig
from geocentroids_tiler.encoder.checkpoint import load_model, locate_checkpoint, quiet

PLACE_DIMS = 16
"""Channels of the residual stream that tell the place in the window at first."""
PLACE_WAVELENGTHS = (4.0, 9.0, 20.0, 64.0)
"""Of the sines and cosines that tell it, in patches."""
REACHES = (1.0, 2.5, 6.0)
"""How far heads look at first, in patches, in turn."""
SHARPNESS = 4.0
"""How much more a head attends to the patch itself than to one far away, at first: the logarithm."""
WHITENING_FLOOR, FLOOR_DIRECTION = 0.002, 8
"""Share of the variance of one of the first directions that is added to all before patches are whitened, so that the
finest detail, which is mostly noise, does not become as loud as the rest."""
WHITENED_STD = 0.8
LINEAR_STD = 0.7
"""Standard deviation of first weights, times the root of how many a value is the sum of."""
LAYER_SCALE = 0.3
RECTIFIER_GAIN = 2.0
"""How steep the first layer's rectifiers are at first."""


class Student(nn.Module):
    """A DINOv2 with registers that sees windows of any size up to its grid, anywhere on it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(
                hidden_size=config.width,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                mlp_ratio=4,
                image_size=config.grid_patches * PATCH_PX,
                patch_size=PATCH_PX,
                num_register_tokens=config.registers,
                layerscale_value=LAYER_SCALE,
            ),
        )

    def forward(self, pixels: Tensor, masked: Tensor | None = None, origin: tuple[int, int] = (0, 0)) -> Tensor:
        """Return the tokens of windows.

        Args:
            pixels: normalised, of shape (B, 3, 14 N, 14 N).
            masked: patches that are hidden, of shape (B, N, N), bool.
            origin: where on the grid the window lies.

        Returns:
            Of shape (B, N, N, D).
        """
        model, embed = self.model, self.model.embeddings
        count, side = len(pixels), pixels.shape[-1] // PATCH_PX
        patches = embed.patch_embeddings(pixels)  # (B, N * N, D)
        if masked is not None:
            patches = torch.where(masked.flatten(1)[..., None], embed.mask_token.to(patches.dtype), patches)
        grid = self.config.grid_patches
        place = embed.position_embeddings[:, 1:].view(1, grid, grid, -1)
        row, col = origin
        patches = patches + place[:, row : row + side, col : col + side].flatten(1, 2)
        first = embed.cls_token + embed.position_embeddings[:, :1]
        hidden = torch.cat([first.expand(count, -1, -1), embed.register_tokens.expand(count, -1, -1), patches], dim=1)
        for layer in model.encoder.layer:
            hidden = layer(hidden)
        tokens: Tensor = model.layernorm(hidden[:, 1 + self.config.registers :])
        return tokens.reshape(count, side, side, -1)

    def run_on(self, device: torch.device) -> Student:
        """Move to a device, with the attention that is fastest there: on a CPU plain products are."""
        self.model.set_attn_implementation("sdpa" if device.type == "cuda" else "eager")
        return self.to(device)

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        with quiet():
            self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Take the weights that ``save`` wrote."""
        self.model.load_state_dict(load_model(locate_checkpoint(str(folder)), "sdpa").state_dict())


@torch.no_grad()
def start(student: Student, patches: Tensor) -> None:
    """Set first weights: whitened patches, their energies, heads that look near, places that do not reach the tokens.

    Args:
        student: the model.
        patches: normalised patches, of shape (n, 3, 14, 14).

    Source:
        Heads that begin as convolutions: d'Ascoli et al., "ConViT", ICML 2021; here by position embeddings alone.
    """
    embed, width = student.model.embeddings, student.config.width
    for module in student.model.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=LINEAR_STD / math.sqrt(module.in_features))
    content = width - PLACE_DIMS
    flat = patches.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((flat - mean).T))
    values, vectors = values.flip(0)[:content], vectors.flip(1)[:, :content]
    floor = WHITENING_FLOOR * values[FLOOR_DIRECTION]
    whitening = WHITENED_STD * vectors / (values + floor).sqrt()  # (588, content)
    projection = embed.patch_embeddings.projection
    projection.weight.zero_()
    projection.weight[:content] = whitening.T.reshape(-1, *patches.shape[1:]).to(projection.weight.dtype)
    projection.bias.zero_()
    projection.bias[:content] = -(mean @ whitening).to(projection.bias.dtype)

    grid = student.config.grid_patches
    at = torch.arange(grid, dtype=torch.float32)
    angles = 2 * math.pi * at[:, None] / torch.tensor(PLACE_WAVELENGTHS)  # (grid, waves)
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (grid, PLACE_DIMS / 2)
    place = torch.zeros(grid, grid, width)
    place[..., content:] = torch.cat(
        [waves[:, None].expand(grid, grid, -1), waves[None].expand(grid, grid, -1)], dim=-1
    )
    embed.position_embeddings.zero_()
    embed.position_embeddings[:, 1:] = place.flatten(0, 1)
    student.model.layernorm.weight[content:] = 0

    first = student.model.encoder.layer[0]
    first.layer_scale2.lambda1.fill_(1.0)
    rectify(first.mlp, content)

    head = width // student.config.heads
    for layer in student.model.encoder.layer:
        attention = layer.attention
        for number in range(student.config.heads):
            strength = _kernel(REACHES[number % len(REACHES)]).repeat(4) * math.sqrt(head)  # of a product
            rows = slice(number * head, number * head + PLACE_DIMS)
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight[rows] = 0
                linear.weight[rows, content:] = torch.diag(strength.sqrt())


@torch.no_grad()
def rectify(mlp: Any, content: int) -> None:
    """Let pairs of hidden units begin as the two halves of a rectifier of one whitened direction each.

    Texture is energy, whatever its sign. A layer that begins at random is nearly linear and has to find that out first.
    """
    mlp.fc1.weight[: 2 * content] = 0
    mlp.fc1.weight[:content, :content] = RECTIFIER_GAIN * torch.eye(content)
    mlp.fc1.weight[content : 2 * content, :content] = -RECTIFIER_GAIN * torch.eye(content)
    mlp.fc1.bias.zero_()
    out = torch.randn(mlp.fc2.out_features, content) / math.sqrt(content)
    mlp.fc2.weight[:, :content] = out
    mlp.fc2.weight[:, content : 2 * content] = out


def _kernel(reach: float) -> Tensor:
    """Return how much each wavelength counts, so that sums of cosines fall off with the distance over ``reach``."""
    frequency = 2 * math.pi / torch.tensor(PLACE_WAVELENGTHS)
    share = torch.exp(-((frequency * reach) ** 2) / 4) * frequency.sqrt()
    return SHARPNESS * share / share.sum() / 2
