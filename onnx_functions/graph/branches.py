"""What SVDQuant and AWQ put beside the FP4 product of a linear: a smoothed input, and a low-rank branch in 16 bit.

In a graph of `fp4trt export`, with the tensors of a linear X as ModelOpt's checkpoints name them, or, where a group has
equal ones, those of its first member::

    x -> Mul(X.pre_quant_scale) -> quantizer -> FP4 product -> Add -> Add(bias)
                                -> MatMul(X.svdquant_lora_a) -> MatMul(X.svdquant_lora_b) -^
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto

from fp4trt.errors import BadGraph
from onnx_functions.graph.external_data import array_of
from onnx_functions.graph.index import Index

FloatArray = npt.NDArray[np.float32]

__all__ = [
    "BRANCH_ADD",
    "FACTORS",
    "SMOOTHING",
    "Branch",
    "branch_at",
    "described_branches",
    "effective_weight",
    "find_branch",
    "find_smoothing",
    "is_factor",
]

FACTORS: Final = ("svdquant_lora_a", "svdquant_lora_b")
"""Factors beside a linear's X.weight [N, K]: X.svdquant_lora_a [rank, K] and X.svdquant_lora_b [N, rank]."""

BRANCH_ADD: Final = "/svdquant/Add"
"""How the node is called, after the linear, that adds the branch to the product."""

SMOOTHING: Final = "pre_quant_scale"
"""X.pre_quant_scale [K], which the input is multiplied by."""


@dataclass(frozen=True)
class Branch:
    """A low-rank branch of a linear.

    Attributes:
        input: the tensor [..., K] that it reads.
        factors: the initializers [rank, K] and [N, rank].
        products: the names of the nodes that multiply by them.
        add: that of the node that adds the result to the FP4 product.
        output: the sum.
    """

    input: str
    factors: tuple[str, str]
    products: tuple[str, str]
    add: str
    output: str


def is_factor(name: str) -> bool:
    """Return whether an initializer is a low-rank factor, by its name."""
    return name.endswith(tuple(f".{factor}" for factor in FACTORS))


def find_branch(index: Index, path: str, product: NodeProto) -> Branch | None:
    """Return the branch that is added to the product of a linear, None where none is.

    Args:
        index: of the graph.
        path: the linear's module path.
        product: its node.

    Raises:
        BadGraph: what is added is not a product of two stored factors.
    """
    add = index.nodes.get(f"{path}{BRANCH_ADD}")
    if add is None or product.output[0] not in add.input:
        return None
    return branch_at(index, add, product.output[0], index.constants, "an initializer")


def branch_at(index: Index, add: NodeProto, product: str, factors: Container[str], kind: str) -> Branch:
    """Return the branch that a node adds to a product.

    Args:
        index: of the graph.
        add: the node.
        product: the tensor that it adds the branch to.
        factors: the tensors that may be factors.
        kind: what these are, for messages.

    Raises:
        BadGraph: what is added is not a product of two of them.
    """
    tensor = next(name for name in add.input if name != product)
    found: list[tuple[str, str]] = []
    for _ in FACTORS:
        node = index.producer.get(tensor)
        if node is None or node.op_type != "MatMul":
            raise BadGraph(f"node {add.name} adds {tensor}, which is not a product of two factors; export it again")
        factor = index.through_moves(node.input[1])
        if factor not in factors:
            raise BadGraph(f"node {node.name} multiplies by {factor}, which is not {kind}; export the graph again")
        found.insert(0, (factor, node.name))
        tensor = node.input[0]
    (a, first), (b, second) = found
    return Branch(tensor, (a, b), (first, second), add.name, add.output[0])


def find_smoothing(index: Index, tensor: str) -> NodeProto | None:
    """Return the Mul by a stored `pre_quant_scale` that makes a quantizer's input, None where there is none."""
    node = index.producer.get(tensor)
    if node is None or node.op_type != "Mul" or node.input[1] not in index.constants:
        return None
    return node if node.input[1].endswith(f".{SMOOTHING}") else None


def described_branches(tensors: Mapping[str, tuple[Sequence[int], int]]) -> dict[str, Any] | None:
    """Return what an artifact holds of branches and smoothings, as JSON; None without any.

    Args:
        tensors: name to shape and number of bytes.

    Returns:
        ``linears`` with a branch, ``ranks`` in rising order, ``smoothed`` (how many tensors smooth an input) and
        ``bytes`` of all of it.
    """
    ranks = {name: shape[-1] for name, (shape, _) in tensors.items() if name.endswith(f".{FACTORS[1]}")}
    smoothings = [name for name in tensors if name.endswith(f".{SMOOTHING}")]
    if not ranks and not smoothings:
        return None
    nbytes = (size for name, (_, size) in tensors.items() if is_factor(name) or name.endswith(f".{SMOOTHING}"))
    return {
        "linears": len(ranks),
        "ranks": sorted(set(ranks.values())),
        "smoothed": len(smoothings),
        "bytes": sum(nbytes),
    }


def effective_weight(
    residual: FloatArray,
    branch: Branch | None,
    smoothing: str | None,
    constants: Mapping[str, onnx.TensorProto],
    directory: Path,
) -> FloatArray:
    """Return the one matrix [N, K], FP32, that does what a linear does with its branch and its smoothing.

    Args:
        residual: the weight [N, K] that is stored in FP4.
        branch: what is added to its product.
        smoothing: the initializer that its input is multiplied by.
        constants: by name.
        directory: where their data lie.
    """

    def stored(name: str) -> FloatArray:
        return np.asarray(array_of(constants[name], directory)).astype(np.float32)

    whole = residual
    if branch is not None:
        a, b = (stored(name) for name in branch.factors)
        whole = residual + b @ a
    return whole if smoothing is None else whole * stored(smoothing)
