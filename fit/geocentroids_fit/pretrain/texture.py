"""A bank of hand-made statistics of patches: colour, contrast and the energy of gratings, with what lies around.

It is what an encoder has to beat, and one of the targets that a small encoder learns from.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from geocentroids_fit.pretrain.config import PATCH_PX

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue. Source: ITU-R BT.601."""
WAVELENGTHS_PX = (3.5, 7.0, 14.0)
"""Of the gratings: edges and leaves, small things, things as large as a patch."""
ORIENTATIONS = 4
CYCLES = 0.5
"""Standard deviation of a filter's envelope in wavelengths."""
DARK, FLAT, STILL = 0.03, 0.005, 0.002
"""Added before logarithms of means, deviations and energies, so that black and plain ground stay finite."""


def texture_bank(pixels: Tensor) -> Tensor:
    """Describe the patches of images.

    Per patch: mean of R, G, B and its logarithms about their mean, deviations of R, G, B, mean and deviation of colour
    differences and saturation, and the energy of Gabor filters, sorted over orientations so that turning the image
    changes nothing. Beside its own, each patch has the mean of these over 3 x 3 patches.

    Args:
        pixels: of shape (B, 3, H, W), float32, RGB in [0, 1].

    Returns:
        Of shape (B, F, H // 14, W // 14), float32.

    Source:
        Gabor energies: Manjunath and Ma, "Texture features for browsing and retrieval of image data", PAMI 1996.
    """
    height, width = (side // PATCH_PX * PATCH_PX for side in pixels.shape[2:])
    pixels = pixels[..., :height, :width]
    mean, deviation = _moments(pixels)
    logs = torch.log(mean + DARK)
    brightest, darkest = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    opponents = torch.cat([pixels[:, :2] - pixels[:, 1:], (brightest - darkest) / (brightest + 0.05)], dim=1)
    colours, colour_deviation = _moments(opponents)
    own = torch.cat(
        [
            mean,
            logs - logs.mean(1, keepdim=True),
            torch.log(deviation + FLAT),
            colours,
            torch.log(colour_deviation + FLAT),
            _energies(pixels),
        ],
        dim=1,
    )  # (B, f, rows, cols)
    near = functional.avg_pool2d(functional.pad(own, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.cat([own, near], dim=1)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch."""
    mean = functional.avg_pool2d(values, PATCH_PX)
    return mean, (functional.avg_pool2d(values**2, PATCH_PX) - mean**2).clamp_min(0).sqrt()


def _energies(pixels: Tensor) -> Tensor:
    """Return for each wavelength the logarithms of the strongest, the middle and the weakest orientation's energy."""
    weights = torch.tensor(LUMINANCE, device=pixels.device).view(1, 3, 1, 1)
    grey = (pixels * weights).sum(1, keepdim=True)
    found = []
    for wavelength in WAVELENGTHS_PX:
        filters = _gabor(wavelength).to(pixels.device)  # (2 * ORIENTATIONS, 1, n, n)
        reach = filters.shape[-1] // 2
        even, odd = functional.conv2d(functional.pad(grey, (reach,) * 4, mode="replicate"), filters).chunk(2, dim=1)
        energy = functional.avg_pool2d((even**2 + odd**2).sqrt(), PATCH_PX)  # (B, ORIENTATIONS, rows, cols)
        ordered = torch.log(energy.sort(dim=1, descending=True).values + STILL)
        found += [ordered[:, :1], ordered[:, 1:-1].mean(1, keepdim=True), ordered[:, -1:]]
    return torch.cat(found, dim=1)


@cache
def _gabor(wavelength: float) -> Tensor:
    """Return even and odd filters of each orientation, of shape (2 * ORIENTATIONS, 1, n, n); none sees a plain grey."""
    sigma = CYCLES * wavelength
    reach = math.ceil(2.5 * sigma)
    row, col = torch.meshgrid(*[torch.arange(-reach, reach + 1, dtype=torch.float32)] * 2, indexing="ij")
    envelope = torch.exp(-(row**2 + col**2) / (2 * sigma**2))
    envelope /= envelope.sum()
    waves = []
    for shift in (0.0, math.pi / 2):
        for k in range(ORIENTATIONS):
            angle = math.pi * k / ORIENTATIONS
            wave = torch.cos(2 * math.pi / wavelength * (math.cos(angle) * col + math.sin(angle) * row) - shift)
            waves.append(envelope * (wave - (envelope * wave).sum()))
    return torch.stack(waves)[:, None]
