"""Runs of one fixed shape on an NVIDIA GPU: pinned uploads beside the computation, one CUDA graph, results later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import Windows
from geocentroids_tiler.encoder.runs import fill

logger = logging.getLogger(__name__)

WARM_UPS = 3
"""Runs before the capture, in which cuBLAS and cuDNN choose kernels and take their workspaces."""

SLOTS = 2
"""Batches on their way to the device: one is uploaded while the one before it is computed."""

Forward = Callable[[torch.Tensor], torch.Tensor]


class CudaRunner:
    """Runs a function of a uint8 batch (B, S, S, 3) on the current stream, without waiting for its result."""

    def __init__(self, forward: Forward, batch_windows: int, window_px: int, device: torch.device) -> None:
        """Take the buffers and capture ``forward``.

        Raises:
            torch.OutOfMemoryError: if the batch does not fit.
        """
        shape = (batch_windows, window_px, window_px, 3)
        self._uploads = PinnedUploads(shape, device)
        self._input = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._run = capture(forward, self._input)

    def __call__(self, windows: Windows) -> torch.Tensor:
        """Return what ``forward`` returns for up to B windows; the next call may write over it."""
        self._uploads.send(windows, self._input)
        return self._run()


@dataclass(frozen=True, slots=True)
class _Slot:
    """One batch on its way.

    Attributes:
        host: in pinned memory.
        device: where it is uploaded to.
        uploaded: recorded on the copy stream when the host's copy may be written again.
        taken: recorded on the computing stream when the device's copy may be written again.
    """

    host: torch.Tensor
    device: torch.Tensor
    uploaded: Any
    taken: Any


class PinnedUploads:
    """Sends batches to the device on a stream of its own, through buffers that are used in turn."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        """Take ``SLOTS`` pairs of uint8 buffers of ``shape`` (B, S, S, 3)."""
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._slots = [
            _Slot(
                host=torch.empty(shape, dtype=torch.uint8, pin_memory=True),
                device=torch.empty(shape, dtype=torch.uint8, device=device),
                uploaded=torch.cuda.Event(),  # type: ignore[no-untyped-call]
                taken=torch.cuda.Event(),  # type: ignore[no-untyped-call]
            )
            for _ in range(SLOTS)
        ]
        self._sent = 0

    def send(self, windows: Windows, target: torch.Tensor) -> None:
        """Copy up to B windows, padded with black, to ``target``, for what is queued on the current stream next."""
        slot = self._slots[self._sent % SLOTS]
        self._sent += 1
        computing = torch.cuda.current_stream(target.device)
        slot.uploaded.synchronize()  # returns at once while the event was never recorded
        fill(slot.host.numpy(), windows)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.taken)
            slot.device.copy_(slot.host, non_blocking=True)
            slot.uploaded.record(self._stream)
        computing.wait_event(slot.uploaded)
        target.copy_(slot.device)
        slot.taken.record(computing)


def capture(forward: Forward, batch: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what computes ``forward(batch)`` again from the batch's present content, as one CUDA graph if it can be.

    A graph is launched in one call, where the hundreds of kernels of a small batch would wait for Python.

    Raises:
        torch.OutOfMemoryError: if the device has too little memory for it.
    """
    try:
        side = torch.cuda.Stream(batch.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(batch.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward(batch)
        torch.cuda.current_stream(batch.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.warning("no CUDA graph, each kernel is launched by itself: %s", str(error).splitlines()[0])
        return lambda: forward(batch)

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def bring(tensors: Sequence[torch.Tensor]) -> Callable[[], list[NDArray[Any]]]:
    """Queue copies of tensors on one GPU to pinned memory, and return what waits for them and gives them as arrays."""
    stream = torch.cuda.current_stream(tensors[0].device)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(stream)

    def wait() -> list[NDArray[Any]]:
        done.synchronize()
        return [np.array(copy.numpy()) for copy in copies]

    return wait
