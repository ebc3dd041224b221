"""A denoising schedule that is timed call by call; the same for arrays of numpy and of torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Schedule", "Times", "summary", "timed"]

Call = Callable[[Mapping[str, Any]], Any]
"""Input to its array, to the first output, which is there when it returns."""


@dataclass(frozen=True)
class Schedule:
    """What is run.

    Attributes:
        steps: calls from noise to a picture.
        warmup: calls before any is timed for the result.
        repeats: of the whole schedule.
        state: the input that each call moves along the first output, where both have one shape.
        times: inputs that tell the time, with the time of pure noise.
    """

    steps: int
    warmup: int
    repeats: int
    state: str
    times: Mapping[str, float]

    @property
    def calls(self) -> int:
        """How often the model is called in all."""
        return self.warmup + self.steps * self.repeats


@dataclass(frozen=True)
class Times:
    """Seconds: of each warm-up call, of each call after them, and of each schedule with what lies between its calls."""

    warmup: tuple[float, ...]
    calls: tuple[float, ...]
    schedules: tuple[float, ...]


def timed(schedule: Schedule, inputs: Mapping[str, Any], call: Call, advance: Callable[[], None]) -> Times:
    """Run a schedule, and return how long its parts took.

    Args:
        schedule: what to run.
        inputs: of the first call.
        call: the model.
        advance: is called after each call.
    """
    warmup = []
    for _ in range(schedule.warmup):
        begun = time.perf_counter()
        call(inputs)
        warmup.append(time.perf_counter() - begun)
        advance()
    calls: list[float] = []
    schedules = []
    for _ in range(schedule.repeats):
        given, first = dict(inputs), time.perf_counter()
        for step in range(schedule.steps):
            for name, noise in schedule.times.items():
                given[name] = _as(inputs[name] * 0 + noise * (1 - step / schedule.steps), inputs[name])
            begun = time.perf_counter()
            velocity = call(given)
            calls.append(time.perf_counter() - begun)
            state = given[schedule.state]
            if velocity.shape == state.shape:
                given[schedule.state] = _as(state - velocity * (1 / schedule.steps), state)
            advance()
        schedules.append(time.perf_counter() - first)
    return Times(tuple(warmup), tuple(calls), tuple(schedules))


def _as(value: Any, like: Any) -> Any:
    """Return an array in the type of another: numpy computes with BF16 and a number in FP32."""
    return value.astype(like.dtype) if isinstance(value, np.ndarray) else value.to(like.dtype)


def summary(times: Times) -> dict[str, Any]:
    """Return the figures of a result, in seconds."""
    return {
        "first_call_s": times.warmup[0] if times.warmup else None,
        "warmup_s": list(times.warmup),
        "per_step": {
            "median_s": float(np.median(times.calls)),
            "p90_s": float(np.percentile(times.calls, 90)),
            "min_s": min(times.calls),
            "calls": len(times.calls),
        },
        "end_to_end": {"median_s": float(np.median(times.schedules)), "min_s": min(times.schedules)},
    }
