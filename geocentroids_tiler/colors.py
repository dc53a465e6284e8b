"""Colour spaces: sRGB bytes to OKLab and back, so that colours are averaged and compared as the eye sees them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Source: Björn Ottosson, "A perceptual color space for image processing", 2020,
# https://bottosson.github.io/posts/oklab/ (the two matrices), and IEC 61966-2-1 (the transfer curve).
_LMS_FROM_RGB = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LAB_FROM_LMS = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_RGB_FROM_LMS = np.linalg.inv(_LMS_FROM_RGB)
_LMS_FROM_LAB = np.linalg.inv(_LAB_FROM_LMS)


def srgb_to_oklab(rgb: ArrayLike) -> NDArray[np.float64]:
    """Convert sRGB bytes of shape (..., 3), 0 to 255, to OKLab of shape (..., 3): L 0 to 1, a and b about ±0.4."""
    encoded = np.asarray(rgb, np.float64) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    lab: NDArray[np.float64] = np.cbrt(linear @ _LMS_FROM_RGB.T) @ _LAB_FROM_LMS.T
    return lab


def oklab_to_linear(lab: ArrayLike) -> NDArray[np.float64]:
    """Convert OKLab of shape (..., 3) to linear sRGB of shape (..., 3); values outside 0 to 1 are out of gamut."""
    linear: NDArray[np.float64] = (np.asarray(lab, np.float64) @ _LMS_FROM_LAB.T) ** 3 @ _RGB_FROM_LMS.T
    return linear


def oklab_to_srgb(lab: ArrayLike) -> NDArray[np.uint8]:
    """Convert OKLab of shape (..., 3) to sRGB bytes of shape (..., 3), clipped to the gamut."""
    linear = np.clip(oklab_to_linear(lab), 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    rgb: NDArray[np.uint8] = np.rint(encoded * 255).astype(np.uint8)
    return rgb


def hex_color(rgb: ArrayLike) -> str:
    """Write one sRGB colour of shape (3,) as ``#rrggbb``."""
    r, g, b = (int(value) for value in np.asarray(rgb))
    return f"#{r:02x}{g:02x}{b:02x}"
