"""Files as other programs write them, of a FLUX.1 with one block of each kind.

Names stand here by hand, the quantizers are comfy-kitchen's and diffusers': nothing is of fp4trt's tables or writers.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

__all__ = ["FUSED", "PLAIN", "comfy_kitchen", "single_file"]

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
EMBEDDER = "time_text_embed"
FUSED: dict[str, tuple[str, ...]] = {
    "double_blocks.0.img_attn.qkv": tuple(f"{DOUBLE}.attn.to_{one}" for one in "qkv"),
    "double_blocks.0.txt_attn.qkv": tuple(f"{DOUBLE}.attn.add_{one}_proj" for one in "qkv"),
    "double_blocks.0.img_attn.proj": (f"{DOUBLE}.attn.to_out.0",),
    "double_blocks.0.txt_attn.proj": (f"{DOUBLE}.attn.to_add_out",),
    "double_blocks.0.img_mlp.0": (f"{DOUBLE}.ff.net.0.proj",),
    "double_blocks.0.img_mlp.2": (f"{DOUBLE}.ff.net.2",),
    "double_blocks.0.txt_mlp.0": (f"{DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.0.txt_mlp.2": (f"{DOUBLE}.ff_context.net.2",),
    "double_blocks.0.img_mod.lin": (f"{DOUBLE}.norm1.linear",),
    "double_blocks.0.txt_mod.lin": (f"{DOUBLE}.norm1_context.linear",),
    "single_blocks.0.linear1": (*(f"{SINGLE}.attn.to_{one}" for one in "qkv"), f"{SINGLE}.proj_mlp"),
    "single_blocks.0.linear2": (f"{SINGLE}.proj_out",),
    "single_blocks.0.modulation.lin": (f"{SINGLE}.norm.linear",),
}
"""Linear of the file to the linears of diffusers that make its rows: those that are quantized."""

PLAIN: dict[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{EMBEDDER}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{EMBEDDER}.timestep_embedder.linear_2",
    "vector_in.in_layer": f"{EMBEDDER}.text_embedder.linear_1",
    "vector_in.out_layer": f"{EMBEDDER}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{EMBEDDER}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{EMBEDDER}.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
NORMS: dict[str, str] = {
    "double_blocks.0.img_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_q.weight",
    "double_blocks.0.img_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_k.weight",
    "double_blocks.0.txt_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_added_q.weight",
    "double_blocks.0.txt_attn.norm.key_norm.scale": f"{DOUBLE}.attn.norm_added_k.weight",
    "single_blocks.0.norm.query_norm.scale": f"{SINGLE}.attn.norm_q.weight",
    "single_blocks.0.norm.key_norm.scale": f"{SINGLE}.attn.norm_k.weight",
}
LAST = "final_layer.adaLN_modulation.1"

Tensors = dict[str, torch.Tensor]
Quantizer = Callable[[torch.Tensor], tuple[str, Tensors]]


def comfy_kitchen() -> Any:
    """Import it without what it says."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import comfy_kitchen as package
        from comfy_kitchen.tensor import fp8, mxfp8, nvfp4  # noqa: F401 - the layouts
    logging.disable(logging.NOTSET)
    return package


def nvfp4(weight: torch.Tensor) -> tuple[str, Tensors]:
    codes, params = comfy_kitchen().tensor.nvfp4.TensorCoreNVFP4Layout.quantize(weight)
    return "nvfp4", {"weight": codes, "weight_scale": params.block_scale, "weight_scale_2": params.scale}


def fp8(weight: torch.Tensor) -> tuple[str, Tensors]:
    codes, params = comfy_kitchen().tensor.fp8.TensorCoreFP8Layout.quantize(weight)
    return "float8_e4m3fn", {"weight": codes, "weight_scale": params.scale}


def mxfp8(weight: torch.Tensor) -> tuple[str, Tensors]:
    codes, params = comfy_kitchen().tensor.mxfp8.TensorCoreMXFP8Layout.quantize(weight)
    return "mxfp8", {"weight": codes, "weight_scale": params.scale.view(torch.uint8)}


def row_major_nvfp4(weight: torch.Tensor) -> tuple[str, Tensors]:
    """As diffusers' BFL loader reads it, by diffusers' own quantizer."""
    from diffusers.quantizers.bfl.utils import quantize_nvfp4

    codes, scales, scale = quantize_nvfp4(weight)
    return "nvfp4", {"weight": codes, "weight_scale": scales, "weight_scale_2": scale}


def fp8_by_row(weight: torch.Tensor) -> tuple[str, Tensors]:
    from diffusers.quantizers.bfl.utils import quantize_fp8r

    codes, scales = quantize_fp8r(weight)
    return "float8_e4m3fn", {"weight": codes, "weight_scale": scales}


def single_file(
    path: Path,
    source: Path,
    amax: Mapping[str, float] | None,
    quantizer: Quantizer = nvfp4,
    others: Mapping[str, Quantizer] | None = None,
    prefix: str = "",
    marks: str = "tensors",
    mark: Mapping[str, Any] | None = None,
) -> Path:
    """Write a 16-bit checkpoint quantized, fused and under the names of Black Forest Labs.

    Args:
        path: the file.
        source: the plain checkpoint's folder.
        amax: module path in diffusers to the amax of its input; None for a file without scales of inputs.
        quantizer: of all quantized linears but the ``others``, by path in the file.
        others: see there.
        prefix: before every name.
        marks: ``tensors``, ``header`` or ``none``.
        mark: more keys of each mark.
    """
    state = load_file(source / "diffusion_pytorch_model.safetensors")
    tensors: Tensors = {name: state[theirs] for name, theirs in NORMS.items()}
    layers: dict[str, Any] = {}
    for name, theirs in PLAIN.items():
        tensors |= {f"{name}.{leaf}": state[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    for leaf in ("weight", "bias"):
        shift, scale = state[f"norm_out.linear.{leaf}"].chunk(2)
        tensors[f"{LAST}.{leaf}"] = torch.cat((scale, shift))
    for name, parts in FUSED.items():
        weight = torch.cat([state[f"{part}.weight"] for part in parts])
        tensors[f"{name}.bias"] = torch.cat([state[f"{part}.bias"] for part in parts])
        kind, made = (others or {}).get(name, quantizer)(weight)
        tensors |= {f"{name}.{leaf}": value for leaf, value in made.items()}
        layers[name] = {"format": kind, **(mark or {})}
        if amax is not None and kind != "mxfp8":
            largest = max(amax[part] for part in parts)
            tensors[f"{name}.input_scale"] = torch.tensor(largest / (2688 if kind == "nvfp4" else 448))
        if marks == "tensors":
            text = json.dumps(layers[name]).encode()
            tensors[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    layers = {f"{prefix}{name}": layer for name, layer in layers.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    named = {f"{prefix}{name}": value.contiguous().clone() for name, value in tensors.items()}
    save_file(named, path, metadata if marks == "header" else {})
    return path
