"""Whether a graph, or an engine, is what a program gives its inputs to and asks its sizes of: the first difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Final

from fp4trt.errors import BadOption, UnfitArtifact
from fp4trt.number_formats import FORMATS
from fp4trt.progress import note
from trt_build.graph import Graph
from trt_build.lint_notes import lint_notes
from trt_build.packages.contracts import PRECISIONS, TITLES, Contract, Extent, Program, Tensor, contracts_of
from trt_build.profiles import Profile, check_symbol, declared_range
from trt_build.served_sizes import require_served
from trt_build.signature import Port, Signature

__all__ = ["extents_in", "fit_of", "fitting", "picture_of", "precision_of"]

Symbols = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Difference:
    """After how many things that agree, names before types and sizes, what is wrong."""

    after: int
    text: str


def fit_of(graph: Graph, program: Program, variant: str | None) -> tuple[Contract, str]:
    """Return which model of a program a graph is, and its precision; what the lint lets pass is noted.

    Args:
        graph: the graph.
        program: the program.
        variant: which model it is, where the user says so.

    Raises:
        BadOption, UnfitArtifact, BadModelError: as :func:`fitting` and :func:`precision_of`.
        BadProfileError: some size is baked into the graph that the program varies; naming the node.
        LintError: TensorRT would accept the graph wrongly.
    """
    what = str(graph.path)
    contract = fitting(program, what, graph.signature, graph.symbols, variant)
    _require_sizes(graph, contract)
    precision = precision_of(what, graph.promised, program)
    for line in lint_notes(graph.path, allow_slow=True):
        note(line)
    return contract, precision


def fitting(program: Program, what: str, signature: Signature, symbols: Symbols, variant: str | None) -> Contract:
    """Return the contract of a program that a graph or engine fits.

    Args:
        program: the program.
        what: the artifact, for messages.
        signature: its inputs and outputs.
        symbols: the ranges that its metadata declare; may be empty.
        variant: which of the program's models it is, where the user says so.

    Raises:
        BadOption: the program has no such model, or the artifact may be several of them.
        BadModelError: the ranges are not as fp4trt declares them.
        UnfitArtifact: it fits none; the first difference to the nearest.
    """
    offered = contracts_of(program)
    contracts = [contract for contract in offered if variant in (None, contract.variant)]
    if not contracts:
        names = ", ".join(contract.variant for contract in offered)
        raise BadOption(f"{TITLES[program]} has no model {variant!r}; expected one of: {names}")
    for name, symbol in symbols.items():
        check_symbol(name, symbol)
    differences = {contract.variant: _difference(signature, symbols, contract) for contract in contracts}
    fit = [contract for contract in contracts if differences[contract.variant] is None]
    likely = [contract for contract in fit if not contract.named] or fit
    if len(likely) > 1:
        names = " or ".join(contract.variant for contract in likely)
        raise BadOption(f"{what} may be {names}, which have the same inputs: say which with --variant")
    if likely:
        return likely[0]
    near, found = max(
        ((contract, found) for contract in contracts if (found := differences[contract.variant]) is not None),
        key=lambda pair: pair[1].after,  # the first of the nearest
    )
    raise UnfitArtifact(
        f"{what} is not what {TITLES[program]} takes as {near.model}: {found.text}; give the graph of such a model"
    )


def precision_of(what: str, promised: Mapping[str, Sequence[str]], program: Program) -> str:
    """Return what the programs call a transformer: fp4, fp8 or bf16.

    Raises:
        UnfitArtifact: all that is quantized is in a format that they do not name.
    """
    kinds = [kind for kind, paths in promised.items() if paths]
    for kind, name in PRECISIONS.items():
        if kind in kinds:
            return name
    if kinds:
        has = ", ".join(FORMATS[kind].title for kind in kinds)
        raise UnfitArtifact(
            f"{what} is in {has}, and {TITLES[program]} has fp4, fp8 and bf16; quantize it to one of these"
        )
    return "bf16"


def _require_sizes(graph: Graph, contract: Contract) -> None:
    """Refuse a graph in which some size is baked that a program's builds vary, or is another than they have."""

    def shapes(corner: int) -> dict[str, tuple[int, ...]]:
        sizes = {symbol: extent[corner] for symbol, extent in contract.sizes.items()}
        return {
            tensor.name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in tensor.dims)
            for tensor in contract.inputs
        }

    least, usual, most = map(shapes, range(3))
    inputs = {name: (least[name], usual[name], most[name]) for name in usual}
    label = f"the sizes that {TITLES[contract.program]} asks for"
    require_served(graph.model, graph.path.parent, Profile(inputs, {}, label=label))


_SIZES: Final = {"T": ("text tokens", "--text"), "L": ("image tokens", "--resolution"), "B": ("pictures", "--batch")}
"""What messages call a symbol of the contracts, and the option of ``fp4trt build`` that sets it."""


def extents_in(what: str, shapes: Mapping[str, Sequence[Sequence[int]]], contract: Contract) -> dict[str, Extent]:
    """Return minimum, optimum and maximum of each symbol of a contract in an engine's profile.

    Args:
        what: the engine, for messages.
        shapes: minimum, optimum and maximum shape of each input.
        contract: which the engine's inputs fit.

    Raises:
        UnfitArtifact: the program's number of text tokens is outside, or the optimum is none of the program's sizes.
    """
    axes = ((tensor.dims, zip(*shapes[tensor.name], strict=True)) for tensor in contract.inputs)
    pairs = (pair for dims, extents in axes for pair in zip(dims, extents, strict=True))
    found: dict[str, Extent] = {dim: extent for dim, extent in pairs if isinstance(dim, str)}
    for symbol, (kind, option) in _SIZES.items():
        (least, _, most), (low, best, high) = contract.sizes[symbol], found[symbol]
        if not (low <= least <= high if symbol == "T" else least <= best <= most):
            optimum = f", {best} at best," if low < high else ""
            raise UnfitArtifact(
                f"{what} is for {_range(low, high)} {kind}{optimum} where {TITLES[contract.program]} gives "
                f"{_range(least, most)}: build it with another {option}"
            )
    return found


def picture_of(tokens: int, sides: tuple[int, int], pixels_per_token: int = 16) -> tuple[int, int] | None:
    """Return height and width, in pixels, of the picture nearest to a square that has so many tokens; None without one.

    Args:
        tokens: of the picture.
        sides: the least and the largest side in pixels.
        pixels_per_token: pixels of a token's side.
    """
    low, high = (side // pixels_per_token for side in sides)
    for height in range(int(tokens**0.5), low - 1, -1):
        if tokens % height == 0 and tokens // height <= high:
            return height * pixels_per_token, tokens // height * pixels_per_token
    return None


def _difference(signature: Signature, symbols: Symbols, contract: Contract) -> _Difference | None:
    """Return the first difference between what a program expects and what is there: names before types and sizes."""
    pairs = (("input", contract.inputs, signature.inputs), ("output", contract.outputs, signature.outputs))
    after = 0
    for kind, wanted, found in pairs:
        expected, names = [tensor.name for tensor in wanted], [port.name for port in found]
        for name, there in zip_longest(expected, names):
            if name != there:
                return _Difference(after, _other_name(kind, name, there, expected, names))
            after += 1
    for kind, wanted, found in pairs:
        for tensor, port in zip(wanted, found, strict=True):
            if text := next(_other_values(tensor, port, symbols, contract), None):
                return _Difference(after, f"its {kind} {port.name} {text}")
            after += 1
    return None


def _other_name(kind: str, wanted: str | None, there: str | None, expected: Sequence[str], names: Sequence[str]) -> str:
    """Say of two names that stand at one place in what they differ."""
    if wanted is not None and wanted not in names:
        return f"it has no {kind} {wanted}, expected {', '.join(expected)}"
    if there is not None and there not in expected:
        return f"it has the {kind} {there}, expected {', '.join(expected)}"
    return f"its {kind}s are in the order {', '.join(names)}, expected {', '.join(expected)}"


def _other_values(tensor: Tensor, port: Port, symbols: Symbols, contract: Contract) -> Iterator[str]:
    """Yield in what type or sizes differ from those of a tensor."""
    if port.dtype != tensor.dtype:
        yield f"is {port.dtype}, expected {tensor.dtype}"
    if len(port.dims) != len(tensor.dims):
        yield f"has the shape {_text(port.dims)}, expected {_text(tensor.dims)}"
    for axis, (dim, has) in enumerate(zip(tensor.dims, port.dims, strict=False)):
        least, _, most = (dim, dim, dim) if isinstance(dim, int) else contract.sizes[dim]
        low, high = (has, has) if isinstance(has, int) else declared_range(symbols.get(has or "")) or (0, None)
        if least < low or (high is not None and most > high):
            takes = f"{low} and more" if high is None else _range(low, high)
            yield f"takes {takes} on axis {axis}, expected {_range(least, most)}"


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _text(dims: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in dims)}]"
