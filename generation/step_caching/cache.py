"""A transformer that leaves out steps: decides before the call, and answers from what was computed before."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from fp4trt.errors import BadInputs, BadOption
from fp4trt.families import Transformer
from fp4trt.progress import note
from generation.step_caching.deciders import (
    Signal,
    latents_name,
    relative_distance,
    signal_of,
    time_name,
    time_of,
)
from generation.step_caching.settings import Rule, StepCaching

__all__ = ["Counts", "Outputs", "StepCache", "reused"]

Outputs = tuple[torch.Tensor, ...]

_KEPT: Final = 2
"""Computed steps that a reuse looks back to."""


@dataclass(frozen=True)
class Counts:
    """How many calls were computed, and how many left out."""

    computed: int = 0
    skipped: int = 0

    @property
    def share(self) -> float:
        """Which part of the calls was left out, 0 to 1."""
        return self.skipped / max(1, self.computed + self.skipped)


@dataclass
class _Walk:
    """One picture's way from noise, in one context.

    Attributes:
        index: of the next step.
        shape: of the latents.
        time: of the step before.
        latents: of it.
        signal: of it.
        total: of the outputs' distances since the last computed step.
        computed: times and outputs of the last computed steps.
    """

    shape: torch.Size
    index: int = 0
    time: float = float("inf")
    latents: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    total: float = 0.0
    computed: list[tuple[float, Outputs]] = field(default_factory=list)


class StepCache:
    """A transformer in front of which steps are left out; it is called as the one that it wraps.

    A new picture is one whose time goes up again, whose latents have another shape, or that follows after ``steps``
    calls; :meth:`reset` begins one by force. Guidance with two calls a step has a cache for each: by the name that a
    pipeline gives to ``cache_context``, and without one by the latents, which are the same in both. All images of a
    batch share one decision, by the mean of their distances. Every output is reused alike. What else is asked of it,
    as ``config``, is the wrapped transformer's.

    Args:
        transformer: called with the family's inputs by name; returns a tuple.
        settings: when to leave out a step.
        signal: of the decider; None for the one that needs no weights. ``modulated`` needs
            :func:`generation.step_caching.front.modulated_signal`.
        steps: of the schedule that is drawn with; None for that of the settings.
        skipped: steps to leave out, in place of the decider's.

    Raises:
        BadOption: the decider needs a signal and has none.
    """

    def __init__(
        self,
        transformer: Transformer,
        settings: StepCaching,
        signal: Signal | None = None,
        *,
        steps: int | None = None,
        skipped: Collection[int] | None = None,
    ) -> None:
        family = settings.family()
        if signal is None and settings.decider == "modulated":
            raise BadOption("signal is None; expected that of the decider 'modulated': modulated_signal(checkpoint)")
        self._transformer, self._settings = transformer, settings
        self._signal = signal_of(settings.decider, family) if signal is None else signal
        self._latents, self._time = latents_name(family), time_name(family)
        self._steps, self._skipped = steps or settings.steps, skipped
        self._context = ""
        self._walks: dict[tuple[str, int], _Walk] = {}
        self._place: dict[str, int] = {}
        self.counts = Counts()
        if skipped is None and settings.first + settings.last >= self._steps:
            always = f"the first {settings.first} and the last {settings.last}"
            note(f"step caching leaves out none of {self._steps} steps: {always} are always computed")
        elif self._steps != settings.steps:
            note(f"step caching was fitted for {settings.steps} steps, and {self._steps} are drawn: it may cost more")

    def __getattr__(self, name: str) -> Any:
        """Return what the wrapped transformer has under a name."""
        if name == "_transformer":
            raise AttributeError(name)
        return getattr(self._transformer, name)

    def reset(self) -> None:
        """Forget everything of the picture; the next call is a first step."""
        self._walks.clear()
        self._place.clear()

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Keep what is called within apart, as diffusers' pipelines do for ``cond`` and ``uncond``."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def __call__(self, **inputs: Any) -> Outputs:
        """Return the transformer's outputs, computed or from earlier steps, in the dtype of what was computed.

        Args:
            inputs: the family's, by name, and ``return_dict=False``.

        Raises:
            BadInputs: the latents or the timestep are missing.
        """
        for name in (self._latents, self._time):
            if not isinstance(inputs.get(name), torch.Tensor):
                raise BadInputs(f"{name} is not among the inputs by name; a step is told by it: give it as a tensor")
        latents, time = inputs[self._latents], time_of(inputs[self._time])
        walk = self._walk(latents, time)
        signal = None if self._skipped is not None else self._signal(inputs)
        skips = self._skips(walk, signal)
        walk.index, walk.time, walk.latents, walk.signal = walk.index + 1, time, latents, signal
        if skips:
            self.counts = Counts(self.counts.computed, self.counts.skipped + 1)
            return reused(walk.computed, time, self._settings.reuse)
        outputs = tuple(self._transformer(**inputs))
        walk.computed = [*walk.computed, (time, outputs)][-_KEPT:]
        self.counts = Counts(self.counts.computed + 1, self.counts.skipped)
        return outputs

    def _walk(self, latents: torch.Tensor, time: float) -> _Walk:
        """Return the walk that a call goes on with, or begins."""
        name = self._context
        place = self._place.get(name, 0)
        before = self._walks.get((name, place))
        if before is not None and _is_same_step(before, latents, time):
            place += 1
        else:
            place = 0
        self._place[name] = place
        walk = self._walks.get((name, place))
        if walk is None or walk.shape != latents.shape or time > walk.time or walk.index >= self._steps:
            walk = self._walks[name, place] = _Walk(latents.shape)
        return walk

    def _skips(self, walk: _Walk, signal: torch.Tensor | None) -> bool:
        """Return whether a step is left out; where it is not, the sum begins again."""
        settings = self._settings
        if self._skipped is not None:
            return walk.index in self._skipped and bool(walk.computed)
        if walk.signal is None or signal is None or not settings.first <= walk.index < self._steps - settings.last:
            walk.total = 0.0
            return False
        walk.total += settings.polynomial(relative_distance(signal, walk.signal).mean().item())
        if walk.total < settings.threshold:
            return True
        walk.total = 0.0
        return False


def _is_same_step(walk: _Walk, latents: torch.Tensor, time: float) -> bool:
    """Whether a call is of the step that a walk has just made, as the second one of guidance is."""
    return walk.time == time and walk.latents is not None and _equal(walk.latents, latents)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def reused(computed: Sequence[tuple[float, Outputs]], time: float, rule: Rule) -> Outputs:
    """Return what stands for the outputs at a time: the last ones, or the line through the last two.

    Args:
        computed: times and outputs of computed steps, at least one.
        time: of the step that is left out.
        rule: how.
    """
    after, outputs = computed[-1]
    if rule == "hold" or len(computed) < _KEPT or computed[-2][0] == after:
        return outputs
    before, earlier = computed[-2]
    weight = (time - after) / (after - before)
    return tuple(
        (last.float() + weight * (last.float() - first.float())).to(last.dtype)
        for first, last in zip(earlier, outputs, strict=True)
    )
