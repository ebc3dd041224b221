"""The builder's nested phases as one fraction between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

__all__ = ["PhaseTree"]

# Share of the steps -> share of the time, of a build of 0.4 GB of weights with TensorRT-RTX 1.7.1.
_PACE = ((0.0, 0.0), (0.833, 0.05), (0.866, 0.55), (1.0, 1.0))
_COMPILING = "Determining refit engines"  # the kernels are compiled in this phase, whatever it is called
_LABELS = {_COMPILING: "compiling kernels"}


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class PhaseTree:
    """Follows TensorRT's IProgressMonitor: phases with steps, each step of which may hold further phases.

    TensorRT counts all steps alike, though five sixths of them pass in the first moments of a build: `_PACE`
    stretches the rest.
    """

    def __init__(self) -> None:
        self._active: dict[str, _Phase] = {}
        self._fraction = 0.0
        self._compiled = False

    @property
    def fraction(self) -> float:
        """Estimated share of the whole time, 0 to 1; never decreases."""
        share, parent, reached = 1.0, None, 0.0
        while inner := self._child_of(parent):
            name, phase = inner
            share /= max(phase.steps, 1)
            reached += share * min(phase.done, phase.steps)
            parent = name
        self._fraction = min(max(self._fraction, _paced(reached)), 1.0)
        return self._fraction

    @property
    def phase(self) -> str:
        """What the builder does, in words: the innermost running phase."""
        if self._compiled:
            return "writing the engine"
        name = next(reversed(self._active), "")
        return _LABELS.get(name, name.lower())

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Enter a phase."""
        self._active[name] = _Phase(parent, steps)

    def step(self, name: str, index: int) -> None:
        """Count step `index` of a phase as done."""
        if name in self._active:
            self._active[name].done = index + 1

    def finish(self, name: str) -> None:
        """Leave a phase; the root's end is the end of the build."""
        phase = self._active.pop(name, None)
        self._compiled = self._compiled or name == _COMPILING
        if phase is not None and phase.parent is None:
            self._fraction = 1.0

    def _child_of(self, parent: str | None) -> tuple[str, _Phase] | None:
        children = [(name, phase) for name, phase in self._active.items() if phase.parent == parent]
        return children[-1] if children else None


def _paced(steps: float) -> float:
    """Interpolate in _PACE."""
    for (x0, y0), (x1, y1) in pairwise(_PACE):
        if steps <= x1:
            return y0 + (y1 - y0) * (steps - x0) / (x1 - x0)
    return 1.0
