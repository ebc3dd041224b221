"""What can be said of a graph without a reference: it runs, follows its inputs, and two runtimes agree on it.

For graphs of third parties, which carry no promise and no checkpoint. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from fp4trt.errors import BadEnvironment, BadGraph, CannotRun
from fp4trt.free_memory import available_memory
from onnx_functions.graph.baked import baked_sizes
from onnx_functions.graph.external_data import BadSpan, load_graph, nbytes_of, span_of
from onnx_functions.graph.linears import metadata_of
from onnx_functions.graph.sizes import without_functions
from onnx_functions.graph.symbols import evaluated, symbolic_outputs
from onnx_functions.linting import require_form
from onnx_functions.validation.example_inputs import Array, other_values, require_tensors
from onnx_functions.validation.graph_runner import EvaluatorFailed, elements_of, evaluator, run_errors
from onnx_functions.validation.report import check_report_folder, write_report
from onnx_functions.validation.structure_gates import END_TO_END_LIMIT, INPUT_CHANGE, WITNESS_ELEMENTS
from onnx_functions.validation.third_party_runs import Run, Subject, Values, not_finite, runs_gate
from onnx_functions.validation.verdict import (
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
        report_dir, force, say: as in :func:`onnx_functions.validation.run_gates.validate`.

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
    subject = Subject(path, without_functions(model), require_tensors(model), partial(_require_memory, path))
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


def _require_data(subject: Subject) -> None:
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
    subject.require_memory(max(weights, _BYTES * elements_of(subject.model)))


def _require_readable(file: Path) -> None:
    try:
        with file.open("rb"):
            return
    except OSError as error:
        raise BadEnvironment(
            f"the graph's data {file} cannot be read ({error.strerror or error}); this says nothing of the graph: mend "
            "that and run the same command again"
        ) from error


def _require_memory(path: Path, need: int) -> None:
    free = available_memory()
    if free is not None and need > free:
        raise CannotRun(
            f"running {path.name} needs about {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are "
            "free here; validate it on a machine that has them"
        )


def _gates(subject: Subject) -> Iterator[Gate]:
    runs: list[Run] = []
    try:
        gate = runs_gate(subject, runs)
    except Exception as error:
        refuse_environment(error, "runs")
        if not isinstance(error, run_errors()):
            raise
        gate = failed_to_run("runs", error)
    yield gate
    if not gate.passed or not runs:
        yield from (skipped(name, "the graph could not be run") for name in _GATES)
        return
    yield _finite_gate(runs)
    yield _shapes_gate(subject, runs)
    moved: set[str] = set()
    yield from _guarded("inputs", lambda: _inputs_gate(subject, runs[0], moved))
    yield from _guarded("outputs", lambda: _outputs_gate(subject, runs[0], moved))
    yield _witness_gate(subject, runs[0])


def _guarded(name: str, check: Callable[[], Gate]) -> Iterator[Gate]:
    try:
        yield check()
    except Exception as error:
        refuse_environment(error, name)
        if not isinstance(error, run_errors()):
            raise
        yield failed_to_run(name, error)


def _finite_gate(runs: Sequence[Run]) -> Gate:
    offenders, bad, count = [], 0, 0
    for run in runs:
        for name, values in run.outputs.items():
            wrong = not_finite(values)
            count += np.size(values)
            bad += wrong
            if wrong:
                offenders.append((name, f"{wrong} of {np.size(values)} values are NaN or infinite at {run.shown}"))
    before = f", with {runs[0].drawn.told}; {runs[0].before}" if runs[0].before else ""
    told = f"{count} values of the outputs are finite{before}"
    return gate_of_offenders("finite", offenders, bad, 0, told, count=count)


def _shapes_gate(subject: Subject, runs: Sequence[Run]) -> Gate:
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


def _inputs_gate(subject: Subject, run: Run, moved: set[str]) -> Gate:
    """Change each input alone; every one has to change some output. Adds the outputs that change to `moved`."""
    if _nothing_finite(run):
        return skipped("inputs", f"no value of the outputs is finite, so no change can be seen, at {run.shown}")
    changes = {value.name: _largest_change(subject, run, value.name, moved) for value in subject.inputs}
    tried = {name: found for name, found in changes.items() if found is not None}
    without = [name for name, (change, _) in tried.items() if not change > INPUT_CHANGE]
    if without and any(not_finite(values) for values in run.outputs.values()):
        told = f"changing {', '.join(without)} changes no finite value, and others are NaN or infinite, at {run.shown}"
        return skipped("inputs", told)
    if without:
        told = f"changing {', '.join(without)} changes nothing in the outputs, at {run.shown}"
        return Gate("inputs", False, len(without), 0, told, tuple(without))
    stuck = [name for name in changes if name not in tried]
    left = f"the graph runs with no other values of {', '.join(stuck)} that were tried" if stuck else ""
    if not tried:
        return skipped("inputs", left)
    least = min(tried, key=lambda name: tried[name][0])
    change, output = tried[least]
    told = f"all {len(tried)} change the outputs, {least} the least: {output} by {change:.2g} (relative L2)"
    return Gate("inputs", True, 0, 0, f"{told}; {left}" if left else told)


def _largest_change(subject: Subject, run: Run, name: str, moved: set[str]) -> tuple[float, str] | None:
    """Return by how much an input changes an output at most, and which; the first values that do so count.

    Values for which an output is no longer finite count last, for they may be none that the model is made for. None
    where the graph runs with no other values.
    """
    largest, output, ran, lost = 0.0, "", False, ""
    for values in other_values(run.inputs[name], run.drawn):
        try:
            found = subject.run({**run.inputs, name: values})
        except run_errors():
            continue  # an index that a table has not, most likely
        ran = True
        for key, before in run.outputs.items():
            change = _change(found[key], before)
            if change > INPUT_CHANGE:
                moved.add(key)
            if np.isfinite(change) and change > largest:
                largest, output = change, key
            elif not np.isfinite(change):
                lost = key
        if largest > INPUT_CHANGE:
            return largest, output
    if lost:
        return float("inf"), lost
    if not ran:
        return None
    return max((largest, output), _change_beside_others(subject, run, name))


def _change_beside_others(subject: Subject, run: Run, name: str) -> tuple[float, str]:
    """Return by how much an input changes an output where the others are changed too, for one may hide another."""
    for inputs in _changed_at_once(run):
        try:
            one, other = subject.run(inputs), subject.run({**inputs, name: run.inputs[name]})
        except run_errors():
            continue
        for key, before in one.items():
            change = _change(other[key], before)
            if np.isfinite(change) and change > INPUT_CHANGE:
                return change, key
    return 0.0, ""


def _changed_at_once(run: Run) -> Iterator[Values]:
    """Yield inputs that are all unlike those of a run."""
    changed = {name: list(other_values(values, run.drawn)) for name, values in run.inputs.items()}
    for together in zip_longest(*changed.values()):
        # An input of fewer other values than another keeps the first of them.
        pairs = zip(changed, together, strict=True)
        yield {name: changed[name][0] if values is None else values for name, values in pairs}


def _outputs_gate(subject: Subject, run: Run, moved: set[str]) -> Gate:
    """Change all inputs at once; every output has to change, then or with one input alone (`moved`)."""
    if _nothing_finite(run):
        return skipped("outputs", f"no value of the outputs is finite, so no change can be seen, at {run.shown}")
    seen, ran = set(moved), bool(moved)
    for inputs in _changed_at_once(run):
        if seen >= run.outputs.keys():
            break
        try:
            found = subject.run(inputs)
        except run_errors():
            continue
        ran = True
        seen.update(name for name, before in run.outputs.items() if _change(found[name], before) > INPUT_CHANGE)
    still = [name for name, values in run.outputs.items() if name not in seen and not _all_lost(values)]
    if not ran:
        return skipped("outputs", "the graph runs with no other values of the inputs that were tried")
    if still:
        told = f"{', '.join(still)} stays the same whatever the inputs are"
        return Gate("outputs", False, len(still), 0, told, tuple(still))
    return Gate("outputs", True, 0, 0, f"all {len(run.outputs)} change with the inputs")


def _nothing_finite(run: Run) -> bool:
    """Whether no output has a finite value."""
    return all(_all_lost(values) for values in run.outputs.values())


def _all_lost(values: Array) -> bool:
    """Whether there are values, and none of them is finite."""
    return 0 < np.size(values) == not_finite(values)


def _change(found: Array, before: Array) -> float:
    """Return the relative L2 between two outputs where both are finite; infinite where not the same places are."""
    one, other = np.asarray(found, np.float32).reshape(-1), np.asarray(before, np.float32).reshape(-1)
    if one.size != other.size or np.any(np.isfinite(one) != np.isfinite(other)):
        return float("inf")
    return relative_l2(one[np.isfinite(one)], other[np.isfinite(other)])


def _witness_gate(subject: Subject, run: Run) -> Gate:
    """Run the file as it is in onnx's ReferenceEvaluator and compare."""
    if _nothing_finite(run):
        return skipped("second witness", "no value of the outputs is finite, so nothing can be compared")
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
