"""The encoders against transformers, faiss and float64 brute force."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnx
import onnxruntime as ort
import openvino
import pytest
import torch
from encoder_models import KINDS, MEAN, STD, make_model, save_model, scenes
from numpy.typing import NDArray
from onnx import TensorProto, helper
from openvino import opset13
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BitImageProcessorPil, Dinov2WithRegistersModel

from geocentroids_tiler.encoder import EncoderSource, encoder_source, export, int8, load_encoder
from geocentroids_tiler.encoder import onnx as onnx_backend
from geocentroids_tiler.encoder import openvino as openvino_backend
from geocentroids_tiler.encoder.assign_graph import assign_graph
from geocentroids_tiler.encoder.base import ChunkLayout
from geocentroids_tiler.encoder.checks import METRICS
from geocentroids_tiler.encoder.export import export_onnx
from geocentroids_tiler.encoder.onnx import OnnxAssigner, OnnxEncoder
from geocentroids_tiler.encoder.openvino import OpenVinoEncoder, multiplies_bf16
from geocentroids_tiler.encoder.table import centroid_table
from geocentroids_tiler.encoder.torch import TorchEncoder
from geocentroids_tiler.errors import EncoderError
from geocentroids_tiler.hub import find_codebook
from geocentroids_tiler.scene import make_scene

pytestmark = pytest.mark.torch

SHARED = Path(__file__).parents[1].parent / "shared"


@dataclass(frozen=True)
class Tolerance:
    limit: float
    measured: float
    reason: str


TOLERANCES = {
    "torch": Tolerance(1e-6, 5.2e-8, "share of the largest token; the same operations on another batch shape"),
    "openvino": Tolerance(1e-5, 7.0e-7, "share of the largest token; other matrix kernels, fp32"),
    "onnx": Tolerance(1e-5, 1.1e-6, "share of the largest token; other matrix kernels, fp32"),
    "similarity": Tolerance(2e-6, 2.9e-7, "share of the largest similarity (1 for cosine); fp32 sums of D products"),
    "near tie": Tolerance(2e-6, 0.0, "float64 margin, same share, below which fp32 may choose otherwise; none did"),
    "notebook fp32": Tolerance(0.999, 1.0, "share of equal labels; fp32 noise is far below the margins"),
    "notebook fp16 features": Tolerance(0.995, 0.9990, "share of equal labels; the notebook rounds to fp16, we do not"),
    "notebook torch bf16": Tolerance(
        0.99, 0.9980, "share of equal labels; 0.994 with other centroids: bf16 keeps 8 bits"
    ),
    "notebook openvino bf16": Tolerance(
        0.99, 0.9941, "share of equal labels; sums of products in fp32, the rest in bf16"
    ),
    "notebook openvino int8": Tolerance(
        0.97, 0.9922, "share of equal labels; weights and tokens of linear layers in 8 bits"
    ),
    "nano fp32": Tolerance(0.999, 1.0, "share of equal labels, the trained encoder on the sample scene"),
    "nano bf16": Tolerance(0.98, 0.9902, "share of equal labels, likewise: 5 of 512 differ; auto may choose it"),
    "nano int8": Tolerance(0.94, 0.9609, "share of equal labels, likewise; opt-in"),
}


def within(name: str, difference: float) -> None:
    """Assert that a difference is within the table's limit."""
    assert difference <= TOLERANCES[name].limit, name


def agrees(name: str, share: float) -> None:
    """Assert that a share of equal labels reaches the table's limit."""
    assert share >= TOLERANCES[name].limit, name


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_bf16 = pytest.mark.skipif(not multiplies_bf16(openvino.Core()), reason="a CPU without instructions for bf16")


@pytest.fixture(scope="session", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with registers."""
    return save_model(tmp_path_factory.mktemp("tiny"), "registers", seed=1)


@pytest.fixture(scope="session")
def tiny_onnx(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    export_onnx(str(tiny), path, window_patches=16, mean=MEAN, std=STD)
    return path


def torch_encoder(folder: Path, **changes: Any) -> TorchEncoder:
    options: dict[str, Any] = {"window_patches": 16, "device": "cpu", "local_files_only": True} | changes
    return TorchEncoder(str(folder), mean=MEAN, std=STD, **options)


@pytest.fixture(
    params=[
        "onnx-1",
        "onnx-4",
        "openvino-fp32-1",
        "openvino-fp32-4",
        pytest.param("openvino-bf16-1", marks=needs_bf16),
        "openvino-int8-1",
        "openvino-int8-4",
        "torch-1",
        "torch-4",
        "torch-bf16-4",
        pytest.param("torch-cuda-8", marks=needs_cuda),
    ]
)
def encoder(request: pytest.FixtureRequest, tiny: Path, tiny_onnx: Path) -> Any:
    """An encoder of the tiny checkpoint: backend, precision or device, windows of one run."""
    backend, *middle, batch = request.param.split("-")
    if backend == "onnx":
        return OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=int(batch))
    if backend == "openvino":
        return OpenVinoEncoder(tiny_onnx, precision=middle[0], batch_windows=int(batch))
    device = "cuda" if "cuda" in middle else "cpu"
    precision = "bf16" if "bf16" in middle else "auto"
    return torch_encoder(tiny, batch_windows=int(batch), precision=precision, device=device)


@pytest.fixture(params=["onnx", "openvino", "torch"])
def fp32_encoder(request: pytest.FixtureRequest, tiny: Path, tiny_onnx: Path) -> Any:
    if request.param == "onnx":
        return OnnxEncoder(tiny_onnx, provider="cpu")
    return OpenVinoEncoder(tiny_onnx, precision="fp32") if request.param == "openvino" else torch_encoder(tiny)


def source_of(tiny: Path | None, onnx_path: Path | None, **changes: Any) -> EncoderSource:
    source = EncoderSource(
        onnx_path=onnx_path,
        model=str(tiny) if tiny else None,
        revision=None,
        architecture="dinov2_with_registers",
        dim=64,
        patch_px=14,
        register_tokens=4,
        window_patches=16,
        mean=MEAN,
        std=STD,
        sha256=None,
        allow_download=False,
    )
    return replace(source, **changes)


def transformers_tokens(model: Any, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Tokens (N, P, P, D) by transformers alone."""
    side = windows.shape[1] // 14
    pixels = (windows.astype(np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    with torch.inference_mode():
        hidden = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    registers = getattr(model.config, "num_register_tokens", 0)
    tokens: NDArray[np.float32] = hidden[:, 1 + registers :].float().numpy()
    return tokens.reshape(len(windows), side, side, -1)


def fetch_all(encoder: Any, windows: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.stack([encoder.fetch(handle) for handle in encoder.encode(windows)])


def handle_of(encoder: Any, tokens: NDArray[np.float32]) -> Any:
    """Tokens (P, P, D) as a handle of the encoder."""
    if isinstance(encoder, TorchEncoder):
        return torch.from_numpy(tokens)
    if isinstance(encoder, OpenVinoEncoder):
        return tokens
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens[None]))


# ---- tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_patches", [16, 32])
def test_tokens_are_those_of_transformers(checkpoint: Path, tmp_path: Path, window_patches: int) -> None:
    windows = scenes(2, 14 * window_patches, seed=3)
    expected = transformers_tokens(AutoModel.from_pretrained(checkpoint), windows)

    by_torch = torch_encoder(checkpoint, window_patches=window_patches)
    found = fetch_all(by_torch, windows)
    assert found.shape == (2, window_patches, window_patches, 64)
    assert found.dtype == np.float32
    within("torch", np.abs(found - expected).max() / np.abs(expected).max())

    path = tmp_path / "encoder.onnx"
    report = export_onnx(str(checkpoint), path, window_patches=window_patches, mean=MEAN, std=STD)
    by_onnx = OnnxEncoder(path, provider="cpu")
    assert (by_onnx.dim, by_onnx.window_patches, by_onnx.spec.patch_px) == (64, window_patches, 14)
    found = fetch_all(by_onnx, windows)
    within("onnx", np.abs(found - expected).max() / np.abs(expected).max())
    assert report.size_bytes == path.stat().st_size

    by_openvino = OpenVinoEncoder(path, precision="fp32")
    assert (by_openvino.dim, by_openvino.window_patches, by_openvino.spec.patch_px) == (64, window_patches, 14)
    found = fetch_all(by_openvino, windows)
    assert found.dtype == np.float32
    within("openvino", np.abs(found - expected).max() / np.abs(expected).max())


def test_a_position_grid_other_than_the_window(tmp_path: Path) -> None:
    """The published checkpoints have a grid of 37 x 37; 16 x 16 come from it by interpolation."""
    folder = save_model(tmp_path / "model", "registers", image_size=518)
    windows = scenes(1, 224)
    expected = transformers_tokens(AutoModel.from_pretrained(folder), windows)
    export_onnx(str(folder), tmp_path / "encoder.onnx", window_patches=16, mean=MEAN, std=STD)
    found = fetch_all(OnnxEncoder(tmp_path / "encoder.onnx", provider="cpu"), windows)
    within("onnx", np.abs(found - expected).max() / np.abs(expected).max())


def test_fp16_file_is_half_as_large_and_computes_in_fp32(tiny: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    export_onnx(str(tiny), path, window_patches=16, mean=MEAN, std=STD, weights="fp16")
    assert path.stat().st_size < 0.65 * tiny_onnx.stat().st_size
    model = AutoModel.from_pretrained(tiny)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
    windows = scenes(2, 224)
    expected = transformers_tokens(model, windows)
    found = fetch_all(OnnxEncoder(path, provider="cpu"), windows)
    within("onnx", np.abs(found - expected).max() / np.abs(expected).max())


def test_info_and_sizes(encoder: Any) -> None:
    (handle,) = encoder.encode(scenes(1, 224))
    if torch.is_tensor(handle):
        held = handle.numel() * handle.element_size()
        assert handle.untyped_storage().nbytes() == held  # no view that keeps its batch in memory
    elif isinstance(handle, np.ndarray):
        held = handle.nbytes
        assert handle.base is None or handle.base.nbytes == held
    else:
        held = handle.numpy().nbytes
    assert encoder.token_bytes() == held
    assert encoder.info.backend in ("onnxruntime", "openvino", "torch")
    assert encoder.windows_at_once % encoder.batch_windows == 0
    assert encoder.dim == 64
    assert encoder.window_patches == 16


def test_no_windows_and_wrong_windows(encoder: Any) -> None:
    assert encoder.encode(np.zeros((0, 224, 224, 3), np.uint8)) == []
    assert encoder.encode([]) == []
    with pytest.raises(EncoderError, match=r"a window is uint8 \(224, 224, 4\), allowed: uint8 \(224, 224, 3\)"):
        encoder.encode([np.zeros((224, 224, 3), np.uint8), np.zeros((224, 224, 4), np.uint8)])
    with pytest.raises(EncoderError, match=r"float32 \(1, 224, 224, 3\), allowed: uint8 \(N, 224, 224, 3\)"):
        encoder.encode(np.zeros((1, 224, 224, 3), np.float32))
    with pytest.raises(EncoderError, match=r"\(1, 448, 448, 3\)"):
        encoder.encode(np.zeros((1, 448, 448, 3), np.uint8))


# ---- a label does not depend on its batch ------------------------------------------------------------------


def labels_of(
    encoder: Any, windows: NDArray[np.uint8], centroids: NDArray[np.float32]
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    assigner = encoder.assigner(centroids, "l2", ChunkLayout(16, 3, 10))
    labels, similarity = assigner.assign([[handle] for handle in encoder.encode(windows)])
    return labels, similarity


def test_batch_invariance(encoder: Any) -> None:
    windows = scenes(9, 224, seed=4)
    windows[3] = 30  # flat ground, where near ties are
    windows[7] = np.arange(224, dtype=np.uint8)[:, None, None]
    tokens = fetch_all(encoder, windows)
    # centroids in pairs a rounding error apart: the least change of a token flips a label
    near = tokens.reshape(-1, 64)[::23]
    centroids = np.concatenate([near, np.nextafter(near, np.float32(9))])
    labels, similarity = labels_of(encoder, windows, centroids)

    orders = [np.array([i]) for i in range(9)]  # alone
    orders += [np.arange(9)[::-1], np.array([5, 0, 8, 2, 7, 1, 4, 6, 3])]  # another order
    orders += [np.arange(k) for k in (2, 3, 5, 7)]  # other sizes of the call
    orders += [np.array([3, 3, 3, 0, 3])]  # the same window at several places of a batch
    for order in orders:
        assert np.array_equal(fetch_all(encoder, windows[order]), tokens[order])
        one_by_one = encoder.encode([windows[i] for i in order])
        assert all(np.array_equal(encoder.fetch(one), tokens[i]) for one, i in zip(one_by_one, order, strict=True))
        found, found_similarity = labels_of(encoder, windows[order], centroids)
        assert np.array_equal(found, labels[order])
        assert np.array_equal(found_similarity, similarity[order])


def test_every_run_has_the_same_shape(tiny: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause of the above; a CPU's kernels may happen to be invariant without it."""
    shapes: set[tuple[int, ...]] = set()
    by_torch = torch_encoder(tiny, batch_windows=4)
    by_torch._model.register_forward_pre_hook(
        lambda _module, _args, options: shapes.add(tuple(options["pixel_values"].shape)), with_kwargs=True
    )
    run = onnx_backend._run

    def record(session: Any, inputs: dict[str, Any], outputs: dict[str, str]) -> list[Any]:
        if "windows" in inputs:
            shapes.add(inputs["windows"].shape)
        return run(session, inputs, outputs)

    monkeypatch.setattr(onnx_backend, "_run", record)
    by_onnx = OnnxEncoder(tiny_onnx, provider="cpu", batch_windows=4)
    for count in (1, 4, 6):
        assert len(by_torch.encode(scenes(count, 224))) == count
        assert len(by_onnx.encode(scenes(count, 224))) == count
    assert shapes == {(4, 3, 224, 224), (4, 224, 224, 3)}


def test_windows_in_any_memory(encoder: Any) -> None:
    """Parts of a larger image, mirrored ones, and those that must not be written."""
    image = scenes(1, 300, seed=15)[0]
    views = [image[:224, :224], image[30:254, 60:284][::-1], image.transpose(1, 0, 2)[:224, 5:229]]
    plain = np.stack(views)
    image.flags.writeable = False
    locked = np.ascontiguousarray(views[0])
    locked.flags.writeable = False
    assert np.array_equal(fetch_all(encoder, views), fetch_all(encoder, plain))
    assert np.array_equal(fetch_all(encoder, [locked]), fetch_all(encoder, plain[:1]))
    assert np.array_equal(plain, np.stack(views))


def test_windows_encoded_between_begin_and_wait(encoder: Any) -> None:
    """The labels are those of the tokens that were handed over, whatever the device does next."""
    handles = encoder.encode(scenes(6, 224, seed=16))
    centroids = np.stack([encoder.fetch(handle) for handle in handles]).reshape(-1, 64)[::11]
    assigner = encoder.assigner(centroids, "cosine", ChunkLayout(16, 3, 5))
    chunks = [[handles[i], handles[(i + 1) % 6], handles[i], handles[(i + 3) % 6]] for i in range(6)]
    expected, expected_similarity = assigner.assign(chunks)
    first, second = assigner.begin(chunks[:4]), assigner.begin(chunks[4:])
    encoder.encode(scenes(5, 224, seed=17))
    for waits, part in ((second, slice(4, 6)), (first, slice(0, 4))):
        labels, similarity = waits()
        assert (labels.dtype, similarity.dtype) == (np.uint16, np.float32)
        assert np.array_equal(labels, expected[part])
        assert np.array_equal(similarity, expected_similarity[part])


def test_close_ends_the_threads(tiny: Path, tiny_onnx: Path) -> None:
    makers: list[Callable[[], Any]] = [
        lambda: OnnxEncoder(tiny_onnx, provider="cpu", threads=2),
        lambda: OpenVinoEncoder(tiny_onnx, threads=2),  # its threads are not Python's
        lambda: torch_encoder(tiny, threads=2),
    ]
    for make in makers:
        before = set(threading.enumerate())
        encoder = make()
        encoder.encode(scenes(3, 224))
        encoder.close()
        assert set(threading.enumerate()) <= before


def test_torch_leaves_the_threads_of_others_alone(tiny: Path) -> None:
    before = torch.get_num_threads()
    encoder = torch_encoder(tiny, threads=3)
    assert encoder.windows_at_once == 3
    assert encoder._pool is not None
    assert [encoder._pool.submit(torch.get_num_threads).result() for _ in range(9)] == [1] * 9
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == before


def grouped_assigner(encoder: Any, centroids: NDArray[np.float32], layout: ChunkLayout, chunks: int) -> Any:
    """An assigner that labels several chunks in one run, as on a GPU."""
    if isinstance(encoder, TorchEncoder):
        assigner = encoder.assigner(centroids, "inner_product", layout)
        assigner._run_size.count = chunks
        return assigner
    if isinstance(encoder, OpenVinoEncoder):
        return encoder.assigner(centroids, "inner_product", layout)
    table = centroid_table(centroids, "inner_product")
    graph = assign_graph(table, "inner_product", layout, chunks=chunks, explicit_ties=True)
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return OnnxAssigner(session, table.labels, layout, chunks, ThreadPoolExecutor(2))


def test_chunks_grouped_in_padded_runs(encoder: Any) -> None:
    handles = encoder.encode(scenes(6, 224, seed=5))
    tokens = np.stack([encoder.fetch(handle) for handle in handles])
    centroids = tokens.reshape(-1, 64)[::7]
    layout = ChunkLayout(16, 3, 5)
    random = np.random.default_rng(0)
    chunks = [[handles[i] for i in random.integers(0, 6, 4)] for _ in range(11)]
    grouped = grouped_assigner(encoder, centroids, layout, chunks=4)
    labels, similarity = grouped.assign(chunks)
    for order in ([10], [3], [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 5]):
        found, found_similarity = grouped.assign([chunks[i] for i in order])
        assert np.array_equal(found, labels[order])
        assert np.array_equal(found_similarity, similarity[order])
    single, single_similarity = encoder.assigner(centroids, "inner_product", layout).assign(chunks)
    assert np.abs(single_similarity - similarity).max() <= 1e-5 * np.abs(similarity).max()
    assert (single == labels).mean() > 0.99


# ---- assignment against float64 ----------------------------------------------------------------------------


def brute_force(
    tokens: NDArray[np.float64], centroids: NDArray[np.float64], metric: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Label, similarity and margin to the second best of tokens (R, D), in the metric's own terms."""
    if metric == "inner_product":
        scores = tokens @ centroids.T
    elif metric == "cosine":
        lengths = np.linalg.norm(tokens, axis=1)[:, None] * np.linalg.norm(centroids, axis=1)
        scores = tokens @ centroids.T / lengths
    else:
        scores = -np.sqrt(((tokens[:, None] - centroids) ** 2).sum(axis=2))
    ranked = np.sort(scores, axis=1)
    return scores.argmax(axis=1), ranked[:, -1], ranked[:, -1] - ranked[:, -2]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("stride", [10, 5])
def test_labels_are_those_of_float64(fp32_encoder: Any, metric: str, stride: int) -> None:
    layout = ChunkLayout(16, 3, stride)
    random = np.random.default_rng(6)
    tokens = random.normal(size=(6, 16, 16, 64)).astype(np.float32) + np.float32(0.5)
    centroids = (random.normal(size=(300, 64)) * random.uniform(0.5, 2, (300, 1))).astype(np.float32) + 1
    handles = [handle_of(fp32_encoder, window) for window in tokens]
    chosen = random.integers(0, 6, (7, len(layout.parts)))
    labels, similarity = fp32_encoder.assigner(centroids, metric, layout).assign(
        [[handles[i] for i in chunk] for chunk in chosen]
    )
    assert labels.shape == similarity.shape == (7, stride, stride)
    assert (labels.dtype, similarity.dtype) == (np.uint16, np.float32)

    # blended by hand: a tent over the 10 core patches, each patch's weights summing to 1
    tent = np.minimum(np.arange(10) + 0.5, 9.5 - np.arange(10))
    shares = tent.reshape(-1, stride) / tent.reshape(-1, stride).sum(axis=0)
    for n, chunk in enumerate(chosen):
        blended = np.zeros((stride, stride, 64))
        for a in range(10 // stride):
            for b in range(10 // stride):
                row, col = 3 + a * stride, 3 + b * stride
                window = tokens[chunk[a * (10 // stride) + b]].astype(np.float64)
                part = window[row : row + stride, col : col + stride]
                blended += shares[a][:, None, None] * shares[b][None, :, None] * part
        flat = blended.reshape(-1, 64)
        expected, value, margin = brute_force(flat, centroids.astype(np.float64), metric)
        scale = 1.0 if metric == "cosine" else float(np.abs(value).max())
        clear = margin > TOLERANCES["near tie"].limit * scale
        assert clear.mean() > 0.99
        assert np.array_equal(labels[n].ravel()[clear], expected[clear])
        within("similarity", np.abs(similarity[n].ravel() - value).max() / scale)


def test_distance_does_not_cancel(fp32_encoder: Any) -> None:
    """A token that is a centroid is at distance 0, and one a little beside it at that little."""
    tokens = 30 * np.random.default_rng(7).normal(size=(16, 16, 64)).astype(np.float32)
    centroids = tokens.reshape(-1, 64).copy()
    assigner = fp32_encoder.assigner(centroids, "l2", ChunkLayout(16, 0, 16))
    labels, similarity = assigner.assign([[handle_of(fp32_encoder, tokens)]])
    assert np.array_equal(labels.ravel(), np.arange(256))
    assert (similarity == 0).all()
    beside = tokens.copy()
    beside[..., 5] += np.float32(2**-10)
    _, similarity = assigner.assign([[handle_of(fp32_encoder, beside)]])
    exact = -np.abs(beside[..., 5].astype(np.float64) - tokens[..., 5])
    assert np.abs(similarity[0] - exact).max() <= 1e-9


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("margin", "stride"), [(7, 1), (7, 2), (0, 16)])
def test_ties_go_to_the_lowest_index(fp32_encoder: Any, metric: str, margin: int, stride: int) -> None:
    random = np.random.default_rng(8)
    distinct = random.normal(size=(20, 64)).astype(np.float32)
    centroids = distinct[random.integers(0, 20, 1001)]
    centroids[-1] = centroids[0]
    window = handle_of(fp32_encoder, distinct[random.integers(0, 20, 256)].reshape(16, 16, 64))
    layout = ChunkLayout(16, margin, stride)
    labels, _ = fp32_encoder.assigner(centroids, metric, layout).assign([[window] * len(layout.parts)])
    for label in np.unique(labels):
        assert label == np.flatnonzero((centroids == centroids[label]).all(axis=1))[0]


@pytest.mark.parametrize("metric", METRICS)
def test_both_ways_to_break_ties_agree(metric: Any) -> None:
    random = np.random.default_rng(9)
    layout = ChunkLayout(4, 0, 4)
    tokens = random.normal(size=(1, 4, 4, 8)).astype(np.float32)
    table = centroid_table(random.normal(size=(50, 8)).astype(np.float32), metric)
    tied = replace(table, rows=np.tile(table.rows, (2, 1)), bias=None if table.bias is None else np.tile(table.bias, 2))
    outputs = []
    for explicit in (False, True):
        graph = assign_graph(tied, metric, layout, chunks=1, explicit_ties=explicit)
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"tokens_0_0": tokens}))
    assert np.array_equal(outputs[0][0], outputs[1][0])
    assert np.array_equal(outputs[0][1], outputs[1][1])
    assert outputs[0][0].max() < 50


@pytest.mark.parametrize("metric", METRICS)
def test_equal_centroids_are_one_row(metric: Any) -> None:
    """Otherwise the last columns of a matrix product, which a kernel may round differently, can win."""
    centroids = np.random.default_rng(14).normal(size=(8, 5)).astype(np.float32)
    centroids[[3, 7]] = centroids[1]
    centroids[6] = centroids[0]
    centroids[2, 0], centroids[4] = 0.0, centroids[2]
    centroids[4, 0] = -0.0
    table = centroid_table(centroids, metric)
    assert table.labels.tolist() == [0, 1, 2, 5]
    assert len(table.rows) == 4
    assert table.bias is None or len(table.bias) == 4


def test_a_zero_token_has_no_direction(fp32_encoder: Any) -> None:
    centroids = np.eye(3, 64, dtype=np.float32)
    zero = handle_of(fp32_encoder, np.zeros((16, 16, 64), np.float32))
    labels, similarity = fp32_encoder.assigner(centroids, "cosine", ChunkLayout(16, 3, 10)).assign([[zero]])
    assert (labels == 0).all()
    assert (similarity == 0).all()


def test_as_many_centroids_as_labels(fp32_encoder: Any) -> None:
    centroids = np.random.default_rng(10).normal(size=(65535, 64)).astype(np.float32)
    tokens = np.zeros((16, 16, 64), np.float32)
    tokens[5:7, 5:7] = centroids[-1]
    labels, _ = fp32_encoder.assigner(centroids, "l2", ChunkLayout(16, 5, 6)).assign(
        [[handle_of(fp32_encoder, tokens)]]
    )
    assert (labels[0, :2, :2] == 65534).all()
    with pytest.raises(EncoderError, match="K from 1 to 65535"):
        fp32_encoder.assigner(np.zeros((65536, 64), np.float32), "l2", ChunkLayout(16, 5, 6))


def test_no_chunks(fp32_encoder: Any) -> None:
    labels, similarity = fp32_encoder.assigner(np.eye(3, 64, dtype=np.float32), "l2", ChunkLayout(16, 3, 5)).assign([])
    assert labels.shape == similarity.shape == (0, 5, 5)


def test_assigner_refuses(fp32_encoder: Any) -> None:
    centroids, layout = np.eye(3, 64, dtype=np.float32), ChunkLayout(16, 3, 5)
    for bad, metric, where, message in (
        (centroids[:, :63], "l2", layout, r"shape \(3, 63\), allowed: \(K, 64\)"),
        (centroids * np.float32(np.nan), "l2", layout, "not finite"),
        (centroids, "euclidean", layout, "'euclidean', allowed: inner_product, cosine, l2"),
        (centroids, "l2", ChunkLayout(32, 3, 13), "32 patches a side, the encoder's 16"),
        (centroids, "l2", ChunkLayout(16, 3, 7), "margin 3 and stride 7"),
    ):
        with pytest.raises(EncoderError, match=message):
            fp32_encoder.assigner(bad, metric, where)
    with pytest.raises(EncoderError, match="tokens of 1 windows, its layout says 4"):
        fp32_encoder.assigner(centroids, "l2", layout).assign([[None]])


# ---- refusals ----------------------------------------------------------------------------------------------


def changed(tiny_onnx: Path, path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(tiny_onnx)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def rename_input(model: Any) -> None:
    model.graph.input[0].name = "pixels"


def float_input(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def half_output(model: Any) -> None:
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def flat_output(model: Any) -> None:
    del model.graph.output[0].type.tensor_type.shape.dim[3]


def dynamic_side(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "S"


def uneven_side(model: Any) -> None:
    for axis in (1, 2):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 225


def second_output(model: Any) -> None:
    model.graph.output.append(helper.make_tensor_value_info("cls", TensorProto.FLOAT, ["N", 64]))


def compiled_engine(model: Any) -> None:
    node = helper.make_node("EPContext", [], ["engine"], domain="com.microsoft", ep_cache_context="/etc/passwd")
    model.graph.node.append(node)


def external_weight(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def external_in_subgraph(model: Any) -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))


def external_initializer_in_subgraph(model: Any) -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    body = helper.make_graph([helper.make_node("Identity", ["hidden"], ["c"])], "body", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=body, else_branch=body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_input, r"'pixels' uint8 \(N, 224, 224, 3\).*allowed: input 'windows' uint8"),
        (float_input, r"'windows' float \(N, 224, 224, 3\)"),
        (half_output, r"'tokens' float16"),
        (flat_output, r"'tokens' float \(N, 16, 16\)"),
        (dynamic_side, r"'windows' uint8 \(N, S, 224, 3\)"),
        (uneven_side, r"\(N, 225, 225, 3\)"),
        (second_output, r"'cls' float"),
        (compiled_engine, "com.microsoft::EPContext"),
        (external_weight, "external data"),
        (external_in_subgraph, "'hidden' in another file"),
        (external_initializer_in_subgraph, "'hidden' in another file"),
    ],
)
def test_onnx_file_refused(tiny_onnx: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = changed(tiny_onnx, tmp_path / "bad.onnx", change)
    for backend in (OnnxEncoder, OpenVinoEncoder):
        with pytest.raises(EncoderError, match=message) as caught:
            backend(path)
        assert str(path) in str(caught.value)


def test_real_external_data_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    onnx.save_model(onnx.load(tiny_onnx), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    with pytest.raises(EncoderError, match="external data"):
        OnnxEncoder(path)


def test_no_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"none\.onnx: cannot be read: No such file"):
        OnnxEncoder(tmp_path / "none.onnx")
    for content in (b"", b"GIF89a not a model"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(EncoderError, match="is not an ONNX model"):
            OnnxEncoder(tmp_path / "bad.onnx")


def test_provider_refused(tiny_onnx: Path) -> None:
    for name in ("tpu", "openvino"):
        with pytest.raises(EncoderError, match=f"provider '{name}' is not available.*available: auto, .*cpu"):
            OnnxEncoder(tiny_onnx, provider=name)


def test_a_file_with_a_fixed_batch(tiny_onnx: Path, tmp_path: Path) -> None:
    def fix(model: Any) -> None:
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    path = changed(tiny_onnx, tmp_path / "fixed.onnx", fix)
    for backend in (OnnxEncoder, OpenVinoEncoder):
        encoder: Any = backend(path)
        assert encoder.batch_windows == 2
        assert len(encoder.encode(scenes(3, 224))) == 3
        with pytest.raises(EncoderError, match="fixes batches of 2 windows, 4 were asked for"):
            backend(path, batch_windows=4)


def test_device_and_precision_refused(tiny: Path) -> None:
    for name in ("cuda:99", "abacus", "mps"):
        with pytest.raises(EncoderError, match=f"device '{name}' is not available.*available: auto, cpu"):
            torch_encoder(tiny, device=name)
    with pytest.raises(EncoderError, match="'int4', allowed with torch: auto, fp32, bf16"):
        torch_encoder(tiny, precision="int4")
    with pytest.raises(EncoderError, match="batch_windows is 0"):
        torch_encoder(tiny, batch_windows=0)


def test_pickled_weights_are_never_loaded(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    torch.save(load_file(tiny / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"found config\.json, pytorch_model\.bin, allowed: .*safetensors"):
        torch_encoder(tmp_path)


def test_missing_weights_are_not_made_up(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "config.json", tmp_path)
    weights = load_file(tiny / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks the weights layernorm\.weight"):
        torch_encoder(tmp_path)


def test_checkpoint_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"no config\.json"):
        torch_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(EncoderError, match="model_type is 'vit', allowed: dinov2, dinov2_with_registers"):
        torch_encoder(tmp_path)
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        torch_encoder(tmp_path)
    with pytest.raises(EncoderError, match="downloads are not allowed"):
        TorchEncoder("nobody/nothing", window_patches=16, mean=MEAN, std=STD, local_files_only=True)
    with pytest.raises(EncoderError, match="neither a directory nor a hub id"):
        TorchEncoder("/no/such/directory", window_patches=16, mean=MEAN, std=STD, local_files_only=True)


# ---- export ------------------------------------------------------------------------------------------------


def test_export_is_quiet_and_describes_itself(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new folder" / "encoder.onnx"
    report = export_onnx(str(tiny), path, window_patches=16, mean=MEAN, std=STD, weights="fp16")
    assert capfd.readouterr() == ("", "")
    assert list(path.parent.iterdir()) == [path]
    within("onnx", report.max_difference)
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata == {
        "source": tiny.name,
        "revision": "",
        "weights": "fp16",
        "architecture": "dinov2_with_registers",
        "patch_px": "14",
        "window_patches": "16",
        "registers": "4",
        "dim": "64",
        "mean": "[0.485, 0.456, 0.406]",
        "std": "[0.229, 0.224, 0.225]",
    }


def test_export_leaves_the_old_file_if_the_new_one_is_wrong(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(b"old")
    options: dict[str, Any] = {"window_patches": 16, "mean": MEAN, "std": STD}
    with monkeypatch.context() as patch:
        patch.setattr(export, "MAX_DIFFERENCE", 0.0)
        with pytest.raises(EncoderError, match="the exported tokens differ"):
            export_onnx(str(tiny), path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(export, "MAX_FILE_BYTES", 1000)
        with pytest.raises(EncoderError, match="do not fit one ONNX file"):
            export_onnx(str(tiny), path, **options)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_export_refuses_what_fp16_cannot_hold(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.weight"))
    weights[name][0, 0] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="beyond the range of fp16"):
        export_onnx(str(folder), tmp_path / "x.onnx", window_patches=16, mean=MEAN, std=STD, weights="fp16")


# ---- load_encoder ------------------------------------------------------------------------------------------


def test_auto_takes_openvino_then_onnx_then_torch(tiny: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(source: EncoderSource, **options: Any) -> str:
        return load_encoder(source, **options).info.backend

    both, file, model = source_of(tiny, tiny_onnx), source_of(None, tiny_onnx), source_of(tiny, None)
    assert backend(both) == backend(file) == "openvino"
    assert backend(both, precision="int8") == "openvino"
    assert backend(model) == "torch"
    assert backend(both, provider="cpu") == "onnxruntime"
    for name in ("onnx", "torch", "openvino"):
        assert backend(both, backend=name).startswith(name)
    with monkeypatch.context() as patch:  # a GPU is faster than OpenVINO on the CPU beside it
        patch.setattr("geocentroids_tiler.encoder.providers.has_gpu", lambda: True)
        assert backend(both) == "onnxruntime"
        assert backend(both, precision="int8") == "openvino"
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert backend(both) == backend(file) == "onnxruntime"
    assert backend(both, precision="bf16") == "torch"
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert backend(both) == "torch"


def test_missing_extras_say_what_to_install(tiny: Path, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    for wanted in ({"backend": "openvino"}, {"precision": "int8"}):
        with pytest.raises(EncoderError, match=r"needs OpenVINO: pip install 'geocentroids-tiler\[openvino\]'$"):
            load_encoder(source_of(tiny, tiny_onnx), **wanted)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EncoderError, match=r"\[openvino\].* pip install 'geocentroids-tiler\[cpu\]' .*") as caught:
        load_encoder(source_of(None, tiny_onnx))
    assert "[torch]" not in str(caught.value)  # it would not help: there is no checkpoint
    with pytest.raises(EncoderError, match=r"ONNX Runtime: pip install 'geocentroids-tiler\[cpu\]' .*\[gpu\]'"):
        load_encoder(source_of(tiny, tiny_onnx), backend="onnx")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EncoderError, match=r"\[cpu\].*pip install 'geocentroids-tiler\[torch\]'"):
        load_encoder(source_of(tiny, tiny_onnx))
    for backend in ("auto", "torch"):
        with pytest.raises(EncoderError, match=r"needs PyTorch and transformers: pip install .*\[torch\]"):
            load_encoder(source_of(tiny, None), backend=backend)


def test_backends_and_precisions_that_a_source_does_not_offer(tiny: Path, tiny_onnx: Path) -> None:
    for backend in ("onnx", "openvino"):
        with pytest.raises(EncoderError, match="without an ONNX file; make one with geocentroids export-onnx"):
            load_encoder(source_of(tiny, None), backend=backend)
    with pytest.raises(EncoderError, match="ONNX file only"):
        load_encoder(source_of(None, tiny_onnx), backend="torch")
    with pytest.raises(EncoderError, match="neither an ONNX file nor a model"):
        load_encoder(source_of(None, None))
    with pytest.raises(EncoderError, match="'jax', allowed: auto, onnx, openvino, torch"):
        load_encoder(source_of(tiny, tiny_onnx), backend="jax")
    with pytest.raises(EncoderError, match="'bf16', allowed with onnx: auto, fp32"):
        load_encoder(source_of(tiny, tiny_onnx), backend="onnx", precision="bf16")
    with pytest.raises(EncoderError, match="'int8', allowed with torch: auto, fp32, bf16"):
        load_encoder(source_of(tiny, None), precision="int8")
    with pytest.raises(
        EncoderError, match=r"'int4', allowed with openvino: auto, fp32, bf16, int8; allowed with onnx: auto, fp32$"
    ):
        load_encoder(source_of(None, tiny_onnx), precision="int4")


def test_precisions_of_openvino(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match="'int4', allowed with openvino: auto, fp32, bf16, int8"):
        OpenVinoEncoder(tiny_onnx, precision="int4")
    with pytest.raises(EncoderError, match="batch_windows is 0"):
        OpenVinoEncoder(tiny_onnx, batch_windows=0)
    for native, auto, mixed in ((True, "bf16", "int8+bf16"), (False, "fp32", "int8+fp32")):
        monkeypatch.setattr(openvino_backend, "multiplies_bf16", lambda _core, native=native: native)
        assert OpenVinoEncoder(tiny_onnx).info.precision == auto
        assert OpenVinoEncoder(tiny_onnx, precision="int8").info.precision == mixed
        assert OpenVinoEncoder(tiny_onnx, precision="fp32").info.precision == "fp32"
    with pytest.raises(
        EncoderError, match="'bf16', but this CPU has no instructions for it; allowed: auto, fp32, int8"
    ):
        OpenVinoEncoder(tiny_onnx, precision="bf16")


def test_copies_that_disagree(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OpenVinoEncoder.encode

    def disturbed(self: OpenVinoEncoder, windows: Any) -> list[Any]:
        tokens = real(self, windows)
        tokens[-1][3, 4, 5] = np.nextafter(tokens[-1][3, 4, 5], np.float32(9))
        return tokens

    monkeypatch.setattr(OpenVinoEncoder, "encode", disturbed)
    with pytest.raises(EncoderError, match="computes different tokens of one window here; use backend onnx"):
        OpenVinoEncoder(tiny_onnx)


def test_copies_share_the_threads(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_backend, "MAX_COPIES", 2)
    assert OpenVinoEncoder(tiny_onnx, threads=5).windows_at_once == 2
    assert OpenVinoEncoder(tiny_onnx, threads=1, batch_windows=3).windows_at_once == 3


def test_a_run_that_fails(tiny_onnx: Path) -> None:
    class Failing:
        def __init__(self, request: Any) -> None:
            self.request = request

        def __getattr__(self, name: str) -> Any:
            return getattr(self.request, name)

        def wait(self) -> None:
            self.request.wait()
            raise RuntimeError("Exception from src/inference/src/cpp/infer_request.cpp:223:\nno scratch memory\n")

    encoder = OpenVinoEncoder(tiny_onnx, threads=1)
    windows = scenes(5, 224)
    expected = fetch_all(encoder, windows)
    idle = encoder._runs._idle
    whole = list(idle)
    idle[0] = Failing(idle[0])
    with pytest.raises(EncoderError, match=r"OpenVINO failed: no scratch memory$"):
        encoder.encode(windows)
    for run in list(encoder._runs._running):
        with contextlib.suppress(EncoderError):
            encoder._runs.finish(run)
    assert len(idle) == len(whole)
    idle.clear()
    idle.extend(whole)
    assert np.array_equal(fetch_all(encoder, windows), expected)


def test_int8_weights_are_the_nearest() -> None:
    weights = np.random.default_rng(18).normal(size=(48, 20)).astype(np.float32)  # (K, N)
    weights[:, 3] = 0
    tokens = opset13.parameter([1, 7, 48], np.float32)
    layers = [
        opset13.matmul(tokens, opset13.constant(weights), transpose_a=False, transpose_b=False),
        opset13.matmul(tokens, opset13.constant(weights.T.copy()), transpose_a=False, transpose_b=True),
    ]
    model = openvino.Model(layers, [tokens], "two layers")
    assert int8.quantise_linear_layers(model) == 48
    stored = [np.asarray(op.get_data()) for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    rounded, scales = [a for a in stored if a.dtype == np.int8], [a for a in stored if a.shape == (20, 1)]
    assert len(rounded) == len(scales) == 2
    for whole, scale in zip(rounded, scales, strict=True):
        error = np.abs(whole.astype(np.float64) * scale - weights.T)
        assert (error <= 0.5001 * scale).all()
        assert np.abs(whole).max() == 127
    assert int8.quantise_linear_layers(openvino.Model([opset13.relu(tokens)], [tokens], "none")) == 0


def test_no_layer_for_int8(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "GROUP_STEP", 7)
    with pytest.raises(EncoderError, match="no linear layers that could be computed in int8; use fp32 or bf16"):
        OpenVinoEncoder(tiny_onnx, precision="int8")


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_another_encoder_than_the_codebook_names(tiny: Path, tiny_onnx: Path, backend: str) -> None:
    for change, message in (
        ({"dim": 768}, "dim is 64, expected 768"),
        ({"register_tokens": 0}, "registers is 4, expected 0"),
        ({"patch_px": 16}, "patch_px is 14, expected 16"),
        ({"sha256": "0" * 64}, "SHA-256 is [0-9a-f]{64}, expected 0000"),
    ):
        with pytest.raises(EncoderError, match=message):
            load_encoder(source_of(tiny, tiny_onnx, **change), backend=backend)


def test_another_window_or_normalising_than_the_file_has(tiny_onnx: Path) -> None:
    with pytest.raises(EncoderError, match="window_patches is 16, expected 32"):
        load_encoder(source_of(None, tiny_onnx, window_patches=32))
    with pytest.raises(EncoderError, match=r"mean is \[0.485, 0.456, 0.406\], expected \[0.5, 0.5, 0.5\]"):
        load_encoder(source_of(None, tiny_onnx, mean=(0.5, 0.5, 0.5)))


def test_the_right_digest_is_accepted(tiny: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    report = export_onnx(str(tiny), tmp_path / "again.onnx", window_patches=16, mean=MEAN, std=STD)
    load_encoder(source_of(None, tiny_onnx, sha256=report.sha256))  # so an export is reproducible, too


def test_importing_the_package_imports_no_framework() -> None:
    code = (
        "import sys, geocentroids_tiler.encoder;"
        "print(*{'torch', 'transformers', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


# ---- the published notebook --------------------------------------------------------------------------------


def processor() -> Any:
    """The image processor of the published checkpoint."""
    return BitImageProcessorPil(
        do_resize=True,
        size={"shortest_edge": 256},
        resample=3,
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def notebook_features(model: Any, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features (N * 256, D) as the notebook computes them, before it casts them to float16."""
    pixels = processor()(list(images), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        hidden = [model(image[None]).last_hidden_state[0, 5:] for image in pixels]
    features: NDArray[np.float32] = torch.cat(hidden).numpy()
    return features


@dataclass(frozen=True)
class Notebook:
    folder: Path
    windows: NDArray[np.uint8]
    centroids: NDArray[np.float32]
    labels: NDArray[np.int64]
    half_labels: NDArray[np.int64]
    margins: NDArray[np.float32]


@pytest.fixture(scope="session")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    """The notebook's labels by transformers and faiss, for a ViT-B/14 with 4 registers and random weights.

    6,144 centroids are means of two features each of other images, so that none is a token that is looked up.
    """
    folder = tmp_path_factory.mktemp("base")
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518}
    make_model("registers", seed=2, **base).save_pretrained(folder)
    model = Dinov2WithRegistersModel.from_pretrained(folder).eval()
    images = scenes(4, 224, seed=12)
    known = notebook_features(model, scenes(6, 224, seed=11))
    first, second = np.triu_indices(len(known), 1)
    pairs = np.random.default_rng(13).choice(len(first), 6144, replace=False)
    centroids = 0.5 * (known[first[pairs]] + known[second[pairs]])
    index = faiss.IndexFlatIP(768)
    index.add(centroids)
    features = notebook_features(model, images)
    values, labels = index.search(features, 2)
    half = features.astype(np.float16).astype(np.float32)
    windows = processor()(list(images), do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert windows.dtype == np.uint8  # what our encoder is given is what the network saw
    return Notebook(
        folder=folder,
        windows=windows.transpose(0, 2, 3, 1),
        centroids=centroids,
        labels=labels[:, 0],
        half_labels=index.search(half, 1)[1][:, 0],
        margins=values[:, 0] - values[:, 1],
    )


def agreement(encoder: Any, notebook: Notebook, labels: NDArray[np.int64]) -> float:
    assigner = encoder.assigner(notebook.centroids, "inner_product", ChunkLayout(16, 0, 16))
    found, _ = assigner.assign([[handle] for handle in encoder.encode(notebook.windows)])
    return float((found.ravel() == labels).mean())


def test_the_notebook_test_means_something(notebook: Notebook) -> None:
    """Many classes, and margins neither all wide nor all ties."""
    assert len(np.unique(notebook.labels)) >= 100
    low, middle = np.percentile(notebook.margins, [1, 50])
    assert 1e-3 < low < 1
    assert middle < 20


@pytest.fixture(scope="session")
def notebook_onnx(notebook: Notebook, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "encoder.onnx"
    export_onnx(str(notebook.folder), path, window_patches=16, mean=MEAN, std=STD)
    return path


def notebook_encoder(backend: str, notebook: Notebook, notebook_onnx: Path, precision: str) -> Any:
    if backend == "torch":
        return torch_encoder(notebook.folder, precision=precision)
    if backend == "onnx":
        return OnnxEncoder(notebook_onnx, provider="cpu")
    return OpenVinoEncoder(notebook_onnx, precision=precision)


@pytest.mark.parametrize("backend", ["onnx", "openvino", "torch"])
def test_the_notebook_s_labels(notebook: Notebook, notebook_onnx: Path, backend: str) -> None:
    encoder = notebook_encoder(backend, notebook, notebook_onnx, "fp32")
    agrees("notebook fp32", agreement(encoder, notebook, notebook.labels))
    agrees("notebook fp16 features", agreement(encoder, notebook, notebook.half_labels))


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("torch", "bf16"),
        pytest.param("openvino", "bf16", marks=needs_bf16),
        ("openvino", "int8"),
    ],
)
def test_the_notebook_s_labels_in_fewer_bits(
    notebook: Notebook, notebook_onnx: Path, backend: str, precision: str
) -> None:
    encoder = notebook_encoder(backend, notebook, notebook_onnx, precision)
    agrees(f"notebook {backend} {precision}", agreement(encoder, notebook, notebook.labels))


# ---- the embedded encoder ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "nano").is_dir(), reason="the nano checkpoint is not here")
def test_nano(tmp_path: Path) -> None:
    path = tmp_path / "encoder.onnx"
    report = export_onnx(str(SHARED / "nano"), path, window_patches=16, mean=MEAN, std=STD, weights="fp16")
    assert report.size_bytes < 5.95e6
    windows = scenes(2, 224)
    expected = transformers_tokens(AutoModel.from_pretrained(SHARED / "nano"), windows).reshape(-1, 192)
    found = fetch_all(OnnxEncoder(path, provider="cpu"), windows).reshape(-1, 192)
    cosine = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosine.min() > 0.999  # fp16 weights against the checkpoint's fp32


def test_nano_s_labels_in_fewer_bits() -> None:
    """Blended chunks of the sample scene with the codebook in the package, against ONNX Runtime in fp32."""
    codebook = find_codebook("nano", Path())
    pre, manifest = codebook.manifest.preprocess, codebook.manifest
    layout = ChunkLayout(pre.window_patches, pre.margin_patches, pre.stride_patches)
    side, step = 14 * layout.window_patches, 14 * layout.stride_patches
    image = make_scene(1024).rgb
    windows = [image[row : row + side, col : col + side] for row in range(0, 3 * step, step) for col in (0, step)]
    chunks = [[(1 + i + part.d_row) * 2 + 1 + part.d_col for part in layout.parts] for i in range(2)]

    def labels(backend: str, precision: str) -> NDArray[np.uint16]:
        source = encoder_source(manifest.encoder, pre, codebook.encoder_path)
        encoder = load_encoder(source, backend=backend, precision=precision)
        assigner = encoder.assigner(codebook.centroids.astype(np.float32), manifest.assignment.metric, layout)
        handles = encoder.encode(windows)
        return assigner.assign([[handles[i] for i in chunk] for chunk in chunks])[0]

    expected = labels("onnx", "fp32")
    assert len(np.unique(expected)) > 30
    agrees("nano fp32", float((labels("openvino", "fp32") == expected).mean()))
    agrees("nano int8", float((labels("openvino", "int8") == expected).mean()))
    if multiplies_bf16(openvino.Core()):
        agrees("nano bf16", float((labels("openvino", "bf16") == expected).mean()))
