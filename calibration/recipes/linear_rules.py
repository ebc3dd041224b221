"""Which linear gets which format and rank: a recipe's rules, held against the linears of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, StrictInt

from calibration.recipes.method_options import Quality, RankRule
from calibration.recipes.selection import Selection, Strict
from fp4trt.errors import BadRecipe, UnsupportedLinear
from fp4trt.families import Family
from fp4trt.number_formats import BF16, FORMATS, NAMES, NVFP4

__all__ = ["FormatRules", "Rule", "linear_formats", "require_whole_blocks", "with_ranks_placed"]

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[NAMES]
"""What a linear is stored and computed in."""


class Rule(Selection):
    """One format for some linears.

    Attributes:
        format: for them.
    """

    format: Format


class FormatRules(Strict):
    """Which linear gets which format.

    Attributes:
        default: of those that no rule names.
        min_size: of the linears that no rule names, leave in BF16 those with fewer in-features, out-features or rows
            (of one picture of the family's default size) than this.
        rules: at most one may match a linear.
    """

    default: Format = NVFP4.name
    min_size: StrictInt = Field(default=0, ge=0)
    rules: tuple[Rule, ...] = ()


def linear_formats(
    rules: FormatRules, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Return the format of every linear that the family can quantize, in graph order.

    Args:
        rules: of a recipe.
        family: of the model.
        config: its config.
        shapes: of the linears' weights, [out-features, in-features].

    Raises:
        BadRecipe: a rule picks nothing or more blocks than there are, two rules name one linear, a group of linears
            that one GEMM computes would get several formats, or nothing would be quantized.
    """
    paths = family.quantized(config)
    chosen = _named(((rule, rule.format) for rule in rules.rules), family, config)
    small = {path for path in paths if min(*shapes[path], family.rows(path)) < rules.min_size}
    usual = {path: BF16 if path in small else rules.default for path in paths}
    formats = {path: chosen.get(path, usual[path]) for path in paths}
    for group in family.groups(config):
        if len({formats[path] for path in group}) > 1:
            members = ", ".join(f"{path} {formats[path]}" for path in group)
            raise BadRecipe(f"linears that are one GEMM get several formats ({members}); name all of them in a rule")
    if set(formats.values()) <= {BF16}:
        raise BadRecipe("the rules leave every linear in bf16; expected some that are quantized")
    return formats


def require_whole_blocks(path: str, in_features: int, kind: str = NVFP4.name) -> None:
    """Refuse a linear whose rows do not split into the blocks of a format.

    Raises:
        UnsupportedLinear: naming the linear.
    """
    format = FORMATS[kind]
    if format.block is not None and in_features % format.block:
        raise UnsupportedLinear(
            f"{path} has {in_features} in-features, {format.title} needs a multiple of {format.block}; leave the model "
            "in BF16"
        )


def with_ranks_placed(options: Quality, family: Family, config: Mapping[str, Any]) -> Quality:
    """Return options whose rules for ranks hold for one model: those that name blocks name their linears instead.

    Raises:
        BadRecipe: a rule picks nothing or more blocks than there are, two rules name one linear, or linears that share
            a branch would get several ranks.
    """
    _named(((rule, f"rank {rule.rank}") for rule in options.ranks), family, config)
    placed = options.model_copy(update={"ranks": tuple(_placed(rule, family, config) for rule in options.ranks)})
    for group in family.groups(config):
        if len({placed.rank_of(path) for path in group}) > 1:
            members = ", ".join(f"{path} {placed.rank_of(path)}" for path in group)
            raise BadRecipe(f"linears that share a branch get several ranks ({members}); name all of them in a rule")
    return placed


def _placed(rule: RankRule, family: Family, config: Mapping[str, Any]) -> RankRule:
    """Return a rule that names its linears by path if it names blocks, which tell nothing without a model."""
    if rule.blocks is None:
        return rule
    linears = dict.fromkeys(path for _, matching in rule.matching(family, config) for path in matching)
    return RankRule(linears=tuple(linears), rank=rule.rank)


def _named(rules: Iterable[tuple[Selection, str]], family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what rules say of the linears that they name, from each rule with what it says.

    Raises:
        BadRecipe: a rule picks nothing or more blocks than there are, or two name one linear.
    """
    chosen: dict[str, tuple[str, str]] = {}
    picked = (
        (name, path, said) for rule, said in rules for name, paths in rule.matching(family, config) for path in paths
    )
    for name, path, said in picked:
        if path in chosen:
            raise BadRecipe(
                f"two rules name {path}: {chosen[path][0]} ({chosen[path][1]}) and {name} ({said}); "
                "expected one rule for a linear"
            )
        chosen[path] = (name, said)
    return {path: said for path, (_, said) in chosen.items()}
