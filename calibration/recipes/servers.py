"""Servers that load a quantized checkpoint as it is: what each takes, and a recipe that fits.

Sources: SGLang 0.5.23 (``modelopt_quant.py``, ``models/dits/flux.py``), vLLM-Omni 0.30 with vLLM 0.33
(``modelopt.py``, ``flux_transformer.py``), TensorRT-LLM's ``visual_gen`` (``config.py``, ``modules/linear.py``).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from calibration.recipes.linear_rules import FormatRules, Rule, linear_formats
from calibration.recipes.method_options import ModelOpt, Quality, SVDQuant
from calibration.recipes.recipe import Recipe, adds_branch, deciding_method
from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.number_formats import BF16, FORMATS

__all__ = ["SERVERS", "Server", "fitted"]

_SVD: Final = "NVFP4_SVD"
_AWQ: Final = "NVFP4_AWQ"


@dataclass(frozen=True)
class Server:
    """What a server takes.

    Attributes:
        title: its name for people.
        algorithms: values of ``quant_algo``.
        in_bf16: name of a family to patterns of the linears that it takes in 16 bit alone; families that it is known to
            take.
        rank_of: what ranks of low-rank branches have to be a multiple of.
    """

    title: str
    algorithms: tuple[str, ...]
    in_bf16: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rank_of: int = 1


_FLUX_MODULATIONS: Final = ("*.norm1.linear", "*.norm1_context.linear", "*.norm.linear")

SERVERS: Final[Mapping[str, Server]] = {
    "sglang": Server("SGLang", ("NVFP4",), {"flux": _FLUX_MODULATIONS}),
    "vllm-omni": Server(
        "vLLM-Omni", ("NVFP4", "FP8"), {"flux": ("transformer_blocks.*", "*.norm.linear"), "flux2": ()}
    ),
    "tensorrt-llm": Server("TensorRT-LLM", ("NVFP4", "FP8", _SVD), {"flux": ()}, rank_of=32),
}


def fitted(
    recipe: Recipe, server: str, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> Recipe:
    """Return a recipe whose result a server takes: the same one, with linears in BF16 that it takes so alone.

    Args:
        recipe: what the user asks for.
        server: key of :data:`SERVERS`.
        family: of the model.
        config: its config.
        shapes: of the linears' weights, [out-features, in-features].

    Raises:
        BadRecipe: the server takes no such result, whatever stays in BF16, or is not known to take this family.
    """
    known = SERVERS[server]
    name = _base(family)
    if name not in known.in_bf16:
        raise BadRecipe(
            f"whether {known.title} loads {family.name} quantized is not known here, only {', '.join(known.in_bf16)}; "
            "leave out --for, and try"
        )
    if recipe.attention != BF16:
        raise BadRecipe(f"{recipe.name} has attention: {recipe.attention}, which {known.title} does not load; drop it")
    formats = linear_formats(recipe.formats, family, config, shapes)
    patterns = known.in_bf16[name]
    there = tuple(each for each in patterns if fnmatch.filter(formats, each))
    kept = tuple(path for each in there for path in fnmatch.filter(formats, each))
    wrong = tuple(path for path in kept if formats[path] != BF16)
    if wrong:
        ruled = {path for rule in recipe.formats.rules for _, found in rule.matching(family, config) for path in found}
        if conflict := next((path for path in wrong if path in ruled), None):
            raise BadRecipe(
                f"{recipe.name} has a rule that puts {conflict} in {formats[conflict]}, and {known.title} takes it in "
                "BF16 alone; drop that rule, or leave out --for"
            )
        rules = (*recipe.formats.rules, Rule(linears=wrong if ruled else there, format=BF16))
        changed: FormatRules = recipe.formats.model_copy(update={"rules": rules})
        recipe = recipe.model_copy(update={"formats": changed})
        formats = linear_formats(recipe.formats, family, config, shapes)
    algorithm = _algorithm(recipe, set(formats.values()) - {BF16})
    if algorithm not in known.algorithms:
        raise BadRecipe(
            f"{recipe.name} makes a checkpoint of quant_algo {algorithm}, and {known.title} loads "
            f"{' or '.join(known.algorithms)}; take a recipe such as nvfp4-quality"
        )
    if algorithm == _SVD and any(rank % known.rank_of for rank in _ranks(recipe)):
        raise BadRecipe(
            f"{recipe.name} has branches of rank {', '.join(map(str, _ranks(recipe)))}, and {known.title} loads "
            f"multiples of {known.rank_of}; take nvfp4-quality-r32 or svdquant-r32"
        )
    return recipe


def _base(family: Family) -> str:
    """Return the family that a special case of it is to a server."""
    return "flux" if family.class_name == "FluxTransformer2DModel" else family.name


def _algorithm(recipe: Recipe, kinds: set[str]) -> str:
    """Return what a result's config.json will have as ``quant_algo``."""
    method = deciding_method(recipe)
    some_without = isinstance(method, Quality) and 0 in (method.rank, *(rule.rank for rule in method.ranks))
    if len(kinds) > 1 or (adds_branch(method) and some_without):
        return "MIXED_PRECISION"
    if adds_branch(method):
        return _SVD
    if isinstance(method, ModelOpt) and method.algorithm == "awq_lite":
        return _AWQ
    return str(FORMATS[next(iter(kinds))].modelopt["algorithm"])


def _ranks(recipe: Recipe) -> tuple[int, ...]:
    """Return the ranks of a recipe's branches, each for one linear; a group pools those of its own."""
    method = deciding_method(recipe)
    if isinstance(method, SVDQuant):
        return (method.rank,)
    if isinstance(method, Quality):
        ranks = (method.rank, *(rule.rank for rule in method.ranks))
        return tuple(dict.fromkeys(method.pooled(1, rank) for rank in ranks if rank))
    return ()
