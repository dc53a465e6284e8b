"""The canvas a scene is painted on: colour, height and land cover, and the light that falls on them.

Positions are ``(row, col)`` in metres from the upper left corner. Painters work in a `Window`, so their cost
follows the size of the object, and soft edges come from distances rather than from supersampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

GSD_M = 0.25
LAND_COVER: tuple[str, ...] = ("bare", "grass", "crop", "tree", "water", "road", "roof")
"""Names of the classes in `Canvas.cover`, by value."""
BARE, GRASS, CROP, TREE, WATER, ROAD, ROOF = range(len(LAND_COVER))

# The sun stands in the north-west. 3-4-5 keeps the long shadow steps below on whole pixels.
SUN_TOWARDS = (-0.8, -0.6)
SUN_SLOPE = 0.95
SHADE_RGB = (0.40, 0.45, 0.52)  # what is left of the light in a shadow: skylight, hence the blue
AMBIENT = 0.42

Floats: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float]
Colour: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Window:
    """Part of a canvas: its slices, and the metres of its pixel centres as (h, 1) and (1, w)."""

    slices: tuple[slice, slice]
    row_m: Floats
    col_m: Floats


class Canvas:
    """A square piece of ground that is being painted.

    Attributes:
        colour: (H, W, 3) float32, colour in full sun, 0..255.
        height_m: (H, W) float32, height above the ground, which throws the shadows.
        cover: (H, W) uint8, index into `LAND_COVER`.
        built: (H, W) bool, ground on which nothing grows wild.
        rng: the only source of randomness.
    """

    def __init__(self, size_px: int, seed: int) -> None:
        self.size_px = size_px
        self.extent_m = size_px * GSD_M
        self.rng = np.random.default_rng(seed)
        self.colour: Floats = np.zeros((size_px, size_px, 3), np.float32)
        self.height_m: Floats = np.zeros((size_px, size_px), np.float32)
        self.cover = np.full((size_px, size_px), GRASS, np.uint8)
        self.built = np.zeros((size_px, size_px), np.bool_)
        # Two textures that tile: fine (0.5 m to 10 m) and soft (5 m to 150 m).
        self._fine = fractal_noise(512, self.rng, power=0.75)
        self._soft = fractal_noise(1024, self.rng, power=1.6)

    def window(self, low: Point, high: Point, pad_m: float = 1.0) -> Window | None:
        """Return the window from corner ``low`` to ``high``, clipped, or None if it lies outside."""
        spans = []
        for start, stop in zip(low, high, strict=True):
            first = max(0, int((start - pad_m) / GSD_M))
            last = min(self.size_px, int((stop + pad_m) / GSD_M) + 1)
            if first >= last:
                return None
            spans.append((first, last))
        (r0, r1), (c0, c1) = spans
        rows = ((np.arange(r0, r1, dtype=np.float32) + 0.5) * GSD_M)[:, None]
        cols = ((np.arange(c0, c1, dtype=np.float32) + 0.5) * GSD_M)[None, :]
        return Window((slice(r0, r1), slice(c0, c1)), rows, cols)

    def whole(self) -> Window:
        """Return the window of the whole canvas."""
        window = self.window((0.0, 0.0), (self.extent_m, self.extent_m))
        if window is None:  # pragma: no cover - a canvas has pixels
            raise RuntimeError("the canvas is empty")
        return window

    def fine(self, row_m: ArrayLike, col_m: ArrayLike) -> Floats:
        """Sample the fine noise (mean 0, deviation 1) at positions in metres, one texel a pixel."""
        return _sample(self._fine, row_m, col_m, GSD_M)

    def soft(self, row_m: ArrayLike, col_m: ArrayLike) -> Floats:
        """Sample the soft noise (mean 0, deviation 1) at positions in metres."""
        return _sample(self._soft, row_m, col_m, GSD_M)

    def paint(
        self,
        window: Window,
        alpha: Floats,
        colour: Floats | Colour,
        cover: int | None = None,
        height_m: Floats | float | None = 0.0,
    ) -> None:
        """Lay ``colour`` over the window; where ``alpha`` is over one half, cover and height are replaced.

        Args:
            window: where.
            alpha: (h, w), 0..1, the share of each pixel that is covered.
            colour: (h, w, 3) or one colour.
            cover: class to set; None leaves it.
            height_m: (h, w) or one height to set; None leaves it.
        """
        old = self.colour[window.slices]
        old += alpha[..., None] * (np.asarray(colour, np.float32) - old)
        hit = alpha > 0.5
        if cover is not None:
            self.cover[window.slices][hit] = cover
        if height_m is not None:
            self.height_m[window.slices][hit] = np.broadcast_to(np.asarray(height_m, np.float32), hit.shape)[hit]

    def tinted(self, window: Window, colour: Colour, fine: float, soft: float) -> Floats:
        """Return (h, w, 3): ``colour`` with fine and soft noise of these deviations in brightness."""
        row, col = window.row_m + self.rng.uniform(0, 256), window.col_m + self.rng.uniform(0, 256)
        light = self.fine(row, col) * fine + self.soft(row, col) * soft
        tinted: Floats = np.asarray(colour, np.float32) + light[..., None]
        return tinted

    def cover_at(self, point: Point) -> int | None:
        """Return the class at a point in metres, None outside."""
        row, col = int(point[0] // GSD_M), int(point[1] // GSD_M)
        if not (0 <= row < self.size_px and 0 <= col < self.size_px):
            return None
        return int(self.cover[row, col])

    def is_built(self, point: Point) -> bool:
        """Say whether a point in metres inside the canvas is marked as built."""
        return bool(self.built[int(point[0] // GSD_M), int(point[1] // GSD_M)])


def fractal_noise(size_px: int, rng: np.random.Generator, power: float) -> Floats:
    """Return (size, size) noise that tiles, mean 0 and deviation 1, amplitude ~ 1 / frequency**power."""
    freq = np.hypot(np.fft.fftfreq(size_px)[:, None], np.fft.rfftfreq(size_px)[None, :])
    freq[0, 0] = np.inf
    # Waves longer than a quarter of the texture would make its repeat show.
    spectrum = np.fft.rfft2(rng.standard_normal((size_px, size_px))) / np.maximum(freq, 4 / size_px) ** power
    noise = np.fft.irfft2(spectrum, s=(size_px, size_px))
    scaled: Floats = (noise / noise.std()).astype(np.float32)
    return scaled


def _sample(texture: Floats, row_m: ArrayLike, col_m: ArrayLike, texel_m: float) -> Floats:
    size = texture.shape[0]  # a power of two, so that & wraps, negative numbers too
    row = np.floor(np.asarray(row_m) / texel_m).astype(np.int32) & (size - 1)
    col = np.floor(np.asarray(col_m) / texel_m).astype(np.int32) & (size - 1)
    sampled: Floats = texture[row, col]
    return sampled


def edge(distance_m: ArrayLike, softness_m: float = GSD_M) -> Floats:
    """Return the share of a pixel that is covered, from the distance inside the outline (negative outside)."""
    share: Floats = np.asarray(distance_m, np.float32) / np.float32(softness_m) + np.float32(0.5)
    return share.clip(0.0, 1.0)


def facing(slope_row: ArrayLike, slope_col: ArrayLike) -> Floats:
    """Return the brightness of a surface of this slope (rise per metre), 1 for level ground."""
    slope_row, slope_col = np.asarray(slope_row, np.float32), np.asarray(slope_col, np.float32)
    towards = SUN_SLOPE - slope_row * SUN_TOWARDS[0] - slope_col * SUN_TOWARDS[1]
    lambert = np.maximum(towards, 0.0) / np.sqrt(1.0 + slope_row**2 + slope_col**2) / SUN_SLOPE
    brightness: Floats = AMBIENT + (1.0 - AMBIENT) * lambert
    return brightness


def cast_shadows(height_m: Floats) -> Floats:
    """Return (H, W): 0 in the sun, 1 in the shadow of something higher, with a narrow penumbra.

    The height at which a ray passes is the running maximum of heights towards the sun, less the fall of the
    ray. Steps that double in length reach 20 m in seven passes.
    """
    ray = height_m.copy()
    for steps in (1, 2, 3, 5, 10, 20, 40):
        down, right = round(-SUN_TOWARDS[0] * steps), round(-SUN_TOWARDS[1] * steps)
        if max(down, right) >= len(ray):
            break
        fall = steps * GSD_M * SUN_SLOPE
        np.maximum(ray[down:, right:], ray[:-down, :-right] - fall, out=ray[down:, right:])
    return blur(edge(ray - height_m - 0.37, 0.5), 0.25)


def blur(image: Floats, side: float) -> Floats:
    """Return ``image`` after a 3 x 3 kernel whose outer taps weigh ``side`` of the middle one."""
    middle, outer = np.float32(1 / (1 + 2 * side)), np.float32(side / (1 + 2 * side))
    for _ in range(2):
        padded = np.concatenate([image[:1], image, image[-1:]])
        image = (middle * image + outer * (padded[:-2] + padded[2:])).T
    return image


def expose(canvas: Canvas) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 photograph of a canvas: shadows, haze, lens blur and sensor noise."""
    shade = cast_shadows(canvas.height_m)
    low = Image.fromarray(fractal_noise(64, canvas.rng, 1.5))
    drift = np.asarray(low.resize((canvas.size_px, canvas.size_px), Image.Resampling.BICUBIC))
    grain = canvas.rng.standard_normal(shade.shape, dtype=np.float32)
    out = np.empty(canvas.colour.shape, np.uint8)
    grey = canvas.colour.mean(axis=2)  # the air takes some of the saturation
    for band, (left, haze) in enumerate(zip(SHADE_RGB, (9.0, 11.0, 13.0), strict=True)):
        light = (0.85 * canvas.colour[..., band] + 0.15 * grey) * (1.0 - (1.0 - left) * shade) * (1.0 + 0.02 * drift)
        light = blur(light, 0.22) * 0.97 + haze + 1.8 * grain
        out[..., band] = np.clip(light, 6, 250)
    return out
