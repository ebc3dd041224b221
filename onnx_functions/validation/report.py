"""The report of a validation: report.json, and report.html, one file with its plots inside."""

from __future__ import annotations

import html
import importlib.util
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp4trt.errors import OutputExists, UnknownArtifact
from fp4trt.file_output import check_writable, made_folder, write_texts
from fp4trt.html_page import head, page, plot, scrolling
from fp4trt.html_pictures import PICTURE_SCRIPT, PICTURE_STYLE
from fp4trt.json_file import load_json
from onnx_functions.validation.report_pictures import by_time_part, pictures_part
from onnx_functions.validation.verdict import Figures, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NO_PLOTS", "check_report_folder", "report_files", "write_report"]

NO_PLOTS: Final = "matplotlib is not installed, so there is no report.html: pip install 'fp4trt[report]'"

_KEYS: Final = frozenset(("passed", "model", "reference", "reference_kind", "level", "gates", "linears"))
"""What tells our report.json from another."""

_GENERATOR: Final = "fp4trt validate"

_HEAD: Final = head(_GENERATOR)
"""What tells our report.html from another."""

_WORST: Final = 10
_FLOOR: Final = 1e-9  # an error of exactly zero still gets a mark on a logarithmic axis


def report_files(directory: Path) -> tuple[Path, Path | None]:
    """Return where report.json and report.html go; None for the second where matplotlib is not installed."""
    plots = importlib.util.find_spec("matplotlib") is not None
    return directory / "report.json", directory / "report.html" if plots else None


def check_report_folder(directory: Path, force: bool = False) -> None:
    """Refuse, before anything is computed, a folder that a report cannot or must not be written into.

    Reports of an earlier run are replaced; anything else at their names only with `force`.

    Raises:
        OutputExists: something else lies there.
        OSError: the folder cannot be made or written.
    """
    for path, is_ours in zip(report_files(directory), (_is_our_data, _is_our_page), strict=True):
        if path is None:
            continue
        if path.is_dir():
            raise OutputExists(f"{path} is a folder; expected to write a report there: choose another --output")
        if path.exists() and not force and not is_ours(path):
            raise OutputExists(f"{path} is not a report of fp4trt; choose another --output, or replace it with --force")
        check_writable(path)


def _is_our_data(path: Path) -> bool:
    try:
        return load_json(path).keys() >= _KEYS
    except UnknownArtifact:
        return False


def _is_our_page(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()


def write_report(report: Report, directory: Path, force: bool = False) -> tuple[Path, Path | None]:
    """Write report.json and report.html into `directory`, replacing those of an earlier run.

    Returns:
        The two files; None for the second where matplotlib is not installed.

    Raises:
        OutputExists, OSError: as :func:`check_report_folder`, or the disk is full; then nothing is left or changed.
    """
    check_report_folder(directory, force)
    data, html_page = report_files(directory)
    texts = {data: json.dumps(report.as_dict(absolute=False), indent=1, allow_nan=False) + "\n"}
    if html_page is not None:
        texts[html_page] = _page(report)
    with made_folder(directory):
        write_texts(texts)
    return data, html_page


def _page(report: Report) -> str:
    verdict = "passed" if report.passed else "failed" if report.failures else "not run"
    figures = "".join(_plots(report))
    shown = "skipped" if verdict == "not run" else verdict
    measured = "the quantized checkpoint" if report.reference_kind == "quantized" else "the 16-bit checkpoint"
    name = report.reference.name if report.reference is not None else ""
    against = f"against {measured} <code>{html.escape(name)}</code>, level {report.level}" if name else "by itself"
    note = f"<p>{html.escape(report.note[:1].upper() + report.note[1:])}.</p>" if report.note else ""
    errors = f"<h2>Errors</h2>{figures}<h2>Worst linears</h2>{_worst_table(report.linears)}" if report.linears else ""
    body = (
        f"<h1>Validation <span class={shown}>{verdict}</span></h1>"
        f"<p><code>{html.escape(report.model.name)}</code> {against}.</p>{note}"
        f"<h2>Gates</h2>{_gates_table(report)}{pictures_part(report.pictures)}{by_time_part(report.by_time)}{errors}"
    )
    style, script = (PICTURE_STYLE, PICTURE_SCRIPT) if report.pictures else ("", "")
    return page(_GENERATOR, f"Validation: {verdict}", body, style=style, script=script)


def _gates_table(report: Report) -> str:
    rows = []
    for gate in report.gates:
        state = "skipped" if gate.was_skipped else "passed" if gate.passed else "failed"
        numbers = "" if gate.was_skipped else f"{gate.figure:.3g}</td><td class=number>{gate.limit:.3g}"
        cells = numbers or "</td><td>"
        rows.append(
            f"<tr><td>{html.escape(gate.name)}</td><td class={state}>{state}</td>"
            f"<td class=number>{cells}</td><td>{html.escape(gate.detail)}</td></tr>"
        )
    titles = "<tr><th>Gate</th><th>Outcome</th><th>Worst</th><th>Limit</th><th>Detail</th></tr>"
    return scrolling(f"<table>{titles}{''.join(rows)}</table>")


def _worst(linears: Sequence[Figures]) -> list[Figures]:
    measured = [row for row in linears if row.output_error is not None]
    return sorted(measured, key=lambda row: -(row.output_error or 0))[:_WORST]


def _worst_table(linears: Sequence[Figures]) -> str:
    def cell(value: float | None, form: str = ".3g") -> str:
        return f"<td class=number>{'' if value is None else format(value, form)}</td>"

    rows = "".join(
        f"<tr><td><code>{html.escape(row.path)}</code></td>{cell(row.output_error)}{cell(row.structure_error)}"
        f"{cell(row.weight_error)}{cell(row.scale_bias, '+.2%')}{cell(row.differing_codes, 'd')}</tr>"
        for row in _worst(linears)
    )
    titles = (
        "<tr><th>Linear</th><th>Product, teacher-forced</th><th>Output, structure run</th><th>Weight</th>"
        "<th>Scale bias</th><th>Differing codes</th></tr>"
    )
    return scrolling(f"<table>{titles}{rows}</table>")


def _plots(report: Report) -> list[str]:
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "fp4trt"  # the same figures give the same bytes
    if not any(row.output_error is not None for row in report.linears):
        return []
    return [_svg(draw, report.linears) for draw in (_by_layer, _by_block, _worst_ten)]


def _svg(draw: Callable[[Axes, Sequence[Figures]], None], linears: Sequence[Figures]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, linears)
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    return plot(text.getvalue(), axes.get_title(), wide=True)


_SERIES: Final = (
    ("output_error", "product, teacher-forced"),
    ("structure_error", "output, structure run (FP32)"),
    ("weight_error", "weight"),
)


def _by_layer(axes: Axes, linears: Sequence[Figures]) -> None:
    for attribute, label in _SERIES:
        points = [(index, getattr(row, attribute)) for index, row in enumerate(linears)]
        known = [(index, max(value, _FLOOR)) for index, value in points if value is not None and math.isfinite(value)]
        if known:
            axes.plot(*zip(*known, strict=True), ".", label=label)
    _finish(axes, "Error by layer", "linear: the quantized in graph order, then the 16-bit")


def _by_block(axes: Axes, linears: Sequence[Figures]) -> None:
    blocks = list(dict.fromkeys(row.block for row in linears))
    for attribute, label in _SERIES:
        points: list[tuple[int, Any]] = []
        for index, block in enumerate(blocks):
            values = [getattr(row, attribute) for row in linears if row.block == block]
            known = [value for value in values if value is not None and math.isfinite(value)]
            if known:
                points.append((index, max(*known, _FLOOR)))
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set_xticks(range(len(blocks)), [_short(block) for block in blocks], rotation=60, ha="right", fontsize=8)
    _finish(axes, "Largest error by block", "")


def _worst_ten(axes: Axes, linears: Sequence[Figures]) -> None:
    # A bar without an end cannot be drawn; the gates name such a linear.
    rows = [row for row in _worst(linears)[::-1] if math.isfinite(row.output_error or 0)]
    axes.barh([row.path for row in rows], [row.output_error or 0 for row in rows])
    axes.set_xlabel("relative L2 of the product, teacher-forced")
    axes.set_title("Worst ten")
    axes.tick_params(labelsize=8)


def _short(block: str) -> str:
    return block.replace("transformer_blocks", "blocks") or "outside the blocks"


def _finish(axes: Axes, title: str, x_label: str) -> None:
    if axes.lines:
        axes.set_yscale("log")
        axes.legend(frameon=False)
    axes.set_ylabel("relative L2 error")
    axes.set_xlabel(x_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
