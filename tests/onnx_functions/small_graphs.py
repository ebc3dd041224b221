"""Small graphs of third parties, written node by node: a weight, symbolic inputs, and whatever a test puts between."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Between", "array", "integers", "node", "product", "save", "value"]

Between = tuple[Sequence[NodeProto], Sequence[TensorProto]]
"""Nodes, and the initializers that they read."""


def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    """Return a node that is named after its operator and output."""
    return helper.make_node(op, inputs, [output], name=f"{op} of {output}", **attributes)


def integers(name: str, *numbers: int) -> TensorProto:
    """Return a vector of INT64."""
    return numpy_helper.from_array(np.array(numbers, np.int64), name)


def array(name: str, *dims: int) -> TensorProto:
    """Return an FP32 tensor of ones."""
    return numpy_helper.from_array(np.ones(dims, np.float32), name)


def value(name: str, *size: int | str | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Return an input or output."""
    return helper.make_tensor_value_info(name, kind, size)


def product(reads: str) -> NodeProto:
    """Return y = READS @ w, w being [64, 32]."""
    return node("MatMul", [reads, "w"], "y")


def save(
    path: Path,
    nodes: Sequence[NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[TensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """Write a graph of opset 20 with a weight w [64, 32]."""
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "theirs", inputs, outputs, [weight, *initializers])
    opsets = [helper.make_opsetid("", 20), *([helper.make_opsetid("theirs", 1)] if functions else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions), path)
    return path
