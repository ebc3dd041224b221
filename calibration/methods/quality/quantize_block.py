"""The method ``quality``: the best weights for a block that calibration data can find, at no cost at run time.

1. Folds (:mod:`calibration.methods.quality.folds`) move constants and factors of channels out of the activations.
2. With a rank, a low-rank branch in BF16 (``low_rank.py``) takes the largest directions out of the weight; what follows
   is for what it leaves.
3. Covariances of the input are shrunk where there are few rows (``shrinkage.py``). By them the weight goes a part of
   the way to the one that makes the best of a rounded input (``wiener.py``); GPTQ with a search of the block scales,
   then coordinate descent (``gptq.py``), choose codes and scales for the activations that will be there: quantized
   ones. In any other format they are rounded to nearest.
4. The bias takes up what the mean of the output has lost.

Every linear is looked at in the order of the graph, behind those that are quantized already (``sequential``), or all of
a block at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from calibration.by_block.input_statistics import Channels, Moments, observe_channels, observe_moments
from calibration.by_block.quantize_blocks import BlockResult, BlockTask
from calibration.checkpoints.quantized import BRANCH
from calibration.formats import input_quantizers, nvfp4
from calibration.formats.arithmetic import arithmetic_of
from calibration.formats.linears import branch_output
from calibration.formats.shared_scales import shared, sharing_groups
from calibration.methods.quality import gptq
from calibration.methods.quality.folds import fold_block
from calibration.methods.quality.low_rank import LowRank, importance, low_rank
from calibration.methods.quality.shrinkage import chance, shrink
from calibration.methods.quality.wiener import wiener_target
from calibration.recipes.recipe import Quality
from fp4trt.families.family import Modulated
from fp4trt.number_formats import FORMATS, NVFP4

__all__ = ["quantize_block"]

_ROWS: Final = 64
"""Rows of each call that factors are chosen by."""

_SAME: Final = 1e-6
"""Variance of an input, relative to its mean square, below which it is FP32's rounding."""

_NOTED: Final = 64
"""Rows of a weight, evenly, at most, whose error is noted: all of them would take a third of all time."""

Group = tuple[str, ...]


def quantize_block(task: BlockTask, options: Quality, modulated: Sequence[Modulated]) -> BlockResult:
    """Return a block in NVFP4, and in other formats where its linears are to be.

    Args:
        task: the block.
        options: of the recipe's method.
        modulated: the block's linears behind adaptive norms.
    """
    with torch.no_grad():
        work = _Work(task, options)
        work.fold(modulated)
        work.measure()
        for stage in work.stages():
            work.quantize(stage)
    return BlockResult(work.tensors, work.figures, work.amax)


@dataclass
class _Work:
    """One block while it is quantized; ``tensors``, ``amax`` and ``figures`` become the result."""

    task: BlockTask
    options: Quality
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    amax: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def linear(self, path: str) -> nn.Linear:
        linear = self.task.linear(path)
        assert isinstance(linear, nn.Linear)
        return linear

    def fold(self, modulated: Sequence[Modulated]) -> None:
        """Fold what the recipe wants, and keep all parameters that this may change."""
        if not (self.options.shift_fold or self.options.smooth_fold) or not modulated:
            return
        block = self.task.module
        first = {place.consumers[0]: block.get_submodule(place.consumers[0]) for place in modulated}
        with observe_channels(first, _ROWS) as seen:
            self.task.run()
        exponents = fold_block(block, modulated, seen, self.options.shift_fold, self.options.smooth_fold)
        self.figures |= {f"{self.task.path}.{path}": {"smooth_exponent": value} for path, value in exponents.items()}
        for place in modulated:
            for path in (place.modulation, *place.consumers):
                for leaf, value in block.get_submodule(path).named_parameters():
                    self.tensors[f"{self.task.path}.{path}.{leaf}"] = value

    def measure(self) -> None:
        """Measure what enters each group while nothing is quantized: its largest magnitude, and its mean.

        The mean is of the rows that moments are of, so that what a bias takes up is no difference between rows.
        """
        watched = {group[0]: self.linear(group[0]) for group in self.task.groups}
        with observe_channels(watched, 0, self.options.rows_per_call) as self.channels:
            self.task.run(watched.values())

    def stages(self) -> Iterator[tuple[Group, ...]]:
        """Yield the groups that are quantized after one run."""
        yield from ((group,) for group in self.task.groups) if self.options.sequential else (self.task.groups,)

    def quantize(self, stage: Sequence[Group]) -> None:
        """Quantize some groups for what enters them now."""
        scales = {group[0]: self.input_scale(group) for group in stage}
        quantizers = {path: _Quantizer(scale, self.task.linears[path]) for path, scale in scales.items()}
        watched = {group[0]: self.linear(group[0]) for group in stage}
        with observe_moments(watched, quantizers, self.options.rows_per_call, self.options.wiener > 0) as found:
            self.task.run(watched.values())
        for group in stage:
            chosen = self.task.linears[group[0]] == NVFP4.name
            quantize = self.quantize_group if chosen else self.round_group
            quantize(group, found.pop(group[0]), scales[group[0]])

    def input_scale(self, group: Group) -> torch.Tensor:
        """Return the scale of a group's input, in NVFP4 the global one, with the headroom that the recipe wants."""
        kind = self.task.linears[group[0]]
        if not FORMATS[kind].needs_input_amax:
            return arithmetic_of(kind).tensor_scale(1.0)
        amax = float(self.channels[group[0]].amax.max())
        amax = input_quantizers.checked({group[0]: amax * self.options.input_headroom}, group[:1])[group[0]]
        self.amax |= {f"{path}.input_quantizer": amax for path in group}
        return arithmetic_of(kind).tensor_scale(amax)

    def quantize_group(self, group: Group, moments: Moments, input_scale: torch.Tensor) -> None:
        """Quantize linears to NVFP4 that share their scales."""
        weights = [self.linear(path).weight.float() for path in group]
        whole, sizes = torch.cat(weights), [len(weight) for weight in weights]
        del weights
        # Without a bias that is corrected nothing makes up for a mean.
        centred = self.options.bias_correction and all(self.linear(path).bias is not None for path in group)
        (power, noise), rank = moments.power_and_noise(centred), self.options.pooled_rank(group)
        branches = self.branches(group, whole, sizes, importance(noise, power)) if rank else {}
        wanted = whole.clone()
        for branch, rows in zip(branches.values(), wanted.split(sizes), strict=False):
            rows.sub_(branch.product())
        square = float(moments.product.diagonal().mean()) / moments.count
        covariance = moments.into_covariance()
        few = chance(covariance, moments.count)
        shrink(covariance, few)
        if not centred:
            covariance.addr_(*moments.means())
        variance = float(covariance.diagonal().mean())
        varies = variance > _SAME * square
        if not varies:  # one row alone, which the bias takes care of: all channels count alike then
            covariance.zero_()
        damping = self.options.damping * variance if varies else 1.0
        covariance.diagonal().add_(damping)
        root = gptq.root(covariance)
        if self.options.wiener and varies:
            lost = shrink(moments.into_lost_covariance(), few)
            if not centred:
                lost.addr_(*moments.lost_means())
            wanted = wiener_target(wanted, lost, noise, root, damping, self.options.wiener)
        own = {path: float(part.abs().max()) for path, part in zip(group, wanted.split(sizes), strict=True)}
        amax = max(input_quantizers.checked_weights(own).values())
        self.amax |= {f"{path}.weight_quantizer": amax for path in group}
        scale = nvfp4.global_scale(amax).to(covariance.device)
        rounded = self.rounded(wanted, covariance, root, scale)
        codes, block_scales = rounded.stored(scale)
        parts = (whole, wanted, rounded.values, codes, block_scales)
        for path, *rows in zip(group, *(part.split(sizes) for part in parts), strict=True):
            weight, target, values, packed, scales = rows
            self.note(path, target, values, covariance, scale)
            self.tensors |= {f"{path}.weight": packed, f"{path}.weight_scale": scales, f"{path}.weight_scale_2": scale}
            self.settle(path, weight, values, group, moments, input_scale, branches.get(path))

    def branches(
        self, group: Group, together: torch.Tensor, sizes: Sequence[int], costs: torch.Tensor
    ) -> dict[str, LowRank]:
        """Return the low-rank branches of linears that read one input: they share the first factor."""
        branch = low_rank(together, costs, self.options.pooled_rank(group))
        parts = zip(group, branch.b.split(list(sizes)), strict=True)
        found = {path: LowRank(branch.a, part.contiguous()) for path, part in parts}
        for path, part in found.items():
            self.tensors |= {f"{path}.{name}": factor for name, factor in zip(BRANCH, (part.a, part.b), strict=True)}
        left = (together - branch.product()).norm() / together.norm()
        self.figures |= {path: {**self.figures.get(path, {}), "residual": float(left)} for path in group}
        return found

    def round_group(self, group: Group, moments: Moments, input_scale: torch.Tensor) -> None:
        """Round linears that read the same input to nearest, under one scale of their weights if they have any."""
        arithmetic = arithmetic_of(self.task.linears[group[0]])
        own = input_quantizers.checked_weights({path: float(self.linear(path).weight.abs().max()) for path in group})
        for path, amax in (own | shared(own, sharing_groups([group], self.task.linears))).items():
            weight = self.linear(path).weight.float()
            self.amax[f"{path}.weight_quantizer"] = amax
            stored = arithmetic.stored(weight, arithmetic.tensor_scale(amax).to(weight.device))
            self.tensors |= {f"{path}.{leaf}": value for leaf, value in stored.items()}
            self.settle(path, weight, arithmetic.restored(stored), group, moments, input_scale)

    def settle(
        self,
        path: str,
        weight: torch.Tensor,
        values: torch.Tensor,
        group: Group,
        moments: Moments,
        input_scale: torch.Tensor,
        branch: LowRank | None = None,
    ) -> None:
        """Let a linear compute with its rounded weight on its rounded input, for those behind it; correct its bias."""
        linear = self.linear(path)
        if FORMATS[self.task.linears[path]].needs_input_amax:
            self.tensors[f"{path}.input_scale"] = input_scale
        if self.options.bias_correction and linear.bias is not None:
            lost = weight @ self.channels[group[0]].mean - values @ (moments.rounded / moments.count)
            if branch is not None:
                lost -= branch.product() @ (moments.total / moments.count)
            linear.bias.copy_(linear.bias.float() + lost)
            self.tensors[f"{path}.bias"] = linear.bias
        linear.weight.copy_(values)
        if branch is not None:  # which reads the input before it is rounded, so that its hook comes first
            beside = _Beside(branch)
            linear.register_forward_pre_hook(beside.read)
            linear.register_forward_hook(beside.add)
        linear.register_forward_pre_hook(_Quantizer(input_scale.to(values.device), self.task.linears[path]).hook)

    def rounded(
        self, weight: torch.Tensor, moments: torch.Tensor, root: gptq.Root, scale: torch.Tensor
    ) -> gptq.Rounded:
        rounded = gptq.round_with_feedback(weight, root, scale) if self.options.gptq else gptq.plain(weight, scale)
        if self.options.descent_sweeps:
            rounded = gptq.descend(weight, moments, scale, rounded, self.options.descent_sweeps)
        return rounded

    def note(
        self, path: str, weight: torch.Tensor, values: torch.Tensor, moments: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Note by how much rounding makes the output wrong, relative to itself, and plain rounding would."""
        some = slice(None, None, -(-len(weight) // _NOTED))
        wanted, found, plain = weight[some], values[some], gptq.plain(weight[some], scale).values
        power = gptq.error(torch.zeros_like(wanted), wanted, moments)
        figures = {
            "error": _relative(gptq.error(found, wanted, moments), power),
            "plain_error": _relative(gptq.error(plain, wanted, moments), power),
            "changed": float((found != plain).float().mean()),
        }
        self.figures[path] = {**self.figures.get(path, {}), **figures}


def _relative(error: float, power: float) -> float:
    """Return the root of their ratio, 0 where rows of zeros have no power."""
    return max(error / power, 0.0) ** 0.5 if power > 0 else 0.0


@dataclass(frozen=True)
class _Quantizer:
    """Rounds an input to a format, under its scale (in NVFP4 the global one)."""

    scale: torch.Tensor
    format: str

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return arithmetic_of(self.format).fake_quantize(x, self.scale.to(x.device))

    def hook(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Round what enters a linear that is quantized already."""
        return (self(args[0]),)


class _Beside:
    """Adds a linear's branch to its output, as :class:`calibration.formats.linears.QuantizedLinear` does."""

    def __init__(self, branch: LowRank) -> None:
        self._branch, self._entered = branch, torch.empty(0)

    def read(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep what enters the linear."""
        self._entered = args[0]

    def add(self, _: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the output with what the branch gives."""
        a, b = (factor.to(self._entered.dtype) for factor in (self._branch.a, self._branch.b))
        return output + branch_output(self._entered, a, b)
