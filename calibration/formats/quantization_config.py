"""What a quantized checkpoint's config.json says of its formats, as ModelOpt's unified export says it.

Written here because ModelOpt takes six seconds to load, longer than many a model to quantize; the tests ask ModelOpt.
Source: ``modelopt.torch.export`` 0.47, ``process_layer_quant_config`` and ``convert_hf_quant_config_format``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fp4trt.number_formats import BF16, FORMATS, NVFP4

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AWQ", "SVDQUANT", "described_linears", "quantization_config"]

AWQ: Final = "nvfp4_awq"
"""Format of a linear in NVFP4 whose input is scaled by channel, and that has no low-rank branch."""
SVDQUANT: Final = "nvfp4_svd"
"""Format of a linear in NVFP4 with a low-rank branch."""

_NVFP4: Final = NVFP4.modelopt["operands"]
_OPERANDS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    **{
        name: dict.fromkeys(("input_activations", "weights"), kind.modelopt["operands"])
        for name, kind in FORMATS.items()
    },
    SVDQUANT: dict.fromkeys(("input_activations", "weights"), _NVFP4),
    AWQ: {"input_activations": {**_NVFP4, "num_bits": 8}, "weights": _NVFP4},  # 8 is what ModelOpt writes; it means 4
}
_SMOOTHED: Final = {"group_size": NVFP4.block, "has_zero_point": False, "pre_quant_scale": True}
_LAYERS: Final[Mapping[str, Mapping[str, Any]]] = {
    **{name: kind.modelopt["layer"] for name, kind in FORMATS.items()},
    AWQ: {"quant_algo": "NVFP4_AWQ", **_SMOOTHED},
    SVDQUANT: {"quant_algo": "NVFP4_SVD", **_SMOOTHED},
}
"""What ModelOpt says of one linear of a mixed model."""


def quantization_config(model: nn.Module, formats: Mapping[str, str], ranks: Collection[int] = ()) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model some of whose linears are quantized.

    Args:
        model: may be on the meta device.
        formats: module path to the name of a number format, :data:`AWQ`, :data:`SVDQUANT`, or ``bf16``.
        ranks: of the low-rank branches; those stand beside all linears in NVFP4 where none is :data:`SVDQUANT`.
    """
    from torch import nn

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    producer = {"name": "modelopt", "version": importlib.metadata.version("nvidia-modelopt")}
    return described_linears(linears, formats, ranks, producer)


def described_linears(
    linears: Sequence[str], formats: Mapping[str, str], ranks: Collection[int], producer: Mapping[str, str]
) -> dict[str, Any]:
    """Return the ``quantization_config`` of a model with these linears.

    Args:
        linears: module paths of all linears, in the order of the model's modules.
        formats, ranks: as :func:`quantization_config` takes them.
        producer: ``name`` and ``version`` of what made the checkpoint.
    """
    if ranks and SVDQUANT not in formats.values():
        formats = {path: SVDQUANT if kind == NVFP4.name else kind for path, kind in formats.items()}
    quantized = {name: formats[name] for name in linears if formats.get(name, BF16) != BF16}
    kinds = list(dict.fromkeys(quantized.values()))
    mixed = len(kinds) > 1
    groups: dict[str, dict[str, Any]] = {
        f"group_{index}": {
            **{operand: dict(described) for operand, described in _OPERANDS[kind].items()},
            "targets": sorted(name for name, found in quantized.items() if found == kind) if mixed else ["Linear"],
        }
        for index, kind in enumerate(kinds)
    }
    if ranks:
        told = not mixed and len(ranks) == 1  # ModelOpt knows one rank for all, and of a mixed model does not say it
        rank = {"lora_rank": next(iter(ranks))} if told else {}
        groups[f"group_{kinds.index(SVDQUANT)}"] |= {"has_zero_point": False, "pre_quant_scale": True, **rank}
    return {
        **({} if kinds == [AWQ] else {"config_groups": groups}),  # then ModelOpt has none
        **({"quantized_layers": {name: dict(_LAYERS[kind]) for name, kind in quantized.items()}} if mixed else {}),
        # Of a mixed model ModelOpt names the linears that are quantized, and none that are not.
        "ignore": [] if mixed else sorted({_pattern(name, quantized) for name in linears if name not in quantized}),
        "quant_algo": "MIXED_PRECISION" if mixed else _LAYERS[kinds[0]]["quant_algo"],
        "producer": dict(producer),
        "quant_method": "modelopt",
    }


def _pattern(name: str, quantized: Iterable[str]) -> str:
    """Return the widest pattern that takes in a linear and no quantized one: ``stem*``, ``stem.*``, or its name.

    Readers take these as names with a star (SGLang), as shell patterns (TensorRT-LLM), and as either of that and parts
    of names (vLLM), to which ``proj_out`` would be any block's. So a name gets a star where that says the same:
    ModelOpt writes none.
    """
    for index in (index for index, character in enumerate(name) if character == "."):
        stem = name[:index]
        if not any(path.startswith(stem) for path in quantized):
            return f"{stem}*"
        if not any(path == stem or path.startswith(f"{stem}.") for path in quantized):
            return f"{stem}.*"
    return name if any(path.startswith(name) for path in quantized) else f"{name}*"
