"""The reference of a validation: a checkpoint, quantized or not, as `calibration` runs it in torch.

It runs block by block (`calibration.by_block.runner`), so that one block's weights are in memory at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from calibration.by_block.runner import BlockRunner, Outputs
from calibration.checkpoints.plain import open_plain
from calibration.checkpoints.quantized import BRANCH, SMOOTHING, Checkpoint, empty_model, read, reader
from calibration.formats import fp8
from calibration.formats.arithmetic import arithmetic_of
from calibration.formats.fp8_attention import MODULE as FP8_ATTENTION
from calibration.formats.fp8_attention import FP8Attention
from calibration.formats.linears import branch_output
from fp4trt.account import SCALE_LEAVES
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.errors import BadCheckpoint, BadGraph, BadReference
from fp4trt.json_file import load_json
from fp4trt.make_source import folder_of
from fp4trt.number_formats import FORMATS, NVFP4
from onnx_functions.formats import graph_format
from onnx_functions.graph.external_data import array_of
from onnx_functions.graph.index import Index
from onnx_functions.graph.linears import Linear, declared_slots, metadata_of, promised_linears
from onnx_functions.graph.lora_slots import FACTORS, Slots
from onnx_functions.validation.attention_gates import AttentionTeacher
from onnx_functions.validation.reference_sizes import refuse_other_sizes
from onnx_functions.validation.structure_gates import Run, output_key
from onnx_functions.validation.teacher_gates import Teacher
from onnx_functions.validation.verdict import FloatArray

__all__ = [
    "Inputs",
    "Outputs",
    "Reference",
    "Shape",
    "Values",
    "Walk",
    "attention_teacher_of",
    "name_of",
    "open_reference",
    "teacher_of",
]

"""What a linear may be quantized to."""

Shape = tuple[int, int, int]
"""Batch, image tokens, text tokens."""

Inputs = dict[str, torch.Tensor]

Values = dict[tuple[str, str], FloatArray]
"""(module path, `input` or `output`) to FP32 values; the model's own output is that of the empty path. Of an
attention in FP8 also `q`, `k` and `v`, what its products read before rounding, and `attended`, what they give."""

ATTENDED: Final = ("q", "k", "v")

_LORA_RANK: Final = 4
"""The rank of the LoRA that slots are checked with."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint, quantized or not, as the gates want it: a `weight_gates.Reference`.

    Attributes:
        checkpoint: its tensors.
        quantized: whether its linears are stored quantized.
        rounds_scales: whether the graph rounds the product of the scales to BF16 (`--scale-dtype bfloat16`).
        names: of the tensors that the graph must hold byte by byte.
        formats: linears that the graph must compute in a number format, by its name.
        wide: names of the tensors that the graph has in FP32, scales apart; all others that are stored in more than
            BF16 it has rounded to that.
        slots: for LoRAs, that the graph has; None without any.
    """

    checkpoint: Checkpoint
    quantized: bool
    rounds_scales: bool
    names: tuple[str, ...]
    formats: Mapping[str, str]
    wide: frozenset[str] = frozenset()
    slots: Slots | None = None

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.checkpoint.directory

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Its blocks, in the order in which they run."""
        return self.checkpoint.family.blocks(self.checkpoint.config)

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """All its linears that a graph has: matrices whose rows are not just looked up, and whose result is read."""
        matrices = (name.rpartition(".") for name, tensor in self.checkpoint.tensors.items() if len(tensor.shape) == 2)
        family, config = self.checkpoint.family, self.checkpoint.config
        linears = (path for path, _, leaf in matrices if leaf == "weight" and path not in family.lookups)
        return tuple(path for path in linears if not family.is_unused(config, path))

    @cached_property
    def factors(self) -> Mapping[str, FloatArray]:
        """Seeded factors of a LoRA for every slot, by the graph's inputs: FP32 that BF16 can hold."""
        found: dict[str, FloatArray] = {}
        if self.slots is None:
            return found
        random, rank = np.random.default_rng(0), min(_LORA_RANK, self.slots.max_rank)
        sizes = self.checkpoint.family.linears(self.checkpoint.config)
        for group in self.slots.groups:
            columns = sizes[group[0]][1]
            found[f"{group[0]}.{FACTORS[0]}"] = _round(random.standard_normal((rank, columns)) / math.sqrt(columns))
            for path in group:
                values = random.standard_normal((sizes[path][0], rank))
                found[f"{path}.{FACTORS[1]}"] = _round(values / math.sqrt(rank))
        return found

    @cached_property
    def slot_factors(self) -> Mapping[str, tuple[FloatArray, FloatArray]]:
        """The two of :attr:`factors` that each linear with a slot has."""
        groups = self.slots.groups if self.slots is not None else ()
        return {
            path: (self.factors[f"{group[0]}.{FACTORS[0]}"], self.factors[f"{path}.{FACTORS[1]}"])
            for group in groups
            for path in group
        }

    def arrays(self, call: Inputs) -> dict[str, FloatArray]:
        """Return the graph's inputs for a call of the model, with factors for its slots."""
        return {**arrays_of(call), **self.factors}

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as it is stored."""
        return self.checkpoint.raw(name)

    def weight(self, path: str) -> FloatArray:
        """Return a linear's weight [N, K] as the graph multiplies by it, as FP32."""
        kind = self.checkpoint.formats.get(path)
        if kind is None:
            return self.plain(f"{path}.weight")
        quantized, scale = graph_format(kind).stored(lambda leaf: self.raw(f"{path}.{leaf}"))
        return self.dequantize(kind, quantized, scale)

    def plain(self, name: str) -> FloatArray:
        """Return a tensor that is not quantized as the graph has it, as FP32: rounded to BF16, but for some."""
        return self.raw(name).astype(np.float32) if name in self.wide else _round(self.raw(name))

    def dequantize(self, kind: str, quantized: Sequence[FloatArray], scale: np.float32) -> FloatArray:
        """Return what the graph's chain makes of codes, block scales and the scale of the tensor."""
        rounded = _round if self.rounds_scales else lambda d: d
        return _round(graph_format(kind).dequantize(quantized, scale, rounded))

    def requantized(self, path: str, weight: FloatArray, scale: np.float32) -> FloatArray:
        """Return a linear's weight, or its input, after plain rounding to the linear's format under a scale."""
        kind = self.formats.get(path, NVFP4.name)
        return self.dequantize(kind, quantized_values(kind, weight, scale), scale)

    def example(self, shape: Shape, dtype: torch.dtype) -> Inputs:
        """Return seeded inputs of the model."""
        return self.checkpoint.family.example_inputs(self.checkpoint.config, shape, 0, dtype)


def _round(array: npt.NDArray[Any]) -> FloatArray:
    """Round to BF16 values, held as FP32."""
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float32)


def quantized_values(kind: str, x: FloatArray, scale: np.float32) -> tuple[FloatArray, ...]:
    """Quantize with torch; returns the values of codes and block scales. A scale that is none gives what IEEE says."""
    tensors = arithmetic_of(kind).stored(torch.from_numpy(np.ascontiguousarray(x)), torch.tensor(float(scale)))

    def raw(leaf: str) -> npt.NDArray[Any]:
        value = tensors[leaf]
        return value.view(torch.uint8).numpy().view(_E4M3) if value.dtype == torch.float8_e4m3fn else value.numpy()

    return graph_format(kind).stored(raw)[0]


_E4M3: Final = ml_dtypes.float8_e4m3fn


def open_reference(graph: onnx.ModelProto, model: Path, reference: str | Path | None) -> Reference:
    """Return the checkpoint that a graph is to be compared with; None takes the one beside it.

    Raises:
        BadReference: it is missing, damaged, or not of this graph.
        UnknownArtifact: a manifest is damaged.
    """
    promised = promised_linears(graph)
    folder = _folder_of(reference, model)
    beside, manifest = (read_checkpoint_manifest(path) for path in (model.parent, folder))
    try:
        config = load_json(folder / "config.json")
        quantized = "quantization_config" in config
        checkpoint = read(folder) if quantized else Checkpoint(folder, config, {}, tensors_in_folder(folder))
    except BadCheckpoint as error:
        raise BadReference(f"the reference cannot be used: {error}; give --reference CHECKPOINT") from None
    for path in (path for paths in promised.values() for path in paths):
        if f"{path}.weight" not in checkpoint.tensors:
            raise BadReference(f"{folder} has no {path}.weight, which the graph needs; give the graph's own checkpoint")
    if reference is not None:  # with the checkpoint beside it, other sizes are the gates' to tell
        refuse_other_sizes(graph, folder, checkpoint.family, config)
    made = set[str]() if quantized else {f"{path}.weight" for kind in FORMATS for path in promised.get(kind, [])}
    family = checkpoint.family
    names = tuple(name for name in checkpoint.tensors if name not in made and not family.is_unused(config, name))
    # A 16-bit reference says what the linears are; which of them are quantized is then the graph's word and that of the
    # manifest beside it.
    words = [manifest, None if quantized else beside]
    formats: dict[str, str] = {}
    for kind in FORMATS:
        paths = [*(checkpoint.of_format(kind) if quantized else promised.get(kind, ()))]
        paths += [path for word in words if word is not None for path in word.quantized(kind)]
        formats |= {path: kind for path in paths if path not in formats}
    rounds = metadata_of(graph).get("fp4trt.scale_dtype") == "bfloat16"
    wide = (tensor.name for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)
    in_fp32 = frozenset(filter(_is_no_scale, wide))
    return Reference(checkpoint, quantized, rounds, names, formats, in_fp32, declared_slots(graph))


def _is_no_scale(name: str) -> bool:
    return name.rpartition(".")[2] not in SCALE_LEAVES


def _folder_of(reference: str | Path | None, model: Path) -> Path:
    if reference is None:
        if not (model.parent / "config.json").is_file():
            raise BadReference(
                f"no checkpoint lies beside {model}, as beside a graph that was exported elsewhere with "
                "--copy-weights; expected config.json there, or the checkpoint in --reference CHECKPOINT"
            )
        return model.parent
    try:
        return folder_of(reference)
    except BadCheckpoint as error:
        raise BadReference(f"the reference cannot be used: {error}") from None


class Walk:
    """The reference in one dtype, run block by block."""

    def __init__(self, held: Reference, dtype: torch.dtype, quantize_activations: bool) -> None:
        read_as: Callable[[str], torch.Tensor]
        if held.quantized:
            self._model = empty_model(held.checkpoint, quantize_activations)
            read_as = reader(held.checkpoint, self._model, dtype)
        else:
            source = open_plain(held.directory)
            self._model, read_as = source.model, partial(source.tensor, dtype=dtype)
        _add_loras(self._model, held, dtype)
        self._held, self._dtype = held, dtype

        def tensor(name: str) -> torch.Tensor:
            return _as_in_graph(name, held, read_as(name))

        self._runner = BlockRunner(self._model, held.blocks, tensor, read_by=held.checkpoint.family.read_by)

    def block(self, path: str, calls: Sequence[tuple[Inputs, Outputs]]) -> Iterator[tuple[Values, Outputs]]:
        """Load a block, run every call from what the block before it gave; yield values inside and outputs."""
        with self._runner.loaded(path), torch.inference_mode():
            for call, before in calls:
                with _recording(self._model, f"{path}.", ()) as kept:
                    outputs = self._runner.run(path, call, before)
                yield {**kept, **_of_block(path, outputs[self._runner.kept :])}, outputs

    def finish(self, call: Inputs, before: Outputs) -> Values:
        """Run what lies outside the blocks; return the values there and the model's outputs."""
        outside = tuple(f"{block}." for block in self._held.blocks)
        with torch.inference_mode(), _recording(self._model, "", outside) as kept:
            kept.update(_of_block("", self._runner.finish(call, before)))
        return kept

    def whole(self, shape: Shape, keep_modules: bool) -> Run:
        """Run the whole model once on seeded inputs, keeping the values of its innermost modules, or its outputs."""
        call, outputs, values = self._held.example(shape, self._dtype), Outputs(), Values()
        for path in self._held.blocks:
            for kept, after in self.block(path, [(call, outputs)]):
                outputs = after
                values.update(kept if keep_modules else {})
        values.update(self.finish(call, outputs))
        return Run(name_of(shape), self._held.arrays(call), values)

    def outputs(self, calls: Sequence[tuple[str, Inputs]]) -> list[Run]:
        """Run the whole model on named calls, keeping its outputs; each block is loaded once for all of them."""
        before = [Outputs()] * len(calls)
        for path in self._held.blocks:
            before = [
                after
                for _, after in self.block(path, [(call, kept) for (_, call), kept in zip(calls, before, strict=True)])
            ]
        return [
            Run(name, self._held.arrays(call), self.finish(call, outputs))
            for (name, call), outputs in zip(calls, before, strict=True)
        ]


def _add_loras(model: nn.Module, held: Reference, dtype: torch.dtype) -> None:
    """Let the linears with slots add the product of the reference's factors to what they give."""

    def add(a: torch.Tensor, b: torch.Tensor, _module: nn.Module, args: tuple[Any, ...], output: Any) -> torch.Tensor:
        # Of the linear's own input, before any smoothing. On the meta device only shapes are asked for.
        return output if output.is_meta else output + branch_output(args[0], a, b)

    for path, pair in held.slot_factors.items():
        a, b = (torch.from_numpy(factor).to(dtype) for factor in pair)
        model.get_submodule(path).register_forward_hook(partial(add, a, b))


def _of_block(block: str, outputs: Outputs) -> Values:
    return {output_key(block, place): value.float().numpy() for place, value in enumerate(outputs)}


def _as_in_graph(name: str, held: Reference, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a graph has it: what is stored in FP16 or FP32 is rounded to BF16, if it is not FP32 there."""
    exact = name in held.wide or not _is_no_scale(name)
    if exact or held.checkpoint.tensors[name].dtype not in ("F16", "F32"):
        return value
    return value.to(torch.bfloat16).to(value.dtype)


def name_of(shape: Shape) -> str:
    """Return a shape for people."""
    return f"B={shape[0]} L={shape[1]} T={shape[2]}"


def arrays_of(call: Inputs) -> dict[str, FloatArray]:
    """Return a model's inputs, numbers with a fraction as FP32."""
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in call.items()}


@contextlib.contextmanager
def _recording(model: nn.Module, prefix: str, but: tuple[str, ...]) -> Iterator[Values]:
    """Keep inputs and outputs of the innermost modules whose path starts with `prefix`, and with none of `but`.

    Of a module that is called more than once they are the first call's, as its nodes in a graph that bear its name.
    """
    kept: Values = {}

    def hook(path: str, _module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            kept.setdefault((path, "input"), args[0].float().numpy())
            kept.setdefault((path, "output"), output.float().numpy())

    def attended(path: str, _module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        for name, value in zip((*ATTENDED, "attended"), (*args[:3], output), strict=True):
            kept[path, name] = value.float().numpy()

    # Norms and activations too: they help to find where a graph first goes astray.
    inner = [(path, module) for path, module in model.named_modules() if not any(module.children())]
    chosen = [(path, module) for path, module in inner if path.startswith(prefix) and not path.startswith(but)]
    hooks = [module.register_forward_hook(partial(hook, path)) for path, module in chosen]
    hooks += [
        module.register_forward_hook(partial(attended, path.removesuffix(f".{FP8_ATTENTION}")))
        for path, module in chosen
        if isinstance(module, FP8Attention)
    ]
    try:
        yield kept
    finally:
        for handle in hooks:
            handle.remove()


def attention_teacher_of(held: Reference, path: str, values: Values) -> AttentionTeacher | None:
    """Return what the reference says of an attention, given the values of its BF16 run; None of one in 16 bit."""
    if (path, "attended") not in values:
        return None
    operands = {name: values[path, name] for name in ATTENDED}
    codes = {
        name: fp8.quantize(torch.from_numpy(operand), held.checkpoint.tensor(f"{path}.{name}_scale")).float().numpy()
        for name, operand in operands.items()
    }
    return AttentionTeacher(operands, codes, values[path, "attended"])


def teacher_of(
    graph: onnx.ModelProto,
    folder: Path,
    held: Reference,
    linears: Sequence[Linear],
    values: Mapping[tuple[str, str], FloatArray],
) -> Teacher:
    """Return what the reference says of some linears, given the values of its BF16 run.

    Raises:
        BadGraph: a quantizer's scale is not an initializer.
    """
    index = Index(graph)
    scales: dict[str, np.float32] = {}
    smoothings: dict[str, FloatArray] = {}
    for linear in linears:
        if (smoothing := _smoothing(linear, held, index, folder)) is not None:
            smoothings[linear.path] = smoothing
        if linear.quantizer is None:
            continue
        if not linear.quantizer.scale:
            scales[linear.path] = np.float32(1)
            continue
        stored = held.checkpoint.tensors.get(f"{linear.path}.input_scale")
        # A 16-bit reference knows no activation scales: then the graph's own are taken.
        own = index.constants.get(linear.quantizer.scale)
        if stored is None and own is None:
            raise BadGraph(f"node {linear.quantizer.node} reads a scale that is no initializer; export the graph again")
        value = held.raw(f"{linear.path}.input_scale") if stored else array_of(own, folder) if own else None
        scales[linear.path] = np.float32(np.asarray(value).reshape(()))

    def smoothed(path: str, x: FloatArray) -> FloatArray:
        return _round(x * smoothings[path]) if path in smoothings else x

    def quantize(path: str, x: FloatArray) -> tuple[FloatArray, ...]:
        x = smoothed(path, x)
        return quantized_values(held.formats.get(path, NVFP4.name), x, scales[path])

    def product(path: str, x: FloatArray) -> FloatArray:
        bias = f"{path}.bias"
        added = held.plain(bias) if bias in held.checkpoint.tensors else None
        if not held.quantized:
            return _multiply(x, held.weight(path), added)
        x = smoothed(path, x)
        read = held.requantized(path, x, scales[path]) if path in scales else x
        result = _multiply(read, held.weight(path), added)
        if not held.checkpoint.rank(path):
            return result
        a, b = (_round(held.raw(f"{path}.{factor}")) for factor in BRANCH)
        return result + _multiply(_multiply(x, a), b)

    inputs = {path: value for (path, which), value in values.items() if which == "input"}
    outputs = {path: value for (path, which), value in values.items() if which == "output"}
    return Teacher(inputs, quantize, partial(_with_slot, held, product), outputs, held.factors)


def _with_slot(
    held: Reference, product: Callable[[str, FloatArray], FloatArray], path: str, x: FloatArray
) -> FloatArray:
    """Return what a linear gives, FP32 [..., N], with the LoRA in its slot where it has one."""
    result = product(path, x)
    if path not in held.slot_factors:
        return result
    a, b = held.slot_factors[path]
    return result + _multiply(_multiply(x, a), b)


def _multiply(x: npt.NDArray[Any], weight: FloatArray, bias: FloatArray | None = None) -> FloatArray:
    """Return ``x @ weight.T + bias`` in FP32."""
    added = None if bias is None else torch.from_numpy(bias)
    return nn.functional.linear(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(weight), added).numpy()


def _smoothing(linear: Linear, held: Reference, index: Index, folder: Path) -> FloatArray | None:
    """Return what the input of a linear is multiplied by, as the reference has it, or, in 16 bit, as the graph has."""
    if held.quantized:
        return _round(held.raw(f"{linear.path}.{SMOOTHING}")) if held.checkpoint.is_smoothed(linear.path) else None
    return None if linear.smoothing is None else _round(array_of(index.constants[linear.smoothing], folder))
