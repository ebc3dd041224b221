"""From a recipe's method to the function that quantizes a block, and to what that adds to a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from calibration.by_block.quantize_blocks import BlockResult, BlockTask, Method
from calibration.formats import input_quantizers
from calibration.methods.quality import quantize_block
from calibration.recipes.branches import added_tensors, largest_rank, require_fit
from calibration.recipes.recipe import PTQ, ModelOpt, Quality, SVDQuant, adds_branch, quantizes_by_block
from calibration.recipes.recipe import Method as Options
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.number_formats import FORMATS

__all__ = [
    "added_tensors",
    "adds_branch",
    "branched",
    "changes_plain_linears",
    "largest_rank",
    "memory_of_block",
    "needs_activations",
    "of_block",
    "quantizes_by_block",
    "require_fit",
]

_LIBRARIES: Final = 600_000_000
"""Bytes that a process takes before it has read any weight, about."""


def needs_activations(options: Options) -> bool:
    """Whether a method runs the model on captured inputs, or does with the amax values of the linears' inputs."""
    return not isinstance(options, PTQ)


def changes_plain_linears(options: Options) -> bool:
    """Whether a method changes linears that stay in 16 bit too, as folds do."""
    return isinstance(options, Quality) and (options.shift_fold or options.smooth_fold)


def branched(options: Options, groups: Iterable[Sequence[str]]) -> bool:
    """Whether any of some groups of linears in NVFP4, by their module paths, gets a branch."""
    return isinstance(options, Quality | SVDQuant) and any(options.pooled_rank(group) for group in groups)


def memory_of_block(
    options: Options, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]], blocks: Sequence[str]
) -> int:
    """Return about how many bytes a process takes that quantizes the largest of some blocks.

    Args:
        options: of the recipe.
        groups: module paths of the quantized linears that read the same input.
        shapes: of the weights of linears, [N, K].
        blocks: module paths.
    """

    def weights(paths: Iterable[str]) -> int:
        return sum(shapes[path][0] * shapes[path][1] for path in paths)

    largest = max(weights(path for path in shapes if path.startswith(f"{block}.")) for block in blocks)
    inside = [group for group in groups if group[0].startswith(tuple(f"{block}." for block in blocks))]
    widest = max((shapes[group[0]][1] for group in inside), default=0)
    if isinstance(options, SVDQuant):
        return _LIBRARIES + 10 * largest
    if isinstance(options, ModelOpt):
        return _LIBRARIES + 4 * largest + 32 * max(map(weights, inside), default=0) + 8 * widest**2
    return _LIBRARIES + 4 * largest + 24 * max(map(weights, inside), default=0) + 24 * widest**2


def of_block(options: Options, family: Family, config: Config) -> Method:
    """Return what quantizes a block of a model of a family, here or in another process."""
    return functools.partial(_quantize, options, family, config)


def _quantize(options: Options, family: Family, config: Config, task: BlockTask) -> BlockResult:
    match options:
        case PTQ():
            return _measure(task)
        case Quality():
            return quantize_block.quantize_block(task, options, family.modulated(config, task.path))
        case SVDQuant():
            from calibration.methods.modelopt.svdquant import svdquant

            return svdquant(options.rank, options.smoothing, options.alpha_step, family.rows)(task)
        case ModelOpt():
            from calibration.methods.modelopt.algorithms import calibrated

            return calibrated(options.algorithm, family.rows)(task)
    raise AssertionError(f"no function of a block for {options.name}")


def _measure(task: BlockTask) -> BlockResult:
    """Measure what enters the linears, and leave it to others to round them to nearest."""
    inner = {task.inside(path): path for path in task.linears}
    if not inner:
        task.run()
    measured = input_quantizers.measure_input_amax(task.module, list(inner), task.run) if inner else {}
    scaled = [path for path, kind in task.linears.items() if FORMATS[kind].needs_input_amax]
    amax = input_quantizers.checked({inner[name]: value for name, value in measured.items()}, scaled)
    return BlockResult({}, amax={f"{path}.input_quantizer": value for path, value in amax.items()})
