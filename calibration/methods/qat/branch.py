"""A linear whose low-rank branch and bias learn, beside codes that stay and are dequantized anew at every call.

Nothing of the size of the weight is kept for the backward pass, nor has a gradient: the codes take half a byte each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from calibration.checkpoints.quantized import BRANCH, SMOOTHING, Checkpoint
from calibration.formats import nvfp4
from calibration.formats.linears import branch_output
from calibration.formats.straight_through import as_bfloat16

__all__ = ["BranchLinear", "branch_linears"]


class BranchLinear(nn.Module):
    """An NVFP4 linear with a low-rank branch that learns; ``QuantizedLinear`` tells what it computes.

    Attributes:
        bias: its master, FP32 [N], or None; computed with as BF16 holds it, as are the factors.
        svdquant_lora_a: master of the first factor, FP32 [rank, K]; one parameter for all that share it.
        svdquant_lora_b: master of the second, FP32 [N, rank].
        codes: two a byte, uint8 [N, K / 2].
        block_scales: float8_e4m3fn as bytes, uint8 [N, K / 16].
        global_scale: FP32, 0-d.
        input_scale: FP32 global scale of the activation, 0-d.
        pre_quant_scale: what the input is multiplied by, FP32 [K], or None.
    """

    codes: torch.Tensor
    block_scales: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor
    pre_quant_scale: torch.Tensor | None

    def __init__(self, checkpoint: Checkpoint, path: str, factor: nn.Parameter) -> None:
        """Take a linear out of a checkpoint.

        Args:
            checkpoint: to start from.
            path: of the linear.
            factor: its ``svdquant_lora_a``.
        """
        super().__init__()
        names = checkpoint.tensors
        self.bias = nn.Parameter(checkpoint.tensor(f"{path}.bias").float()) if f"{path}.bias" in names else None
        self.svdquant_lora_a = factor
        self.svdquant_lora_b = nn.Parameter(checkpoint.tensor(f"{path}.{BRANCH[1]}").float())
        smoothing = checkpoint.tensor(f"{path}.{SMOOTHING}").float() if checkpoint.is_smoothed(path) else None
        # As bytes: neither collectives nor .to(dtype) know what to do with FP8.
        block_scales = checkpoint.tensor(f"{path}.weight_scale").view(torch.uint8)
        self.register_buffer("codes", checkpoint.tensor(f"{path}.weight"))
        self.register_buffer("block_scales", block_scales)
        self.register_buffer("global_scale", checkpoint.tensor(f"{path}.weight_scale_2"))
        self.register_buffer("input_scale", checkpoint.tensor(f"{path}.input_scale"))
        self.register_buffer(SMOOTHING, smoothing)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N]."""
        x = input if self.pre_quant_scale is None else input * self.pre_quant_scale.to(input.dtype)
        bias = None if self.bias is None else as_bfloat16(self.bias).to(x.dtype)
        a, b = (as_bfloat16(factor).to(x.dtype) for factor in (self.svdquant_lora_a, self.svdquant_lora_b))
        quantized = nvfp4.fake_quantize(x, self.input_scale)
        result: torch.Tensor = _FrozenProduct.apply(quantized, bias, self.weight)  # type: ignore[no-untyped-call]
        return result + branch_output(x, a, b)

    def weight(self) -> torch.Tensor:
        """Return the weight as it is stored, dequantized, FP32 [N, K]."""
        scales = self.block_scales.view(torch.float8_e4m3fn)
        return nvfp4.dequantize(nvfp4.unpack_codes(self.codes), scales, self.global_scale)

    def stored(self, path: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what a checkpoint stores of it otherwise than before, by name: both factors and the bias, in BF16.

        Args:
            path: of the linear.
            state: the student's values.
        """
        names = (f"{path}.{leaf}" for leaf in ("bias", *BRANCH))
        return {name: state[name].bfloat16() for name in names if name in state}


class _FrozenProduct(torch.autograd.Function):
    """``input @ weight.T + bias``, whose weight is made again in the backward pass, and has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, bias: torch.Tensor | None, weight: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        ctx.weight = weight
        return nn.functional.linear(input, weight().to(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (gradient,) = gradients
        of_input, of_bias, _ = ctx.needs_input_grad
        return (
            gradient @ ctx.weight().to(gradient.dtype) if of_input else None,
            gradient.flatten(0, -2).sum(0) if of_bias else None,
            None,
        )


def branch_linears(checkpoint: Checkpoint) -> dict[str, BranchLinear]:
    """Return the linears in NVFP4 with a branch, by path; members of a group that share a first factor still do."""
    found = {}
    for group in checkpoint.groups_of([path for path in checkpoint.quantized if checkpoint.rank(path)]):
        factors: dict[tuple[bytes, ...], nn.Parameter] = {}
        for path in group:
            name, smoothing = f"{path}.{BRANCH[0]}", f"{path}.{SMOOTHING}"
            key = tuple(checkpoint.raw(one).tobytes() for one in (name, smoothing) if one in checkpoint.tensors)
            factor = factors.setdefault(key, nn.Parameter(checkpoint.tensor(name).float()))
            found[path] = BranchLinear(checkpoint, path, factor)
    return found
