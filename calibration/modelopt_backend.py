"""ModelOpt, imported quietly, with our NVFP4 arithmetic registered as one of its quantization backends.

Import ModelOpt from here: a quantized model that names the backend fails at its first call where it is not registered.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any, Final

import torch

from calibration import nvfp4

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import model_calib
    from modelopt.torch.quantization.conversion import (
        create_and_replace_svdquant_linear_on_the_fly as make_room_for_branches,
    )
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import (
        is_registered_quant_backend,
        register_quant_backend,
    )

__all__ = ["FP8", "NVFP4", "make_room_for_branches", "model_calib", "mto", "mtq"]

BACKEND: Final = "fp4trt_nvfp4"

NVFP4: Final = {
    "num_bits": (2, 1),
    "block_sizes": {-1: nvfp4.BLOCK_SIZE, "type": "dynamic", "scale_bits": (4, 3)},
    "backend": BACKEND,
}
"""Attributes of a quantizer."""

FP8: Final = {"num_bits": (4, 3), "axis": None}
"""Attributes of a quantizer with one scale for its tensor; ModelOpt's own arithmetic runs everywhere."""

logging.getLogger("modelopt").setLevel(logging.ERROR)


def _fake_quantize(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    # While AWQ-lite tries scales on a weight, that has no amax yet; ModelOpt's own kernel then takes the input's.
    amax = inputs.abs().amax() if quantizer.amax is None else quantizer.amax
    return nvfp4.fake_quantize(inputs, nvfp4.global_scale(amax.float()))


if not is_registered_quant_backend(BACKEND):
    register_quant_backend(BACKEND, _fake_quantize)
