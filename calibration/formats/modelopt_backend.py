"""ModelOpt, imported quietly, with our NVFP4 arithmetic in the two places where it has its own only for a GPU.

It is registered as a quantization backend, for quantizers that name that; and it stands in for the Triton kernel behind
*static* quantizers, which keep the largest magnitude of every block and ask no backend. Import ModelOpt from here: a
quantized model that names the backend fails at its first call where it is not registered.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Final

import torch

from calibration.formats import fp8, nvfp4
from calibration.formats.straight_through import straight_through

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import model_calib
    from modelopt.torch.quantization.conversion import (
        create_and_replace_svdquant_linear_on_the_fly as make_room_for_branches,
    )
    from modelopt.torch.quantization.nn.modules import tensor_quantizer
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        SequentialQuantizer,
        TensorQuantizer,
        is_registered_quant_backend,
        register_quant_backend,
    )
    from modelopt.torch.quantization.utils.numeric_utils import fp8_max_for_normalization

__all__ = [
    "BACKEND",
    "FOUR_OVER_SIX",
    "FP8",
    "FP8_BACKEND",
    "NVFP4",
    "STATIC_NVFP4",
    "SequentialQuantizer",
    "TensorQuantizer",
    "fp8_max_for_normalization",
    "make_room_for_branches",
    "model_calib",
    "mto",
    "mtq",
]

BACKEND: Final = "fp4trt_nvfp4"

FP8_BACKEND: Final = "fp4trt_fp8"
"""Divides by ``amax / 448``, as the stored format does, where ModelOpt multiplies by ``448 / amax``: another last place
of the quotient, and at a tie another code. Only what is compared with a checkpoint bit for bit names it."""

NVFP4: Final = {
    "num_bits": (2, 1),
    "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": BACKEND,
}
"""Attributes of a quantizer."""

STATIC_NVFP4: Final[dict[str, Any]] = {
    "num_bits": (2, 1),
    "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "static", "scale_bits": (4, 3)},
}
"""Of one that keeps each block's magnitude, for algorithms to choose. With a backend the sweep of scales and the local
Hessian would pass it over without a word."""

FOUR_OVER_SIX: Final = {**STATIC_NVFP4, "block_sizes": {**STATIC_NVFP4["block_sizes"], "four_over_six": True}}
"""Of one whose largest block scale is 256, so that any block's can be half as large again."""

FP8: Final = {"num_bits": (4, 3), "axis": None}
"""Attributes of a quantizer with one scale for its tensor; ModelOpt's own arithmetic runs everywhere."""

logging.getLogger("modelopt").setLevel(logging.ERROR)


def _fake_quantize(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    # While AWQ-lite tries scales on a weight, that has no amax yet; ModelOpt's own kernel then takes the input's.
    amax = inputs.abs().amax() if quantizer.amax is None else quantizer.amax
    return nvfp4.fake_quantize(inputs, nvfp4.global_scale(amax.float()))


def _fake_quantize_fp8(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    return fp8.fake_quantize(inputs, fp8.tensor_scale(quantizer.amax.float().reshape(())))


def _fake_quantize_static(
    inputs: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor,
    _quantize_scales: bool,
    largest_scale: float,
    dtype: torch.dtype,
    _pass_through: bool,
) -> torch.Tensor:
    """Quantize and dequantize under given magnitudes of blocks: ``static_blockwise_fp4_fake_quant`` of ModelOpt.

    That is a Triton kernel. It differs in one thing, by up to two units of FP32's last place and at ties of the block
    scale: it scales by ``1 / (448 / amax)``, where the stored format has ``amax / 448`` (docs/quality.md).

    Args:
        inputs: FP32 or 16 bit, blocks of 16 one after another.
        amax: FP32, of each block.
        global_amax: FP32 scalar, of the tensor.
        largest_scale: the E4M3 scale of a block that has it.
        dtype: of the result, which has the shape of ``inputs``.
    """
    scale = nvfp4.global_scale(global_amax, largest_scale)
    steps = nvfp4.block_scales(amax.float().reshape(-1, 1), scale).float() * scale
    return straight_through(
        inputs, lambda x: nvfp4.values_under(x.float().reshape(len(steps), -1), steps).reshape(x.shape).to(dtype)
    )


if not is_registered_quant_backend(BACKEND):
    register_quant_backend(BACKEND, _fake_quantize)
    register_quant_backend(FP8_BACKEND, _fake_quantize_fp8)
tensor_quantizer.static_blockwise_fp4_fake_quant = _fake_quantize_static
