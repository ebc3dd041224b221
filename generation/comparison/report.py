"""compare.html: one file with the tables, the pictures, the velocity error by time, and what each metric means."""

from __future__ import annotations

import base64
import html
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.publish import write_text
from generation.comparison.measurement import Comparison
from generation.comparison.statistics import Estimate, estimate
from generation.comparison.table import difference_text, estimate_text, verdict

__all__ = [
    "AMPLIFIED",
    "NO_PLOTS",
    "STYLE",
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

STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; width: 100% }
td, th { border-bottom: 1px solid #ddd; padding: .35em .6em; text-align: left; vertical-align: top }
td { font-variant-numeric: tabular-nums } .better { color: #176b2c } .worse { color: #b00020 }
small { color: #666 } figure { margin: 1.5em 0; overflow-x: auto } svg, img { max-width: 100%; height: auto }
"""

_METHOD: Final = """
The means are over the seeds of each seed's own figure; the spread is their standard deviation. Intervals are of 95 %:
Student's t over the images, with the seeds as blocks (each seed's mean is taken out of its images' values before their
variance is pooled). A difference is paired: both checkpoints drew the same prompts from the same noise, so it is each
image's difference that counts. A Frechet distance and a velocity error are no means over images; they enter by their
jackknife pseudo-values. The intervals are not corrected for how many of them are looked at.
"""


def write_report(comparison: Comparison, described: Mapping[str, Any], grid: Path, path: Path) -> None:
    """Write compare.html.

    Args:
        comparison: what was measured.
        described: what was compared, as compare.json says it.
        grid: the picture, which goes into the page.
        path: of the page.
    """
    picture = base64.b64encode(grid.read_bytes()).decode()
    seeds, images = described["seeds"], described["images_per_seed"]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="generator" content="fp4trt compare">'
        f"<title>Comparison</title><style>{STYLE}</style><h1>Comparison</h1>"
        f"<p>{len(comparison.checkpoints)} quantized checkpoints of a {html.escape(described['family'])} model against "
        f"its BF16 weights: {images} images of each of {len(seeds)} seeds ({', '.join(map(str, seeds))}), from the "
        f"same prompts and noise.</p>"
        f"<h2>Figures</h2>{figures(comparison)}{differences(comparison)}{left_out(comparison)}"
        f"<h2>Images</h2><figure><img alt='the same prompts and noise by each model, and the differences' "
        f"src='data:image/png;base64,{picture}'></figure>"
        f"<h2>Velocity error by time</h2>{_by_time(comparison)}"
        f"<h2>What the figures mean</h2>{meanings(comparison)}<p>{_METHOD}</p></html>\n"
    )
    write_text(path, page)


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
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


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
    return f"<table>{rows}</table>"


def _by_time(comparison: Comparison) -> str:
    """Return the plot, or the numbers where matplotlib is not installed."""
    if not has_plots():
        return "<p>matplotlib is not installed: pip install 'fp4trt[report]'; the numbers are in compare.json.</p>"
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "fp4trt"  # the same figures give the same bytes
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, points in comparison.by_time.items():
        times, means = [time for time, _ in points], [one.mean for _, one in points]
        line = axes.plot(times, means, "o-", label=name)[0]
        if all(one.half_width is not None for _, one in points):
            low, high = [one.low or 0.0 for _, one in points], [one.high or 0.0 for _, one in points]
            axes.fill_between(times, low, high, alpha=0.2, color=line.get_color())
    axes.invert_xaxis()
    axes.set_xlabel("time given to the transformer: noise on the left, the image on the right")
    axes.set_ylabel("relative L2 error of the velocity")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"
