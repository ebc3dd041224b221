"""Unquantized checkpoints: hash them, load them strictly."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import nn

from calibration.checkpoints.source import find_source
from calibration.formats.bfloat16 import bits_of, refuse_other_types, why_unusable
from fp4trt.built_in import BUILT_IN
from fp4trt.checkpoint_folder import files_of, metadata_in_folder, tensors_in_folder, tensors_without_loras
from fp4trt.declared import require_shapes
from fp4trt.errors import BadCheckpoint
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from fp4trt.layouts import refuse_foreign_layout
from fp4trt.safetensors_file import StoredTensor, sha256_of
from fp4trt.source_folder import loras_of

__all__ = [
    "BUILT_IN",
    "PlainCheckpoint",
    "empty_source",
    "find_source",
    "finite_tensor",
    "load_source",
    "model_class",
    "open_plain",
    "refuse_other_shapes",
    "refuse_quantized",
    "source_hashes",
    "stays_fp32",
    "weights_fingerprint",
    "wide_tensors",
]

_SAMPLED: Final = 2048
"""Values of each tensor that a fingerprint is of."""


def model_class(family: Family) -> Any:
    """Return the class that is run and exported for a family: its adapter's, or the diffusers class.

    That of a family that makes its model itself has but ``from_config``.
    """
    if family.make is not None:
        return SimpleNamespace(from_config=family.make)
    module, _, name = (family.adapter or f"diffusers:{family.class_name}").partition(":")
    return getattr(importlib.import_module(module), name)


def stays_fp32(model: nn.Module, name: str) -> bool:
    """Whether diffusers computes with a tensor of a model in FP32 where the rest is loaded in BF16."""
    return not set(getattr(model, "_keep_in_fp32_modules", None) or ()).isdisjoint(name.split("."))


def wide_tensors(model: nn.Module, stored: Mapping[str, StoredTensor]) -> frozenset[str]:
    """Return the tensors that a quantized checkpoint has in FP32, as the model computes with them.

    That are those of a plain checkpoint that hold more than BF16 does; in BF16 there is nothing more to keep.
    """
    return frozenset(name for name, tensor in stored.items() if tensor.dtype != "BF16" and stays_fp32(model, name))


@dataclass(frozen=True)
class PlainCheckpoint:
    """A plain checkpoint whose headers fit its config.

    Attributes:
        folder: where.
        config: its config.
        family: its family.
        model: its diffusers model, on the meta device.
        stored: where each tensor lies, in the order of the files.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    model: nn.Module
    stored: Mapping[str, StoredTensor]

    @cached_property
    def wide(self) -> frozenset[str]:
        """Names of the tensors that stay in FP32, and hold more than BF16 does."""
        return wide_tensors(self.model, self.stored)

    def tensor(self, name: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Read a tensor, rounded; one that stays in FP32 is not.

        Raises:
            BadCheckpoint: as :func:`finite_tensor`.
        """
        value = finite_tensor(self.folder, name, self.stored[name])
        return value.float() if stays_fp32(self.model, name) else value.to(dtype)


def load_source(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Load a plain checkpoint as its diffusers class, in eval mode, on the CPU.

    Raises:
        BadCheckpoint: names, shapes or values are not what config.json asks for.
        UnknownFamily: the model is of no family of ours.
    """
    source = open_plain(folder)
    state = {name: source.tensor(name, dtype) for name in source.stored}
    source.model.load_state_dict(state, strict=True, assign=True)
    return source.model.eval().requires_grad_(False)


def empty_source(folder: Path) -> tuple[nn.Module, Mapping[str, StoredTensor]]:
    """Return the model and the tensors of :func:`open_plain`."""
    source = open_plain(folder)
    return source.model, source.stored


def open_plain(folder: Path) -> PlainCheckpoint:
    """Return a plain checkpoint, of which only config and headers were read.

    Stricter than ``from_pretrained``, which fills missing weights with random ones and only warns.

    Raises:
        BadCheckpoint: names or shapes are not what config.json asks for.
        UnknownFamily: the model is of no family of ours.
    """
    config = load_json(folder / "config.json")
    refuse_quantized(folder, config)
    stored = tensors_in_folder(folder)
    refuse_foreign_layout(str(folder), config, metadata_in_folder(folder), stored)
    family = family_of(config, folder)
    cls = model_class(family)
    with torch.device("meta"):
        model = cls.from_config(config)
    refuse_other_shapes(folder, model, stored)
    return PlainCheckpoint(folder, config, family, model, stored)


def finite_tensor(folder: Path, name: str, stored: StoredTensor) -> torch.Tensor:
    """Read a tensor of a plain checkpoint.

    Raises:
        BadCheckpoint: it is not a floating-point number of 16 or 32 bit, or holds a value that BF16 cannot.
    """
    refuse_other_types(f"{folder}: {name}", stored)
    value = stored.tensor()
    if not value.to(torch.bfloat16).isfinite().all():
        raise BadCheckpoint(f"{folder}: {name} {why_unusable(stored)}")
    return value


def refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is not plain.

    Raises:
        BadCheckpoint: it is quantized already.
    """
    if "quantization_config" in config:
        raise BadCheckpoint(f"{folder} is quantized already; expected the BF16 checkpoint that it was made from")


def refuse_other_shapes(folder: Path, model: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Refuse a checkpoint whose tensors are not those of the model that its config describes.

    Raises:
        BadCheckpoint: naming the first tensor that is absent, superfluous or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    require_shapes(str(folder), wanted, {name: tensor.shape for name, tensor in stored.items()})


def weights_fingerprint(folder: Path) -> str:
    """Return what tells a checkpoint's weights from those of any other model of the same shapes, in a second.

    That is a SHA-256 over name, shape and the first values of each tensor, as BF16: it is the same for shards and for
    one file, and for a copy of BF16 weights in FP32. With LoRAs it is of what they are fused into, and of their files.
    """
    digest = hashlib.sha256()
    if loras := loras_of(folder):
        digest.update(repr(loras).encode())
    for name, stored in sorted(tensors_without_loras(folder).items()):
        refuse_other_types(f"{folder}: {name}", stored)
        digest.update(f"{name} {list(stored.shape)}".encode())
        digest.update(bits_of(stored, 0, min(math.prod(stored.shape), _SAMPLED)).tobytes())
    return digest.hexdigest()


def source_hashes(folder: Path) -> dict[str, str]:
    """Return file name to SHA-256 of a checkpoint's config and weights."""
    return {file.name: sha256_of(file) for file in (folder / "config.json", *files_of(folder))}
