"""The verdict on a deployable graph: every gate, against the checkpoint it was made of.

The one file of this room that needs torch: the reference is the checkpoint as `calibration` runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Final

import click
import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from calibration import nvfp4
from calibration.checkpoint import Checkpoint, load, read
from calibration.errors import BadCheckpoint
from calibration.source import BUILT_IN, find_source, load_json, load_source, tensors_of
from onnx_functions import structure_gates, teacher_gates, weight_gates
from onnx_functions.checkpoint_manifest import read_checkpoint_manifest
from onnx_functions.errors import BadGraph, BadReference
from onnx_functions.external_data import array_of, load_graph
from onnx_functions.linears import Graph, Linear, metadata_of, promised_linears
from onnx_functions.promise_gate import promise_gate
from onnx_functions.report import check_report_folder, write_report
from onnx_functions.simulation import runtime_session, simulate
from onnx_functions.structure_gates import Run
from onnx_functions.teacher_gates import Teacher, TeacherForced, block_of
from onnx_functions.verdict import Figures, FloatArray, Gate, Report, failed_to_run, guarded, skipped

__all__ = ["LEVELS", "validate"]

LEVELS: Final = ("full", "blocks")

SHAPES: Final = ((1, 16, 8), (2, 36, 11))
"""Batch, image and text tokens of the two runs; unlike each other in everything, so that nothing can be baked
in."""

TINY: Final = (1, 4, 3)

MODEL: Final = "model.onnx"


@dataclass(frozen=True)
class _Reference:
    """A checkpoint, quantized or not, as the gates want it: a `weight_gates.Reference`.

    Attributes:
        checkpoint: its tensors.
        quantized: whether its linears are stored in NVFP4.
        rounds_scales: whether the graph rounds the product of the scales to BF16 (`--scale-dtype bfloat16`).
        names: of the tensors that the graph must hold byte by byte.
        fp4: linears that the graph must compute in NVFP4.
    """

    checkpoint: Checkpoint
    quantized: bool
    rounds_scales: bool
    names: tuple[str, ...]
    fp4: tuple[str, ...]

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @cached_property
    def stored_fp4(self) -> frozenset[str]:
        """Linears that the checkpoint stores in NVFP4."""
        return frozenset(self.checkpoint.quantized)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """All its linears: they alone have matrices."""
        matrices = (name.rpartition(".") for name, tensor in self.checkpoint.tensors.items() if len(tensor.shape) == 2)
        return tuple(path for path, _, leaf in matrices if leaf == "weight")

    def raw(self, name: str) -> npt.NDArray[Any]:
        return self.checkpoint.raw(name)

    def weight(self, path: str) -> FloatArray:
        """Return a linear's weight [N, K], FP32 rounded to BF16."""
        if path not in self.stored_fp4:
            return _round(self.raw(f"{path}.weight"))
        codes = nvfp4.unpack_codes(self.checkpoint.tensor(f"{path}.weight")).numpy()
        scales = self.raw(f"{path}.weight_scale").view(np.uint8)
        return self.dequantize(codes, scales, self.raw(f"{path}.weight_scale_2"))

    def dequantize(self, codes: npt.NDArray[Any], scales: npt.NDArray[Any], scale: npt.ArrayLike) -> FloatArray:
        """Return what the graph's chain makes of codes 0..15, E4M3 bytes and a global scale."""
        d = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.asarray(scale, np.float32)
        d = _round(d) if self.rounds_scales else d
        return _round(weight_gates.E2M1[codes] * np.repeat(d, nvfp4.BLOCK_SIZE, -1))

    def requantized(self, _path: str, weight: FloatArray, scale: np.float32) -> FloatArray:
        """Return a weight, or an activation, after plain rounding to NVFP4 under a global scale."""
        return self.dequantize(*_quantize(weight, scale), scale)

    def model(self, dtype: torch.dtype, quantize_activations: bool) -> nn.Module:
        """Load the reference into torch."""
        if self.quantized:
            return load(self.directory, dtype, quantize_activations)
        return load_source(self.directory, dtype)


def _round(array: npt.NDArray[Any]) -> FloatArray:
    """Round to BF16 values, held as FP32."""
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)


def _quantize(x: FloatArray, scale: np.float32) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Quantize with torch; returns codes 0..15 and the bytes of E4M3 block scales."""
    codes, scales = nvfp4.quantize(torch.from_numpy(np.ascontiguousarray(x)), torch.tensor(float(scale)))
    return codes.numpy(), scales.view(torch.uint8).numpy()


def validate(
    model: str | Path,
    reference: str | Path | None = None,
    level: str = "full",
    report_dir: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Check the numerics of a deployable graph.

    Args:
        model: the ONNX file, or the folder that holds `model.onnx`.
        reference: the quantized checkpoint; None takes the one beside the graph. A 16-bit checkpoint in its place
            (`digits` for the built-in one) makes the gates measure the quantization error itself.
        level: `full`, or `blocks` for what needs no run of the whole graph.
        report_dir: folder for report.json and, where matplotlib is installed, report.html; None writes none.
        force: replace files of these names there that are no reports of fp4trt.
        say: called with one line per finished gate.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        BadGraph: the file is no deployable graph.
        BadReference: the reference is no checkpoint of this graph.
        UnknownArtifact: a manifest is damaged.
        OutputExists, OSError: the report cannot be written; known before any gate runs.
    """
    path = Path(model)
    path = path / MODEL if path.is_dir() else path
    graph = load_graph(path)
    held = _reference_of(graph, path, reference)
    if report_dir is not None:
        check_report_folder(Path(report_dir), force)
    figures: dict[str, dict[str, Any]] = {name: {} for paths in promised_linears(graph).values() for name in paths}
    gates = []
    for gate in _all_gates(path, graph, held, level, figures):
        gates.append(gate)
        if say is not None:
            say(gate.line)
    rows = tuple(Figures(name, block_of(name), **values) for name, values in figures.items())
    kind = "quantized" if held.quantized else "plain"
    report = Report(path, held.directory, kind, level, tuple(gates), rows)
    if report_dir is not None:
        write_report(report, Path(report_dir), force)
    return report


def _folder_of(reference: str | Path | None, model: Path) -> Path:
    if reference is None:
        if not (model.parent / "config.json").is_file():
            raise BadReference(
                f"no checkpoint lies beside {model}, as beside a graph that was exported elsewhere with "
                "--copy-weights; expected config.json there, or the checkpoint in --reference CHECKPOINT"
            )
        return model.parent
    folder = Path(reference)
    return find_source(BUILT_IN) if str(reference) == BUILT_IN and not folder.exists() else folder


def _reference_of(graph: onnx.ModelProto, model: Path, reference: str | Path | None) -> _Reference:
    promised = promised_linears(graph)
    folder = _folder_of(reference, model)
    beside, manifest = (read_checkpoint_manifest(path) for path in (model.parent, folder))
    try:
        config = load_json(folder / "config.json")
        quantized = "quantization_config" in config
        checkpoint = read(folder) if quantized else Checkpoint(folder, config, {}, tensors_of(folder))
    except BadCheckpoint as error:
        raise BadReference(f"the reference cannot be used: {error}; give --reference CHECKPOINT") from None
    for path in (path for paths in promised.values() for path in paths):
        if f"{path}.weight" not in checkpoint.tensors:
            raise BadReference(f"{folder} has no {path}.weight, which the graph needs; give the graph's own checkpoint")
    made = frozenset[str]() if quantized else frozenset(f"{path}.weight" for path in promised.get("nvfp4", []))
    names = tuple(name for name in checkpoint.tensors if name not in made)
    # A 16-bit reference says what the linears are; which of them are FP4 is then the graph's word and that of the
    # manifest beside it.
    stored = checkpoint.quantized if quantized else (*promised.get("nvfp4", ()), *(beside.nvfp4 if beside else ()))
    fp4 = tuple(dict.fromkeys((*stored, *(manifest.nvfp4 if manifest else ()))))
    rounds = metadata_of(graph).get("fp4trt.scale_dtype") == "bfloat16"
    return _Reference(checkpoint, quantized, rounds, names, fp4)


def _all_gates(
    path: Path, graph: onnx.ModelProto, held: _Reference, level: str, figures: dict[str, dict[str, Any]]
) -> Iterator[Gate]:
    """Yield every gate as it is decided, filling in the figures of each linear."""
    folder = path.parent
    yield from guarded("functions", lambda: [weight_gates.functions_gate(nvfp4.quantize_reference)])
    yield from guarded("files", lambda: [weight_gates.files_gate(graph, folder, (held.directory, folder))])
    yield from guarded("promise", lambda: [promise_gate(graph, held.fp4, held.linears)])
    yield from guarded("stored tensors", lambda: [weight_gates.stored_tensors_gate(graph, folder, held)])
    try:
        subject = _Subject(path, graph, held, tuple(Graph(graph).linears()), figures)
    except BadGraph as error:
        yield failed_to_run("linears", error)
        return
    yield from _weight_gates(subject)
    captured = _capture(subject, with_whole_graph=level == "full")
    yield from _teacher_gates(subject, captured)
    if level == "full":
        yield from _structure_gates(subject)
        yield from _end_to_end_gates(subject, captured)
        return
    why = "it runs the whole graph; --level full does"
    yield from (skipped(name, why) for name in ("structure", "inputs", "end to end", "second witness"))


@dataclass(frozen=True)
class _Subject:
    """What is validated: a graph, its linears, the reference; and the figures that the gates fill in."""

    path: Path
    graph: onnx.ModelProto
    held: _Reference
    linears: tuple[Linear, ...]
    figures: dict[str, dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.path.parent


@dataclass(frozen=True)
class _Captured:
    """The BF16 reference, run: every linear's input and output, and two runs of the whole where they are wanted."""

    teacher: Run
    whole: Run | None
    tiny: Run | None


def _weight_gates(subject: _Subject) -> Iterator[Gate]:
    graph, folder, held = subject.graph, subject.folder, subject.held
    if held.quantized:
        yield from guarded("weights", lambda: [weight_gates.weights_gate(graph, folder, held, subject.linears)])
        return
    promised = set(promised_linears(graph).get("nvfp4", []))
    fp4 = [linear for linear in subject.linears if linear.path in promised]

    def errors() -> Iterator[Gate]:
        size, bias, measured = weight_gates.quantization_gates(graph, folder, held, fp4)
        for name, (error, excess) in measured.items():
            subject.figures[name].update(weight_error=error, scale_bias=excess)
        yield from (size, bias)

    yield from guarded("weight error", errors)
    if metadata_of(graph).get("fp4trt.recipe") == "nvfp4-ptq":
        requantized = held.requantized
        yield from guarded(
            "rounded weights", lambda: [weight_gates.rounded_weights_gate(graph, folder, held, fp4, requantized)]
        )


def _capture(subject: _Subject, with_whole_graph: bool) -> _Captured:
    model = subject.held.model(torch.bfloat16, quantize_activations=True)
    teacher = _run(model, subject.held, SHAPES[-1], torch.bfloat16, keep_modules=True)
    if not with_whole_graph:
        return _Captured(teacher, None, None)
    whole, tiny = (_run(model, subject.held, shape, torch.bfloat16, keep_modules=False) for shape in (SHAPES[0], TINY))
    return _Captured(teacher, whole, tiny)


def _run(
    model: nn.Module, held: _Reference, shape: tuple[int, int, int], dtype: torch.dtype, keep_modules: bool
) -> Run:
    """Run the reference once on seeded inputs, keeping the inputs and outputs of its innermost modules."""
    given = held.checkpoint.family.example_inputs(held.checkpoint.config, *shape, 0, dtype)
    kept: dict[tuple[str, str], FloatArray] = {}

    def keep(path: str, x: torch.Tensor, y: torch.Tensor) -> None:
        kept[path, "input"], kept[path, "output"] = x.float().numpy(), y.float().numpy()

    def hook(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            keep(path, args[0], output)

    # Norms and activations too: they help to find where a graph first goes astray.
    modules = [(path, module) for path, module in model.named_modules() if not any(module.children())]
    hooks = [module.register_forward_hook(partial(hook, path)) for path, module in modules if keep_modules]
    with torch.inference_mode():
        kept["", "output"] = model(**given, return_dict=False)[0].float().numpy()
    for handle in hooks:
        handle.remove()
    names = f"B={shape[0]} L={shape[1]} T={shape[2]}"
    return Run(names, {name: value.float().numpy() for name, value in given.items()}, kept)


def _teacher_gates(subject: _Subject, captured: _Captured) -> Iterator[Gate]:
    teacher = _teacher(subject, captured.teacher)
    blocks: dict[str, list[Linear]] = {}
    for linear in subject.linears:
        blocks.setdefault(block_of(linear.path), []).append(linear)
    results: list[TeacherForced] = []

    def gates() -> Iterator[Gate]:
        with click.progressbar(blocks.values(), label="teacher-forced blocks", file=sys.stderr, show_eta=True) as bar:
            for members in bar:
                results.extend(teacher_gates.compare_block(subject.graph, subject.folder, members, teacher))
        yield teacher_gates.quantizer_gate(results, promised_linears(subject.graph).get("nvfp4", []))
        exact = subject.held.quantized
        loose = teacher_gates.QUANTIZED_LINEAR_LIMIT
        yield teacher_gates.linear_gate(results, teacher_gates.LINEAR_LIMIT if exact else loose)
        yield teacher_gates.module_gate(results, teacher_gates.MODULE_LIMIT if exact else loose)

    yield from guarded("teacher-forced", gates)
    for result in results:
        subject.figures[result.linear.path].update(differing_codes=result.differing, output_error=result.error)


def _teacher(subject: _Subject, run: Run) -> Teacher:
    held, index = subject.held, Graph(subject.graph)
    scales: dict[str, np.float32] = {}
    for linear in subject.linears:
        if linear.quantizer is None:
            continue
        stored = held.checkpoint.tensors.get(f"{linear.path}.input_scale")
        # A 16-bit reference knows no activation scales: then the graph's own are taken.
        own = index.initializers.get(linear.quantizer.scale)
        if stored is None and own is None:
            raise BadGraph(f"node {linear.quantizer.node} reads a scale that is no initializer; export the graph again")
        value = held.raw(f"{linear.path}.input_scale") if stored else array_of(own, subject.folder) if own else None
        scales[linear.path] = np.float32(np.asarray(value).reshape(()))

    def quantize(path: str, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        codes, scale_bytes = _quantize(x, scales[path])
        return weight_gates.E2M1[codes], scale_bytes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)

    def product(path: str, x: FloatArray) -> FloatArray:
        if held.quantized and path in scales:
            x = held.requantized(path, x, scales[path])
        bias = f"{path}.bias"
        added = torch.from_numpy(_round(held.raw(bias))) if bias in held.checkpoint.tensors else None
        weight = torch.from_numpy(held.weight(path))
        return nn.functional.linear(torch.from_numpy(np.ascontiguousarray(x)), weight, added).numpy()

    inputs = {path: value for (path, which), value in run.values.items() if which == "input"}
    outputs = {path: value for (path, which), value in run.values.items() if which == "output"}
    return Teacher(inputs, quantize, product, outputs)


def _structure_gates(subject: _Subject) -> Iterator[Gate]:
    graph, folder, held = subject.graph, subject.folder, subject.held
    model = held.model(torch.float32, quantize_activations=False)
    runs = [_run(model, held, shape, torch.float32, keep_modules=True) for shape in SHAPES]
    limit = structure_gates.STRUCTURE_LIMIT if held.quantized else structure_gates.QUANTIZED_STRUCTURE_LIMIT

    def structure() -> Iterator[Gate]:
        gate, errors = structure_gates.structure_gate(graph, folder, subject.linears, runs, limit)
        for name, error in errors.items():
            subject.figures[name].update(structure_error=error)
        yield gate

    yield from guarded("structure", structure)
    yield from guarded("inputs", lambda: [structure_gates.inputs_gate(graph, folder, runs[0].inputs)])


def _end_to_end_gates(subject: _Subject, captured: _Captured) -> Iterator[Gate]:
    graph = subject.graph
    whole, tiny = captured.whole, captured.tiny
    if whole is None or tiny is None:
        return
    limit = structure_gates.END_TO_END_LIMIT if subject.held.quantized else structure_gates.QUANTIZED_STRUCTURE_LIMIT
    session = cache(lambda: runtime_session(simulate(graph), subject.folder))
    yield from guarded("end to end", lambda: [structure_gates.end_to_end_gate(graph, session(), whole, limit)])
    yield from guarded("second witness", lambda: [structure_gates.witness_gate(subject.path, graph, session(), tiny)])
