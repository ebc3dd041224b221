"""A plan as a picture: a bar for each form of the weights in each mode, against the GPU's memory."""

from __future__ import annotations

import html
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp4trt.errors import BadOption
from fp4trt.file_output import naming, partial_path
from fp4trt.html_page import inline_svg, page
from generation.planning.peaks import MODES
from generation.planning.report import TITLES, report_lines
from generation.planning.result import Plan
from trt_build.memory import GIB

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["require_kind", "write_picture"]

_KINDS: Final = (".html", ".png")

_PARTS: Final = {"weights_bytes": "weights", "workspace_bytes": "activations and VAE", "runtime_bytes": "runtime"}
_COLOURS: Final = ("tab:blue", "tab:orange", "tab:gray")


def require_kind(path: Path) -> None:
    """Refuse a name that is no picture's.

    Raises:
        BadOption: it ends otherwise.
    """
    if path.suffix not in _KINDS:
        raise BadOption(f"output is '{path}'; expected a name that ends in {' or '.join(_KINDS)}")


def write_picture(plan: Plan, path: Path) -> None:
    """Write a plan as one PNG, or as one HTML file with its lines and the picture inside.

    Raises:
        OSError: it cannot be written; the error names it.
    """
    figure = _figure(plan)
    partial = partial_path(path)
    with naming(path):
        try:
            partial.write_bytes(_png(figure) if path.suffix == ".png" else _page(plan, figure).encode())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _page(plan: Plan, figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    title = f"{plan.source} on {plan.gpu['name']}"
    picture = inline_svg(svg.getvalue(), "memory of each format and mode, beside the GPU's")
    lines = html.escape("\n".join(report_lines(plan)))
    body = f"<h1>{html.escape(title)}</h1><figure class='plot wide'>{picture}</figure><pre class='scroll'>{lines}</pre>"
    return page("fp4trt plan", title, body)


def _figure(plan: Plan) -> Figure:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "fp4trt"  # the same figures give the same bytes
    forms = [form for form in plan.forms if form["why_not"] is None]
    figure = Figure(figsize=(10, 1.5 + 0.8 * len(forms)), layout="constrained")
    axes = figure.subplots()
    memory = plan.gpu["memory_bytes"] / GIB
    ticks: dict[float, str] = {}
    for row, form in enumerate(forms):
        for index, mode in enumerate(MODES):
            place = row + 0.27 * (index - 1)
            ticks[place] = f"{form['name']}, {TITLES[mode]}"
            _bar(axes, place, form["modes"][mode], label=row == index == 0)
    axes.axvline(memory, color="tab:red", label=f"{plan.gpu['name']}: {memory:.0f} GiB")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(f"{plan.source} on {plan.gpu['name']}")
    axes.set_xlabel("GiB at the peak")
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _bar(axes: Any, place: float, mode: dict[str, Any], label: bool) -> None:
    left = 0.0
    for (key, name), colour in zip(_PARTS.items(), _COLOURS, strict=True):
        width = mode[key] / GIB
        axes.barh(place, width, 0.24, left=left, color=colour, label=name if label else None)
        left += width
    axes.text(left, place, f" {left:.1f}", va="center", fontsize=7)
