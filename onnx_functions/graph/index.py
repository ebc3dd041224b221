"""An index over a graph's nodes and tensors, and the walks that follow its wires.

Every reader of a graph looks through the same operators, by name: upwards with `through_casts`, `through_moves`,
`to_source` (dequantization too) and `to_stored` (quantization too), downwards with `readers`.

Source of what they pass, measured with TensorRT-RTX 1.7.1: an NVFP4 GEMM, an FP8 GEMM and an FP8 attention stay what
they are with any of :data:`MOVES` between dequantization and product, on either operand. Only FP4 is lost where a move
changes the last axis, along which its blocks lie (`linting.subject`).

Operators count by name, in whatever domain they are: a lint must see what stands in the wrong one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import onnx
from onnx import NodeProto, TensorProto

from fp4trt.number_formats import FORMATS
from onnx_functions.graph.bodies import outer_reads
from onnx_functions.graph.element_types import attributes_of, integer
from onnx_functions.library import FP8_QUANTIZER, WEIGHT_PLACEHOLDER

__all__ = [
    "ALIASES",
    "CASTS",
    "MOVES",
    "PRODUCTS",
    "QUANTIZED",
    "RESHAPES",
    "SOURCE",
    "Index",
    "Reader",
    "exchanges_axes",
    "name_of",
]

PRODUCTS: Final = ("MatMul", "Gemm")

ALIASES: Final = ("Identity",)
"""Operators behind which a tensor is the same, byte for byte."""

CASTS: Final = (*ALIASES, "Cast")
"""Operators that keep a tensor's elements and their places, and may change their type."""

RESHAPES: Final = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""Operators that keep the elements in order and change the axes."""

MOVES: Final = (*CASTS, *RESHAPES, "Transpose")
"""Operators that keep the elements, in whatever place and type."""

SOURCE: Final = (*MOVES, *dict.fromkeys(kind.dequantizer[1] for kind in FORMATS.values()))
"""Operators between what is stored, or what a quantizer gives, and what is computed with."""

QUANTIZED: Final = (*SOURCE, FP8_QUANTIZER, WEIGHT_PLACEHOLDER)
"""Operators between what is to be quantized, in the graph or by an exporter to come, and what is computed with."""


@dataclass(frozen=True)
class Reader:
    """A node that reads a tensor as its input `index`, its last two axes exchanged `transposed` times on the way."""

    node: NodeProto
    index: int
    transposed: int

    @property
    def multiplies(self) -> bool:
        """Whether it is a product that reads the tensor as its second operand, as that of a weight."""
        return self.node.op_type in PRODUCTS and self.index == 1

    @property
    def turned(self) -> bool:
        """Whether a product reads a tensor [N, K] as [K, N]."""
        by_gemm = self.node.op_type == "Gemm" and integer(attributes_of(self.node), "transB", 0)
        return bool(self.transposed % 2) ^ bool(by_gemm)


class Index:
    """Nodes by name and by the tensors that they give and read, and what is stored.

    Attributes:
        nodes: by name.
        order: position of each node, by name.
        producer: nodes by the tensors that they give.
        consumers: nodes by the tensors that they read, as often as they read it.
        initializers: by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: dict[str, NodeProto] = {node.name: node for node in model.graph.node}
        self.order: dict[str, int] = {node.name: index for index, node in enumerate(model.graph.node)}
        self.initializers: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer: dict[str, NodeProto] = {name: node for node in model.graph.node for name in node.output if name}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers and the values of Constant nodes, which TorchScript's exporter writes in their place."""
        found = dict(self.initializers)
        for node in self.model.graph.node:
            if node.op_type == "Constant" and isinstance(value := attributes_of(node).get("value"), TensorProto):
                found[node.output[0]] = value
        return found

    @cached_property
    def inputs(self) -> frozenset[str]:
        """The names of the graph's inputs."""
        return frozenset(value.name for value in self.model.graph.input)

    def constant(self, tensor: str) -> str:
        """Return the constant that a tensor is under another name; "" where it is none."""
        found = self.through(tensor, ALIASES)
        return found if found in self.constants else ""

    def stored(self, tensor: str) -> TensorProto | None:
        """Return the constant that a tensor is a cast, moved or quantized form of; None where it is computed."""
        return self.constants.get(self.to_stored(tensor))

    def to_stored(self, tensor: str) -> str:
        """Return what a weight is before it is quantized, which a graph may do itself: the source of most."""
        return self.through(tensor, QUANTIZED)

    def through_casts(self, tensor: str) -> str:
        """Return what a tensor was before any Cast; so for scales, whose stored shape is judged."""
        return self.through(tensor, CASTS)

    def through_moves(self, tensor: str) -> str:
        """Return what a tensor was before its elements were cast and moved."""
        return self.through(tensor, MOVES)

    def to_source(self, tensor: str) -> str:
        """Return the stored codes or weight, or the quantizer's codes, or the result, that a tensor is made from."""
        return self.through(tensor, SOURCE)

    def through(self, tensor: str, operators: Collection[str]) -> str:
        """Return the tensor that nodes of these operators, one behind the other, made a tensor from."""
        passed = self.chain(tensor, operators)
        return passed[-1].input[0] if passed else tensor

    def chain(self, tensor: str, operators: Collection[str] = SOURCE) -> list[NodeProto]:
        """Return the nodes of these operators above a tensor, each by its first input, the nearest first."""
        found: list[NodeProto] = []
        while (node := self.producer.get(tensor)) is not None and node.op_type in operators and node.input:
            found.append(node)
            tensor = node.input[0]
        return found

    def readers(
        self, tensor: str, operators: Collection[str] = (), stops: Callable[[NodeProto], bool] = lambda _: False
    ) -> Iterator[Reader]:
        """Yield what reads a tensor, through nodes that have it as their first input.

        Args:
            tensor: what is read.
            operators: to look through.
            stops: whether one of them is a reader all the same.
        """
        waiting = deque([(tensor, 0)])
        while waiting:
            tensor, transposed = waiting.popleft()
            for node in {id(node): node for node in self.consumers.get(tensor, ())}.values():
                for index in (index for index, name in enumerate(node.input) if name == tensor):
                    if index == 0 and node.op_type in operators and not stops(node):
                        waiting.append((node.output[0], transposed + exchanges_axes(node)))
                    else:
                        yield Reader(node, index, transposed)

    def above(self, *tensors: str, until: Collection[str] = ()) -> list[NodeProto]:
        """Return the nodes that some tensors depend on, by whatever inputs and bodies, in graph order.

        Args:
            tensors: where to begin.
            until: tensors beyond which nothing counts.
        """
        waiting, found = list(tensors), set[int]()
        while waiting:
            node = self.producer.get(waiting.pop())
            if node is not None and id(node) not in found:
                found.add(id(node))
                waiting.extend(name for name in outer_reads(node) if name not in until)
        return [node for node in self.model.graph.node if id(node) in found]


def exchanges_axes(node: NodeProto) -> bool:
    """Return whether a node exchanges the last two axes of what it reads: a Transpose whose permutation does that."""
    if node.op_type != "Transpose":
        return False
    permutation = attributes_of(node).get("perm")
    return not isinstance(permutation, list) or list(permutation[-2:]) == [len(permutation) - 1, len(permutation) - 2]


def name_of(node: NodeProto) -> str:
    """Return a node's name, or that of its first output where it has none."""
    return node.name or (f"(node of {node.output[0]})" if node.output else f"({node.op_type})")
