"""An ONNX file with external data, foreign operators or functions is refused before a runtime sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from onnx import AttributeProto, TensorProto, helper
from onnx_files import encoder_model, external_tensor, with_external_weight, write_encoder

from geocentroids_tiler.encoder import EncoderSource, load_encoder
from geocentroids_tiler.encoder.model_file import RUNTIME_OPS, read_model
from geocentroids_tiler.errors import CodebookError, EncoderError
from geocentroids_tiler.importing import EMBEDDED_DIR, check_onnx_file

Change = Callable[[Any], None]


def inner_tensor(name: str = "inner") -> Any:
    return TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], float_data=[0])


def sparse(where: str) -> Any:
    """Return a sparse tensor of which one part is in another file."""
    found = onnx.SparseTensorProto(dims=[1], values=inner_tensor(), indices=inner_tensor())
    getattr(found, where).CopyFrom(external_tensor())
    return found


def graph(nodes: Any = (), initializer: Any = (), sparse_initializer: Any = ()) -> Any:
    return helper.make_graph(
        list(nodes), "body", [], [], list(initializer), sparse_initializer=list(sparse_initializer)
    )


def constant(**attribute: Any) -> Any:
    """Return a node with one attribute that is set as it stands, whatever its operator makes of it."""
    node = helper.make_node("Constant", [], ["c"])
    node.attribute.append(AttributeProto(name="value", **attribute))
    return node


def nested(depth: int, innermost: Any) -> Any:
    """Return a node with a subgraph in a subgraph, ``depth`` times."""
    node = innermost
    for _ in range(depth):
        node = helper.make_node("If", ["x"], ["y"], then_branch=graph([node]), else_branch=graph())
    return node


def add_node(node: Any) -> Change:
    return lambda model: model.graph.node.append(node)


def add_training(where: str, body: Any) -> Change:
    return lambda model: getattr(model.training_info.add(), where).CopyFrom(body)


def location_without_the_mark(model: Any) -> None:
    model.graph.initializer[0].external_data.add(key="location", value="weights.bin")


EXTERNAL: dict[str, Change] = {
    "initializer": lambda model: model.graph.initializer.append(external_tensor()),
    "location without the mark": location_without_the_mark,
    "values of a sparse initializer": lambda model: model.graph.sparse_initializer.append(sparse("values")),
    "indices of a sparse initializer": lambda model: model.graph.sparse_initializer.append(sparse("indices")),
    "tensor attribute": add_node(constant(type=AttributeProto.TENSOR, t=external_tensor())),
    "tensor attribute called a number": add_node(constant(type=AttributeProto.FLOAT, f=1, t=external_tensor())),
    "list of tensors": add_node(constant(type=AttributeProto.TENSORS, tensors=[inner_tensor(), external_tensor()])),
    "sparse attribute": add_node(constant(type=AttributeProto.SPARSE_TENSOR, sparse_tensor=sparse("values"))),
    "list of sparse tensors": add_node(
        constant(type=AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse("indices")])
    ),
    "constant in a subgraph": add_node(nested(1, constant(type=AttributeProto.TENSOR, t=external_tensor()))),
    "constant six subgraphs down": add_node(nested(6, constant(type=AttributeProto.TENSOR, t=external_tensor()))),
    "initializer of a subgraph": add_node(constant(type=AttributeProto.GRAPH, g=graph([], [external_tensor()]))),
    "sparse initializer of a subgraph": add_node(
        constant(type=AttributeProto.GRAPH, g=graph(sparse_initializer=[sparse("values")]))
    ),
    "list of subgraphs": add_node(
        constant(type=AttributeProto.GRAPHS, graphs=[graph(), graph([], [external_tensor()])])
    ),
    "training: initialization": add_training("initialization", graph([], [external_tensor()])),
    "training: algorithm": add_training(
        "algorithm", graph([nested(2, constant(type=AttributeProto.TENSOR, t=external_tensor()))])
    ),
}


def function(domain: str = "local", **parts: Any) -> Change:
    return lambda model: model.functions.append(onnx.FunctionProto(name="F", domain=domain, **parts))


FOREIGN: dict[str, tuple[Change, str]] = {
    "operator of another domain": (add_node(helper.make_node("Run", [], ["y"], domain="evil")), "evil::Run"),
    "in a subgraph": (add_node(nested(2, helper.make_node("Run", [], ["y"], domain="evil"))), "evil::Run"),
    "in training": (add_training("algorithm", graph([helper.make_node("Run", [], ["y"], domain="evil")])), "evil::Run"),
    "compiled engine": (
        add_node(helper.make_node("EPContext", [], ["y"], domain="com.microsoft", ep_cache_context="/etc/passwd")),
        "com.microsoft::EPContext",
    ),
    "Python by name": (add_node(helper.make_node("PythonOp", [], ["y"], domain="com.microsoft")), "PythonOp"),
    "program of another runtime": (
        add_node(nested(1, helper.make_node("Snpe", [], ["y"], domain="com.microsoft"))),
        "com.microsoft::Snpe",
    ),
    "function": (function(node=[helper.make_node("Relu", ["x"], ["y"])]), "defines the function local::F"),
    "function in ONNX's own domain": (function(domain=""), "defines the function ::F"),
    "function with external data": (
        function(node=[constant(type=AttributeProto.TENSOR, t=external_tensor())]),
        "defines the function local::F",
    ),
    "function with external data as a default": (
        function(attribute_proto=[AttributeProto(name="a", type=AttributeProto.TENSOR, t=external_tensor())]),
        "defines the function local::F",
    ),
}

REFUSED = {name: (change, r"in another file \(ONNX external data\)") for name, change in EXTERNAL.items()} | FOREIGN


def source_of(path: Path) -> EncoderSource:
    return EncoderSource(
        onnx_path=path,
        model=None,
        revision=None,
        architecture="x",
        dim=5,
        patch_px=14,
        register_tokens=0,
        window_patches=2,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        sha256=None,
        allow_download=False,
    )


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_runtime_sees_it(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def opened(*_: Any, **__: Any) -> None:
        started.append(backend)
        raise RuntimeError("no runtime here")

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    monkeypatch.setattr(openvino, "Core", opened)
    change, message = REFUSED[name]
    model = encoder_model()
    path = write_encoder(tmp_path / "fine.onnx", model)
    with pytest.raises((EncoderError, RuntimeError), match="no runtime here"):
        load_encoder(source_of(path), backend=backend, threads=1)
    assert started.pop() == backend
    change(model)
    path = write_encoder(tmp_path / "bad.onnx", model)
    with pytest.raises(EncoderError, match=message) as caught:
        load_encoder(source_of(path), backend=backend, threads=1)
    assert not started
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CodebookError, match=message):
        check_onnx_file(path)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_the_file_that_is_changed_above_runs(backend: str, tmp_path: Path) -> None:
    encoder = load_encoder(source_of(write_encoder(tmp_path / "a.onnx")), backend=backend, precision="fp32", threads=1)
    windows = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 3), np.uint8)
    (tokens,) = encoder.encode(windows)
    means = windows[0].reshape(2, 14, 2, 14, 3).mean(axis=(1, 3))
    expected = means @ onnx.numpy_helper.to_array(encoder_model().graph.initializer[0])
    np.testing.assert_allclose(encoder.fetch(tokens), expected, rtol=1e-4, atol=1e-2)
    encoder.close()


def test_real_external_data(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    onnx.save_model(encoder_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size
    with pytest.raises(EncoderError, match="keeps 'weight' in another file"):
        read_model(path)


def test_a_mark_that_changes_the_format(tmp_path: Path) -> None:
    """ONNX Runtime would read it in a format that was not checked, though the same bytes are valid ONNX."""
    model = encoder_model()
    model.producer_name = "ORTM"
    content = model.SerializeToString()
    onnx.checker.check_model(content)
    with pytest.raises(Exception, match="ORT model"):
        onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(EncoderError, match="marked as ONNX Runtime's own format, allowed: an ONNX model"):
        read_model(path)


@pytest.mark.parametrize("op", ["FastGelu", "MultiHeadAttention", "SkipLayerNormalization", "MatMulNBits"])
def test_fused_operators_are_accepted(op: str, tmp_path: Path) -> None:
    model = encoder_model()
    model.graph.node.append(helper.make_node(op, ["weight"], ["y"], domain="com.microsoft"))
    assert op in RUNTIME_OPS
    assert read_model(write_encoder(tmp_path / "a.onnx", model))[1].dim == 5


def test_embedded_encoders_are_accepted() -> None:
    found = sorted(EMBEDDED_DIR.glob("*/encoder.onnx"))
    assert found
    for path in found:
        check_onnx_file(path)


def test_the_helper_has_external_data(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="keeps 'weight' in another file"):
        read_model(write_encoder(tmp_path / "bad.onnx", with_external_weight()))
