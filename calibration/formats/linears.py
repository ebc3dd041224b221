"""A linear layer of a quantized checkpoint, as torch runs it: any number format, smoothing, low-rank branch."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

import torch
from torch import nn

from calibration.formats.arithmetic import arithmetic_of
from fp4trt.number_formats import FORMATS, FP8, NVFP4

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Linear):
    """``x = input * pre_quant_scale``, then ``fake_quantize(x) @ weight.T + bias + x @ lora_a.T @ lora_b.T``.

    In BF16 this is what ModelOpt's fake-quantized module gives, bit for bit, because every product and sum is rounded
    where that rounds it.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        format: of weight and activation; None for a linear that is not quantized.
        rank: of the low-rank branch in BF16, 0 without one.
        smoothing: whether the input is scaled by channel first.

    Attributes:
        weight: [N, K], dequantized.
        input_scale: FP32 scale of the activation, 0-d (in NVFP4 the global one); only where the format has it.
        pre_quant_scale: [K]; only with ``smoothing``.
        svdquant_lora_a: [rank, K]; only with a ``rank``, as the next.
        svdquant_lora_b: [N, rank].
        quantize_activations: False leaves ``x`` as it is, to compare a graph's structure apart from its rounding.
    """

    input_scale: torch.Tensor
    pre_quant_scale: torch.Tensor
    svdquant_lora_a: torch.Tensor
    svdquant_lora_b: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        format: str | None = None,
        rank: int = 0,
        smoothing: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.format, self.rank, self.smoothing, self.quantize_activations = format, rank, smoothing, True
        self.has_input_scale = format is not None and FORMATS[format].needs_input_amax
        if self.has_input_scale:
            self.register_buffer("input_scale", torch.empty((), dtype=torch.float32))
        if smoothing:
            self.register_buffer("pre_quant_scale", torch.empty(in_features))
        if rank:
            self.register_buffer("svdquant_lora_a", torch.empty(rank, in_features))
            self.register_buffer("svdquant_lora_b", torch.empty(out_features, rank))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N] in the weight's dtype."""
        x = input * self.pre_quant_scale if self.smoothing else input
        result = nn.functional.linear(self._rounded(x), self.weight, self.bias)
        if not self.rank:
            return result
        return result + branch_output(x, self.svdquant_lora_a, self.svdquant_lora_b)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        if self.format is None or not self.quantize_activations or x.is_meta:
            return x
        scale = self.input_scale if self.has_input_scale else torch.ones((), device=x.device)
        return arithmetic_of(self.format).fake_quantize(x, scale)


def branch_output(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return what a low-rank branch adds to a linear's output, [..., N].

    Args:
        x: the linear's input, smoothed but not rounded, [..., K].
        a: first factor, [rank, K], in the dtype of ``x``.
        b: second factor, [N, rank], likewise.
    """
    return nn.functional.linear(nn.functional.linear(x, a), b)


_FORMER: Final = {
    "NVFP4Linear": NVFP4.name,
    "SVDQuantLinear": NVFP4.name,
    "FP8Linear": FP8.name,
    "BranchedFP8Linear": FP8.name,
    "BranchedLinear": None,
}


def __getattr__(name: str) -> Any:
    """Return a former class of one format as it was made: it works for one more version."""
    if name not in _FORMER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is QuantizedLinear with a format now", FutureWarning, stacklevel=2)
    return functools.partial(QuantizedLinear, format=_FORMER[name])
