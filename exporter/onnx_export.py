"""``fp4trt export``: a quantized checkpoint in, an ONNX graph for TensorRT out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import click
import onnx_ir as ir

from calibration.checkpoint import Checkpoint, read
from calibration.write import refuse_existing
from exporter import external_weights
from exporter.errors import BadGraph
from exporter.passes.double_dequantize import ScaleDtype, double_dequantize
from exporter.passes.fold_constants import fold_constants
from exporter.passes.name_nodes import name_nodes
from exporter.trace import OPSET, other_linears, trace, translate

__all__ = ["export", "group_leaders"]

_IR_VERSION = 11
"""The first ONNX IR version with FLOAT4E2M1."""


def export(
    directory: str | Path,
    output: str | Path | None = None,
    scale_dtype: ScaleDtype = "float32",
    copy_weights: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Export a quantized checkpoint as an opset-23 graph in TensorRT's double-DequantizeLinear form.

    Args:
        directory: the checkpoint.
        output: the graph; default ``DIRECTORY/model.onnx``, whose initializers point into the checkpoint's safetensors.
        scale_dtype: ``float32`` computes what fake quantization computes, bit for bit; ``bfloat16`` needs no Casts and
            rounds each block's scale to BF16.
        copy_weights: copy the weights into ``NAME.onnx.data``; implied where the graph cannot point at them.
        force: replace an existing graph.

    Returns:
        What the command prints as JSON.

    Raises:
        BadCheckpoint: the folder is no quantized checkpoint.
        BadGraph, OutputExists: naming what is wrong.
    """
    if scale_dtype not in get_args(ScaleDtype):
        raise BadGraph(f"there is no scale dtype '{scale_dtype}'; choose one of: {', '.join(get_args(ScaleDtype))}")
    checkpoint = read(directory)
    path = Path(output) if output is not None else checkpoint.directory / "model.onnx"
    reason = external_weights.must_copy(checkpoint.tensors, path.parent)
    copies = copy_weights or reason is not None
    for result in (path, external_weights.data_file(path))[: 2 if copies else 1]:
        refuse_existing(result, force)
    save = external_weights.save_with_copies if copies else external_weights.save_pointing
    # The bar's units are hundredths of the time: tracing takes nearly all of it, whatever the model's size.
    with click.progressbar(length=100, label="exporting", file=sys.stderr) as bar:
        program = trace(checkpoint)
        bar.update(45)
        model = translate(checkpoint, program)
        bar.update(45)
        fold_constants(model)
        double_dequantize(model, group_leaders(checkpoint), scale_dtype)
        name_nodes(model)
        _describe(model, checkpoint, scale_dtype)
        bar.update(5)
        save(model, checkpoint.tensors, path)
        bar.update(5)
    return {
        "onnx": str(path.resolve()),
        "opset": OPSET,
        "nodes": len(model.graph),
        "quantized_linears": len(checkpoint.quantized),
        "scale_dtype": scale_dtype,
        "onnx_bytes": path.stat().st_size,
        "copied_weights": copies,
        "copied_because": "--copy-weights" if copy_weights else reason,
    }


def group_leaders(checkpoint: Checkpoint) -> dict[str, str]:
    """Return each quantized linear's leader: the first of its group, or itself where the group's scales differ."""
    leaders = {}
    for group in checkpoint.groups:
        scales = {
            (float(checkpoint.raw(f"{path}.weight_scale_2")), float(checkpoint.raw(f"{path}.input_scale")))
            for path in group
        }
        for path in group:
            leaders[path] = group[0] if len(scales) == 1 else path
    return leaders


def _describe(model: ir.Model, checkpoint: Checkpoint, scale_dtype: str) -> None:
    """Write into the graph's metadata what it promises and what the builder has to know."""
    linears = {"nvfp4": list(checkpoint.quantized), "bf16": other_linears(checkpoint)}
    symbols = {name: symbol.as_dict() for name, symbol in checkpoint.family.symbols.items()}
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            "fp4trt.family": checkpoint.family.name,
            "fp4trt.recipe": checkpoint.recipe,
            "fp4trt.scale_dtype": scale_dtype,
            "fp4trt.linears": json.dumps(linears),
            "fp4trt.groups": json.dumps(checkpoint.groups),
            "fp4trt.symbols": json.dumps(symbols),
        }
    )
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version, model.doc_string = "fp4trt", None, None
    model.graph.name = checkpoint.family.name
    model.graph.doc_string = None
    model.graph.metadata_props.clear()
