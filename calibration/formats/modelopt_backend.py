"""ModelOpt, imported quietly, with our NVFP4 arithmetic in the two places where it has its own only for a GPU.

Every format is registered as a quantization backend, for quantizers that name it; and NVFP4's arithmetic stands in for
the Triton kernel behind *static* quantizers, which keep the amax of every block and ask no backend. Import ModelOpt
from here: a quantized model that names a backend fails at its first call where that is not registered.
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any, Final

import torch

from calibration.formats import nvfp4
from calibration.formats.arithmetic import Arithmetic, arithmetic_of
from calibration.formats.straight_through import straight_through
from fp4trt import number_formats
from fp4trt.number_formats import FORMATS

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
    "BACKENDS",
    "FOUR_OVER_SIX",
    "FP8",
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

BACKENDS: Final = {name: f"fp4trt_{name}" for name in FORMATS}
"""Format to the backend that computes as its stored form does.

FP8's divides by ``amax / 448`` where ModelOpt multiplies by ``448 / amax``: another last place of the quotient, and at
a tie another code. Only what is compared with a checkpoint bit for bit names that one."""

NVFP4: Final[dict[str, Any]] = number_formats.NVFP4.modelopt["quantizer"]
FP8: Final[dict[str, Any]] = number_formats.FP8.modelopt["quantizer"]
"""Attributes of a quantizer of an activation, or of a weight rounded to nearest."""

STATIC_NVFP4: Final[dict[str, Any]] = {
    "num_bits": (2, 1),
    "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "static", "scale_bits": (4, 3)},
}
"""A quantizer that keeps each block's amax, for algorithms to choose. With a backend the sweep of scales and the local
Hessian would pass it over without a word."""

FOUR_OVER_SIX: Final = {**STATIC_NVFP4, "block_sizes": {**STATIC_NVFP4["block_sizes"], "four_over_six": True}}
"""A static quantizer whose largest block scale is 256, so that any block's can be half as large again."""

logging.getLogger("modelopt").setLevel(logging.ERROR)


def _fake_quantize(arithmetic: Arithmetic, inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    # While AWQ-lite tries scales on a weight, that has no amax yet; ModelOpt's own kernel then takes the input's.
    amax = inputs.abs().amax() if quantizer.amax is None else quantizer.amax
    return arithmetic.fake_quantize(inputs, arithmetic.tensor_scale(amax.float().reshape(())))


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


for _name, _backend in BACKENDS.items():
    if not is_registered_quant_backend(_backend):
        register_quant_backend(_backend, functools.partial(_fake_quantize, arithmetic_of(_name)))
tensor_quantizer.static_blockwise_fp4_fake_quant = _fake_quantize_static
