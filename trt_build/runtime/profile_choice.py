"""Which of an engine's optimization profiles serves a call, and which input keeps all of them from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4trt.errors import BadCall

__all__ = ["Served", "profile_for", "served_by"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Served:
    """The shapes of one input that a profile serves, and the one that its kernels were chosen for."""

    low: Shape
    best: Shape
    high: Shape

    def __contains__(self, shape: Shape) -> bool:
        return len(shape) == len(self.low) and all(
            low <= size <= high for low, size, high in zip(self.low, shape, self.high, strict=True)
        )

    def __str__(self) -> str:
        if self.low == self.high:
            return str(list(self.low))
        return f"{list(self.low)} to {list(self.high)}"


def served_by(engine: Any, inputs: Sequence[str]) -> tuple[Mapping[str, Served], ...]:
    """Return what each profile of an ``ICudaEngine`` serves, by input."""
    return tuple(
        {
            name: Served(
                *(tuple(int(size) for size in shape) for shape in engine.get_tensor_profile_shape(name, number))
            )
            for name in inputs
        }
        for number in range(engine.num_optimization_profiles)
    )


def profile_for(profiles: Sequence[Mapping[str, Served]], shapes: Mapping[str, Shape]) -> int:
    """Return the number of the profile that serves a call and whose best shapes are nearest; the first of equals.

    Raises:
        BadCall: none does; names of each profile the input that it does not take.
    """
    fit = [number for number, profile in enumerate(profiles) if all(shapes[name] in profile[name] for name in profile)]
    if fit:
        return min(fit, key=lambda number: (_distance(profiles[number], shapes), number))
    several = len(profiles) > 1
    told = []
    for number, profile in enumerate(profiles):
        name = next(name for name in profile if shapes[name] not in profile[name])
        who = f"profile {number}" if several else "the engine"
        told.append(f"{who} takes {name} {profile[name]}, and it is {list(shapes[name])}")
    raise BadCall(f"{'; '.join(told)}: build the engine for that size, with --resolution, --batch, --text or --profile")


def _distance(profile: Mapping[str, Served], shapes: Mapping[str, Shape]) -> int:
    return sum(
        abs(size - best)
        for name, served in profile.items()
        for size, best in zip(shapes[name], served.best, strict=True)
    )
