"""The student: a quantized checkpoint whose weights are rounded anew at every call, under full-precision masters.

The scales are the checkpoint's and stay: the global ones, because merged linears share them, and those of the blocks,
because a method may have chosen them. A gradient goes straight through every rounding. What the student computes with
is what :func:`student_tensors` stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from calibration.checkpoints.quantized import Checkpoint, load
from calibration.formats import nvfp4
from calibration.formats.linears import QuantizedLinear
from calibration.formats.straight_through import straight_through
from fp4trt.number_formats import NVFP4

__all__ = ["StudentLinear", "make_student", "student_linears", "student_tensors"]


class StudentLinear(nn.Module):
    """An NVFP4 linear that learns.

    Attributes:
        weight: the master, FP32 [N, K].
        bias: its master, FP32 [N], or None; computed with as BF16 holds it.
        block_scales: float8_e4m3fn [N, K / 16].
        global_scale: FP32, 0-d.
        input_scale: FP32 global scale of the activation, 0-d.
    """

    block_scales: torch.Tensor
    global_scale: torch.Tensor
    input_scale: torch.Tensor

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        block_scales: torch.Tensor,
        global_scale: torch.Tensor,
        input_scale: torch.Tensor,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float())
        self.bias = None if bias is None else nn.Parameter(bias.float())
        # As bytes: neither collectives nor .to(dtype) know what to do with FP8.
        self.register_buffer("block_scales", block_scales.view(torch.uint8))
        self.register_buffer("global_scale", global_scale)
        self.register_buffer("input_scale", input_scale)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``input`` [..., K] to [..., N]."""
        weight = straight_through(self.weight, self.rounded)
        bias = None if self.bias is None else straight_through(self.bias, _as_bfloat16)
        quantized = nvfp4.fake_quantize(input, self.input_scale)
        return nn.functional.linear(quantized, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))

    def scales(self) -> torch.Tensor:
        """Return the scales of the blocks, float8_e4m3fn [N, K / 16]."""
        return self.block_scales.view(torch.float8_e4m3fn)

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the codes of a weight under this linear's scales, uint8 [N, K]."""
        return _codes(weight, self.scales(), self.global_scale)

    def rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a weight as it is stored, dequantized, FP32 [N, K]."""
        return nvfp4.dequantize(self.codes(weight), self.scales(), self.global_scale)


def _codes(weight: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().unflatten(-1, (-1, nvfp4.BLOCK_SIZE))
    return nvfp4.codes_under(blocks, (scales.float() * global_scale).unsqueeze(-1)).flatten(-2)


def _as_bfloat16(value: torch.Tensor) -> torch.Tensor:
    return value.bfloat16().to(value.dtype)


def make_student(checkpoint: Checkpoint, plain: Callable[[str], torch.Tensor]) -> nn.Module:
    """Return a model that computes what a quantized checkpoint does, in FP32 on the CPU, and learns its NVFP4 linears.

    A master is the plain checkpoint's weight where that rounds to the stored code, so that what rounding took away is
    there to be learned from, and the stored value elsewhere, where a method has chosen another code or has changed the
    weight.

    Args:
        checkpoint: to start from.
        plain: name of a weight to its value in the plain checkpoint.
    """
    model = load(checkpoint.directory, dtype=torch.float32)
    for path, linear in list(model.named_modules()):
        if not isinstance(linear, QuantizedLinear) or linear.format != NVFP4.name or linear.rank or linear.smoothing:
            continue  # what computes otherwise, or more, stays as it is
        scales, global_scale = checkpoint.tensor(f"{path}.weight_scale"), checkpoint.tensor(f"{path}.weight_scale_2")
        codes, original = nvfp4.unpack_codes(checkpoint.tensor(f"{path}.weight")), plain(f"{path}.weight").float()
        same = _codes(original, scales, global_scale) == codes
        master = torch.where(same, original, linear.weight)
        model.set_submodule(path, StudentLinear(master, linear.bias, scales, global_scale, linear.input_scale))
    return model


def student_linears(model: nn.Module) -> Iterator[tuple[str, StudentLinear]]:
    """Yield the linears that learn, by path."""
    for path, module in model.named_modules():
        if isinstance(module, StudentLinear):
            yield path, module


def student_tensors(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores of the linears that learn, by name: codes, the scales, and BF16 biases.

    Args:
        model: the student, for its structure.
        state: its values, which other processes may have held.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, _ in student_linears(model):
        scales, scale = state[f"{path}.block_scales"].view(torch.float8_e4m3fn), state[f"{path}.global_scale"]
        tensors[f"{path}.weight"] = nvfp4.pack_codes(_codes(state[f"{path}.weight"], scales, scale))
        tensors[f"{path}.weight_scale"] = scales
        tensors[f"{path}.weight_scale_2"] = scale
        tensors[f"{path}.input_scale"] = state[f"{path}.input_scale"]
        if f"{path}.bias" in state:
            tensors[f"{path}.bias"] = state[f"{path}.bias"].bfloat16()
    return tensors
