"""On which of its inputs a tensor of a graph depends, by their values or by their shapes alone.

A tensor depends on an input's values where the graph leads from one to the other without passing through Shape, Size or
another operator that looks at nothing but a shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx
from onnx import GraphProto, NodeProto

from onnx_functions.graph.bodies import bodies_of

__all__ = ["Dependence", "dependences"]

_SHAPE_ONLY: Final = ("Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike")
"""Operators whose outputs are the same for all inputs of one shape, but for what is drawn at random."""

_NOTHING: Final = (0, 0)
_Masks = tuple[int, int]
"""Inputs as bits: those whose values matter, and those of which anything does."""


@dataclass(frozen=True)
class Dependence:
    """What a graph's tensors depend on.

    Attributes:
        inputs: the graph's inputs that are no initializers, in order.
        masks: tensor to its inputs as bits, by values and by anything.
    """

    inputs: tuple[str, ...]
    masks: Mapping[str, _Masks]

    def by_values(self, tensor: str) -> tuple[str, ...]:
        """Return the inputs whose values a tensor depends on."""
        return self._named(self.masks.get(tensor, _NOTHING)[0])

    def by_anything(self, tensor: str) -> tuple[str, ...]:
        """Return the inputs whose values or shapes a tensor depends on."""
        return self._named(self.masks.get(tensor, _NOTHING)[1])

    def _named(self, mask: int) -> tuple[str, ...]:
        return tuple(name for index, name in enumerate(self.inputs) if mask >> index & 1)


def dependences(model: onnx.ModelProto) -> Dependence:
    """Follow every input through a graph whose nodes come in order, its bodies and local functions too."""
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = tuple(dict.fromkeys(value.name for value in graph.input if value.name not in stored))
    masks: dict[str, _Masks] = {name: (1 << index, 1 << index) for index, name in enumerate(inputs)}
    _Walk(model).nodes(graph.node, masks)
    return Dependence(inputs, masks)


class _Walk:
    """One model's functions, and what calls of them gave for the dependences that they were called with."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.functions = {(found.domain, found.name): found for found in model.functions}
        self.called: dict[tuple[str, str, tuple[_Masks, ...]], list[_Masks]] = {}
        self.running: set[tuple[str, str]] = set()

    def nodes(self, nodes: Iterable[NodeProto], masks: dict[str, _Masks]) -> None:
        """Add what the nodes' outputs depend on to `masks`."""
        for node in nodes:
            given = [masks.get(name, _NOTHING) for name in node.input]
            masks.update(zip(node.output, self._outputs(node, given, masks), strict=False))
        masks.pop("", None)

    def _outputs(self, node: NodeProto, given: Sequence[_Masks], masks: Mapping[str, _Masks]) -> list[_Masks]:
        count = len(node.output)
        bodies = list(bodies_of(node))
        if (node.domain, node.op_type) in self.functions:
            return self._call(node, given)
        if node.domain in ("", "ai.onnx") and node.op_type in _SHAPE_ONLY:
            return [(0, _joined(given)[1])] * count
        if not bodies:
            return [_joined(given)] * count
        ends = [self._body(body, _joined(given), masks) for body in bodies]
        if node.op_type == "If":
            return [_joined([*given, *(end[index] for end in ends if index < len(end))]) for index in range(count)]
        return [_joined([*given, *(found for end in ends for found in end)])] * count

    def _body(self, body: GraphProto, enters: _Masks, outside: Mapping[str, _Masks]) -> list[_Masks]:
        """Return what the outputs of a body depend on, each of whose inputs may be any that its node reads."""
        masks = dict(outside)
        masks.update((tensor.name, _NOTHING) for tensor in body.initializer)
        masks.update((value.name, enters) for value in body.input)
        self.nodes(body.node, masks)
        return [masks.get(value.name, _NOTHING) for value in body.output]

    def _call(self, node: NodeProto, given: Sequence[_Masks]) -> list[_Masks]:
        key = (node.domain, node.op_type)
        if key in self.running:  # a function that calls itself, which no reader takes
            return [_joined(given)] * len(node.output)
        found = self.called.get((*key, tuple(given)))
        if found is None:
            function = self.functions[key]
            masks = dict(zip(function.input, given, strict=False))
            self.running.add(key)
            self.nodes(function.node, masks)
            self.running.discard(key)
            found = [masks.get(name, _NOTHING) for name in function.output]
            self.called[(*key, tuple(given))] = found
        return found


def _joined(masks: Iterable[_Masks]) -> _Masks:
    values = anything = 0
    for by_value, by_anything in masks:
        values |= by_value
        anything |= by_anything
    return values, anything
