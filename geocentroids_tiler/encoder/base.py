"""What every encoder offers: windows in, tokens that stay on the device, labels out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geocentroids_tiler.codebook import ENCODER_FILE, EncoderSection, PreprocessSection
from geocentroids_tiler.errors import CodebookError
from geocentroids_tiler.grid import ChunkIndex

TokenHandle = Any
"""The tokens of one window, wherever the device keeps them. Opaque to everything but its own encoder."""

Windows = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""N windows, RGB: arrays of shape (S, S, 3), or one array of shape (N, S, S, 3)."""

Labels = tuple[NDArray[np.uint16], NDArray[np.float32]]
"""Labels and similarities of N chunks, both of shape (N, s, s)."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What an encoder runs on.

    Attributes:
        backend: ``onnxruntime``, ``openvino`` or ``torch``.
        device: for example ``cpu``, ``cuda:0``.
        precision: number format of the matrix products, for example ``fp32``, ``bf16``, or ``int8+bf16`` where
            those with weights are in int8 and the others in bf16.
        provider: the execution provider or kernel set, for example ``CPUExecutionProvider``.
    """

    backend: str
    device: str
    precision: str
    provider: str


@dataclass(frozen=True, slots=True)
class EncoderSource:
    """Where an encoder comes from, and what it has to be.

    Attributes:
        onnx_path: an ONNX file as ``export_onnx`` writes it, or None.
        model: a hub id or a local directory with ``config.json`` and safetensors weights, or None.
        revision: commit, tag or branch of the hub id; None is the newest.
        architecture: name for messages, for example ``dinov2_with_registers``.
        dim: length D of a token.
        patch_px: pixels a side of a patch.
        register_tokens: register tokens of the model, which are dropped.
        window_patches: patches a side of a window.
        mean: mean of R, G, B that is subtracted from pixels in [0, 1].
        std: what the difference is divided by.
        sha256: hex digest of the file that is loaded, ``onnx_path`` or ``model.safetensors``; None skips
            the check.
        allow_download: whether the hub may be asked for what is not in its local cache.
    """

    onnx_path: Path | None
    model: str | None
    revision: str | None
    architecture: str
    dim: int
    patch_px: int
    register_tokens: int
    window_patches: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sha256: str | None
    allow_download: bool


def encoder_source(section: EncoderSection, preprocess: PreprocessSection, embedded: Path | None) -> EncoderSource:
    """Return where the encoder that a manifest describes comes from, and what it has to be.

    Args:
        section: what the manifest says of the encoder.
        preprocess: from pixels to windows.
        embedded: the ``encoder.onnx`` beside the manifest, or None.

    Raises:
        CodebookError: if the manifest names an embedded encoder and there is none.
    """
    named_embedded = section.source == ENCODER_FILE
    if named_embedded and embedded is None:
        raise CodebookError(f"the codebook names {ENCODER_FILE} as its encoder, but has none")
    return EncoderSource(
        onnx_path=embedded,
        model=None if named_embedded else section.source,
        revision=section.revision,
        architecture=section.architecture,
        dim=section.dim,
        patch_px=section.patch_px,
        register_tokens=section.register_tokens,
        window_patches=preprocess.window_patches,
        mean=preprocess.mean,
        std=preprocess.std,
        # The digest is of the file that the manifest names; an export of it beside the codebook is another file.
        sha256=section.sha256 if named_embedded or embedded is None else None,
        allow_download=False,
    )


class Assigner(Protocol):
    """Blends the tokens of overlapping windows and finds the nearest centroid, on the encoder's device."""

    def begin(self, chunks: Sequence[Sequence[TokenHandle]]) -> Callable[[], Labels]:
        """Start to label chunks, and return what waits for the labels.

        More windows can be handed to the encoder before the wait, so that the device has work meanwhile.

        Args:
            chunks: for each of N chunks the tokens of its windows, in the order of ``ChunkLayout.parts``.

        Returns:
            A function, to be called once, that returns labels of shape (N, s, s), uint16, and similarities of
            shape (N, s, s), float32, s = ``stride_patches``. Neither depends on which other chunks were in the call.
            It raises EncoderError if the device failed.
        """
        ...

    def assign(self, chunks: Sequence[Sequence[TokenHandle]]) -> Labels:
        """Label chunks: ``begin`` and wait."""
        return self.begin(chunks)()


class Encoder(Protocol):
    """A vision transformer on one device."""

    @property
    def dim(self) -> int:
        """Length D of a token."""
        ...

    @property
    def window_patches(self) -> int:
        """Patches a side P of a window; a window is ``14 * P`` px a side."""
        ...

    @property
    def batch_windows(self) -> int:
        """Windows that fill one run of the device. ``encode`` pads to it, so tokens never depend on company.

        It halves where the device's memory is too small for it, so ask again before each call.
        """
        ...

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy when they are handed over together; a multiple of ``batch_windows``."""
        ...

    @property
    def info(self) -> DeviceInfo:
        """The device behind this encoder."""
        ...

    def encode(self, windows: Windows) -> list[TokenHandle]:
        """Encode N windows, RGB, to N handles of (P, P, D) tokens on the device.

        Args:
            windows: uint8 arrays of shape (S, S, 3), or one of shape (N, S, S, 3). Each is copied at most once, into
                the batch of its run, and not read after the call.

        Raises:
            EncoderError: if windows have another shape or type, or one does not fit the device's memory.
        """
        ...

    def fetch(self, tokens: TokenHandle) -> NDArray[np.float32]:
        """Copy the tokens of one window to the host, as an array of shape (P, P, D)."""
        ...

    def token_bytes(self) -> int:
        """Device memory that the tokens of one window take."""
        ...

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> Assigner:
        """Place centroids of shape (K, D) on the device and return what assigns tokens to them."""
        ...

    def close(self) -> None:
        """End the encoder's threads; neither it nor its assigners work afterwards.

        Memory is given back with the last reference to them.
        """
        ...


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """One window's share of a chunk.

    Attributes:
        d_row: row of the window's index relative to the chunk's (0 or negative).
        d_col: column, likewise.
        token_row: first token row of the chunk inside the window.
        token_col: first token column, likewise.
    """

    d_row: int
    d_col: int
    token_row: int
    token_col: int


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    """How windows cover a chunk of ``stride_patches`` x ``stride_patches`` patches.

    Window (i, j) has its core on patches ``[i*s, i*s + c)`` x ``[j*s, j*s + c)``, s the stride and
    c = window - 2 * margin. So chunk (i, j) lies in the cores of the n * n windows (i - a, j - b),
    0 <= a, b < n = c / s.

    Attributes:
        window_patches: patches a side of a window.
        margin_patches: patches dropped on each side of a window.
        stride_patches: patches a side of a chunk, and between the origins of neighbouring windows.
    """

    window_patches: int
    margin_patches: int
    stride_patches: int

    @property
    def core_patches(self) -> int:
        """Patches a side of a window that are used."""
        return self.window_patches - 2 * self.margin_patches

    @property
    def overlap(self) -> int:
        """Windows n a side that cover a chunk: 1 without blending, 2 at half overlap."""
        return self.core_patches // self.stride_patches

    @property
    def parts(self) -> tuple[ChunkPart, ...]:
        """The windows that cover a chunk, the chunk's own window (0, 0) first."""
        s, m = self.stride_patches, self.margin_patches
        return tuple(
            ChunkPart(d_row=-a, d_col=-b, token_row=m + a * s, token_col=m + b * s)
            for a in range(self.overlap)
            for b in range(self.overlap)
        )

    def windows_of(self, chunk: ChunkIndex) -> list[ChunkIndex]:
        """Return the windows that cover a chunk, in the order of ``parts``."""
        return [ChunkIndex(chunk.row + part.d_row, chunk.col + part.d_col) for part in self.parts]

    def weights(self) -> NDArray[np.float32]:
        """Return blending weights of shape (n * n, s, s) in the order of ``parts``; they sum to 1 per patch.

        A tent over the core: a patch counts for more the nearer it is to its window's middle.
        """
        c, s, n = self.core_patches, self.stride_patches, self.overlap
        if n == 1:
            return np.ones((1, s, s), np.float32)
        centre = np.arange(c) + 0.5
        tent = np.minimum(centre, c - centre).reshape(n, s)  # (n, s): share a of the core along one axis
        tent /= tent.sum(axis=0)
        weights: NDArray[np.float64] = tent[:, None, :, None] * tent[None, :, None, :]
        return weights.reshape(n * n, s, s).astype(np.float32)
