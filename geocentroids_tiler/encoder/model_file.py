"""Reads an encoder's ONNX file and refuses what breaks the contract, before ONNX Runtime sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import FunctionProto, NodeProto, TensorProto

from geocentroids_tiler.encoder.checks import check_batch
from geocentroids_tiler.errors import EncoderError

CONTRACT = "input 'windows' uint8 (N, S, S, 3), output 'tokens' float32 (N, P, P, D), S a multiple of P"

STANDARD_DOMAINS = ("", "ai.onnx")
"""Of ONNX's own operators. None of them opens a file or loads code."""

RUNTIME_DOMAIN = "com.microsoft"

RUNTIME_OPS = frozenset(
    {
        "Attention",
        "BiasAdd",
        "BiasGelu",
        "BiasSplitGelu",
        "DequantizeLinear",
        "DynamicQuantizeMatMul",
        "FastGelu",
        "FusedConv",
        "FusedGemm",
        "FusedMatMul",
        "FusedMatMulActivation",
        "Gelu",
        "GemmFastGelu",
        "GroupNorm",
        "GroupQueryAttention",
        "LayerNormalization",
        "MatMulBnb4",
        "MatMulInteger16",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "MultiHeadAttention",
        "NhwcConv",
        "PackedAttention",
        "PackedMultiHeadAttention",
        "QAttention",
        "QGemm",
        "QLinearAdd",
        "QLinearConcat",
        "QLinearConv",
        "QLinearMul",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
        "QLinearWhere",
        "QuantizeLinear",
        "QuickGelu",
        "RelativePositionBias",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipGroupNorm",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
"""Of ONNX Runtime's operators those that its optimiser puts in for standard ones. Others in the same domain name a
compiled engine (EPContext), carry a program (Snpe) or call Python by name (PythonOp).

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

ORT_MARK = b"ORTM"
"""As bytes 4 to 8 it makes ONNX Runtime read the content, valid ONNX or not, in its own format.

Source: https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/flatbuffers/flatbuffers_utils.cc
"""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What an encoder file says of itself.

    Attributes:
        window_px: pixels S a side of a window.
        window_patches: patches P a side of a window.
        dim: length D of a token.
        batch_axis: name of the dynamic batch axis, empty where it has none.
        fixed_batch: N where the file fixes it, else None.
        metadata: the file's metadata properties.
    """

    window_px: int
    window_patches: int
    dim: int
    batch_axis: str
    fixed_batch: int | None
    metadata: dict[str, str]

    @property
    def patch_px(self) -> int:
        """Pixels a side of a patch."""
        return self.window_px // self.window_patches

    def batch(self, path: Path, wanted: int | None) -> int | None:
        """Return the windows of one run: those that the file at ``path`` fixes, else those wanted; None: neither.

        Raises:
            EncoderError: if both are given and differ, or what is wanted is no number of windows.
        """
        if wanted is None:
            return self.fixed_batch
        if self.fixed_batch is not None and wanted != self.fixed_batch:
            raise EncoderError(f"{path}: the file fixes batches of {self.fixed_batch} windows, {wanted} were asked for")
        return check_batch(wanted)


class FileEncoder:
    """What is the same of every encoder that runs an ONNX file: its tokens are float32.

    Attributes:
        spec: what the file promises.
    """

    spec: ModelSpec

    @property
    def dim(self) -> int:
        """Length D of a token."""
        return self.spec.dim

    @property
    def window_patches(self) -> int:
        """Patches a side P of a window."""
        return self.spec.window_patches

    def token_bytes(self) -> int:
        """Device memory that the tokens of one window take."""
        return self.window_patches**2 * self.dim * 4


def read_model(path: Path) -> tuple[bytes, ModelSpec]:
    """Return the content of the ONNX file at ``path`` and what it promises.

    Raises:
        EncoderError: naming the file, what was found and what is allowed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EncoderError(f"{path}: cannot be read: {error.strerror}") from error
    if content[4:8] == ORT_MARK:
        raise EncoderError(f"{path}: is marked as ONNX Runtime's own format, allowed: an ONNX model")
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError is private to its implementation
        raise EncoderError(f"{path}: is not an ONNX model") from error
    if not model.graph.node:
        raise EncoderError(f"{path}: is not an ONNX model")
    _refuse_other_files(path, model)
    return content, _spec(path, model)


def _spec(path: Path, model: Any) -> ModelSpec:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    found_in = [_describe(value) for value in inputs]
    found_out = [_describe(value) for value in model.graph.output]
    ok = (
        len(inputs) == 1
        and len(model.graph.output) == 1
        and found_in[0][:2] == ("windows", TensorProto.UINT8)
        and found_out[0][:2] == ("tokens", TensorProto.FLOAT)
        and _shapes_fit(found_in[0][2], found_out[0][2])
    )
    if not ok:
        found = f"input {_text(found_in)}, output {_text(found_out)}"
        raise EncoderError(f"{path}: found {found}; allowed: {CONTRACT}")
    (batch, side, _, _), (_, patches, _, dim) = found_in[0][2], found_out[0][2]
    return ModelSpec(
        window_px=int(side),
        window_patches=int(patches),
        dim=int(dim),
        batch_axis=batch if isinstance(batch, str) else "",
        fixed_batch=batch if isinstance(batch, int) else None,
        metadata={entry.key: entry.value for entry in model.metadata_props},
    )


def _shapes_fit(windows: tuple[int | str, ...], tokens: tuple[int | str, ...]) -> bool:
    if len(windows) != 4 or len(tokens) != 4 or not all(isinstance(x, int) for x in windows[1:] + tokens[1:]):
        return False
    side, patches = int(windows[1]), int(tokens[1])
    square = windows[1] == windows[2] and windows[3] == 3 and tokens[1] == tokens[2]
    return square and min(side, patches, int(tokens[3])) > 0 and side % patches == 0 and windows[0] != 0


def _describe(value: Any) -> tuple[str, int, tuple[int | str, ...]]:
    """Return name, element type and shape; an axis is an int, or the (possibly empty) name of a dynamic one."""
    tensor = value.type.tensor_type
    shape = tuple(
        dim.dim_value if dim.WhichOneof("value") == "dim_value" else dim.dim_param for dim in tensor.shape.dim
    )
    return value.name, tensor.elem_type, shape


def _text(values: list[tuple[str, int, tuple[int | str, ...]]]) -> str:
    return ", ".join(
        f"{name!r} {TensorProto.DataType.Name(kind).lower()} ({', '.join(str(dim or '?') for dim in shape)})"
        for name, kind, shape in values
    )


def _refuse_other_files(path: Path, model: Any) -> None:
    """Refuse whatever would make a runtime open another file or run other code.

    Every message of the file is looked at, wherever it is: in subgraphs, attributes, sparse tensors, training graphs.
    """
    for message in _messages(model):
        if isinstance(message, FunctionProto):
            raise EncoderError(
                f"{path}: defines the function {message.domain}::{message.name}, "
                "allowed: a graph of operators without functions of its own"
            )
        if isinstance(message, NodeProto) and not _is_known(message):
            raise EncoderError(
                f"{path}: uses the operator {message.domain}::{message.op_type}, "
                "allowed: standard ONNX operators and those that ONNX Runtime fuses them to"
            )
        if isinstance(message, TensorProto) and (
            message.data_location != TensorProto.DEFAULT or len(message.external_data)
        ):
            raise EncoderError(
                f"{path}: keeps {message.name!r} in another file (ONNX external data), "
                "allowed: one file that holds all weights"
            )


def _is_known(node: Any) -> bool:
    return node.domain in STANDARD_DOMAINS or (node.domain == RUNTIME_DOMAIN and node.op_type in RUNTIME_OPS)


def _messages(message: Any) -> Iterator[Any]:
    """Yield a protobuf message and all messages in it; of a tensor the tensor only, so that no weights are copied."""
    yield message
    if isinstance(message, TensorProto):
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(item)
