"""A comparison as text: every metric of every checkpoint, and what each differs from the first by."""

from __future__ import annotations

from collections.abc import Sequence

from generation.comparison.measurement import Comparison
from generation.comparison.metrics import Metric
from generation.comparison.statistics import Estimate, estimate

__all__ = ["aligned", "difference_text", "estimate_text", "table", "verdict"]


def table(comparison: Comparison) -> str:
    """Return the two tables of a comparison; intervals are of 95 %, a star marks a difference that leaves out zero."""
    names = list(comparison.checkpoints)
    head = ["", *(metric.title for metric in comparison.metrics)]
    rows = [["BF16 reference", *(_of_reference(comparison, metric) for metric in comparison.metrics)]]
    rows += [
        [name, *(estimate_text(metric, comparison.estimate(name, metric.key)) for metric in comparison.metrics)]
        for name in names
    ]
    text = aligned([head, *rows])
    if len(names) > 1:
        first = names[0]
        differences = [
            [name, *(difference_text(m, comparison.difference(name, first, m.key)) for m in comparison.metrics)]
            for name in names[1:]
        ]
        text += f"\n\ndifference to {first}, paired (* where the 95 % interval leaves out 0)\n"
        text += aligned([head, *differences])
    return text


def _of_reference(comparison: Comparison, metric: Metric) -> str:
    scores = comparison.reference.get(metric.key)
    return "" if scores is None else estimate_text(metric, estimate(scores))


def estimate_text(metric: Metric, one: Estimate) -> str:
    """Return a figure and half of its interval, such as ``35.84 ± 0.12 dB``."""
    half = "" if one.half_width is None else f" ± {one.half_width:{metric.form}}"
    return f"{one.mean:{metric.form}}{half} {metric.unit}".rstrip()


def difference_text(metric: Metric, one: Estimate) -> str:
    """Return a difference with its sign, half of its interval, and a star where that leaves out zero."""
    half = "" if one.half_width is None else f" ± {one.half_width:{metric.form}}"
    return f"{one.mean:+{metric.form}}{half} {metric.unit}".rstrip() + (" *" if one.is_significant else "")


def verdict(metric: Metric, one: Estimate) -> str:
    """Return ``better``, ``worse`` or, where the interval of the difference holds zero, an empty string."""
    if not one.is_significant:
        return ""
    return "better" if (one.mean > 0) == metric.higher_is_better else "worse"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return rows, the first of them the head, as lines with equally wide columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(len(line) for line in lines), *lines[1:]])
