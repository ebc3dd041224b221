"""What budgets buy: the best choice of formats for each, as a table and as a picture."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibration.layer_choice.allocation import allocate
from calibration.layer_choice.sensitivity import BITS, Group, Sensitivity
from fp4trt.number_formats import NVFP4
from fp4trt.safetensors_file import naming

__all__ = ["BUDGETS", "Point", "draw", "frontier", "table"]

BUDGETS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""That are shown beside the one that is asked for."""

_COLORS: Final = dict(zip(BITS, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
_BARS: Final = 30


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        budget: what may be spent.
        formats: first linear of each group to its format.
        linears: format to how many linears have it.
        flops, bytes: what is spent beyond NVFP4; all in FP8 would be 1.
        weight_bytes: of all groups' weights.
        predicted: relative error of the model's output, by the sum over the groups.
        measured: the same, measured; None where it was not.
    """

    budget: float
    formats: Mapping[str, str]
    linears: Mapping[str, int]
    flops: float
    bytes: float
    weight_bytes: int
    predicted: float
    measured: float | None = None


def frontier(sensitivity: Sensitivity, budgets: Collection[float], of: str, formats: Collection[str]) -> list[Point]:
    """Return the best choice for each budget, the smallest first."""
    points = []
    for budget in sorted(set(budgets)):
        chosen = allocate(sensitivity, budget, of, formats)
        counted = Counter(chosen[group.linears[0]] for group in sensitivity.groups for _ in group.linears)
        spent = sensitivity.spent(chosen, "flops"), sensitivity.spent(chosen, "bytes")
        size, error = sensitivity.weight_bytes(chosen), sensitivity.predicted(chosen)
        points.append(Point(budget, chosen, dict(counted), *spent, size, error))
    return points


def table(points: Sequence[Point], chosen: float) -> str:
    """Return a table for people; a star marks the budget that was asked for."""
    head: tuple[str, ...] = ("budget", "NVFP4", "FP8", "BF16", "FLOPs", "bytes", "weights", "predicted", "measured")
    rows = [head, *(_row(point, point.budget == chosen) for point in points)]
    if all(point.measured is None for point in points):
        rows = [row[:-1] for row in rows]
        head = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(point: Point, chosen: bool) -> tuple[str, ...]:
    return (
        f"{'*' if chosen else ''}{point.budget:.1%}",
        *(str(point.linears.get(kind, 0)) for kind in _COLORS),
        f"+{point.flops:.1%}",
        f"+{point.bytes:.1%}",
        f"{point.weight_bytes / 1e6:,.1f} MB",
        f"{point.predicted:.4f}",
        "" if point.measured is None else f"{point.measured:.4f}",
    )


def draw(sensitivity: Sensitivity, points: Sequence[Point], chosen: Point, path: Path) -> bool:
    """Draw the frontier, and what the dearest groups cost; return whether matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    _draw_frontier(left, points, chosen)
    _draw_groups(right, sensitivity.groups, chosen)
    with naming(path):
        figure.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_frontier(axes: Any, points: Sequence[Point], chosen: Point) -> None:
    budgets = [100 * point.budget for point in points]
    axes.plot(budgets, [point.predicted for point in points], "--", color="tab:gray", label="predicted")
    if all(point.measured is not None for point in points):
        axes.plot(budgets, [point.measured for point in points], "o-", color="tab:blue", label="measured")
    height = chosen.predicted if chosen.measured is None else chosen.measured
    axes.plot([100 * chosen.budget], [height], "*", markersize=18, color="tab:red", label="chosen")
    axes.set_xlabel("budget beyond NVFP4, % (all in FP8: 100)")
    axes.set_ylabel("relative error of the model's output")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_groups(axes: Any, groups: Sequence[Group], chosen: Point) -> None:
    """Draw a bar for each of the groups that cost most in NVFP4, in the color of the format that is chosen for it."""
    dearest = sorted(groups, key=lambda group: group.errors[NVFP4.name])[-_BARS:]
    names = [
        group.linears[0] + (f" (+{len(group.linears) - 1})" if len(group.linears) > 1 else "") for group in dearest
    ]
    colors = [_COLORS[chosen.formats[group.linears[0]]] for group in dearest]
    axes.barh(names, [group.errors[NVFP4.name] for group in dearest], color=colors)
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("squared relative error of the output, this group alone in NVFP4")
    handles = [axes.barh([names[0]], [0], color=color, label=kind) for kind, color in _COLORS.items()]
    axes.legend(handles=handles, title="chosen", loc="lower right")
    axes.grid(alpha=0.3, axis="x")


def _name(group: Group) -> str:
    others = len(group.linears) - 1
    return f"{group.linears[0]} (+{others})" if others else group.linears[0]
