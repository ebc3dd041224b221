"""A linear layer of a quantized checkpoint in FP8, as torch runs it."""

from __future__ import annotations

import torch
from torch import nn

from calibration.formats import fp8

__all__ = ["FP8Linear"]


class FP8Linear(nn.Linear):
    """``fake_quantize(x) @ weight.T + bias`` with a weight that already holds the values of its E4M3 codes.

    Attributes:
        weight: [N, K], dequantized.
        input_scale: FP32 scale of the activation, 0-d.
        quantize_activations: False leaves ``x`` as it is, to compare a graph's structure apart from its rounding.
    """

    input_scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.register_buffer("input_scale", torch.empty((), dtype=torch.float32))
        self.quantize_activations = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N] in the weight's dtype."""
        if self.quantize_activations:
            input = fp8.fake_quantize(input, self.input_scale)
        return nn.functional.linear(input, self.weight, self.bias)
