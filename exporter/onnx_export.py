"""``fp4trt export`` of a checkpoint, quantized or plain: an ONNX graph for TensorRT out."""

from __future__ import annotations

import functools
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import onnx_ir as ir

from calibration.checkpoints.folds import folded_linears
from calibration.checkpoints.quantized import BRANCH, SMOOTHING, Checkpoint, read
from exporter import external_weights, plain_checkpoint
from exporter.existing_results import refuse_existing_results
from exporter.lint_gate import passed_lint
from exporter.passes.add_branches import Branch, add_branches
from exporter.passes.add_lora_slots import add_lora_slots
from exporter.passes.double_dequantize import ScaleDtype
from exporter.passes.drop_placeholders import drop_placeholders
from exporter.passes.fold_constants import fold_constants
from exporter.passes.fp8_attention import fp8_attention
from exporter.passes.join_gated import join_gated
from exporter.passes.name_nodes import name_nodes
from exporter.passes.order_initializers import order_initializers
from exporter.passes.stamp_blocks import stamp_blocks
from exporter.passes.widen_weights import widen_weights
from exporter.trace import OPSET, other_linears, trace, translate
from fp4trt.built_in import path_of
from fp4trt.errors import BadGraph, WrongPrecision
from fp4trt.families import Dim, family_of
from fp4trt.file_output import check_writable
from fp4trt.json_file import load_json
from fp4trt.number_formats import BF16, FORMATS, FP8, FP32, NVFP4, counted_by_format
from fp4trt.options import at_least, one_of, takes
from fp4trt.pipeline_folder import component_folder, transformer_folder
from fp4trt.progress import Progress, note, tracking
from fp4trt.verb import Result, verb
from onnx_functions.graph.lora_slots import METADATA as LORA
from onnx_functions.graph.lora_slots import SYMBOL, Slots

__all__ = ["IR_VERSION", "Precision", "branches", "export", "graph_of", "graph_path", "group_leaders"]

Precision = Literal["nvfp4", "bf16"]

IR_VERSION = 11
"""The first ONNX IR version with FLOAT4E2M1."""

_USUAL_RANK: Final = 16
"""Rank of LoRAs that an engine is tuned for where nothing else is said, as far as its slots go."""


@dataclass(frozen=True, eq=False)
class Exported(Result):
    """What :func:`export` wrote.

    Attributes:
        onnx: the graph's path.
        opset: its opset.
        precision: the formats of its quantized linears, such as ``nvfp4`` or ``nvfp4, fp8``; ``bf16`` where none is.
        nodes: number of its nodes.
        quantized_linears: how many linears are quantized, in any format.
        fp8_attentions: how many attentions are in FP8.
        fp8_linears: how many of the linears are in FP8.
        formats: how many are in each format that any is in.
        scale_dtype: of the block scales; None in BF16.
        onnx_bytes: size of the graph without its weights.
        copied_weights: whether the weights were copied beside it.
        copied_because: why; None where they were not.
        lora_rank: the largest rank of its slots for LoRAs; None without slots.
    """

    onnx: str
    opset: int
    precision: str
    nodes: int
    quantized_linears: int
    fp8_attentions: int
    fp8_linears: int
    formats: Mapping[str, int]
    scale_dtype: ScaleDtype | None
    onnx_bytes: int
    copied_weights: bool
    copied_because: str | None
    lora_rank: int | None = None


@verb
@takes(
    BadGraph,
    precision=one_of(*get_args(Precision)),
    scale_dtype=one_of(*get_args(ScaleDtype)),
    lora_rank=at_least(1),
)
def export(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    scale_dtype: ScaleDtype | None = None,
    copy_weights: bool = False,
    force: bool = False,
    precision: Precision = "nvfp4",
    lora_rank: int | None = None,
    component: str | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Exported:
    """Export a checkpoint as an opset-23 graph: quantized, in double-DequantizeLinear form, or plain, in BF16.

    Args:
        directory: the checkpoint; with ``bf16`` whatever :func:`calibration.checkpoints.plain.find_source` takes.
        output: the graph, or a folder for ``model.onnx``; default ``DIRECTORY/model.onnx``, whose initializers point
            into the checkpoint's safetensors.
        scale_dtype: ``float32``, the default, computes what fake quantization computes, bit for bit; ``bfloat16`` needs
            no Casts and rounds each block's scale to BF16. Not for ``bf16``, which has no block scales.
        copy_weights: copy the weights into ``NAME.onnx.data``; implied where the graph cannot point at them.
        force: replace an existing graph.
        precision: ``nvfp4`` takes a quantized checkpoint, in whatever formats, ``bf16`` a plain one.
        component: the part of a pipeline to export in BF16, such as ``vae`` or ``text_encoder_2``; ``directory`` is
            then the whole pipeline's folder.
        lora_rank: give the linears slots for LoRAs of ranks up to this: the factors are inputs of the graph, which
            ``fp4trt lora`` makes. Not for ``bf16``, into whose weights LoRAs are fused.
        progress: called with each step.

    Raises:
        BadCheckpoint: the folder is no such checkpoint.
        WrongPrecision: it is a checkpoint of the other kind, or the scale dtype is of no use.
        BadGraph, OutputExists, TooLittleSpace: naming what is wrong.
        LintError: the graph would not be built right; nothing is written.
    """
    if component is not None:
        directory, precision = component_folder(path_of(directory), component), "bf16"
        family_of(load_json(directory / "config.json"), directory)  # before it speaks of weights
    if precision == "bf16" and scale_dtype is not None:
        raise WrongPrecision(f"--scale-dtype {scale_dtype} is of block scales, which a bf16 graph has none of; drop it")
    if precision == "bf16" and lora_rank is not None:
        raise WrongPrecision(
            "--lora-rank is for quantized checkpoints; LoRAs are fused into the weights of a bf16 graph"
        )
    checkpoint = _open(directory, precision)
    if output is None and not Path(directory).is_dir():
        raise BadGraph(f"{directory} is not a folder that a graph could be written into; name one with --output")
    path = graph_path(output if output is not None else checkpoint.directory)
    reason = external_weights.must_copy(checkpoint.tensors, path.parent)
    reason = reason or external_weights.must_round(checkpoint.tensors, checkpoint.wide)
    copies = copy_weights or reason is not None
    with external_weights.folder_for(path):
        refuse_existing_results(path, copies, force)
        check_writable(path)
        if copies:
            external_weights.refuse_little_space(checkpoint.tensors, checkpoint.wide, path)
        nodes = _write(checkpoint, path, scale_dtype or "float32", copies, lora_rank)
    formats = counted_by_format(checkpoint.formats)
    return Exported(
        onnx=str(path.resolve()),
        opset=OPSET,
        precision=", ".join(formats) or BF16,
        nodes=nodes,
        quantized_linears=len(checkpoint.formats),
        fp8_attentions=len(checkpoint.fp8_attentions),
        fp8_linears=len(checkpoint.fp8),
        formats=formats,
        scale_dtype=None if precision == "bf16" else scale_dtype or "float32",
        onnx_bytes=path.stat().st_size,
        copied_weights=copies,
        copied_because="--copy-weights" if copy_weights else reason,
        lora_rank=lora_rank,
    )


def _write(checkpoint: Checkpoint, path: Path, scale_dtype: ScaleDtype, copies: bool, lora_rank: int | None) -> int:
    """Trace, rewrite and save; return the graph's number of nodes."""
    # The units are hundredths of the time: tracing takes nearly all of it, whatever the model's size.
    with tracking(100, "exporting") as advance:
        model = graph_of(checkpoint, group_leaders(checkpoint), scale_dtype, advance, lora_rank)
        # A finding, even a slow one, is a mistake of this room's, or of the checkpoint's data.
        accept = functools.partial(passed_lint, source=checkpoint.directory)
        if copies:
            external_weights.save_with_copies(model, checkpoint.tensors, path, accept)
        else:
            external_weights.save_pointing(model, checkpoint.tensors, path, accept)
        advance(10)
    return len(model.graph)


def graph_of(
    checkpoint: Checkpoint,
    leaders: Mapping[str, str],
    scale_dtype: ScaleDtype,
    advance: Callable[[int], object],
    lora_rank: int | None = None,
) -> ir.Model:
    """Return the graph of a checkpoint, whose weights have no values yet.

    Args:
        checkpoint: what its config, and the names and shapes of its tensors, say is all that is read.
        leaders: see :func:`exporter.passes.double_dequantize.double_dequantize`.
        scale_dtype: likewise.
        advance: called with hundredths of an export that are done, 90 in all.
        lora_rank: the largest rank of slots for LoRAs; None without slots.
    """
    program = trace(checkpoint)
    advance(30)
    model = translate(checkpoint, program)
    advance(60)
    fold_constants(model)
    equal = [stack for stack in checkpoint.family.stacks if stack.equal]
    heights = {stack.path: checkpoint.config[stack.count] for stack in equal}
    stamp_blocks(model, heights, [stack.path for stack in equal if stack.tail])
    join_gated(model, _gated(checkpoint, leaders))
    slots = None if lora_rank is None else Slots(lora_rank, _add_slots(model, checkpoint))
    add_branches(model, branches(checkpoint))
    drop_placeholders(model, checkpoint.formats)
    for name, kind in reversed(list(FORMATS.items())):  # NVFP4's pass takes all placeholders that are left
        rewrite = pkgutil.resolve_name(kind.rewrite)
        rewrite(model, {path: leaders.get(path, path) for path in checkpoint.of_format(name)}, scale_dtype)
    fp8_attention(model, {path: checkpoint.rounds_output(path) for path in checkpoint.fp8_attentions})
    widen_weights(model, checkpoint.wide)
    order_initializers(model)
    name_nodes(model)
    _describe(model, checkpoint, scale_dtype, slots)
    return model


def _add_slots(model: ir.Model, checkpoint: Checkpoint) -> tuple[tuple[str, ...], ...]:
    """Give slots to the linears that are quantized and to those that could be; return them by shared input."""
    paths = dict.fromkeys((*checkpoint.family.quantized(checkpoint.config), *checkpoint.formats))
    groups = checkpoint.groups_of(list(paths))
    add_lora_slots(model, groups)
    if folded := folded_linears(checkpoint) & {path for group in groups for path in group}:
        note(
            f"warning: LoRAs fit into {len(paths) - len(folded)} of {len(paths)} slots: channels of the others are "
            f"scaled, by recipe {checkpoint.recipe}; quantize with shift_fold and smooth_fold false in its method"
        )
    return groups


def _gated(checkpoint: Checkpoint, leaders: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs of a gated feed-forward that TensorRT can merge: both in NVFP4, under one input scale."""
    for first, second in checkpoint.family.gated(checkpoint.config):
        both = {checkpoint.formats.get(path) for path in (first, second)}
        if both == {NVFP4.name} and leaders.get(second) == leaders.get(first, first):
            yield first, second


def graph_path(output: str | Path) -> Path:
    """Return the graph that an output names: itself, or ``model.onnx`` in a folder."""
    path = Path(output)
    return path if path.suffix == ".onnx" and not path.is_dir() else path / "model.onnx"


def _open(source: str | Path, precision: Precision) -> Checkpoint:
    if precision == "bf16":
        return plain_checkpoint.read(source)
    folder = transformer_folder(path_of(source))
    if plain_checkpoint.is_plain(folder):
        raise WrongPrecision(
            f"{source} holds no NVFP4 weights: run fp4trt quantize first, or export it as it is with --precision bf16"
        )
    return read(folder)


def group_leaders(checkpoint: Checkpoint) -> dict[str, str]:
    """Return each quantized linear's leader: the first of its group that has the scales that one GEMM shares.

    Where weights have to share a scale too, a group whose scales differ is no group: each of its linears leads itself.
    """
    leaders = {}
    for name, kind in FORMATS.items():
        for group in checkpoint.groups_of(checkpoint.of_format(name)):
            first: dict[tuple[bytes, ...], str] = {}
            for path in group:
                scales = tuple(_bytes(checkpoint, f"{path}.{leaf}") for leaf in (*kind.shared, SMOOTHING))
                leaders[path] = first.setdefault(scales, path)
            if kind.needs_shared_weight_scale and len(first) > 1:
                leaders |= {path: path for path in group}
    return leaders


def branches(checkpoint: Checkpoint) -> dict[str, Branch]:
    """Return what the linears have that SVDQuant or AWQ made, tensors that are equal in a group standing for all."""
    found = {}
    for group in checkpoint.groups_of(checkpoint.branched):
        first: dict[tuple[bytes, ...], str] = {}
        for path in group:
            rank, scale = checkpoint.rank(path), _bytes(checkpoint, f"{path}.{SMOOTHING}")
            smoothing = first.setdefault((scale,), path) if scale else None
            factor = first.setdefault((scale, _bytes(checkpoint, f"{path}.{BRANCH[0]}")), path)
            if rank or smoothing:
                found[path] = Branch(smoothing, factor, rank)
    return found


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    """Return a tensor's bytes; none where there is no such tensor."""
    return checkpoint.raw(name).tobytes() if name in checkpoint.tensors else b""


def _describe(model: ir.Model, checkpoint: Checkpoint, scale_dtype: str, slots: Slots | None) -> None:
    """Write into the graph's metadata what it promises and what the builder has to know."""
    linears = {name: list(paths) for name in FORMATS if (paths := checkpoint.of_format(name)) or name == NVFP4.name}
    others = other_linears(checkpoint)
    wide = [path for path in others if f"{path}.weight" in checkpoint.wide]
    linears[BF16] = [path for path in others if path not in wide]
    linears |= {FP32: wide} if wide else {}
    symbols = {name: dim.as_dict() for name, dim in checkpoint.family.dims.items()}
    if slots is not None:
        usual = min(_USUAL_RANK, slots.max_rank)
        symbols[SYMBOL] = Dim("lora_rank", min=0, max=slots.max_rank, default=usual).as_dict()
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            "fp4trt.family": checkpoint.family.name,
            "fp4trt.recipe": checkpoint.recipe if checkpoint.is_quantized else "none",
            "fp4trt.scale_dtype": scale_dtype,
            "fp4trt.linears": json.dumps(linears),
            "fp4trt.groups": json.dumps(checkpoint.groups_of(list(checkpoint.formats))),
            "fp4trt.symbols": json.dumps(symbols),
            "fp4trt.config": json.dumps(_public(checkpoint.config), sort_keys=True),
        }
    )
    if checkpoint.fp8_attentions:
        model.metadata_props["fp4trt.attention"] = json.dumps({FP8.name: checkpoint.fp8_attentions})
    if slots is not None:
        model.metadata_props[LORA] = json.dumps(slots.as_dict())
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "fp4trt", None, None
    model.graph.name = checkpoint.family.name
    model.graph.doc_string = None
    model.graph.metadata_props.clear()


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a config makes the model: not its quantization, nor which file and diffusers it is of."""
    private = {key for key in config if key.startswith("_")} - {"_class_name"} | {"quantization_config"}
    return {key: value for key, value in config.items() if key not in private}
