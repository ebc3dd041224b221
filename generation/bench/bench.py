"""Time an engine, or its graph on a CPU, beside the same model in torch, in one sitting."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from calibration.checkpoints.plain import refuse_quantized
from calibration.checkpoints.source import find_source
from calibration.inputs.captured import Inputs
from fp4trt.errors import BadCheckpoint, BadOption, CannotRun
from fp4trt.families import Family, family_of
from fp4trt.families.dim import OPTIONS
from fp4trt.families.family import Config
from fp4trt.file_output import naming
from fp4trt.json_file import load_json
from fp4trt.options import at_least, file_name, takes
from fp4trt.progress import PATIENCE_S, Progress, tracking
from fp4trt.safetensors_file import bytes_of, plan_of, write
from fp4trt.verb import PEOPLE, Result, verb
from generation.bench.peers import PEERS, Peer, asked_for
from generation.bench.place import Place, here, runnable
from generation.bench.processes import NotRun, run
from generation.bench.schedule import Schedule
from generation.bench.table import table
from trt_build.manifest import read_manifest
from trt_build.profiles import Count, Pixels, as_text, make_profile

__all__ = ["Benched", "bench"]

_OURS: Final = "session"
_STEPS_ON_CPU: Final = 4
_STEPS: Final = 20


@dataclass(frozen=True, eq=False)
class Benched(Result):
    """What was timed, and how long it took.

    Attributes:
        artifact: absolute path of the engine or graph that was timed.
        place: the processor: ``device``, ``name``, ``compute_capability``, ``no_gpu_because``.
        family: the model's.
        sizes: symbolic dimension to its size.
        steps, warmup, repeats: calls of a schedule, calls before it, and how often it was run.
        weights: of the models in torch: an absolute path, or ``random``.
        subjects: what ran, the artifact first: ``name``, ``title``, ``first_call_s``, ``warmup_s``, ``per_step``
            (``median_s``, ``p90_s``, ``min_s``, ``calls``), ``end_to_end`` (``median_s``, ``min_s``), ``load_s``,
            ``memory_peak_bytes``, and ``speed``, how many times as fast a step is as ``baseline``'s.
        baseline: the name of the subject that the others are held against; None where no model in torch ran.
        not_run: what did not: ``name``, ``title``, ``reason``.
        table: all of it for people.
    """

    artifact: str
    place: Mapping[str, Any]
    family: str
    sizes: Mapping[str, int]
    steps: int
    warmup: int
    repeats: int
    weights: str
    subjects: Sequence[Mapping[str, Any]]
    baseline: str | None
    not_run: Sequence[Mapping[str, Any]]
    table: str = field(metadata=PEOPLE, default="")


def _peer_names(value: Any) -> str | None:
    known = isinstance(value, Sequence) and not isinstance(value, str) and all(name in PEERS for name in value)
    return None if known else f"names in a list, each one of: {', '.join(PEERS)}"


@verb
@takes(
    artifact=file_name,
    reference=file_name,
    steps=at_least(1),
    warmup=at_least(1),
    repeats=at_least(1),
    peers=_peer_names,
)
def bench(
    artifact: str | Path,
    *,
    reference: str | Path | None = None,
    resolution: Pixels | None = None,
    batch: Count | None = None,
    text: Count | None = None,
    frames: Count | None = None,
    audio: Count | None = None,
    steps: int | None = None,
    warmup: int = 2,
    repeats: int = 3,
    peers: Sequence[str] | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Benched:
    """Time a model's denoising schedule, call by call, and the same in torch; each in a process of its own.

    Args:
        artifact: an engine, a graph, or the folder of a checkpoint, of which the engine for this machine's GPU is
            taken. Without a GPU it is the graph, in ONNX Runtime, and the models in torch run on the same CPU.
        reference: the plain checkpoint whose weights the models in torch have; without it random ones.
        resolution, batch, text, frames, audio: sizes, as of :func:`fp4trt.build`; by default what the engine is best
            at, or the model's own.
        steps: calls of a schedule; 20 by default, 4 on a CPU.
        warmup: calls before those that are timed.
        repeats: of the schedule.
        peers: which models in torch run: bf16, fp32, compile, nvfp4, mxfp8; by default all that make sense here.
        progress: called with each step.

    Raises:
        CannotRun: nothing of the artifact runs here, or what does failed.
        UnknownArtifact, BadCheckpoint, BadEngine, BadOption, BadProfileError: naming what is wrong.
    """
    given = {"resolution": resolution, "batch": batch, "text": text, "frames": frames, "audio": audio}
    asked = {name: value for name, value in given.items() if value is not None}
    plan = _planned(Path(artifact), reference, asked, steps, warmup, repeats)
    ran, not_run = asked_for(plan.place, None if peers is None else tuple(peers))
    subjects, failed = _timed(plan, ran)
    result = _benched(plan, subjects, not_run | failed)
    return replace(result, table=table(result))


@dataclass(frozen=True)
class _Plan:
    """What is timed, where, and how.

    Attributes:
        path: of the engine or the graph.
        place: where it runs.
        source: the plain checkpoint whose weights the models in torch have, or None.
        folder: whose config tells what the model is.
        config, family: that, and its family.
        sizes: symbolic dimension to its size.
        schedule: what is run.
    """

    path: Path
    place: Place
    source: Path | None
    folder: Path
    config: Config
    family: Family
    sizes: Mapping[str, int]
    schedule: Schedule


def _planned(
    artifact: Path,
    reference: str | Path | None,
    given: Mapping[str, Any],
    steps: int | None,
    warmup: int,
    repeats: int,
) -> _Plan:
    path, place = runnable(artifact, here())
    source = None if reference is None else find_source(reference)
    folder, config, family = _model(path, source)
    steps = steps or (_STEPS_ON_CPU if place.device == "cpu" else _STEPS)
    schedule = Schedule(steps, warmup, repeats, next(iter(family.input_shapes(config))), _times(family, config))
    return _Plan(path, place, source, folder, config, family, _sizes(family, config, path, given), schedule)


def _benched(plan: _Plan, subjects: Sequence[Mapping[str, Any]], not_run: Mapping[str, str]) -> Benched:
    baseline = next((each["name"] for each in subjects[1:]), None)
    base = next((each["per_step"]["median_s"] for each in subjects if each["name"] == baseline), None)
    return Benched(
        artifact=str(plan.path.absolute()),
        place=plan.place.as_dict(),
        family=plan.family.name,
        sizes=plan.sizes,
        steps=plan.schedule.steps,
        warmup=plan.schedule.warmup,
        repeats=plan.schedule.repeats,
        weights="random" if plan.source is None else str(plan.source.absolute()),
        subjects=[{**each, "speed": base and base / each["per_step"]["median_s"]} for each in subjects],
        baseline=baseline,
        not_run=[
            {"name": name, "title": peer.title, "reason": not_run[name]}
            for name, peer in PEERS.items()
            if name in not_run
        ],
    )


def _model(path: Path, source: Path | None) -> tuple[Path, Config, Family]:
    """Return the folder whose config tells what the model is, the config, and its family."""
    folder = path.parent if (path.parent / "config.json").is_file() else source
    if folder is None:
        raise BadCheckpoint(
            f"{path.parent} holds no config.json, which tells what the model is; name its source with --reference"
        )
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    if source is not None:
        other = load_json(source / "config.json")
        refuse_quantized(source, other)
        known = family_of(other, source)
        if known.name != family.name or known.state(other) != family.state(config):
            raise BadCheckpoint(f"{source} is another model than {path}; name the checkpoint that that is made from")
    return folder, config, family


def _sizes(family: Family, config: Config, path: Path, given: Mapping[str, Any]) -> dict[str, int]:
    """Return symbolic dimension to the size that is timed: as options say, else what an engine is best at.

    Raises:
        BadProfileError: an option is out of the model's range.
        BadOption: it is a range.
    """
    told = {f"--{key}": as_text(f"--{key}", value) for key, value in given.items()}
    there = {option for dim in family.dims.values() for option in OPTIONS[dim.kind]}
    for option, value in told.items():
        if option not in there:
            raise BadOption(f"{option} is {value}, and {family.name} has no such dimension; leave it out")
        if ":" in value:
            raise BadOption(f"{option} is {value}; expected one size to time")
    symbols = {name: dim.as_dict() for name, dim in family.dims.items()}
    profile = make_profile(family.input_shapes(config), symbols, **given)
    manifest = (read_manifest(path) or {}) if path.suffix == ".engine" else {}
    best = manifest.get("symbols")
    found = {}
    for name, extent in profile.symbols.items():
        asked = not told.keys().isdisjoint(OPTIONS[family.dims[name].kind])
        known = best.get(name) if isinstance(best, dict) else None
        found[name] = extent[1] if asked or not isinstance(known, list) else int(known[1])
    return found


def _times(family: Family, config: Config) -> dict[str, float]:
    there = family.input_shapes(config)
    return {name: float(each.noise_at) for name, each in family.inputs.items() if each.role == "time" and name in there}


def _save(file: Path, inputs: Inputs) -> None:
    plan = [plan_of(name, value) for name, value in inputs.items()]
    plan.sort(key=lambda tensor: (tensor.dtype in ("BF16", "BOOL"), tensor.dtype == "BOOL"))
    with naming(file):
        write(file, plan, ((each.name, bytes_of(inputs[each.name])) for each in plan), {})


def _timed(plan: _Plan, ran: Mapping[str, Peer]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the figures of the artifact and of each peer that ran, and why others did not.

    Raises:
        CannotRun: the artifact did not.
    """
    title = "ONNX Runtime" if plan.place.device == "cpu" else "engine"
    failed: dict[str, str] = {}
    calls = plan.schedule.calls * (1 + len(ran))
    inputs = plan.family.example_inputs(plan.config, plan.sizes, 0, torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch, tracking(calls, "timing", patience=PATIENCE_S) as advance:
        file = Path(scratch) / "inputs.safetensors"
        _save(file, inputs)
        request: dict[str, Any] = {"device": plan.place.device, "inputs": str(file), "schedule": vars(plan.schedule)}
        request["weights"] = None if plan.source is None else str(plan.source)
        try:
            path = str(plan.path.absolute())
            ours = run({**request, "kind": _OURS, "path": path}, functools.partial(advance, 1, title))
        except NotRun as error:
            raise CannotRun(f"{plan.path} does not run: {error}") from None
        subjects = [{"name": _OURS, "title": title, **ours}]
        for name, peer in ran.items():
            asked = {**request, "kind": name, "path": str(plan.folder)}
            try:
                found = run(asked, functools.partial(advance, 1, peer.title))
            except NotRun as error:
                failed[name] = str(error)
            else:
                subjects.append({"name": name, "title": peer.title, **found})
    return subjects, failed
