"""Give linears a slot for a LoRA: a low-rank branch in BF16 whose factors are inputs of the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from exporter.trt_ops import ACTIVATION_PLACEHOLDER
from onnx_functions.graph.lora_slots import FACTORS, SLOT_ADD, SYMBOL

__all__ = ["add_lora_slots"]

_TURNED: Final = {"perm": [1, 0]}


def add_lora_slots(model: ir.Model, groups: Iterable[Sequence[str]]) -> None:
    """Rewrite in place, a graph that we traced, before branches are added and placeholders replaced.

    1. What enters a linear X goes through two products besides, by the inputs ``G.lora_a`` [lora_rank, K] and
       ``X.lora_b`` [N, lora_rank]; G is the first linear of those that read it. It is taken before any smoothing, so
       that a LoRA's own factors fit.
    2. What they give is added before the bias is, behind the branch of SVDQuant where there is one.
    3. Linears of a group share one first product. TensorRT merges their FP4 products as without slots.

    Each block has inputs of its own. Inputs that hold the factors of all blocks, each block taking its part, would be
    fewer, but TensorRT-RTX copies all of the parts in every run, and saves no kernel by it (measured on the built-in
    model at ranks 0 to 64: 192 kernels without slots, 352 with 84 inputs more, 349 with 33 more; at one rank, where
    nothing is padded, 268 and 287).

    Args:
        model: with placeholders.
        groups: module paths of the linears that get a slot, those together that read one input.

    Raises:
        AssertionError: a linear is not there, or is not computed in BF16, or reads something else than its group.
    """
    rewrite = _Rewrite(model.graph)
    for group in groups:
        rewrite.group(group)


@dataclass
class _Rewrite:
    """One graph while it is rewritten; knows the placeholder of each linear, in the order of the graph."""

    graph: ir.Graph
    placeholders: Mapping[str, ir.Node] = field(init=False)

    def __post_init__(self) -> None:
        nodes = (node for node in self.graph if node.op_type == ACTIVATION_PLACEHOLDER)
        self.placeholders = {node.attributes["linear"].as_string(): node for node in nodes}

    def group(self, paths: Sequence[str]) -> None:
        """Add the slots of linears that read one input."""
        members = [node for path, node in self.placeholders.items() if path in paths]
        x = members[0].inputs[0]
        assert x is not None
        assert x.dtype == ir.DataType.BFLOAT16, f"{paths[0]} reads {x.dtype}"
        assert all(node.inputs[0] is x for node in members), f"{', '.join(paths)} do not read one tensor"
        reduced = self._reduced(x, paths[0], members[0])
        for path in paths:
            self._add(path, reduced)

    def _reduced(self, x: ir.Value, path: str, before: ir.Node) -> ir.Value:
        """Insert the product of ``x`` [..., K] and the first factor of a group; return it, [..., lora_rank]."""
        assert x.shape is not None
        *outer, columns = x.shape
        factor = self._input(f"{path}.{FACTORS[0]}", (SYMBOL, columns))
        return self._product(before, x, factor, f"{path}/{FACTORS[0]}", (*outer, SYMBOL))

    def _add(self, path: str, reduced: ir.Value) -> None:
        (product,) = (node for node, _ in self.placeholders[path].outputs[0].uses())
        assert product.op_type == "MatMul", f"{path}: its input goes into a {product.op_type}"
        result = product.outputs[0]
        assert result.shape is not None
        readers = list(result.uses())
        factor = self._input(f"{path}.{FACTORS[1]}", (result.shape[-1], SYMBOL))
        restored = self._product(product, reduced, factor, f"{path}/{FACTORS[1]}", tuple(result.shape))
        add = ir.node("Add", [result, restored], name=f"{path}{SLOT_ADD}")
        total = self._described(add, tuple(result.shape))
        self.graph.insert_after(product, add)
        for node, index in readers:
            node.replace_input_with(index, total)

    def _product(
        self, before: ir.Node, x: ir.Value, factor: ir.Value, name: str, shape: Sequence[int | str | ir.SymbolicDim]
    ) -> ir.Value:
        """Insert the product of ``x`` with a factor [rows, columns], turned as a linear's weight is."""
        assert factor.shape is not None
        turned = ir.node("Transpose", [factor], _TURNED, name=f"{name}/Transpose")
        product = ir.node("MatMul", [x, self._described(turned, tuple(factor.shape)[::-1])], name=f"{name}/MatMul")
        self.graph.insert_before(before, [turned, product])
        return self._described(product, shape)

    def _described(self, node: ir.Node, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
        """Name and describe a node's BF16 output; return it."""
        output = node.outputs[0]
        output.name, output.type = f"{node.name}_output_0", ir.TensorType(ir.DataType.BFLOAT16)
        output.shape = ir.Shape(shape)
        return output

    def _input(self, name: str, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value
