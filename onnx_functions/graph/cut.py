"""Cutting a piece out of a graph: from tensors that become its inputs to tensors that become its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from fp4trt.errors import BadGraph
from onnx_functions.graph.element_types import element_types
from onnx_functions.graph.index import Index

__all__ = ["cut"]


def cut(model: onnx.ModelProto, inputs: Mapping[str, str], outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a model of the nodes between `inputs` and `outputs`, with the initializers that they read.

    Args:
        model: not changed.
        inputs: tensor to the name of the graph input that replaces it. What computes the tensor is left out.
        outputs: tensors that become graph outputs, in this order.

    Raises:
        BadGraph: an output depends on a graph input that is not among `inputs`, or exists nowhere.
    """
    types, index = element_types(model), Index(model)
    asked = [name for name in outputs if name not in inputs]
    above = index.above(*asked, until=inputs)
    read = dict.fromkeys(name for name in (*asked, *(name for node in above for name in node.input)) if name)
    known = {*index.producer, *index.initializers, *inputs}
    for name in (name for name in read if name not in known):
        raise BadGraph(f"{outputs[0]} depends on {name}, which the piece {list(inputs)} -> {list(outputs)} lacks")
    nodes = []
    for original in above:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:] = [inputs.get(name, name) for name in node.input]
        nodes.append(node)
    stored = [index.initializers[name] for name in sorted(read) if name in index.initializers and name not in inputs]
    return _assemble(model, nodes, stored, inputs, outputs, types)


def _assemble(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    inputs: Mapping[str, str],
    outputs: Sequence[str],
    types: Mapping[str, int],
) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(onnx.ModelProto(ir_version=model.ir_version))
    result.opset_import.extend(model.opset_import)
    result.functions.extend(model.functions)
    result.metadata_props.extend(model.metadata_props)
    graph = result.graph
    graph.name = model.graph.name
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    made = {name for node in nodes for name in node.output} | {tensor.name for tensor in initializers}
    by_name = {value.name: value for value in model.graph.input}
    for old, new in inputs.items():
        if old in by_name and old == new:
            graph.input.add().CopyFrom(by_name[old])
        else:
            graph.input.append(helper.make_tensor_value_info(new, types[old], None))
    for name in outputs:
        if name not in made:
            raise BadGraph(f"{name} is asked for as an output, but no node of the piece makes it")
        graph.output.append(helper.make_tensor_value_info(name, types[name], None))
    return result
