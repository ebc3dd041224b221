"""A linear layer of a quantized checkpoint, as torch runs it."""

from __future__ import annotations

import torch
from torch import nn

from calibration.formats import nvfp4

__all__ = ["NVFP4Linear"]


class NVFP4Linear(nn.Linear):
    """``fake_quantize(x) @ weight.T + bias`` with a weight that already holds the values of its FP4 codes.

    Attributes:
        weight: [N, K], dequantized.
        input_scale: FP32 global scale of the activation, 0-d.
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
            input = nvfp4.fake_quantize(input, self.input_scale)
        return nn.functional.linear(input, self.weight, self.bias)
