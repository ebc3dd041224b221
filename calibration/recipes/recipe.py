"""Recipes: how a model is quantized, as YAML files that validate; some come with the package.

What of a recipe concerns numerics is in the result's manifest, so that a checkpoint tells how it was made.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.file_kind import is_file, what_it_lacks
from fp4trt.json_file import kind_of
from fp4trt.number_formats import BF16, NAMES, NVFP4

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
    "linear_formats",
    "load_recipe",
    "preset_names",
    "require_ranks",
]

_FOLDER: Final = Path(__file__).resolve().parent

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[NAMES]
"""What a linear is stored and computed in."""

Patterns = str | Annotated[tuple[str, ...], Field(min_length=1)]
"""A shell pattern, such as ``*.norm*.linear``, held against the whole module path; or a list of them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """One format for the linears whose module path a pattern matches.

    Attributes:
        linears: a shell pattern, such as ``*.norm*.linear``, held against the whole path; or a list of them.
        format: for them.
    """

    linears: Patterns
    format: Format


class RankRule(_Strict):
    """One rank of a low-rank branch for the linears whose module path a pattern matches.

    Attributes:
        linears: as those of :class:`Rule`.
        rank: of the branch for each of them that is in NVFP4; 0 for none.
    """

    linears: Patterns
    rank: int = Field(ge=0)


class FormatRules(_Strict):
    """Which linear gets which format.

    Attributes:
        default: of those that no rule names.
        min_size: of the linears that no rule names, leave in BF16 those with fewer in-features, out-features or rows
            (of one picture of the family's default size) than this.
        rules: at most one may match a linear.
    """

    default: Format = NVFP4.name
    min_size: int = Field(default=0, ge=0)
    rules: tuple[Rule, ...] = ()

    def by_pattern(self) -> Iterator[tuple[str, str]]:
        """Yield each pattern with its format."""
        for rule in self.rules:
            for pattern in _listed(rule.linears):
                yield pattern, rule.format


def _listed(linears: Patterns) -> tuple[str, ...]:
    return (linears,) if isinstance(linears, str) else linears


@functools.lru_cache
def _matching(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return what matches the paths that any of some patterns does."""
    return re.compile("|".join(map(fnmatch.translate, patterns)))


class PTQ(_Strict):
    """Plain post-training quantization: round to nearest under the largest magnitude."""

    name: Literal["ptq"]


Learn = Literal["all", "biases", "branch"]


class QAT(_Strict):
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
    steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    batch: int = Field(default=64, gt=0)
    warm_up: int = Field(default=20, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    block_loss: float = Field(default=0.0, ge=0)
    data: Literal["trajectories", "captured"] = "trajectories"
    visits: int = Field(default=10, gt=0)
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)


class Quality(_Strict):
    """Folds, GPTQ with a search of the block scales, coordinate descent, bias correction: no cost at run time.

    Attributes:
        shift_fold: take the mean of every channel out of the inputs behind adaptive norms.
        smooth_fold: scale channels there so that weights and inputs share the burden.
        gptq: round with feedback and a search of the block scales.
        descent_sweeps: of coordinate descent afterwards, at most; 0 for none.
        wiener: share of the way from a weight to the one that makes the best of an input rounded to FP4, which is gone
            before it is rounded itself (see :mod:`calibration.methods.quality.wiener`).
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
    shift_fold: bool = True
    smooth_fold: bool = True
    gptq: bool = True
    descent_sweeps: int = Field(default=1, ge=0)
    wiener: float = Field(default=0.3, ge=0, le=1)
    bias_correction: bool = True
    sequential: bool = True
    damping: float = Field(default=0.01, gt=0, lt=1)
    input_headroom: float = Field(default=1.5, ge=1, le=64)
    rows_per_call: int = Field(default=1024, ge=1)
    rank: int = Field(default=0, ge=0)
    ranks: tuple[RankRule, ...] = ()
    rank_multiple: int = Field(default=1, ge=1)

    def pooled(self, members: int, rank: int | None = None) -> int:
        """Return the rank of the branch that a group of so many linears shares, each having ``rank`` or the default."""
        own = self.rank if rank is None else rank
        return -(-own * members // self.rank_multiple) * self.rank_multiple

    def rank_of(self, path: str) -> int:
        """Return the rank that a linear brings to the branch of its group."""
        named = (rule.rank for rule in self.ranks if _matching(_listed(rule.linears)).match(path))
        return next(named, self.rank)

    def pooled_rank(self, group: Sequence[str]) -> int:
        """Return the rank of the branch that a group shares, by its linears' module paths; 0 without one."""
        return self.pooled(len(group), self.rank_of(group[0]))


class SVDQuant(_Strict):
    """A low-rank branch in BF16, and in FP4 what it leaves of the weight.

    Source: :mod:`calibration.methods.modelopt.svdquant`.

    Attributes:
        rank: of the branch for each linear; linears that read the same input pool theirs.
        smoothing: whether the inputs, but for the modulations', are scaled by channel first, with an exponent that is
            searched for each group.
        alpha_step: of the grid of exponents from 0 to 1; the smaller, the longer the search.
    """

    name: Literal["svdquant"]
    rank: int = Field(default=32, ge=1)
    smoothing: bool = True
    alpha_step: float = Field(default=0.1, ge=0.01, le=1)

    def pooled(self, members: int) -> int:
        """Return the rank of the branch that a group of so many linears shares."""
        return self.rank * members

    def pooled_rank(self, group: Sequence[str]) -> int:
        """Return the rank of the branch that a group shares, by its linears' module paths."""
        return self.pooled(len(group))


class ModelOpt(_Strict):
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


class Recipe(_Strict):
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
        """Return everything that the recipe says, defaults included, as JSON."""
        return self.model_dump(mode="json")

    def resolved(self) -> dict[str, Any]:
        """Return what of it decides the result."""
        said = self.model_dump(mode="json", exclude={"description"})
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
    if not isinstance(recipe, str | Path):
        raise BadRecipe(f"the recipe is {recipe!r}; expected a name of fp4trt recipes, or a YAML file")
    path = _FOLDER / f"{recipe}.yaml" if str(recipe) in preset_names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        known = ", ".join(preset_names())
        raise BadRecipe(f"there is no recipe '{recipe}'; choose one of: {known}, or give a .yaml file")
    try:
        given = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except OSError:
        if is_file(path):  # which cannot be read
            raise
        raise BadRecipe(f"{path} {what_it_lacks(path)}; expected a recipe: fp4trt recipes lists some") from None
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
    "string_pattern_mismatch": "small letters, digits, and . _ - behind the first",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
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
    problem = error.errors(include_url=False)[0]
    # A key that takes two kinds of values is followed by the name of the kind.
    where = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("str", "tuple[", "constrained")))
    if problem["type"] == "extra_forbidden":
        return f"there is no key {where}; {_known(problem['loc'])}"
    if problem["type"] in ("missing", "union_tag_not_found"):
        return f"{where}{'.name' * (problem['type'] != 'missing')} is missing"
    return f"{where or 'the recipe'} is {problem['input']!r}; expected {_expected(problem)}"


def _expected(problem: Any) -> str:
    """Return what was expected in place of a wrong value, of which pydantic tells."""
    if "linears" in problem["loc"]:
        return "a pattern of module paths, or a list of them"
    words = _EXPECTED.get(problem["type"])
    if words is None:
        return str(problem["msg"]).removeprefix("Input should be ").removeprefix("a valid ")
    return words.format(**problem.get("ctx", {}))


def _known(location: Sequence[int | str]) -> str:
    """Return which keys there are beside one that is unknown."""
    models: dict[Sequence[int | str], type[BaseModel]] = {(): Recipe, ("formats",): FormatRules}
    models |= {("method", name): options for name, options in METHODS.items()}
    model = models.get(tuple(location[:-1]), RankRule if "ranks" in location else Rule)
    return f"expected one of: {', '.join(model.model_fields)}"


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
            listed = ", ".join(f"{path} {formats[path]}" for path in group)
            raise BadRecipe(f"linears that are one GEMM get several formats ({listed}); name all of them in a rule")
    if set(formats.values()) <= {BF16}:
        raise BadRecipe("the rules leave every linear in bf16; expected some that are quantized")
    return formats


def require_ranks(options: Quality, family: Family, config: Mapping[str, Any]) -> None:
    """Refuse rules for ranks that do not fit the linears that the family can quantize.

    Raises:
        BadRecipe: a pattern matches nothing, two rules name one linear, or linears that share a branch would get
            several ranks.
    """
    rules = ((pattern, rule.rank) for rule in options.ranks for pattern in _listed(rule.linears))
    _named(((pattern, f"rank {rank}") for pattern, rank in rules), family, family.quantized(config))
    for group in family.groups(config):
        if len({options.rank_of(path) for path in group}) > 1:
            listed = ", ".join(f"{path} {options.rank_of(path)}" for path in group)
            raise BadRecipe(f"linears that share a branch get several ranks ({listed}); name all of them in a rule")


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
