"""The tensors' shapes, as far as a graph gives them: stored, those of what a tensor was made from, or declared.

What a graph declares of its inner tensors may be of another hand than its data, so that comes last.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import onnx
from onnx import NodeProto, ValueInfoProto, helper

from onnx_functions.graph.element_types import attributes_of
from onnx_functions.graph.index import CASTS, Index
from onnx_functions.library import ACTIVATION_PLACEHOLDER, FP8_QUANTIZER, QUANTIZER, WEIGHT_PLACEHOLDER

__all__ = ["Shape", "Shapes"]

Shape = tuple[int | None, ...]
"""Sizes; None where one is not fixed."""

_SAME_SHAPE: Final = (*CASTS, "DequantizeLinear", FP8_QUANTIZER, QUANTIZER, WEIGHT_PLACEHOLDER, ACTIVATION_PLACEHOLDER)
"""Operators whose first output has the shape of what they read; what a quantizer gives counts as what it reads."""

_LARGEST_TO_INFER: Final = 64 << 20
"""Bytes of a graph, its own data counted, whose shapes are inferred where they are needed and not declared."""


class Shapes:
    """Shapes by tensor; what a graph does not declare is inferred once, when it is asked for."""

    def __init__(self, graph: Index) -> None:
        self._model = graph.model
        self._graph = graph
        self._found: dict[str, Shape | None] = {name: tuple(tensor.dims) for name, tensor in graph.constants.items()}

    @cached_property
    def declared(self) -> dict[str, Shape]:
        """What the graph says of its inputs, outputs and inner tensors."""
        return _shapes_in(self._model)

    def of(self, tensor: str) -> Shape | None:
        """Return a tensor's shape, followed up through what does not change it; None where it is not known."""
        above: list[tuple[str, NodeProto]] = []
        while tensor not in self._found:
            node = self._graph.producer.get(tensor)
            if node is None or not _keeps_shape(node, tensor):
                declared = self.declared.get(tensor)
                self._found[tensor] = self._inferred.get(tensor) if declared is None else declared
            else:
                above.append((tensor, node))
                tensor = node.input[0]
        shape = self._found[tensor]
        for below, node in reversed(above):
            moved = _moved(shape, node)
            shape = self._found[below] = self.declared.get(below) if moved is None else moved
        return shape

    @cached_property
    def _inferred(self) -> dict[str, Shape]:
        if self._model.ByteSize() > _LARGEST_TO_INFER:
            return {}
        try:
            copy = _without_quantizers(self._model)
            return _shapes_in(onnx.shape_inference.infer_shapes(copy, data_prop=True))
        except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
            return {}


def _without_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which Casts stand for activation quantizers, where ONNX's shape inference would stop."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if node.op_type == QUANTIZER:
            kind = int(onnx.TensorProto.FLOAT4E2M1)
            node.CopyFrom(helper.make_node("Cast", node.input[:1], node.output[:1], node.name, to=kind))
    return result


def _keeps_shape(node: NodeProto, tensor: str) -> bool:
    """Whether a tensor has the shape of its node's first input, or that in another order of axes."""
    first = bool(node.input) and node.output[0] == tensor
    return first and node.op_type in (*_SAME_SHAPE, "Transpose")


def _moved(shape: Shape | None, node: NodeProto) -> Shape | None:
    """Return the shape behind a node that keeps it, its axes in the order of a Transpose; None where that is unfit."""
    if shape is None or node.op_type != "Transpose":
        return shape
    axes = list(range(len(shape)))
    order = attributes_of(node).get("perm", axes[::-1])
    return tuple(shape[axis] for axis in order) if isinstance(order, list) and sorted(order) == axes else None


def _shapes_in(model: onnx.ModelProto) -> dict[str, Shape]:
    return {
        value.name: _sizes(value)
        for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _sizes(value: ValueInfoProto) -> Shape:
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.dim_value > 0 else None for dim in dims)
