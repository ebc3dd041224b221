"""From a recipe's method to the function that quantizes a block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calibration.by_block.quantize_blocks import Method
from calibration.methods.quality import quantize_block
from calibration.recipes.recipe import PTQ, ModelOpt, Quality, SVDQuant
from calibration.recipes.recipe import Method as Options
from fp4trt.families import Family

__all__ = ["changes_plain_linears", "needs_activations", "of_block", "require_fit"]


def needs_activations(options: Options) -> bool:
    """Whether a method runs the model on captured inputs, or does with the maxima of the linears' inputs."""
    return not isinstance(options, PTQ)


def changes_plain_linears(options: Options) -> bool:
    """Whether a method changes linears that stay in 16 bit too, as folds do."""
    return isinstance(options, Quality) and (options.shift_fold or options.smooth_fold)


def require_fit(options: Options, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse options that linears of these shapes cannot have.

    Raises:
        BadRecipe: naming the linear.
    """
    if isinstance(options, SVDQuant):
        from calibration.methods.modelopt.svdquant import require_rank

        require_rank(options.rank, groups, shapes)


def of_block(options: Options, family: Family) -> Method:
    """Return what quantizes a block of a family's models by a method that needs activations."""
    match options:
        case Quality():
            return lambda task: quantize_block.quantize_block(task, options, family.modulated(task.path))
        case SVDQuant():
            from calibration.methods.modelopt.svdquant import svdquant

            return svdquant(options.rank, options.smoothing, options.alpha_step, family.rows)
        case ModelOpt():
            from calibration.methods.modelopt.algorithms import calibrated

            return calibrated(options.algorithm, family.rows)
    raise AssertionError(f"no function of a block for {options.name}")
