"""Give the activation quantizers of a third-party graph the form that TensorRT reads, and its products one type."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporter.naming import FreeNames
from exporter.passes.double_dequantize import BLOCK_SIZE
from exporter.passes.lift_weights import constant_to_initializer
from exporter.trt_ops import DOMAIN, QUANTIZER
from onnx_functions.graph.index import MOVES

__all__ = ["settle_activations"]

_MOVES: Final = ({*MOVES} - {"Cast"}) | {"Slice", "Expand"}
"""Operators that give the type they read: a Cast does not, and a part or a repetition of a tensor has its type too."""


def settle_activations(model: ir.Model) -> None:
    """Rewrite in place; a graph without activation quantizers stays as it is.

    1. The global scale of a quantizer, and that of the DequantizeLinear on its block scales, become initializers where
       they are constants: TensorRT takes nothing else.
    2. The quantizer's outputs get their types and shapes; exporters that do not know the operator leave them open.
    3. A product of a 16-bit weight with an activation that was dequantized to FP32 gets a Cast to the weight's type in
       between, as ModelOpt has it: TensorRT wants one type, and its FP4 GEMM comes with 16-bit products.
    """
    graph = model.graph
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == QUANTIZER:
            _settle_quantizer(graph, node)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    names = FreeNames(graph)
    for node in list(graph):
        if node.domain == "" and node.op_type in ("MatMul", "Gemm"):
            _match_types(graph, node, casts, names)


def _settle_quantizer(graph: ir.Graph, node: ir.Node) -> None:
    x, scale = node.inputs[0], node.inputs[1]
    _lift_scalar(graph, scale)
    codes, scales = node.outputs[0], node.outputs[1]
    for user, index in list(scales.uses()):
        if user.op_type == "DequantizeLinear" and index == 0:
            _lift_scalar(graph, user.inputs[1])
    codes.type, scales.type = ir.TensorType(ir.DataType.FLOAT4E2M1), ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    if x is not None and x.shape is not None and len(x.shape) and isinstance(x.shape[-1], int):
        codes.shape = ir.Shape(list(x.shape))
        scales.shape = ir.Shape([*list(x.shape)[:-1], x.shape[-1] // BLOCK_SIZE])


def _lift_scalar(graph: ir.Graph, value: ir.Value | None) -> None:
    """Make a Constant's output an initializer of the same name."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return
    constant_to_initializer(graph, node, node.attributes["value"].as_tensor())


def _match_types(
    graph: ir.Graph, node: ir.Node, casts: dict[tuple[ir.Value, ir.DataType], ir.Value], names: FreeNames
) -> None:
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or not _is_dequantized(activation):
        return
    found, wanted = _dtype(activation), _dtype(weight)
    if found is None or wanted is None or found == wanted:
        return
    key = (activation, wanted)
    if key not in casts:
        cast = ir.node("Cast", [activation], {"to": int(wanted)}, name=f"{activation.name}/Cast")
        out = cast.outputs[0]
        out.name, out.type, out.shape = names.take(f"{activation.name}_cast"), ir.TensorType(wanted), activation.shape
        graph.insert_before(node, cast)
        casts[key] = out
    node.replace_input_with(0, casts[key])


def _is_dequantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    """Return a value's type as far as moves, casts and dequantization tell, else what the graph says of it."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node is not None and node.op_type == "DequantizeLinear":
        given = node.attributes.get("output_dtype")
        return ir.DataType(given.as_int()) if given is not None and given.as_int() else _dtype(node.inputs[1])
    if node is not None and node.op_type in _MOVES:
        return _dtype(node.inputs[0])
    known = value.dtype if value is not None else None
    return known if known not in (None, ir.DataType.UNDEFINED) else None
