"""A benchmark as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from generation.comparison.table import aligned

if TYPE_CHECKING:
    from generation.bench.bench import Benched

__all__ = ["table"]


def table(result: Benched) -> str:
    """Return where and what was timed, a row for each subject, and what did not run, with the reason."""
    place = result.place
    lines = [f"{result.artifact} on {place['name']}"]
    if place["no_gpu_because"]:
        lines.append(f"{place['no_gpu_because']}; so it is the graph in ONNX Runtime, beside torch on the same CPU")
    sizes = ", ".join(f"{name} {size}" for name, size in result.sizes.items())
    weights = "random weights" if result.weights == "random" else result.weights
    lines.append(
        f"{result.family}: {sizes}; {result.steps} steps, {result.repeats} times after {result.warmup} calls to warm "
        f"up; torch with {weights}"
    )
    title = next((each["title"] for each in result.subjects if each["name"] == result.baseline), None)
    head = ["", "step, ms: median", "p90", "min", "first call", f"{result.steps} steps, s", "load, s", "peak, MB"]
    rows = [[each["title"], *_figures(each)] for each in result.subjects]
    if title is not None:
        head.append(f"times {title}")
        rows = [[*row, f"{each['speed']:.2f}"] for row, each in zip(rows, result.subjects, strict=True)]
    lines += ["", aligned([head, *rows])]
    lines += [f"not run: {each['title']}: {each['reason']}" for each in result.not_run]
    return "\n".join(lines)


def _figures(subject: Mapping[str, Any]) -> list[str]:
    step, first, peak = subject["per_step"], subject["first_call_s"], subject["memory_peak_bytes"]
    milliseconds = [f"{1000 * step[key]:.2f}" for key in ("median_s", "p90_s", "min_s")]
    return [
        *milliseconds,
        f"{1000 * first:.2f}",
        f"{subject['end_to_end']['median_s']:.3f}",
        f"{subject['load_s']:.2f}",
        "not told" if peak is None else f"{peak / 1e6:.0f}",
    ]
