"""Write a traced program in the operators that torch.onnx.export translates, without tracing it twice again.

``ExportedProgram.run_decompositions``, which ``torch.onnx.export`` calls, runs the whole program through torch's tracer
two more times, most of an export's time, although in the families here only operators of shape and type change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from exporter.trt_ops import translations

__all__ = ["decompose"]

_aten = torch.ops.aten

_TRANSLATED: Final = frozenset({
    operator.add, operator.getitem,
    _aten._assert_tensor_metadata.default, _aten.add.Tensor, _aten.arange.start, _aten.arange.start_step,
    _aten.cat.default, _aten.cos.default, _aten.div.Tensor, _aten.exp.default, _aten.gelu.default,
    _aten.layer_norm.default, _aten.mul.Tensor, _aten.neg.default, _aten.permute.default,
    _aten.pow.Scalar, _aten.reciprocal.default, _aten.repeat_interleave.self_int, _aten.rms_norm.default,
    _aten.scaled_dot_product_attention.default, _aten.select.int, _aten.silu.default, _aten.sin.default,
    _aten.slice.Tensor, _aten.split_with_sizes.default, _aten.stack.default, _aten.sym_size.int, _aten.unbind.int,
    _aten.unsqueeze.default,
})  # fmt: skip
"""What torch leaves as it is, besides what we translate ourselves."""


class _Decomposed(ExportedProgram):
    """A program that has nothing left to decompose."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        return self


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose decomposition is itself, and equals node by node what torch's would be.

    1. ``to`` is a copy of another type, or nothing; ``contiguous`` and, in eval mode, ``dropout`` are copies.
    2. ``flatten``, ``unflatten`` and ``reshape`` are views; ``chunk`` is a split; ``outer`` is a product.
    3. A sum of symbolic sizes that a view needs is computed where torch does: at the first slice along it.

    Args:
        program: traced in eval mode; used up.

    Returns:
        The program as it came where it holds any other operator, or another size: torch then decomposes it.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    known = _TRANSLATED | _RULES.keys() | translations().keys()
    sums = _slices_along_sums(nodes)
    if sums is None or any(node.target not in known for node in nodes):
        return program
    rewrite = _Rewrite(program.graph, sums)
    for node in nodes:
        rewrite.note_sizes(node)
        if node.target in _RULES:
            _RULES[node.target](rewrite, node)
    return _Decomposed(
        root=program.graph_module,
        graph=program.graph,
        graph_signature=program.graph_signature,
        state_dict=program.state_dict,
        range_constraints=program.range_constraints,
        module_call_graph=program.module_call_graph,
        example_inputs=program.example_inputs,
        constants=program.constants,
    )


def _slices_along_sums(nodes: Iterable[Node]) -> set[Node] | None:
    """Return the slices that have a sum of earlier sizes as theirs, each sum once; None if one has another new size."""
    computed: set[Any] = set()
    found: set[Node] = set()
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            computed.add(value.node.expr)
        elif node.target is _aten.slice.Tensor:
            size = node.meta["val"].shape[_axis(node, 1)]
            if isinstance(size, torch.SymInt) and size.node.expr not in computed:
                if not (size.node.expr.is_Add and computed.issuperset(size.node.expr.args)):
                    return None
                computed.add(size.node.expr)
                found.add(node)
    return found


@dataclass
class _Rewrite:
    """One graph while it is rewritten.

    Attributes:
        sums: slices that the sum of sizes along them is to follow.
        sizes: a symbolic size to the node that computes it.
    """

    graph: Graph
    sums: Container[Node]
    sizes: dict[Any, Node] = field(default_factory=dict)

    def note_sizes(self, node: Node) -> None:
        """Learn what computes a size; let a slice along a sum of sizes be followed by that sum."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            known = self.sizes.setdefault(value.node.expr, node)
            if known is not node:
                node.replace_all_uses_with(known)
                self.graph.erase_node(node)
        elif node in self.sums:
            size = node.meta["val"].shape[_axis(node, 1)]
            with self.graph.inserting_after(node):
                total = self.graph.call_function(operator.add, tuple(self.sizes[term] for term in size.node.expr.args))
            total.meta = {**node.meta, "val": size}
            self.sizes[size.node.expr] = total

    def size(self, size: int | torch.SymInt) -> int | Node:
        return self.sizes[size.node.expr] if isinstance(size, torch.SymInt) else size

    def to(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        dtype = node.meta["val"].dtype
        if source.meta["val"].dtype == dtype:
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)
        else:
            _become(node, _aten._to_copy.default, source, dtype=dtype)

    def clone(self, node: Node) -> None:
        _become(node, _aten.clone.default, node.args[0])

    def view(self, node: Node) -> None:
        """Give a view the sizes of its result."""
        self._view(node, [self.size(size) for size in node.meta["val"].shape])

    def reshape(self, node: Node) -> None:
        """Give a view the sizes that the program asks for, among which -1 may be."""
        self._view(node, node.args[1])

    def _view(self, node: Node, sizes: Any) -> None:
        """Copy first, which is nothing in ONNX: strides that torch sees here may not let it view."""
        with self.graph.inserting_before(node):
            copy = self.graph.call_function(
                _aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format}
            )
        copy.meta = {**node.meta, "val": node.args[0].meta["val"]}  # type: ignore[union-attr]
        _become(node, _aten.view.default, copy, sizes)

    def split(self, node: Node) -> None:
        axis = _axis(node, 2)
        _become(node, _aten.split.Tensor, node.args[0], self.size(node.meta["val"][0].shape[axis]), axis)

    def product(self, node: Node) -> None:
        column, row = node.args
        assert isinstance(column, Node)
        value = column.meta["val"]
        with self.graph.inserting_before(node):
            standing = self.graph.call_function(_aten.view.default, (column, [self.size(value.shape[0]), 1]))
        standing.meta = {**node.meta, "val": value.unsqueeze(1)}
        _become(node, _aten.mul.Tensor, standing, row)


def _axis(node: Node, position: int) -> int:
    """Return an axis that an operator takes at a position, 0 where it is left out."""
    axis = node.args[position] if len(node.args) > position else 0
    assert isinstance(axis, int)
    return axis


def _become(node: Node, target: Any, *args: Any, **kwargs: Any) -> None:
    node.target, node.args, node.kwargs = target, args, kwargs


_RULES: Final[dict[Any, Callable[[_Rewrite, Node], None]]] = {
    _aten.to.dtype: _Rewrite.to,
    _aten.to.dtype_layout: _Rewrite.to,
    _aten.contiguous.default: _Rewrite.clone,
    _aten.dropout.default: _Rewrite.clone,
    _aten.flatten.using_ints: _Rewrite.view,
    _aten.unflatten.int: _Rewrite.view,
    _aten.reshape.default: _Rewrite.reshape,
    _aten.chunk.default: _Rewrite.split,
    _aten.outer.default: _Rewrite.product,
}
