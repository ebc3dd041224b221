"""Which threshold, and how many steps to compute in any case: a grid, of which each schedule is tried once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from generation.step_caching.bench import Bench, Drawing
from generation.step_caching.fitting import Fit, fit
from generation.step_caching.recording import Distances
from generation.step_caching.settings import Decider, Model, Polynomial, Rule, StepCaching

__all__ = ["Asked", "Point", "candidates", "chosen", "evenly", "front", "planned", "tried"]

_THRESHOLDS: Final = 40
"""Thresholds for each pair of first and last steps, before those that skip the same steps are left out."""

_MOST: Final = 0.7
"""Share of the steps that a candidate leaves out, at most."""


@dataclass(frozen=True)
class Asked:
    """What is searched.

    Attributes:
        model: that it is for.
        steps: of the schedule.
        decider: whose signal is compared.
        reuse: what stands for the velocity.
        degree: of the polynomial.
        firsts: numbers of steps at the start to compute in any case.
        lasts: and at the end.
        most: candidates to try.
    """

    model: Model
    steps: int
    decider: Decider
    reuse: Rule
    degree: int
    firsts: tuple[int, ...]
    lasts: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class Point:
    """A candidate and what it drew."""

    settings: StepCaching
    fit: Fit
    drawing: Drawing

    def as_dict(self) -> dict[str, Any]:
        """Return its figures as JSON."""
        settings, drawing = self.settings, self.drawing
        figures = {key: round(float(drawing.figure(key) or 0), 4) for key in drawing.scores}
        chosen = {"threshold": settings.threshold, "first": settings.first, "last": settings.last}
        return {**chosen, "skipped": round(drawing.skipped, 3), **figures}


def planned(
    signal: Sequence[float], polynomial: Polynomial, threshold: float, asked: tuple[int, int]
) -> frozenset[int]:
    """Return the steps that are left out where the signals are as far apart as they were with all steps.

    Args:
        signal: [steps - 1], the distance of each step's signal to the one before.
        polynomial: from that to the output's.
        threshold: below which the sum stays.
        asked: steps at the start and at the end that are always computed.
    """
    first, last = asked
    total, skipped = 0.0, set()
    for step in range(first, len(signal) + 1 - last):
        total += polynomial(signal[step - 1])
        if total < threshold:
            skipped.add(step)
        else:
            total = 0.0
    return frozenset(skipped)


def candidates(distances: Distances, asked: Asked) -> list[tuple[StepCaching, Fit]]:
    """Return the settings to try: of those that would skip the same steps the first, and of too many some.

    Raises:
        BadInputs: the recorded steps are too few.
    """
    signal = distances.signal.mean(axis=1).tolist()
    found: dict[frozenset[int], tuple[StepCaching, Fit]] = {}
    for first in asked.firsts:
        fitted = fit(distances, asked.degree, first)
        costs = [fitted.polynomial(value) for value in signal[first - 1 :]]
        for last in asked.lasts:
            for threshold in np.geomspace(min(costs) * 1.01, sum(costs), _THRESHOLDS).tolist():
                rounded = float(f"{threshold:.4g}")
                skipped = planned(signal, fitted.polynomial, rounded, (first, last))
                if not skipped or skipped in found or len(skipped) > _MOST * asked.steps:
                    continue
                found[skipped] = _settings(asked, fitted, rounded, first, last), fitted
    ordered = [found[key] for key in sorted(found, key=lambda steps: (len(steps), sorted(steps)))]
    if len(ordered) <= asked.most:
        return ordered
    return [ordered[index] for index in np.linspace(0, len(ordered) - 1, asked.most).round().astype(int).tolist()]


def _settings(asked: Asked, fitted: Fit, threshold: float, first: int, last: int) -> StepCaching:
    return StepCaching(
        model=asked.model,
        steps=asked.steps,
        decider=asked.decider,
        polynomial=fitted.polynomial,
        threshold=threshold,
        first=first,
        last=last,
        reuse=asked.reuse,
    )


def tried(bench: Bench, settings: Sequence[tuple[StepCaching, Fit]], advance: Callable[[], None]) -> list[Point]:
    """Draw with each of some settings."""
    points = []
    for one, fitted in settings:
        points.append(Point(one, fitted, bench.draw(one)))
        advance()
    return points


def front(points: Sequence[Point], key: str) -> list[Point]:
    """Return the points that no other one beats in both steps and image error, by the steps that they leave out.

    Args:
        points: of all candidates.
        key: of the metric, of which more is better.
    """
    best: list[Point] = []
    ordered = sorted(points, key=lambda point: (-point.drawing.skipped, -(point.drawing.figure(key) or 0)))
    for point in ordered:
        if not best or (point.drawing.figure(key) or 0) > (best[-1].drawing.figure(key) or 0):
            best.append(point)
    return best[::-1]


def chosen(points: Sequence[Point], share: float, key: str) -> Point | None:
    """Return the point nearest to the pictures of all steps among those that leave out a share; None without one."""
    enough = [point for point in points if point.drawing.skipped >= share * point.settings.steps - 1e-9]
    return max(enough, key=lambda point: (point.drawing.figure(key) or 0, point.drawing.skipped), default=None)


def evenly(steps: int, count: int, first: int = 1, last: int = 1) -> frozenset[int]:
    """Return which steps skipping every n-th one leaves out: so many, evenly, none of the first and the last ones."""
    between = range(first, steps - last)
    count = min(count, len(between))
    return frozenset(between[int((index + 0.5) * len(between) / count)] for index in range(count))
