"""The curve of steps left out against image error, as HTML, SVG or PNG."""

from __future__ import annotations

import html
import io
import os
from pathlib import Path
from typing import Any, Final

from fp4trt import publish
from fp4trt.errors import BadOption
from fp4trt.file_output import partial_path
from fp4trt.html_page import inline_svg, page
from fp4trt.safetensors_file import naming
from generation.comparison.report import has_plots
from generation.step_caching.settings import StepCaching
from generation.step_caching.tables import table

__all__ = ["refuse_plot", "write_plot"]

_KINDS: Final = (".html", ".svg", ".png")


def refuse_plot(path: Path, force: bool) -> Path:
    """Refuse a plot that cannot be drawn, before any work.

    Raises:
        BadOption: its ending is of no kind of ours, or matplotlib is not installed.
        OutputExists: it is there already.
    """
    if path.suffix not in _KINDS:
        raise BadOption(f"plot is {path}; expected a name that ends in {', '.join(_KINDS)}")
    if not has_plots():
        raise BadOption("plot needs matplotlib, which is not installed: pip install 'fp4trt[report]'")
    publish.refuse_existing(path, force)
    return path


def write_plot(path: Path, settings: StepCaching) -> None:
    """Draw what a search measured; the same figures give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "fp4trt"
    curve, nth = settings.figures["curve"], settings.figures["every_nth"]
    judged = "recognised" in curve[0]
    figure = Figure(figsize=(8, 6 if judged else 4), layout="constrained")
    rows: Any = figure.subplots(2 if judged else 1, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + judged])
    _lines(rows[0, 0], curve, nth, "psnr_db", 1)
    rows[0, 0].set_ylabel("PSNR against all steps, dB")
    rows[0, 0].axvline(_chosen(settings), color="0.7", linestyle=":", label="chosen")
    rows[0, 0].legend()
    if judged:
        _lines(rows[1, 0], curve, nth, "recognised", 100)
        rows[1, 0].set_ylabel("recognised, %")
    rows[-1, 0].set_xlabel(f"steps left out, of {settings.steps}")
    partial = partial_path(path)
    try:
        with naming(partial):
            partial.write_bytes(_bytes(figure, path.suffix, settings))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _lines(axes: Any, curve: list[dict[str, Any]], nth: list[dict[str, Any]], key: str, factor: float) -> None:
    for points, style, label in ((curve, "o-", "step caching"), (nth, "x--", "every n-th step")):
        axes.plot([one["skipped"] for one in points], [factor * one[key] for one in points], style, label=label)
    axes.grid(alpha=0.3)


def _chosen(settings: StepCaching) -> float:
    """Return how many steps the chosen point of the curve leaves out."""
    keys = ("threshold", "first", "last")
    own = [getattr(settings, key) for key in keys]
    found = [one["skipped"] for one in settings.figures["curve"] if [one[key] for key in keys] == own]
    return float(found[0] if found else settings.figures["checked"]["skipped"])


def _bytes(figure: Any, kind: str, settings: StepCaching) -> bytes:
    if kind == ".png":
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100, metadata={"Software": None})
        return picture.getvalue()
    text = io.StringIO()
    figure.savefig(
        text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=kind == ".html"
    )
    if kind == ".svg":
        return text.getvalue().encode()
    curve = inline_svg(text.getvalue(), "steps left out against the images' error")
    lines = html.escape(table(settings))
    body = f"<h1>Step caching</h1><figure class='plot'>{curve}</figure><pre class='scroll'>{lines}</pre>"
    return page("fp4trt teacache", "Step caching", body).encode()
