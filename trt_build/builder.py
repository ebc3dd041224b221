"""ONNX in, engine out: validate everything, build in a child process, check FP4 coverage, publish."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4trt.errors import BackendMissingError
from fp4trt.file_output import partial_path
from fp4trt.number_formats import FORMATS, NVFP4
from fp4trt.options import names, takes
from fp4trt.progress import Progress, Step
from fp4trt.targets import Target, parse_gpus, require_format
from fp4trt.verb import Result
from trt_build import manifest
from trt_build.attention_coverage import LostAttention, measure_attentions, require_attentions
from trt_build.branch_cost import branch_cost, slot_cost
from trt_build.coverage import SixteenBit, measure_coverage, require_coverage
from trt_build.disk_space import require_room
from trt_build.engine_losses import attentions_of_all, coverage_of_all
from trt_build.graph import Graph, read_graph
from trt_build.layer_info import layers_of_profiles
from trt_build.lint_notes import lint_notes
from trt_build.local_gpu import local_compute_capabilities
from trt_build.memory import GIB, memory_lines
from trt_build.profile_set import Asked, are_profiles, make_profiles
from trt_build.profiles import Count, Pixels, Profile
from trt_build.script import script_of, script_path, write_script
from trt_build.served_sizes import require_served
from trt_build.supervise import run_child

__all__ = ["build"]

OnProgress = Callable[[float, str], None]


def _ignore(*_: object) -> None:
    """Stand in for a callback that the caller did not give."""


@dataclass(frozen=True)
class _Plan:
    """A validated request."""

    graph: Graph
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    engine: Path
    weight_streaming: bool

    @property
    def compute_capabilities(self) -> list[str]:
        return sorted({target.compute_capability for target in self.targets})

    @property
    def formats(self) -> tuple[str, ...]:
        """The number formats that every GPU has GEMMs of."""
        return tuple(name for name in FORMATS if all(name in target.formats for target in self.targets))

    @property
    def backend(self) -> str:
        return self.targets[0].backend


_STEPS = 1000
"""Units of a build's progress."""


@dataclass(frozen=True, eq=False)
class Built(Result):
    """An engine, and what is in it.

    Attributes:
        engine, manifest: absolute paths.
        engine_bytes, engine_sha256: its size and hash.
        fp4_gemms, fp4_linears: FP4 GEMMs, and the linears that they cover.
        fp8_gemms, fp8_linears: the same in FP8.
        coverage: the same in each format that the graph promises and the GPUs have GEMMs of: ``gemms``, ``linears``.
        quantized_linears: the linears that the graph promises in these.
        gemms: every GEMM kernel with its linears.
        lost: the promised linears that run in BF16, and why.
        fp8_attentions: attentions that are one FP8 kernel each.
        quantized_attentions: how many the graph promises.
        lost_attentions: those that fell apart, and why.
        sixteen_bit: linears that run in BF16 as they should, and why.
        kernels: number of the engine's kernels.
        branch: what SVDQuant's branches cost (see :mod:`trt_build.branch_cost`); None without any.
        lora: what slots for LoRAs cost, likewise.
        gpus, compute_capabilities: what it runs on.
        profile: minimum, optimum and maximum of each symbol.
        shapes: the same of each input.
        profiles: of several, in order, what each has of its own: ``symbols`` and ``shapes`` as above, and its kernels,
            GEMMs, lost linears and attentions. The attributes above are then the first profile's, and lost is what is
            lost in any. Empty, and not in JSON, where there is one.
        cached: whether an unchanged request was answered without building.
        seconds: how long that took.
    """

    engine: str
    manifest: str
    engine_bytes: int
    engine_sha256: str
    fp4_gemms: int
    fp4_linears: int
    fp8_gemms: int
    fp8_linears: int
    coverage: Mapping[str, Mapping[str, int]]
    quantized_linears: int
    gemms: Sequence[Mapping[str, Any]]
    lost: Sequence[Mapping[str, Any]]
    fp8_attentions: int
    quantized_attentions: int
    lost_attentions: Sequence[Mapping[str, Any]]
    sixteen_bit: Sequence[Mapping[str, Any]]
    kernels: int | None
    branch: Mapping[str, Any] | None
    lora: Mapping[str, Any] | None
    gpus: Sequence[str]
    compute_capabilities: Sequence[str]
    profile: Mapping[str, Any]
    shapes: Mapping[str, Any]
    profiles: Sequence[Mapping[str, Any]]
    cached: bool
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        return {key: value for key, value in super().as_dict().items() if key != "profiles" or value}


@takes(gpu=names("rtx5090"), shapes=names("B=1:1:4"), profiles=are_profiles)
def build(
    model: str | Path,
    *,
    gpu: str | Sequence[str] = "rtx5090",
    # the optimization profile, or what is common to several
    resolution: Pixels | None = None,
    batch: Count | None = None,
    text: Count | None = None,
    frames: Count | None = None,
    audio: Count | None = None,
    shapes: str | Sequence[str] = (),
    reference_images: Count | None = None,
    profiles: Asked | Sequence[Asked] = (),
    # the result
    output: str | Path | None = None,
    force: bool = False,
    allow_slow: bool = False,
    weight_streaming: bool = False,
    # what the caller hears meanwhile
    on_progress: OnProgress = _ignore,
    on_line: Callable[[str], None] = _ignore,
    progress: Progress | None = None,
) -> Built:
    """Build the engine of an ONNX graph, or answer from the engine that an unchanged request has left.

    Args:
        model: an ONNX file, or a directory that holds model.onnx.
        gpu: one GPU, or several in one engine: a sequence, or "rtx5090,gb10" (see fp4trt.targets).
        resolution, batch, text, frames, audio, shapes, reference_images: see trt_build.profiles.make_profile.
        profiles: several in one engine, such as [{"resolution": 1024, "batch": 1}, "resolution=512 batch=4"]; keys are
            these names or, in a text, the command line's. What one does not say is as the options above say.
        output: the engine file, DIRECTORY/GPU.engine unless given; its manifest NAME.json goes beside it.
        force: replace a file at `output` that fp4trt did not build, or a build script that was edited.
        allow_slow: build what the lint finds slow, and publish an engine that lost FP4 where the graph promises it.
        weight_streaming: let the runtime keep weights in host memory.
        on_progress: called with (fraction 0..1, phase) during the build.
        on_line: called with one line for what a build starts with (the memory estimate) and for each warning.
        progress: called with each step, as all verbs do it, besides `on_progress`.

    Raises:
        LintError: the graph would be built wrongly, or slowly without `allow_slow`.
        BuildError and its kin (fp4trt.errors); EngineWriteError where the disk is full.
    """
    started = time.monotonic()
    options = {"resolution": resolution, "batch": batch, "text": text, "shapes": shapes}
    options |= {"frames": frames, "audio": audio, "reference_images": reference_images}
    plan = _validate(
        model,
        gpu if isinstance(gpu, str) else ",".join(gpu),
        options,
        profiles,
        output,
        weight_streaming,
        allow_slow=allow_slow,
    )
    manifest.check_output(plan.engine, plan.graph, force=force)
    weights = plan.graph.weight_bytes
    told = (note for profile in plan.profiles for note in profile.notes)
    notes = (*told, *_without_gemms(plan), *lint_notes(plan.graph.path, allow_slow=allow_slow))
    for line in notes:
        on_line(line)
    version = _tensorrt_version(plan, force)
    if weights > GIB:
        on_line(f"hashing {weights / GIB:.1f} GiB of weights, to see whether the engine is built already")
    request = _request(plan, version)
    content = manifest.answering_manifest(plan.engine, request)
    cached = content is not None
    if content is None:
        for line in memory_lines(weights, plan.targets, len(plan.profiles)):
            on_line(line)
        for line in require_room(plan.engine, weights):
            on_line(line)
        hear = on_progress if progress is None else _both(on_progress, progress)
        content = _build_and_publish(plan, request, allow_slow=allow_slow, on_progress=hear)
    elif not allow_slow:
        require_coverage([SixteenBit(**item) for item in content["lost"]], content["quantized_linears"])
        require_attentions(
            [LostAttention(**item) for item in content["lost_attentions"]], content["quantized_attentions"]
        )
    return _result(plan, content, cached=cached, seconds=time.monotonic() - started)


def _validate(
    model: str | Path,
    gpu: str,
    plain: dict[str, Any],
    profiles: Asked | Sequence[Asked],
    output: str | Path | None,
    weight_streaming: bool,
    *,
    allow_slow: bool,
) -> _Plan:
    targets = parse_gpus(gpu)
    graph = read_graph(Path(model).absolute())  # a link stays: weights lie beside it
    if graph.uses_fp4:
        require_format(targets, NVFP4.name)
    for kind, paths in graph.promised.items():
        if paths and FORMATS[kind].elsewhere is None:
            require_format(targets, kind)
    made = make_profiles(
        graph.input_shapes,
        graph.symbols,
        plain,
        profiles,
        fp8_attention=bool(graph.promised_attentions),
        keys=graph.keys,
        short_allowed=allow_slow,
    )
    for profile in made:
        require_served(graph.model, graph.path.parent, profile)
    default = graph.path.parent / ("_".join(target.name for target in targets) + ".engine")
    return _Plan(
        graph=graph,
        targets=targets,
        profiles=made,
        engine=Path(output).absolute() if output is not None else default,
        weight_streaming=weight_streaming,
    )


def _without_gemms(plan: _Plan) -> Iterator[str]:
    """Yield a line for each format that a GPU stores and does not multiply."""
    for kind, paths in plan.graph.promised.items():
        if paths and kind not in plan.formats:
            names = ", ".join(plan.compute_capabilities)
            yield f"{len(paths)} linears in {FORMATS[kind].title}: {FORMATS[kind].elsewhere} on {names}"


def _tensorrt_version(plan: _Plan, force: bool) -> str:
    """Return the backend's version; without the backend, leave a build script where one can help.

    Raises:
        BackendMissingError: naming the script; OutputExistsError: another lies in its place.
    """
    target = plan.targets[0]
    if plan.backend == "tensorrt_rtx":
        missing = [name for name in ("tensorrt_rtx", "polygraphy") if importlib.util.find_spec(name) is None]
        if missing:
            raise BackendMissingError(f"{missing[0]} is not installed; pip install 'fp4trt[rtx]'")
        return str(importlib.import_module(plan.backend).__version__)
    installed = importlib.util.find_spec(plan.backend) is not None
    if not installed or target.compute_capability not in local_compute_capabilities():
        content = script_of(plan.engine, plan.graph, target, plan.profiles, plan.weight_streaming)
        script = write_script(script_path(plan.engine), content, force)
        lacking = f"a {target.name} in this machine" if installed else "tensorrt, which is not installed here"
        raise BackendMissingError(
            f"{target.name} ({target.compute_capability}) needs {lacking}; "
            f"wrote {script}: run it on a machine with the GPU"
        )
    return str(importlib.import_module(plan.backend).__version__)


def _request(plan: _Plan, version: str) -> dict[str, Any]:
    return manifest.make_request(
        manifest.graph_sha256(plan.graph),
        gpus=[target.name for target in plan.targets],
        compute_capabilities=plan.compute_capabilities,
        backend=plan.backend,
        tensorrt_version=version,
        profiles=[_shapes(profile) for profile in plan.profiles],
        weight_streaming=plan.weight_streaming,
        promised=plan.graph.promised,
        promised_attentions=plan.graph.promised_attentions,
    )


def _build_and_publish(
    plan: _Plan, request: dict[str, Any], *, allow_slow: bool, on_progress: OnProgress
) -> dict[str, Any]:
    """Build NAME.partial, check it, and rename engine and manifest; on any failure nothing is left."""
    plan.engine.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(plan.engine)
    beside = manifest.manifest_path(plan.engine)
    asked = {
        "backend": plan.backend,
        "onnx": str(plan.graph.path),
        "partial": str(partial),
        "compute_capabilities": plan.compute_capabilities,
        "profiles": [_shapes(profile) for profile in plan.profiles],
        "weight_streaming": plan.weight_streaming,
    }
    try:
        event = run_child(asked, on_progress)
        layers = layers_of_profiles(event["layers"], len(plan.profiles))
        coverages = [measure_coverage(plan.graph, each, plan.formats) for each in layers]
        fused = [measure_attentions(plan.graph, each) for each in layers]
        coverage, attentions = coverage_of_all(coverages), attentions_of_all(fused)
        if not allow_slow:
            require_coverage(coverage.lost, coverage.quantized_linears)
            require_attentions(attentions.lost, len(attentions.promised))
        result = {
            "engine_bytes": event["bytes"],
            "engine_sha256": event["sha256"],
            **({"model": plan.graph.described} if plan.graph.described else {}),
            "symbols": _symbols(plan.profiles[0]),
            **plan.graph.signature.as_dict(),
            "kernels": len(layers[0]),
            **coverage.summary(),
            **attentions.summary(),
            "branch": branch_cost(plan.graph, layers[0]),
            "lora": slot_cost(plan.graph, layers[0]),
        }
        if len(plan.profiles) > 1:
            result["profiles"] = [
                {
                    "symbols": _symbols(profile),
                    "shapes": _shapes(profile),
                    "kernels": len(kernels),
                    **covered.summary(),
                    **whole.summary(),
                }
                for profile, kernels, covered, whole in zip(plan.profiles, layers, coverages, fused, strict=True)
            ]
        content = manifest.write_manifest(plan.engine, request, result)
        os.replace(partial, plan.engine)
        os.replace(partial_path(beside), beside)
        on_progress(1.0, "done")
    finally:
        partial.unlink(missing_ok=True)
        partial_path(beside).unlink(missing_ok=True)
    return content


def _symbols(profile: Profile) -> dict[str, list[int]]:
    return {name: list(extent) for name, extent in profile.symbols.items()}


def _shapes(profile: Profile) -> dict[str, list[list[int]]]:
    return {name: [list(shape) for shape in shapes] for name, shapes in profile.inputs.items()}


def _both(on_progress: OnProgress, progress: Progress) -> OnProgress:
    """Return what tells both of a build's progress."""

    def tell(fraction: float, phase: str) -> None:
        on_progress(fraction, phase)
        progress(Step("building", round(fraction * _STEPS), _STEPS, phase))

    return tell


def _result(plan: _Plan, content: dict[str, Any], *, cached: bool, seconds: float) -> Built:
    counts = ("fp4_gemms", "fp4_linears", "fp8_gemms", "fp8_linears", "coverage", "quantized_linears")
    kept = ("engine_bytes", "engine_sha256", *counts, "gemms", "lost")
    attention = ("fp8_attentions", "quantized_attentions", "lost_attentions")
    return Built(
        engine=str(plan.engine),
        manifest=str(manifest.manifest_path(plan.engine)),
        **{key: content[key] for key in (*kept, *attention, "sixteen_bit")},
        kernels=content.get("kernels"),
        branch=content.get("branch"),
        lora=content.get("lora"),
        gpus=[target.name for target in plan.targets],
        compute_capabilities=plan.compute_capabilities,
        profile=_symbols(plan.profiles[0]),
        shapes=content["request"]["profile"],
        profiles=content.get("profiles", []),
        cached=cached,
        seconds=round(seconds, 3),
    )
