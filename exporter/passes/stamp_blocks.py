"""Repeat a block that was traced a few times as often as the model has it: export time then hardly knows its depth."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from exporter.passes.name_nodes import SCOPES

__all__ = ["TRACED_BLOCKS", "stamp_blocks"]

TRACED_BLOCKS: Final = 4
"""The first, two middle ones that have to be equal, and the last: ends differ by what is shared or unused."""


def stamp_blocks(model: ir.Model, stacks: Mapping[str, int]) -> None:
    """Rewrite in place a graph that was traced with at most :data:`TRACED_BLOCKS` blocks of every stack.

    The third block of a stack is written out again, as nodes with names of their own, until the stack has its number;
    the fourth becomes the last. Before that the second and third are compared node by node, which shows what a block
    takes from the one before it and what all of them share. The result is the graph that tracing every block gives.

    Args:
        model: constants folded, equal nodes merged, nodes still with the tracer's scopes.
        stacks: path of a module list, such as ``transformer_blocks``, to how many blocks it has.

    Raises:
        AssertionError: the middle blocks are not the same, so that the family must not declare them as a stack.
    """
    for path, count in stacks.items():
        if count > TRACED_BLOCKS:
            _Stack(model.graph, path, count).stamp()


@dataclass
class _Stack:
    """One module list.

    Attributes:
        following: a value of the second block to the value of the third that plays its part.
        carried: the values of the second block that the third reads.
    """

    graph: ir.Graph
    path: str
    count: int
    following: dict[ir.Value, ir.Value] = field(default_factory=dict)
    carried: dict[ir.Value, None] = field(default_factory=dict)

    def stamp(self) -> None:
        _, second, third, last = self._blocks()
        self._compare(second, third)
        self._require_read_within(second, (second, third))
        self._require_read_within(third, (third, last))
        self._become_last(last)  # before a copy needs the names that its weights have
        current = {value: self.following[value] for value in self.carried}
        for index in range(TRACED_BLOCKS - 1, self.count - 1):
            current = self._copy(third, index, current, before=last[0])
        newest = {self.following[value]: copied for value, copied in current.items()}
        for node in last:
            for position, value in enumerate(node.inputs):
                if value in newest:
                    node.replace_input_with(position, newest[value])

    def _blocks(self) -> list[list[ir.Node]]:
        """Return each traced block's nodes: from the first to the last that was traced in it.

        A pass that makes one node of several does not say where it comes from; such a node lies between.
        """
        nodes = list(self.graph)
        spans: dict[int, tuple[int, int]] = {}
        for position, node in enumerate(nodes):
            for index in {self._index(scope) for scope in _scopes(node)} - {None}:
                assert index is not None
                spans[index] = (spans.get(index, (position, 0))[0], position + 1)
        assert sorted(spans) == list(range(TRACED_BLOCKS)), f"{self.path}: found blocks {sorted(spans)}"
        ordered = [spans[index] for index in range(TRACED_BLOCKS)]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered)), f"{self.path}: blocks overlap"
        return [nodes[start:end] for start, end in ordered]

    def _index(self, scope: str) -> int | None:
        head, _, rest = scope.removeprefix(f"{self.path}.").partition(".")
        return int(head) if scope.startswith(f"{self.path}.") and head.isdigit() and not rest else None

    def _compare(self, second: Sequence[ir.Node], third: Sequence[ir.Node]) -> None:
        assert len(second) == len(third), f"{self.path}: blocks of {len(second)} and {len(third)} nodes"
        own = {value for node in second for value in node.outputs}
        for one, two in zip(second, third, strict=True):
            where = f"{self.path}: {one.name} and {two.name} differ"
            assert (one.domain, one.op_type, len(one.inputs)) == (two.domain, two.op_type, len(two.inputs)), where
            assert self._moved_attributes(one, 1, 2) == self._moved_attributes(two, 2, 2), where
            for a, b in zip(one.inputs, two.inputs, strict=True):
                if a is not None and a in own:
                    assert b is self.following[a], where
                elif a is not b:
                    assert a is not None, where
                    assert b is not None, where
                    if b in own:
                        self.carried[b] = None
                    else:
                        assert b.is_initializer(), where
                        assert self._moved(str(a.name), 1, 2) == b.name, where
            self.following.update(zip(one.outputs, two.outputs, strict=True))

    def _require_read_within(self, block: Sequence[ir.Node], readers: Sequence[Sequence[ir.Node]]) -> None:
        allowed = {node for nodes in readers for node in nodes}
        for value in (value for node in block for value in node.outputs):
            outside = [node.name for node, _ in value.uses() if node not in allowed]
            assert not outside, f"{self.path}: {outside[0]} reads {value.name}, of a block that is not the one before"

    def _copy(
        self, block: Sequence[ir.Node], index: int, carried: Mapping[ir.Value, ir.Value], before: ir.Node
    ) -> dict[ir.Value, ir.Value]:
        """Insert the third block as block ``index``; return what the next one takes from it."""
        here: dict[ir.Value, ir.Value] = dict(carried)
        for node in block:
            inputs = [None if value is None else here.get(value) or self._weight(value, index) for value in node.inputs]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                self._moved_attributes(node, 2, index).values(),
                num_outputs=len(node.outputs),
                name=f"{node.name}@{index}",
                metadata_props=dict(node.metadata_props),
            )
            self._move_scopes(copy, 2, index)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = f"{old.name}@{index}", old.type, old.shape
                here[old] = new
            self.graph.insert_before(before, copy)
        return {value: here[self.following[value]] for value in self.carried}

    def _weight(self, value: ir.Value, index: int) -> ir.Value:
        """Return block ``index``'s weight in place of the third block's, or the value itself where it is shared."""
        name = self._moved(str(value.name), 2, index)
        if name == value.name:
            return value
        if name not in self.graph.initializers:
            self.graph.initializers[name] = ir.Value(name=name, type=value.type, shape=value.shape)
        return self.graph.initializers[name]

    def _become_last(self, block: Sequence[ir.Node]) -> None:
        """Give the traced last block the place of the model's last: its weights, attributes and scopes."""
        traced, last = TRACED_BLOCKS - 1, self.count - 1
        for value in [value for node in block for value in node.inputs if value is not None and value.is_initializer()]:
            name = self._moved(str(value.name), traced, last)
            if name != value.name:
                self.graph.initializers.pop(str(value.name))
                value.name = name
                self.graph.initializers[name] = value
        for node in block:
            node.attributes.update(self._moved_attributes(node, traced, last))
            self._move_scopes(node, traced, last)

    def _moved(self, name: str, old: int, new: int) -> str:
        """Return a module path, or a name below one, of block ``new`` in place of ``old``."""
        root = f"{self.path}.{old}"
        return f"{self.path}.{new}{name[len(root) :]}" if f"{name}.".startswith(f"{root}.") else name

    def _moved_attributes(self, node: ir.Node, old: int, new: int) -> dict[str, ir.Attr]:
        """Return the attributes with module paths of block ``new``: a placeholder names the linear that it is for."""
        moved = {}
        for name, attribute in node.attributes.items():
            is_text = attribute.type == ir.AttributeType.STRING
            moved[name] = ir.AttrString(name, self._moved(attribute.as_string(), old, new)) if is_text else attribute
        return moved

    def _move_scopes(self, node: ir.Node, old: int, new: int) -> None:
        if SCOPES in node.metadata_props:
            node.metadata_props[SCOPES] = repr([self._moved(scope, old, new) for scope in _scopes(node)])


def _scopes(node: ir.Node) -> list[str]:
    return list(ast.literal_eval(node.metadata_props.get(SCOPES, "[]")))
