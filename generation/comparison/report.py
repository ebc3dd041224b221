"""compare.html: one file with the tables, the pictures, the velocity error by time, and what each metric means."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fp4trt.html_page import page, plot, scrolling
from fp4trt.html_pictures import PICTURE_SCRIPT, PICTURE_STYLE, Pictured, picture_section
from fp4trt.publish import write_text
from generation.comparison.measurement import Comparison
from generation.comparison.pictures import TINY
from generation.comparison.statistics import Estimate, estimate
from generation.comparison.table import difference_text, estimate_text, verdict

__all__ = [
    "AMPLIFIED",
    "NO_PLOTS",
    "differences",
    "figures",
    "has_plots",
    "left_out",
    "meanings",
    "write_report",
]

AMPLIFIED: Final = 8
"""Factor on the differences in the picture."""

NO_PLOTS: Final = "matplotlib is not installed, so compare.html has no plot: pip install 'fp4trt[report]'"

_METHOD: Final = """
The means are over the seeds of each seed's own figure; the spread is their standard deviation. Intervals are of 95 %:
Student's t over the images, with the seeds as blocks (each seed's mean is taken out of its images' values before their
variance is pooled). A difference is paired: both checkpoints drew the same prompts from the same noise, so it is each
image's difference that counts. A Frechet distance and a velocity error are no means over images; they enter by their
jackknife pseudo-values. The intervals are not corrected for how many of them are looked at.
"""


def write_report(
    comparison: Comparison, described: Mapping[str, Any], pictures: Sequence[Pictured], path: Path
) -> None:
    """Write compare.html.

    Args:
        comparison: what was measured.
        described: what was compared, as compare.json says it.
        pictures: some of the images, by the reference and by each checkpoint.
        path: of the page.
    """
    seeds, images = described["seeds"], described["images_per_seed"]
    body = (
        f"<h1>Comparison</h1>"
        f"<p>Quantized checkpoints of a {html.escape(described['family'])} model against its BF16 weights: {images} "
        f"images of each seed ({', '.join(map(str, seeds))}), from the same prompts and noise.</p>"
        f"<h2>Images</h2>{_images(comparison, pictures, seeds[0])}"
        f"<h2>Figures</h2>{figures(comparison)}{differences(comparison)}{left_out(comparison)}"
        f"<h2>Velocity error by time</h2>{_by_time(comparison)}"
        f"<h2>What the figures mean</h2>{meanings(comparison)}<p>{_METHOD}</p>"
    )
    write_text(path, page("fp4trt compare", "Comparison", body, style=PICTURE_STYLE, script=PICTURE_SCRIPT))


def _images(comparison: Comparison, pictures: Sequence[Pictured], seed: int) -> str:
    tiny = max(max(picture.size) for picture in pictures) <= TINY
    kept = "" if tiny else " Images are reduced and compressed for this page; the figures are of the exact pixels."
    note = (
        f"<p>The first {len(pictures)} of seed {seed}. Drag over an image, or use the arrow keys: BF16 is on the left "
        f"of the line, the checkpoint on the right.{kept}</p>"
    )
    return note + picture_section("BF16", list(comparison.checkpoints), pictures, tiny=tiny, key="images")


def has_plots() -> bool:
    """Whether the package that draws the plot is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def figures(comparison: Comparison) -> str:
    """Return the table of every metric of the reference and of every checkpoint."""

    def cell(text: str, one: Estimate | None, form: str) -> str:
        spread = "" if one is None or one.spread is None else f"<br><small>spread {one.spread:{form}}</small>"
        return f"<td>{html.escape(text)}{spread}</td>"

    of_reference = {key: estimate(scores) for key, scores in comparison.reference.items()}
    rows = [
        "".join(
            cell(estimate_text(metric, of_reference[metric.key]), of_reference[metric.key], metric.form)
            if metric.key in of_reference
            else "<td></td>"
            for metric in comparison.metrics
        )
    ]
    for name in comparison.checkpoints:
        found = [(metric, comparison.estimate(name, metric.key)) for metric in comparison.metrics]
        rows.append("".join(cell(estimate_text(metric, one), one, metric.form) for metric, one in found))
    return _table(comparison, dict(zip(["BF16 reference", *comparison.checkpoints], rows, strict=True)))


def differences(comparison: Comparison) -> str:
    """Return the table of what each checkpoint differs from the first by; nothing where there is one alone."""
    first, *others = comparison.checkpoints
    if not others:
        return ""
    rows = {}
    for name in others:
        found = [(metric, comparison.difference(name, first, metric.key)) for metric in comparison.metrics]
        rows[name] = "".join(
            f"<td class='{verdict(metric, one)}'>{html.escape(difference_text(metric, one))}</td>"
            for metric, one in found
        )
    title = f"<h3>Difference to {html.escape(first)}, paired</h3>"
    note = "<p><small>* where the 95 % interval leaves out 0; green is better, red is worse.</small></p>"
    return title + _table(comparison, rows) + note


def _table(comparison: Comparison, rows: Mapping[str, str]) -> str:
    head = "".join(f"<th>{html.escape(metric.title)}</th>" for metric in comparison.metrics)
    body = "".join(f"<tr><th>{html.escape(name)}</th>{cells}</tr>" for name, cells in rows.items())
    return scrolling(f"<table><tr><th></th>{head}</tr>{body}</table>")


def left_out(comparison: Comparison) -> str:
    """Return the list of the metrics that could not be computed, with what each lacks; nothing where there is none."""
    lines = "".join(
        f"<li>{html.escape(title)}: {html.escape(reason)}</li>" for title, reason in comparison.unavailable.items()
    )
    return f"<p>Left out:</p><ul>{lines}</ul>" if lines else ""


def meanings(comparison: Comparison) -> str:
    """Return the table of what each metric means."""
    rows = "".join(
        f"<tr><th>{html.escape(metric.title)}</th><td>{html.escape(metric.meaning)} "
        f"{'Higher' if metric.higher_is_better else 'Lower'} is better.</td></tr>"
        for metric in comparison.metrics
    )
    return scrolling(f"<table>{rows}</table>")


def _by_time(comparison: Comparison) -> str:
    """Return the plot, where matplotlib is installed, and its numbers."""
    if has_plots():
        shown, state = _plot(comparison), ""
    else:
        shown = "<p>matplotlib is not installed, so there is no plot: pip install 'fp4trt[report]'.</p>"
        state = " open"
    return f"{shown}<details{state}><summary>The numbers</summary>{_time_table(comparison)}</details>"


def _time_table(comparison: Comparison) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in comparison.by_time)
    rows = "".join(
        f"<tr><th>{points[0][0]:.3f}</th>{''.join(f'<td>{one.mean:.4f}</td>' for _, one in points)}</tr>"
        for points in zip(*comparison.by_time.values(), strict=True)
    )
    return scrolling(f"<table><tr><th>time</th>{head}</tr>{rows}</table>")


def _plot(comparison: Comparison) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same figures give the same bytes; letters that a phone shows large enough.
    with mpl.rc_context({"svg.hashsalt": "fp4trt", "font.size": 12}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for name, points in comparison.by_time.items():
            times, means = [time for time, _ in points], [one.mean for _, one in points]
            line = axes.plot(times, means, "o-", label=name)[0]
            if all(one.half_width is not None for _, one in points):
                low, high = [one.low or 0.0 for _, one in points], [one.high or 0.0 for _, one in points]
                axes.fill_between(times, low, high, alpha=0.2, color=line.get_color())
        axes.invert_xaxis()
        axes.set_xlabel("time: noise on the left, the image on the right")
        axes.set_ylabel("relative L2 error of the velocity")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return plot(text.getvalue(), "velocity error of each checkpoint by time; the numbers follow")
