"""What a terminal shows of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from generation.planning.peaks import MODES, Mode
from generation.planning.result import Plan
from generation.planning.rows import verdict
from trt_build.memory import GIB

__all__ = ["TITLES", "gib", "report_lines"]

TITLES: Final[Mapping[Mode, str]] = {"resident": "all resident", "on_demand": "low VRAM", "streaming": "streaming"}
"""What people call a mode."""

_STAGES: Final = {"encode": "the text encoders", "denoise": "the transformer", "decode": "the VAE"}

_TERA: Final = 1e12


def gib(count: float) -> str:
    """Return bytes in GiB, two decimals below ten."""
    return f"{count / GIB:.2f}" if count < 10 * GIB else f"{count / GIB:.1f}"


def report_lines(plan: Plan) -> Iterator[str]:
    """Yield the lines of a plan: one screen."""
    yield from _head(plan)
    yield ""
    yield from _table([_titles(), *map(_cells, plan.forms)])
    yield ""
    yield from _beside(plan)
    yield from _verdict(plan)
    yield from _making(plan)
    for note in plan.notes:
        yield f"note: {note}"


def _size(count: float, unit: str = "B") -> str:
    """Return a number in thousands of millions, or in millions."""
    return f"{count / 1e9:.2f} G{unit}" if count >= 1e9 else f"{count / 1e6:.1f} M{unit}"


def _head(plan: Plan) -> Iterator[str]:
    gpu = plan.gpu
    several = f", {plan.transformers} transformers" if plan.transformers > 1 else ""
    yield (
        f"{plan.source}: {plan.family}, {_size(plan.parameters, '')} parameters{several}; on {gpu['name']}: "
        f"{gpu['memory_bytes'] // GIB} GiB, {gpu['bandwidth'] // 10**9} GB/s, {gpu['compute_capability']}"
    )
    sizes = dict(plan.sizes)
    width, height, frames = (sizes.pop(name) for name in ("width", "height", "frames"))
    picture = f"{width}x{height}" + (f", {frames} frames" if frames > 1 else "") if width else "sizes"
    symbols = ", ".join(f"{name} {size}" for name, size in sizes.items())
    yield f"a call of {picture} ({symbols}): {plan.flops / _TERA:.1f} TFLOP; GiB, against the GPU's memory:"


def _titles() -> list[str]:
    return ["", "weights", "activations", *TITLES.values(), "least time", "streamed"]


def _cells(form: Mapping[str, Any]) -> list[str]:
    start = [str(form["name"]), gib(form["weights_bytes"])]
    if form["why_not"] is not None:
        return [*start, "", str(form["why_not"])]
    modes = (form["modes"][mode] for mode in MODES)
    peaks = [f"{gib(mode['peak_bytes'])} {mode['verdict']:5}" for mode in modes]
    times = [_seconds(form[key]) for key in ("least_seconds_of_a_call", "least_seconds_streaming")]
    return [*start, gib(form["activation_bytes"]), *peaks, *times]


def _seconds(seconds: float) -> str:
    units = {"s": 1, "ms": 1e-3, "us": 1e-6}
    unit = next((unit for unit, size in units.items() if seconds >= size), "us")
    return f"{seconds / units[unit]:.3g} {unit}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows in columns, the first to the left; a short row runs on behind its last cell."""
    columns = max(map(len, rows))
    widths = [max(len(row[index]) for row in rows if len(row) == columns) for index in range(columns)]
    widths[0] = max(len(row[0]) for row in rows)
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
        cells[0] = row[0].ljust(widths[0])
        if len(row) < columns:
            cells[-1] = row[-1]
        yield "  ".join(cells).rstrip()


def _beside(plan: Plan) -> Iterator[str]:
    known = [_component(part) for part in plan.components]
    yield f"beside the transformer: {', '.join(known) or 'nothing'}; CUDA and TensorRT {gib(plan.runtime_bytes)}"
    form = next(form for form in plan.forms if form["name"] == plan.chosen)
    stage = form["modes"]["on_demand"]["stage"].partition(" ")[0]
    yield (
        f"low VRAM loads {gib(form['loaded_bytes'])} from the host's memory for every picture: at least "
        f"{_seconds(form['least_seconds_of_loading'])}; its peak is that of {_STAGES[stage]}"
    )


def _component(part: Mapping[str, Any]) -> str:
    size = gib(part["bytes"]) if part["bytes"] is not None else "unknown"
    decoding = f" and {gib(part['workspace_bytes'])} to decode" if part["workspace_bytes"] else ""
    return f"{part['name']} {size}{decoding}"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        form = next(form for form in plan.forms if form["name"] == plan.chosen)
        peak = form["modes"]["resident"]
        narrowly = f", narrowly: {gib(peak['peak_bytes'])} GiB" if peak["verdict"] == "close" else ""
        yield f"{plan.chosen} fits with all components resident{narrowly}"
        return
    works = [change for change in plan.changes if change["fits"]]
    if not works:
        (least,) = plan.changes
        yield f"nothing fits at this size; what needs least, {gib(least['peak_bytes'])} GiB: {least['change']}"
        return
    yield f"{plan.chosen} does not fit with all components resident; what would, the smallest change first:"
    for number, change in enumerate(works, 1):
        close = verdict(change["peak_bytes"], plan.gpu["memory_bytes"]) == "close"
        yield f"  {number}. {change['change']}: {gib(change['peak_bytes'])} GiB{', close' if close else ''}"


def _making(plan: Plan) -> Iterator[str]:
    """Yield what quantization and the build take."""
    form = next(form for form in plan.forms if form["name"] == plan.chosen)
    files = plan.quantize
    sizes = (files["source_bytes"], files["checkpoint_bytes"], form["engine_file_bytes"])
    source, result, engine = (_size(count) for count in sizes)
    kept = _size(files["bytes_of_a_call"])
    each = ", of each transformer" if plan.transformers > 1 else ""
    made = f"{source} in 16 bit, {result} as {plan.chosen}, {engine} engine"
    yield f"on disk{each}: {made}; calibration {kept} a captured call"
    yield f"in the host's memory: {gib(form['build_memory_bytes'])} GiB for the build"
