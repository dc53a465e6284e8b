"""The encoder on ONNX Runtime: one exported graph for tokens, one built here for labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from geocentroids_tiler.encoder.assign_graph import assign_graph, split_graph
from geocentroids_tiler.encoder.base import Assigner, ChunkLayout, DeviceInfo, Labels, TokenHandle, Windows
from geocentroids_tiler.encoder.checks import check_chunks, check_sha256, check_windows
from geocentroids_tiler.encoder.model_file import FileEncoder, read_model
from geocentroids_tiler.encoder.providers import CPU, GPU_PROVIDERS, candidates, prepare, provider_list
from geocentroids_tiler.encoder.runs import DeviceMemoryError, RunSize, batch_of, split, usable_cores
from geocentroids_tiler.encoder.table import checked_table, chunks_per_run
from geocentroids_tiler.errors import EncoderError

GPU_BATCH_WINDOWS = 32

_OUT_OF_MEMORY = re.compile(
    "out of memory|failed to allocate memory|smaller than requested bytes|bad_alloc", re.IGNORECASE
)
"""What the errors of ONNX Runtime, its arena and CUDA say; there is no class or code for it."""


class OnnxEncoder(FileEncoder):
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
        self._path, self._sha256 = path, sha256
        content, self.spec = read_model(path)
        self._threads = threads or usable_cores()
        wanted = self.spec.batch(path, batch_windows)

        names = candidates(provider)
        for name in names:
            self._provider = name
            size = wanted or (GPU_BATCH_WINDOWS if name in GPU_PROVIDERS else 1)
            self._session: Any = self._open(content, size, str(path))
            if self._session.get_providers()[0] == name:  # otherwise the provider's libraries did not load
                break
        else:
            raise EncoderError(f"{' and '.join(names)}: installed, but ONNX Runtime could not start it on this machine")
        self._run_size = RunSize(size, f"a window of {self.spec.window_px} x {self.spec.window_px} px")
        self._opened_for = size
        self._device = "cuda" if self._provider in GPU_PROVIDERS else "cpu"
        self._runs_at_once = self._threads if self._provider == CPU else 1
        self._pool = ThreadPoolExecutor(self._runs_at_once, "geocentroids-onnx")
        self._split: Any = self._open_split(size)

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
        device = f"{self._device}:0" if self._device == "cuda" else self._device
        return DeviceInfo(backend="onnxruntime", device=device, precision="fp32", provider=self._provider)

    def encode(self, windows: Windows) -> list[TokenHandle]:
        """Encode N windows, RGB, to N handles of (P, P, D) tokens on the device.

        Args:
            windows: uint8 arrays of shape (S, S, 3), or one of shape (N, S, S, 3).

        Raises:
            EncoderError: if windows have another shape or type, or one does not fit the device's memory.
        """
        check_windows(windows, self.spec.window_px)
        return self._run_size.fit(lambda size: self._encode(windows, size))

    def _encode(self, windows: Windows, size: int) -> list[TokenHandle]:
        """Encode in runs of ``size``, as many at once as there are threads."""
        if size != self._opened_for:
            self._reopen(size)
        runs = self._pool.map(self._encode_run, split(windows, size))
        return [handle for handles in runs for handle in handles]

    def _encode_run(self, part: Windows) -> list[TokenHandle]:
        """Encode the windows of one padded run."""
        size = self._opened_for
        (tokens,) = _run(self._session, {"windows": batch_of(part, size)}, {"tokens": self._device})
        if self._split is None:
            return [tokens]
        # A handle that was a view would keep the whole batch in memory: each gets its own tensor.
        names = {f"tokens_{i}": self._device for i in range(size)}
        return _run(self._split, {"tokens": tokens}, names)[: len(part)]

    def _reopen(self, size: int) -> None:
        """Open the model for runs of another size; the old session goes first, for its memory is what is missing."""
        if self.spec.fixed_batch is not None:
            raise EncoderError(
                f"{self._path}: the file fixes batches of {self.spec.fixed_batch} windows, which do not fit the "
                "memory of the device; export it with a dynamic batch axis"
            )
        self._session = self._split = None
        check_sha256(self._path, self._sha256)
        content, self.spec = read_model(self._path)
        self._session, self._split = self._open(content, size, str(self._path)), self._open_split(size)
        self._opened_for = size

    def fetch(self, tokens: TokenHandle) -> NDArray[np.float32]:
        """Copy the tokens of one window to the host, as an array of shape (P, P, D)."""
        array: NDArray[np.float32] = tokens.numpy()[0]
        return array.copy()

    def assigner(self, centroids: NDArray[np.float32], metric: str, layout: ChunkLayout) -> OnnxAssigner:
        """Place centroids of shape (K, D) on the device and return what assigns tokens to them.

        Raises:
            EncoderError: if shape, metric or layout do not fit this encoder.
        """
        table, known = checked_table(centroids, metric, layout, dim=self.dim, window_patches=self.window_patches)
        gpu = self._device == "cuda"
        chunks = chunks_per_run(layout.stride_patches) if gpu else 1
        # ArgMax is documented to return the first of equals on the CPU only.
        graph = assign_graph(table, known, layout, chunks=chunks, explicit_ties=self._provider != CPU)
        session = self._open(graph, None, "assignment graph")
        return OnnxAssigner(session, table.labels, layout, chunks, self._pool)

    def close(self) -> None:
        """End the threads, once what they run is done; neither the encoder nor its assigners work afterwards."""
        self._pool.shutdown()

    def _open_split(self, batch: int) -> Any:
        """Return the session that cuts the tokens of a batch into windows, None where a batch is one window."""
        return None if batch == 1 else self._open(split_graph(batch), None, "split graph")

    def _open(self, content: bytes, batch: int | None, name: str) -> Any:
        """Return a session for a model; ``batch`` windows a run where it is the encoder's."""
        prepare(self._provider)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = 1 if self._provider == CPU else self._threads
        # Encoder and assigner run in turn; without this the threads of the one that has just run keep
        # spinning and take the cores from the other (two cores, nano: 38 ms a window instead of 12).
        options.add_session_config_entry("session.force_spinning_stop", "1")
        shapes = {}
        if batch is not None:
            shapes["windows"] = (batch, self.spec.window_px, self.spec.window_px, 3)
            if self.spec.batch_axis:
                options.add_free_dimension_override_by_name(self.spec.batch_axis, batch)
        try:
            return ort.InferenceSession(content, options, providers=provider_list(self._provider, shapes))
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            reason = str(error).splitlines()[0]
            raise EncoderError(f"{name}: ONNX Runtime cannot load it with {self._provider}: {reason}") from error


class OnnxAssigner(Assigner):
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

    def begin(self, chunks: Sequence[Sequence[TokenHandle]]) -> Callable[[], Labels]:
        """Start to label N chunks, each given as the handles of its windows in the order of ``ChunkLayout.parts``.

        Returns:
            What waits for labels of shape (N, s, s), uint16, and similarities of shape (N, s, s), float32.
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

        runs = self._pool.map(assign_run, range(0, len(chunks), self._chunks))

        def wait() -> Labels:
            for _ in runs:
                pass  # an error of a run is raised here
            return labels, similarity

        return wait


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
        reason = str(error).splitlines()[0]
        kind = DeviceMemoryError if _OUT_OF_MEMORY.search(str(error)) else EncoderError
        raise kind(f"ONNX Runtime failed: {reason}") from error
    values: list[Any] = binding.get_outputs()
    return values
