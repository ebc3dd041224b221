"""Numbers of one node that have to be equal: elements of a Reshape, axes that a sum or product brings together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnx_functions.element_types import attributes_of

__all__ = ["PAIRED", "Pair", "pairs_of"]

_BROADCAST: Final = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "Pow PRelu Sub Sum Where Xor".split()
)

PAIRED: Final = _BROADCAST | {"Concat", "Expand", "Gather", "Gemm", "MatMul", "Reshape", "Split", "Squeeze"}
"""Operators that numbers are known of that have to be equal."""


@dataclass(frozen=True)
class Pair:
    """Two numbers of a node, `found` in what it reads and `wanted` by something else that it reads.

    Attributes:
        found, wanted: have to be equal.
        what: is counted, for people.
        bound: `wanted` is only the most, or the number that has to divide `found`; or 1 does as well on either side.
    """

    found: int
    wanted: int
    what: str
    bound: str = ""

    @property
    def fits(self) -> bool:
        """Whether the two go together."""
        if self.found == self.wanted:
            return True
        if self.bound == "broadcast":
            return 1 in (self.found, self.wanted)
        if self.bound == "divides":
            return self.wanted == 0 or self.found % self.wanted == 0
        return self.bound == "least" and self.found >= self.wanted

    def __str__(self) -> str:
        relation = {"divides": "a multiple of ", "least": "at least "}.get(self.bound, "")
        return f"{self.what}: {self.found}, expected {relation}{self.wanted}"


def pairs_of(
    node: NodeProto, sizes: Sequence[Sequence[int] | None], values: Sequence[npt.NDArray[Any] | None]
) -> list[Pair]:
    """Return the numbers of a node of the standard that have to be equal, in an order that its operator decides.

    Args:
        node: its operator is of the standard.
        sizes: of its inputs; None for one that is not known, or left out.
        values: of its inputs.
    """
    return list(_pairs(node, [*sizes, None, None], [*values, None, None], attributes_of(node)))


def _pairs(
    node: NodeProto,
    sizes: Sequence[Sequence[int] | None],
    values: Sequence[npt.NDArray[Any] | None],
    attributes: Mapping[str, object],
) -> Iterator[Pair]:
    first, second, kind = sizes[0], sizes[1], node.op_type
    if kind in _BROADCAST:
        yield from _broadcast([size for size in sizes if size is not None])
    elif kind == "Concat":
        yield from _concat([size for size in sizes if size is not None], attributes.get("axis"))
    elif first is None:
        return
    elif kind == "Reshape" and values[1] is not None:
        yield _reshape(first, [int(n) for n in values[1].reshape(-1)], bool(attributes.get("allowzero", 0)))
    elif kind == "Expand" and values[1] is not None:
        yield from _broadcast([first, [int(n) for n in values[1].reshape(-1)]])
    elif kind == "Gather" and values[1] is not None and values[1].size:
        axis = attributes.get("axis", 0)
        if isinstance(axis, int) and -len(first) <= axis < len(first):
            indices = np.asarray(values[1])
            least = max(int(indices.max()) + 1, -int(indices.min()))
            yield Pair(first[axis], least, f"elements of axis {axis}", "least")
    elif kind == "Split" and values[1] is not None:
        axis = attributes.get("axis", 0)
        if isinstance(axis, int) and -len(first) <= axis < len(first):
            yield Pair(first[axis], int(values[1].sum()), f"elements of axis {axis}")
    elif kind == "Squeeze" and values[1] is not None:
        axes = [int(axis) for axis in values[1].reshape(-1) if -len(first) <= axis < len(first)]
        yield from (Pair(first[axis], 1, f"elements of axis {axis}") for axis in axes)
    elif kind == "MatMul" and second is not None and first and second:
        yield Pair(first[-1], second[-2] if len(second) > 1 else second[-1], "terms of the product")
        yield from _broadcast([first[:-2], second[:-2]])
    elif kind == "Gemm" and second is not None and len(first) == len(second) == 2:
        yield Pair(first[0 if attributes.get("transA") else 1], second[1 if attributes.get("transB") else 0], "terms")


def _reshape(size: Sequence[int], target: Sequence[int], zero_is_zero: bool) -> Pair:
    wanted = [size[axis] if n == 0 and not zero_is_zero and axis < len(size) else n for axis, n in enumerate(target)]
    rest = math.prod(n for n in wanted if n != -1)
    return Pair(math.prod(size), rest, f"elements for the shape {list(target)}", "divides" if -1 in wanted else "")


def _broadcast(sizes: Sequence[Sequence[int]]) -> Iterator[Pair]:
    rank = max((len(size) for size in sizes), default=0)
    for axis in range(1, rank + 1):
        lengths = [size[-axis] for size in sizes if len(size) >= axis]
        for one in lengths[1:]:
            yield Pair(lengths[0] if lengths[0] != 1 else max(lengths), one, f"elements of axis {-axis}", "broadcast")


def _concat(sizes: Sequence[Sequence[int]], axis: object) -> Iterator[Pair]:
    if not sizes or not isinstance(axis, int):
        return
    for size in sizes[1:]:
        if len(size) == len(sizes[0]):
            for position, (one, other) in enumerate(zip(sizes[0], size, strict=True)):
                if position != axis % len(size):
                    yield Pair(one, other, f"elements of axis {position}")
