"""The encoder on OpenVINO: the same ONNX file and the same assignment graph, in fp32, bf16 or int8 on a CPU."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from geocentroids_tiler.encoder.assign_graph import assign_graph
from geocentroids_tiler.encoder.base import Assigner, ChunkLayout, DeviceInfo, Labels, TokenHandle, Windows
from geocentroids_tiler.encoder.checks import check_chunks, check_precision, check_sha256, check_windows
from geocentroids_tiler.encoder.int8 import quantise_linear_layers
from geocentroids_tiler.encoder.model_file import FileEncoder, read_model
from geocentroids_tiler.encoder.runs import fill, split, usable_cores
from geocentroids_tiler.encoder.table import checked_table
from geocentroids_tiler.errors import EncoderError

PRECISIONS = ("fp32", "bf16", "int8")

_TYPES = {"fp32": "f32", "bf16": "bf16"}
"""Name in settings -> name in OpenVINO."""

DEVICE = "CPU"

RUNS_AHEAD = 2
"""Runs handed over to each copy of a model: one that is done with a run finds its next at once."""

MAX_COPIES = 8
"""Each has the weights in memory again (170 MB for a ViT-B in bf16); with more cores each takes several threads."""


class OpenVinoEncoder(FileEncoder):
    """A vision transformer run by OpenVINO on a CPU.

    A token handle is an array of shape (P, P, D), float32, in memory.
    """

    def __init__(
        self,
        path: Path,
        *,
        precision: str = "auto",
        threads: int | None = None,
        batch_windows: int | None = None,
        sha256: str | None = None,
    ) -> None:
        """Load the model at ``path``.

        Runs of one thread each go on side by side, as with ONNX Runtime, each in a compiled copy of the model. The
        streams of one copy, OpenVINO's own way to do that, take turns on two cores (nano, bf16: 63 ms a window; two
        threads for one window 56, two copies 32).

        Args:
            path: a file with input ``windows`` uint8 (N, S, S, 3) and output ``tokens`` float32 (N, P, P, D).
            precision: ``auto`` (bf16 where the CPU multiplies in it, else fp32), ``fp32``, ``bf16``, or ``int8``:
                linear layers in int8, everything else as ``auto``.
            threads: CPU threads in all; None is one for each core that this process may use.
            batch_windows: windows of one run; None is what the file fixes, else 1.
            sha256: hex digest that the file must have.

        Raises:
            EncoderError: if the file breaks the contract or the precision cannot be had.
        """
        check_precision(precision, "openvino", PRECISIONS)
        check_sha256(path, sha256)
        content, self.spec = read_model(path)
        self._batch_windows = self.spec.batch(path, batch_windows) or 1
        core = openvino.Core()
        self._products = _products(core, precision)
        self._int8 = precision == "int8"
        threads = threads or usable_cores()
        try:
            model = core.read_model(content)
            model.reshape([self._batch_windows, self.spec.window_px, self.spec.window_px, 3])
            group = quantise_linear_layers(model) if self._int8 else 0
            if self._int8 and not group:
                raise EncoderError(f"{path}: has no linear layers that could be computed in int8; use fp32 or bf16")
            self._runs = _Runs(core, model, _options(self._products, group), threads)
        except RuntimeError as error:
            raise EncoderError(f"{path}: OpenVINO cannot load it: {_reason(error)}") from error
        self._core, self._threads = core, threads
        self._check_copies(path)

    @property
    def batch_windows(self) -> int:
        """Windows of one run; fewer are padded with black ones."""
        return self._batch_windows

    @property
    def windows_at_once(self) -> int:
        """Windows that keep the device busy."""
        return self._batch_windows * self._runs.copies

    @property
    def info(self) -> DeviceInfo:
        """The device behind this encoder."""
        precision = f"int8+{self._products}" if self._int8 else self._products
        return DeviceInfo(backend="openvino", device="cpu", precision=precision, provider=DEVICE)

    def encode(self, windows: Windows) -> list[TokenHandle]:
        """Encode N windows, RGB, to N handles of (P, P, D) tokens.

        Args:
            windows: uint8 arrays of shape (S, S, 3), or one of shape (N, S, S, 3).

        Raises:
            EncoderError: if windows have another shape or type.
        """
        check_windows(windows, self.spec.window_px)
        P = self.spec.window_patches
        handles: list[TokenHandle] = [np.empty((P, P, self.dim), np.float32) for _ in windows]
        size = self._batch_windows
        runs = [
            self._runs.start([part], [handles[i * size : (i + 1) * size]])
            for i, part in enumerate(split(windows, size))
        ]
        for run in runs:
            self._runs.finish(run)
        return handles

    def _check_copies(self, path: Path) -> None:
        """Give every copy of the model the same window, and compare what they make of it; this also warms them up.

        Once, in a test on a busy machine, an encoder with several streams that had just been loaded gave wrong tokens.
        """
        side = self.spec.window_px
        window = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        first, *others = self.encode([window] * (RUNS_AHEAD * self.windows_at_once))
        if not np.isfinite(first).all() or not all(np.array_equal(first, other) for other in others):
            raise EncoderError(f"{path}: OpenVINO computes different tokens of one window here; use backend onnx")

    def fetch(self, tokens: TokenHandle) -> NDArray[np.float32]:
        """Copy the tokens of one window, as an array of shape (P, P, D)."""
        array: NDArray[np.float32] = tokens
        return array.copy()

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> OpenVinoAssigner:
        """Take centroids of shape (K, D) and return what assigns tokens to them, in fp32.

        Raises:
            EncoderError: if shape, metric or layout do not fit this encoder.
        """
        table, known = checked_table(centroids, metric, layout, dim=self.dim, window_patches=self.window_patches)
        graph = assign_graph(table, known, layout, chunks=1, explicit_ties=True)
        try:
            runs = _Runs(self._core, self._core.read_model(graph), _options("fp32", 0), self._threads)
        except RuntimeError as error:
            raise EncoderError(f"assignment graph: OpenVINO cannot load it: {_reason(error)}") from error
        return OpenVinoAssigner(runs, table.labels, layout)

    def close(self) -> None:
        """Do nothing: the threads are OpenVINO's, sleep between runs, and end with the encoder and its assigners."""


class OpenVinoAssigner(Assigner):
    """Labels chunks, one in a run and several runs at once."""

    def __init__(self, runs: _Runs, row_labels: NDArray[np.uint16], layout: ChunkLayout) -> None:
        """Wrap runs of an ``assign_graph`` of one chunk and its table's labels."""
        self._runs = runs
        self._row_labels = row_labels
        self._parts = len(layout.parts)
        self._stride = layout.stride_patches

    def begin(self, chunks: Sequence[Sequence[TokenHandle]]) -> Callable[[], Labels]:
        """Start to label N chunks, each given as the handles of its windows in the order of ``ChunkLayout.parts``.

        Returns:
            What waits for labels of shape (N, s, s), uint16, and similarities of shape (N, s, s), float32.
        """
        check_chunks(chunks, self._parts)
        shape = (len(chunks), self._stride, self._stride)
        rows, similarity = np.empty(shape, np.uint16), np.empty(shape, np.float32)
        runs = [
            self._runs.start([[handle] for handle in chunk], [[rows[i]], [similarity[i]]])
            for i, chunk in enumerate(chunks)
        ]

        def wait() -> Labels:
            for run in runs:
                self._runs.finish(run)
            return self._row_labels[rows], similarity

        return wait


@dataclass(eq=False, slots=True)
class _Run:
    """A run that was started.

    Attributes:
        request: what runs, None once it is done.
        outputs: for each output of the model, arrays for the rows of its batch.
        error: why it failed.
    """

    request: Any
    outputs: Sequence[Sequence[NDArray[Any]]]
    error: RuntimeError | None = None


class _Runs:
    """Runs of a model in several compiled copies of it, each with threads of its own. Safe for threads.

    Each run has memory of its own, which data is copied into and out of. OpenVINO could work on the caller's arrays,
    but it keeps their addresses beyond the run.

    Attributes:
        copies: how many there are.
    """

    def __init__(self, core: Any, model: Any, options: dict[str, Any], threads: int) -> None:
        """Compile the copies for ``threads`` threads in all.

        Raises:
            RuntimeError: if OpenVINO cannot compile the model.
        """
        self.copies = min(threads, MAX_COPIES)
        options = options | {"INFERENCE_NUM_THREADS": threads // self.copies}
        compiled = [core.compile_model(model, DEVICE, options) for _ in range(self.copies)]
        # In turns, so that runs started one after the other are in different copies.
        self._idle = deque(copy.create_infer_request() for _ in range(RUNS_AHEAD) for copy in compiled)
        self._running: list[_Run] = []
        self._lock = threading.Lock()

    def start(
        self, inputs: Sequence[Sequence[NDArray[Any]] | NDArray[Any]], outputs: Sequence[Sequence[NDArray[Any]]]
    ) -> _Run:
        """Start a run; where all are under way, wait for the oldest first.

        Args:
            inputs: for each input of the model, rows of its batch; it is padded with zeros.
            outputs: for each output of the model, arrays to be written for as many rows.
        """
        with self._lock:
            if not self._idle:
                self._settle(self._running[0])
            request = self._idle.popleft()
            for i, rows in enumerate(inputs):
                fill(request.get_input_tensor(i).data, rows)
            run = _Run(request, outputs)
            self._running.append(run)
            request.start_async()
        return run

    def finish(self, run: _Run) -> None:
        """Wait until the outputs of a run are written.

        Raises:
            EncoderError: if it failed.
        """
        with self._lock:
            self._settle(run)
        if run.error is not None:
            raise EncoderError(f"OpenVINO failed: {_reason(run.error)}") from run.error

    def _settle(self, run: _Run) -> None:
        """Wait for a run, keep what came of it, and make room for another."""
        request = run.request
        if request is None:
            return
        try:
            request.wait()
            for i, arrays in enumerate(run.outputs):
                for array, row in zip(arrays, request.get_output_tensor(i).data, strict=False):
                    array[...] = row
        except RuntimeError as error:
            run.error = error
        run.request = None
        self._running.remove(run)
        self._idle.append(request)


def multiplies_bf16(core: Any) -> bool:
    """Return whether the CPU has instructions for bf16 (AVX512-BF16, AMX): then OpenVINO takes bf16 by itself."""
    return bool(core.get_property(DEVICE, "INFERENCE_PRECISION_HINT") == openvino.Type.bf16)


def _products(core: Any, precision: str) -> str:
    """Return the number format of the matrix products that are not in int8."""
    if precision == "fp32":
        return "fp32"
    native = multiplies_bf16(core)
    if precision == "bf16" and not native:
        raise EncoderError("precision is 'bf16', but this CPU has no instructions for it; allowed: auto, fp32, int8")
    return "bf16" if native else "fp32"


def _options(products: str, group: int) -> dict[str, Any]:
    """Return options for runs one after the other."""
    return {
        "INFERENCE_PRECISION_HINT": _TYPES[products],
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # the cores are shared with readers, and with other processes
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }


def _reason(error: Exception) -> str:
    """Return the last line of an error: the ones before it name places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
