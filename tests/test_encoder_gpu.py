"""What a GPU is given: options of providers, uploads, CUDA graphs. Most of it runs without one, on stand-ins."""

from __future__ import annotations

import logging
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from encoder_models import MEAN, STD, save_model, scenes

from geocentroids_tiler.encoder import cuda, providers
from geocentroids_tiler.encoder.base import ChunkLayout
from geocentroids_tiler.encoder.cuda import PinnedUploads, capture
from geocentroids_tiler.encoder.torch import TorchEncoder
from geocentroids_tiler.errors import EncoderError

pytestmark = pytest.mark.torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class StandIn:
    """Streams and events that write down what is asked of them, in the place of ``torch.cuda``."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams = self.events = 0
        self.CUDAGraph = object
        self.graph = nullcontext
        self.computing = self.Stream("computing")

    def Stream(self, name: Any = None) -> Any:
        label = name if isinstance(name, str) else "copying"
        return SimpleNamespace(
            name=label,
            wait_event=lambda event: self.log.append(f"{label} waits for {event.name}"),
            wait_stream=lambda other: self.log.append(f"{label} waits for {other.name}"),
        )

    def Event(self) -> Any:
        name = ("uploaded", "taken")[self.events % 2] + str(self.events // 2)
        self.events += 1
        return SimpleNamespace(
            name=name,
            synchronize=lambda: self.log.append(f"host waits for {name}"),
            record=lambda stream: self.log.append(f"{stream.name} records {name}"),
        )

    def current_stream(self, _device: Any) -> Any:
        return self.computing

    def stream(self, _stream: Any) -> Any:
        return nullcontext()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """``torch`` as the module under test sees it, without the need for a GPU."""
    fake = StandIn()

    def empty(shape: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    names = SimpleNamespace(
        cuda=fake, empty=empty, uint8=torch.uint8, Tensor=torch.Tensor, OutOfMemoryError=torch.OutOfMemoryError
    )
    monkeypatch.setattr(cuda, "torch", names)
    return fake


def test_uploads_take_turns_and_wait_for_their_buffers(stand_in: StandIn) -> None:
    uploads = PinnedUploads((2, 28, 28, 3), torch.device("cpu"))
    target = torch.empty((2, 28, 28, 3), dtype=torch.uint8)
    for turn in range(4):
        windows = scenes(2 - turn % 2, 28, seed=turn)
        stand_in.log.clear()
        uploads.send(windows, target)
        assert np.array_equal(target.numpy()[: len(windows)], windows)
        assert not target.numpy()[len(windows) :].any()
        slot = turn % 2
        assert stand_in.log == [
            f"host waits for uploaded{slot}",  # before it writes the pinned buffer
            f"copying waits for taken{slot}",  # before it writes the device's
            f"copying records uploaded{slot}",
            f"computing waits for uploaded{slot}",
            f"computing records taken{slot}",
        ]


def test_without_a_graph_each_run_computes(stand_in: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_graph: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    stand_in.graph = fails
    batch = torch.arange(3)
    with caplog.at_level(logging.WARNING):
        run = capture(lambda x: x + 1, batch)
    assert caplog.messages == [
        "no CUDA graph, each kernel is launched by itself: operation not permitted when stream is capturing"
    ]
    assert run().tolist() == [1, 2, 3]
    batch += 10
    assert run().tolist() == [11, 12, 13]


def test_a_capture_that_lacks_memory_is_not_hidden(stand_in: StandIn) -> None:
    def fails(_batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(fails, torch.arange(3))


def test_tensorrt_finds_its_engines_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    folder = tmp_path / "geocentroids" / "tensorrt"
    providers.prepare("TensorrtExecutionProvider")
    assert folder.is_dir()
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    (name, options), (cuda_name, _), cpu = providers.provider_list(
        "TensorrtExecutionProvider", {"windows": (32, 448, 448, 3)}
    )
    assert (name, cuda_name, cpu) == (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    )
    assert options == {
        "trt_fp16_enable": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_profile_min_shapes": "windows:32x448x448x3",
        "trt_profile_opt_shapes": "windows:32x448x448x3",
        "trt_profile_max_shapes": "windows:32x448x448x3",
    }
    without_windows = providers.provider_list("TensorrtExecutionProvider", {})[0][1]
    assert not any("profile" in key for key in without_windows)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert providers.engine_folder() == Path.home() / ".cache" / "geocentroids" / "tensorrt"


def test_no_folder_for_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    (tmp_path / "geocentroids").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EncoderError, match="tensorrt: cannot be made to keep TensorRT engines in: "):
        providers.prepare("TensorrtExecutionProvider")


def test_options_of_other_providers() -> None:
    (name, options), cpu = providers.provider_list("CUDAExecutionProvider", {"windows": (32, 448, 448, 3)})
    assert (name, cpu) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert providers.provider_list("CPUExecutionProvider", {}) == ["CPUExecutionProvider"]
    providers.prepare("CPUExecutionProvider")


def test_a_gpu_is_one_with_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    available = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: available)
    found: dict[str, str] = {}
    monkeypatch.setattr(providers.ctypes.util, "find_library", found.get)
    assert not providers.has_gpu()
    assert providers.candidates("auto") == available[1:]
    found |= {"cuda": "libcuda.so.1", "nvinfer": "libnvinfer.so.10"}
    assert providers.has_gpu()
    assert providers.candidates("auto") == available
    available.remove("CUDAExecutionProvider")
    assert not providers.has_gpu()


@needs_cuda
def test_graph_and_single_kernels_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", "registers", seed=1)
    windows = scenes(11, 224, seed=30)
    found = []
    for graph in (True, False):
        if not graph:
            monkeypatch.setattr(cuda, "capture", lambda forward, batch: lambda: forward(batch))
        encoder = TorchEncoder(
            str(folder), window_patches=16, mean=MEAN, std=STD, device="cuda", batch_windows=4, local_files_only=True
        )
        found.append(np.stack([encoder.fetch(handle) for handle in encoder.encode(windows)]))
    assert np.array_equal(*found)


@needs_cuda
def test_labels_come_while_the_next_windows_are_encoded(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "registers", seed=1)
    encoder = TorchEncoder(str(folder), window_patches=16, mean=MEAN, std=STD, device="cuda", batch_windows=4)
    handles = encoder.encode(scenes(8, 224, seed=31))
    centroids = np.stack([encoder.fetch(handle) for handle in handles]).reshape(-1, 64)[::13]
    assigner = encoder.assigner(centroids, "l2", ChunkLayout(16, 3, 10))
    expected = assigner.assign([[handle] for handle in handles])
    wait = assigner.begin([[handle] for handle in handles])
    encoder.encode(scenes(8, 224, seed=32))
    assert all(np.array_equal(a, b) for a, b in zip(wait(), expected, strict=True))
