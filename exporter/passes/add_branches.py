"""Put what SVDQuant and AWQ add beside the FP4 product of a linear: a low-rank branch, the smoothing of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from calibration.checkpoints.quantized import BRANCH, SMOOTHING
from exporter.trt_ops import ACTIVATION_PLACEHOLDER
from onnx_functions.graph.branches import BRANCH_ADD

__all__ = ["Branch", "add_branches"]


@dataclass(frozen=True)
class Branch:
    """What a linear has beside its FP4 weight, and whose tensors stand for it where a group has equal ones.

    Attributes:
        smoothing: module path of the linear whose ``pre_quant_scale`` is taken; None without smoothing.
        factor: module path of the linear whose ``svdquant_lora_a`` is taken.
        rank: of the low-rank product; 0 without one.
    """

    smoothing: str | None
    factor: str
    rank: int


def add_branches(model: ir.Model, branches: Mapping[str, Branch]) -> None:
    """Rewrite in place, a graph that we traced, before its placeholders are replaced.

    1. What enters a linear is multiplied by its ``pre_quant_scale`` [K], before the activation quantizer. TensorRT
       computes that in the kernel that makes the input.
    2. The smoothed input goes through two plain products besides, ``svdquant_lora_a`` [r, K] and ``svdquant_lora_b``
       [N, r], which TensorRT runs as two kernels.
    3. What they give is added to the FP4 product before the bias is: TensorRT then adds it in the second product's
       kernel, and the bias where it added that before. Behind the bias it costs one kernel a linear more (measured).
    4. Linears that read the same input and have the same tensors share one smoothing and one first product; TensorRT
       merges their FP4 products, and their second products, by itself. So nothing is concatenated here, and every
       linear keeps its name.

    Args:
        model: with placeholders; the new initializers have no values yet.
        branches: module path of each linear that has one.
    """
    rewrite = _Rewrite(model.graph)
    for node in list(model.graph):
        if node.op_type == ACTIVATION_PLACEHOLDER:
            path = node.attributes["linear"].as_string()
            if path in branches:
                rewrite.linear(node, path, branches[path])


@dataclass
class _Rewrite:
    """One graph while it is rewritten; remembers what later linears of a group share."""

    graph: ir.Graph
    smoothed: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)
    reduced: dict[tuple[str, ir.Value], ir.Value] = field(default_factory=dict)

    def linear(self, placeholder: ir.Node, path: str, branch: Branch) -> None:
        """Add the branch of one linear, whose activation placeholder this is."""
        x = placeholder.inputs[0]
        assert x is not None
        if branch.smoothing is not None:
            x = self._smooth(placeholder, x, branch.smoothing)
            placeholder.replace_input_with(0, x)
        if branch.rank:
            self._add_product(placeholder, x, path, branch)

    def _add_product(self, placeholder: ir.Node, x: ir.Value, path: str, branch: Branch) -> None:
        (product,) = (node for node, _ in placeholder.outputs[0].uses())
        assert product.op_type == "MatMul", f"{path}: its input goes into a {product.op_type}"
        result = product.outputs[0]
        readers = list(result.uses())
        key = branch.factor, x
        if key not in self.reduced:
            self.reduced[key] = self._product(placeholder, x, branch.factor, BRANCH[0], branch.rank)
        assert result.shape is not None
        columns = result.shape[-1]
        assert isinstance(columns, int)
        restored = self._product(product, self.reduced[key], path, BRANCH[1], columns)
        total = self._insert(product, "Add", [result, restored], f"{path}{BRANCH_ADD}", result.shape, after=True)
        for node, index in readers:
            node.replace_input_with(index, total)

    def _smooth(self, before: ir.Node, x: ir.Value, path: str) -> ir.Value:
        if (path, x) not in self.smoothed:
            assert x.shape is not None
            scale = self._initializer(f"{path}.{SMOOTHING}", (x.shape[-1],))
            self.smoothed[path, x] = self._insert(before, "Mul", [x, scale], f"{path}/{SMOOTHING}/Mul", x.shape)
        return self.smoothed[path, x]

    def _product(self, before: ir.Node, x: ir.Value, path: str, kind: str, rows: int) -> ir.Value:
        """Insert the product of ``x`` [..., K] with a stored factor [rows, K], turned as a linear's weight is."""
        assert x.shape is not None
        *outer, columns = x.shape
        factor = self._initializer(f"{path}.{kind}", (rows, columns))
        turned = self._insert(
            before, "Transpose", [factor], f"{path}/{kind}/Transpose", ir.Shape([columns, rows]), {"perm": [1, 0]}
        )
        return self._insert(before, "MatMul", [x, turned], f"{path}/{kind}/MatMul", ir.Shape([*outer, rows]))

    def _insert(
        self,
        place: ir.Node,
        kind: str,
        inputs: list[ir.Value],
        name: str,
        shape: ir.Shape,
        attributes: Mapping[str, list[int]] | None = None,
        after: bool = False,
    ) -> ir.Value:
        """Insert a node with one BF16 output before or after another one; return the output."""
        node = ir.node(kind, inputs, attributes, name=name)
        output = node.outputs[0]
        output.name, output.type, output.shape = f"{name}_output_0", ir.TensorType(ir.DataType.BFLOAT16), shape
        if after:
            self.graph.insert_after(place, node)
        else:
            self.graph.insert_before(place, node)
        return output

    def _initializer(self, name: str, shape: tuple[int | ir.SymbolicDim, ...]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape(shape))
        self.graph.initializers[name] = value
        return value
