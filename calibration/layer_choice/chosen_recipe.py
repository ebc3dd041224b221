"""Write what a search has chosen as a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from calibration.layer_choice.frontier import Point
from calibration.layer_choice.sensitivity import BITS, Sensitivity
from calibration.recipes.recipe import FormatRules, RankRule, Recipe, Rule, load_recipe
from fp4trt import publish
from fp4trt.number_formats import BF16, FP8, NVFP4

__all__ = ["chosen_recipe", "write_recipe"]


def chosen_recipe(base: Recipe, sensitivity: Sensitivity, point: Point, of: str) -> Recipe:
    """Return the recipe with the formats and ranks of a point."""
    named = {
        kind: tuple(path for g in sensitivity.groups if point.formats[g.linears[0]] == kind for path in g.linears)
        for kind in BITS
    }
    rules = [
        Rule.model_validate({"linears": named[kind], "format": kind})
        for kind in BITS
        if named[kind] and kind != NVFP4.name
    ]
    share = f"{100 * point.budget:g} %"
    spent = {"flops": "FLOPs", "bytes": "bytes", "both": "FLOPs and bytes"}[of]
    fp8, kept, count = len(named[FP8.name]), len(named[BF16]), sum(map(len, named.values()))
    branched = "" if point.branches is None else f", with branches beside {sum(point.branches.values())} others"
    text = f"{base.name} with {fp8} of {count} linears in FP8 and {kept} in BF16{branched}, "
    update: dict[str, Any] = {
        "name": f"{base.name}{'' if point.ranks is None else '-ranks'}-{of}-{100 * point.budget:g}",
        "description": f"{text}where these spare the output most: at most {share} of what all in FP8 cost in {spent}.",
        "formats": FormatRules(rules=tuple(rules)),
    }
    if point.ranks:
        by_rank: dict[int, list[str]] = {}
        for group in sensitivity.groups:
            if rank := point.ranks.get(group.linears[0]):
                by_rank.setdefault(rank, []).extend(group.linears)
        given = tuple(RankRule(linears=tuple(linears), rank=rank) for rank, linears in sorted(by_rank.items()))
        update["method"] = base.method.model_copy(update={"ranks": given})
    return base.model_copy(update=update)


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe so that quantize takes it."""
    publish.write_text(path, yaml.safe_dump(recipe.described(), sort_keys=False, width=100))
    load_recipe(path)
