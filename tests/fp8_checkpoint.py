"""A quantized checkpoint some of whose linears are stored in FP8 again, from the plain one that it was made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from calibration import fp8
from calibration.checkpoint import MANIFEST, WEIGHTS
from calibration.safetensors_file import TensorPlan, bytes_of, read_header, write

__all__ = ["is_modulation", "store_in_fp8"]


def is_modulation(path: str) -> bool:
    """Whether a linear of FLUX makes shifts, scales and gates."""
    return path.endswith((".norm.linear", ".norm1.linear", ".norm1_context.linear"))


def store_in_fp8(directory: Path, plain: Path, chosen: Callable[[str], bool]) -> None:
    """Rewrite a quantized checkpoint of one file, so that the chosen linears are in FP8."""
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    paths = [path for path in manifest["quantized"]["nvfp4"] if chosen(path)]
    stored, weights = read_header(directory / WEIGHTS), read_header(plain / WEIGHTS)
    held = {name: (TensorPlan(name, tensor.dtype, tensor.shape), tensor.bytes()) for name, tensor in stored.items()}
    for path in paths:
        weight = weights[f"{path}.weight"].tensor()
        scale = fp8.tensor_scale(weight.abs().max().float())
        parts = {
            "weight": ("F8_E4M3", fp8.quantize(weight, scale).view(torch.uint8)),
            "weight_scale": ("F32", scale),
            "input_scale": ("F32", fp8.tensor_scale(manifest["amax"][f"{path}.input_quantizer"])),
        }
        for kind, (dtype, value) in parts.items():
            name = f"{path}.{kind}"
            held[name] = (TensorPlan(name, dtype, tuple(value.shape)), bytes_of(value))
        del held[f"{path}.weight_scale_2"]
    order = sorted(held.values(), key=lambda entry: {"F32": 0, "BF16": 1}.get(entry[0].dtype, 2))
    pieces = ((plan.name, data) for plan, data in order)
    digest = write(directory / WEIGHTS, [plan for plan, _ in order], pieces, {"format": "pt"})
    manifest["files"][WEIGHTS] = digest
    manifest["quantized"] = {
        "nvfp4": [path for path in manifest["quantized"]["nvfp4"] if path not in paths],
        "fp8": paths,
    }
    manifest["groups"] = [group for group in manifest["groups"] if group[0] not in paths]
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
