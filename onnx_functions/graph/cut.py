"""Cutting a piece out of a graph: from tensors that become its inputs to tensors that become its outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from fp4trt.errors import BadGraph
from onnx_functions.graph.element_types import element_types

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
    types = element_types(model)
    producer = {name: index for index, node in enumerate(model.graph.node) for name in node.output if name}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    wanted, kept_nodes, kept_tensors = list(outputs), set[int](), set[str]()
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if not name or name in seen or name in inputs:
            continue
        seen.add(name)
        if name in producer:
            index = producer[name]
            kept_nodes.add(index)
            wanted.extend(model.graph.node[index].input)
        elif name in initializers:
            kept_tensors.add(name)
        else:
            raise BadGraph(f"{outputs[0]} depends on {name}, which the piece {list(inputs)} -> {list(outputs)} lacks")
    nodes = []
    for index in sorted(kept_nodes):
        node = onnx.NodeProto()
        node.CopyFrom(model.graph.node[index])
        node.input[:] = [inputs.get(name, name) for name in node.input]
        nodes.append(node)
    return _assemble(model, nodes, [initializers[name] for name in sorted(kept_tensors)], inputs, outputs, types)


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
