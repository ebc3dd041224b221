"""Plain checkpoints as the exporter reads them: 16- or 32-bit weights, exported in BF16 but for what stays in FP32."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.checkpoints.plain import find_source, model_class, refuse_other_shapes
from calibration.checkpoints.quantized import Checkpoint
from calibration.formats.bfloat16 import largest_magnitude, pieces_of, refuse_other_types, why_unusable
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadCheckpoint, WrongPrecision
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import StoredTensor

__all__ = ["is_plain", "read"]


def is_plain(folder: Path) -> bool:
    """Whether a folder is a checkpoint that nobody quantized; False also for what is not a checkpoint."""
    if not (folder / "config.json").is_file():
        return False
    if "quantization_config" in load_json(folder / "config.json"):
        return False
    return not any(name.endswith(".weight_scale") for name in tensors_in_folder(folder))


def read(source: str | Path) -> Checkpoint:
    """Read a plain checkpoint's description, checking names, shapes and values: every byte is read once.

    Args:
        source: what :func:`calibration.checkpoints.plain.find_source` takes.

    Raises:
        BadCheckpoint: something is missing, damaged or contradictory.
        UnknownFamily: the model is of no family of ours.
        WrongPrecision: it is quantized.
    """
    folder = find_source(source)
    config = load_json(folder / "config.json")
    checkpoint = Checkpoint(folder, config, {}, tensors_in_folder(folder))
    if not is_plain(folder):
        raise WrongPrecision(
            f"{folder} is quantized; --precision bf16 takes the plain checkpoint that it was made from"
        )
    with torch.device("meta"):
        model = model_class(checkpoint.family).from_config(config)
    refuse_other_shapes(folder, model, checkpoint.tensors)
    for name, stored in checkpoint.tensors.items():
        _refuse_unusable(name, stored)
    return checkpoint


def _refuse_unusable(name: str, stored: StoredTensor) -> None:
    refuse_other_types(f"{stored.file}: {name}", stored)
    if any(largest_magnitude(piece) is None for piece in pieces_of(stored)):
        raise BadCheckpoint(f"{stored.file}: {name} {why_unusable(stored)}")
