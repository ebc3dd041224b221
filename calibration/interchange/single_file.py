"""Single files for ComfyUI and for diffusers, as tensors that are made when they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from calibration.interchange.branch_file import lora_names, smoothed_factor
from calibration.interchange.byte_rows import ByteRows, held, nibbles_swapped, padded, tiled
from calibration.interchange.fused import Fused, fused_linears, plain_tensors
from calibration.interchange.source import BFL, COMFYUI, DIFFUSERS
from calibration.interchange.unified import COMFYUI_FORMATS, PADDING, Unified
from fp4trt.account import BRANCH, SMOOTHING
from fp4trt.errors import BadCheckpoint, UnsupportedModel
from fp4trt.number_formats import FP8, MXFP8, NVFP4
from fp4trt.safetensors_file import DTYPE_BYTES
from fp4trt.single_files.names import Original, SingleFile
from fp4trt.single_files.tables import SINGLE_FILES

__all__ = ["SingleFileTensors", "comfyui_linear", "single_file"]

_READERS: Final[Mapping[str, str]] = {
    COMFYUI: "ComfyUI",
    DIFFUSERS: "diffusers' BFL loader",
    BFL: "diffusers' BFL loader",
}
_SIZED_BY: Final = ("img_in", "txt_in", "vector_in.in_layer")
"""Linears by whose weights ComfyUI knows a model's sizes: packed, they have others. Source: its model_detection.py."""


@dataclass(frozen=True)
class SingleFileTensors:
    """What is written: the tensors of the file, and those of the one beside it with the low-rank branches."""

    tensors: dict[str, ByteRows]
    branch: dict[str, ByteRows] = field(default_factory=dict)


def single_file(checkpoint: Unified, layout: str) -> SingleFileTensors:
    """Return the tensors of a checkpoint in a layout of single files, in file order.

    Args:
        checkpoint: in ModelOpt's layout.
        layout: ``comfyui``, ``diffusers`` or ``bfl``.

    Raises:
        BadCheckpoint: the layout has no place for something in it, by name.
        UnsupportedModel: the model's class has no names in single files.
    """
    originals = _originals(checkpoint, layout)
    linears = list(fused_linears(checkpoint, originals))
    _refuse_attention(checkpoint, layout)
    for linear in linears:
        (_refuse_comfyui if layout == COMFYUI else _refuse_diffusers)(linear, _READERS[layout])
    tensors = dict(plain_tensors(checkpoint, originals, linears))
    made = comfyui_linear if layout == COMFYUI else _for_diffusers
    for linear in linears:
        tensors |= dict(made(linear))
    branch = {name: rows for linear in linears if linear.has_branch for name, rows in _branch(linear)}
    by_size = sorted(tensors.items(), key=lambda named: -DTYPE_BYTES[named[1].dtype])  # keeps every offset aligned
    return SingleFileTensors(dict(by_size), branch)


def _originals(checkpoint: Unified, layout: str) -> dict[str, Original]:
    table = SINGLE_FILES.get(checkpoint.account.family.class_name)
    if table is None:
        raise UnsupportedModel(
            f"{checkpoint.path} is a {checkpoint.account.family.class_name}, for which {_READERS[layout]} has no names"
            f"; expected one of: {', '.join(SINGLE_FILES)}"
        )
    named = table if layout != DIFFUSERS else SingleFile({}, "")
    return named.layout(checkpoint.account.family.state(checkpoint.config))


def _refuse_attention(checkpoint: Unified, layout: str) -> None:
    if attention := next(iter(checkpoint.account.attentions), None):
        raise BadCheckpoint(
            f"{checkpoint.path} has attention in FP8, {attention} first; {_READERS[layout]} has no place for its "
            "scales; expected attention in 16 bit: quantize by a recipe with attention: bf16"
        )


def _refuse_comfyui(linear: Fused, reader: str) -> None:
    """Refuse what a linear of ComfyUI's cannot be."""
    where, path = linear.checkpoint.path, linear.linears[0]
    if linear.kind is not None and linear.path in _SIZED_BY:
        raise BadCheckpoint(
            f"{where} has {path} in {linear.kind.title}; {reader} reads the model's sizes from {linear.path}.weight; "
            "expected 16 bit: quantize by a recipe of fp4trt, which leaves it so, or give ModelOpt's quant_cfg "
            f'{{"quantizer_name": "*{path}*", "enable": False}}'
        )
    if linear.is_smoothed and linear.kind is not NVFP4:
        raise BadCheckpoint(
            f"{where} has a pre_quant_scale of {path}, which is not in NVFP4; {reader} reads one in NVFP4 alone: give "
            "the linear nvfp4 in the recipe (formats.rules)"
        )


def _refuse_diffusers(linear: Fused, reader: str) -> None:
    """Refuse what a linear of diffusers' BFL loader cannot be."""
    where, path = linear.checkpoint.path, linear.linears[0]
    if linear.has_branch or linear.is_smoothed:
        what = "a low-rank branch" if linear.has_branch else "a pre_quant_scale"
        raise BadCheckpoint(
            f"{where} has {what} at {path}; {reader} knows neither SVDQuant nor AWQ: convert it to comfyui, or "
            "quantize by a recipe without, such as nvfp4-quality"
        )
    if linear.kind is MXFP8:
        raise BadCheckpoint(
            f"{where} has {path} in MXFP8; {reader} knows NVFP4 and FP8 alone: convert it to comfyui, or give the "
            "linear another format in the recipe (formats.rules)"
        )


def comfyui_linear(linear: Fused) -> Iterator[tuple[str, ByteRows]]:
    """Yield a linear with its high nibbles first, its block scales in tiles, padded, and marked."""
    kind, path = linear.kind, linear.path
    if kind is None:
        return  # its weight is one of the plain tensors, its branch lies in the file beside
    high, wide = (-(-size // PADDING[kind.name]) * PADDING[kind.name] for size in linear.shape)
    codes = padded(linear.rows("weight"), *kind.codes_shape(high, wide))
    yield f"{path}.weight", nibbles_swapped(codes) if kind is NVFP4 else codes
    for scale in kind.scales:
        whole = tiled(linear.rows(scale.leaf)) if scale.block else _required(linear, scale.leaf)
        yield f"{path}.{scale.leaf}", whole
    if (smoothing := linear.common(SMOOTHING)) is not None:
        yield f"{path}.{SMOOTHING}", smoothing
    mark = np.frombuffer(json.dumps({"format": COMFYUI_FORMATS[kind.name]}).encode(), np.uint8)
    yield f"{path}.comfy_quant", held("U8", (mark.size,), mark)


def _for_diffusers(linear: Fused) -> Iterator[tuple[str, ByteRows]]:
    """Yield a linear as it is, but for FP8's scale, which is repeated for each row."""
    kind, path = linear.kind, linear.path
    assert kind is not None, f"{path} in 16 bit has neither branch nor smoothing here"
    yield f"{path}.weight", linear.rows("weight")
    for scale in kind.scales:
        if scale.block:
            whole = linear.rows(scale.leaf)
        elif kind is FP8 and not scale.of_input:
            whole = linear.by_row(scale.leaf)
        else:
            whole = _required(linear, scale.leaf)
        yield f"{path}.{scale.leaf}", whole


def _required(linear: Fused, leaf: str) -> ByteRows:
    found = linear.common(leaf)
    assert found is not None, f"the account has {leaf} of {linear.path}"
    return found


def _branch(linear: Fused) -> Iterator[tuple[str, ByteRows]]:
    a, smoothing = _required(linear, BRANCH[0]), linear.common(SMOOTHING)
    first, second = lora_names(linear.path)
    yield first, smoothed_factor(a, smoothing)
    yield second, linear.rows(BRANCH[1])
