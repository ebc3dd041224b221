"""One table on the screen and the same rows in build/benchmarks/."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]

Row = Mapping[str, Any]


def machine() -> dict[str, Any]:
    """Say what this runs on, and how busy it is with other things: the load over the last minute, in cores."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load": round(psutil.getloadavg()[0], 2),
    }


def publish(name: str, rows: Sequence[Row], notes: Sequence[str], before: Row) -> None:
    """Print the rows as a Markdown table with their notes, and write build/benchmarks/NAME.json.

    Args:
        name: of the measurement.
        rows: all with the same columns, in their order; what is None is shown as a dash.
        notes: sentences that say how to read it.
        before: the machine before the measurement.
    """
    columns = list(rows[0])
    shown = [columns, *([_shown(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in shown) for place in range(len(columns))]
    for number, line in enumerate(shown):
        print("| " + " | ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    machine_line = "{processor}, {cores} cores, {memory_gib} GiB; load {load} before the run".format(**before)
    print("\n".join(["", *notes, machine_line]))
    result = ROOT / "build" / "benchmarks" / f"{name}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"machine": before, "rows": rows, "notes": notes}, indent=1), encoding="utf-8")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
