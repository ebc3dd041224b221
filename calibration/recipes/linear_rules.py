"""Which linear gets which format and rank: a recipe's rules, held against the linears of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, StrictInt

from calibration.recipes.method_options import Patterns, Quality, Strict, listed
from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.number_formats import BF16, NAMES, NVFP4

__all__ = ["FormatRules", "Rule", "linear_formats", "require_ranks"]

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[NAMES]
"""What a linear is stored and computed in."""


class Rule(Strict):
    """One format for the linears whose module path a pattern matches.

    Attributes:
        linears: a shell pattern, such as ``*.norm*.linear``, held against the whole path; or a list of them.
        format: for them.
    """

    linears: Patterns
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

    def by_pattern(self) -> Iterator[tuple[str, str]]:
        """Yield each pattern with its format."""
        for rule in self.rules:
            for pattern in listed(rule.linears):
                yield pattern, rule.format


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
        BadRecipe: a pattern matches nothing, two rules name one linear, a group of linears that one GEMM computes would
            get several formats, or nothing would be quantized.
    """
    paths = family.quantized(config)
    chosen = _named(rules.by_pattern(), family, paths)
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


def require_ranks(options: Quality, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse rules for ranks that do not fit the linears that the family can quantize.

    Raises:
        BadRecipe: a pattern matches nothing, two rules name one linear, or linears that share a branch would get
            several ranks.
    """
    rules = ((pattern, rule.rank) for rule in options.ranks for pattern in listed(rule.linears))
    _named(((pattern, f"rank {rank}") for pattern, rank in rules), family, family.quantized(config))
    for group in family.groups(config):
        if len({options.rank_of(path) for path in group}) > 1:
            members = ", ".join(f"{path} {options.rank_of(path)}" for path in group)
            raise BadRecipe(f"linears that share a branch get several ranks ({members}); name all of them in a rule")


def _named(rules: Iterable[tuple[str, str]], family: Family, paths: Sequence[str]) -> dict[str, str]:
    """Return what rules say of the linears that they name, from each pattern with what it says.

    Raises:
        BadRecipe: a pattern matches nothing, or two rules name one linear.
    """
    chosen: dict[str, tuple[str, str]] = {}
    for pattern, said in rules:
        matching = [path for path in paths if fnmatch.fnmatchcase(path, pattern)]
        if not matching:
            raise BadRecipe(
                f"the rule for {pattern!r} matches no linear that {family.name} can quantize; "
                f"expected a pattern such as {paths[0]!r}: fp4trt inspect lists them"
            )
        for path in matching:
            if path in chosen:
                raise BadRecipe(
                    f"two rules name {path}: {chosen[path][0]!r} ({chosen[path][1]}) and {pattern!r} "
                    f"({said}); expected one rule for a linear"
                )
            chosen[path] = (pattern, said)
    return {path: said for path, (_, said) in chosen.items()}
