"""What can be said of a graph without a reference: it runs, follows its inputs, and two runtimes agree on it.

For graphs of third parties, which carry no promise and no checkpoint. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from onnx_functions.baked import baked_sizes, fitting_trial
from onnx_functions.errors import BadEnvironment, BadGraph, CannotRun
from onnx_functions.example_inputs import Array, example_inputs, other_values, require_tensors
from onnx_functions.external_data import BadSpan, load_graph, nbytes_of, span_of
from onnx_functions.free_memory import available_memory
from onnx_functions.graph_runner import EvaluatorFailed, Runner, elements_of, evaluator, run_errors, runner
from onnx_functions.linears import metadata_of
from onnx_functions.linting import require_form
from onnx_functions.report import check_report_folder, write_report
from onnx_functions.sizes import sizes_at, without_functions
from onnx_functions.structure_gates import END_TO_END_LIMIT, INPUT_CHANGE, WITNESS_ELEMENTS
from onnx_functions.symbols import evaluated, filled, symbolic_inputs, symbolic_outputs
from onnx_functions.verdict import (
    Gate,
    Report,
    failed_to_run,
    gate_of_offenders,
    refuse_environment,
    relative_l2,
    require_runtime,
    skipped,
)

__all__ = ["NO_REFERENCE", "is_third_party", "third_party_graph", "validate_third_party"]

NO_REFERENCE: Final = (
    "there is no 16-bit reference, so nothing was compared with what the model should compute: weights that were read "
    "in a wrong layout, or belong to another layer, pass these gates"
)
_GATES: Final = ("finite", "shapes", "inputs", "outputs", "second witness")
_PLACEHOLDERS: Final = ("TRT_FP4QDQ", "TRT_FP4DynamicQDQ")
_BYTES: Final = 6
"""Bytes of memory for each weight that a run may need, as in the validation against a checkpoint."""

_INPUT_BYTES: Final = 32
"""Bytes of memory for each number that goes in: as FP64 and as what it is, twice."""

Values = Mapping[str, Array]


@dataclass(frozen=True)
class _Run:
    """One run: the sizes of the inputs, for people, what went in and what came out."""

    sizes: Mapping[str, Sequence[int]]
    numbers: Mapping[str, int]
    inputs: Values
    outputs: Values

    @property
    def shown(self) -> str:
        return _shown(self.sizes)


@dataclass(frozen=True)
class _Subject:
    """A graph of a third party.

    Attributes:
        path: its file.
        model: without functions; external data not loaded.
        inputs: those that are no initializers.
    """

    path: Path
    model: onnx.ModelProto
    inputs: Sequence[onnx.ValueInfoProto]

    @cached_property
    def runner(self) -> Runner:
        return runner(self.path, self.model)

    def run(self, inputs: Values) -> Values:
        """Return the outputs for inputs in the graph's own types."""
        return self.runner.run(inputs)


def is_third_party(model: onnx.ModelProto) -> bool:
    """Whether a graph carries nothing of fp4trt's own metadata."""
    return not any(key.startswith("fp4trt.") for key in metadata_of(model))


def third_party_graph(path: Path) -> onnx.ModelProto | None:
    """Return the graph of a file, or of a folder's model.onnx, if it is a third party's.

    Raises:
        BadGraph: it is missing or no graph.
    """
    model = load_graph(path / "model.onnx" if path.is_dir() else path)
    return model if is_third_party(model) else None


def validate_third_party(
    path: Path,
    model: onnx.ModelProto,
    report_dir: Path | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Run a graph at two sizes and see whether its outputs are finite and follow its inputs.

    Args:
        path: of the ONNX file.
        model: that file's graph.
        report_dir, force, say: as in :func:`onnx_functions.validation.validate`.

    Returns:
        The report, whose note says what cannot be seen without a reference.

    Raises:
        BadGraph: weights wait to become FP4, external data are missing, or nothing can be put in.
        CannotRun: it needs more memory than is free.
        BadEnvironment: ONNX Runtime cannot be imported, or the external data cannot be read.
        OutputExists, OSError: the report cannot be written; known before any gate runs.
    """
    require_runtime()
    _require_finished(path, model)
    require_form(path, model, ordered=True)
    subject = _Subject(path, without_functions(model), require_tensors(model))
    _require_data(subject)
    if report_dir is not None:
        check_report_folder(report_dir, force)
    gates = []
    for gate in _gates(subject):
        gates.append(gate)
        if say is not None:
            say(gate.line)
    report = Report(path, None, "none", "full", tuple(gates), note=NO_REFERENCE)
    if report_dir is not None:
        write_report(report, report_dir, force)
    return report


def _require_finished(path: Path, model: onnx.ModelProto) -> None:
    left = [node for node in model.graph.node if node.op_type in _PLACEHOLDERS]
    if left:
        raise BadGraph(
            f"{path.name} has {len(left)} {left[0].op_type} nodes that wait to become FP4; "
            f"run fp4trt export {path.name} -o OURS first, and validate what that writes"
        )


def _require_data(subject: _Subject) -> None:
    weights, files = 0, set[Path]()
    for tensor in subject.model.graph.initializer:
        try:
            span = span_of(tensor, subject.path.parent)
            weights += nbytes_of(tensor)
        except BadSpan as fault:
            raise BadGraph(f"{subject.path}: {fault}") from None
        if span is not None and span.file not in files:
            files.add(span.file)
            _require_readable(span.file)
    _require_memory(max(weights, _BYTES * elements_of(subject.model)), subject)


def _require_readable(file: Path) -> None:
    try:
        with file.open("rb"):
            return
    except OSError as error:
        raise BadEnvironment(
            f"the graph's data {file} cannot be read ({error.strerror or error}); this says nothing of the graph: mend "
            "that and run the same command again"
        ) from error


def _require_memory(need: int, subject: _Subject) -> None:
    free = available_memory()
    if free is not None and need > free:
        raise CannotRun(
            f"running {subject.path.name} needs about {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are "
            "free here; validate it on a machine that has them"
        )


def _gates(subject: _Subject) -> Iterator[Gate]:
    runs: list[_Run] = []
    try:
        gate = _runs_gate(subject, runs)
    except Exception as error:
        refuse_environment(error, "runs")
        if not isinstance(error, run_errors()):
            raise
        gate = _not_run(error)
    yield gate
    if not gate.passed or not runs:
        yield from (skipped(name, "the graph could not be run") for name in _GATES)
        return
    yield _finite_gate(runs)
    yield _shapes_gate(subject, runs)
    yield from _guarded("inputs", lambda: _inputs_gate(subject, runs[0]))
    yield from _guarded("outputs", lambda: _outputs_gate(subject, runs[0]))
    yield _witness_gate(subject, runs[0])


def _guarded(name: str, check: Callable[[], Gate]) -> Iterator[Gate]:
    try:
        yield check()
    except Exception as error:
        refuse_environment(error, name)
        if not isinstance(error, run_errors()):
            raise
        yield failed_to_run(name, error)


def _not_run(error: Exception) -> Gate:
    """Return the gate of a graph that cannot be opened; a kernel that is missing says nothing of its numbers."""
    gate = failed_to_run("runs", error)
    if type(error).__name__ == "NotImplemented":
        told = f"{gate.detail}; ONNX Runtime has no kernel for it on the CPU, which says nothing of the graph's numbers"
        return Gate("runs", False, gate.figure, gate.limit, told)
    return gate


def _runs_gate(subject: _Subject, runs: list[_Run]) -> Gate:
    """Run the graph at each size, adding to `runs`; fails at the first that it cannot take."""
    declared = symbolic_inputs(subject.model)
    trial = fitting_trial(subject.model, subject.path.parent)
    pairs: list[Mapping[str, int]] = [{}] if trial is None else [trial.assignment.first, trial.assignment.second]
    where = subject.runner.name  # what is wrong with the graph as such is no matter of sizes
    where += f", for ONNX Runtime cannot ({subject.runner.instead})" if subject.runner.instead else ""
    for seed, numbers in enumerate(pairs):
        sizes = filled(declared, numbers)
        if lacking := [value.name for value in subject.inputs if value.name not in sizes]:
            size = ", ".join(map(str, declared[lacking[0]]))
            told = (
                f"the input {lacking[0]} has the size [{size}], for which there are no numbers: nothing can be put in"
            )
            return Gate("runs", False, float("inf"), 0, told, (lacking[0],))
        _require_memory(sum(_INPUT_BYTES * math.prod(size) for size in sizes.values()), subject)
        inputs = example_inputs(subject.inputs, sizes, seed)
        try:
            runs.append(_Run(sizes, numbers, inputs, subject.run(inputs)))
        except run_errors() as error:
            misfit = next(iter(sizes_at(subject.model, sizes, subject.path.parent).misfits), None)
            why = misfit.message if misfit is not None else failed_to_run("runs", error).detail
            at = (misfit.name,) if misfit is not None else ()
            return Gate("runs", False, float("inf"), 0, f"not at {_shown(sizes)}: {why}", at)
    return Gate("runs", True, 0, 0, f"at {' and at '.join(run.shown for run in runs)}, in {where}")


def _finite_gate(runs: Sequence[_Run]) -> Gate:
    offenders, bad, count = [], 0, 0
    for run in runs:
        for name, values in run.outputs.items():
            wrong = int((~np.isfinite(np.asarray(values, np.float64))).sum())
            count += np.size(values)
            bad += wrong
            if wrong:
                offenders.append((name, f"{wrong} of {np.size(values)} values are NaN or infinite at {run.shown}"))
    return gate_of_offenders("finite", offenders, bad, 0, f"{count} values of the outputs are finite", count=count)


def _shapes_gate(subject: _Subject, runs: Sequence[_Run]) -> Gate:
    """Compare the outputs' shapes with the declared symbols, and ask the shapes inside for sizes that are baked in."""
    offenders: dict[str, str] = {}
    for name, declared in symbolic_outputs(subject.model).items():
        for run in runs:
            found, wanted = np.shape(run.outputs[name]), evaluated(declared, run.numbers)
            known = [(a, b) for a, b, n in zip(found, wanted, declared, strict=False) if isinstance(n, str) and b]
            if len(found) != len(declared) or any(a != b for a, b in known):
                told = f"is {list(found)}, declared as {list(declared)}, at {run.shown}"
                offenders.setdefault(name, told)
    for baked in baked_sizes(subject.model, subject.path.parent):
        if baked.wrong:
            offenders.setdefault(baked.node or baked.tensor, baked.message)
    told = ", ".join(f"{name} {list(np.shape(values))}" for name, values in runs[-1].outputs.items())
    return gate_of_offenders(
        "shapes", list(offenders.items()), len(offenders), 0, f"{told} at {runs[-1].shown}", count=len(runs)
    )


def _inputs_gate(subject: _Subject, run: _Run) -> Gate:
    """Change each input alone; every one has to change some output."""
    changes: dict[str, tuple[float, str]] = {}
    for value in subject.inputs:
        changes[value.name] = _largest_change(subject, run, value.name)
    without = [name for name, (change, _) in changes.items() if not change > INPUT_CHANGE]
    least = min(changes, key=lambda name: changes[name][0])
    if without:
        told = f"changing {', '.join(without)} changes nothing in the outputs, at {run.shown}"
        return Gate("inputs", False, len(without), 0, told, tuple(without))
    change, output = changes[least]
    told = f"all {len(changes)} change the outputs, {least} the least: {output} by {change:.2g} (relative L2)"
    return Gate("inputs", True, 0, 0, told)


def _largest_change(subject: _Subject, run: _Run, name: str) -> tuple[float, str]:
    """Return by how much an input changes an output at most, and which; the first values that do so count."""
    largest, output, failure = 0.0, "", None
    for values in other_values(run.inputs[name]):
        try:
            found = subject.run({**run.inputs, name: values})
        except run_errors() as error:
            failure = error  # an index that a table has not, most likely
            continue
        for key, before in run.outputs.items():
            change = _change(found[key], before)
            if change > largest:
                largest, output = change, key
        if largest > INPUT_CHANGE:
            return largest, output
    if failure is not None and not output:
        raise failure
    return largest, output


def _outputs_gate(subject: _Subject, run: _Run) -> Gate:
    """Change all inputs at once; every output has to change."""
    found = subject.run({name: next(other_values(values)) for name, values in run.inputs.items()})
    still = [name for name, before in run.outputs.items() if not _change(found[name], before) > INPUT_CHANGE]
    if still:
        told = f"{', '.join(still)} stays the same whatever the inputs are"
        return Gate("outputs", False, len(still), 0, told, tuple(still))
    return Gate("outputs", True, 0, 0, f"all {len(run.outputs)} change with the inputs")


def _change(found: Array, before: Array) -> float:
    """Return the relative L2 between two outputs where both are finite; infinite where not the same places are."""
    one, other = np.asarray(found, np.float32).reshape(-1), np.asarray(before, np.float32).reshape(-1)
    if one.size != other.size or np.any(np.isfinite(one) != np.isfinite(other)):
        return float("inf")
    return relative_l2(one[np.isfinite(one)], other[np.isfinite(other)])


def _witness_gate(subject: _Subject, run: _Run) -> Gate:
    """Run the file as it is in onnx's ReferenceEvaluator and compare."""
    if subject.runner.instead:
        return skipped("second witness", f"only {subject.runner.name} takes the graph")
    if (count := elements_of(subject.model)) > WITNESS_ELEMENTS:
        why = f"{count} weights are too many for the ReferenceEvaluator; it takes {WITNESS_ELEMENTS}"
        return skipped("second witness", why)
    try:
        outputs = evaluator(subject.path, subject.model)(run.inputs)
    except EvaluatorFailed as refusal:
        return skipped("second witness", f"onnx's ReferenceEvaluator cannot run it: {refusal}")
    errors = {name: _change(run.outputs[name], values) for name, values in outputs.items()}
    worst = max(errors, key=lambda name: errors[name])
    told = f"{worst} differs by {errors[worst]:.3g} (relative L2) between ONNX Runtime and the ReferenceEvaluator"
    passed = errors[worst] <= END_TO_END_LIMIT
    return Gate("second witness", passed, errors[worst], END_TO_END_LIMIT, told, () if passed else (worst,))


def _shown(sizes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(size)}" for name, size in sizes.items())
