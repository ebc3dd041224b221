"""What ModelOpt's unified export writes into config.json, asked of ModelOpt without any weights."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from calibration.modelopt_backend import NVFP4, mtq

__all__ = ["quantization_config"]


def quantization_config(model: nn.Module, paths: Sequence[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model whose linears at ``paths`` are in NVFP4.

    Args:
        model: on the meta device; quantizers are inserted in place.
        paths: module paths of the quantized linears.
    """
    from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
    from modelopt.torch.export.quant_utils import get_quant_config
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints how many it inserted
        warnings.simplefilter("ignore")
        mtq.quantize(model, {"quant_cfg": [{"quantizer_name": "*", "enable": False}], "algorithm": None})
    # Enabled one by one: by name in the config, ModelOpt would try every name on every module.
    for path in paths:
        for kind in ("input_quantizer", "weight_quantizer"):
            quantizer: Any = model.get_submodule(f"{path}.{kind}")
            quantizer.set_from_attribute_config(QuantizerAttributeConfig(**NVFP4, enable=True))
            quantizer.amax = torch.tensor(1.0)
    return dict(convert_hf_quant_config_format(get_quant_config(model)))
