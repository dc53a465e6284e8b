"""The encoder on PyTorch: the transformers model on CUDA or a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo, TokenHandle, Windows
from geocentroids_tiler.encoder.checkpoint import load_model, locate_checkpoint
from geocentroids_tiler.encoder.checks import check_batch, check_precision, check_windows
from geocentroids_tiler.encoder.cuda import CudaRunner
from geocentroids_tiler.encoder.runs import DeviceMemoryError, RunSize, batch_of, split, usable_cores
from geocentroids_tiler.encoder.table import checked_table
from geocentroids_tiler.encoder.torch_assign import TorchAssigner, exact_products
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

        On a CPU every run takes one thread, and as many runs go on at once as there are threads, as with the other
        backends. On CUDA runs have one shape, are one CUDA graph, and nothing waits for them but ``fetch`` and the
        function that an assigner's ``begin`` returns.

        Args:
            source: hub id or local directory; safetensors only.
            window_patches: patches P a side of a window.
            mean: mean of R, G, B that is subtracted from pixels in [0, 1].
            std: what the difference is divided by.
            revision: commit, tag or branch on the hub.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:<n>``.
            precision: ``auto`` (bf16 on CUDA, fp32 on a CPU), ``fp32`` or ``bf16``.
            threads: CPU threads; None is one for each core that this process may use. Other users of torch in this
                process keep theirs.
            batch_windows: windows of one run; None is 1 on a CPU and 32 on a GPU.
            local_files_only: never ask the hub.
            sha256: hex digest that ``model.safetensors`` must have.

        Raises:
            EncoderError: if checkpoint, device or precision cannot be had.
        """
        self._device = _device(device)
        on_gpu = self._device.type == "cuda"
        check_precision(precision, "torch", PRECISIONS)
        self._precision = ("bf16" if on_gpu else "fp32") if precision == "auto" else precision
        if window_patches < 1:
            raise EncoderError(f"window_patches is {window_patches}, allowed: 1 or more")
        size = check_batch((GPU_BATCH_WINDOWS if on_gpu else 1) if batch_windows is None else batch_windows)
        checkpoint = locate_checkpoint(source, revision, local_files_only=local_files_only, sha256=sha256)
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
        self._window_px = window_patches * self.patch_px
        self._run_size = RunSize(size, f"a window of {self._window_px} x {self._window_px} px")
        self._runs_at_once = 1 if on_gpu else threads or usable_cores()
        self._pool = None if on_gpu else _pool_of_single_threads(self._runs_at_once)
        self._runner: tuple[int, CudaRunner] | None = None

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
        return self._run_size.count

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy."""
        return self.batch_windows * self._runs_at_once

    @property
    def info(self) -> DeviceInfo:
        """The device behind this encoder."""
        return DeviceInfo(backend="torch", device=str(self._device), precision=self._precision, provider="sdpa")

    def encode(self, windows: Windows) -> list[TokenHandle]:
        """Encode N windows, RGB, to N handles of (P, P, D) tokens on the device.

        Args:
            windows: uint8 arrays of shape (S, S, 3), or one of shape (N, S, S, 3).

        Raises:
            EncoderError: if windows have another shape or type, or one does not fit the device's memory.
        """
        check_windows(windows, self._window_px)
        return self._run_size.fit(lambda size: self._encode(windows, size))

    def _encode(self, windows: Windows, size: int) -> list[TokenHandle]:
        """Encode in runs of ``size``."""
        parts = split(windows, size)
        try:
            with exact_products():
                if self._pool is not None:
                    runs = list(self._pool.map(lambda part: self._encode_run(part, size), parts))
                else:
                    runs = [self._encode_run(part, size) for part in parts]
        except torch.OutOfMemoryError as error:
            self._runner = None  # its memory is of the size that does not fit
            raise DeviceMemoryError(str(error).splitlines()[0]) from None
        return [handle for handles in runs for handle in handles]

    @torch.inference_mode()
    def _encode_run(self, part: Windows, size: int) -> list[TokenHandle]:
        """Encode the windows of one padded run."""
        if self._pool is not None:
            tokens = self._forward(torch.from_numpy(batch_of(part, size)))
        else:
            tokens = self._cuda_runner(size)(part)
        # A handle that was a view would keep the whole batch in memory: each gets its own tensor.
        return [window.to(self._dtype, copy=True) for window in tokens[: len(part)]]

    def _cuda_runner(self, size: int) -> CudaRunner:
        """Return what runs batches of ``size``, made when a size is first used."""
        if self._runner is None or self._runner[0] != size:
            self._runner = None
            self._runner = (size, CudaRunner(self._forward, size, self._window_px, self._device))
        return self._runner[1]

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return tokens (B, P, P, D) of a uint8 batch (B, S, S, 3) on the device."""
        P = self._window_patches
        pixels = batch.permute(0, 3, 1, 2).float()  # (B, 3, S, S)
        pixels = (pixels / 255 - self._offset) / self._divisor
        with self._autocast():
            hidden: torch.Tensor = self._model(pixel_values=pixels).last_hidden_state
        return hidden[:, 1 + self.register_tokens :].reshape(-1, P, P, self._dim)

    def _autocast(self) -> torch.autocast:
        enabled = self._dtype != torch.float32
        # A cast that is cached inside a CUDA graph would be memory that only the graph may use.
        return torch.autocast(self._device.type, self._dtype if enabled else None, enabled=enabled, cache_enabled=False)

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
        table, known = checked_table(centroids, metric, layout, dim=self._dim, window_patches=self._window_patches)
        return TorchAssigner(table, known, layout, self._device, self._pool)

    def close(self) -> None:
        """End the threads, once what they run is done; neither the encoder nor its assigners work afterwards."""
        if self._pool is not None:
            self._pool.shutdown()


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


def _pool_of_single_threads(count: int) -> ThreadPoolExecutor:
    """Return a pool whose threads run torch on one core each.

    torch keeps the number of threads for each thread that asked for it once, and a number for those that ask later.
    """
    for_others = torch.get_num_threads()

    def start() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()

    pool = ThreadPoolExecutor(count, "geocentroids-torch", initializer=start)
    all_started = threading.Barrier(count)
    list(pool.map(lambda _: all_started.wait(), range(count)))
    torch.set_num_threads(for_others)
    return pool
