"""Builds the ONNX graphs around the encoder: split a batch, blend windows, find the nearest centroid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from geocentroids_tiler.encoder.base import ChunkLayout
from geocentroids_tiler.encoder.checks import Metric
from geocentroids_tiler.encoder.table import TINY, CentroidTable

OPSET = 17
IR_VERSION = 8


class _Graph:
    """Collects nodes and initializers; names are made up as they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def constant(self, name: str, array: NDArray[Any]) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        name = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def serialise(self, inputs: list[Any], outputs: list[Any]) -> bytes:
        graph = helper.make_graph(self.nodes, "geocentroids", inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
        content: bytes = model.SerializeToString()
        return content


def split_graph(batch: int) -> bytes:
    """Return a model that splits ``tokens`` (N, P, P, D) into N tensors ``tokens_i`` of (1, P, P, D)."""
    tokens = helper.make_tensor_value_info("tokens", TensorProto.FLOAT, [batch, "P", "P", "D"])
    names = [f"tokens_{i}" for i in range(batch)]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "P", "P", "D"]) for name in names]
    graph = _Graph()
    graph.constant("sizes", np.ones(batch, np.int64))
    graph.nodes.append(helper.make_node("Split", ["tokens", "sizes"], names, axis=0))
    return graph.serialise([tokens], outputs)


def assign_graph(
    table: CentroidTable, metric: Metric, layout: ChunkLayout, *, chunks: int, explicit_ties: bool
) -> bytes:
    """Return a model that labels a fixed number of chunks.

    Inputs are ``tokens_{c}_{p}`` of shape (1, P, P, D): the tokens of part p of chunk c. Outputs are
    ``labels`` uint16 (rows of the table) and ``similarity`` float32, both of shape (chunks, s, s).

    Args:
        table: the centroids.
        metric: ``inner_product``, ``cosine`` or ``l2``.
        layout: how windows cover a chunk.
        chunks: chunks of one run.
        explicit_ties: find the lowest index of the best score by comparing, for providers whose ArgMax may
            return any of several equals.
    """
    R, D = table.rows.shape
    s, P = layout.stride_patches, layout.window_patches
    graph = _Graph()
    tokens = _blended_rows(graph, layout, chunks, D)  # (chunks * s * s, D)
    if metric == "cosine":
        tokens = _unit(graph, tokens)
    centroids = graph.constant("centroids", table.rows)
    operands = [tokens, centroids]
    if table.bias is not None:
        operands.append(graph.constant("bias", table.bias))
    scores = graph.add("Gemm", *operands, transB=1)  # (tokens, R)
    best = graph.add("ReduceMax", scores, axes=[1], keepdims=1)  # (tokens, 1)
    if explicit_ties:
        index = _lowest_index(graph, scores, best, R)
    else:
        index = graph.add("ArgMax", scores, axis=1, keepdims=0, select_last_index=0)
    if metric == "l2":
        best = _minus_distance(graph, tokens, centroids, index)
    elif metric == "cosine":
        bounds = [graph.constant(name, np.array(x, np.float32)) for name, x in (("low", -1), ("high", 1))]
        best = graph.add("Clip", best, *bounds)
    shape = graph.constant("shape", np.array([chunks, s, s], np.int64))
    graph.add("Cast", graph.add("Reshape", index, shape), output="labels", to=TensorProto.UINT16)
    graph.add("Reshape", best, shape, output="similarity")

    inputs = [
        helper.make_tensor_value_info(f"tokens_{c}_{p}", TensorProto.FLOAT, [1, P, P, D])
        for c in range(chunks)
        for p in range(len(layout.parts))
    ]
    outputs = [
        helper.make_tensor_value_info("labels", TensorProto.UINT16, [chunks, s, s]),
        helper.make_tensor_value_info("similarity", TensorProto.FLOAT, [chunks, s, s]),
    ]
    return graph.serialise(inputs, outputs)


def _blended_rows(graph: _Graph, layout: ChunkLayout, chunks: int, dim: int) -> str:
    """Cut each chunk out of its windows and sum the parts by weight, always in the order of the parts."""
    s, parts = layout.stride_patches, layout.parts
    axes = graph.constant("axes", np.array([1, 2], np.int64))
    weights = layout.weights()[..., None]  # (parts, s, s, 1)
    bounds = []
    for p, part in enumerate(parts):
        start = np.array([part.token_row, part.token_col], np.int64)
        bounds.append((graph.constant(f"start_{p}", start), graph.constant(f"end_{p}", start + s)))
        if len(parts) > 1:
            graph.constant(f"weight_{p}", weights[p])
    blended = []
    for c in range(chunks):
        total = ""
        for p, (start_p, end_p) in enumerate(bounds):
            share = graph.add("Slice", f"tokens_{c}_{p}", start_p, end_p, axes)  # (1, s, s, D)
            if len(parts) > 1:
                share = graph.add("Mul", share, f"weight_{p}")
            total = graph.add("Add", total, share) if total else share
        blended.append(total)
    joined = blended[0] if chunks == 1 else graph.add("Concat", *blended, axis=0)
    return graph.add("Reshape", joined, graph.constant("rows", np.array([-1, dim], np.int64)))


def _unit(graph: _Graph, tokens: str) -> str:
    length = graph.add("ReduceL2", tokens, axes=[1], keepdims=1)
    least = graph.constant("tiny", np.array([TINY], np.float32))
    return graph.add("Div", tokens, graph.add("Max", length, least))


def _lowest_index(graph: _Graph, scores: str, best: str, count: int) -> str:
    hit = graph.add("Equal", scores, best)
    numbers = graph.constant("numbers", np.arange(count, dtype=np.int32)[None])  # (1, R)
    beyond = graph.constant("beyond", np.array([[count - 1]], np.int32))
    return graph.add("ReduceMin", graph.add("Where", hit, numbers, beyond), axes=[1], keepdims=0)


def _minus_distance(graph: _Graph, tokens: str, centroids: str, index: str) -> str:
    """Return -|t - c| of the winner from the difference itself: the expansion cancels near 0."""
    difference = graph.add("Sub", tokens, graph.add("Gather", centroids, index, axis=0))
    return graph.add("Neg", graph.add("ReduceL2", difference, axes=[1], keepdims=1))
