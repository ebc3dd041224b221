"""SVDQuant by ModelOpt: the large singular directions of a smoothed weight in 16 bit, what they leave in NVFP4.

Source: Li et al., SVDQuant (arXiv:2411.05007), in the form that ``modelopt.torch.quantization`` 0.47 has it: AWQ-lite
chooses the smoothing, for each linear one exponent alpha out of a grid; then the smoothed weight is split by its
truncated singular value decomposition. Linears that read the same input are calibrated as the one linear that TensorRT
runs them as (``fused_linears.py``), so that they share smoothing, scales and the first low-rank factor.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from calibration import fp8, nvfp4, ptq
from calibration.checkpoint import BRANCH, SMOOTHING
from calibration.errors import BadRecipe
from calibration.fused_linears import Fused, fuse
from calibration.preparation import BlockResult, BlockTask, Method

__all__ = ["require_rank", "svdquant"]


def require_rank(rank: int, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a rank that a group of linears does not have.

    Args:
        rank: for each linear of a group.
        groups: module paths of the linears that read the same input.
        shapes: of their weights, [N, K].

    Raises:
        BadRecipe: naming the first.
    """
    for group in groups:
        rows, columns = sum(shapes[path][0] for path in group), shapes[group[0]][1]
        if rank * len(group) > min(rows, columns):
            together = "" if len(group) == 1 else f" with the {len(group) - 1} that read the same input"
            raise BadRecipe(
                f"method.rank is {rank}, and {group[0]}{together} is a matrix of {rows} x {columns}; "
                f"expected at most {min(rows, columns) // len(group)}"
            )


def svdquant(rank: int, smoothing: bool, alpha_step: float, rows: Callable[[str], int]) -> Method:
    """Return what quantizes a block with SVDQuant.

    Args:
        rank: of the low-rank branch for each linear; linears that read the same input pool theirs.
        smoothing: scale the inputs by channel first, except where a picture has but one row: TensorRT then quantizes
            once what the modulations of all blocks read, and nothing is lost (measured).
        alpha_step: of the grid of exponents from 0 to 1 that the smoothing is chosen from.
        rows: (module path) to how many rows a picture's input of that linear has.
    """

    def quantize(task: BlockTask) -> BlockResult:
        tensors: dict[str, torch.Tensor] = {}
        figures = {}
        in_fp8 = [path for path, kind in task.linears.items() if kind == "fp8"]
        groups = [group for group in task.groups if group[0] not in in_fp8]
        inner = {path: path.removeprefix(f"{task.path}.") for path in task.linears}
        with torch.no_grad():
            wholes = [fuse(task.module, [inner[path] for path in group]) for group in groups]
            paths = [whole.path for whole in wholes]
            _prepare(task.module, {**dict.fromkeys(paths, "nvfp4"), **{inner[path]: "fp8" for path in in_fp8}})
            smoothed = [whole.path for whole, group in zip(wholes, groups, strict=True) if rows(group[0]) > 1]
            if smoothing and smoothed:
                _smooth(task, smoothed, alpha_step)
            for group, path in zip(groups, paths, strict=True):
                _split(task.module.get_submodule(path), rank * len(group))
            _measure(task)
            for group, whole in zip(groups, wholes, strict=True):
                linear = task.module.get_submodule(whole.path)
                tensors |= _tensors(linear, group, whole)
                figures[group[0]] = _figures(linear)
            for path in in_fp8:
                tensors |= _fp8_tensors(task.linear(path), path)
        return BlockResult(tensors, {"svdquant": figures})

    return quantize


# ModelOpt's own ``svdquant`` does the next four in one, with one rank for all linears and a fixed grid.


def _prepare(block: nn.Module, formats: Mapping[str, str]) -> None:
    """Give the linears of a block ModelOpt's quantizers of their formats, and room for a low-rank branch."""
    from calibration.modelopt_backend import FP8, NVFP4, make_room_for_branches, mtq

    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for path, kind in formats.items():
        names = (f"{path}.{quantizer}_quantizer" for quantizer in ("input", "weight"))
        attributes = NVFP4 if kind == "nvfp4" else FP8
        entries += [{"quantizer_name": name, "cfg": attributes, "enable": True} for name in names]
    with contextlib.redirect_stdout(io.StringIO()):  # it tells what it is at
        mtq.quantize(block, {"quant_cfg": entries, "algorithm": None})
        make_room_for_branches(block)


def _smooth(task: BlockTask, paths: Sequence[str], alpha_step: float) -> None:
    """Let AWQ-lite choose the smoothing of some of the quantized linears, and scale their weights for it."""
    from calibration.modelopt_backend import model_calib

    found: dict[str, Any] = {n: module for n, module in task.module.named_modules() if n.endswith("_quantizer")}
    others = [module for n, module in found.items() if n.rpartition(".")[0] not in paths and module.is_enabled]
    for quantizer in others:
        quantizer.disable()
    with contextlib.redirect_stdout(io.StringIO()):
        model_calib.awq(task.module, lambda _: task.run(), "awq_lite", alpha_step=alpha_step)
    for quantizer in others:
        quantizer.enable()


def _split(linear: Any, rank: int) -> None:
    """Take the largest singular directions of a smoothed weight out of it, into its branch."""
    from calibration.modelopt_backend import model_calib

    b, a = model_calib.svd(linear.weight.data, rank)
    linear.weight_quantizer.svdquant_lora_a, linear.weight_quantizer.svdquant_lora_b = a, b
    linear.weight.data.sub_(b @ a)
    linear.weight_quantizer.reset_amax()
    linear.input_quantizer.reset_amax()


def _measure(task: BlockTask) -> None:
    """Measure the maxima of what is left of the weights, and of the smoothed inputs."""
    from calibration.modelopt_backend import model_calib

    model_calib.max_calibrate(task.module, lambda _: task.run())


def _fp8_tensors(linear: Any, path: str) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a linear in FP8, that ModelOpt has calibrated.

    Raises:
        BadAmax: as :func:`_tensors`.
    """
    weight, entering = _maxima(linear, path)
    scale = fp8.tensor_scale(weight)
    return {
        f"{path}.weight": fp8.quantize(linear.weight, scale),
        f"{path}.weight_scale": scale,
        f"{path}.input_scale": fp8.tensor_scale(entering),
    }


def _maxima(linear: Any, path: str) -> tuple[float, float]:
    """Return the maxima of a linear's weight and of its input, checked."""
    amax = (linear.weight_quantizer.amax, linear.input_quantizer.amax)
    weight, entering = (math.nan if value is None else float(value) for value in amax)
    ptq.checked({path: entering}, [path])
    ptq.checked_weights({path: weight})
    return weight, entering


def _tensors(linear: Any, group: Sequence[str], whole: Fused) -> dict[str, torch.Tensor]:
    """Return what a checkpoint holds of a group, whose linear ModelOpt has calibrated.

    Nothing is computed anew: the scales are the quantizers', and the codes those of the residual under them.

    Raises:
        BadAmax: nothing entered the linear, or nothing finite; or its weight has no scale.
    """
    weight, entering = _maxima(linear, group[0])
    scales = {"weight_scale_2": weight, "input_scale": entering}
    shared = {kind: nvfp4.global_scale(value).to(linear.weight.device) for kind, value in scales.items()}
    codes, block_scales = nvfp4.quantize(linear.weight, shared["weight_scale_2"])
    shared[BRANCH[0]] = linear.weight_quantizer.svdquant_lora_a
    if linear.input_quantizer.pre_quant_scale is not None:
        shared[SMOOTHING] = linear.input_quantizer.pre_quant_scale.reshape(-1)
    of_rows = {
        "weight": nvfp4.pack_codes(codes),
        "weight_scale": block_scales,
        BRANCH[1]: linear.weight_quantizer.svdquant_lora_b,
    }
    parts = {kind: value.split(list(whole.rows)) for kind, value in of_rows.items()}
    return {
        f"{path}.{kind}": value.contiguous()
        for index, path in enumerate(group)
        for kind, value in {**shared, **{kind: part[index] for kind, part in parts.items()}}.items()
    }


def _figures(linear: Any) -> dict[str, float]:
    """Return, as shares of the smoothed weight's L2 norm, what the branch leaves, and what quantizing that costs."""
    quantizer, residual = linear.weight_quantizer, linear.weight.float()
    whole = residual + quantizer.svdquant_lora_b.float() @ quantizer.svdquant_lora_a.float()
    error = quantizer(linear.weight).float() - residual
    return {"residual": float(residual.norm() / whole.norm()), "weight_error": float(error.norm() / whole.norm())}
