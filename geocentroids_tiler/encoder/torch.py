"""The encoder on PyTorch: the transformers model on CUDA or a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo, TokenHandle
from geocentroids_tiler.encoder.checkpoint import load_model, locate_checkpoint
from geocentroids_tiler.encoder.checks import (
    Metric,
    check_batch,
    check_centroids,
    check_chunks,
    check_layout,
    check_metric,
    check_windows,
)
from geocentroids_tiler.encoder.table import TINY, CentroidTable, centroid_table, chunks_per_run
from geocentroids_tiler.errors import EncoderError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

GPU_BATCH_WINDOWS = 32


class TorchEncoder:
    """A DINOv2 model run by PyTorch.

    A token handle is a tensor of shape (P, P, D) in the encoder's precision, on its device.
    """

    def __init__(
        self,
        source: str,
        *,
        window_patches: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        revision: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        batch_windows: int | None = None,
        local_files_only: bool = False,
        sha256: str | None = None,
    ) -> None:
        """Load the checkpoint ``source``.

        Args:
            source: hub id or local directory; safetensors only.
            window_patches: patches P a side of a window.
            mean: mean of R, G, B that is subtracted from pixels in [0, 1].
            std: what the difference is divided by.
            revision: commit, tag or branch on the hub.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``.
            precision: ``auto`` (bf16 on CUDA, fp32 on a CPU), ``fp32`` or ``bf16``.
            threads: CPU threads, of the whole process; None leaves them as they are.
            batch_windows: windows of one run; None is 1 on a CPU and 32 on a GPU.
            local_files_only: never ask the hub.
            sha256: hex digest that ``model.safetensors`` must have.

        Raises:
            EncoderError: if checkpoint, device or precision cannot be had.
        """
        self._device = _device(device)
        on_gpu = self._device.type == "cuda"
        self._precision = ("bf16" if on_gpu else "fp32") if precision == "auto" else precision
        if self._precision not in PRECISIONS:
            raise EncoderError(f"precision is {precision!r}, allowed with torch: auto, {', '.join(PRECISIONS)}")
        if window_patches < 1:
            raise EncoderError(f"window_patches is {window_patches}, allowed: 1 or more")
        self._batch_windows = check_batch(
            (GPU_BATCH_WINDOWS if on_gpu else 1) if batch_windows is None else batch_windows
        )
        checkpoint = locate_checkpoint(source, revision, local_files_only=local_files_only, sha256=sha256)
        if threads is not None:
            torch.set_num_threads(threads)
        self._dtype = PRECISIONS[self._precision]
        self._model = load_model(checkpoint, "sdpa").to(self._device)
        if self._dtype != torch.float32:
            # Matrices only. Sums along the depth and LayerNorm stay in fp32: rounding those too would
            # nearly double the error (1.1 % of a token instead of 0.6 %, ViT-B with random weights).
            for module in self._model.modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                    module.to(self._dtype)
        self._window_patches = window_patches
        self.patch_px = int(self._model.config.patch_size)
        self.register_tokens = checkpoint.registers
        self._dim = int(self._model.config.hidden_size)
        self._offset = torch.tensor(mean, device=self._device).view(1, 3, 1, 1)
        self._divisor = torch.tensor(std, device=self._device).view(1, 3, 1, 1)

    @property
    def dim(self) -> int:
        """Length D of a token."""
        return self._dim

    @property
    def window_patches(self) -> int:
        """Patches a side P of a window."""
        return self._window_patches

    @property
    def batch_windows(self) -> int:
        """Windows of one run; fewer are padded with black ones."""
        return self._batch_windows

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy."""
        return self.batch_windows

    @property
    def info(self) -> DeviceInfo:
        """The device behind this encoder."""
        return DeviceInfo(backend="torch", device=str(self._device), precision=self._precision, provider="sdpa")

    @torch.inference_mode()
    def encode(self, windows: NDArray[np.uint8]) -> list[TokenHandle]:
        """Encode windows of shape (N, S, S, 3), RGB, to N handles of (P, P, D) tokens on the device."""
        check_windows(windows, self._window_patches * self.patch_px)
        size, P = self._batch_windows, self._window_patches
        handles: list[TokenHandle] = []
        for start in range(0, len(windows), size):
            part = windows[start : start + size]
            batch = np.zeros((size, *windows.shape[1:]), np.uint8)
            batch[: len(part)] = part
            pixels = torch.from_numpy(batch).to(self._device).permute(0, 3, 1, 2).float()  # (B, 3, S, S)
            pixels = (pixels / 255 - self._offset) / self._divisor
            with _exact_products(), self._autocast():
                hidden = self._model(pixel_values=pixels).last_hidden_state
            tokens = hidden[: len(part), 1 + self.register_tokens :].reshape(-1, P, P, self._dim)
            # A handle that was a view would keep the whole batch in memory: each gets its own tensor.
            handles += [window.to(self._dtype, copy=True) for window in tokens]
        return handles

    def _autocast(self) -> torch.autocast:
        enabled = self._dtype != torch.float32
        return torch.autocast(self._device.type, self._dtype if enabled else None, enabled=enabled)

    def fetch(self, tokens: TokenHandle) -> NDArray[np.float32]:
        """Copy the tokens of one window to the host, as an array of shape (P, P, D)."""
        array: NDArray[np.float32] = tokens.float().cpu().numpy()
        return array.copy()

    def token_bytes(self) -> int:
        """Device memory that the tokens of one window take."""
        return self._window_patches**2 * self._dim * self._dtype.itemsize

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> TorchAssigner:
        """Place centroids of shape (K, D) on the device and return what assigns tokens to them.

        Raises:
            EncoderError: if shape, metric or layout do not fit this encoder.
        """
        known = check_metric(metric)
        rows = check_centroids(centroids, self._dim)
        check_layout(layout, self._window_patches)
        return TorchAssigner(centroid_table(rows, known), known, layout, self._device)


class TorchAssigner:
    """Labels chunks in runs of a fixed number of them, in float32."""

    def __init__(self, table: CentroidTable, metric: Metric, layout: ChunkLayout, device: torch.device) -> None:
        """Place the centroids and the blending weights on the device."""
        self._rows = torch.from_numpy(table.rows).to(device)  # (R, D)
        self._bias = None if table.bias is None else torch.from_numpy(table.bias).to(device)
        self._row_labels = table.labels
        self._weights = torch.from_numpy(layout.weights()).to(device)[..., None]  # (parts, s, s, 1)
        self._metric = metric
        self._parts = layout.parts
        self._stride = layout.stride_patches
        self._chunks = chunks_per_run(layout.stride_patches) if device.type == "cuda" else 1

    @torch.inference_mode()
    def assign(self, chunks: Sequence[Sequence[TokenHandle]]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Label N chunks, each given as the handles of its windows in the order of ``ChunkLayout.parts``.

        Returns:
            Labels of shape (N, s, s) and similarities of shape (N, s, s).
        """
        check_chunks(chunks, len(self._parts))
        s = self._stride
        labels = np.empty((len(chunks), s, s), np.uint16)
        similarity = np.empty((len(chunks), s, s), np.float32)
        for start in range(0, len(chunks), self._chunks):
            group = list(chunks[start : start + self._chunks])
            padded = group + [group[-1]] * (self._chunks - len(group))
            with _exact_products():
                index, value = self._nearest(self._blend(padded).flatten(0, 2))
            stop = start + len(group)
            labels[start:stop] = self._row_labels[index.cpu().numpy()].reshape(-1, s, s)[: len(group)]
            similarity[start:stop] = value.cpu().numpy().reshape(-1, s, s)[: len(group)]
        return labels, similarity

    def _blend(self, chunks: Sequence[Sequence[TokenHandle]]) -> torch.Tensor:
        """Return tokens (C, s, s, D) in float32, summed by weight in the order of the parts."""
        s = self._stride
        total: torch.Tensor | None = None
        for p, part in enumerate(self._parts):
            rows, cols = slice(part.token_row, part.token_row + s), slice(part.token_col, part.token_col + s)
            share = torch.stack([chunk[p][rows, cols] for chunk in chunks]).float()  # (C, s, s, D)
            if len(self._parts) > 1:
                share *= self._weights[p]
            total = share if total is None else total.add_(share)
        if total is None:
            raise EncoderError("a layout without parts blends nothing")
        return total

    def _nearest(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the row of the nearest centroid and the similarity of tokens (T, D), both of shape (T,)."""
        if self._metric == "cosine":
            length = torch.linalg.vector_norm(tokens, dim=1, keepdim=True)
            tokens = tokens / length.clamp_min(TINY)
        scores = tokens @ self._rows.T  # (T, R)
        if self._bias is not None:
            scores += self._bias
        index = scores.argmax(dim=1)  # documented: the first of equals
        if self._metric == "l2":  # from the difference itself: the expansion cancels near 0
            return index, -torch.linalg.vector_norm(tokens - self._rows[index], dim=1)
        best = scores.gather(1, index[:, None])[:, 0]
        return index, best.clamp(-1, 1) if self._metric == "cosine" else best


def _device(name: str) -> torch.device:
    """Return the torch device called ``name``, raise EncoderError if this machine lacks it."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) < gpus:
        return torch.device("cuda", device.index or 0)
    available = ["auto", "cpu", *(f"cuda:{i}" for i in range(gpus))]
    raise EncoderError(f"device {name!r} is not available to torch here; available: {', '.join(available)}")


@contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products in float32: TF32 off, and the same convolution kernel each time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
