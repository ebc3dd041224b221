"""The linears of a block with ModelOpt's quantizers: put them in, let them measure, and store what they hold.

Linears that read the same input are one linear here (``fused_linears.py``), so that they share all their scales.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calibration.by_block.quantize_blocks import BlockTask
from calibration.checkpoints.quantized import BRANCH, SMOOTHING
from calibration.formats import input_quantizers, nvfp4
from calibration.formats.arithmetic import arithmetic_of
from calibration.formats.shared_scales import shared, sharing_groups
from calibration.methods.modelopt.fused_linears import Fused, fuse
from fp4trt.number_formats import FORMATS, NVFP4

__all__ = [
    "FusedBlock",
    "fuse_block",
    "measure",
    "nvfp4_tensors",
    "only",
    "quantizer_amax",
    "quiet",
    "rounded_tensors",
    "smooth",
    "weight_scales",
]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what ModelOpt tells of its steps, and its progress bars, which would break ours."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@dataclass(frozen=True)
class FusedBlock:
    """The linears of a block as ModelOpt calibrates them: those in NVFP4 that read one input as one.

    Attributes:
        task: the block.
        groups: module paths of the linears in NVFP4 that read one input, and the linear that they have become.
        rounded: module path to format of the others, which are rounded to nearest.
    """

    task: BlockTask
    groups: tuple[tuple[tuple[str, ...], Fused], ...]
    rounded: Mapping[str, str]

    @property
    def paths(self) -> list[str]:
        """The linears in NVFP4, by their paths in the block."""
        return [whole.path for _, whole in self.groups]

    def insert_quantizers(self, weights: Mapping[str, Any]) -> None:
        """Give the linears ModelOpt's quantizers.

        Args:
            weights: attributes of those for the weights in NVFP4.
        """
        from calibration.formats.modelopt_backend import mtq

        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        rounded = {self.task.inside(path): kind for path, kind in self.rounded.items()}
        for path, kind in {**dict.fromkeys(self.paths, NVFP4.name), **rounded}.items():
            attributes = FORMATS[kind].modelopt["quantizer"]
            entries += [
                {"quantizer_name": f"{path}.{operand}_quantizer", "cfg": dict(chosen), "enable": True}
                for operand, chosen in (
                    ("input", attributes),
                    ("weight", weights if kind == NVFP4.name else attributes),
                )
            ]
        with quiet():
            mtq.quantize(self.task.module, {"quant_cfg": entries, "algorithm": None})

    def stored(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return what a checkpoint holds of the calibrated linears, and the amax of their quantizers.

        Raises:
            BadAmax: as :func:`nvfp4_tensors`.
        """
        tensors: dict[str, torch.Tensor] = {}
        amax: dict[str, float] = {}
        for group, whole in self.groups:
            linear = self.task.module.get_submodule(whole.path)
            tensors |= nvfp4_tensors(linear, group, whole)
            amax |= quantizer_amax(linear, group, NVFP4.name)
        self._share_weight_scales()
        for path, kind in self.rounded.items():
            linear = self.task.linear(path)
            tensors |= rounded_tensors(linear, path, kind)
            amax |= quantizer_amax(linear, [path], kind)
        return tensors, amax

    def _share_weight_scales(self) -> None:
        """Give the quantizers of weights that are to share a scale the largest amax of their group."""
        kinds = self.rounded
        linears: dict[str, Any] = {path: self.task.linear(path) for path in kinds}
        own = {path: _checked_amax(linears[path], path, kind)["weight_quantizer"] for path, kind in kinds.items()}
        groups = sharing_groups((group for group in self.task.groups if group[0] in kinds), kinds)
        for path, amax in shared(own, groups).items():
            linears[path].weight_quantizer.amax = amax


def fuse_block(task: BlockTask) -> FusedBlock:
    """Replace the linears of each group in NVFP4 by parts of one, in place."""
    rounded = {path: kind for path, kind in task.linears.items() if kind != NVFP4.name}
    groups = [group for group in task.groups if group[0] not in rounded]
    wholes = [fuse(task.module, [task.inside(path) for path in group]) for group in groups]
    return FusedBlock(task, tuple(zip(groups, wholes, strict=True)), rounded)


@contextlib.contextmanager
def only(block: nn.Module, paths: Collection[str]) -> Iterator[None]:
    """Switch off the quantizers of all linears of a block but some, until the end of the ``with`` statement."""
    found: dict[str, Any] = {name: module for name, module in block.named_modules() if name.endswith("_quantizer")}
    others = [module for name, module in found.items() if name.rpartition(".")[0] not in paths and module.is_enabled]
    for quantizer in others:
        quantizer.disable()
    try:
        yield
    finally:
        for quantizer in others:
            quantizer.enable()


def measure(task: BlockTask) -> None:
    """Measure the amax values of the weights and inputs of all linears whose quantizers are switched on."""
    from calibration.formats.modelopt_backend import model_calib

    model_calib.max_calibrate(task.module, lambda _: task.run())


def smooth(task: BlockTask, paths: Collection[str], alpha_step: float) -> None:
    """Let AWQ-lite choose the smoothing of some of the quantized linears, and scale their weights for it."""
    from calibration.formats.modelopt_backend import model_calib

    with only(task.module, paths), quiet():
        model_calib.awq(task.module, lambda _: task.run(), "awq_lite", alpha_step=alpha_step)


def weight_scales(linear: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the weight quantizer of a calibrated linear scales by: E4M3 [N, K/16], and the FP32 global scale.

    A static quantizer keeps the magnitude of each block, which an algorithm may have chosen; a dynamic one takes it
    from the weight as it finds it.
    """
    from calibration.formats.modelopt_backend import fp8_max_for_normalization

    quantizer, weight = linear.weight_quantizer, linear.weight
    shape = (len(weight), weight.shape[1] // nvfp4.BLOCK_SIZE)
    if quantizer.is_nvfp4_static:
        scale = nvfp4.global_scale(quantizer.global_amax, fp8_max_for_normalization(quantizer))
        amax = quantizer.amax.float().reshape(shape)
    else:
        scale = nvfp4.global_scale(quantizer.amax.float())
        amax = weight.float().reshape(*shape, nvfp4.BLOCK_SIZE).abs().amax(dim=-1)
    return nvfp4.block_scales(amax, scale), scale.to(weight.device)


def nvfp4_tensors(linear: Any, group: Sequence[str], whole: Fused) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a group, whose linear ModelOpt has calibrated, maybe smoothed and branched.

    Nothing is computed anew: the scales are the quantizers', and the codes those of the weight under them.

    Raises:
        BadAmax: nothing entered the linear, or nothing finite; or its weight has no scale.
    """
    entering = _checked_amax(linear, group[0], NVFP4.name)["input_quantizer"]
    block_scales, scale = weight_scales(linear)
    steps = (block_scales.float() * scale).unsqueeze(-1)
    codes = nvfp4.codes_under(linear.weight.float().unflatten(-1, (-1, nvfp4.BLOCK_SIZE)), steps).flatten(-2)
    shared = {"weight_scale_2": scale, "input_scale": nvfp4.global_scale(entering).to(scale.device)}
    of_rows = {"weight": nvfp4.pack_codes(codes), "weight_scale": block_scales}
    if (factor := getattr(linear.weight_quantizer, BRANCH[0], None)) is not None:
        shared[BRANCH[0]] = factor
        of_rows[BRANCH[1]] = getattr(linear.weight_quantizer, BRANCH[1])
    if linear.input_quantizer.pre_quant_scale is not None:
        shared[SMOOTHING] = linear.input_quantizer.pre_quant_scale.reshape(-1)
    parts = {kind: value.split(list(whole.rows)) for kind, value in of_rows.items()}
    return {
        f"{path}.{kind}": value.contiguous()
        for index, path in enumerate(group)
        for kind, value in {**shared, **{kind: part[index] for kind, part in parts.items()}}.items()
    }


def rounded_tensors(linear: Any, path: str, kind: str) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a linear rounded to nearest in a format, whose amax ModelOpt has measured.

    Raises:
        BadAmax: as :func:`nvfp4_tensors`.
    """
    amax, arithmetic = _checked_amax(linear, path, kind), arithmetic_of(kind)
    tensors = arithmetic.stored(linear.weight, arithmetic.tensor_scale(amax["weight_quantizer"]))
    if FORMATS[kind].needs_input_amax:
        tensors["input_scale"] = arithmetic.tensor_scale(amax["input_quantizer"])
    return {f"{path}.{leaf}": value for leaf, value in tensors.items()}


def quantizer_amax(linear: Any, paths: Sequence[str], kind: str) -> dict[str, float]:
    """Return the amax of a calibrated linear in a format, by the name of each quantizer in the linears it stands for.

    Raises:
        BadAmax: as :func:`nvfp4_tensors`.
    """
    found = _checked_amax(linear, paths[0], kind)
    return {f"{path}.{quantizer}": value for path in paths for quantizer, value in found.items()}


def _checked_amax(linear: Any, path: str, kind: str) -> dict[str, float]:
    """Return the amax of a linear's weight and, where the format has a scale of the input, of that, by quantizer.

    Quantizers of a format without a scale of the tensor keep no amax, and that of the weight is returned all the same.
    """
    if FORMATS[kind].amax_factor is None:
        weight = float(linear.weight.detach().float().abs().max())
    else:
        weight = _kept_amax(linear.weight_quantizer)
    found = {"weight_quantizer": input_quantizers.checked_weights({path: weight})[path]}
    if FORMATS[kind].needs_input_amax:
        entering = _kept_amax(linear.input_quantizer)
        found["input_quantizer"] = input_quantizers.checked({path: entering}, [path])[path]
    return found


def _kept_amax(quantizer: Any) -> float:
    """Return the amax of a whole tensor that a quantizer keeps, NaN for none."""
    amax = getattr(quantizer, "global_amax", None)
    amax = quantizer.amax if amax is None else amax
    return math.nan if amax is None else float(amax)
