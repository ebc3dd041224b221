"""Linears in FP8 beside NVFP4 and BF16 in one checkpoint: read, checked, and loaded into torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration import fp8
from calibration.checkpoint import MANIFEST, WEIGHTS, load, read
from calibration.errors import BadCheckpoint
from calibration.fp8_linear import FP8Linear
from calibration.nvfp4_linear import NVFP4Linear
from calibration.safetensors_file import TensorPlan, read_header, write
from calibration.source import load_source
from tests.fp8_checkpoint import is_modulation

FIRST = "transformer_blocks.0.norm1.linear"


@pytest.fixture
def copy(fp8_digits: Path, tmp_path: Path) -> Path:
    return shutil.copytree(fp8_digits, tmp_path / "copy")


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tensors of a checkpoint: name to (dtype, shape, bytes)."""
    stored = read_header(folder / WEIGHTS)
    tensors: dict[str, Any] = {name: (each.dtype, each.shape, each.bytes()) for name, each in stored.items()}
    change(tensors)
    plan = [TensorPlan(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]
    write(folder / WEIGHTS, plan, ((name, data) for name, (_, _, data) in tensors.items()), {"format": "pt"})


def test_the_tensors_tell_which_linears_are_in_which_format(fp8_digits: Path) -> None:
    checkpoint = read(fp8_digits)
    assert len(checkpoint.fp8) == 8
    assert all(is_modulation(path) for path in checkpoint.fp8)
    assert not set(checkpoint.fp8) & set(checkpoint.quantized)
    assert {*checkpoint.fp8, *checkpoint.quantized} == set(checkpoint.family.quantized(checkpoint.config))
    assert [path for group in checkpoint.groups for path in group] == list(checkpoint.quantized)


def test_a_linear_in_fp8_computes_with_the_rounded_weight_of_the_source(fp8_digits: Path, digits: Path) -> None:
    model, source = load(fp8_digits), load_source(digits)
    kinds = {path: type(model.get_submodule(path)) for path in read(fp8_digits).family.quantized(source.config)}
    assert {path for path, kind in kinds.items() if kind is FP8Linear} == {
        path for path in kinds if is_modulation(path)
    }
    assert {kind for path, kind in kinds.items() if not is_modulation(path)} == {NVFP4Linear}
    weight = source.get_submodule(FIRST).weight.detach()
    scale = fp8.tensor_scale(weight.abs().max().float())
    assert torch.equal(model.get_submodule(FIRST).weight, fp8.fake_quantize(weight, scale))
    slow = fp8.quantize_reference(weight.float().numpy(), scale.numpy())
    np.testing.assert_array_equal(read(fp8_digits).raw(f"{FIRST}.weight").view(np.uint8), slow)


@pytest.mark.parametrize("scale", ["weight_scale", "input_scale"])
def test_a_scale_that_is_missing_or_not_one_number_is_refused(scale: str, copy: Path) -> None:
    _rewrite(copy, lambda tensors: tensors.update({f"{FIRST}.{scale}": ("F32", (2,), np.zeros(8, np.uint8))}))
    with pytest.raises(BadCheckpoint, match=rf"{FIRST}.{scale} is F32\[2\].*expected one F32"):
        read(copy)
    _rewrite(copy, lambda tensors: tensors.pop(f"{FIRST}.{scale}"))
    with pytest.raises(BadCheckpoint, match=f"lacks {FIRST}.{scale}; expected FP8 codes"):
        read(copy)


def test_a_promise_of_fp8_that_the_tensors_do_not_keep_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["quantized"]["fp8"].append("transformer_blocks.0.ff.net.2")
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"no FP8 weights for transformer_blocks.0.ff.net.2, which its fp4trt.json"):
        read(copy)
    manifest["quantized"]["fp8"] = 3
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"quantized.fp8 is no list of module paths"):
        read(copy)
