"""Runs that do not fit the device's memory: they are halved until they do, and labels stay what they were."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from encoder_models import MEAN, STD, save_model, scenes
from numpy.typing import NDArray

from geocentroids_tiler.encoder.base import ChunkLayout
from geocentroids_tiler.encoder.export import export_onnx
from geocentroids_tiler.encoder.onnx import OnnxEncoder
from geocentroids_tiler.encoder.runs import DeviceMemoryError, RunSize, batch_of, split
from geocentroids_tiler.encoder.torch import TorchEncoder
from geocentroids_tiler.encoder.torch_assign import TorchAssigner
from geocentroids_tiler.errors import EncoderError

pytestmark = pytest.mark.torch

OUT_OF_MEMORY = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running MatMul node. "
    "bfc_arena.cc:376 Available memory of 1048576 is smaller than requested bytes of 2097152",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bfc_arena.cc:359 Failed to allocate memory for requested buffer "
    "of size 4328521728",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc",
)
"""What the arena, CUDA and the system say through ONNX Runtime."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"), "registers", seed=1)


@pytest.fixture(scope="module")
def tiny_onnx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    export_onnx(str(tiny), path, window_patches=16, mean=MEAN, std=STD)
    return path


def torch_encoder(folder: Path, batch_windows: int) -> TorchEncoder:
    return TorchEncoder(
        str(folder), window_patches=16, mean=MEAN, std=STD, device="cpu", batch_windows=batch_windows, threads=1
    )


def labels_of(encoder: Any, windows: NDArray[np.uint8], centroids: NDArray[np.float32]) -> NDArray[np.uint16]:
    assigner = encoder.assigner(centroids, "inner_product", ChunkLayout(16, 3, 10))
    labels: NDArray[np.uint16] = assigner.assign([[handle] for handle in encoder.encode(windows)])[0]
    return labels


def some_centroids(encoder: Any) -> NDArray[np.float32]:
    """Centroids between tokens of other windows, so that margins are those of a codebook."""
    tokens = np.stack([encoder.fetch(handle) for handle in encoder.encode(scenes(2, 224, seed=21))]).reshape(-1, 64)
    centroids: NDArray[np.float32] = 0.5 * (tokens[::3][:100] + tokens[1::3][:100])
    return centroids


class ScarceMemory:
    """Fails in torch's way when more than ``fits`` windows come in one run."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.tried: list[int] = []

    def __call__(self, _module: Any, _args: Any, options: dict[str, Any]) -> None:
        self.tried.append(len(options["pixel_values"]))
        if self.tried[-1] > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


class ScarceSession:
    """A session that fails with ``message`` as soon as it runs."""

    def __init__(self, session: Any, message: str) -> None:
        self.session, self.message = session, message

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, _binding: Any) -> None:
        raise RuntimeError(self.message)


def make_scarce(monkeypatch: pytest.MonkeyPatch, fits: int, message: str) -> None:
    """Let ONNX Runtime fail with ``message`` when an encoder is opened for more than ``fits`` windows a run."""
    real = OnnxEncoder._open

    def scarce(self: OnnxEncoder, content: bytes, batch: int | None, name: str) -> Any:
        session = real(self, content, batch, name)
        return ScarceSession(session, message) if batch is not None and batch > fits else session

    monkeypatch.setattr(OnnxEncoder, "_open", scarce)


def test_halving(caplog: pytest.LogCaptureFixture) -> None:
    size, tried = RunSize(12, "a window of 9 x 9 px"), []

    def run(count: int) -> str:
        tried.append(count)
        if count > 3:
            raise DeviceMemoryError("too much")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert size.fit(run) == "done"
        assert size.fit(run) == "done"
    assert tried == [12, 6, 3, 3]
    assert size.count == 3
    assert [record.getMessage() for record in caplog.records] == [
        "runs of 12 do not fit the memory of the device, trying 6",
        "runs of 6 do not fit the memory of the device, trying 3",
    ]
    with pytest.raises(EncoderError, match="a window of 9 x 9 px does not fit the memory of the device: too much"):
        RunSize(5, "a window of 9 x 9 px").fit(lambda _: (_ for _ in ()).throw(DeviceMemoryError("too much")))


def test_batches() -> None:
    windows = scenes(5, 28, seed=3)
    for form in (windows, list(windows)):
        parts = split(form, 2)
        assert [len(part) for part in parts] == [2, 2, 1]
        last = batch_of(parts[2], 3)
        assert last.shape == (3, 28, 28, 3)
        assert np.array_equal(last[0], windows[4])
        assert not last[1:].any()
    assert np.shares_memory(batch_of([windows[1]], 1), windows)
    windows.flags.writeable = False
    assert not np.shares_memory(batch_of([windows[1]], 1), windows)


def test_torch_halves(tiny: Path) -> None:
    windows = scenes(9, 224, seed=20)
    encoder = torch_encoder(tiny, batch_windows=8)
    centroids = some_centroids(encoder)
    expected = labels_of(encoder, windows, centroids)
    memory = ScarceMemory(fits=2)
    encoder._model.register_forward_pre_hook(memory, with_kwargs=True)
    assert np.array_equal(labels_of(encoder, windows, centroids), expected)
    assert (encoder.batch_windows, encoder.windows_at_once) == (2, 2)
    assert set(memory.tried) == {8, 4, 2}
    assert memory.tried[-5:] == [2] * 5
    memory.tried.clear()
    encoder.encode(windows[:3])
    assert memory.tried == [2, 2]  # what fits is remembered


def test_torch_says_when_one_window_does_not_fit(tiny: Path) -> None:
    encoder = torch_encoder(tiny, batch_windows=4)
    encoder._model.register_forward_pre_hook(ScarceMemory(fits=0), with_kwargs=True)
    message = r"a window of 224 x 224 px does not fit the memory of the device: CUDA out of memory.*2\.00 GiB\.$"
    with pytest.raises(EncoderError, match=message):
        encoder.encode(scenes(1, 224))


def test_torch_assigner_halves(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = torch_encoder(tiny, batch_windows=4)
    handles = encoder.encode(scenes(6, 224, seed=22))
    assigner = encoder.assigner(some_centroids(encoder), "l2", ChunkLayout(16, 3, 10))
    assigner._run_size.count = 4
    chunks = [[handle] for handle in handles]
    expected = assigner.assign(chunks)
    nearest, tried = TorchAssigner._nearest, []

    def scarce(self: TorchAssigner, tokens: torch.Tensor) -> Any:
        tried.append(len(tokens) // 100)
        if tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return nearest(self, tokens)

    monkeypatch.setattr(TorchAssigner, "_nearest", scarce)
    labels, similarity = assigner.assign(chunks)
    assert np.array_equal(labels, expected[0])
    assert np.abs(similarity - expected[1]).max() <= 1e-5 * np.abs(similarity).max()
    assert set(tried) == {4, 2}
    monkeypatch.setattr(TorchAssigner, "_nearest", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(EncoderError, match=r"a chunk of 10 x 10 patches with 100 centroids does not fit .*: full"):
        assigner.assign(chunks)


@pytest.mark.parametrize("message", OUT_OF_MEMORY)
def test_onnx_halves(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    windows = scenes(5, 224, seed=20)
    encoder = OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=8)
    centroids = some_centroids(encoder)
    expected = labels_of(encoder, windows, centroids)
    make_scarce(monkeypatch, 2, message)
    scarce = OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=8, threads=1)
    assert np.array_equal(labels_of(scarce, windows, centroids), expected)
    assert (scarce.batch_windows, scarce.windows_at_once) == (2, 2)


def test_onnx_says_when_one_window_does_not_fit(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_scarce(monkeypatch, 0, OUT_OF_MEMORY[2])
    encoder = OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=2)
    with pytest.raises(EncoderError, match=r"a window of 224 x 224 px does not fit the memory of the device: .*out of"):
        encoder.encode(scenes(1, 224))
    model = onnx.load(tiny_onnx)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(EncoderError, match=r"fixed\.onnx: the file fixes batches of 2 windows, which do not fit"):
        OnnxEncoder(tmp_path / "fixed.onnx", provider="cpu").encode(scenes(1, 224))


def test_other_failures_are_not_halved(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_scarce(monkeypatch, 0, "[ONNXRuntimeError] : 2 : INVALID_ARGUMENT : wrong shape")
    encoder = OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=4)
    with pytest.raises(EncoderError, match=r"ONNX Runtime failed: .*wrong shape"):
        encoder.encode(scenes(1, 224))
    assert encoder.batch_windows == 4
