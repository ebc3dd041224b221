"""Pictures of one model with and without steps left out, from the same noise, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fp4trt.families import Family, Transformer
from generation.comparison.drawing import Batch, Sampler, as_unit
from generation.comparison.metrics import Metric, Shown
from generation.comparison.statistics import Scores
from generation.step_caching.cache import StepCache
from generation.step_caching.deciders import Signal
from generation.step_caching.recording import Distances, distances_of
from generation.step_caching.settings import StepCaching

__all__ = ["Bench", "Drawing"]


@dataclass(frozen=True)
class Drawing:
    """What was drawn with steps left out.

    Attributes:
        skipped: steps left out of a picture, the mean over the calls of all batches.
        scores: metric to its scores against the pictures of all steps.
    """

    skipped: float
    scores: Mapping[str, Scores]

    def figure(self, key: str) -> float | None:
        """Return the mean of a metric over the seeds; None of one that there is not."""
        return float(self.scores[key].figures.mean()) if key in self.scores else None


@dataclass
class Bench:
    """A model, and what it draws of some seeds with all of its steps.

    Attributes:
        sampler: what draws.
        model: the transformer; a module where a pipeline draws.
        family: of it.
        metrics: of the pictures.
        seeds: of the noise.
        steps: of the schedule.
        signal: of the decider.
        piped: whether a pipeline draws, which takes nothing but a module.
        pictures: seed to the pictures of all steps; see :meth:`record`.
    """

    sampler: Sampler
    model: Any
    family: Family
    metrics: Sequence[Metric]
    seeds: tuple[int, ...]
    steps: int
    signal: Signal
    piped: bool = False
    pictures: dict[int, torch.Tensor] = field(default_factory=dict)

    def record(self, advance: Callable[[], None]) -> Distances:
        """Draw with all steps; return how far apart they are.

        Args:
            advance: is called after each seed.
        """
        return distances_of(self._recorded(advance), self.family, self.signal)

    def _recorded(self, advance: Callable[[], None]) -> Iterator[Batch]:
        for seed in self.seeds:
            images = []
            for batch in self.sampler.draw(self.model, seed):
                images.append(batch.images)
                yield batch
            self.pictures[seed] = torch.cat(images)
            advance()

    def draw(self, settings: StepCaching, skipped: Collection[int] | None = None) -> Drawing:
        """Draw with steps left out, and measure.

        Args:
            settings: say which.
            skipped: steps to leave out in place of those.
        """
        images: dict[int, torch.Tensor] = {}
        with self._leaving_out(settings, skipped) as (transformer, cache):
            for seed in self.seeds:
                images[seed] = torch.cat([batch.images for batch in self.sampler.draw(transformer, seed)])
        prompts = self.sampler.prompts
        shown = Shown(self.seeds, prompts, lambda seed: [as_unit(images[seed])])
        reference = self.reference()
        scores = {metric.key: metric.scores(shown, reference) for metric in self.metrics}
        return Drawing(cache.counts.share * self.steps, scores)

    def reference(self) -> Shown:
        """Return the pictures of all steps."""
        return Shown(self.seeds, self.sampler.prompts, lambda seed: [as_unit(self.pictures[seed])])

    @contextmanager
    def _leaving_out(
        self, settings: StepCaching, skipped: Collection[int] | None
    ) -> Iterator[tuple[Transformer, StepCache]]:
        """Give the transformer to draw with, and its cache."""
        model = self.model
        inner = model.forward if self.piped else model
        cache = StepCache(inner, settings, self.signal, steps=self.steps, skipped=skipped)
        if not self.piped:
            yield cache, cache
            return
        model.forward = cache.__call__  # of this object alone
        try:
            yield model, cache
        finally:
            del model.forward
