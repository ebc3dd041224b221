"""The student: a quantized checkpoint whose weights are rounded anew at every call, under full-precision masters.

The scales are the checkpoint's and stay: the global ones, because merged linears share them, and those of the blocks,
because a method may have chosen them. A gradient goes straight through every rounding. Where low-rank branches learn,
the codes stay too (:mod:`calibration.methods.qat.branch`). What the student computes with is what
:func:`student_tensors` stores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from calibration.checkpoints.quantized import Checkpoint, empty_model, reader
from calibration.formats import nvfp4
from calibration.formats.straight_through import as_bfloat16, straight_through
from calibration.methods.qat.branch import BranchLinear, branch_linears
from calibration.recipes.recipe import Learn
from fp4trt.progress import PATIENCE_S, tracking

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
        bias = None if self.bias is None else as_bfloat16(self.bias)
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

    def stored(self, path: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what a checkpoint stores of it, by name: codes, the scales, and the bias in BF16.

        Args:
            path: of the linear.
            state: the student's values.
        """
        scales, scale = state[f"{path}.block_scales"].view(torch.float8_e4m3fn), state[f"{path}.global_scale"]
        bias = {f"{path}.bias": state[f"{path}.bias"].bfloat16()} if f"{path}.bias" in state else {}
        return {
            f"{path}.weight": nvfp4.pack_codes(_codes(state[f"{path}.weight"], scales, scale)),
            f"{path}.weight_scale": scales,
            f"{path}.weight_scale_2": scale,
            f"{path}.input_scale": state[f"{path}.input_scale"],
            **bias,
        }


def _codes(weight: torch.Tensor, scales: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().unflatten(-1, (-1, nvfp4.BLOCK_SIZE))
    return nvfp4.codes_under(blocks, (scales.float() * global_scale).unsqueeze(-1)).flatten(-2)


def make_student(checkpoint: Checkpoint, plain: Callable[[str], torch.Tensor], learn: Learn = "all") -> nn.Module:
    """Return a model that computes what a quantized checkpoint does, in FP32 on the CPU, and learns its NVFP4 linears.

    The parameters that learn are those that require a gradient.

    A master of a weight is the plain checkpoint's weight where that rounds to the stored code, so that what rounding
    took away is there to be learned from, and the stored value elsewhere, where a method has chosen another code or has
    changed the weight. What computes otherwise, or more, than the linears that learn stays as it is.

    Args:
        checkpoint: to start from.
        plain: name of a weight to its value in the plain checkpoint.
        learn: as the recipe has it.
    """
    model = empty_model(checkpoint).requires_grad_(False)
    value = reader(checkpoint, model, torch.float32)
    for path, linear in _learning(checkpoint, plain, learn).items():
        model.set_submodule(path, linear)
    rest = [name for name, values in model.state_dict().items() if values.is_meta]
    state = {}
    with tracking(len(rest), "loading", PATIENCE_S) as advance:
        for name in rest:
            state[name] = value(name)
            advance()
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval()


def _learning(
    checkpoint: Checkpoint, plain: Callable[[str], torch.Tensor], learn: Learn
) -> Mapping[str, StudentLinear | BranchLinear]:
    """Return the linears that learn, by path: those with a branch, or those in plain NVFP4."""
    if learn == "branch":
        return branch_linears(checkpoint)
    found = {}
    for path in checkpoint.quantized:
        if path in checkpoint.branched:
            continue
        scales = [checkpoint.tensor(f"{path}.{leaf}") for leaf in ("weight_scale", "weight_scale_2", "input_scale")]
        codes, original = nvfp4.unpack_codes(checkpoint.tensor(f"{path}.weight")), plain(f"{path}.weight").float()
        same = _codes(original, *scales[:2]) == codes
        bias = checkpoint.tensor(f"{path}.bias") if f"{path}.bias" in checkpoint.tensors else None
        found[path] = StudentLinear(torch.where(same, original, checkpoint.weight(path)), bias, *scales)
        found[path].weight.requires_grad_(learn == "all")
    return found


def student_linears(model: nn.Module) -> Iterator[tuple[str, StudentLinear | BranchLinear]]:
    """Yield the linears that learn, by path."""
    for path, module in model.named_modules():
        if isinstance(module, StudentLinear | BranchLinear):
            yield path, module


def student_tensors(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores of the linears that learn, by name: what is not among it stays as it was.

    Args:
        model: the student, for its structure.
        state: its values, which other processes may have held.
    """
    return {
        name: value for path, linear in student_linears(model) for name, value in linear.stored(path, state).items()
    }
