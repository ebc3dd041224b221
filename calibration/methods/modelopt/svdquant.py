"""SVDQuant by ModelOpt: the large singular directions of a smoothed weight in 16 bit, what they leave in NVFP4.

Source: Li et al., SVDQuant (arXiv:2411.05007), in the form that ``modelopt.torch.quantization`` 0.47 has it: AWQ-lite
chooses the smoothing, for each linear one exponent alpha out of a grid; then the smoothed weight is split by its
truncated singular value decomposition. Linears that read the same input are calibrated as the one linear that TensorRT
runs them as (``fused_linears.py``), so that they share smoothing, scales and the first low-rank factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from calibration.by_block.quantize_blocks import BlockResult, BlockTask, Method
from calibration.methods.modelopt.linears import fuse_block, measure, quiet, smooth
from fp4trt.number_formats import NVFP4

__all__ = ["svdquant"]


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
        from calibration.formats.modelopt_backend import make_room_for_branches

        with torch.no_grad():
            block = fuse_block(task)
            block.insert_quantizers(NVFP4.modelopt["quantizer"])
            with quiet():
                make_room_for_branches(task.module)
            smoothed = [whole.path for group, whole in block.groups if rows(group[0]) > 1]
            if smoothing and smoothed:
                smooth(task, smoothed, alpha_step)
            for group, whole in block.groups:
                _split(task.module.get_submodule(whole.path), rank * len(group))
            measure(task)
            figures = {group[0]: _figures(task.module.get_submodule(whole.path)) for group, whole in block.groups}
            tensors, amax = block.stored()
        return BlockResult(tensors, {"svdquant": figures}, amax)

    return quantize


# ModelOpt's own ``svdquant`` does all this in one, with one rank for all linears and a fixed grid.


def _split(linear: Any, rank: int) -> None:
    """Take the largest singular directions of a smoothed weight out of it, into its branch."""
    from calibration.formats.modelopt_backend import model_calib

    b, a = model_calib.svd(linear.weight.data, rank)
    linear.weight_quantizer.svdquant_lora_a, linear.weight_quantizer.svdquant_lora_b = a, b
    linear.weight.data.sub_(b @ a)
    linear.weight_quantizer.reset_amax()
    linear.input_quantizer.reset_amax()


def _figures(linear: Any) -> dict[str, float]:
    """Return, as shares of the smoothed weight's L2 norm, what the branch leaves, and what quantizing that costs."""
    quantizer, residual = linear.weight_quantizer, linear.weight.float()
    whole = residual + quantizer.svdquant_lora_b.float() @ quantizer.svdquant_lora_a.float()
    error = quantizer(linear.weight).float() - residual
    return {"residual": float(residual.norm() / whole.norm()), "weight_error": float(error.norm() / whole.norm())}
