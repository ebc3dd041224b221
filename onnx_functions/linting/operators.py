"""Rules for single operators: their form by the standard's schemas, and shapes that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Final

from onnx import AttributeProto, NodeProto, defs

from onnx_functions.graph.bodies import nodes_with_inner
from onnx_functions.graph.element_types import attributes_of, integer, opset_of
from onnx_functions.graph.index import PRODUCTS, SOURCE, name_of
from onnx_functions.linting.opset import OPSET
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES", "form_faults", "operator_form"]


@rule("operator-form", "wrong", "export again; nothing else of the graph was judged")
def operator_form(subject: Subject) -> Iterator[Hit]:
    """A node that lacks an input, output or attribute that its operator needs, or has one of another type, or twice.

    By the standard's schema of the declared opset; an operator that this has not is looked up in opset 23. What
    TensorRT adds needs what the rules follow. Source: the ONNX specification.
    """
    version = opset_of(subject.model)
    for node in nodes_with_inner(subject.model.graph.node):
        yield from (Hit(fault, name_of(node)) for fault in form_faults(node, version))


@rule("transpose-axes", "wrong", "name each axis of the input once")
def transpose_axes(subject: Subject) -> Iterator[Hit]:
    """The permutation of a Transpose names each axis of its input once.

    Source: the ONNX specification.
    """
    for node in subject.model.graph.node:
        permutation = attributes_of(node).get("perm") if node.op_type == "Transpose" else None
        if not isinstance(permutation, list):
            continue
        shape = subject.shapes.of(node.input[0])
        rank = len(permutation) if shape is None else len(shape)
        if sorted(permutation) != list(range(rank)):
            found = f"perm is {list(permutation)}; expected each of the {rank} axes of {node.input[0]} once"
            yield Hit(found, name_of(node), node.input[0])


@rule("product-shapes", "wrong", "let each product read the activation and the weight of one linear")
def product_shapes(subject: Subject) -> Iterator[Hit]:
    """The activation and the weight of a product have one length K along which they are multiplied.

    Source: the ONNX specification.
    """
    for node in subject.model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        left, right = (subject.shapes.of(tensor) for tensor in node.input[:2])
        if not left or not right:
            continue
        turned = [integer(attributes_of(node), f"trans{side}", 0) and node.op_type == "Gemm" for side in "AB"]
        one = left[-2 if turned[0] and len(left) > 1 else -1]
        other = right[-1 if turned[1] or len(right) == 1 else -2]
        if one is not None and other is not None and one != other:
            found = f"multiplies {one} columns of {node.input[0]} by {other} rows of {node.input[1]}"
            yield Hit(found, name_of(node), node.input[1])


def form_faults(node: NodeProto, version: int) -> Iterator[str]:
    """Yield what a node lacks, or has too often or of another type, at an opset."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.UNDEFINED and not attribute.ref_attr_name:
            yield f"the attribute {attribute.name} has no type"
    if len(node.attribute) > 1:
        for name, count in Counter(attribute.name for attribute in node.attribute).items():
            if count > 1:
                yield f"the attribute {name} stands {count} times"
    form = _form(node.op_type, version) if node.domain in ("", "ai.onnx") else None
    if form is not None:
        yield from _faults(node, form)
    elif (count := _least_inputs(node.op_type, version)) and (len(node.input) < count or not node.output):
        yield f"has {len(node.input)} inputs and {len(node.output)} outputs; a {node.op_type} needs {count} and 1"


RULES = (operator_form, transpose_axes, product_shapes)

_LEAST_INPUTS: Final = {"TRT_FP4DynamicQuantize": 2, "TRT_MXFP8DequantizeLinear": 2}
"""TensorRT's operators that the rules follow, which no schema describes."""
_FOLLOWED: Final = (*SOURCE, *PRODUCTS)
"""What the rules follow by its name in whatever domain it is."""


class _Form:
    """What a schema asks of its nodes; read off it once, since that costs more than the comparison."""

    def __init__(self, schema: defs.OpSchema) -> None:
        single = defs.OpSchema.FormalParameterOption.Single
        self.inputs = [(i, entry.name) for i, entry in enumerate(schema.inputs) if entry.option == single]
        self.least = int(schema.min_input)
        self.outputs = int(schema.min_output)
        self.types = {name: _NAMES[entry.type] for name, entry in schema.attributes.items()}
        self.required = [name for name, entry in schema.attributes.items() if entry.required]


@cache
def _form(operator: str, version: int) -> _Form | None:
    for opset in dict.fromkeys((version, max(version, OPSET))):
        try:
            return _Form(defs.get_schema(operator, opset, ""))
        except defs.SchemaError:
            continue
    return None


def _least_inputs(operator: str, version: int) -> int:
    form = _form(operator, version) if operator in _FOLLOWED else None
    return form.least if form is not None else _LEAST_INPUTS.get(operator, 0)


def _faults(node: NodeProto, form: _Form) -> Iterator[str]:
    for index, name in form.inputs:
        if index >= len(node.input) or not node.input[index]:
            yield f"the {node.op_type} lacks its input {name}"
    if len(node.input) < form.least:
        yield f"the {node.op_type} has {len(node.input)} inputs; expected {form.least} at least"
    if len(node.output) < form.outputs:
        yield f"the {node.op_type} has {len(node.output)} outputs; expected {form.outputs} at least"
    found = {attribute.name: attribute for attribute in node.attribute}
    for name in form.required:
        if name not in found:
            yield f"the {node.op_type} lacks its attribute {name}"
    for name, attribute in found.items():
        wanted = form.types.get(name)
        kind = AttributeProto.AttributeType.Name(attribute.type)
        if wanted not in (None, kind) and attribute.type and not attribute.ref_attr_name:
            yield f"the attribute {name} of the {node.op_type} is of the type {kind}; expected {wanted}"


_NAMES: Final = {
    getattr(defs.OpSchema.AttrType, name): name for name, number in AttributeProto.AttributeType.items() if number
}
"""The types of attributes that schemas know, by the names that nodes give them."""
