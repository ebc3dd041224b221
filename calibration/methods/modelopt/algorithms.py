"""The method ``modelopt``: one of ModelOpt's own calibrations, block by block, stored as its quantizers hold it.

Linears that read one input are calibrated as the one linear that TensorRT runs them as (``fused_linears.py``), so that
they share their global scales. Those in another format are rounded to nearest, whatever the algorithm, in FP8 under one
scale of their weights. Source: ``modelopt.torch.quantization.model_calib`` 0.47.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from calibration.by_block.input_statistics import Channels, observe_channels
from calibration.by_block.quantize_blocks import BlockResult, BlockTask, Method
from calibration.formats import nvfp4
from calibration.methods.modelopt.linears import fuse_block, measure, only, quiet, smooth, weight_scales
from fp4trt.errors import NoEffect
from fp4trt.number_formats import NVFP4

__all__ = ["calibrated"]

_ROWS: Final = 8
"""Rows of each call that errors are measured on."""

_ALPHA_STEP: Final = 0.1
"""Step of the grid that AWQ-lite chooses from; ModelOpt's own default."""

_SEARCHES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "max": ("max_calibrate", {}),
    "mse": ("mse_calibrate", {}),
    "fp8_scale_sweep": ("mse_calibrate", {"fp8_scale_sweep": True}),
    "four_over_six": ("mse_calibrate", {"start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}),
    "local_hessian": ("local_hessian_calibrate", {}),
    "gptq": ("gptq", {}),
}
"""Algorithm to ModelOpt's function and its options; those of four-over-six are ModelOpt's ``nvfp4_four_over_six``."""


def calibrated(algorithm: str, rows: Callable[[str], int]) -> Method:
    """Return what quantizes a block by one of ModelOpt's algorithms.

    Args:
        algorithm: as a recipe names it.
        rows: (module path) to how many rows a picture's input of that linear has; AWQ leaves inputs of one row as they
            are, as SVDQuant does.
    """

    def quantize(task: BlockTask) -> BlockResult:
        with torch.no_grad():
            block = fuse_block(task)
            searched = {whole.path: group[0] for group, whole in block.groups if _applies(algorithm, rows(group[0]))}
            before = _observed(task, block.paths)
            block.insert_quantizers(_weights(algorithm))
            _calibrate(task, algorithm, block.paths, searched)
            if block.rounded:
                with only(task.module, [task.inside(path) for path in block.rounded]):
                    measure(task)
            figures = {
                group[0]: before[whole.path].figures(task.module.get_submodule(whole.path))
                for group, whole in block.groups
            }
            tensors, amax = block.stored()
        _require_effect(algorithm, task.path, [figures[path]["changed"] for path in searched.values()])
        return BlockResult(tensors, {"modelopt": figures}, amax)

    return quantize


def _weights(algorithm: str) -> Mapping[str, Any]:
    """Return the attributes of the weights' quantizers."""
    from calibration.formats.modelopt_backend import FOUR_OVER_SIX, STATIC_NVFP4

    # While AWQ-lite tries factors the weights change, and so must the scales of their blocks.
    return {"awq_lite": NVFP4.modelopt["quantizer"], "four_over_six": FOUR_OVER_SIX}.get(algorithm, STATIC_NVFP4)


def _applies(algorithm: str, rows: int) -> bool:
    """Whether an algorithm does more to a linear than round it to nearest."""
    return rows > 1 if algorithm == "awq_lite" else algorithm != "max"


def _calibrate(task: BlockTask, algorithm: str, paths: Sequence[str], searched: Collection[str]) -> None:
    """Run an algorithm on the linears in NVFP4."""
    from calibration.formats.modelopt_backend import model_calib

    with only(task.module, paths), quiet():
        if algorithm != "awq_lite":
            function, options = _SEARCHES[algorithm]
            getattr(model_calib, function)(task.module, lambda _: task.run(), **options)
            return
        if searched:
            smooth(task, searched, _ALPHA_STEP)
        measure(task)


def _require_effect(algorithm: str, block: str, changed: Sequence[float]) -> None:
    """Refuse a search that found nothing better than rounding to nearest, anywhere in a block.

    Raises:
        NoEffect: so it did nothing, as ModelOpt's do without a word on quantizers that they do not know.
    """
    if changed and not any(changed):
        version = importlib.metadata.version("nvidia-modelopt")
        raise NoEffect(
            f"ModelOpt {version}'s {algorithm} has changed no weight of {block}; expected some: take the version in "
            "constraints.txt, or another recipe"
        )


@dataclass(frozen=True)
class _Before:
    """A linear as it was, and what entered it.

    Attributes:
        weight: [N, K].
        input: of the plain model.
    """

    weight: torch.Tensor
    input: Channels

    def figures(self, linear: Any) -> dict[str, float]:
        """Return what calibration has done to the linear.

        Returns:
            ``error`` of its output on some rows, relative to the output's L2 norm; ``plain_error``, what that would be
            after rounding to nearest; ``changed``, the share of the weights that are others than rounding to nearest
            under the same global scale gives, looked at before any smoothing.
        """
        x = torch.cat(self.input.rows)
        smoothing, kind = linear.input_quantizer.pre_quant_scale, self.weight.dtype
        values, entering = linear.weight_quantizer(linear.weight).float(), linear.input_quantizer(x.to(kind)).float()
        plain = nvfp4.fake_quantize(self.weight, nvfp4.global_scale(self.weight.float().abs().max())).float()
        plain_input = nvfp4.fake_quantize(x.to(kind), nvfp4.global_scale(self.input.amax.max())).float()
        wanted = x @ self.weight.float().T
        unsmoothed = values if smoothing is None else values * smoothing.float().reshape(-1)
        same_scale = nvfp4.fake_quantize(self.weight, weight_scales(linear)[1]).float()
        return {
            "error": float((entering @ values.T - wanted).norm() / wanted.norm()),
            "plain_error": float((plain_input @ plain.T - wanted).norm() / wanted.norm()),
            "changed": float((unsmoothed != same_scale).float().mean()),
        }


def _observed(task: BlockTask, paths: Sequence[str]) -> dict[str, _Before]:
    """Run the block as it is, and return what is to be known of its linears afterwards."""
    linears: dict[str, Any] = {path: task.module.get_submodule(path) for path in paths}
    with observe_channels(linears, _ROWS) as seen:
        task.run()
    return {path: _Before(linear.weight.detach().clone(), seen[path]) for path, linear in linears.items()}
