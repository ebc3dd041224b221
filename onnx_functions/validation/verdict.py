"""What a validation found: gates, figures per linear, and the report that holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadEnvironment, BadGraph
from fp4trt.verb import Result

__all__ = [
    "ByTime",
    "Figures",
    "Gate",
    "OutputPicture",
    "Report",
    "failed_to_run",
    "gate_of_offenders",
    "guarded",
    "not_run",
    "refuse_environment",
    "relative_l2",
    "require_runtime",
    "runtime_errors",
    "skipped",
]

_NAMED: Final = 5

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Gate:
    """One check and its outcome.

    Attributes:
        name: of the check, such as `weights`.
        passed: whether `figure` keeps to `limit`; True for a check that was skipped, unless no check could be run.
        figure: the worst value that was found.
        limit: what it may be at most.
        detail: one line; names the tensor or node where the check failed, or says what was compared.
        offenders: every tensor, node or linear that failed, worst first or in graph order.
        was_skipped: the check was not run; `detail` says why.
    """

    name: str
    passed: bool
    figure: float
    limit: float
    detail: str
    offenders: tuple[str, ...] = ()
    was_skipped: bool = False

    @property
    def line(self) -> str:
        """The gate as one line for a terminal."""
        if self.was_skipped:
            return f"{self.name}: skipped ({self.detail})"
        return f"{self.name}: {'passed' if self.passed else 'FAILED'} ({self.detail})"


@dataclass(frozen=True)
class Figures:
    """What was measured of one linear; None where it was not.

    Attributes:
        path: module path.
        block: the path up to the block's number, such as `transformer_blocks.3`; empty outside blocks.
        weight_error: relative L2 of the dequantized weight against the reference's.
        scale_bias: <w, w_q> / <w, w> - 1 against the reference's weight w.
        differing_codes: activation codes and block scales that differ, teacher-forced.
        output_error: relative L2 of the linear's product, teacher-forced.
        structure_error: relative L2 of its output in the FP32 run with activations unquantized, the worst
            shape.
    """

    path: str
    block: str
    weight_error: float | None = None
    scale_bias: float | None = None
    differing_codes: int | None = None
    output_error: float | None = None
    structure_error: float | None = None


@dataclass(frozen=True)
class ByTime:
    """How far the graph's outputs are from the reference's at several times between noise and picture.

    Attributes:
        points: (time, output to its relative L2 error); a time is 1 at pure noise and 0 at a picture.
        left_out: why there are none; "" where nothing was asked.
    """

    points: tuple[tuple[float, dict[str, float]], ...] = ()
    left_out: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it; numbers that JSON has no word for are None."""
        points = [
            {"time": time, "errors": {name: _finite(error) for name, error in errors.items()}}
            for time, errors in self.points
        ]
        return {"points": points, "left_out": self.left_out}


@dataclass(frozen=True, eq=False)
class OutputPicture:
    """An output of the graph and of the reference, drawn.

    Attributes:
        caption: what it is an output of.
        note: the channels that are drawn where not all are, and how far the two are apart.
        reference, graph: uint8 [H, W] or [H, W, 3], on one scale.
        difference: the square root of the absolute difference on that scale, likewise.
    """

    caption: str
    note: str
    reference: npt.NDArray[np.uint8]
    graph: npt.NDArray[np.uint8]
    difference: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Report(Result):
    """The verdict on one graph; its items are those of :meth:`as_dict`.

    Attributes:
        model: the ONNX file.
        reference: folder of the reference checkpoint; None for a third party's graph, which has none.
        reference_kind: `quantized`, or `plain` for a 16-bit checkpoint, where errors are those of
            quantization; `none` without a reference.
        level: `full` or `blocks`, as it was run.
        gates: in the order they ran.
        linears: figures of every linear.
        note: what the gates cannot see; "" where there is nothing to say.
        by_time: the error of the outputs at several times; no gate.
        pictures: outputs that can be drawn; not in the JSON.
    """

    model: Path
    reference: Path | None
    reference_kind: str
    level: str
    gates: tuple[Gate, ...]
    linears: tuple[Figures, ...] = field(default=())
    note: str = ""
    by_time: ByTime = ByTime()
    pictures: tuple[OutputPicture, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate passed; False too where the graph could not be run."""
        return all(gate.passed for gate in self.gates)

    @property
    def failures(self) -> tuple[Gate, ...]:
        """The gates that found a fault."""
        return tuple(gate for gate in self.gates if not gate.passed and not gate.was_skipped)

    @property
    def not_run(self) -> Gate | None:
        """The gate that could not be run, so that there is no verdict: nothing passed, and nothing failed."""
        return next((gate for gate in self.gates if not gate.passed and gate.was_skipped), None)

    def as_dict(self, *, absolute: bool = True) -> dict[str, Any]:
        """Return the report as JSON holds it; numbers that JSON has no word for are None.

        Args:
            absolute: whether `model` and `reference` are absolute paths, or the names alone, as in a file.
        """
        gates = [{**asdict(gate), "figure": _finite(gate.figure)} for gate in self.gates]
        reference = self.reference.resolve() if self.reference is not None else None
        return {
            "passed": self.passed,
            "model": str(self.model.parent.resolve() / self.model.name) if absolute else self.model.name,
            "reference": None if reference is None else str(reference) if absolute else reference.name,
            "reference_kind": self.reference_kind,
            "level": self.level,
            "note": self.note,
            "gates": gates,
            "linears": [{key: _finite(value) for key, value in asdict(row).items()} for row in self.linears],
            "error_by_time": self.by_time.as_dict(),
        }

    def _items(self) -> dict[str, Any]:
        return self.as_dict()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def relative_l2(found: FloatArray, expected: FloatArray) -> float:
    """Return |found - expected| / |expected|; infinite for another shape or values that are not finite."""
    if found.size != expected.size:
        return float("inf")
    difference = found.reshape(-1).astype(np.float64) - expected.reshape(-1)
    error = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30)
    return error if np.isfinite(error) else float("inf")


def gate_of_offenders(
    name: str, offenders: Sequence[tuple[str, str]], figure: float, limit: float, compared: str, *, count: int
) -> Gate:
    """Return a gate that passes when there are no offenders; one that compared nothing counts as skipped.

    Args:
        name: of the gate.
        offenders: (name, what is wrong with it).
        figure: the worst value.
        limit: its limit.
        compared: what was compared, the detail of a gate that passes.
        count: how much was compared.
    """
    if not offenders and not count:
        return skipped(name, f"there is nothing to compare: {compared}")
    if not offenders:
        return Gate(name, True, figure, limit, compared)
    told = "; ".join(f"{who}: {what}" for who, what in offenders[:_NAMED])
    more = f"; and {len(offenders) - _NAMED} more" if len(offenders) > _NAMED else ""
    return Gate(name, False, figure, limit, told + more, tuple(who for who, _ in offenders))


def skipped(name: str, why: str) -> Gate:
    """Return the gate of a check that was not run."""
    return Gate(name, True, 0.0, 0.0, why, was_skipped=True)


def not_run(name: str, why: str) -> Gate:
    """Return the gate of a check without which there is no verdict, and that could not be run here."""
    return Gate(name, False, 0.0, 0.0, f"could not be run here: {why}", was_skipped=True)


def failed_to_run(name: str, error: Exception) -> Gate:
    """Return the gate of a check that the graph broke: the runtime's own words name the node."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return Gate(name, False, float("inf"), 0.0, f"could not be run: {lines[0] if lines else type(error).__name__}")


def guarded(name: str, check: Callable[[], Iterable[Gate]]) -> tuple[Gate, ...]:
    """Run a check; a graph that the runtime refuses, or that breaks its promise, is a failed gate, no crash.

    Raises:
        BadEnvironment: the machine cannot run the check, which says nothing of the graph.
    """
    try:
        return tuple(check())
    except Exception as error:
        refuse_environment(error, name)
        if not isinstance(error, (BadGraph, *runtime_errors())):
            raise
        return (failed_to_run(name, error),)


def refuse_environment(error: Exception, check: str) -> None:
    """Refuse to take for a fault of the graph what the machine lacks; do nothing about any other error.

    Raises:
        BadEnvironment: saying what the machine lacks, in the runtime's or the system's own words.
    """
    if isinstance(error, BadGraph):
        return
    if isinstance(error, OSError):  # which the command tells as it is
        raise error
    text = " ".join(str(error).split())
    lacking = next((what for words, what in _LACKING.items() if words in text.lower()), None)
    if isinstance(error, MemoryError):
        lacking = _MEMORY
    if isinstance(error, ImportError):
        lacking = "a package cannot be imported"
    if lacking is not None:
        raise BadEnvironment(
            f"the check of {check} could not be run: {lacking} ({text[:200] or type(error).__name__}); this says "
            "nothing of the graph: mend that and run the same command again"
        ) from error


def require_runtime() -> None:
    """Refuse to validate without ONNX Runtime.

    Raises:
        BadEnvironment: it cannot be imported.
    """
    try:
        runtime_errors()
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise BadEnvironment(
            f"ONNX Runtime, which validates, cannot be imported ({reason}); install it: pip install onnxruntime"
        ) from error


_MEMORY: Final = "memory is lacking"
_LACKING: Final = {
    "bad_alloc": _MEMORY,
    "bad allocation": _MEMORY,
    "allocate memory": _MEMORY,
    "out of memory": _MEMORY,
    "not enough memory": _MEMORY,
    "no space left": "a disk is full",
    "permission denied": "the rights to a file are lacking",
    "access is denied": "the rights to a file are lacking",
    "errcode = 13": "the rights to a file are lacking",
    "systemerror : 13": "the rights to a file are lacking",
    "too many open files": "too many files are open",
    "input/output error": "a disk cannot be read",
    "max supported ir version": "this ONNX Runtime is too old",
    "is under development and support for this is limited": "this ONNX Runtime is too old",
}
"""Words in an error of ONNX Runtime or torch, in lower case, that speak of the machine, to what is wrong with it."""


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return what ONNX Runtime raises over a graph that it cannot load or run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    kinds = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    errors: tuple[type[Exception], ...] = tuple(getattr(state, kind) for kind in (*kinds, "RuntimeException"))
    return errors
