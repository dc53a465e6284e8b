"""The encoder on ONNX Runtime: one exported graph for tokens, one built here for labels."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from geocentroids_tiler.encoder.assign_graph import assign_graph, split_graph
from geocentroids_tiler.encoder.base import ChunkLayout, DeviceInfo, TokenHandle
from geocentroids_tiler.encoder.checks import (
    check_batch,
    check_centroids,
    check_chunks,
    check_layout,
    check_metric,
    check_sha256,
    check_windows,
)
from geocentroids_tiler.encoder.model_file import read_model
from geocentroids_tiler.encoder.table import centroid_table, chunks_per_run
from geocentroids_tiler.errors import EncoderError

PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""Name in settings -> name in ONNX Runtime, in the order in which ``auto`` tries them."""

GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")

GPU_BATCH_WINDOWS = 32

_OPTIONS: dict[str, dict[str, str]] = {
    # TF32 rounds inputs to 10 bits, and an exhaustive search may pick other kernels in the next process.
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"},
}


class OnnxEncoder:
    """A vision transformer run by ONNX Runtime.

    A token handle is an ``OrtValue`` of shape (1, P, P, D), float32, on the provider's device.
    """

    def __init__(
        self,
        path: Path,
        *,
        provider: str = "auto",
        threads: int | None = None,
        batch_windows: int | None = None,
        sha256: str | None = None,
    ) -> None:
        """Load the model at ``path``.

        On a CPU every run takes one thread, and as many runs go on at once as there are threads: two windows side by
        side take less time than one after the other on two threads each, and far less where the cores are shared.

        Args:
            path: a file with input ``windows`` uint8 (N, S, S, 3) and output ``tokens`` float32 (N, P, P, D).
            provider: ``auto`` or a key of ``PROVIDERS``.
            threads: CPU threads in all; None is one for each core that this process may use.
            batch_windows: windows of one run; None is what the file fixes, else 1 on a CPU and 32 on a GPU.
            sha256: hex digest that the file must have.

        Raises:
            EncoderError: if the file breaks the contract or the provider cannot be had.
        """
        check_sha256(path, sha256)
        content, self.spec = read_model(path)
        self._threads = threads or _cores()
        fixed = self.spec.fixed_batch
        if batch_windows is not None and fixed is not None and batch_windows != fixed:
            raise EncoderError(f"{path}: the file fixes batches of {fixed} windows, {batch_windows} were asked for")
        wanted = fixed if batch_windows is None else check_batch(batch_windows)

        candidates = _candidates(provider)
        for name in candidates:
            self._provider = name
            self._batch_windows = wanted or (GPU_BATCH_WINDOWS if name in GPU_PROVIDERS else 1)
            self._session: Any = self._open(content, name, self._batch_windows, str(path))
            if self._session.get_providers()[0] == name:  # otherwise the provider's libraries did not load
                break
        else:
            raise EncoderError(
                f"{' and '.join(candidates)}: installed, but ONNX Runtime could not start it on this machine"
            )
        self._device = "cuda" if self._provider in GPU_PROVIDERS else "cpu"
        self._runs_at_once = self._threads if self._provider == PROVIDERS["cpu"] else 1
        self._pool = ThreadPoolExecutor(self._runs_at_once, "geocentroids-onnx")
        self._split: Any = None
        if self._batch_windows > 1:
            self._split = self._open(split_graph(self._batch_windows), self._provider, None, "split graph")

    @property
    def dim(self) -> int:
        """Length D of a token."""
        return self.spec.dim

    @property
    def window_patches(self) -> int:
        """Patches a side P of a window."""
        return self.spec.window_patches

    @property
    def batch_windows(self) -> int:
        """Windows of one run; fewer are padded with black ones."""
        return self._batch_windows

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy."""
        return self._batch_windows * self._runs_at_once

    @property
    def info(self) -> DeviceInfo:
        """The device behind this encoder."""
        device = f"{self._device}:0" if self._device == "cuda" else self._device
        return DeviceInfo(backend="onnxruntime", device=device, precision="fp32", provider=self._provider)

    def encode(self, windows: NDArray[np.uint8]) -> list[TokenHandle]:
        """Encode windows of shape (N, S, S, 3), RGB, to N handles of (P, P, D) tokens on the device."""
        check_windows(windows, self.spec.window_px)
        size = self._batch_windows
        parts = [windows[start : start + size] for start in range(0, len(windows), size)]
        return [handle for handles in self._pool.map(self._encode_run, parts) for handle in handles]

    def _encode_run(self, part: NDArray[np.uint8]) -> list[TokenHandle]:
        """Encode up to ``batch_windows`` windows in one padded run."""
        size = self._batch_windows
        batch = np.zeros((size, *part.shape[1:]), np.uint8)
        batch[: len(part)] = part
        (tokens,) = _run(self._session, {"windows": batch}, {"tokens": self._device})
        if self._split is None:
            return [tokens]
        # A handle that was a view would keep the whole batch in memory: each gets its own tensor.
        names = {f"tokens_{i}": self._device for i in range(size)}
        return _run(self._split, {"tokens": tokens}, names)[: len(part)]

    def fetch(self, tokens: TokenHandle) -> NDArray[np.float32]:
        """Copy the tokens of one window to the host, as an array of shape (P, P, D)."""
        array: NDArray[np.float32] = tokens.numpy()[0]
        return array.copy()

    def token_bytes(self) -> int:
        """Device memory that the tokens of one window take."""
        return self.window_patches**2 * self.dim * 4

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> OnnxAssigner:
        """Place centroids of shape (K, D) on the device and return what assigns tokens to them.

        Raises:
            EncoderError: if shape, metric or layout do not fit this encoder.
        """
        known = check_metric(metric)
        rows = check_centroids(centroids, self.dim)
        check_layout(layout, self.window_patches)
        gpu = self._device == "cuda"
        chunks = chunks_per_run(layout.stride_patches) if gpu else 1
        # ArgMax is documented to return the first of equals on the CPU only.
        table = centroid_table(rows, known)
        explicit_ties = self._provider != PROVIDERS["cpu"]
        graph = assign_graph(table, known, layout, chunks=chunks, explicit_ties=explicit_ties)
        session = self._open(graph, self._provider, None, "assignment graph")
        return OnnxAssigner(session, table.labels, layout, chunks, self._pool)

    def _open(self, content: bytes, provider: str, batch: int | None, name: str) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = 1 if provider == PROVIDERS["cpu"] else self._threads
        # Encoder and assigner run in turn; without this the threads of the one that has just run keep
        # spinning and take the cores from the other (two cores, nano: 38 ms a window instead of 12).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if batch is not None and self.spec.batch_axis:
            options.add_free_dimension_override_by_name(self.spec.batch_axis, batch)
        providers: list[Any] = [(provider, _OPTIONS.get(provider, {}))]
        if provider == PROVIDERS["tensorrt"]:
            providers.append((PROVIDERS["cuda"], _OPTIONS[PROVIDERS["cuda"]]))
        if provider != PROVIDERS["cpu"]:
            providers.append(PROVIDERS["cpu"])
        try:
            return ort.InferenceSession(content, options, providers=providers)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            reason = str(error).splitlines()[0]
            raise EncoderError(f"{name}: ONNX Runtime cannot load it with {provider}: {reason}") from error


class OnnxAssigner:
    """Labels chunks in runs of a fixed number of them."""

    def __init__(
        self, session: Any, row_labels: NDArray[np.uint16], layout: ChunkLayout, chunks: int, pool: ThreadPoolExecutor
    ) -> None:
        """Wrap the session of an ``assign_graph`` with ``chunks`` chunks a run and its table's labels."""
        self._pool = pool
        self._session = session
        self._row_labels = row_labels
        self._parts = len(layout.parts)
        self._stride = layout.stride_patches
        self._chunks = chunks

    def assign(self, chunks: Sequence[Sequence[TokenHandle]]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
        """Label N chunks, each given as the handles of its windows in the order of ``ChunkLayout.parts``.

        Returns:
            Labels of shape (N, s, s) and similarities of shape (N, s, s).
        """
        check_chunks(chunks, self._parts)
        shape = (len(chunks), self._stride, self._stride)
        labels, similarity = np.empty(shape, np.uint16), np.empty(shape, np.float32)

        def assign_run(start: int) -> None:
            group = list(chunks[start : start + self._chunks])
            padded = group + [group[-1]] * (self._chunks - len(group))
            inputs = {f"tokens_{c}_{p}": handle for c, chunk in enumerate(padded) for p, handle in enumerate(chunk)}
            outputs = _run(self._session, inputs, {"labels": "cpu", "similarity": "cpu"})
            labels[start : start + len(group)] = self._row_labels[outputs[0].numpy()[: len(group)]]
            similarity[start : start + len(group)] = outputs[1].numpy()[: len(group)]

        for _ in self._pool.map(assign_run, range(0, len(chunks), self._chunks)):
            pass  # an error of a run is raised here
        return labels, similarity


def _cores() -> int:
    """Return the cores that this process may use; not every system can say which those are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _candidates(provider: str) -> list[str]:
    """Return the execution providers to try, best first."""
    available = ort.get_available_providers()
    usable = {key: name for key, name in PROVIDERS.items() if name in available}
    if provider != "auto":
        if provider not in usable:
            raise EncoderError(
                f"provider {provider!r} is not available in the installed ONNX Runtime; "
                f"available: auto, {', '.join(usable)}"
            )
        return [usable[provider]]
    # Every GPU build of ONNX Runtime lists TensorRT; its libraries are a separate, rare install.
    if "tensorrt" in usable and ctypes.util.find_library("nvinfer") is None:
        del usable["tensorrt"]
    return list(usable.values())


def _run(session: Any, inputs: dict[str, Any], outputs: dict[str, str]) -> list[Any]:
    """Run with arrays or OrtValues bound as inputs; return one OrtValue for each output, on its device."""
    binding = session.io_binding()
    for name, value in inputs.items():
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, value)
        else:
            binding.bind_ortvalue_input(name, value)
    for name, device in outputs.items():
        binding.bind_output(name, device)
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # as above
        raise EncoderError(f"ONNX Runtime failed: {str(error).splitlines()[0]}") from error
    values: list[Any] = binding.get_outputs()
    return values
