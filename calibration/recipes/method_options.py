"""What each method of a recipe can be told."""

from __future__ import annotations

import fnmatch
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt

from calibration.recipes.selection import Selection, Strict, listed

__all__ = [
    "METHODS",
    "PTQ",
    "QAT",
    "Learn",
    "Method",
    "ModelOpt",
    "Quality",
    "RankRule",
    "SVDQuant",
]


def _number(value: object) -> object:
    """Refuse true and false, which pydantic takes for 1 and 0, and what is not finite before bounds are looked at."""
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a finite number")
    return value


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
"""YAML takes 1e-4, without a point, for a string, so that a string that is a number counts as one."""


@functools.lru_cache
def _matching(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return what matches the paths that any of some patterns does."""
    return re.compile("|".join(map(fnmatch.translate, patterns)))


class RankRule(Selection):
    """One rank of a low-rank branch for some linears.

    Attributes:
        rank: of the branch for each of them that is in NVFP4; 0 for none.
    """

    rank: StrictInt = Field(ge=0)


class PTQ(Strict):
    """Plain post-training quantization: round to nearest under the largest magnitude."""

    name: Literal["ptq"]


Learn = Literal["all", "biases", "branch"]


class QAT(Strict):
    """Quantization-aware training by distillation from the plain model (see :mod:`calibration.methods.qat`).

    Attributes:
        start: the recipe, a preset's name or a file, whose method makes the checkpoint to start from; formats and
            attention are those of this recipe.
        learn: ``all`` of each NVFP4 linear, or its ``biases`` alone: a calibration by gradients, which leaves codes and
            scales as they are. With ``branch`` the low-rank branches, which the start has to have, and the biases.
        steps: of training.
        learning_rate: its largest.
        batch: images of a step, over all processes.
        warm_up: steps of it.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
        block_loss: weight of the blocks' mean relative error beside the velocity's mean squared error; 0 leaves it out.
        data: ``trajectories`` for states on the teacher's ways from fresh noise at random times, with the text of the
            captured calls; ``captured`` for the captured states themselves.
        visits: states of each way.
        gradient_checkpointing: compute each block again in the backward pass, to save memory.
        seed: of the data.
    """

    name: Literal["qat"]
    start: str = "nvfp4-quality"
    learn: Learn = "all"
    steps: StrictInt = Field(gt=0)
    learning_rate: Number = Field(gt=0)
    batch: StrictInt = Field(default=64, gt=0)
    warm_up: StrictInt = Field(default=20, ge=0)
    weight_decay: Number = Field(default=0.0, ge=0)
    clip: Number = Field(default=1.0, gt=0)
    block_loss: Number = Field(default=0.0, ge=0)
    data: Literal["trajectories", "captured"] = "trajectories"
    visits: StrictInt = Field(default=10, gt=0)
    gradient_checkpointing: StrictBool = False
    seed: StrictInt = Field(default=0, ge=0)


class Quality(Strict):
    """Folds, GPTQ with a search of the block scales, coordinate descent, bias correction: no cost at run time.

    Attributes:
        shift_fold: take the mean of every channel out of the inputs behind adaptive norms.
        smooth_fold: scale channels there so that weights and inputs share the burden.
        gptq: round with feedback and a search of the block scales.
        descent_sweeps: of coordinate descent afterwards, at most; 0 for none.
        wiener: how far a weight moves, before it is rounded, to the one that makes the best of an input rounded to FP4:
            0 not at all, 1 all the way (see :mod:`calibration.methods.quality.wiener`).
        bias_correction: let the biases take up what the mean of the output has lost.
        sequential: quantize each group of linears for what the quantized ones before it in its block give; one run over
            the calibration data for every group, in place of one for all.
        damping: of the second moments' diagonal, relative to its mean.
        input_headroom: factor on the largest magnitude that was seen of an input.
        rows_per_call: tokens of every captured call that second moments are taken of, at most.
        rank: of a low-rank branch in BF16 for each linear, as SVDQuant has it; linears that read the same input pool
            theirs. 0 for none: a branch costs two small kernels for each group.
        ranks: other ranks for some linears; at most one rule may match a linear.
        rank_multiple: round the rank of a group up to a multiple of this, such as 32 for kernels that ask for it.
    """

    name: Literal["quality"]
    shift_fold: StrictBool = True
    smooth_fold: StrictBool = True
    gptq: StrictBool = True
    descent_sweeps: StrictInt = Field(default=1, ge=0)
    wiener: Number = Field(default=0.3, ge=0, le=1)
    bias_correction: StrictBool = True
    sequential: StrictBool = True
    damping: Number = Field(default=0.01, gt=0, lt=1)
    input_headroom: Number = Field(default=1.5, ge=1, le=64)
    rows_per_call: StrictInt = Field(default=1024, ge=1)
    rank: StrictInt = Field(default=0, ge=0)
    ranks: tuple[RankRule, ...] = ()
    rank_multiple: StrictInt = Field(default=1, ge=1)

    def pooled(self, members: int, rank: int | None = None) -> int:
        """Return the rank of the branch that a group of so many linears shares, each having ``rank`` or the default."""
        own = self.rank if rank is None else rank
        return -(-own * members // self.rank_multiple) * self.rank_multiple

    def rank_of(self, path: str) -> int:
        """Return the rank that a linear brings to the branch of its group, by rules that name no blocks."""
        assert all(rule.blocks is None for rule in self.ranks), "see linear_rules.with_ranks_placed"
        named = (rule.rank for rule in self.ranks if _matching(listed(rule.linears)).match(path))
        return next(named, self.rank)

    def pooled_rank(self, group: Sequence[str]) -> int:
        """Return the rank of the branch that a group shares, by its linears' module paths; 0 without one."""
        return self.pooled(len(group), self.rank_of(group[0]))


class SVDQuant(Strict):
    """A low-rank branch in BF16, and in FP4 what it leaves of the weight.

    Source: :mod:`calibration.methods.modelopt.svdquant`.

    Attributes:
        rank: of the branch for each linear; linears that read the same input pool theirs.
        smoothing: whether the inputs, but for the modulations', are scaled by channel first, with an exponent that is
            searched for each group.
        alpha_step: of the grid of exponents from 0 to 1; the smaller, the longer the search.
    """

    name: Literal["svdquant"]
    rank: StrictInt = Field(default=32, ge=1)
    smoothing: StrictBool = True
    alpha_step: Number = Field(default=0.1, ge=0.01, le=1)

    def pooled(self, members: int) -> int:
        """Return the rank of the branch that a group of so many linears shares."""
        return self.rank * members

    def pooled_rank(self, group: Sequence[str]) -> int:
        """Return the rank of the branch that a group shares, by its linears' module paths."""
        return self.pooled(len(group))


class ModelOpt(Strict):
    """One of ModelOpt's own calibrations, by its name there (see :mod:`calibration.methods.modelopt.algorithms`).

    Attributes:
        algorithm: ``max`` rounds to nearest under each block's largest magnitude; ``mse`` searches a factor on that,
            ``fp8_scale_sweep`` all 126 block scales, ``four_over_six`` between 6 and 4 as a block's largest code, each
            for the nearest weights; ``local_hessian`` sweeps for the nearest output of each block of 16; ``gptq`` keeps
            the scales and rounds with feedback; ``awq_lite`` scales the inputs by channel first, at run time too.
    """

    name: Literal["modelopt"]
    algorithm: Literal["max", "mse", "fp8_scale_sweep", "four_over_six", "local_hessian", "awq_lite", "gptq"]


METHODS: Final[Mapping[str, type[BaseModel]]] = {
    "ptq": PTQ,
    "quality": Quality,
    "svdquant": SVDQuant,
    "modelopt": ModelOpt,
    "qat": QAT,
}
"""Name of a method to its options."""

Method = Annotated[PTQ | Quality | SVDQuant | ModelOpt | QAT, Field(discriminator="name")]
