"""The element type of every tensor of a graph, found by walking it once.

ONNX's own shape inference stops at an operator of another domain; here the types alone are wanted, and every
operator of this project's graphs gives away its output type by its schema, an attribute or an input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import NodeProto, TensorProto, defs, helper

from fp4trt.errors import BadGraph
from fp4trt.number_formats import FORMATS
from onnx_functions.library import SIMULATION_DOMAIN

__all__ = ["attributes_of", "element_types", "integer", "opset_of"]


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that the model asks for."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=23)


def attributes_of(node: NodeProto) -> dict[str, object]:
    """Return a node's attributes as Python values."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def integer(attributes: Mapping[str, object], name: str, default: int) -> int:
    """Return an integer attribute."""
    value = attributes.get(name, default)
    return value if isinstance(value, int) else default


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the ONNX element type of every tensor, by name.

    Raises:
        BadGraph: a node reads a tensor that nothing gives, is of an unknown operator, or holds a subgraph.
    """
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    opset = opset_of(model)
    for node in graph.node:
        for name in node.input:
            if name and name not in types:
                raise BadGraph(f"node {node.name} reads {name}, which no earlier node, input or initializer gives")
        types.update(zip(node.output, output_types(node, types, opset), strict=False))
    return types


def output_types(node: NodeProto, types: Mapping[str, int], opset: int) -> Iterable[int]:
    """Return the element types of a node's outputs, given those of its inputs."""
    attributes = attributes_of(node)
    for kind in FORMATS.values():
        if node.domain and (node.domain, node.op_type) == kind.dequantizer:
            return (integer(attributes, "output_dtype", TensorProto.FLOAT),)
        if node.domain and (node.domain, node.op_type) == kind.quantizer:
            return TensorProto.DataType.Value(kind.onnx_codes), TensorProto.DataType.Value(kind.onnx_scales)
    if node.domain == SIMULATION_DOMAIN:
        return (integer(attributes, "output_dtype", TensorProto.FLOAT),)
    if node.op_type == "Constant":
        return (_constant_type(attributes),)
    if node.op_type == "ConstantOfShape":
        value = attributes.get("value")
        return (value.data_type if isinstance(value, TensorProto) else TensorProto.FLOAT,)
    if node.op_type == "QuantizeLinear":
        zero_point = types[node.input[2]] if len(node.input) > 2 and node.input[2] else int(TensorProto.UINT8)
        return (integer(attributes, "output_dtype", 0) or zero_point,)
    if node.op_type == "DequantizeLinear":
        return (integer(attributes, "output_dtype", 0) or types[node.input[1]],)
    return _schema_types(node, types, attributes, opset)


def _constant_type(attributes: Mapping[str, object]) -> int:
    value = attributes.get("value")
    if isinstance(value, TensorProto):
        return value.data_type
    if "value_float" in attributes or "value_floats" in attributes:
        return TensorProto.FLOAT
    return TensorProto.INT64


def _schema_types(node: NodeProto, types: Mapping[str, int], attributes: Mapping[str, object], opset: int) -> list[int]:
    if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
        raise BadGraph(f"node {node.name} ({node.op_type}) holds a subgraph; expected a flat graph: export it again")
    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        known = f"{node.domain or 'ai.onnx'}::{node.op_type}"
        raise BadGraph(f"node {node.name} is {known}, unknown at opset {opset}; export the graph again") from None
    given: dict[str, int] = {}
    for index, name in enumerate(node.input):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if name:
            given.setdefault(formal.type_str, types[name])
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    asked = integer(attributes, "to", integer(attributes, "dtype", 0))
    result: list[int] = []
    for index in range(len(node.output)):
        text = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
        only = allowed.get(text, [text])  # Shape's T1 may be int64 and nothing else
        if len(only) == 1:
            result.append(_TYPE_OF_TEXT[only[0]])
        else:
            result.append(given.get(text, asked or TensorProto.FLOAT))
    return result


_TYPE_OF_TEXT: Mapping[str, int] = {
    "tensor(bool)": TensorProto.BOOL,
    "tensor(int64)": TensorProto.INT64,
    "tensor(int32)": TensorProto.INT32,
    "tensor(float)": TensorProto.FLOAT,
    "tensor(uint8)": TensorProto.UINT8,
}
