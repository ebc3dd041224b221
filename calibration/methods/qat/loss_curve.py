"""The loss of a training run, as JSON and as a picture."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fp4trt.publish import write_json
from fp4trt.safetensors_file import naming

__all__ = ["write_losses"]

_SMOOTHED: Final = 20
"""Steps of the running mean."""


def write_losses(losses: Mapping[str, Sequence[float]], folder: Path) -> dict[str, Path]:
    """Write ``loss.json`` and, where matplotlib is installed, ``loss.png``; return them by name."""
    files = {"loss.json": folder / "loss.json"}
    write_json(files["loss.json"], losses)
    if importlib.util.find_spec("matplotlib") is None:
        return files
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in losses.items():
        line = axes.plot(range(1, len(values) + 1), values, alpha=0.3)[0]
        means = [
            sum(part) / len(part) for part in (values[max(0, n - _SMOOTHED) : n] for n in range(1, len(values) + 1))
        ]
        axes.plot(range(1, len(means) + 1), means, color=line.get_color(), label=f"{name}, mean of {_SMOOTHED} steps")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    files["loss.png"] = folder / "loss.png"
    with naming(files["loss.png"]):
        figure.savefig(files["loss.png"], format="png", metadata={"Software": None})
    return files
