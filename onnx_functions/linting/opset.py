"""What a graph at an older opset means at opset 23, and the graph cleaned of both kinds of old habits."""

from __future__ import annotations

from typing import Final

import onnx
from onnx import defs

from fp4trt.errors import BadGraph
from onnx_functions.graph.element_types import opset_of

__all__ = ["OLDEST", "OPSET", "differing_nodes", "normalise", "opset_of"]

OPSET: Final = 23
OLDEST: Final = 19

_CHANGED: Final = {"GroupNormalization", "DFT", "GridSample", "ImageDecoder"}
"""Standard operators whose meaning or attributes changed between opset 19 and 23. All others that have a new version
there, such as Cast, Reshape, ReduceMax or DequantizeLinear, took more types or optional attributes only.
Source: the ONNX operators' changelog."""


def differing_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the standard nodes of a graph at opset 19 to 22 whose meaning at opset 23 is not the same."""
    version = opset_of(model)
    return [
        node
        for node in model.graph.node
        if node.domain in ("", "ai.onnx")
        and node.op_type in _CHANGED
        and _since(node.op_type, version) != _since(node.op_type, OPSET)
    ]


def normalise(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph declared at opset 23, with no initializer among its inputs; it computes the same.

    Args:
        model: not changed; external data stays where it is.

    Raises:
        BadGraph: the declared opset is below 19, or an operator means something else at 23.
    """
    version = opset_of(model)
    if version < OLDEST or (version < OPSET and differing_nodes(model)):
        raise BadGraph(f"the graph is at opset {version}, which cannot be read as {OPSET}; export it again at {OPSET}")
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for entry in result.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, OPSET)
    held = {tensor.name for tensor in result.graph.initializer}
    inputs = [value for value in result.graph.input if value.name not in held]
    del result.graph.input[:]
    result.graph.input.extend(inputs)
    return result


def _since(operator: str, version: int) -> int:
    try:
        return int(defs.get_schema(operator, version, "").since_version)
    except defs.SchemaError:
        return 0
