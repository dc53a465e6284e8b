"""From images to features: windows are read ahead of the encoder, and blended and sampled behind it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from geocentroids_fit.images import ahead
from geocentroids_fit.reading import Batch, ReadBatch, ReadChunk, Unreadable
from geocentroids_fit.sampling import Sample, chunks_of_sample
from geocentroids_fit.shards import Features, FeatureSettings
from geocentroids_tiler.encoder import ChunkLayout, Encoder, TokenHandle
from geocentroids_tiler.errors import InputError
from geocentroids_tiler.grid import ChunkIndex
from geocentroids_tiler.source import Dataset

TOKEN_CACHE_BYTES = 256 * 2**20
"""Windows kept because their neighbours' chunks need them too: two rows of windows of a wide image."""
BATCHES_BEHIND = 4
"""Batches that may wait to be blended and sampled."""

Read = Callable[[Batch], Future[ReadBatch | Unreadable]]
"""Begins to read a batch."""


class Sink(Protocol):
    """Where the features of images go."""

    def finish(self, name: str, dataset: Dataset, features: Features) -> None:
        """Take the features of an image."""
        ...

    def skip(self, name: str, reason: str) -> None:
        """Hear that an image gives none, and why."""
        ...

    def advance(self, features: int, *, expected: bool = False) -> None:
        """Hear of work done, in features; with ``expected`` as many more (or less) are expected in all."""
        ...


@dataclass(frozen=True)
class ReadingAhead:
    """How windows are read ahead of the encoder.

    Attributes:
        read: begins to read a batch.
        batches: that are begun before their turn.
        chunks: of a batch.
    """

    read: Read
    batches: int
    chunks: int


@dataclass(frozen=True)
class _Image:
    number: int
    name: str
    dataset: Dataset
    chunks: list[ChunkIndex]
    sample: Sample


@dataclass(frozen=True)
class _Work:
    """A chunk ready to be blended: it, and the tokens of its windows."""

    chunk: ReadChunk
    tokens: list[TokenHandle]


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


def layout_of(settings: FeatureSettings) -> ChunkLayout:
    """Return how windows cover a chunk."""
    pre = settings.preprocess
    return ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)


class FeatureStream:
    """Images on their way through an encoder.

    The features of an image depend on the image, the encoder and the settings only: not on the images beside it, nor on
    how much is read ahead.

    Attributes:
        encoding_s: seconds in which the encoder was given windows.
        began: clock when the first window was there, 0 before.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: FeatureSettings,
        reading: ReadingAhead,
        behind: Executor,
        sink: Sink,
        turn: AbstractContextManager[object] | None = None,
    ) -> None:
        """Prepare a stream.

        Args:
            encoder: computes tokens.
            settings: what features depend on.
            reading: how windows are read.
            behind: blends and samples; one thread.
            sink: where features go; called from ``behind``, ``skip`` from the thread that calls ``run``.
            turn: held while windows are given to the encoder, where several streams share it.
        """
        self._encoder, self._settings, self._reading = encoder, settings, reading
        self._behind, self._sink, self._turn = behind, sink, turn or nullcontext()
        self._layout = layout_of(settings)
        self._tokens: LRUCache[tuple[int, ChunkIndex], TokenHandle] = LRUCache(
            max(2 * reading.chunks * len(self._layout.parts), TOKEN_CACHE_BYTES // encoder.token_bytes())
        )
        self.encoding_s = self.began = 0.0

    def run(self, images: Iterable[tuple[str, Dataset]]) -> None:
        """Compute the features of images, which are opened as this asks for them.

        Raises:
            InputError: if tokens are not finite; or what the sink raises.
        """
        finishing: deque[Future[None]] = deque()
        broken: set[str] = set()
        for (image, batch), read in ahead(self._read, self._batches(images), self._reading.batches):
            if image.name in broken:
                continue
            found = read.result()
            if isinstance(found, Unreadable):
                broken.add(image.name)
                self._sink.skip(image.name, found.reason)
                done = self._share(image, batch.start)
                finishing.append(self._behind.submit(self._sink.advance, -done, expected=True))
                continue
            self.began = self.began or time.perf_counter()
            finishing.append(self._behind.submit(self._finish, image, batch, self._encode(image, found)))
            del found, read  # else their windows stay in memory beside those that are read next
            while len(finishing) > BATCHES_BEHIND or (finishing and finishing[0].done()):
                finishing.popleft().result()
        for future in finishing:
            future.result()

    def _batches(self, images: Iterable[tuple[str, Dataset]]) -> Iterator[tuple[_Image, Batch]]:
        """Yield the chunks to look at, image by image."""
        settings, size = self._settings, self._reading.chunks
        for number, (name, dataset) in enumerate(images):
            s = self._layout.stride_patches
            chunks = chunks_of_sample(dataset.footprint, s, settings.per_image, name, settings.seed)
            sample = Sample(name, settings.seed, settings.per_image, self._encoder.dim)
            image = _Image(number, name, dataset, chunks, sample)
            for start in range(0, len(chunks), size):
                yield image, Batch(dataset, start, tuple(chunks[start : start + size]))

    def _read(self, item: tuple[_Image, Batch]) -> Future[ReadBatch | Unreadable]:
        return self._reading.read(item[1])

    def _encode(self, image: _Image, read: ReadBatch) -> list[_Work]:
        """Encode the windows whose tokens are not kept, and gather those of each chunk."""
        tokens, number = self._tokens, image.number
        # get: used now, so kept longest
        missing = [window for window in read.windows if tokens.get((number, window)) is None]
        size = self._encoder.windows_at_once
        start = time.perf_counter()
        with self._turn:
            for at in range(0, len(missing), size):
                part = missing[at : at + size]
                handles = self._encoder.encode(np.stack([read.windows[window] for window in part]))
                tokens.update({(number, window): handle for window, handle in zip(part, handles, strict=True)})
        self.encoding_s += time.perf_counter() - start
        return [
            _Work(_copied(chunk), [tokens[number, window] for window in self._layout.windows_of(chunk.index)])
            for chunk in read.chunks
        ]

    def _finish(self, image: _Image, batch: Batch, work: list[_Work]) -> None:
        """Blend and sample a batch; with an image's last one, hand over its features."""
        s = self._layout.stride_patches
        for item in work:
            chunk = item.chunk
            blended = blend([self._encoder.fetch(handle) for handle in item.tokens], self._layout)
            row, col = np.nonzero(chunk.labelled)
            with np.errstate(over="ignore"):  # what overflows is caught as not finite
                tokens = blended[row, col].astype(np.float16)
            if not np.isfinite(tokens).all():
                raise InputError(
                    f"{image.name}: the encoder gives tokens that are not finite numbers of 16 bits; "
                    "check the encoder, or leave the image out"
                )
            offered = Features(
                tokens=tokens,
                rgb=chunk.rgb[row, col],
                row=chunk.index.row * s + row,
                col=chunk.index.col * s + col,
            )
            image.sample.offer(chunk.number, offered)
        self._sink.advance(self._share(image, batch.stop) - self._share(image, batch.start))
        if batch.stop == len(image.chunks):
            features = image.sample.features()
            self._sink.finish(image.name, image.dataset, features)
            self._sink.advance(len(features) - self._settings.per_image, expected=True)

    def _share(self, image: _Image, chunks: int) -> int:
        """Return the features that a progress bar shows for the first of an image's chunks."""
        return self._settings.per_image * chunks // len(image.chunks)


def _copied(chunk: ReadChunk) -> ReadChunk:
    """Return the same in memory of its own: what comes through Ray's object store keeps all of its batch there."""
    return ReadChunk(chunk.number, chunk.index, chunk.labelled.copy(), chunk.rgb.copy())
