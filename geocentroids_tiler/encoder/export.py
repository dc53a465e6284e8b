"""Writes an encoder as one ONNX file: uint8 windows in, tokens out."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from geocentroids_tiler.encoder.checkpoint import Checkpoint, load_model, locate_checkpoint
from geocentroids_tiler.errors import EncoderError

OPSET = 17
"""The first with LayerNormalization; every execution provider in use knows it."""

MAX_FILE_BYTES = 2**31 - 1
"""A protobuf message ends here, so a larger model would need external data."""

MAX_DIFFERENCE = 5e-4
"""Greatest difference from transformers, as a share of the largest token value. Measured: 1e-6 (nano),
2e-6 (random ViT-B); a wrong weight or position grid gives 1e-2 and more."""

Weights = Literal["fp32", "fp16"]


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        path: the file.
        size_bytes: its size.
        sha256: its hex digest.
        dim: length D of a token.
        patch_px: pixels a side of a patch.
        registers: register tokens of the model.
        max_difference: greatest difference from the torch model, as a share of the largest token value.
    """

    path: Path
    size_bytes: int
    sha256: str
    dim: int
    patch_px: int
    registers: int
    max_difference: float


def export_onnx(
    source: str,
    destination: Path,
    *,
    window_patches: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    weights: Weights = "fp32",
    revision: str | None = None,
    local_files_only: bool = False,
) -> ExportReport:
    """Export a DINOv2 checkpoint, compare the file with the torch model and put it at ``destination``.

    Args:
        source: hub id or local directory.
        destination: the file to write; it is replaced only once the new one is complete and checked.
        window_patches: patches P a side of a window. Position embeddings are interpolated to it and fixed.
        mean: mean of R, G, B that is subtracted from pixels in [0, 1].
        std: what the difference is divided by.
        weights: ``fp16`` halves the file; matrices are rounded to fp16 and cast to fp32 when it is loaded.
        revision: commit, tag or branch on the hub.
        local_files_only: never ask the hub.

    Returns:
        Size, digest and measured difference.

    Raises:
        EncoderError: if the checkpoint cannot be had, does not fit one file, or the file differs from it.
    """
    if weights not in ("fp32", "fp16"):
        raise EncoderError(f"weights is {weights!r}, allowed: fp32, fp16")
    if window_patches < 1:
        raise EncoderError(f"window_patches is {window_patches}, allowed: 1 or more")
    checkpoint = locate_checkpoint(source, revision, local_files_only=local_files_only)
    model = load_model(checkpoint, "eager")
    if weights == "fp16":
        _round_to_fp16(model)
    size = sum(p.numel() * (2 if weights == "fp16" and p.ndim > 1 else 4) for p in model.parameters())
    if size > MAX_FILE_BYTES:
        raise EncoderError(
            f"{source}: {size / 1e9:.1f} GB of {weights} weights do not fit one ONNX file (at most 2.1 GB); "
            "use the torch backend for it"
        )
    graph = _TokenGraph(model, checkpoint.registers, window_patches, mean, std).eval()
    proto = _trace(graph)
    if weights == "fp16":
        _store_as_fp16(proto)
    _describe(proto, graph, checkpoint, weights)
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    difference = _difference(content, graph, source)
    if not difference <= MAX_DIFFERENCE:  # NaN counts as different
        raise EncoderError(
            f"{source}: the exported tokens differ from the model's by {difference:.1e} of the largest value, "
            f"allowed: {MAX_DIFFERENCE:.0e}"
        )
    _write(destination, content)
    return ExportReport(
        path=destination,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        dim=graph.dim,
        patch_px=graph.patch_px,
        registers=checkpoint.registers,
        max_difference=difference,
    )


class _TokenGraph(torch.nn.Module):
    """The traced module: normalising, the model with fixed position embeddings, patch tokens only."""

    def __init__(
        self,
        model: Any,
        registers: int,
        window_patches: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.offset: torch.Tensor
        self.divisor: torch.Tensor
        self.model, self.registers, self.window_patches = model, registers, window_patches
        self.mean, self.std = mean, std
        self.dim, self.patch_px = int(model.config.hidden_size), int(model.config.patch_size)
        self.window_px = window_patches * self.patch_px
        self.register_buffer("offset", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("divisor", torch.tensor(std).view(1, 3, 1, 1))
        # While tracing, transformers would put the interpolation into the graph; here it is done once.
        embeddings = model.embeddings
        cells = torch.zeros(1, window_patches**2 + 1, self.dim)
        fixed = embeddings.interpolate_pos_encoding(cells, self.window_px, self.window_px).detach().clone()
        embeddings.interpolate_pos_encoding = lambda *_: fixed

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return tokens (N, P, P, D) of uint8 windows (N, S, S, 3)."""
        pixels = (windows.permute(0, 3, 1, 2).float() / 255 - self.offset) / self.divisor
        tokens = self.model(pixel_values=pixels).last_hidden_state[:, 1 + self.registers :]
        shaped: torch.Tensor = tokens.reshape(-1, self.window_patches, self.window_patches, self.dim)
        return shaped


def _trace(graph: _TokenGraph) -> Any:
    """Return the ONNX model. The TorchScript exporter: its graph is as fast or faster and needs no onnxscript."""
    example = torch.zeros((1, graph.window_px, graph.window_px, 3), dtype=torch.uint8)
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # it is deprecated, and warns of each Python condition it fixes
        path = Path(folder) / "encoder.onnx"
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=["windows"],
            output_names=["tokens"],
            dynamic_axes={"windows": {0: "N"}, "tokens": {0: "N"}},
        )
        return onnx.load_model_from_string(path.read_bytes())


def _round_to_fp16(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half().float()
            if not torch.isfinite(parameter.data).all():
                raise EncoderError(f"{name} has values beyond the range of fp16; export with fp32 weights")


def _store_as_fp16(proto: Any) -> None:
    """Store matrices as fp16 with a Cast, which ONNX Runtime folds away when it loads the file."""
    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2:
            continue
        values = numpy_helper.to_array(tensor)
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue  # not a rounded weight: interpolated positions, constants
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _describe(proto: Any, graph: _TokenGraph, checkpoint: Checkpoint, weights: Weights) -> None:
    """Fix the output's shape and write the metadata."""
    del proto.graph.output[:]
    shape = ["N", graph.window_patches, graph.window_patches, graph.dim]
    proto.graph.output.append(helper.make_tensor_value_info("tokens", TensorProto.FLOAT, shape))
    helper.set_model_props(
        proto,
        {
            "source": checkpoint.name,
            "weights": weights,
            "revision": checkpoint.revision,
            "architecture": checkpoint.architecture,
            "patch_px": str(graph.patch_px),
            "window_patches": str(graph.window_patches),
            "registers": str(checkpoint.registers),
            "dim": str(graph.dim),
            "mean": json.dumps(graph.mean),
            "std": json.dumps(graph.std),
        },
    )


def _difference(content: bytes, graph: _TokenGraph, source: str) -> float:
    """Return the greatest difference between file and module on two random windows, relative to the largest."""
    random = np.random.default_rng(0)
    windows = random.integers(0, 256, (2, graph.window_px, graph.window_px, 3), dtype=np.uint8)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"windows": windows})
    except Exception as error:  # ONNX Runtime's errors share no base but Exception
        raise EncoderError(f"{source}: the exported file does not run: {str(error).splitlines()[0]}") from error
    with torch.inference_mode():
        expected = graph(torch.from_numpy(windows)).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _write(destination: Path, content: bytes) -> None:
    """Write to a temporary file beside ``destination`` and rename it."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=destination.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            try:
                file.write(content)
            except OSError:
                part.unlink()
                raise
        part.chmod(0o644)  # a temporary file is its owner's alone
        part.replace(destination)
    except OSError as error:
        raise EncoderError(f"{destination}: cannot be written: {error.strerror}") from error
