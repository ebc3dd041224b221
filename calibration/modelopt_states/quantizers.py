"""What one of ModelOpt's quantizers does to its tensor: what a checkpoint can say of it, and all else by its name.

A quantizer changes a tensor by more than its format: it may scale the channels, rotate, add a low-rank product or hold
a bias, and some of that even while it is switched off. So every attribute that ModelOpt 0.47's quantizers have is here
either known to change nothing, or required to have the one value that a checkpoint can say; an unknown one is refused.
Source: ``modelopt.torch.quantization.nn.modules.tensor_quantizer`` and ``quant_linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn

from fp4trt.number_formats import FP8, NVFP4

__all__ = ["FORMATS", "Unsayable", "described", "format_of", "require_inert", "smoothing_of"]

FORMATS: Final = "NVFP4 (num_bits (2, 1) in blocks of 16 with FP8 scales) or FP8 (num_bits (4, 3), one scale a tensor)"
"""What a quantizer may round to."""

_OTHER_FORMAT: Final = (
    f"expected {FORMATS}: quantize with a ModelOpt config of these alone, such as NVFP4_DEFAULT_CFG or FP8_DEFAULT_CFG"
)
_OTHERWISE: Final = "set it so, and calibrate, before mto.save"
_NOWHERE: Final = "a checkpoint has no place for that: quantize without it"

_WITHOUT_EFFECT: Final = frozenset(
    {
        "_amax_for_smoothing",  # what AWQ has found the scales from
        "_amax_shape_for_export",
        "_constant_amax",  # stands in the buffer _amax
        "_effective_bits",
        "_enable_pre_quant_scale",  # honoured by the property pre_quant_scale
        "_input_dtype",
        "_is_nvfp4_static_quantizer",
        "_is_static_block_scale_quantizer",
        "_learn_amax",
        "_learnable_amax",
        "_onnx_quantizer_type",
        "_pass_through_bwd",
        "_pytorch_state_metadata",
        "_quant_max_bound",  # of learned magnitudes, which are refused
        "_quantize_pre_scale",
        "_quantize_scales",
        "_tied_amax",
        "_trt_high_precision_dtype",
        "backend_extra_args",
    }
)
"""Attributes that say nothing about what is computed."""

_JUDGED: Final = frozenset(
    {
        "_axis",
        "_bias_axis",
        "_block_sizes",
        "_dequantize",
        "_disabled",
        "_fake_quant",
        "_num_bits",
        "_rotate",
        "_slices",
        "backend",
    }
)
"""Attributes that :func:`format_of` looks at on its own, or that only matter where it refuses."""

_REQUIRED: Final[Mapping[str, Any]] = {
    "_if_quant": True,
    "_if_calib": False,
    "_dynamic": False,
    "_unsigned": False,
    "_narrow_range": False,
    "_bias": None,
    "_use_constant_amax": False,
    "_lsq": False,
}
"""Attributes that change what is computed, and the value with which they do not."""

_WORDS: Final[Mapping[str, str]] = {
    "_if_quant": "is on and does not round (disable_quant)",
    "_if_calib": "is still calibrating (enable_calib)",
    "_dequantize": "holds compressed values (mtq.compress, or fake_quant=False)",
    "_dynamic": "takes its scale from each tensor as it comes (type dynamic)",
    "_use_constant_amax": "has a constant amax of 448 (use_constant_amax)",
    "_lsq": "has learned magnitudes (LSQ)",
    "_bias": "subtracts a bias before it rounds",
}

_BUFFERS: Final = frozenset(
    {
        "_amax",
        "_amax_post",  # of learned magnitudes and of a bias, which are refused by their own names
        "_amax_pre",
        "_bias_value",
        "_global_amax",
        "_pre_quant_scale",
        "_svdquant_lora_a",
        "_svdquant_lora_b",
    }
)

_FLOATS: Final[Mapping[object, str]] = {
    (4, 3): "FP8",
    (5, 2): "FP8 E5M2",
    (2, 1): "FP4",
    (3, 2): "FP6 E3M2",
    (2, 3): "FP6 E2M3",
}


_FAMILIES: Final[Mapping[object, str]] = {(8, 0): "MX", (4, 3): "NV"}
"""Bits of the blocks' scales to what a format with them is called by."""


class Unsayable(Exception):
    """A quantizer does what no checkpoint of ours can say.

    Attributes:
        found: what it does, as the end of a sentence that begins with its name.
        remedy: what was expected, and what to do.
    """

    def __init__(self, found: str, remedy: str = _NOWHERE) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


def format_of(quantizer: nn.Module) -> str | None:
    """Return the name of the format that a quantizer rounds to; None for one that is switched off.

    Raises:
        Unsayable: it does anything else.
    """
    from calibration.formats.modelopt_backend import TensorQuantizer

    one: Any = quantizer
    if not isinstance(quantizer, TensorQuantizer):  # a container of some
        if not any(part.is_enabled or smoothing_of(part) is not None or part.rotate_is_enabled for part in one):
            return None
        raise Unsayable(f"rounds several times: {', then '.join(described(part) for part in one)}", _OTHER_FORMAT)
    _refuse_unknown(one)
    if one._dequantize or not one.fake_quant:
        raise Unsayable(_WORDS["_dequantize"], "expected fake quantization: save the state before mtq.compress")
    if not one.is_enabled:
        return None
    for name, wanted in _REQUIRED.items():
        if getattr(one, name, wanted) != wanted:
            found = _WORDS.get(name, f"has {name.strip('_')} {getattr(one, name)!r}")
            raise Unsayable(found, f"expected ModelOpt's default, {name.strip('_')} {wanted!r}: {_OTHERWISE}")
    kind = _format(one)
    if kind is None:
        raise Unsayable(f"is in {described(one)}", _OTHER_FORMAT)
    return kind


def _format(one: Any) -> str | None:
    bits, blocks = one.num_bits, dict(one.block_sizes or {})
    if bits == (4, 3):
        return FP8.name if not blocks and one.axis is None else None
    kind = blocks.pop("type", "static")
    four_over_six = blocks.pop("four_over_six", False)
    if bits != (2, 1) or blocks != {-1: NVFP4.block, "scale_bits": (4, 3)}:
        return None
    return NVFP4.name if kind == "static" or not four_over_six else None


def _refuse_unknown(one: Any) -> None:
    """Refuse what acts on a tensor even where the quantizer is switched off, and what is not known to do nothing.

    Raises:
        Unsayable: naming the attribute.
    """
    from calibration.formats.modelopt_backend import BACKENDS

    if one.rotate_is_enabled:
        raise Unsayable(
            f"rotates its tensor (rotate={one._rotate!r})",
            "a checkpoint has no place for a rotation: quantize without (rotate: False in the config)",
        )
    if one.backend not in (None, *BACKENDS.values()):
        raise Unsayable(
            f"computes with the backend {one.backend!r}", "expected ModelOpt's own arithmetic: quantize without backend"
        )
    known = _WITHOUT_EFFECT | _JUDGED | _REQUIRED.keys()
    unknown = sorted(one._get_properties_for_modelopt_state() - known)
    buffers = {*one._buffers, *one._parameters} - _BUFFERS
    unknown += sorted(buffers) if one.is_enabled else []
    if unknown:
        raise Unsayable(
            f"has {unknown[0]}, which fp4trt does not know",
            "its meaning for the result is unknown, so it is refused: take the version of ModelOpt in constraints.txt",
        )


def require_inert(quantizer: nn.Module, role: str, switch: str) -> None:
    """Refuse a quantizer that does anything, where a checkpoint can say nothing of one.

    Args:
        quantizer: of anything but a linear's input and weight.
        role: what it acts on, such as ``the input of a LayerNorm``.
        switch: the statement that switches off all such ones of a ``model``.

    Raises:
        Unsayable: naming what it does.
    """
    kind = format_of(quantizer)
    if kind is not None:
        remedy = f"a checkpoint has no place for that: switch such quantizers off before mto.save: {switch}"
        raise Unsayable(f"rounds {role} to {kind.upper()}", remedy)
    if smoothing_of(quantizer) is not None:
        raise Unsayable(f"scales {role} by channel (pre_quant_scale)")


def smoothing_of(quantizer: Any) -> torch.Tensor | None:
    """Return what a quantizer scales its tensor by first, on or off; None where it does not."""
    return getattr(quantizer, "pre_quant_scale", None)


def described(quantizer: Any) -> str:
    """Return what a quantizer rounds to, in words and in ModelOpt's own numbers."""
    bits, blocks = quantizer._num_bits, dict(quantizer._block_sizes or {})
    name = f"INT{bits}" if isinstance(bits, int) else _FLOATS.get(bits, f"num_bits {bits}")
    sizes = [size for key, size in blocks.items() if isinstance(key, int) and size is not None]
    if blocks.get("scale_bits") in _FAMILIES:
        name = f"{_FAMILIES[blocks['scale_bits']]}{name}"
    if sizes:
        along = " x ".join(str(size) for size in sizes)
        return f"{name} in blocks of {along} (num_bits {bits}, block_sizes {blocks})"
    scales = "one scale a channel" if blocks or quantizer._axis is not None else "one scale a tensor"
    return f"{name} with {scales} (num_bits {bits}, axis {quantizer._axis})"
