"""What a quantized checkpoint's config.json says of its formats, as ModelOpt's unified export says it.

Written here because ModelOpt takes six seconds to load, longer than many a model to quantize; the tests ask ModelOpt.
Source: ``modelopt.torch.export`` 0.47, ``convert_hf_quant_config_format``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Sequence
from typing import Any, Final

from torch import nn

from calibration import nvfp4

__all__ = ["quantization_config"]

_OPERAND: Final = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": nvfp4.BLOCK_SIZE}


def quantization_config(model: nn.Module, paths: Sequence[str], rank: int = 0) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model whose linears at ``paths`` are in NVFP4.

    Args:
        model: may be on the meta device.
        paths: module paths of the quantized linears.
        rank: of the low-rank branches that SVDQuant put beside them; 0 where it did not.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    branch = {"has_zero_point": False, "pre_quant_scale": True, "lora_rank": rank} if rank else {}
    return {
        "config_groups": {
            "group_0": {"input_activations": dict(_OPERAND), "weights": dict(_OPERAND), "targets": ["Linear"], **branch}
        },
        "ignore": sorted({_pattern(name, paths) for name in linears if name not in set(paths)}),
        "quant_algo": "NVFP4_SVD" if rank else "NVFP4",
        "producer": {"name": "modelopt", "version": importlib.metadata.version("nvidia-modelopt")},
        "quant_method": "modelopt",
    }


def _pattern(name: str, quantized: Iterable[str]) -> str:
    """Return the widest pattern that takes in a linear and no quantized one: ``stem*``, ``stem.*``, or its name."""
    for index in (index for index, character in enumerate(name) if character == "."):
        stem = name[:index]
        if not any(path.startswith(stem) for path in quantized):
            return f"{stem}*"
        if not any(path == stem or path.startswith(f"{stem}.") for path in quantized):
            return f"{stem}.*"
    return name
