"""A stand-in for the encoder that tests can look into and hold up, services with it, and labels by brute force."""

from __future__ import annotations

import colorsys
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from codebooks import make_manifest
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.warp import transform_bounds
from rasters import LEFT, LOOPBACK, TOP, UTM, texture, write_tif
from scipy.cluster.hierarchy import linkage

from geocentroids_tiler.codebook import (
    NODATA_LABEL,
    AssignmentSection,
    Codebook,
    EncoderSection,
    PreprocessSection,
    save_codebook,
)
from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo
from geocentroids_tiler.grid import ChunkIndex, PatchRange
from geocentroids_tiler.labels.service import Service
from geocentroids_tiler.settings import Settings
from geocentroids_tiler.source import Dataset, ReadOptions, Remote, read_windows

PATCH_PX = 14
WINDOW, MARGIN = 8, 1
STRIDES = {"plain": 6, "blend": 3, "bare": 3}
"""Codebooks: without blending, with it, and with it but without a tree and names."""
K, DIM = 24, 5
NAMES = {None: {0: "road", 5: "Wiese äöü"}, 6: {1: "forest"}}
PATIENCE_S = 30.0
"""Longest wait for something that happens at once when nothing is broken."""


LIBRARY_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Use `@` matmul"),
    pytest.mark.filterwarnings("ignore:Cannot determine minzoom"),
    pytest.mark.filterwarnings("ignore:You will likely lose important projection information"),
]
"""Marks for tests that go through TiTiler's own routes: what its libraries warn of."""


class PoisonError(Exception):
    """What a poisoned window fails with."""


def window_id(window: NDArray[np.uint8]) -> str:
    return hashlib.sha256(window.tobytes()).hexdigest()


def window_tokens(window: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return tokens of shape (P, P, DIM): of the patch's pixels, of the whole window, and of the place in it."""
    p = len(window) // PATCH_PX
    patches = window.reshape(p, PATCH_PX, p, PATCH_PX, 3).mean(axis=(1, 3)) / 255  # (P, P, 3)
    row, col = np.indices((p, p))
    tokens = np.empty((p, p, DIM))
    tokens[..., :3] = patches + 0.4 * (window.mean(axis=(0, 1)) / 255 - 0.5)
    tokens[..., 3] = patches.mean(axis=2) + 0.15 * np.sin(1.3 * row)
    tokens[..., 4] = patches[..., 0] - patches[..., 1] + 0.15 * np.cos(1.7 * col)
    return tokens


@dataclass
class FakeEncoder:
    """Tokens that anybody can compute again, and hooks.

    Attributes:
        batch_windows: windows in a run.
        gate: runs wait until it is set, as it is from the start.
        entered: released once for each run that began.
        poison: ids of windows that fail.
        runs: windows of each run, in order.
        encoded: how often each window was encoded.
        assigned: chunks of each assignment.
    """

    dim: int = DIM
    window_patches: int = WINDOW
    batch_windows: int = 4
    info: DeviceInfo = field(default_factory=lambda: DeviceInfo("fake", "cpu", "fp64", "numpy"))
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    poison: set[str] = field(default_factory=set)
    runs: list[int] = field(default_factory=list)
    encoded: Counter[str] = field(default_factory=Counter)
    assigned: list[int] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def windows_at_once(self) -> int:
        return self.batch_windows

    def encode(self, windows: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> list[NDArray[np.float64]]:
        assert len(windows) <= self.batch_windows
        self.entered.release()
        assert self.gate.wait(PATIENCE_S)
        if self.poison.intersection(map(window_id, windows)):
            raise PoisonError("poisoned")
        self.runs.append(len(windows))
        self.encoded.update(map(window_id, windows))
        return [window_tokens(window) for window in windows]

    def fetch(self, tokens: NDArray[np.float64]) -> NDArray[np.float32]:
        return tokens.astype(np.float32)

    def token_bytes(self) -> int:
        return self.window_patches**2 * self.dim * 8

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> FakeAssigner:
        return FakeAssigner(self, centroids.astype(np.float64), metric, layout)

    def close(self) -> None:
        self.closed = True

    def forget(self) -> None:
        """Start counting anew."""
        self.runs.clear()
        self.encoded.clear()
        self.assigned.clear()

    def await_run(self) -> None:
        """Wait until a run began."""
        assert self.entered.acquire(timeout=PATIENCE_S)


@dataclass
class FakeAssigner:
    encoder: FakeEncoder
    centroids: NDArray[np.float64]
    metric: str
    layout: ChunkLayout

    def assign(self, chunks: Sequence[Sequence[NDArray[np.float64]]]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        return self.begin(chunks)()

    def begin(
        self, chunks: Sequence[Sequence[NDArray[np.float64]]]
    ) -> Callable[[], tuple[NDArray[np.uint16], NDArray[np.float32]]]:
        self.encoder.assigned.append(len(chunks))
        s, weights = self.layout.stride_patches, self.layout.weights().astype(np.float64)
        labels, similarity = [], []
        for windows in chunks:
            blended = np.zeros((s, s, DIM))
            for part, weight, tokens in zip(self.layout.parts, weights, windows, strict=True):
                own = tokens[part.token_row : part.token_row + s, part.token_col : part.token_col + s]
                blended += weight[..., None] * own
            score = similarities(blended, self.centroids, self.metric)
            labels.append(score.argmax(axis=-1).astype(np.uint16))
            similarity.append(score.max(axis=-1).astype(np.float32))
        result = np.stack(labels), np.stack(similarity)
        return lambda: result


def similarities(tokens: NDArray[np.float64], centroids: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """Return the similarity of each token to each centroid."""
    if metric == "l2":
        return -np.linalg.norm(tokens[..., None, :] - centroids, axis=-1)
    products = tokens @ centroids.T
    if metric == "cosine":
        products /= np.linalg.norm(tokens, axis=-1)[..., None] * np.linalg.norm(centroids, axis=-1)
    return products


def distinct_colors(k: int = K) -> NDArray[np.uint8]:
    """Return saturated colours that are far apart."""
    tones = [colorsys.hsv_to_rgb(i / k, 1 - 0.35 * (i % 2), 1 - 0.3 * (i % 3) / 2) for i in range(k)]
    return np.rint(np.array(tones) * 255).astype(np.uint8)


def fake_codebook(name: str, *, metric: str = "l2", stride: int | None = None, gsd_m: float = 0.25) -> Codebook:
    """Return a codebook whose classes all occur in textures."""
    rng = np.random.default_rng(3)
    centroids = rng.uniform(0.15, 0.85, (K, DIM))
    centroids[:, 4] = rng.uniform(-0.3, 0.3, K)
    bare = name == "bare"
    preprocess = PreprocessSection(
        gsd_m=gsd_m, window_patches=WINDOW, margin_patches=MARGIN, stride_patches=stride or STRIDES[name]
    )
    return Codebook(
        manifest=make_manifest(
            name,
            encoder=EncoderSection(source="owner/encoder", architecture="fake", dim=DIM, patch_px=PATCH_PX),
            preprocess=preprocess,
            assignment=AssignmentSection.model_validate({"metric": metric}),
        ),
        centroids=centroids.astype(np.float32),
        colors=distinct_colors(),
        counts=None if bare else rng.integers(1, 1000, K),
        tree=None if bare else linkage(centroids, "ward"),
        names={} if bare else NAMES,
    )


def write_codebooks(folder: Path) -> Path:
    """Write the codebooks of ``STRIDES`` to a new folder."""
    for name in STRIDES:
        save_codebook(fake_codebook(name), folder / name, card="For tests.")
    return folder


@dataclass
class Loader:
    """Loads fake encoders, and remembers them by codebook; fails as often as ``failures`` says first."""

    failures: int = 0
    loads: int = 0
    made: dict[str, FakeEncoder] = field(default_factory=dict)

    def __call__(self, codebook: Codebook, settings: Settings) -> FakeEncoder:
        self.loads += 1
        if self.loads <= self.failures:
            raise OSError("no such device")
        return self.made.setdefault(codebook.name, FakeEncoder(batch_windows=settings.batch_windows or 4))


def fake_service(
    root: Path,
    codebooks_dir: Path,
    *,
    clock: Callable[[], float] | None = None,
    failures: int = 0,
    remote: Remote | None = None,
    **settings: Any,
) -> tuple[Service, Loader]:
    """Return a service with fake encoders, and what made these."""
    loader = Loader(failures)
    values = {"root": root, "codebooks_dir": codebooks_dir, "codebook": "blend", "tile_budget_s": 600} | settings
    clocks = {} if clock is None else {"clock": clock}
    return Service(Settings(**{**LOOPBACK, **values}), load=loader, remote=remote, **clocks), loader


def open_image(service: Service, name: str, codebook: str | None = None, **options: Any) -> Dataset:
    return service.dataset(name, ReadOptions(**options), service.codebook(codebook)).result(PATIENCE_S)


def brute_force(dataset: Dataset, codebook: Codebook) -> tuple[NDArray[np.uint16], NDArray[np.float64]]:
    """Label a whole image as the design page words it, one window after the other, in float64.

    Returns:
        Labels of the image's footprint, and for each patch how much nearer its centroid is than the next.
    """
    pre, area = codebook.manifest.preprocess, dataset.footprint
    core, s = pre.window_patches - 2 * pre.margin_patches, pre.stride_patches
    tent = np.array([min(k + 0.5, core - k - 0.5) if core > s else 1.0 for k in range(core)])
    pad = 2 * core
    total = np.zeros((area.shape[0] + 2 * pad, area.shape[1] + 2 * pad, DIM))
    weight = np.zeros(total.shape[:2])
    labelled = np.zeros(total.shape[:2], bool)
    inner = np.s_[pre.margin_patches : pre.margin_patches + core, pre.margin_patches : pre.margin_patches + core]
    for i in range((area.row_start - core) // s, area.row_stop // s + 1):
        columns = range((area.col_start - core) // s, area.col_stop // s + 1)
        windows = read_windows(dataset, [ChunkIndex(i, j) for j in columns], PATCH_PX)
        for j, window in zip(columns, windows, strict=True):
            row, col = i * s - area.row_start + pad, j * s - area.col_start + pad
            at = np.s_[row : row + core, col : col + core]
            share = np.outer(tent, tent)
            total[at] += share[..., None] * window_tokens(window.pixels)[inner]
            weight[at] += share
            labelled[at] = window.labelled[inner]
    middle = np.s_[pad:-pad, pad:-pad]
    total, weight, labelled = total[middle], weight[middle], labelled[middle]
    score = similarities(
        total / weight[..., None], codebook.centroids.astype(np.float64), codebook.manifest.assignment.metric
    )
    labels = np.where(labelled, score.argmax(axis=-1), NODATA_LABEL).astype(np.uint16)
    best = np.sort(score, axis=-1)
    return labels, best[..., -1] - best[..., -2]


def labels_of_colors(rgba: NDArray[np.uint8], colors: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return the label of each pixel of (H, W, 4) by its colour; NODATA_LABEL where it is transparent.

    Raises:
        AssertionError: if a colour is none of the codebook's, or half transparent.
    """
    assert np.isin(rgba[..., 3], (0, 255)).all()
    assert len(np.unique(colors, axis=0)) == len(colors), "colours are not distinct"
    code = np.array([1 << 16, 1 << 8, 1])
    known, found = colors @ code, rgba[..., :3] @ code
    order = np.argsort(known)
    label = order[np.searchsorted(known, found, sorter=order).clip(0, len(known) - 1)]
    opaque = rgba[..., 3] == 255
    assert (known[label] == found)[opaque].all()
    return np.where(opaque, label, NODATA_LABEL).astype(np.uint16)


def part_of(labels: NDArray[Any], whole: PatchRange, part: PatchRange) -> NDArray[Any]:
    """Cut ``part`` out of labels of ``whole``."""
    assert part == part.intersect(whole)
    return labels[
        part.row_start - whole.row_start : part.row_stop - whole.row_start,
        part.col_start - whole.col_start : part.col_stop - whole.col_start,
    ]


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that other threads are about to do."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def write_images(folder: Path) -> Path:
    """Write images of one place: whole, with a hole, in Web Mercator and in degrees."""
    folder.mkdir(exist_ok=True)
    pixels = texture(400, 420, seed=1)
    at = Affine(0.25, 0, LEFT + 1.25, 0, -0.25, TOP - 0.5)  # no edge on the edge of a patch
    write_tif(folder / "whole.tif", pixels, transform=at, photometric="RGB")
    holed = pixels.copy()
    holed[:, 120:290, 150:330] = 0
    write_tif(folder / "hole.tif", holed, transform=at, nodata=0, photometric="RGB")
    for name, crs in (("mercator.tif", "EPSG:3857"), ("degrees.tif", "EPSG:4326")):
        left, bottom, right, top = transform_bounds(UTM, crs, LEFT, TOP - 55, LEFT + 60, TOP)
        there = Affine((right - left) / 240, 0, left, 0, (bottom - top) / 220, top)
        write_tif(folder / name, pixels[:, 100:320, 100:340], crs=crs, transform=there, photometric="RGB")
    return folder
