"""From images to features: the tokens of labelled patches, exactly as serving computes them, a shard per image.

Windows are read by threads ahead of the encoder, and blended and sampled behind it, so that the device stays busy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from tqdm import tqdm

from geocentroids_fit.files import read_json, write_json
from geocentroids_fit.images import ImageFolder, ahead
from geocentroids_fit.sampling import Sample, chunks_of_sample
from geocentroids_fit.shards import (
    MANIFEST_FILE,
    SHARDS_DIR,
    FeatureManifest,
    Features,
    FeatureSettings,
    FeatureStore,
    ShardRecord,
    SkippedImage,
    finished_shard,
    write_shard,
)
from geocentroids_tiler.codebook import Codebook
from geocentroids_tiler.encoder import ChunkLayout, Encoder, TokenHandle
from geocentroids_tiler.errors import GeocentroidsError, InputError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.source import Dataset, WindowPixels, read_windows

S = TypeVar("S", bound=np.generic)

SETTINGS_FILE = "settings.json"
CHUNKS_PER_BATCH = 16
"""Chunks whose windows are read through one opening of a file."""
OPEN_AHEAD = 4
"""Images opened before their turn."""
TOKEN_CACHE_BYTES = 256 * 2**20
"""Windows kept because their neighbours' chunks need them too: two rows of windows of a wide image."""
BATCHES_BEHIND = 4
"""Batches that may wait to be blended and sampled."""


@dataclass(frozen=True)
class Extraction:
    """What an extraction made.

    Attributes:
        store: the features.
        reused: images whose features were there already.
        busy: share of the time, from the first window on, that the encoder was running; 0 if it did not run.
        features_per_s: features computed in a second of that time.
    """

    store: FeatureStore
    reused: int
    busy: float
    features_per_s: float


@dataclass(frozen=True)
class _Image:
    number: int
    name: str
    dataset: Dataset
    chunks: list[ChunkIndex]
    sample: Sample


@dataclass(frozen=True)
class _Batch:
    """Chunks of one image; ``start`` is the number of the first among the image's."""

    image: _Image
    start: int
    chunks: list[ChunkIndex]

    @property
    def stop(self) -> int:
        return self.start + len(self.chunks)


@dataclass(frozen=True)
class _Work:
    """A chunk ready to be blended; ``pixels`` are its own, of shape (s * patch_px, s * patch_px, 3)."""

    chunk: int
    index: ChunkIndex
    labelled: NDArray[np.bool_]
    pixels: NDArray[np.uint8]
    tokens: list[TokenHandle]


def extract(
    images: ImageFolder,
    encoder: Encoder,
    codebook: Codebook,
    settings: FeatureSettings,
    out: Path,
    *,
    readers: int = 2,
    progress: bool = True,
) -> Extraction:
    """Compute features of images and write them to a directory, a shard for each image.

    Shards that are there already and were made of the same image are kept, so a run that was ended at any moment goes
    on where it stopped and comes to the same files. An image that cannot be used is left out, and the manifest says
    why.

    Args:
        images: what to sample.
        encoder: computes tokens.
        codebook: how images are opened and windows are laid; its centroids do not matter.
        settings: what the features depend on; kept in the manifest.
        out: the directory.
        readers: threads that read.
        progress: whether a progress bar is drawn.

    Raises:
        InputError: if ``out`` holds features of other settings, no patch has data, or there is no room.
    """
    _check_settings(out, settings)
    run = _Run(images, encoder, codebook, settings, out / SHARDS_DIR)
    with (
        ThreadPoolExecutor(readers, "geocentroids-read") as pool,
        ThreadPoolExecutor(1, "geocentroids-blend") as behind,
    ):
        reused = run.find_finished(pool)
        with tqdm(total=run.expected, unit="feature", disable=not progress, smoothing=0.1) as bar:
            run.all(pool, behind, readers, bar)
    records = tuple(run.records[name] for name in images.names if name in run.records)
    skipped = tuple(SkippedImage(image=name, reason=run.skipped[name]) for name in images.names if name in run.skipped)
    manifest = FeatureManifest(settings=settings, images=records, skipped=skipped)
    store = FeatureStore(out, manifest)
    if not len(store):
        reasons = "; ".join(f"{image.image}: {image.reason}" for image in skipped[:3])
        raise InputError(
            f"no patch of the {len(images.names)} images has data; there is nothing to fit"
            + (f" ({reasons})" if reasons else "")
        )
    write_json(out / MANIFEST_FILE, manifest.model_dump(mode="json"))
    return Extraction(store, reused, run.busy, run.features_per_s)


def blend(tokens: Sequence[NDArray[np.float32]], layout: ChunkLayout) -> NDArray[np.float32]:
    """Blend the tokens of the windows that cover a chunk.

    Args:
        tokens: for each of ``layout.parts`` the tokens of its window, of shape (P, P, D).
        layout: how windows cover a chunk.

    Returns:
        Tokens of the chunk's patches, of shape (s, s, D), float32.
    """
    s = layout.stride_patches
    total = np.zeros((s, s, tokens[0].shape[-1]), np.float32)
    for part, weight, window in zip(layout.parts, layout.weights(), tokens, strict=True):
        share = window[part.token_row : part.token_row + s, part.token_col : part.token_col + s]
        total += share * weight[..., None]
    return total


class _Run:
    """State of one extraction: what is finished, what failed, and the image that is being sampled."""

    def __init__(
        self, images: ImageFolder, encoder: Encoder, codebook: Codebook, settings: FeatureSettings, shards: Path
    ) -> None:
        pre = settings.preprocess
        self._images, self._encoder, self._codebook, self._settings = images, encoder, codebook, settings
        self._shards = shards
        self._layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
        self.records: dict[str, ShardRecord] = {}
        self.skipped: dict[str, str] = {}
        self._pending: list[str] = []
        self._encoding_s = self._began = self._ended = 0.0
        self._computed = 0

    @property
    def expected(self) -> int:
        """Features still to compute, if every image has as many as it may give."""
        return len(self._pending) * self._settings.per_image

    @property
    def busy(self) -> float:
        return self._encoding_s / max(self._ended - self._began, 1e-9)

    @property
    def features_per_s(self) -> float:
        return self._computed / max(self._ended - self._began, 1e-9)

    def find_finished(self, pool: ThreadPoolExecutor) -> int:
        """Sort images into those with a shard, those that are not there, and those to do; return how many have one."""
        for name, found in ahead(pool, self._finished, self._images.names, 64):
            try:
                record = found.result()
            except GeocentroidsError as error:
                self.skipped[name] = str(error)
                continue
            if record is None:
                self._pending.append(name)
            else:
                self.records[name] = record
        return len(self.records)

    def all(self, pool: ThreadPoolExecutor, behind: ThreadPoolExecutor, readers: int, bar: tqdm[NoReturn]) -> None:
        """Compute the features of all images to do."""
        finishing: deque[Future[None]] = deque()
        tokens: LRUCache[tuple[int, ChunkIndex], TokenHandle] = LRUCache(
            max(2 * CHUNKS_PER_BATCH * len(self._layout.parts), TOKEN_CACHE_BYTES // self._encoder.token_bytes())
        )
        for batch, read in ahead(pool, self._read, self._batches(pool), readers + 1):
            name = batch.image.name
            if name in self.skipped:
                continue
            try:
                windows = read.result()
            except GeocentroidsError as error:  # the image is broken somewhere in its middle
                self.skipped[name] = str(error)
                finishing.append(behind.submit(self._account, bar, -self._share(batch.image, batch.start), True))
                continue
            self._began = self._began or time.perf_counter()
            work = self._encode(batch, windows, tokens)
            finishing.append(behind.submit(self._finish, batch, work, bar))
            while len(finishing) > BATCHES_BEHIND or (finishing and finishing[0].done()):
                finishing.popleft().result()
        for future in finishing:
            future.result()
        self._ended = time.perf_counter()

    def _finished(self, name: str) -> ShardRecord | None:
        return finished_shard(self._shards, name, self._images.identity(name))

    def _batches(self, pool: ThreadPoolExecutor) -> Iterator[_Batch]:
        """Yield the chunks to look at, image by image; images are opened ahead."""
        s = self._layout.stride_patches
        for number, (name, opened) in enumerate(ahead(pool, self._open, self._pending, OPEN_AHEAD)):
            try:
                dataset = opened.result()
            except GeocentroidsError as error:
                self.skipped[name] = str(error)
                continue
            settings = self._settings
            chunks = chunks_of_sample(dataset.footprint, s, settings.per_image, name, settings.seed)
            sample = Sample(name, settings.seed, settings.per_image, self._encoder.dim)
            image = _Image(number, name, dataset, chunks, sample)
            for start in range(0, len(chunks), CHUNKS_PER_BATCH):
                yield _Batch(image, start, chunks[start : start + CHUNKS_PER_BATCH])

    def _open(self, name: str) -> Dataset:
        return self._images.open(name, self._codebook)

    def _read(self, batch: _Batch) -> dict[ChunkIndex, WindowPixels]:
        """Read the own windows of chunks, and of those that have data the others that cover them."""
        dataset, patch_px = batch.image.dataset, self._settings.encoder.patch_px
        read = dict(zip(batch.chunks, read_windows(dataset, batch.chunks, patch_px), strict=True))
        needed = dict.fromkeys(
            window
            for chunk in batch.chunks
            if self._own(read[chunk].labelled).any()
            for window in self._layout.windows_of(chunk)
        )
        others = [window for window in needed if window not in read]
        return read | dict(zip(others, read_windows(dataset, others, patch_px), strict=True))

    def _own(self, of_window: NDArray[S], per_patch: int = 1) -> NDArray[S]:
        """Return the part of a window's array (P * per_patch, P * per_patch, ...) that is its own chunk's."""
        s, m = self._layout.stride_patches * per_patch, self._layout.margin_patches * per_patch
        return of_window[m : m + s, m : m + s]

    def _encode(
        self,
        batch: _Batch,
        windows: dict[ChunkIndex, WindowPixels],
        tokens: LRUCache[tuple[int, ChunkIndex], TokenHandle],
    ) -> list[_Work]:
        """Encode the windows whose tokens are not kept, and gather those of each chunk that has data."""
        image = batch.image.number
        useful = [i for i, chunk in enumerate(batch.chunks) if self._own(windows[chunk].labelled).any()]
        needed = {i: self._layout.windows_of(batch.chunks[i]) for i in useful}
        wanted = dict.fromkeys(window for i in useful for window in needed[i])
        missing = [window for window in wanted if tokens.get((image, window)) is None]  # get: used now, so kept longest
        size = self._encoder.windows_at_once
        start = time.perf_counter()
        for at in range(0, len(missing), size):
            part = missing[at : at + size]
            handles = self._encoder.encode(np.stack([windows[window].pixels for window in part]))
            tokens.update({(image, window): handle for window, handle in zip(part, handles, strict=True)})
        self._encoding_s += time.perf_counter() - start
        patch_px = self._settings.encoder.patch_px
        return [
            _Work(
                chunk=batch.start + i,
                index=batch.chunks[i],
                labelled=self._own(windows[batch.chunks[i]].labelled),
                pixels=self._own(windows[batch.chunks[i]].pixels, patch_px),
                tokens=[tokens[image, window] for window in needed[i]],
            )
            for i in useful
        ]

    def _finish(self, batch: _Batch, work: list[_Work], bar: tqdm[NoReturn]) -> None:
        """Blend and sample a batch; with an image's last one, write its shard."""
        s, image = self._layout.stride_patches, batch.image
        for item in work:
            blended = blend([self._encoder.fetch(handle) for handle in item.tokens], self._layout)
            row, col = np.nonzero(item.labelled)
            with np.errstate(over="ignore"):  # what overflows is caught as not finite
                tokens = blended[row, col].astype(np.float16)
            if not np.isfinite(tokens).all():
                raise InputError(
                    f"{image.name}: the encoder gives tokens that are not finite numbers of 16 bits; "
                    "check the encoder, or leave the image out"
                )
            offered = Features(
                tokens=tokens,
                rgb=_patch_colors(item.pixels, self._settings.encoder.patch_px)[row, col],
                row=item.index.row * s + row,
                col=item.index.col * s + col,
            )
            image.sample.offer(item.chunk, offered)
        self._account(bar, self._share(image, batch.stop) - self._share(image, batch.start), False)
        if batch.stop == len(image.chunks):
            features = image.sample.features()
            self.records[image.name] = write_shard(
                self._shards, image.name, image.dataset.identity, features, image.dataset.geographic_bounds
            )
            self._computed += len(features)
            self._account(bar, len(features) - self._settings.per_image, True)

    def _share(self, image: _Image, chunks: int) -> int:
        """Return what a bar shows for the first of an image's chunks."""
        return self._settings.per_image * chunks // len(image.chunks)

    def _account(self, bar: tqdm[NoReturn], features: int, expected: bool) -> None:
        """Move a bar; with ``expected``, features that an image turned out not to have are not waited for either."""
        if expected:
            bar.total = (bar.total or 0) + features
        bar.update(features)


def _check_settings(out: Path, settings: FeatureSettings) -> None:
    """Raise InputError if a directory holds features made in another way; else note how they are made."""
    found, wanted = read_json(out / SETTINGS_FILE), settings.model_dump(mode="json")
    if found is None:
        write_json(out / SETTINGS_FILE, wanted)
    elif found != wanted:
        changed = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise InputError(
            f"{out} holds features made with another {changed}; name another work folder, or remove this one"
        )


def _patch_colors(pixels: NDArray[np.uint8], patch_px: int) -> NDArray[np.uint8]:
    """Return the mean colour of each patch of a square (S, S, 3), of shape (S / patch_px, S / patch_px, 3)."""
    p = len(pixels) // patch_px
    mean = pixels.reshape(p, patch_px, p, patch_px, 3).mean(axis=(1, 3))
    rgb: NDArray[np.uint8] = np.rint(mean).astype(np.uint8)
    return rgb
