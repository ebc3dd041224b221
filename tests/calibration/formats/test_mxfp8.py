"""MXFP8's arithmetic: fast and slow agree, and the bytes are those of ModelOpt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from calibration.by_block.quantize_blocks import BlockTask
from calibration.formats import mxfp8
from calibration.methods import registry
from calibration.methods.quality.quantize_block import quantize_block
from calibration.recipes.recipe import PTQ, Quality
from fp4trt.families import family_of
from fp4trt.json_file import load_json


def hard_values() -> torch.Tensor:
    """Return FP32 values over the whole range, ties, zeros of both signs, and blocks at the ends of E8M0."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=generator) * torch.exp(torch.randn(64, 1, generator=generator) * 8)
    x[0], x[1, :32], x[2, :32] = 0, 448 * 2.0**5, 448 * 2.0**-130
    x[3, :32], x[4, :32], x[5, :32] = 1e-44, 3e38, -0.0
    x[6, :32] = torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))  # just beyond what scale 2^0 holds
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_path_equals_the_reference(dtype: torch.dtype) -> None:
    x = hard_values().to(dtype)
    codes, scales = mxfp8.quantize(x)
    slow_codes, slow_scales = mxfp8.quantize_reference(x.float().numpy())
    np.testing.assert_array_equal(codes.view(torch.uint8).numpy(), slow_codes)
    np.testing.assert_array_equal(scales.numpy(), slow_scales)
    assert int(scales[6, 0]) == (128 if dtype == torch.float32 else 127)
    assert torch.equal(mxfp8.fake_quantize(x, torch.ones(())), mxfp8.dequantize(codes, scales).to(dtype))


def test_the_bytes_are_modelopts() -> None:
    from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor

    x = hard_values().bfloat16()
    tensors = mxfp8.stored(x, torch.ones(()))
    scales = MXFP8QTensor.get_weights_scaling_factor(x)
    codes = MXFP8QTensor.quantize_with_scale(x.float(), scales)
    assert torch.equal(tensors["weight_scale"], scales)
    assert torch.equal(tensors["weight"].view(torch.uint8), codes.view(torch.uint8))


def test_packing_bits_gives_what_is_stored() -> None:
    x = hard_values().bfloat16()
    packed = mxfp8.packer(torch.ones(()), "cpu")(x.view(torch.uint16).numpy())
    stored = {leaf: value.view(torch.uint8).numpy() for leaf, value in mxfp8.stored(x, torch.ones(())).items()}
    assert packed.keys() == stored.keys()
    for leaf, value in packed.items():
        np.testing.assert_array_equal(value, stored[leaf])


def test_a_scale_that_is_nan_is_refused() -> None:
    tensors = mxfp8.stored(hard_values(), torch.ones(()))
    tensors["weight_scale"][0, 0] = 255
    with pytest.raises(ValueError, match="weight_scale holds 255, E8M0's NaN"):
        mxfp8.restored(tensors)


@pytest.mark.parametrize("method", ["ptq", "quality"])
def test_an_input_of_zeros_needs_no_scale(method: str, digits: Path) -> None:
    block = nn.ModuleDict({"alone": nn.Linear(32, 32)}).bfloat16()

    def run(*_: object) -> None:
        with torch.no_grad():
            block["alone"](torch.zeros(1, 4, 32, dtype=torch.bfloat16))

    task = BlockTask("block", block, {"block.alone": "mxfp8"}, (("block.alone",),), run)
    if method == "quality":
        result = quantize_block(task, Quality(name="quality"), ())
    else:
        config = load_json(digits / "config.json")
        result = registry.of_block(PTQ(name="ptq"), family_of(config), config)(task)
    assert "block.alone.input_quantizer" not in result.amax
