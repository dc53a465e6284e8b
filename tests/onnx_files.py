"""A small ONNX file that keeps the encoder's contract: the mean colour of each patch times a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

PATCH_PX = 14


def encoder_model(dim: int = 5, patches: int = 2) -> Any:
    """Return a model of windows of ``patches`` x ``patches`` patches of 14 px and tokens of length ``dim``."""
    side = patches * PATCH_PX
    weight = np.random.default_rng(0).standard_normal((3, dim)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["windows"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["planes"], ["means"], kernel_shape=[14, 14], strides=[14, 14]),
        helper.make_node("Transpose", ["means"], ["colors"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["colors", "weight"], ["tokens"]),
    ]
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("windows", TensorProto.UINT8, ["N", side, side, 3])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["N", patches, patches, dim])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def write_encoder(path: Path, model: Any = None) -> Path:
    """Write a model, or the usual one, to ``path`` and return ``path``."""
    path.write_bytes((encoder_model() if model is None else model).SerializeToString())
    return path


def external_tensor(name: str = "hidden") -> Any:
    """Return a tensor whose values are in another file."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def with_external_weight() -> Any:
    """Return the usual model with its weight in another file."""
    model = encoder_model()
    model.graph.initializer[0].CopyFrom(external_tensor("weight"))
    return model
