"""Whether a graph follows the symbolic sizes of its inputs, or serves the sizes of one example alone.

A graph is tried at pairs of sizes. One pair without a misfit is enough, for symbols may have to be equal, or multiples
of something. Where there is none, a misfit is the graph's fault if a number that varies meets one that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import onnx
from onnx import NodeProto

from onnx_functions.graph.fit import Pair
from onnx_functions.graph.index import Index, name_of
from onnx_functions.graph.sizes import Misfit, Size, Sizes, sizes_at, without_functions
from onnx_functions.graph.symbols import (
    Assignment,
    Symbolic,
    assignments,
    evaluated,
    filled,
    symbolic_inputs,
    symbolic_outputs,
)

__all__ = ["Baked", "Trial", "baked_sizes", "small_trials"]

_BAKERS: Final = ("Expand", "GatherND", "Gather", "Pad", "Reshape", "Resize", "Slice", "Split", "Tile")
"""Operators that can give a tensor a size that a constant decides."""


@dataclass(frozen=True)
class Baked:
    """A size that does not follow the inputs: at which node or tensor, and what was found.

    `wrong` is False where the graph computes the right size and only declares another.
    """

    node: str
    tensor: str
    message: str
    wrong: bool = True


@dataclass(frozen=True)
class Trial:
    """A graph at two sizes of its inputs."""

    model: onnx.ModelProto
    directory: Path
    inputs: Mapping[str, Symbolic]
    assignment: Assignment

    @cached_property
    def index(self) -> Index:
        """The index over its nodes."""
        return Index(self.model)

    @cached_property
    def first(self) -> Sizes:
        """The sizes at the first of each pair."""
        return sizes_at(self.model, filled(self.inputs, self.assignment.first), self.directory)

    @cached_property
    def second(self) -> Sizes:
        """The sizes at the second of each pair."""
        return self.at(self.assignment.second)

    @property
    def fits(self) -> bool:
        """Whether every node can take both sizes, as far as that is known."""
        return not self.first.misfits and not self.second.misfits

    def at(self, numbers: Mapping[str, int]) -> Sizes:
        """Return the graph's sizes where its symbols have some numbers."""
        return sizes_at(self.model, filled(self.inputs, numbers), self.directory, self.first)

    def varies(self, tensor: str) -> bool:
        """Whether a tensor has two sizes; False where one is not known."""
        one, other = self.first.whole(tensor), self.second.whole(tensor)
        return one is not None and other is not None and one != other

    @cached_property
    def fault(self) -> Misfit | None:
        """The first misfit that no other relation between the symbols would mend; None where there is none."""
        here, there = (self.first, self.second) if self.first.misfits else (self.second, self.first)
        misfit = next((found for found in here.misfits), None)
        if misfit is None:
            return None
        pairs = here.pairs(misfit.node)
        position = next((index for index, pair in enumerate(pairs) if not pair.fits), None)
        if position is None or pairs[position].bound == "divides":  # a multiple of something that was not tried
            return None
        pair = pairs[position]
        elsewhere = there.pairs(misfit.node)
        if position < len(elsewhere):
            moved = (elsewhere[position].found != pair.found, elsewhere[position].wanted != pair.wanted)
            if moved[0] != moved[1]:
                return misfit  # what varies meets what does not, though every symbol was changed
        return misfit if self._of_one_symbol(misfit, position, pair) else None

    def _of_one_symbol(self, misfit: Misfit, position: int, pair: Pair) -> bool:
        """Whether one symbol at most decides by how much two numbers of a node differ."""
        numbers, other = self.assignment.first, self.assignment.second
        if not self.first.misfits:
            numbers, other = other, numbers
        read = {*misfit.reads, *(name for node in self.index.above(*misfit.reads) for name in node.input)}
        moving = set()
        for name in {n for tensor, size in self.inputs.items() if tensor in read for n in size} & numbers.keys():
            now = self.at({**numbers, str(name): other[str(name)]}).pairs(misfit.node)
            if position >= len(now):
                return False  # it does not get so far: nothing can be said
            if pair.found * now[position].wanted != now[position].found * pair.wanted:
                moving.add(name)
        return len(moving) <= 1


def baked_sizes(model: onnx.ModelProto, directory: Path) -> list[Baked]:
    """Return where a graph with symbolic inputs does not follow them.

    Args:
        model: its nodes come in order.
        directory: where its external data lie; of small integers alone they are read.
    """
    trials: list[Trial] = []
    for trial in _trials(model, directory):
        if trial.fits:
            return list(_outputs(trial))
        trials.append(trial)
    faults = [trial.fault for trial in trials if trial.first.misfits or trial.second.misfits]
    known = [fault for fault in faults if fault is not None]
    if not known:
        return []
    told = known[-1]
    tried = f"at any two sizes of {_symbols(trials[0])} that were tried"
    return [Baked(told.name, told.reads[0], f"{told.message} {tried}")]


def small_trials(model: onnx.ModelProto, directory: Path) -> list[Trial]:
    """Return the pairs of sizes to try that a graph can be run at; none for a graph without symbols."""
    return list(_trials(model, directory, small=True))


def _trials(model: onnx.ModelProto, directory: Path, small: bool = False) -> Iterator[Trial]:
    inputs = symbolic_inputs(model)
    model = without_functions(model)
    if any(isinstance(n, str) for size in inputs.values() for n in size):
        for assignment in assignments(inputs):
            if not (small and assignment.large):
                yield Trial(model, directory, inputs, assignment)


def _symbols(trial: Trial) -> str:
    return ", ".join(trial.assignment.first)


def _outputs(trial: Trial) -> Iterator[Baked]:
    """Yield the outputs that have other sizes than declared, or one size that a cut decides."""
    for name, declared in symbolic_outputs(trial.model).items():
        one, other = trial.first.sizes.get(name), trial.second.sizes.get(name)
        if one is None or other is None or len(one) != len(declared) or len(other) != len(declared):
            continue
        wanted = (evaluated(declared, trial.assignment.first), evaluated(declared, trial.assignment.second))
        odd = [axis for axis in range(len(declared)) if _differs(axis, (one, other), wanted)]
        above = trial.index.above(name)
        if wrong := [axis for axis in odd if isinstance(declared[axis], str)]:
            yield _undeclared(trial, name, declared, wrong[0], _maker(trial, above))
        elif cut := next((node for node in above if _cuts(trial, node, name)), None):
            kept = f"the output {name} is {_shown(one, other)} whatever {_symbols(trial)} are"
            yield Baked(name_of(cut), name, f"{kept}: the {cut.op_type} takes as much as one example had")
        elif odd:
            found = (
                f"axis {odd[0]} of the output {name} is declared as {declared[odd[0]]} and follows {_symbols(trial)}"
            )
            yield Baked("", name, f"{found}: {one[odd[0]]} and {other[odd[0]]} were computed", wrong=False)


def _undeclared(trial: Trial, name: str, declared: Symbolic, axis: int, maker: NodeProto | None) -> Baked:
    given = dict.fromkeys(sizes.sizes[name][axis] for sizes in (trial.first, trial.second))
    expected = [evaluated(declared, numbers)[axis] for numbers in (trial.assignment.first, trial.assignment.second)]
    found = f"axis {axis} of the output {name} is {' and '.join(map(str, given))}"
    return Baked(
        name_of(maker) if maker is not None else "",
        name,
        f"{found} where {declared[axis]}, as declared, is {expected[0]} and {expected[1]}",
    )


def _differs(axis: int, found: tuple[Size, Size], wanted: tuple[Size, Size]) -> bool:
    return any(
        one[axis] is not None and other[axis] is not None and one[axis] != other[axis]
        for one, other in zip(found, wanted, strict=True)
    )


def _maker(trial: Trial, above: Sequence[NodeProto]) -> NodeProto | None:
    """Return the likeliest maker of a wrong size: the first node that loses one that varied, or the last that could.

    None where nothing above an output could.
    """
    found = [node for node in above if node.op_type in _BAKERS and node.input and trial.varies(node.input[0])]
    losing = [node for node in found if _varying(trial, node.output[0]) < _varying(trial, node.input[0])]
    return losing[0] if losing else found[-1] if found else None


def _varying(trial: Trial, tensor: str) -> int:
    """Return how many axes of a tensor vary."""
    one, other = trial.first.whole(tensor), trial.second.whole(tensor)
    return sum(a != b for a, b in zip(one or (), other or (), strict=False))


def _cuts(trial: Trial, node: NodeProto, output: str) -> bool:
    """Whether a node cuts an axis that varies to several elements, a number that no symbol moves in the output either.

    Not one that takes back what a Concat has put before or behind what varies, as learned tokens.
    """
    if node.op_type not in ("Slice", "Gather") or not node.input or not trial.varies(node.input[0]):
        return False
    before, after, last = (trial.first.whole(name) for name in (node.input[0], node.output[0], output))
    if before is None or after is None or last is None or len(before) != len(after):
        return False
    other = trial.second.whole(node.input[0]) or before
    kept = trial.second.whole(node.output[0]) or after
    axes = [
        axis
        for axis, n in enumerate(after)
        if before[axis] != other[axis] and n == kept[axis] and n > 1 and n in last and not _joined(trial, node, n)
    ]
    if not axes:
        return False
    numbers = trial.assignment.first
    for name in numbers:
        moved = trial.at({**numbers, name: trial.assignment.second[name]})
        now = moved.whole(node.input[0])
        if now is not None and any(now[axis] != before[axis] for axis in axes) and moved.whole(output) == last:
            return True
    return False


def _joined(trial: Trial, node: NodeProto, count: int) -> bool:
    """Whether a Concat above a node has put as many elements of a fixed number beside what varies."""
    for above in trial.index.above(node.output[0]):
        if above.op_type == "Concat" and trial.varies(above.output[0]):
            sizes = [(trial.first.whole(name) or (), trial.second.whole(name) or ()) for name in above.input]
            if any(a == b == count for one, other in sizes for a, b in zip(one, other, strict=False)):
                return True
    return False


def _shown(one: Size, other: Size) -> str:
    """Return a size with a question mark for what varies."""
    return f"[{', '.join(str(a) if a == b else '?' for a, b in zip(one, other, strict=True))}]"
