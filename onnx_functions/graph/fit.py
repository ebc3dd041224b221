"""Numbers of one node that have to be equal: elements of a Reshape, axes that a sum or product brings together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import NodeProto

from onnx_functions.graph.element_types import attributes_of

__all__ = ["PAIRED", "Pair", "pairs_of"]

_BROADCAST: Final = frozenset(
    "Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "Pow PRelu Sub Sum Where Xor".split()
)


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
    given = _Given([*sizes, None, None], [*values, None, None], attributes_of(node))
    return list(_PAIRS[node.op_type](given)) if node.op_type in PAIRED else []


@dataclass(frozen=True)
class _Given:
    """A node's inputs, with two that are not known at the end, and its attributes."""

    sizes: Sequence[Sequence[int] | None]
    values: Sequence[npt.NDArray[Any] | None]
    attributes: Mapping[str, object]

    @property
    def known(self) -> list[Sequence[int]]:
        return [size for size in self.sizes if size is not None]

    @property
    def numbers(self) -> list[int] | None:
        """The values of the second input."""
        return None if self.values[1] is None else [int(n) for n in np.asarray(self.values[1]).reshape(-1)]

    @property
    def length(self) -> int | None:
        """How long the first input is along the attribute `axis`."""
        axis, size = self.attributes.get("axis", 0), self.sizes[0]
        return size[axis] if size is not None and isinstance(axis, int) and -len(size) <= axis < len(size) else None


def _of_reshape(given: _Given) -> Iterator[Pair]:
    size, target = given.sizes[0], given.numbers
    if size is None or target is None:
        return
    keeps = not given.attributes.get("allowzero", 0)
    wanted = [size[axis] if n == 0 and keeps and axis < len(size) else n for axis, n in enumerate(target)]
    rest = math.prod(n for n in wanted if n != -1)
    yield Pair(math.prod(size), rest, f"elements for the shape {target}", "divides" if -1 in wanted else "")


def _of_expand(given: _Given) -> Iterator[Pair]:
    if given.sizes[0] is not None and given.numbers is not None:
        yield from _broadcast([given.sizes[0], given.numbers])


def _of_gather(given: _Given) -> Iterator[Pair]:
    if given.length is not None and given.numbers:
        least = max(max(given.numbers) + 1, -min(given.numbers))
        yield Pair(given.length, least, f"elements of axis {given.attributes.get('axis', 0)}", "least")


def _of_split(given: _Given) -> Iterator[Pair]:
    if given.length is not None and given.numbers is not None:
        yield Pair(given.length, sum(given.numbers), f"elements of axis {given.attributes.get('axis', 0)}")


def _of_squeeze(given: _Given) -> Iterator[Pair]:
    size = given.sizes[0] or ()
    for axis in given.numbers or ():
        if -len(size) <= axis < len(size):
            yield Pair(size[axis], 1, f"elements of axis {axis}")


def _of_matmul(given: _Given) -> Iterator[Pair]:
    left, right = given.sizes[:2]
    if left and right:
        yield Pair(left[-1], right[-2] if len(right) > 1 else right[-1], "terms of the product")
        yield from _broadcast([left[:-2], right[:-2]])


def _of_gemm(given: _Given) -> Iterator[Pair]:
    left, right = given.sizes[:2]
    if left is not None and right is not None and len(left) == len(right) == 2:
        turned = [bool(given.attributes.get(name)) for name in ("transA", "transB")]
        yield Pair(left[0 if turned[0] else 1], right[1 if turned[1] else 0], "terms of the product")


def _broadcast(sizes: Sequence[Sequence[int]]) -> Iterator[Pair]:
    rank = max((len(size) for size in sizes), default=0)
    for axis in range(1, rank + 1):
        lengths = [size[-axis] for size in sizes if len(size) >= axis]
        for one in lengths[1:]:
            yield Pair(lengths[0] if lengths[0] != 1 else max(lengths), one, f"elements of axis {-axis}", "broadcast")


def _of_concat(given: _Given) -> Iterator[Pair]:
    sizes, axis = given.known, given.attributes.get("axis")
    if not isinstance(axis, int):
        return
    for size in sizes[1:]:
        if len(size) == len(sizes[0]):
            for position, (one, other) in enumerate(zip(sizes[0], size, strict=True)):
                if position != axis % len(size):
                    yield Pair(one, other, f"elements of axis {position}")


_PAIRS: Final[Mapping[str, Callable[[_Given], Iterator[Pair]]]] = {
    "Concat": _of_concat,
    "Expand": _of_expand,
    "Gather": _of_gather,
    "Gemm": _of_gemm,
    "MatMul": _of_matmul,
    "Reshape": _of_reshape,
    "Split": _of_split,
    "Squeeze": _of_squeeze,
    **dict.fromkeys(_BROADCAST, lambda given: _broadcast(given.known)),
}

PAIRED: Final = frozenset(_PAIRS)
"""Operators that numbers are known of that have to be equal."""
