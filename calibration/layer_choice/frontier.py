"""What budgets buy: the best choice of formats and ranks for each, as a table and as a picture."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from calibration.layer_choice.allocation import allocate
from calibration.layer_choice.sensitivity import BITS, Group, Sensitivity, parts, ranked
from fp4trt.number_formats import NVFP4
from fp4trt.safetensors_file import naming

__all__ = ["BUDGETS", "Point", "draw", "frontier", "table"]

BUDGETS: Final = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""That are shown beside the one that is asked for."""

_COLORS: Final = dict(zip(BITS, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
_BRANCHED: Final = "tab:green"
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
        ranks: first linear of each group with a branch to the rank for each linear; None where none was offered.
        branches: rank to how many linears have it, likewise.
    """

    budget: float
    formats: Mapping[str, str]
    linears: Mapping[str, int]
    flops: float
    bytes: float
    weight_bytes: int
    predicted: float
    measured: float | None = None
    ranks: Mapping[str, int] | None = None
    branches: Mapping[str, int] | None = None

    def choice(self, first: str) -> str:
        """Return what is chosen for a group, by its first linear."""
        return ranked(self.ranks[first]) if self.ranks and first in self.ranks else self.formats[first]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON; of ranks it tells where there was a choice of them."""
        return {key: value for key, value in asdict(self).items() if value is not None or key == "measured"}


def frontier(sensitivity: Sensitivity, budgets: Collection[float], of: str, formats: Collection[str]) -> list[Point]:
    """Return the best choice for each budget, the smallest first."""
    points = []
    for budget in sorted(set(budgets)):
        chosen = allocate(sensitivity, budget, of, formats)
        split = {first: parts(choice) for first, choice in chosen.items()}
        members = [split[group.linears[0]] for group in sensitivity.groups for _ in group.linears]
        linears = Counter(kind for kind, _ in members)
        spent = sensitivity.spent(chosen, "flops"), sensitivity.spent(chosen, "bytes")
        size, error = sensitivity.weight_bytes(chosen), sensitivity.predicted(chosen)
        kinds = {first: kind for first, (kind, _) in split.items()}
        point = Point(budget, kinds, dict(linears), *spent, size, error)
        if not set(formats) <= BITS.keys():
            ranks = {first: rank for first, (_, rank) in split.items() if rank}
            counted = Counter(str(rank) for _, rank in sorted(members) if rank)
            point = replace(point, ranks=ranks, branches=dict(counted))
        points.append(point)
    return points


def table(points: Sequence[Point], chosen: float, ranks: Sequence[int] = (), without: Sequence[Point] = ()) -> str:
    """Return a table for people.

    Args:
        points: the frontier.
        chosen: the budget that was asked for, which a star marks.
        ranks: that there was a choice of; how many of the linears in NVFP4 have a branch of each.
        without: the frontier without branches, for the same budgets; none where there are no ranks.
    """
    head: tuple[str, ...] = ("budget", "NVFP4", *(f"with r{rank}" for rank in ranks), "FP8", "BF16", "FLOPs", "bytes")
    head = (*head, "weights", "predicted", "measured")
    rows = [head, *(_row(point, point.budget == chosen, ranks) for point in points)]
    if without:
        errors = (point.predicted if point.measured is None else point.measured for point in without)
        cells = ("no ranks", *(f"{error:.4f}" for error in errors))
        rows = [(*row, cell) for row, cell in zip(rows, cells, strict=True)]
    if all(point.measured is None for point in points):
        rows = [row[: len(head) - 1] + row[len(head) :] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(point: Point, chosen: bool, ranks: Sequence[int]) -> tuple[str, ...]:
    nvfp4, *others = (str(point.linears.get(kind, 0)) for kind in _COLORS)
    return (
        f"{'*' if chosen else ''}{point.budget:.1%}",
        nvfp4,
        *(str((point.branches or {}).get(str(rank), 0)) for rank in ranks),
        *others,
        f"+{point.flops:.1%}",
        f"+{point.bytes:.1%}",
        f"{point.weight_bytes / 1e6:,.1f} MB",
        f"{point.predicted:.4f}",
        "" if point.measured is None else f"{point.measured:.4f}",
    )


def draw(
    sensitivity: Sensitivity, points: Sequence[Point], chosen: Point, path: Path, without: Sequence[Point] = ()
) -> bool:
    """Draw the frontier, and what the dearest groups cost; return whether matplotlib is there to do it.

    Args:
        sensitivity: of the groups.
        points: the frontier.
        chosen: one of them.
        path: of the picture.
        without: the frontier without branches, a second curve; none where there are no ranks.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 4))
    if without:
        _draw_curve(left, without, "tab:orange", " without branches")
    _draw_curve(left, points, "tab:blue", "")
    _draw_chosen(left, chosen)
    _draw_groups(right, sensitivity.groups, chosen)
    with naming(path):
        figure.savefig(path, format="png", metadata={"Software": None})
    return True


def _draw_curve(axes: Any, points: Sequence[Point], color: str, which: str) -> None:
    budgets = [100 * point.budget for point in points]
    dashes = {"color": color if which else "tab:gray", "label": f"predicted{which}"}
    axes.plot(budgets, [point.predicted for point in points], "--", **dashes)
    if all(point.measured is not None for point in points):
        axes.plot(budgets, [point.measured for point in points], "o-", color=color, label=f"measured{which}")


def _draw_chosen(axes: Any, chosen: Point) -> None:
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
    names = [_name(group) for group in dearest]
    firsts = [group.linears[0] for group in dearest]
    colors = [_BRANCHED if first in (chosen.ranks or {}) else _COLORS[chosen.formats[first]] for first in firsts]
    axes.barh(names, [group.errors[NVFP4.name] for group in dearest], color=colors)
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("squared relative error of the output, this group alone in NVFP4")
    legend = _COLORS if chosen.ranks is None else {**_COLORS, f"{NVFP4.name} with a branch": _BRANCHED}
    handles = [axes.barh([names[0]], [0], color=color, label=kind) for kind, color in legend.items()]
    axes.legend(handles=handles, title="chosen", loc="lower right")
    axes.grid(alpha=0.3, axis="x")


def _name(group: Group) -> str:
    others = len(group.linears) - 1
    return f"{group.linears[0]} (+{others})" if others else group.linears[0]
