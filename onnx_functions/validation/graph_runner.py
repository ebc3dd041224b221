"""Running a graph of whatever origin on a CPU: in ONNX Runtime, or, where that cannot, in onnx's ReferenceEvaluator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import onnx

from fp4trt.errors import BadGraph
from onnx_functions.library import SIMULATION_DOMAIN, TRT_DOMAIN
from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation.example_inputs import Array
from onnx_functions.validation.structure_gates import WITNESS_ELEMENTS
from onnx_functions.validation.verdict import runtime_errors

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["CannotOpen", "EvaluatorFailed", "Runner", "elements_of", "evaluator", "run_errors", "runner"]

_SMALL: Final = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
"""Floats that a simulation takes as FP32."""

_SIMULATED: Final = ("FP4WeightDequantize", "GatherBlockQuantized", SIMULATION_DOMAIN)
"""What the simulation alone brings into a graph."""

Values = Mapping[str, Array]


class EvaluatorFailed(BadGraph):
    """The ReferenceEvaluator could not run a graph to its end."""


class CannotOpen(BadGraph):
    """Neither runtime has what a graph needs, which says nothing of the graph."""


@dataclass(frozen=True)
class Runner:
    """What runs a graph.

    Attributes:
        name: of the runtime, for people.
        run: input to its values, in the graph's own types, to output to its values.
        instead: why not in ONNX Runtime; "" where it is that.
    """

    name: str
    run: Callable[[Values], Values]
    instead: str = ""


def runner(path: Path, model: onnx.ModelProto) -> Runner:
    """Return what runs a graph.

    Args:
        path: of its file.
        model: that file's graph, without local functions.

    Raises:
        CannotOpen: neither has what the graph needs, or it is too large for the second.
        ONNX Runtime's errors: the graph is at fault.
    """
    try:
        return _in_onnx_runtime(_session(model, path.parent))
    except run_errors() as error:
        # What is wrong with the graph itself is wrong everywhere; what a runtime, or the simulation, lacks is not.
        if not _lacks(error):
            raise
        # What the user could do about a graph of fp4trt's own is no advice here.
        reason = _first_line(error).partition("; expected")[0].partition("; export")[0]
    if (count := elements_of(model)) > WITNESS_ELEMENTS:
        most = f"onnx's ReferenceEvaluator takes no more than {WITNESS_ELEMENTS} weights, and there are {count}"
        raise CannotOpen(f"{reason}; {most}")
    try:
        return Runner("onnx's ReferenceEvaluator", evaluator(path, model), reason)
    except EvaluatorFailed as error:
        raise CannotOpen(f"{reason}; nor in onnx's ReferenceEvaluator: {error}") from None


def _lacks(error: Exception) -> bool:
    """Whether ONNX Runtime, or the rewriting for it, and not the graph keeps a graph from being opened."""
    if isinstance(error, BadGraph) or type(error).__name__ == "NotImplemented":
        return True
    return any(operator in str(error) for operator in _SIMULATED)


def evaluator(path: Path, model: onnx.ModelProto) -> Callable[[Values], Values]:
    """Return what runs the file as it is in onnx's ReferenceEvaluator; slow.

    Raises:
        EvaluatorFailed: it does not know an operator; the result raises it too.
    """
    from onnx_functions.simulation.reference_ops import reference_evaluator

    try:
        opened = reference_evaluator(path)
    except Exception as refusal:  # the evaluator raises whatever numpy and Python do
        raise EvaluatorFailed(_first_line(refusal)) from None
    names = [value.name for value in model.graph.output]

    def run(inputs: Values) -> Values:
        try:
            with np.errstate(all="ignore"):
                results: Any = opened.run(None, dict(inputs))
        except Exception as refusal:  # as above
            raise EvaluatorFailed(_first_line(refusal)) from None
        return dict(zip(names, (np.asarray(values) for values in results), strict=True))

    return run


def run_errors() -> tuple[type[Exception], ...]:
    """Return what opening and running a graph raises where the graph, or a kernel that is missing, is to blame."""
    return (BadGraph, *runtime_errors())


def elements_of(model: onnx.ModelProto) -> int:
    """Return how many numbers a graph's initializers hold."""
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


def _in_onnx_runtime(session: ort.InferenceSession) -> Runner:
    names = [value.name for value in session.get_outputs()]

    def run(inputs: Values) -> Values:
        wide = {
            name: values.astype(np.float32) if values.dtype in _SMALL else values for name, values in inputs.items()
        }
        return dict(zip(names, session.run(names, wide), strict=True))

    return Runner("ONNX Runtime", run)


def _session(model: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    """Open a graph; as it is where it holds what the simulation does not know and needs none."""
    try:
        simulated = simulate(model)
    except BadGraph:
        if any(node.domain == TRT_DOMAIN for node in model.graph.node):
            raise
        simulated = model
    return runtime_session(simulated, folder)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
