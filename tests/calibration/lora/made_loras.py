"""Small models, and LoRA files for them in the namings of their trainers."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file

from calibration.lora.fusing import fused_tensors
from calibration.lora.reading import LoraFile, read_lora
from fp4trt.families import Family, family_of
from fp4trt.safetensors_file import hold
from fp4trt.single_files.tables import SINGLE_FILES
from tests.frame.diffusers_models import MODELS

Tensors = dict[str, torch.Tensor]

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


@functools.cache
def described(name: str) -> tuple[Family, dict[str, Any]]:
    """Return a small model's family and config."""
    model = MODELS[name]
    with torch.device("meta"):
        config = dict(getattr(diffusers, model.class_name)(**model.config).config)
    config |= {"_class_name": model.class_name}
    return family_of(config), config


@functools.cache
def weights(name: str) -> Mapping[str, torch.Tensor]:
    """Return a small model's tensors, BF16; not to be changed."""
    return MODELS[name].make().state_dict()


@functools.cache
def _shapes(name: str) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of a small model's tensors by diffusers' names and by those of single files."""
    family, config = described(name)
    state = family.state(config)
    layout = SINGLE_FILES[family.class_name].layout(state)
    return {**{key: original.shape for key, original in layout.items()}, **state}


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return numbers of which each call gives others, the same in every run."""
    return (0.2 * torch.randn(shape, generator=_random)).to(dtype)


_random = torch.Generator().manual_seed(5)


def pairs(
    name: str,
    modules: Iterable[str],
    prefix: str,
    ends: tuple[str, str] = PEFT,
    alpha: float | None = None,
    *,
    flat: bool = False,
    alpha_dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Return pairs of factors of odd ranks, in three dtypes; alpha of each module another."""
    found: Tensors = {}
    for index, module in enumerate(modules):
        rows, *columns = _shapes(name)[f"{module}.weight"]
        key, rank = prefix + (module.replace(".", "_") if flat else module), 5 + index % 3
        dtype = (torch.float32, torch.float16, torch.bfloat16)[index % 3]
        found[f"{key}.{ends[0]}"] = normal(rank, math.prod(columns), dtype=dtype)
        found[f"{key}.{ends[1]}"] = normal(rows, rank, dtype=dtype)
        if alpha is not None:
            found[f"{key}.alpha"] = torch.tensor(alpha + index, dtype=alpha_dtype)
    return found


def saved(folder: Path, tensors: Tensors, name: str = "lora", metadata: dict[str, str] | None = None) -> Path:
    """Write a LoRA file."""
    path = folder / f"{name}.safetensors"
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata=metadata)
    return path


def read(name: str, path: Path) -> LoraFile:
    """Read a LoRA file against a small model."""
    return read_lora(path, *described(name))


def fused(name: str, *loras: tuple[Path, float]) -> Tensors:
    """Return the tensors that LoRA files change, changed."""
    stored = {key: hold(key, value) for key, value in weights(name).items()}
    files = [(read(name, path), strength) for path, strength in loras]
    return {key: make() for key, make in fused_tensors(stored, files, described(name)[0]).items()}
