"""The runs of a third party's graph: at sizes that it accepts, with values for which its outputs are finite.

Sizes and values are made up, so a graph is not blamed for them: where none are found that it accepts, it was not run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import onnx

from onnx_functions.graph.baked import baked_sizes, small_trials
from onnx_functions.graph.sizes import Misfit, sizes_at
from onnx_functions.graph.symbols import Symbolic, filled, symbolic_inputs
from onnx_functions.validation.example_inputs import RANGES, Array, Range, example_inputs
from onnx_functions.validation.fitting_sizes import Numbers, fitting_numbers
from onnx_functions.validation.graph_runner import CannotOpen, Runner, run_errors, runner
from onnx_functions.validation.verdict import Gate, failed_to_run, not_run

__all__ = ["Run", "Subject", "Values", "not_finite", "runs_gate"]

Values = Mapping[str, Array]


@dataclass(frozen=True)
class Run:
    """One run: the sizes of the inputs, for people, what went in and what came out.

    Attributes:
        drawn: where the values of the inputs were drawn from.
        before: what went wrong with the values that were tried before; "" where none were.
    """

    sizes: Mapping[str, Sequence[int]]
    numbers: Numbers
    inputs: Values
    outputs: Values
    drawn: Range = RANGES[0]
    before: str = ""

    @property
    def shown(self) -> str:
        """The sizes of the inputs, for people."""
        return _shown(self.sizes)


@dataclass(frozen=True)
class Subject:
    """A graph of a third party.

    Attributes:
        path: its file.
        model: without functions; external data not loaded.
        inputs: those that are no initializers.
        require_memory: refuses to use more bytes than are free.
    """

    path: Path
    model: onnx.ModelProto
    inputs: Sequence[onnx.ValueInfoProto]
    require_memory: Callable[[int], None]

    @cached_property
    def runner(self) -> Runner:
        """What runs the graph."""
        return runner(self.path, self.model)

    @cached_property
    def declared(self) -> dict[str, Symbolic]:
        """The sizes of the inputs, as declared."""
        return symbolic_inputs(self.model)

    def run(self, inputs: Values) -> Values:
        """Return the outputs for inputs in the graph's own types."""
        return self.runner.run(inputs)


_INPUT_BYTES: Final = 32
"""Bytes of memory for each number that goes in: as FP64 and as what it is, twice."""


def runs_gate(subject: Subject, runs: list[Run]) -> Gate:
    """Run the graph at two sizes, adding to `runs`; one that cannot be run here passes nothing and fails nothing."""
    try:
        where = subject.runner.name  # what is wrong with the graph as such is no matter of sizes
    except CannotOpen as error:
        return not_run("runs", str(error))
    where += f", for ONNX Runtime cannot ({subject.runner.instead})" if subject.runner.instead else ""
    trials = small_trials(subject.model, subject.path.parent)
    first = trials[0].assignment.first if trials else {}
    if lacking := [value.name for value in subject.inputs if value.name not in filled(subject.declared, first)]:
        size = ", ".join(map(str, subject.declared[lacking[0]]))
        told = f"the input {lacking[0]} has the size [{size}], for which there are no numbers: nothing can be put in"
        return not_run("runs", told)
    if not any(trial.fits for trial in trials) and (fault := _baked(subject, first)) is not None:
        return fault
    refusals: list[str] = []
    for numbers in fitting_numbers(trials) if trials else [({},)]:
        runs.extend(_run_at(subject, numbers, refusals))
        if runs:
            more = _alone(runs) if trials else ""
            return Gate("runs", True, 0, 0, f"at {' and at '.join(run.shown for run in runs)}{more}, in {where}")
    return _refused(subject, first, refusals)


def _alone(runs: Sequence[Run]) -> str:
    """Return which symbols have one number in all runs, for people; "" where each has two."""
    same = [f"{name} {n}" for name, n in runs[0].numbers.items() if all(run.numbers.get(name) == n for run in runs)]
    return f" (no other number than {', '.join(same)} was found to fit)" if same else ""


def _baked(subject: Subject, first: Numbers) -> Gate | None:
    """Return the gate of a graph that no sizes fit for a reason that no numbers mend; None where that is not known."""
    sizes = filled(subject.declared, first)
    misfit = _misfit(subject, sizes)
    faults = [found for found in baked_sizes(subject.model, subject.path.parent) if found.wrong]
    if misfit is None or (first and not faults):
        return None
    name, told = misfit.name, f"not at {_shown(sizes)}: {misfit.message}"
    if first and faults[0].node != name:  # another node does not fit either, which other numbers would mend
        name, told = faults[0].node or faults[0].tensor, faults[0].message
    return Gate("runs", False, float("inf"), 0, told, (name,))


def _refused(subject: Subject, first: Numbers, refusals: Sequence[str]) -> Gate:
    """Return the gate of a graph that ran nowhere, which may be for the sizes and values that were made up."""
    if refusals and subject.runner.instead:
        why = f"ONNX Runtime cannot ({subject.runner.instead}), nor can {subject.runner.name}, {refusals[0]}"
        return not_run("runs", why)
    if refusals:
        return not_run("runs", f"no sizes and values were found that the graph accepts; {refusals[0]}")
    sizes = filled(subject.declared, first)
    misfit = _misfit(subject, sizes)
    told = f"; not at {_shown(sizes)}: {misfit.message}" if misfit is not None else ""
    return not_run("runs", f"no sizes were found that the graph accepts{told}")


def _misfit(subject: Subject, sizes: Mapping[str, Sequence[int]]) -> Misfit | None:
    return next(iter(sizes_at(subject.model, sizes, subject.path.parent).misfits), None)


def _run_at(subject: Subject, pair: Sequence[Numbers], refusals: list[str]) -> Sequence[Run]:
    """Return the runs at some sizes with the first values for which all outputs are finite; as they are without any."""
    kept: list[Run] = []
    reason = ""
    for drawn in RANGES:
        try:
            found = [_one(subject, numbers, seed, drawn, reason) for seed, numbers in enumerate(pair)]
        except run_errors() as error:
            refusal = failed_to_run("runs", error).detail
            sizes = ", then ".join(_shown(filled(subject.declared, numbers)) for numbers in pair)
            refusals.append(f"at {sizes}: {refusal.removeprefix('could not be run: ')}")
            reason = reason or f"with {drawn.told} it does not run: {refusal.removeprefix('could not be run: ')}"
            continue
        bad = sum(not_finite(values) for run in found for values in run.outputs.values())
        if not bad:
            return found
        reason = reason or f"with {drawn.told} {bad} values are NaN or infinite"
        kept = kept or found
    return kept


def _one(subject: Subject, numbers: Numbers, seed: int, drawn: Range, before: str) -> Run:
    sizes = filled(subject.declared, numbers)
    subject.require_memory(sum(_INPUT_BYTES * math.prod(size) for size in sizes.values()))
    inputs = example_inputs(subject.inputs, sizes, seed, drawn)
    return Run(sizes, numbers, inputs, subject.run(inputs), drawn, before)


def not_finite(values: Array) -> int:
    """Return how many of some values are NaN or infinite."""
    return int((~np.isfinite(np.asarray(values, np.float64))).sum())


def _shown(sizes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {list(size)}" for name, size in sizes.items())
