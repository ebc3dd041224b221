"""Whether a graph can serve the sizes of a profile at all: a builder takes an optimum that fits for the whole range."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from fp4trt.errors import BadProfileError
from onnx_functions.graph.dependence import dependences
from onnx_functions.graph.sizes import sizes_at, without_functions
from onnx_functions.graph.symbols import Symbolic, evaluated, symbolic_inputs, symbolic_outputs
from trt_build.profiles import Profile

__all__ = ["require_served"]

_CORNERS = ("minimum", "optimum", "maximum")


def require_served(model: onnx.ModelProto, directory: Path, profile: Profile) -> None:
    """Refuse a profile of which the graph cannot serve the minimum, the optimum or the maximum.

    Every node is asked by ONNX's shape inference, with the profile's sizes on the inputs; an output that is declared by
    the inputs' symbols has to have the sizes that these have.

    Args:
        model: external data not loaded.
        directory: where they lie.
        profile: of all inputs.

    Raises:
        BadProfileError: naming the node, the inputs that it depends on, what was found and what is needed.
    """
    model = without_functions(model)
    found = None
    odd: list[str] = []
    for corner, label in enumerate(_CORNERS):
        inputs = {name: shapes[corner] for name, shapes in profile.inputs.items()}
        found = sizes_at(model, inputs, directory, found)
        for misfit in sorted(found.misfits, key=lambda misfit: not misfit.unequal)[:1]:
            known = dependences(model)
            names = {name for tensor in misfit.reads for name in known.by_anything(tensor)}
            given = {name: shape for name, shape in inputs.items() if name in names}
            odd.append(_refused(f"{label} of {profile.label}", given, misfit.message))
            if misfit.unequal:
                raise BadProfileError(odd[-1])
        for fault in _outputs(model, inputs, found.sizes):
            raise BadProfileError(_refused(f"{label} of {profile.label}", inputs, fault))
    if 0 < len(odd) < len(_CORNERS):  # what is wrong at all sizes is not the profile's fault: the parser will say what
        raise BadProfileError(odd[0])


def _refused(where: str, inputs: Mapping[str, Sequence[int]], fault: str) -> str:
    given = ", ".join(f"{name} is {'x'.join(map(str, shape))}" for name, shape in inputs.items())
    sizes = f", where {given}" if given else ""
    return (
        f"the graph cannot serve the {where}{sizes}: {fault}; "
        "give a range that it can, or export it again with that size dynamic"
    )


def _outputs(
    model: onnx.ModelProto, inputs: Mapping[str, Sequence[int]], sizes: Mapping[str, Sequence[int | None]]
) -> Iterator[str]:
    """Yield which output has another size than the inputs' symbols give it."""
    numbers = _numbers(symbolic_inputs(model), inputs)
    made = {name: node.name or name for node in model.graph.node for name in node.output}
    for name, declared in symbolic_outputs(model).items():
        found = sizes.get(name)
        if found is None or len(found) != len(declared):
            continue
        for axis, (one, wanted) in enumerate(zip(found, evaluated(declared, numbers), strict=True)):
            if isinstance(declared[axis], str) and None not in (one, wanted) and one != wanted:
                maker = f", which node {made[name]} gives," if name in made else ""
                what = f"axis {axis} of the output {name}{maker} is {one}"
                yield f"{what} where {declared[axis]}, as declared, is {wanted}"


def _numbers(symbols: Mapping[str, Symbolic], inputs: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the symbols that have one number in all inputs."""
    found: dict[str, set[int]] = {}
    for name, declared in symbols.items():
        for symbol, number in zip(declared, inputs.get(name, ()), strict=False):
            if isinstance(symbol, str):
                found.setdefault(symbol, set()).add(number)
    return {symbol: next(iter(numbers)) for symbol, numbers in found.items() if len(numbers) == 1}
