"""Linear layers with a low-rank branch or a scaled input, which SVDQuant and AWQ leave, as torch runs them."""

from __future__ import annotations

import torch
from torch import nn

from calibration.formats.fp8_linear import FP8Linear
from calibration.formats.nvfp4_linear import NVFP4Linear

__all__ = ["BranchedFP8Linear", "BranchedLinear", "SVDQuantLinear"]


class BranchedLinear(nn.Linear):
    """A linear of a smoothed input, and a low-rank branch in 16 bit beside it.

    ``x = input * pre_quant_scale``, then ``linear(x) + x @ svdquant_lora_a.T @ svdquant_lora_b.T``: in BF16 what
    ModelOpt's fake-quantized module gives, bit for bit, because every product and sum is rounded where that rounds it.
    ``linear`` is what the next class in line computes: here a plain one.

    Attributes:
        pre_quant_scale: [K]; there only where the linear was made with ``smoothing``.
        svdquant_lora_a: [rank, K]; there only where the rank is above 0, as the next.
        svdquant_lora_b: [N, rank].
    """

    pre_quant_scale: torch.Tensor
    svdquant_lora_a: torch.Tensor
    svdquant_lora_b: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, rank: int, smoothing: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.rank, self.smoothing = rank, smoothing
        if smoothing:
            self.register_buffer("pre_quant_scale", torch.empty(in_features))
        if rank:
            self.register_buffer("svdquant_lora_a", torch.empty(rank, in_features))
            self.register_buffer("svdquant_lora_b", torch.empty(out_features, rank))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N] in the weight's dtype."""
        x = input * self.pre_quant_scale if self.smoothing else input
        result = super().forward(x)
        if not self.rank:
            return result
        branch = nn.functional.linear(x, self.svdquant_lora_a)
        return result + nn.functional.linear(branch, self.svdquant_lora_b)


class SVDQuantLinear(BranchedLinear, NVFP4Linear):
    """One whose weight, and smoothed input, are in NVFP4."""


class BranchedFP8Linear(BranchedLinear, FP8Linear):
    """One whose weight, and smoothed input, are in FP8."""
