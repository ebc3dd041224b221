"""Raise the declared opset of a graph to ours where every operator in it means the same there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx import defs

from fp4trt.errors import BadGraph

__all__ = ["raise_opset"]

_OLDEST: Final = 17

_OTHER_MEANING: Final = frozenset({"GroupNormalization"})
"""Operators that mean something else although their schema has only grown: opset 21 scales channels, not groups."""


def raise_opset(model: ir.Model, target: int) -> None:
    """Rewrite in place, and declare the target opset.

    1. An operator whose schema has stayed, or only grown (types, optional inputs, attributes with a default), stays.
    2. ``axes`` of Reduce*, an attribute before opset 18, becomes an input.
    3. ``Split`` without sizes says its number of outputs, as from opset 18 on.
    4. Any other operator that changed is refused.

    Schemas are compared instead of running onnx's version converter, which adds nodes without names.

    Args:
        model: without functions of its own.
        target: the opset to declare.

    Raises:
        BadGraph: naming the operator, or the opset where it is older than 17 or newer than the target.
    """
    declared = model.graph.opset_imports.get("")
    if declared is None or not _OLDEST <= declared <= target:
        raise BadGraph(f"the graph declares opset {declared}; expected {_OLDEST} to {target}: export it again")
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx") and declared < target:
            _raise_node(node, declared, target)
    for graph in (model.graph, *model.graph.subgraphs()):
        if "" in graph.opset_imports:
            graph.opset_imports[""] = target


def _raise_node(node: ir.Node, declared: int, target: int) -> None:
    try:
        old, new = (defs.get_schema(node.op_type, version, "") for version in (declared, target))
    except defs.SchemaError:
        raise BadGraph(f"{node.name or node.op_type}: opset {declared} has no operator {node.op_type}") from None
    if node.op_type.startswith("Reduce") and "axes" in old.attributes:
        _axes_as_input(node)
    elif node.op_type == "Split" and declared < 18:
        _count_outputs(node)
    elif not _means_the_same(old, new):
        versions = (defs.get_schema(node.op_type, version, "") for version in range(declared, target))
        enough = next((schema for schema in versions if _means_the_same(schema, new)), new)
        raise BadGraph(
            f"{node.name or node.outputs[0].name} is a {node.op_type}, which changed between opset {declared} and "
            f"{target}; export the graph at opset {enough.since_version} or newer"
        )


def _means_the_same(old: Any, new: Any) -> bool:
    return old.since_version == new.since_version or (old.name not in _OTHER_MEANING and _only_grown(old, new))


def _only_grown(old: Any, new: Any) -> bool:
    """Whether every node that the old schema allows is allowed by the new one, with the same defaults."""
    inputs, more = list(old.inputs), list(new.inputs)
    if [value.name for value in inputs] != [value.name for value in more[: len(inputs)]]:
        return False
    optional = defs.OpSchema.FormalParameterOption.Optional
    if any(value.option != optional for value in more[len(inputs) :]) or len(old.outputs) > len(new.outputs):
        return False
    for name, attribute in old.attributes.items():
        if name not in new.attributes or _default(attribute) != _default(new.attributes[name]):
            return False
    return all(name in old.attributes or not attribute.required for name, attribute in new.attributes.items())


def _default(attribute: Any) -> bytes:
    return attribute.default_value.SerializeToString()


def _axes_as_input(node: ir.Node) -> None:
    axes = node.attributes.pop("axes", None)
    if axes is not None:
        _add_input(node, 1, axes.as_ints(), "axes")


def _count_outputs(node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _add_input(node: ir.Node, index: int, numbers: Iterable[int], what: str) -> None:
    """Give a node one more input, by a Constant before it."""
    assert node.graph is not None
    name = f"{node.outputs[0].name}_{what}"
    constant = ir.node("Constant", [], {"value": ir.tensor(np.array(list(numbers), np.int64))}, name=f"{name}/Constant")
    constant.outputs[0].name = name
    node.graph.insert_before(node, constant)
    node.resize_inputs(index + 1)
    node.replace_input_with(index, constant.outputs[0])
