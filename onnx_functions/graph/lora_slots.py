"""Slots for LoRAs beside linears: a low-rank branch in BF16 whose factors are inputs of the graph.

In a graph of ``fp4trt export --lora-rank``, X a linear, and G the first linear of those that read its input::

    x -> (smoothing) -> quantizer -> product -> (Add(svdquant)) -> Add -> Add(bias)
      -> MatMul(G.lora_a) -> MatMul(X.lora_b) ---------------------^

``G.lora_a`` [lora_rank, K] and ``X.lora_b`` [N, lora_rank] are inputs; ``lora_rank`` may be 0, and then the sum is what
it is without the slot, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from onnx import NodeProto

from fp4trt.json_file import lists_of_strings, object_of
from onnx_functions.graph.branches import Branch, branch_at
from onnx_functions.graph.index import Index

__all__ = ["FACTORS", "METADATA", "SLOT_ADD", "SYMBOL", "Slots", "find_slot", "is_factor_input", "slots_of"]

FACTORS: Final = ("lora_a", "lora_b")
"""Inputs of a slot, after the linear's path."""

SLOT_ADD: Final = "/lora/Add"
"""How the node is called, after the linear, that adds the slot's product."""

SYMBOL: Final = "lora_rank"
"""The symbolic dimension that all slots share."""

METADATA: Final = "fp4trt.lora"


@dataclass(frozen=True)
class Slots:
    """What a graph says of its slots.

    Attributes:
        max_rank: the largest rank that its inputs may have.
        groups: the linears that have one, by shared input; the first of each has the factor that all of them read.
    """

    max_rank: int
    groups: tuple[tuple[str, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form that the metadata hold."""
        return {"max_rank": self.max_rank, "groups": [list(group) for group in self.groups]}


def slots_of(value: Mapping[str, Any]) -> Slots:
    """Return the slots that the JSON form tells.

    Raises:
        TypeError: it is not of that form.
    """
    value = object_of(value, "it")
    rank = value.get("max_rank")
    if type(rank) is not int or rank < 1:
        raise TypeError(f"max_rank is {rank!r}, expected a positive number")
    return Slots(rank, tuple(tuple(group) for group in lists_of_strings(value.get("groups"), "groups")))


def is_factor_input(name: str) -> bool:
    """Return whether an input of a graph is a factor of a slot, by its name."""
    return name.endswith(tuple(f".{factor}" for factor in FACTORS))


def find_slot(index: Index, path: str, tensor: str) -> Branch | None:
    """Return the slot that is added to what a linear's product, with any branch, gives; None where none is.

    Raises:
        BadGraph: what is added is not a product of two inputs of the graph.
    """
    add: NodeProto | None = index.nodes.get(f"{path}{SLOT_ADD}")
    if add is None or tensor not in add.input:
        return None
    return branch_at(index, add, tensor, index.inputs, "an input of the graph")
