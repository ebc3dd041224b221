"""Every metric of every checkpoint, with its interval, and the paired difference of each two checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fp4trt.progress import PATIENCE_S, tracking
from generation.comparison.metrics import Metric, Shown, velocity_at
from generation.comparison.statistics import Estimate, Scores, difference, estimate

__all__ = ["Comparison", "measure"]


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        metrics: those that could be computed, in the order in which they are shown.
        reference: metric to scores of the reference, for those that say something of it alone.
        checkpoints: name to metric to scores, in the order given.
        by_time: name to (time, velocity error), from noise (1) to image (0); empty where only images were drawn.
        unavailable: title of a metric to what it lacks, in one line.
    """

    metrics: tuple[Metric, ...]
    reference: Mapping[str, Scores]
    checkpoints: Mapping[str, Mapping[str, Scores]]
    by_time: Mapping[str, Sequence[tuple[float, Estimate]]]
    unavailable: Mapping[str, str] = field(default_factory=dict)

    def estimate(self, name: str, key: str) -> Estimate:
        """Return a checkpoint's mean, spread and interval of a metric."""
        return estimate(self.checkpoints[name][key])

    def difference(self, of: str, to: str, key: str) -> Estimate:
        """Return the paired difference ``of - to`` of two checkpoints in a metric."""
        return difference(self.checkpoints[of][key], self.checkpoints[to][key])

    def as_dict(self) -> dict[str, Any]:
        """Return every number, as compare.json has it."""
        pairs = [(of, to) for to, of in itertools.combinations(self.checkpoints, 2)]
        keys = [metric.key for metric in self.metrics]
        return {
            "metrics": {
                metric.key: {
                    "title": metric.title,
                    "unit": metric.unit,
                    "better": "higher" if metric.higher_is_better else "lower",
                    "meaning": metric.meaning,
                }
                for metric in self.metrics
            },
            "unavailable": dict(self.unavailable),
            "reference": {key: asdict(estimate(scores)) for key, scores in self.reference.items()},
            "checkpoints": {
                name: {
                    **{key: asdict(self.estimate(name, key)) for key in keys},
                    "velocity_error_by_time": [{"time": time, **asdict(one)} for time, one in self.by_time[name]],
                }
                for name in self.checkpoints
            },
            "differences": [
                {"of": of, "to": to, **{key: asdict(self.difference(of, to, key)) for key in keys}} for of, to in pairs
            ],
        }


def measure(
    metrics: Sequence[Metric], reference: Shown, checkpoints: Mapping[str, Shown], unavailable: Mapping[str, str]
) -> Comparison:
    """Compute every metric of every checkpoint that so many images allow; the others are unavailable.

    Args:
        metrics: what to compute.
        reference: what the reference drew.
        checkpoints: name to what it drew of the same seeds and prompts.
        unavailable: metrics that cannot be computed, and why.
    """
    images = len(reference.prompts)
    short = {
        metric.title: f"it needs {metric.least} images of each seed, {images} asked for"
        for metric in metrics
        if images < metric.least
    }
    metrics = [metric for metric in metrics if metric.title not in short]
    found: dict[str, dict[str, Scores]] = {name: {} for name in checkpoints}
    alone: dict[str, Scores] = {}
    with tracking(len(metrics) * (len(checkpoints) + 1), "Measuring", PATIENCE_S) as advance:
        for metric in metrics:
            for name, shown in checkpoints.items():
                found[name][metric.key] = metric.scores(shown, reference)
                advance()
            if metric.absolute:
                alone[metric.key] = metric.scores(reference, reference)
            advance()
    by_time = {name: _by_time(shown) for name, shown in checkpoints.items()}
    return Comparison(tuple(metrics), alone, found, by_time, {**unavailable, **short})


def _by_time(shown: Shown) -> list[tuple[float, Estimate]]:
    if shown.drawn is None:
        return []
    times = shown.drawn(shown.seeds[0]).times.tolist()
    return [(time, estimate(velocity_at(shown, call))) for call, time in enumerate(times)]
