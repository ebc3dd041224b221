"""Write a traced program in the operators that torch.onnx.export translates, without tracing it twice again.

``ExportedProgram.run_decompositions``, which ``torch.onnx.export`` calls, runs the whole program through torch's tracer
two more times, most of an export's time, although in the families here only operators of shape and type change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from exporter.trt_ops import translations

__all__ = ["decompose"]

_aten = torch.ops.aten

_TRANSLATED: Final = frozenset({
    operator.add, operator.getitem, operator.mul, _aten._assert_tensor_metadata.default, _aten.add.Tensor,
    _aten.arange.start, _aten.arange.start_step, _aten.cat.default, _aten.cos.default, _aten.div.Tensor,
    _aten.exp.default, _aten.expand.default, _aten.gelu.default, _aten.index_select.default, _aten.layer_norm.default,
    _aten.linspace.default, _aten.mean.dim, _aten.mul.Tensor, _aten.neg.default, _aten.ones_like.default,
    _aten.permute.default, _aten.pow.Scalar, _aten.pow.Tensor_Scalar, _aten.reciprocal.default,
    _aten.repeat_interleave.self_int, _aten.rms_norm.default, _aten.rsqrt.default,
    _aten.scaled_dot_product_attention.default, _aten.select.int, _aten.sigmoid.default, _aten.silu.default,
    _aten.sin.default, _aten.slice.Tensor, _aten.split_with_sizes.default, _aten.stack.default,
    _aten.sub.Tensor, _aten.sym_size.int, _aten.tanh.default, _aten.unbind.int, _aten.unsqueeze.default,
    _aten.view.default, _aten.where.self, _aten.zeros_like.default,
})  # fmt: skip
"""What torch leaves as it is, besides what we translate ourselves."""


class _Decomposed(ExportedProgram):
    """A program that has nothing left to decompose."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        return self


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return a program whose decomposition is itself, and equals what torch's would be, for FLUX node by node.

    1. ``to`` and ``type_as`` are copies of another type or device, or nothing; ``contiguous`` and, in eval mode,
       ``dropout`` are copies.
    2. ``flatten``, ``unflatten`` and ``reshape`` are views; ``transpose`` and ``swapaxes`` are permutations; ``chunk``
       is a split; ``concatenate`` is a ``cat``; ``outer`` is a product and ``rsub`` a sum; ``new_ones`` and
       ``new_zeros`` are filled. A ``squeeze`` of an axis that is not 1 long, which ONNX does not have, is a copy.
    3. A sum of symbolic sizes that a view needs is computed where torch does: at the first slice along it. What no node
       has computed so far is computed of the inputs' sizes.

    Args:
        program: traced in eval mode; used up.

    Returns:
        The program as it came where it holds any other operator, or another size: torch then decomposes it.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    known = _TRANSLATED | _RULES.keys() | translations().keys()
    rewrite = _Rewrite(program.graph, _slices_along_sums(nodes))
    if any(node.target not in known or not rewrite.knows_sizes_of(node) for node in nodes):
        return program
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


def _slices_along_sums(nodes: Iterable[Node]) -> set[Node]:
    """Return the slices that have a sum of earlier sizes as theirs, each sum once."""
    computed: set[Any] = set()
    found: set[Node] = set()
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            computed.add(value.node.expr)
        elif node.target is _aten.slice.Tensor:
            size = node.meta["val"].shape[_axis(node, 1)]
            if not isinstance(size, torch.SymInt) or size.node.expr in computed:
                continue
            if size.node.expr.is_Add and computed.issuperset(size.node.expr.args):
                computed.add(size.node.expr)
                found.add(node)
    return found


@dataclass
class _Rewrite:
    """One graph while it is rewritten.

    Attributes:
        sums: slices that the sum of sizes along them is to follow.
        sizes: a symbolic size to the node that computes it.
        of_inputs: likewise, of those that were computed of the inputs' sizes at the graph's beginning.
    """

    graph: Graph
    sums: Container[Node]
    sizes: dict[Any, Node] = field(default_factory=dict)
    of_inputs: dict[Any, Node] = field(default_factory=dict)

    @cached_property
    def axes(self) -> dict[Any, tuple[Node, int]]:
        """Symbol to an input and its axis of that size."""
        found: dict[Any, tuple[Node, int]] = {}
        for node in self.graph.find_nodes(op="placeholder"):
            for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (node, axis))
        return found

    def knows_sizes_of(self, node: Node) -> bool:
        """Return whether all sizes of a node's result can be computed of the inputs' sizes."""
        sizes = getattr(node.meta.get("val"), "shape", ())
        return all(self._is_known(size.node.expr) for size in sizes if isinstance(size, torch.SymInt))

    def _is_known(self, expression: Any) -> bool:
        if expression.is_Add or expression.is_Mul:
            return all(self._is_known(part) for part in expression.args)
        return bool(expression.is_Integer) or expression in self.axes

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
        if not isinstance(size, torch.SymInt):
            return size
        return self.sizes.get(size.node.expr) or self._of_inputs(size.node.expr)

    def _of_inputs(self, expression: Any) -> Node | int:
        """Compute a size of the inputs' sizes, at the graph's beginning."""
        if expression.is_Integer:
            return int(expression)
        if expression in self.of_inputs:
            return self.of_inputs[expression]
        parts = [self._of_inputs(part) for part in expression.args]
        before = [*self.graph.find_nodes(op="placeholder"), *self.of_inputs.values()][-1]
        if not parts:
            node, axis = self.axes[expression]
            with self.graph.inserting_after(before):
                made = self.graph.call_function(_aten.sym_size.int, (node, axis))
            made.meta = {"val": node.meta["val"].shape[axis]}
        else:
            function = operator.add if expression.is_Add else operator.mul
            made = reduce(  # type: ignore[assignment]
                lambda one, other: self._combined(function, one, other, before), parts
            )
        self.of_inputs[expression] = made
        return made

    def _combined(self, function: Callable[..., Any], one: Node | int, other: Node | int, before: Node) -> Node:
        """Add, or multiply, two sizes behind a node, or behind the first size where that is computed later."""
        with self.graph.inserting_after(one if isinstance(one, Node) and before < one else before):
            made = self.graph.call_function(function, (one, other))
        made.meta = {"val": function(*(part.meta["val"] if isinstance(part, Node) else part for part in (one, other)))}
        return made

    def to(self, node: Node) -> None:
        source = node.args[0]
        assert isinstance(source, Node)
        given, wanted = ((each.meta["val"].dtype, each.meta["val"].device) for each in (source, node))
        if given == wanted:
            node.replace_all_uses_with(source)
            self.graph.erase_node(node)
        else:
            _become(node, _aten._to_copy.default, source, dtype=wanted[0], device=wanted[1])

    def fill(self, node: Node) -> None:
        """Make a tensor of ones, or of zeros."""
        value = node.meta["val"]
        sizes, number = [self.size(size) for size in value.shape], int(node.target is _aten.new_ones.default)
        _become(node, _aten.full.default, sizes, number, dtype=value.dtype, device=value.device, pin_memory=False)

    def count(self, node: Node) -> None:
        _become(node, _aten.arange.start_step, 0, node.args[0], 1, **node.kwargs)

    def join(self, node: Node) -> None:
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        _become(node, _aten.cat.default, node.args[0], axis)

    def squeeze(self, node: Node) -> None:
        """Copy where nothing changes."""
        source = node.args[0]
        assert isinstance(source, Node)
        if source.meta["val"].dim() == node.meta["val"].dim():
            self.clone(node)

    def subtract_from(self, node: Node) -> None:
        """Write ``number - x`` as ``-x + number``, which is the same to the bit."""
        x, number = node.args
        with self.graph.inserting_before(node):
            negative = self.graph.call_function(_aten.neg.default, (x,))
        negative.meta = {**node.meta}
        _become(node, _aten.add.Tensor, negative, number)

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

    def transpose(self, node: Node) -> None:
        source, *exchanged = node.args
        axes = list(range(node.meta["val"].dim()))
        one, other = (axes[axis] for axis in exchanged)  # type: ignore[index]
        axes[one], axes[other] = other, one
        _become(node, _aten.permute.default, source, axes)

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
    _aten.to.device: _Rewrite.to,
    _aten.to.dtype: _Rewrite.to,
    _aten.to.dtype_layout: _Rewrite.to,
    _aten.type_as.default: _Rewrite.to,
    _aten.new_ones.default: _Rewrite.fill,
    _aten.new_zeros.default: _Rewrite.fill,
    _aten.arange.default: _Rewrite.count,
    _aten.contiguous.default: _Rewrite.clone,
    _aten.dropout.default: _Rewrite.clone,
    _aten.flatten.using_ints: _Rewrite.view,
    _aten.unflatten.int: _Rewrite.view,
    _aten.reshape.default: _Rewrite.reshape,
    _aten.transpose.int: _Rewrite.transpose,
    _aten.chunk.default: _Rewrite.split,
    _aten.concatenate.default: _Rewrite.join,
    _aten.swapaxes.default: _Rewrite.transpose,
    _aten.squeeze.dim: _Rewrite.squeeze,
    _aten.outer.default: _Rewrite.product,
    _aten.rsub.Scalar: _Rewrite.subtract_from,
}
