"""Blending and the nearest centroid on PyTorch, in float32 whatever the tokens are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import Assigner, ChunkLayout, Labels, TokenHandle
from geocentroids_tiler.encoder.checks import Metric, check_chunks
from geocentroids_tiler.encoder.cuda import bring
from geocentroids_tiler.encoder.runs import DeviceMemoryError, RunSize
from geocentroids_tiler.encoder.table import TINY, CentroidTable, chunks_per_run
from geocentroids_tiler.errors import EncoderError


class TorchAssigner(Assigner):
    """Labels chunks in runs of a fixed number of them, in float32."""

    def __init__(
        self,
        table: CentroidTable,
        metric: Metric,
        layout: ChunkLayout,
        device: torch.device,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        """Place the centroids and the blending weights on the device; ``pool`` runs what a CPU computes."""
        self._rows = torch.from_numpy(table.rows).to(device)  # (R, D)
        self._bias = None if table.bias is None else torch.from_numpy(table.bias).to(device)
        self._row_labels = table.labels
        self._weights = torch.from_numpy(layout.weights()).to(device)[..., None]  # (parts, s, s, 1)
        self._metric = metric
        self._parts = layout.parts
        self._stride = layout.stride_patches
        self._pool = pool
        self._run_size = RunSize(
            chunks_per_run(layout.stride_patches) if device.type == "cuda" else 1,
            f"a chunk of {self._stride} x {self._stride} patches with {len(table.rows)} centroids",
        )

    def begin(self, chunks: Sequence[Sequence[TokenHandle]]) -> Callable[[], Labels]:
        """Start to label N chunks, each given as the handles of its windows in the order of ``ChunkLayout.parts``.

        On CUDA everything is queued on the current stream; a CPU has computed when this returns.

        Returns:
            What waits for labels of shape (N, s, s), uint16, and similarities of shape (N, s, s), float32.

        Raises:
            EncoderError: if one chunk does not fit the device's memory.
        """
        check_chunks(chunks, len(self._parts))
        runs = self._run_size.fit(lambda size: self._begin(chunks, size))

        def wait() -> Labels:
            shape = (-1, self._stride, self._stride)
            found = [run() for run in runs]
            if not found:
                return np.empty((0, *shape[1:]), np.uint16), np.empty((0, *shape[1:]), np.float32)
            index, value = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
            return self._row_labels[index].reshape(shape)[: len(chunks)], value.reshape(shape)[: len(chunks)]

        return wait

    def _begin(
        self, chunks: Sequence[Sequence[TokenHandle]], size: int
    ) -> list[Callable[[], Sequence[NDArray[np.generic]]]]:
        """Start runs of ``size`` chunks; only the last one is padded, so what padding adds comes after everything."""
        groups = [list(chunks[start : start + size]) for start in range(0, len(chunks), size)]
        groups = [group + [group[-1]] * (size - len(group)) for group in groups]
        try:
            with exact_products():
                return list(self._pool.map(self._run, groups)) if self._pool else [self._run(g) for g in groups]
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(str(error).splitlines()[0]) from None

    @torch.inference_mode()
    def _run(self, group: Sequence[Sequence[TokenHandle]]) -> Callable[[], Sequence[NDArray[np.generic]]]:
        """Start one run; what it returns waits for the rows of the table and the similarities, both of shape (T,)."""
        found = self._nearest(self._blend(group).flatten(0, 2))
        if self._pool is None:
            return bring(found)
        arrays = [tensor.numpy() for tensor in found]
        return lambda: arrays

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


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 products in float32: TF32 off, and the same convolution kernel each time."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
