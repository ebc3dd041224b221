"""The method ``quality``: the best weights for a block that calibration data can find, at no cost at run time.

1. Folds (:mod:`calibration.methods.quality.folds`) move constants and factors of channels out of the activations.
2. With a rank, a low-rank branch in BF16 (``low_rank.py``) takes the largest directions out of the weight; what follows
   is for what it leaves.
3. The weight goes a part of the way to the one that makes the best of a rounded input (``wiener.py``); GPTQ with a
   search of the block scales, then coordinate descent (``gptq.py``), choose codes and scales for the activations that
   will be there: quantized ones. In any other format they are rounded to nearest.
4. The bias takes up what the mean of the output has lost.

Every linear is looked at in the order of the graph, behind those that are quantized already (``sequential``), or all of
a block at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from calibration.methods.quality import gptq
from calibration.methods.quality.folds import fold_block
from calibration.methods.quality.low_rank import LowRank, importance, low_rank
from calibration.methods.quality.wiener import correlate, wiener_target
from calibration.recipes.recipe import Quality
from fp4trt.families.family import Modulated
from fp4trt.number_formats import FORMATS, NVFP4

__all__ = ["quantize_block"]

_ROWS: Final = 64
"""Rows of each call that factors are chosen by."""

_NOTED: Final = 1024
"""Rows of a weight, evenly, whose error is noted: more would take a third of all time where K is large."""

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
        """Measure what enters each group while nothing is quantized: its largest magnitude, and its mean."""
        watched = {group[0]: self.linear(group[0]) for group in self.task.groups}
        with observe_channels(watched, 0) as self.channels:
            self.task.run(watched.values())

    def stages(self) -> Iterator[tuple[Group, ...]]:
        """Yield the groups that are quantized after one run."""
        yield from ((group,) for group in self.task.groups) if self.options.sequential else (self.task.groups,)

    def quantize(self, stage: Sequence[Group]) -> None:
        """Quantize some groups for what enters them now."""
        scales = {group[0]: self.input_scale(group) for group in stage}
        quantizers = {path: _Quantizer(scale, self.task.linears[path]) for path, scale in scales.items()}
        watched = {group[0]: self.linear(group[0]) for group in stage}
        with_cross = self.options.wiener > 0 or self.options.rank > 0
        with observe_moments(watched, quantizers, self.options.rows_per_call, with_cross) as found:
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
        whole = {path: self.linear(path).weight.float() for path in group}
        # A linear without a bias has nothing else that could make up for the mean.
        centred = all(self.linear(path).bias is not None for path in group)
        branches = self.branches(whole, moments, centred) if self.options.rank else {}
        weights = {path: weight - branches[path].product() for path, weight in whole.items()} if branches else whole
        wanted = {}
        if self.options.wiener:
            plain = moments.into_plain_covariances(centred)
            wanted = {path: correlate(weight, *plain) for path, weight in weights.items()}
            del plain
        moments.forget_plain()
        covariance = moments.into_covariance(centred)
        covariance.diagonal().add_(self.options.damping * covariance.diagonal().mean())
        feedback = gptq.inverse_root(covariance)
        targets = {
            path: wiener_target(weight, wanted[path], feedback, self.options.wiener) if wanted else weight
            for path, weight in weights.items()
        }
        own = {path: float(target.abs().max()) for path, target in targets.items()}
        amax = max(input_quantizers.checked_weights(own).values())
        self.amax |= {f"{path}.weight_quantizer": amax for path in group}
        scale = nvfp4.global_scale(amax).to(covariance.device)
        for path, weight in whole.items():
            rounded = self.rounded(targets[path], covariance, feedback, scale)
            self.note(path, targets[path], rounded, covariance, scale)
            codes, block_scales = rounded.stored(scale)
            self.tensors[f"{path}.weight"], self.tensors[f"{path}.weight_scale"] = codes, block_scales
            self.tensors[f"{path}.weight_scale_2"] = scale
            self.settle(path, weight, rounded.values, group, moments, input_scale, branches.get(path))

    def branches(self, weights: Mapping[str, torch.Tensor], moments: Moments, centred: bool) -> dict[str, LowRank]:
        """Return the low-rank branches of linears that read one input: they share the first factor."""
        together = torch.cat(list(weights.values()))
        branch = low_rank(together, importance(*moments.rounding_noise(centred)), self.options.pooled(len(weights)))
        parts = branch.b.split([len(weight) for weight in weights.values()])
        found = {path: LowRank(branch.a, part.contiguous()) for path, part in zip(weights, parts, strict=True)}
        for path, part in found.items():
            self.tensors |= {f"{path}.{name}": factor for name, factor in zip(BRANCH, (part.a, part.b), strict=True)}
        left = (together - branch.product()).norm() / together.norm()
        self.figures |= {path: {**self.figures.get(path, {}), "residual": float(left)} for path in weights}
        return found

    def round_group(self, group: Group, moments: Moments, input_scale: torch.Tensor) -> None:
        """Round linears that read the same input to nearest, each under a scale of its own."""
        arithmetic = arithmetic_of(self.task.linears[group[0]])
        for path in group:
            weight = self.linear(path).weight.float()
            amax = input_quantizers.checked_weights({path: float(weight.abs().max())})[path]
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
            mean = self.channels[group[0]].mean
            lost = weight @ mean - values @ (moments.rounded / moments.count)
            if branch is not None:
                lost -= branch.product() @ mean
            linear.bias.copy_(linear.bias.float() + lost)
            self.tensors[f"{path}.bias"] = linear.bias
        linear.weight.copy_(values)
        if branch is not None:  # which reads the input before it is rounded, so that its hook comes first
            beside = _Beside(branch)
            linear.register_forward_pre_hook(beside.read)
            linear.register_forward_hook(beside.add)
        linear.register_forward_pre_hook(_Quantizer(input_scale.to(values.device), self.task.linears[path]).hook)

    def rounded(
        self, weight: torch.Tensor, moments: torch.Tensor, feedback: torch.Tensor, scale: torch.Tensor
    ) -> gptq.Rounded:
        rounded = gptq.round_with_feedback(weight, feedback, scale) if self.options.gptq else gptq.plain(weight, scale)
        if self.options.descent_sweeps:
            rounded = gptq.descend(weight, moments, scale, rounded, self.options.descent_sweeps)
        return rounded

    def note(
        self, path: str, weight: torch.Tensor, rounded: gptq.Rounded, moments: torch.Tensor, scale: torch.Tensor
    ) -> None:
        """Note by how much rounding makes the output wrong, relative to itself, and plain rounding would."""
        plain = gptq.plain(weight, scale).values
        changed = float((rounded.values != plain).float().mean())
        wanted, found, plain = (each[:: max(1, len(weight) // _NOTED)] for each in (weight, rounded.values, plain))
        power = gptq.error(torch.zeros_like(wanted), wanted, moments)
        figures = {
            "error": (gptq.error(found, wanted, moments) / power) ** 0.5,
            "plain_error": (gptq.error(plain, wanted, moments) / power) ** 0.5,
            "changed": changed,
        }
        self.figures[path] = {**self.figures.get(path, {}), **figures}


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
