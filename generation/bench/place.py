"""Where a benchmark runs, and which file it is of there: an engine on its GPU, or the graph on this CPU."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4trt.errors import BadEngine, CannotRun, UnknownArtifact
from fp4trt.file_kind import is_file, what_it_lacks
from fp4trt.pipeline_folder import transformer_folder
from trt_build.runtime.card import open_card
from trt_build.runtime.engine_file import EngineFile

__all__ = ["Place", "here", "on_cpu", "runnable"]


@dataclass(frozen=True)
class Place:
    """A processor.

    Attributes:
        device: ``cpu``, or ``cuda:0``.
        name: for people.
        capability: of a GPU, such as SM120; "" for a CPU.
        instead: why it is no GPU; "" where it is one, or none was asked for.
    """

    device: str
    name: str
    capability: str = ""
    instead: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {
            "device": self.device,
            "name": self.name,
            "compute_capability": self.capability or None,
            "no_gpu_because": self.instead or None,
        }


def here() -> Place:
    """Return the GPU of this machine, or its CPU with the reason."""
    try:
        card = open_card()
    except CannotRun as error:
        return on_cpu(str(error))
    return Place(f"cuda:{card.device[1]}", card.name, card.compute_capability)


def on_cpu(instead: str = "") -> Place:
    """Return this machine's CPU."""
    return Place("cpu", f"{_processor()}, {os.cpu_count()} threads", instead=instead)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def runnable(artifact: Path, place: Place) -> tuple[Path, Place]:
    """Return the file that is timed, and where: of a checkpoint, or an engine without its GPU, the graph beside it.

    Raises:
        UnknownArtifact: it is nothing that runs.
        CannotRun: there is nothing of it that runs here.
    """
    if artifact.suffix == ".onnx":
        return artifact, on_cpu("a graph is timed in ONNX Runtime on the CPU")
    if artifact.suffix == ".engine" and place.capability:
        return artifact, place
    if artifact.suffix == ".engine":
        EngineFile.at(artifact)
        return _graph_beside(artifact, place), place
    if not artifact.is_dir():
        found = "is no engine, graph or folder" if is_file(artifact) else what_it_lacks(artifact)
        raise UnknownArtifact(f"{artifact} {found}; expected what fp4trt export or build wrote")
    folder = transformer_folder(artifact)
    return (_engine_in(folder, place) if place.capability else _graph_beside(folder / "model.engine", place)), place


def _graph_beside(engine: Path, place: Place) -> Path:
    graph = engine.parent / "model.onnx"
    if not graph.is_file():
        raise CannotRun(
            f"{place.instead}; and {graph}, to time in ONNX Runtime instead, does not exist: name the graph"
        )
    return graph


def _engine_in(folder: Path, place: Place) -> Path:
    """Return the one engine of a folder that runs on a GPU."""
    fit, passed_over = [], ""
    for path in sorted(folder.glob("*.engine")):
        try:
            built_for = EngineFile.at(path).compute_capabilities
        except BadEngine as error:
            passed_over = f" ({error})"
            continue
        if place.capability in built_for:
            fit.append(path)
    if not fit:
        raise CannotRun(
            f"{folder} holds no engine for {place.name} ({place.capability}){passed_over}; build one with "
            "fp4trt build --gpu, or name model.onnx to time the graph on the CPU"
        )
    if len(fit) > 1:
        raise CannotRun(f"{folder} holds several engines for {place.name}: {', '.join(p.name for p in fit)}; name one")
    return fit[0]
