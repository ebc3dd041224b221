"""From a recipe's method to the function that quantizes a block, and to what that adds to a checkpoint."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from calibration.by_block.quantize_blocks import BlockResult, BlockTask, Method
from calibration.checkpoints.quantized import BRANCH, SMOOTHING
from calibration.formats import input_quantizers
from calibration.methods.quality import quantize_block
from calibration.recipes.recipe import PTQ, ModelOpt, Quality, SVDQuant, adds_branch, quantizes_by_block
from calibration.recipes.recipe import Method as Options
from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.families.family import Config
from fp4trt.number_formats import FORMATS
from fp4trt.safetensors_file import TensorPlan

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


def largest_rank(group: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the largest rank that a branch of linears which read the same input can have, together."""
    return min(sum(shapes[path][0] for path in group), shapes[group[0]][1])


def require_fit(options: Options, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse options that linears of these shapes cannot have.

    Args:
        options: of the recipe.
        groups: module paths of the linears in NVFP4 that read the same input.
        shapes: of their weights, [N, K].

    Raises:
        BadRecipe: naming the first linear.
    """
    if not isinstance(options, Quality | SVDQuant):
        return
    for group in groups:
        largest = largest_rank(group, shapes)
        if options.pooled_rank(group) > largest:
            together = "" if len(group) == 1 else f" with the {len(group) - 1} that read the same input"
            multiple = options.rank_multiple if isinstance(options, Quality) else 1
            rounded = f", rounded up to a multiple of {multiple}" if multiple > 1 else ""
            rank = options.rank_of(group[0]) if isinstance(options, Quality) else options.rank
            said = f"method.rank is {rank}" if rank == options.rank else f"method.ranks says {rank}"
            rows, columns = sum(shapes[path][0] for path in group), shapes[group[0]][1]
            fitting = largest // multiple * multiple // len(group)
            raise BadRecipe(
                f"{said}{rounded}, and {group[0]}{together} is a matrix of {rows} x {columns}; "
                + (f"expected at most {fitting}" if fitting else f"expected a rank_multiple of at most {largest}")
            )


def added_tensors(
    options: Options, family: Family, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]
) -> Iterator[TensorPlan]:
    """Yield what a method gives linears beside codes, scales and bias, in the order of the file.

    Args:
        options: of the recipe.
        family: of the model.
        groups: the linears in NVFP4 of its blocks.
        shapes: of their weights, [N, K].
    """
    smooths = isinstance(options, SVDQuant) and options.smoothing
    smooths |= isinstance(options, ModelOpt) and options.algorithm == "awq_lite"
    for group in groups:
        rank = options.pooled_rank(group) if isinstance(options, Quality | SVDQuant) else 0
        for path in group:
            rows, columns = shapes[path]
            if rank:
                yield TensorPlan(f"{path}.{BRANCH[0]}", "BF16", (rank, columns))
            if smooths and family.rows(group[0]) > 1:
                yield TensorPlan(f"{path}.{SMOOTHING}", "BF16", (columns,))
            if rank:
                yield TensorPlan(f"{path}.{BRANCH[1]}", "BF16", (rows, rank))


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
