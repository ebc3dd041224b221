"""Gates on one block at a time, in memory for one block: what FLUX.1-dev needs on a machine that cannot hold it.

Block by block the reference runs in torch (`torch_reference.Walk`), and the graph's piece in ONNX Runtime on the same
external data. Each finished block is kept on disk until the report is written, so that a killed validation resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch

from calibration.by_block.progress import BlockCheckpoint, finished_blocks
from fp4trt.progress import tracking
from onnx_functions.graph.attentions import Attention, find_attentions
from onnx_functions.graph.index import Index
from onnx_functions.graph.linears import Linear
from onnx_functions.validation import teacher_gates
from onnx_functions.validation.attention_gates import AttentionForced, compare_attention
from onnx_functions.validation.block_structure import block_structure, entering
from onnx_functions.validation.structure_gates import Run
from onnx_functions.validation.teacher_gates import TeacherForced, block_of
from onnx_functions.validation.torch_reference import (
    Inputs,
    Outputs,
    Reference,
    Shape,
    Values,
    Walk,
    attention_teacher_of,
    name_of,
    teacher_of,
)
from onnx_functions.validation.verdict import Gate, guarded

__all__ = ["ByBlock", "Task", "check_by_block", "structure_by_block"]

_OUTSIDE = ""
"""Stands for what lies outside the blocks, which comes last."""


@dataclass(frozen=True)
class ByBlock:
    """What was found block by block.

    Attributes:
        results: of every linear.
        failure: the gate of a block whose linears could not be run, None where all could.
        structure: a gate for each block; none where the structure was not asked for.
        structure_errors: of each linear.
        attentions: of every attention in FP8.
    """

    results: Sequence[TeacherForced]
    failure: Gate | None
    structure: Sequence[Gate]
    structure_errors: Mapping[str, float]
    attentions: Sequence[AttentionForced]


@dataclass(frozen=True)
class Task:
    """What is to be checked.

    Attributes:
        graph: the deployable graph.
        folder: where its external data lie.
        held: the reference.
        linears: to be checked, all in `blocks` or outside.
        blocks: to be checked, in the order in which they run; the last block is among them.
        teacher: shape of the run in BF16.
        structure: shapes of the runs in FP32 on which the structure is checked; none leaves it out.
        limit: of the structure.
    """

    graph: onnx.ModelProto
    folder: Path
    held: Reference
    linears: tuple[Linear, ...]
    blocks: tuple[str, ...]
    teacher: Shape
    structure: tuple[Shape, ...]
    limit: float

    @cached_property
    def _attentions(self) -> tuple[Attention, ...]:
        return find_attentions(Index(self.graph))

    @cached_property
    def known(self) -> frozenset[str]:
        """All blocks of the reference."""
        return frozenset(self.held.blocks)

    def attentions(self, block: str) -> list[Attention]:
        """Return the attentions of a block that are written out."""
        return [attention for attention in self._attentions if block and attention.path.startswith(f"{block}.")]

    def members(self, block: str) -> list[Linear]:
        """Return the linears of a block."""
        return [linear for linear in self.linears if block_of(linear.path, self.known) == block]


def check_by_block(task: Task, work: Path, identity: Mapping[str, Any]) -> ByBlock:
    """Check every block, and what lies outside them.

    Args:
        task: what.
        work: folder for finished blocks, as :func:`calibration.by_block.progress.finished_blocks` has it.
        identity: what must be the same for a killed run to resume.

    Raises:
        OutputExists: `work` is somebody else's.
    """
    steps = [*task.blocks, _OUTSIDE]
    with finished_blocks(work, identity) as finished:
        checker = _Checker(task, finished)
        with tracking(len(steps), "blocks") as advance:
            advance(len(finished.results))
            for block in steps[len(finished.results) :]:
                checker.check(block)
                advance()
        return _collected(task, finished.results)


class _Checker:
    """Runs reference and graph side by side; both continue from the outputs of the reference's last block."""

    def __init__(self, task: Task, finished: BlockCheckpoint) -> None:
        held = task.held
        self._task, self._finished = task, finished
        self._teacher = Walk(held, torch.bfloat16, quantize_activations=True)
        self._plain = Walk(held, torch.float32, quantize_activations=False) if task.structure else None
        self._teacher_call = held.example(task.teacher, torch.bfloat16)
        self._calls = [held.example(shape, torch.float32) for shape in task.structure]

    def check(self, block: str) -> None:
        """Check a block and keep what was found."""
        before = [self._finished.outputs(call) for call in range(1 + len(self._calls))]
        ((values, after),) = _run(self._teacher, block, [(self._teacher_call, before[0])])
        result, outputs = self._linears(block, values), [after]
        del values
        if self._plain is not None:
            ran = list(_run(self._plain, block, list(zip(self._calls, before[1:], strict=True))))
            result["structure"] = self._structure(block, before[1:], ran)
            outputs += [after for _, after in ran]
        for each in outputs:
            self._finished.add(each)
        self._finished.finish(block, result)

    def _linears(self, block: str, values: Values) -> dict[str, Any]:
        """Return the figures of linears and attentions, fed as the reference's are, or the gate of what did not run."""
        task, members = self._task, self._task.members(block)
        rows: list[Any] = []
        attentions: list[dict[str, Any]] = []

        def gates() -> Iterator[Gate]:
            teacher = teacher_of(task.graph, task.folder, task.held, members, values)
            compared = teacher_gates.compare_block(task.graph, task.folder, members, teacher) if members else ()
            rows.extend((r.linear.path, r.compared, r.differing, r.error, r.module_error) for r in compared)
            for attention in task.attentions(block):
                told = attention_teacher_of(task.held, attention.path, values)
                if told is not None:
                    attentions.append(asdict(compare_attention(task.graph, task.folder, attention, told)))
            yield from ()

        failures = guarded("teacher-forced", gates)
        return {"linears": rows, "attentions": attentions, "failure": asdict(failures[0]) if failures else None}

    def _structure(
        self, block: str, before: Sequence[Outputs], ran: Sequence[tuple[Values, Outputs]]
    ) -> dict[str, Any] | None:
        """Return what the comparison of the block's structure says; None behind a block that cannot be compared."""
        task = self._task
        found: dict[str, Any] = {}

        def gates() -> Iterator[Gate]:
            fed = self._fed(block)
            if fed is None:
                return
            runs = []
            for shape, call, entered, (values, _) in zip(task.structure, self._calls, before, ran, strict=True):
                inputs = task.held.arrays(call) | {name: entered[place].float().numpy() for place, name in fed.items()}
                runs.append(Run(name_of(shape), inputs, values))
            checked = block_structure(task.graph, task.folder, block, task.members(block), runs, task.limit, task.known)
            given = sum(path == block and what.startswith("output ") for path, what in values)
            found.update(errors=checked.errors, leaving=checked.leaving, outputs=given)
            yield checked.gate

        for gate in guarded("structure", gates):
            return {"gate": asdict(gate), "errors": {}, "leaving": {}, **found}
        return None

    def _fed(self, block: str) -> dict[int, str] | None:
        """Return the graph's tensors that stand for what blocks gave that is still read; None where one is not known.

        They are numbered as the outputs of :class:`calibration.by_block.runner.BlockRunner` are.
        """
        fed: dict[int, str] = {}
        first = 0
        for last in self._read_blocks(block):
            checked = next((one for one in reversed(self._finished.results) if _stack(one) == _stack(last)), None)
            structure = self._finished.results[checked]["structure"] if checked is not None else None
            if checked is None or not structure or not structure["leaving"]:
                return None
            leaving = {int(place): name for place, name in structure["leaving"].items()}
            found = entering(self._task.graph, leaving, checked, last, self._task.known)
            fed |= {first + place: name for place, name in found.items()}
            first += structure["outputs"]
        return fed

    def _read_blocks(self, block: str) -> list[str]:
        """Return the blocks whose outputs are read by one or behind it: the one before, and the last of kept stacks."""
        held = self._task.held
        blocks, read_by = held.blocks, held.checkpoint.family.read_by
        position = blocks.index(block) if block else len(blocks)
        last = {_stack(one): one for one in blocks[:position]}
        behind = {_stack(one) for one in blocks[position:]} - ({_stack(blocks[position - 1])} if position else set())
        return [one for stack, one in last.items() if one == blocks[position - 1] or read_by.get(stack) in behind]


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


def _run(walk: Walk, block: str, calls: Sequence[tuple[Inputs, Outputs]]) -> Iterator[tuple[Values, Outputs]]:
    """Run a block of the reference, or what lies outside the blocks, on every call."""
    if block:
        yield from walk.block(block, calls)
        return
    for call, before in calls:
        yield walk.finish(call, before), ()


def _collected(task: Task, found: Mapping[str, Any]) -> ByBlock:
    linears = {linear.path: linear for linear in task.linears}
    rows = {row[0]: TeacherForced(linears[row[0]], *row[1:]) for result in found.values() for row in result["linears"]}
    failures = [_gate(result["failure"]) for result in found.values() if result["failure"]]
    compared = [result["structure"] for result in found.values() if result.get("structure")]
    errors = {path: error for each in compared for path, error in each["errors"].items() if path in linears}
    ordered = [rows[path] for path in linears if path in rows]
    structure = [_gate(each["gate"]) for each in compared]
    attentions = [AttentionForced(**row) for result in found.values() for row in result["attentions"]]
    return ByBlock(ordered, next(iter(failures), None), structure, errors, attentions)


def _gate(fields: Mapping[str, Any]) -> Gate:
    return Gate(**{**fields, "offenders": tuple(fields["offenders"])})


def structure_by_block(task: Task, gates: Sequence[Gate]) -> Gate:
    """Return the gate on the structure of all blocks, given that of each that was checked."""
    failed = [gate for gate in gates if not gate.passed]
    worst = max((gate.figure for gate in gates), default=0.0)
    if failed:
        left = len(task.blocks) + 1 - len(gates)
        more = f"; {len(failed) - 1} more pieces fail" if failed[1:] else ""
        more += f"; {left} behind it are not checked" if left else ""
        return replace(failed[0], detail=failed[0].detail + more)
    shapes = " and ".join(name_of(shape) for shape in task.structure)
    told = f"{len(task.blocks)} blocks and what lies outside them, each on the reference's inputs, "
    told += f"largest relative L2 error {worst:.2g}, at {shapes}"
    return Gate("structure", True, worst, task.limit, told)
