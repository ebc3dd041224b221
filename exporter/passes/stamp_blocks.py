"""Replicate the traced block to the model's depth, so that export time barely depends on depth."""

from __future__ import annotations

import ast
import collections
import itertools
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from exporter.passes.name_nodes import SCOPES

__all__ = ["TRACED_BLOCKS", "stamp_blocks"]

TRACED_BLOCKS: Final = 2
"""The first, which is repeated, and the last: ends differ by what is shared or unused."""


def stamp_blocks(model: ir.Model, stacks: Mapping[str, int], tails: Collection[str] = ()) -> None:
    """Rewrite in place a graph that was traced with at most :data:`TRACED_BLOCKS` blocks of every stack.

    Between the two blocks of a stack the first is written out again, as nodes with names of their own, until the stack
    has its number. Before that the two are compared node by node, which shows what a block takes from the one before
    it, what the first computes for all of them, and what the last has no use for. The result is the graph that tracing
    every block gives.

    Args:
        model: constants folded, equal nodes merged, nodes still with the tracer's scopes.
        stacks: path of a module list, such as ``transformer_blocks``, to how many blocks it has. A block reads nothing
            of its list but what the one before it gives.
        tails: paths of those whose last block is of another kind; it was traced besides, and stays as it is.

    Raises:
        AssertionError: the blocks are not the same, so that the family must not declare them as a stack.
    """
    for path, count in stacks.items():
        if count > TRACED_BLOCKS + (path in tails):
            _Stack(model.graph, path, count, int(path in tails)).stamp()


@dataclass
class _Stack:
    """One module list.

    Attributes:
        tail: how many blocks of another kind end it.
        following: a value that the first block reads or makes to the one that plays its part in the last.
        repeated: the nodes of the first block that every block has, except that the last may lack what nothing reads.
    """

    graph: ir.Graph
    path: str
    count: int
    tail: int = 0
    following: dict[ir.Value, ir.Value] = field(default_factory=dict)
    repeated: list[ir.Node] = field(default_factory=list)

    def stamp(self) -> None:
        first, last, *tail = self._blocks()
        self._compare(first, last)
        carried = self._carried(first, last)
        equal = self.count - self.tail
        for block in tail:
            self._become(block, TRACED_BLOCKS, equal)
        self._become(last, TRACED_BLOCKS - 1, equal - 1)
        newest: dict[ir.Value, ir.Value] = {}
        for index in range(1, equal - 1):
            taken = {value: newest.get(given, given) for value, given in carried.items()}
            newest = self._copy(index, taken, before=last[0])
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
        traced = range(TRACED_BLOCKS + self.tail)
        assert sorted(spans) == list(traced), f"{self.path}: found blocks {sorted(spans)}"
        ordered = [spans[index] for index in traced]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ordered)), f"{self.path}: blocks overlap"
        return [nodes[start:end] for start, end in ordered]

    def _index(self, scope: str) -> int | None:
        head, _, rest = scope.removeprefix(f"{self.path}.").partition(".")
        return int(head) if scope.startswith(f"{self.path}.") and head.isdigit() and not rest else None

    def _compare(self, first: Sequence[ir.Node], last: Sequence[ir.Node]) -> None:
        """Pair the blocks' nodes in order; what is left of the first is shared by all, or of no use to the last."""
        made = {value for node in first for value in node.outputs}
        waiting = collections.deque(last)
        for node in first:
            pairs = self._pairs(node, waiting[0], made) if waiting else None
            if pairs is not None:
                self.following.update(pairs)
                self.following.update(zip(node.outputs, waiting.popleft().outputs, strict=True))
                self.repeated.append(node)
            elif self._is_shared(node, made):
                kept = [value for value in (*node.inputs, *node.outputs) if value is not None]
                self.following.update((value, value) for value in kept if not value.is_initializer())
            else:
                self.repeated.append(node)
        assert not waiting, f"{self.path}: nothing in the first block is like {waiting[0].name} of the last"

    def _pairs(self, one: ir.Node, two: ir.Node, made: Container[ir.Value]) -> dict[ir.Value, ir.Value] | None:
        """Return what the inputs of a node of the first block are in the last, or None where the nodes differ."""
        kinds = [(n.domain, n.op_type, len(n.inputs), len(n.outputs)) for n in (one, two)]
        if kinds[0] != kinds[1] or self._moved_attributes(one, 0, 1) != dict(two.attributes):
            return None
        pairs: dict[ir.Value, ir.Value] = {}
        for a, b in zip(one.inputs, two.inputs, strict=True):
            if a is None or b is None or a.is_initializer():
                if (a and self._moved(str(a.name), 0, 1)) != (b and b.name):
                    return None
                continue
            known = pairs.get(a) or self.following.get(a)
            if b is not known and (known or a in made or not (b is a or b in made)):
                return None
            pairs[a] = b
        return pairs

    def _is_shared(self, node: ir.Node, made: Container[ir.Value]) -> bool:
        """Whether a node of the first block computes the same in every block: it reads no weight of its own block."""
        for value in node.inputs:
            if value is not None and value.is_initializer():
                if self._moved(str(value.name), 0, 1) != value.name:
                    return False
            elif value is not None and self.following.get(value, None if value in made else value) is not value:
                return False
        return True

    def _carried(self, first: Sequence[ir.Node], last: Sequence[ir.Node]) -> dict[ir.Value, ir.Value]:
        """Return what the first block takes from before it, as what it gives to the block after it."""
        given = {value for node in self.repeated for value in node.outputs}
        inner = {*first, *last}
        for value in given:
            outside = [node.name for node, _ in value.uses() if node not in inner]
            assert not outside, f"{self.path}: {outside[0]} reads {value.name}, of a block that is not the one before"
        changed = {a: b for a, b in self.following.items() if a not in given and a is not b}
        for a, b in changed.items():
            assert b in given, f"{self.path}: {b.name}, in the place of {a.name}, is not a block's own"
        return changed

    def _copy(self, index: int, taken: Mapping[ir.Value, ir.Value], before: ir.Node) -> dict[ir.Value, ir.Value]:
        """Insert the first block again as block ``index``; return its values by those of the first."""
        here: dict[ir.Value, ir.Value] = dict(taken)
        made: dict[ir.Value, ir.Value] = {}
        for node in self.repeated:
            inputs = [None if value is None else here.get(value) or self._weight(value, index) for value in node.inputs]
            copy = ir.Node(
                node.domain,
                node.op_type,
                inputs,
                self._moved_attributes(node, 0, index).values(),
                num_outputs=len(node.outputs),
                name=f"{node.name}@{index}",
                metadata_props=dict(node.metadata_props),
            )
            self._move_scopes(copy, 0, index)
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name, new.type, new.shape = f"{old.name}@{index}", old.type, old.shape
                here[old] = made[old] = new
            self.graph.insert_before(before, copy)
        return made

    def _weight(self, value: ir.Value, index: int) -> ir.Value:
        """Return block ``index``'s weight in place of the first block's, or the value itself where it is shared."""
        name = self._moved(str(value.name), 0, index)
        if name == value.name:
            return value
        if name not in self.graph.initializers:
            self.graph.initializers[name] = ir.Value(name=name, type=value.type, shape=value.shape)
        return self.graph.initializers[name]

    def _become(self, block: Sequence[ir.Node], traced: int, last: int) -> None:
        """Give a traced block the place of one of the model's: its weights, attributes and scopes."""
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
