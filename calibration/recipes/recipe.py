"""Recipes: how a model is quantized, as YAML files that validate; some come with the package.

What of a recipe concerns numerics is in the result's manifest, so that a checkpoint tells how it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from calibration.recipes.linear_rules import FormatRules, Rule, linear_formats, with_ranks_placed
from calibration.recipes.method_options import (
    METHODS,
    PTQ,
    QAT,
    Learn,
    Method,
    ModelOpt,
    Quality,
    RankRule,
    SVDQuant,
)
from calibration.recipes.selection import Blocks, Strict
from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.file_kind import is_file, shortened, what_it_lacks
from fp4trt.json_file import kind_of
from fp4trt.number_formats import FP8

__all__ = [
    "METHODS",
    "PTQ",
    "QAT",
    "FormatRules",
    "Learn",
    "Method",
    "ModelOpt",
    "Quality",
    "RankRule",
    "Recipe",
    "Rule",
    "SVDQuant",
    "adds_branch",
    "attentions_in_fp8",
    "deciding_method",
    "linear_formats",
    "load_recipe",
    "load_start",
    "preset_names",
    "quantizes_by_block",
    "with_ranks_placed",
]

_FOLDER: Final = Path(__file__).resolve().parent


class Recipe(Strict):
    """How to quantize a model.

    Attributes:
        name: what manifest and graph call it.
        description: one line for people.
        method: how values are chosen, with the method's own options.
        formats: which linear gets which format.
        attention: what all attentions' two products are computed in.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    description: str = ""
    method: Method
    formats: FormatRules = FormatRules()
    attention: Literal["bf16", "fp8"] = "bf16"

    def described(self) -> dict[str, Any]:
        """Return everything that the recipe says, defaults included, as JSON; a key that says nothing is left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def resolved(self) -> dict[str, Any]:
        """Return what of it decides the result."""
        said = self.model_dump(mode="json", exclude={"description"}, exclude_none=True)
        if not said["method"].get("ranks", True):  # which came later: without any a result says what it always said
            del said["method"]["ranks"]
        return said


def preset_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_recipe(recipe: str | Path) -> Recipe:
    """Return a recipe.

    Args:
        recipe: a preset's name, or a YAML file.

    Raises:
        BadRecipe: there is none, or it says what no recipe can say; in one line, naming the key.
    """
    found = _read(recipe)
    if isinstance(found.method, QAT):
        load_start(found)
    return found


def load_start(recipe: Recipe) -> Recipe:
    """Return the recipe that one that trains starts from.

    Raises:
        BadRecipe: there is none, it trains too, or it has a branch where none is trained, or none where one is.
    """
    assert isinstance(recipe.method, QAT)
    learn = recipe.method.learn
    try:
        start = _read(recipe.method.start)
    except BadRecipe as error:
        raise BadRecipe(f"{recipe.name}: method.start: {error}") from None
    if isinstance(start.method, QAT):
        raise BadRecipe(f"{recipe.name} starts from {start.name}, which trains too; expected one that does not")
    if learn == "branch" and not adds_branch(start.method):
        raise BadRecipe(
            f"{recipe.name} trains low-rank branches (learn: branch), and its start {start.name} makes none; "
            "expected one like nvfp4-quality-r8"
        )
    if learn != "branch" and adds_branch(start.method):
        raise BadRecipe(
            f"{recipe.name} starts from {start.name}, whose linears have a low-rank branch, and learn: {learn} "
            "trains those without; expected learn: branch, or a start like nvfp4-quality"
        )
    return start


def deciding_method(recipe: Recipe) -> Method:
    """Return the method that decides which tensors a result holds: of a training, that of its start.

    Raises:
        BadRecipe: as :func:`load_start`.
    """
    return load_start(recipe).method if isinstance(recipe.method, QAT) else recipe.method


def attentions_in_fp8(recipe: Recipe, family: Family, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the module paths of the attentions that a recipe puts in FP8.

    Raises:
        BadRecipe: it asks for that, and the model has none which FP8 takes.
    """
    if recipe.attention != FP8.name:
        return ()
    if found := family.fp8_attentions(config):
        return found
    why = "all its attentions have a mask, and FP8 takes none" if family.attentions(config) else "it names none"
    raise BadRecipe(
        f"{recipe.name} says attention: fp8, and {family.name} has no attention for that: {why}; expected "
        "attention: bf16"
    )


def adds_branch(options: object) -> bool:
    """Whether a method puts a low-rank branch beside some linears in NVFP4."""
    if isinstance(options, Quality) and any(rule.rank for rule in options.ranks):
        return True
    return isinstance(options, Quality | SVDQuant) and options.rank > 0


def quantizes_by_block(options: object) -> bool:
    """Whether a method has work of its own at each block, which others can share: more than to run it once."""
    return isinstance(options, Quality | SVDQuant | ModelOpt)


def _read(recipe: str | Path) -> Recipe:
    """Return a recipe without a look at where it starts from."""
    if not isinstance(recipe, str | Path):
        raise BadRecipe(f"the recipe is {recipe!r}; expected a name of fp4trt recipes, or a YAML file")
    path = _FOLDER / f"{recipe}.yaml" if str(recipe) in preset_names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join(preset_names())
        raise BadRecipe(f"there is no recipe '{recipe}'; choose one of: {known}, or give a .yaml file")
    if not is_file(path):
        raise BadRecipe(f"{path} {what_it_lacks(path)}; expected a recipe: fp4trt recipes lists some")
    try:
        given = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except RecursionError:
        raise BadRecipe(f"{path} is nested too deeply; expected name, method and formats") from None
    except (ValueError, yaml.YAMLError) as error:  # no UTF-8, or no such date or number
        raise BadRecipe(f"{path} is not YAML ({' '.join(str(error).split())}); see fp4trt recipes NAME") from None
    if not isinstance(given, dict):
        raise BadRecipe(f"{path} holds {kind_of(given)}; expected name, method and formats")
    try:
        return Recipe.model_validate(given)
    except ValidationError as error:
        raise BadRecipe(f"{path}: {_first(error)}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's, which takes the last of two equal keys; this one refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


_EXPECTED: Final = {
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "string_type": "a string",
    "string_pattern_mismatch": "small letters and digits, and behind the first also . _ and -",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "float_type": "a finite number",
    "float_parsing": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "literal_error": "{expected}",
    "union_tag_invalid": "a method whose name is one of: {expected_tags}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} at least",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} at most",
}
"""Pydantic's name of what is wrong to what was expected."""


def _first(error: ValidationError) -> str:
    """Return the first thing that is wrong with a recipe, in a line that says where and what was expected."""
    problems = error.errors(include_url=False)
    problem = problems[0]
    where = _where(problem)
    if problem["type"] == "extra_forbidden":
        return f"there is no key {where}; {_known(problem['loc'])}"
    if problem["type"] == "union_tag_not_found":
        return f"{where}.name is missing; expected one of: {', '.join(METHODS)}"
    missing = [_where(each) for each in problems if each["type"] == "missing"]
    if problem["type"] == "missing":
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    return f"{where or 'the recipe'} is {_said(problem['input'])}; expected {_expected(problem)}"


def _said(value: Any) -> str:
    """Return a value as a recipe says it: in YAML, on one line."""
    if isinstance(value, str):
        return shortened(repr(value))
    try:
        said = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    except RecursionError:  # it takes more of the stack than reading
        return kind_of(value)
    return shortened(said.removesuffix("...\n").rstrip())


def _where(problem: Any) -> str:
    """Return the key that is wrong, as a recipe has it: without the kinds that pydantic puts behind it."""
    behind = zip((None, *problem["loc"]), problem["loc"], strict=False)
    location = [str(part) for before, part in behind if before != "linears"]
    if location and location[0] == "method" and len(location) > 1:
        del location[1]
    return ".".join(location)


def _expected(problem: Any) -> str:
    """Return what was expected in place of a wrong value, of which pydantic tells."""
    if "linears" in problem["loc"]:
        return "a pattern of module paths, or a list of them"
    words = _EXPECTED.get(problem["type"])
    if words is None:
        said = str(problem["msg"]).removeprefix("Value error, ")
        return said.removeprefix("Input should be ").removeprefix("a valid ")
    return words.format(**problem.get("ctx", {}))


def _known(location: Sequence[int | str]) -> str:
    """Return which keys there are beside one that is unknown."""
    models: dict[Sequence[int | str], type[BaseModel]] = {(): Recipe, ("formats",): FormatRules}
    models |= {("method", name): options for name, options in METHODS.items()}
    rule = Blocks if "blocks" in location[:-1] else RankRule if "ranks" in location else Rule
    model = models.get(tuple(location[:-1]), rule)
    return f"expected one of: {', '.join(model.model_fields)}"
