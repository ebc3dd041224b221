"""The symbolic sizes of a graph's inputs, and numbers to put in their place."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx

__all__ = ["Assignment", "Symbolic", "assignments", "evaluated", "filled", "symbolic_inputs", "symbolic_outputs"]

Symbolic = tuple[int | str, ...]
"""Sizes of an input or output; a symbol, or an expression of symbols, where one is not fixed."""

_SECTIONS: Final = (6720, 840, 60)
"""Sizes that every usual patch, head and block divides, 2^6 * 3 * 5 * 7 at best; less for more symbols.

The product of all sizes stays within 64 bits.
"""


@dataclass(frozen=True)
class Assignment:
    """Two numbers for each symbol, unlike each other; `large` are too many to run a graph at."""

    first: Mapping[str, int]
    second: Mapping[str, int]
    large: bool = False


def symbolic_inputs(model: onnx.ModelProto) -> dict[str, Symbolic]:
    """Return the sizes of the inputs that are no initializers and say how many axes they have.

    An axis that has neither number nor name is called NAME:AXIS.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    return {
        value.name: _sizes(value)
        for value in model.graph.input
        if value.name not in stored and value.type.tensor_type.HasField("shape")
    }


def symbolic_outputs(model: onnx.ModelProto) -> dict[str, Symbolic]:
    """Return the declared sizes of the outputs that have any."""
    return {value.name: _sizes(value) for value in model.graph.output if value.type.tensor_type.HasField("shape")}


def _sizes(value: onnx.ValueInfoProto) -> Symbolic:
    dims = value.type.tensor_type.shape.dim
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}:{axis}"
        for axis, dim in enumerate(dims)
    )


def assignments(inputs: Mapping[str, Symbolic]) -> Iterator[Assignment]:
    """Yield pairs of sizes to try a graph at, for symbols may have to be equal, or multiples of something.

    Symbols that are expressions of others get no number of their own.
    """
    named = dict.fromkeys(n for size in inputs.values() for n in size if isinstance(n, str))
    symbols = [name for name in named if not names_in(name) or not names_in(name) - {name} <= named.keys()]
    symbols = [name for name in named if name in symbols or name in names_in(name)]
    batch = {size[0] for size in list(inputs.values())[:1] if size}
    count = len(symbols)

    def numbered(number: Callable[[int, str], int]) -> dict[str, int]:
        return {name: number(index, name) for index, name in enumerate(symbols)}

    def multiples(of: int) -> tuple[dict[str, int], dict[str, int]]:
        return numbered(lambda i, _: of * (1 + i)), numbered(lambda i, _: of * (1 + count + i))

    yield Assignment(*multiples(_SECTIONS[min(count // 3, 2)]), large=True)
    yield Assignment(numbered(lambda i, _: 2 + i), numbered(lambda i, _: 2 + count + i))
    yield Assignment(*multiples(64), large=True)
    yield Assignment(numbered(lambda _, name: 2 if name in batch else 16), numbered(lambda *_: 32))
    yield Assignment(numbered(lambda *_: 16), numbered(lambda *_: 32))


def evaluated(size: Symbolic, numbers: Mapping[str, int]) -> tuple[int | None, ...]:
    """Return sizes as numbers; None where a symbol has none, or an expression of symbols cannot be read."""
    return tuple(n if isinstance(n, int) else _value(n, numbers) for n in size)


def names_in(text: str) -> set[str]:
    """Return the symbols of an expression such as ``past + 1``; none for what is no expression."""
    tree = _parsed(text)
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} if tree is not None else set()


def _parsed(text: str) -> ast.Expression | None:
    try:
        return ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_OPERATORS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def _value(text: str, numbers: Mapping[str, int]) -> int | None:
    if text in numbers:
        return numbers[text]
    tree = _parsed(text)
    if tree is None:
        return None
    try:
        return _of(tree.body, numbers)
    except (KeyError, ZeroDivisionError, RecursionError):
        return None


def _of(node: ast.expr, numbers: Mapping[str, int]) -> int:
    """Return the value of an expression; a KeyError where it holds something else than sums, products and symbols."""
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_of(node.left, numbers), _of(node.right, numbers))
    raise KeyError(ast.dump(node))


def filled(inputs: Mapping[str, Symbolic], numbers: Mapping[str, int]) -> dict[str, Sequence[int]]:
    """Return the inputs whose sizes are all known at some numbers, as numbers."""
    found = {name: evaluated(size, numbers) for name, size in inputs.items()}
    return {
        name: [n for n in size if n is not None]
        for name, size in found.items()
        if all(n is not None and n >= 0 for n in size)
    }
