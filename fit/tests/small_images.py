"""Small images and encoders that several tests of fitting use."""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import Affine

from geocentroids_fit.images import ImageFolder
from geocentroids_fit.shards import FeatureSettings
from geocentroids_tiler.codebook import EncoderSection, PreprocessSection
from geocentroids_tiler.encoder import ChunkLayout, DeviceInfo
from geocentroids_tiler.source import Remote

PRE = PreprocessSection(gsd_m=0.25, window_patches=8, margin_patches=1, stride_patches=3)
LAYOUT = ChunkLayout(8, 1, 3)


class MeanEncoder:
    """Tokens are a patch's mean colour plus a share of its window's, so that blending shows."""

    dim = 3
    window_patches = 8
    batch_windows = 2
    windows_at_once = 4
    info = DeviceInfo("fake", "cpu", "fp32", "none")

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.windows = 0
        self._lock = threading.Lock()

    def encode(self, windows: np.ndarray) -> list[np.ndarray]:
        with self._lock:
            self.windows += len(windows)
        time.sleep(self.seconds * len(windows))
        patches = windows.reshape(-1, 8, 14, 8, 14, 3).mean(axis=(2, 4), dtype=np.float32)
        return list(patches + patches.mean(axis=(1, 2), keepdims=True) / 4)

    def fetch(self, tokens: np.ndarray) -> np.ndarray:
        return tokens

    def token_bytes(self) -> int:
        return 8 * 8 * 3 * 4


def settings(per_image: int = 40, seed: int = 0, encoder: str = "fake") -> FeatureSettings:
    section = EncoderSection(source="encoder.onnx", architecture=encoder, dim=3)
    return FeatureSettings(encoder=section, preprocess=PRE, device="fake/none/fp32", per_image=per_image, seed=seed)


def folder_of(folder: Path, *names: str) -> ImageFolder:
    urls = any(name.startswith("http") for name in names)
    return ImageFolder(folder, names, remote=_remote() if urls else None)


def write_image(path: Path, seed: int, size: int = 14 * 26, left: float = 560_000.0) -> None:
    """Write smooth areas of colour with a black collar on the left."""
    rng = np.random.default_rng(seed)
    areas = np.kron(rng.integers(40, 220, (3, 7, 7)), np.ones((1, size // 7 + 1, size // 7 + 1)))[:, :size, :size]
    bands = (areas + rng.normal(0, 6, areas.shape)).clip(20, 240).astype(np.uint8)
    bands[:, :, : 14 * 4] = 0
    write_bands(path, bands, left=left)


def write_bands(path: Path, bands: np.ndarray, left: float = 560_000.0, pixel_m: float = 0.25, **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "width": width, "height": height, "count": count, "dtype": bands.dtype.name}
    transform = Affine(pixel_m, 0, left, 0, -pixel_m, 6_139_994.0)
    with rasterio.open(
        path, "w", **profile, crs="EPSG:32721", transform=transform, photometric="RGB", **more
    ) as raster:
        raster.write(bands)


@lru_cache(maxsize=1)
def _remote() -> Remote:
    """Return what opens URLs, until ``close_remote``."""
    from rasters import loopback_remote  # not at hand in the processes that some tests start

    return loopback_remote()


def close_remote() -> None:
    """Close the connections of images that were named by URL."""
    _remote().close()
    _remote.cache_clear()
