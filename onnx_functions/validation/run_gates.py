"""The verdict on a deployable graph: every gate, against the checkpoint it was made of."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import onnx
import torch

from calibration.checkpoints.threads import suited_threads
from calibration.formats.arithmetic import arithmetic_of
from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.errors import BadGraph
from fp4trt.file_output import partial_path
from fp4trt.free_memory import available_memory
from fp4trt.number_formats import FORMATS, NVFP4
from fp4trt.options import one_of, takes
from fp4trt.pipeline_folder import graph_in
from fp4trt.progress import Progress
from fp4trt.safetensors_file import sha256_of
from fp4trt.verb import verb
from onnx_functions.graph.external_data import BadSpan, load_graph, span_of
from onnx_functions.graph.linears import Graph, Linear, metadata_of, promised_linears
from onnx_functions.linting import require_form
from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation import structure_gates, teacher_gates, weight_gates
from onnx_functions.validation.attention_gates import attention_gates, attention_promise_gate
from onnx_functions.validation.block_gates import ByBlock, Task, check_by_block, structure_by_block
from onnx_functions.validation.block_selection import Blocks, Tokens, chosen_blocks, token_counts
from onnx_functions.validation.error_by_time import batch_of_times, errors_by_time
from onnx_functions.validation.functions_gate import functions_gate
from onnx_functions.validation.output_pictures import pictures_of
from onnx_functions.validation.promise_gate import promise_gate
from onnx_functions.validation.report import check_report_folder, write_report
from onnx_functions.validation.teacher_gates import block_of
from onnx_functions.validation.third_party_validation import is_third_party, validate_third_party
from onnx_functions.validation.torch_reference import Reference, Shape, Walk, name_of, open_reference
from onnx_functions.validation.verdict import (
    ByTime,
    Figures,
    FloatArray,
    Gate,
    OutputPicture,
    Report,
    failed_to_run,
    guarded,
    refuse_environment,
    require_runtime,
    skipped,
)

__all__ = ["LAYOUT_NOTE", "LEVELS", "validate"]

LEVELS: Final = ("full", "blocks")

SHAPES: Final = ((1, 16, 8), (2, 36, 11))
"""Batch, image and text tokens of the two runs; unlike each other in everything, so that nothing can be baked
in."""

TINY: Final = (1, 4, 3)

_PTQ: Final = "nvfp4-ptq"
"""The recipe of a graph without its manifest that is known to round to nearest."""

LAYOUT_NOTE: Final = (
    "graph and reference read the checkpoint alike, so bytes that mean something else pass: "
    "fp4trt inspect --against the 16-bit source proves the layout"
)
"""What is said of a validation against the quantized checkpoint; one against the 16-bit source sees a misreading."""

WHOLE_BYTES: Final = 6
"""Bytes of memory per weight that a run of the whole graph may need: 4 were measured on 2 billion weights and a few
tokens, and activations grow with the tokens."""


@dataclass
class _Seen:
    """What the page shows beside the gates, filled in as they run."""

    by_time: ByTime = field(default_factory=ByTime)
    pictures: list[OutputPicture] = field(default_factory=list)


@dataclass(frozen=True)
class _Subject:
    """What is validated: a graph, its linears, the reference; and the figures that the gates fill in.

    Attributes:
        path: the ONNX file.
        graph: without its external data.
        held: the reference.
        blocks: to be checked.
        linears: to be checked.
        shapes: of the two runs, or of the only one.
        why_by_block: why the whole graph is not run; None where it is.
        figures: of each linear.
        seen: what the page shows beside.
    """

    path: Path
    graph: onnx.ModelProto
    held: Reference
    blocks: tuple[str, ...]
    linears: tuple[Linear, ...]
    shapes: tuple[Shape, ...]
    why_by_block: str | None
    figures: dict[str, dict[str, Any]]
    seen: _Seen = field(default_factory=_Seen)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def quantized(self) -> list[Linear]:
        """The linears to be checked that are promised in NVFP4 or FP8."""
        found = promised_linears(self.graph)
        promised = {path for kind in FORMATS for path in found.get(kind, [])}
        return [linear for linear in self.linears if linear.path in promised]


@verb
@takes(level=one_of(*LEVELS))
def validate(
    model: str | Path,
    reference: str | Path | None = None,
    *,
    level: str = "full",
    report_dir: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
    blocks: Blocks | None = None,
    tokens: Tokens | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Report:
    """Check the numerics of a deployable graph; of a third party's graph, what can be said without a reference.

    Args:
        model: the ONNX file, or the folder that holds `model.onnx`, or a pipeline's.
        reference: the quantized checkpoint; None takes the one beside the graph. A 16-bit checkpoint in its place
            (`digits` for the built-in one) makes the gates measure the quantization error itself.
        level: `full`, or `blocks` for one block at a time in bounded memory; `full` falls back to that where the whole
            graph does not fit.
        report_dir: folder for report.json and, where matplotlib is installed, report.html; None writes none.
            `REPORT_DIR.partial` keeps the finished blocks until then; a killed validation resumes with the next.
        force: replace files of these names there that are no reports of fp4trt.
        say: called with one line per finished gate.
        blocks: how many blocks of each stack, or their module paths; implies level `blocks`.
        tokens: image and text tokens of the only run, of batch 1, in place of two runs on a few.
        progress: called with each step.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        BadGraph: the file is not a deployable graph.
        BadReference: the reference is not a checkpoint of this graph.
        BadOption, BadSelection: there is no such level, or there are no such blocks or sizes.
        UnknownArtifact: a manifest is damaged.
        OutputExists, OSError: the report cannot be written; known before any gate runs.
        BadEnvironment: the machine cannot run a gate, which says nothing of the graph.
    """
    path = graph_in(Path(model))
    require_runtime()
    graph = load_graph(path)
    if is_third_party(graph) and (reference, level, blocks, tokens) == (None, "full", None, None):
        return validate_third_party(path, graph, None if report_dir is None else Path(report_dir), force, say)
    require_form(path, graph)
    _refuse_links(graph, path.parent)
    held = open_reference(graph, path, reference)
    counts = token_counts(tokens)
    shapes: tuple[Shape, ...] = SHAPES if counts is None else ((1, *counts),)
    chosen = chosen_blocks(held.blocks, blocks)
    if report_dir is not None:
        check_report_folder(Path(report_dir), force)
    figures: dict[str, dict[str, Any]] = {name: {} for paths in promised_linears(graph).values() for name in paths}
    why = _why_by_block(level, blocks, held)
    subject = _Subject(path, graph, held, chosen, (), shapes, why, figures)
    gates = []
    with suited_threads(held.checkpoint.config), _work_folder(report_dir) as work:
        try:
            for gate in _all_gates(subject, Path(work) / "blocks" if report_dir is None else Path(work)):
                gates.append(gate)
                if say is not None:
                    say(gate.line)
        except (MemoryError, RuntimeError) as error:  # of torch, outside the gates
            refuse_environment(error, f"what comes after {gates[-1].name}" if gates else "the reference")
            raise
    rows = tuple(Figures(name, block_of(name, set(held.blocks)), **values) for name, values in figures.items())
    kind = "quantized" if held.quantized else "plain"
    note = LAYOUT_NOTE if held.quantized else ""
    level, seen = level if why is None else "blocks", subject.seen
    report = Report(path, held.directory, kind, level, tuple(gates), rows, note, seen.by_time, tuple(seen.pictures))
    if report_dir is not None:
        write_report(report, Path(report_dir), force)
    return report


def _refuse_links(graph: onnx.ModelProto, folder: Path) -> None:
    """Refuse a graph whose external data are links that are not followed; missing data are the gates' to tell."""
    for tensor in graph.graph.initializer:
        try:
            span_of(tensor, folder)
        except BadSpan as error:
            if error.fault == "link":
                raise


def _work_folder(report_dir: str | Path | None) -> contextlib.AbstractContextManager[str]:
    if report_dir is None:
        return tempfile.TemporaryDirectory()
    return contextlib.nullcontext(str(partial_path(Path(report_dir))))


def _why_by_block(level: str, blocks: Blocks | None, held: Reference) -> str | None:
    """Return why the whole graph is not to be run, None where it is."""
    if level == "blocks":
        return "it runs the whole graph; --level full does"
    if blocks is not None:
        return "it runs the whole graph; without --blocks it does"
    packed = [tensor for name, tensor in held.checkpoint.tensors.items() if tensor.dtype == "U8"]
    weights = sum(math.prod(tensor.shape) for tensor in (*held.checkpoint.tensors.values(), *packed))
    need, free = WHOLE_BYTES * weights, available_memory()
    if free is None or need <= free:
        return None
    return f"it runs the whole graph, which needs about {need / 2**30:.1f} GiB of memory, more than is free here"


def _all_gates(subject: _Subject, work: Path) -> Iterator[Gate]:
    """Yield every gate as it is decided, filling in the figures of each linear."""
    graph, held, folder = subject.graph, subject.held, subject.folder
    kinds = [name for name in FORMATS if name == NVFP4.name or name in held.formats.values()]
    references = {name: arithmetic_of(name).quantize_reference for name in kinds}
    yield from guarded("functions", lambda: [functions_gate(references)])
    yield from guarded("files", lambda: [weight_gates.files_gate(graph, folder, (held.directory, folder))])
    yield from guarded("promise", lambda: [promise_gate(graph, held.formats, held.linears)])
    yield from guarded("attention promise", lambda: _attention_promise(subject))
    yield from guarded("stored tensors", lambda: [weight_gates.stored_tensors_gate(graph, folder, held)])
    try:
        known, wanted = set(held.blocks), {"", *subject.blocks}
        linears = tuple(linear for linear in Graph(graph).linears() if block_of(linear.path, known) in wanted)
    except BadGraph as error:
        yield failed_to_run("linears", error)
        return
    subject = replace(subject, linears=linears)
    yield from _weight_gates(subject)
    found = check_by_block(_task(subject), work, _identity(subject))
    yield from _teacher_gates(subject, found)
    if subject.why_by_block is None:
        yield from _structure_gates(subject)
        yield from _end_to_end_gates(subject)
        return
    for name, worst in found.structure_errors.items():
        subject.figures[name].update(structure_error=worst)
    subject.seen.by_time = ByTime(left_out=subject.why_by_block)
    yield structure_by_block(_task(subject), found.structure)
    yield from (skipped(name, subject.why_by_block) for name in ("inputs", "end to end", "second witness"))


def _attention_promise(subject: _Subject) -> Iterator[Gate]:
    held = subject.held.checkpoint.fp8_attentions if subject.held.quantized else None
    gate = attention_promise_gate(subject.graph, held)
    if gate is not None:
        yield gate


def _weight_gates(subject: _Subject) -> Iterator[Gate]:
    graph, folder, held = subject.graph, subject.folder, subject.held
    if held.quantized:
        yield from guarded("weights", lambda: [weight_gates.weights_gate(graph, folder, held, subject.linears)])
        return
    quantized = subject.quantized

    def errors() -> Iterator[Gate]:
        size, bias, measured = weight_gates.quantization_gates(graph, folder, held, quantized)
        for name, (error, excess) in measured.items():
            subject.figures[name].update(weight_error=error, scale_bias=excess)
        yield from (size, bias)

    yield from guarded("weight error", errors)
    manifest = read_checkpoint_manifest(folder)
    rounds_to_nearest = manifest.method == "ptq" if manifest else metadata_of(graph).get("fp4trt.recipe") == _PTQ
    if rounds_to_nearest:
        requantized = held.requantized
        yield from guarded(
            "rounded weights", lambda: [weight_gates.rounded_weights_gate(graph, folder, held, quantized, requantized)]
        )


def _task(subject: _Subject) -> Task:
    return Task(
        subject.graph,
        subject.folder,
        subject.held,
        subject.linears,
        subject.blocks,
        subject.shapes[-1],
        subject.shapes if subject.why_by_block is not None else (),
        _structure_limit(subject.held),
    )


def _structure_limit(held: Reference) -> float:
    return structure_gates.STRUCTURE_LIMIT if held.quantized else structure_gates.QUANTIZED_STRUCTURE_LIMIT


def _identity(subject: _Subject) -> dict[str, Any]:
    """Return what must be the same for a killed validation to resume; weights are known by size and time of change."""
    files = {tensor.file for tensor in subject.held.checkpoint.tensors.values()}
    for tensor in subject.graph.graph.initializer:
        with contextlib.suppress(BadGraph):  # which the gate on files says
            span = span_of(tensor, subject.folder)
            files |= {span.file} if span is not None else set()
    return {
        "graph": sha256_of(subject.path),
        "weights": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)],
        "blocks": subject.blocks,
        "shapes": subject.shapes,
        "structure": subject.why_by_block is not None,
        "attentions": True,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "onnxruntime")},
    }


def _teacher_gates(subject: _Subject, found: ByBlock) -> Iterator[Gate]:
    """Yield the gates on single linears, each fed with the reference's own input."""
    if found.failure is not None:
        yield found.failure
    else:
        exact, loose = subject.held.quantized, teacher_gates.QUANTIZED_LINEAR_LIMIT
        yield teacher_gates.quantizer_gate(found.results, [linear.path for linear in subject.quantized])
        yield teacher_gates.linear_gate(found.results, teacher_gates.LINEAR_LIMIT if exact else loose)
        yield teacher_gates.module_gate(found.results, teacher_gates.MODULE_LIMIT if exact else loose)
        if found.attentions:
            yield from attention_gates(found.attentions)
    for result in found.results:
        subject.figures[result.linear.path].update(differing_codes=result.differing, output_error=result.error)


def _structure_gates(subject: _Subject) -> Iterator[Gate]:
    """Yield the gates on the whole graph in FP32."""
    graph, folder = subject.graph, subject.folder
    walk = Walk(subject.held, torch.float32, quantize_activations=False)
    runs = [walk.whole(shape, keep_modules=True) for shape in subject.shapes]
    limit = _structure_limit(subject.held)

    def structure() -> Iterator[Gate]:
        gate, errors = structure_gates.structure_gate(graph, folder, subject.linears, runs, limit)
        for name, error in errors.items():
            subject.figures[name].update(structure_error=error)
        yield gate

    yield from guarded("structure", structure)
    yield from guarded("inputs", lambda: [structure_gates.inputs_gate(graph, folder, runs[0].inputs)])


def _end_to_end_gates(subject: _Subject) -> Iterator[Gate]:
    """Yield the gates on the whole graph in BF16 with quantized activations."""
    graph, held, seen = subject.graph, subject.held, subject.seen
    family, config = held.checkpoint.family, held.checkpoint.config
    calls = [(name_of(shape), held.example(shape, torch.bfloat16)) for shape in (subject.shapes[0], TINY)]
    times = batch_of_times(family, config, held.example(SHAPES[0], torch.bfloat16))
    more = [] if times is None else [("several times", times)]
    whole, tiny, *others = Walk(held, torch.bfloat16, quantize_activations=True).outputs([*calls, *more])
    limit = structure_gates.END_TO_END_LIMIT if subject.held.quantized else structure_gates.QUANTIZED_STRUCTURE_LIMIT
    session = cache(lambda: runtime_session(simulate(graph), subject.folder))

    def keep(outputs: Sequence[FloatArray]) -> None:
        seen.pictures += pictures_of(family, config, replace(whole, shape=f"end to end, {whole.shape}"), outputs)

    yield from guarded("end to end", lambda: [structure_gates.end_to_end_gate(graph, session(), whole, limit, keep)])
    yield from guarded("second witness", lambda: [structure_gates.witness_gate(subject.path, graph, session(), tiny)])
    seen.by_time, pictures = errors_by_time(family, config, session, others)
    seen.pictures += pictures
