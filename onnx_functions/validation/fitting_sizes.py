"""Sizes that a graph can be run at: those that lint tries, and where none of them fits, a search for some that do.

Symbols may be tied by arithmetic (tokens that are height times width, a batch that is twice another) or have to be
multiples of something. The first node that does not fit says by which numbers; symbols are changed, one at a time, for
as long as that node comes later in the graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Final

from onnx_functions.graph.baked import Trial
from onnx_functions.graph.fit import Pair
from onnx_functions.graph.sizes import Sizes

__all__ = ["Numbers", "fitting_numbers"]

Numbers = Mapping[str, int]

_STEPS: Final = 16
"""Symbols that are changed at most."""

_SECONDS: Final = 30.0
"""How long the search may take."""

_USUAL: Final = (2, 3, 4, 5, 6, 7, 8, 12, 14, 16, 24, 28, 32, 48, 49, 64, 77, 96, 128, 256, 512, 1)
"""Numbers that are tried for a symbol; 1 last, for it fits nearly everywhere and shows little."""


def fitting_numbers(trials: list[Trial]) -> Iterator[tuple[Numbers, ...]]:
    """Yield numbers of a graph's symbols to run it at, two unlike each other where there are two; the likeliest first.

    Not all that fit on paper run: shape inference rounds what some operators refuse.

    Args:
        trials: of :func:`onnx_functions.graph.baked.small_trials`.
    """
    fitting = [trial for trial in trials if trial.fits]
    for trial in sorted(fitting, key=lambda found: _empty(found, found.first) or _empty(found, found.second)):
        yield trial.assignment.first, trial.assignment.second
    if not fitting:
        end = time.monotonic() + _SECONDS
        for trial in trials:
            found = _Search(trial, end).pair()
            if found:
                yield found


def _empty(trial: Trial, sizes: Sizes) -> bool:
    """Whether an output has no element, so that a run would show nothing."""
    return any(0 in (sizes.sizes.get(value.name) or ()) for value in trial.model.graph.output)


class _Search:
    """The search that begins at one trial's numbers."""

    def __init__(self, trial: Trial, end: float) -> None:
        self.trial, self.end = trial, end
        self.position = {name: at for at, node in enumerate(trial.model.graph.node) for name in node.output if name}
        self.whole = len(trial.model.graph.node)

    def pair(self) -> tuple[Numbers, ...]:
        """Return two assignments that fit and differ, one where no second is found, none where none is."""
        first = self.mended(self.trial.assignment.first, {})
        if first is None:
            return ()
        second = self.mended(self.trial.assignment.second, first)
        return (first,) if second is None or second == first else (first, second)

    def mended(self, numbers: Numbers, other: Numbers) -> Numbers | None:
        """Return numbers that fit, found by changing some; unlike `other` where that can be."""
        numbers, sizes = dict(numbers), self.trial.at(numbers)
        reached = self.reached(sizes)
        for _ in range(_STEPS):
            if reached > self.whole:
                return numbers
            best = self.best(numbers, sizes, reached, other)
            if best is None:
                return None
            numbers, sizes, reached = best
        return numbers if reached > self.whole else None

    def best(
        self, numbers: Numbers, sizes: Sizes, reached: int, other: Numbers
    ) -> tuple[dict[str, int], Sizes, int] | None:
        """Return the change of one symbol after which the graph fits furthest; None where no change helps."""
        best = None
        for name, number in self.changes(numbers, sizes, other):
            if time.monotonic() > self.end:
                return None
            changed = {**numbers, name: number}
            found = self.trial.at(changed)
            if (now := self.reached(found)) > reached:
                best, reached = (changed, found, now), now
            if reached > self.whole:
                break
        return best

    def reached(self, sizes: Sizes) -> int:
        """Return the place in the graph of the first node that does not fit, more than there are where all do."""
        if not sizes.misfits:
            return self.whole if _empty(self.trial, sizes) else self.whole + 1
        return min(self.position.get(next(filter(None, found.node.output), ""), 0) for found in sizes.misfits)

    def changes(self, numbers: Numbers, sizes: Sizes, other: Numbers) -> Iterator[tuple[str, int]]:
        """Yield the changes to try: what the two numbers of a misfit ask for, then the usual numbers."""
        misfit = next(iter(sizes.misfits), None)
        pair = next((pair for pair in sizes.pairs(misfit.node) if not pair.fits), None) if misfit is not None else None
        # The symbol that was named last is the likeliest to be made of the others.
        asked = [(name, number) for name in reversed(list(numbers)) for number in _asked(numbers[name], pair)]
        usual = [(name, number) for number in _USUAL for name in reversed(list(numbers))]
        moves = [(name, number) for name, number in [*asked, *usual] if number > 0 and number != numbers[name]]
        yield from dict.fromkeys((name, number) for name, number in moves if other.get(name) != number)
        yield from dict.fromkeys((name, number) for name, number in moves if other.get(name) == number)


def _asked(number: int, pair: Pair | None) -> Iterator[int]:
    """Yield what a symbol may have to be for two numbers to be equal: one of them, or moved as they are apart."""
    if pair is None or not (pair.found and pair.wanted):
        return
    if pair.bound == "divides":
        yield number * (pair.wanted // math.gcd(pair.found, pair.wanted))
        return
    yield from (pair.found, pair.wanted)
    for one, other in ((pair.found, pair.wanted), (pair.wanted, pair.found)):
        yield number + other - one
        if number * other % one == 0:
            yield number * other // one
