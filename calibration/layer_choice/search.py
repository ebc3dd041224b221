"""``fp4trt search``: measure what each linear costs the model's output, and spend a budget where it buys most."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Final

import yaml

from calibration.by_block.calibration import captured_from
from calibration.by_block.measure_amax import identity_of, require_device
from calibration.by_block.quantize_blocks import prepared_by_block
from calibration.checkpoints.plain import find_source
from calibration.checkpoints.quantized import Checkpoint, read
from calibration.checkpoints.threads import suited_threads
from calibration.inputs.captured import Inputs
from calibration.layer_choice.allocation import UNITS
from calibration.layer_choice.frontier import BUDGETS, Point, draw, frontier, table
from calibration.layer_choice.measurement import Choices, Errors, measure_groups, relative_error, runs_of, spread
from calibration.layer_choice.mixture import Mixture, Quantized
from calibration.layer_choice.sensitivity import BITS, LAUNCH, Group, Sensitivity, groups_of, parts, ranked
from calibration.methods import registry
from calibration.methods.plan import Plain, checked
from calibration.quantization import quantize
from calibration.recipes.recipe import QAT, FormatRules, Quality, RankRule, Recipe, Rule, load_recipe
from fp4trt import publish
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import BadCheckpoint, BadInputs, BadRecipe
from fp4trt.json_file import load_json
from fp4trt.number_formats import BF16, FP8, NVFP4
from fp4trt.options import at_least, each_at_least, file_name, one_of, takes
from fp4trt.progress import Progress, note, tracking
from fp4trt.safetensors_file import StoredTensor
from fp4trt.verb import PEOPLE, Result, verb

__all__ = ["DATA", "LARGEST", "PICTURE", "RECIPE", "Searched", "search"]

DATA: Final = "search.json"
RECIPE: Final = "recipe.yaml"
PICTURE: Final = "frontier.png"
FORMAT: Final = "fp4trt search 1"
"""What tells our search.json from another."""

LARGEST: Final = 4.0
"""Budget; less pays for every linear in BF16."""

_ALONE: Final = tuple(name for name in BITS if name != BF16)
"""Formats that a whole checkpoint is made in, to take linears from."""


@dataclass(frozen=True)
class _Task:
    """What is searched.

    Attributes:
        plain: the checkpoint, with the recipe whose method chooses values.
        recipe: what the result is written for: the same, or one that trains from there.
        calibration: captured inputs, as the user gave them.
        calls: all of them.
        some: those that errors are measured on.
        device: where to compute.
        ranks: of branches to choose from, rising.
    """

    plain: Plain
    recipe: Recipe
    calibration: str | Path | None
    calls: Sequence[Inputs]
    some: Sequence[Inputs]
    device: str
    ranks: tuple[int, ...]

    def identity(self) -> str:
        """Return what tells measurements from those of another model, method or data."""
        run = identity_of(self.plain.folder, self.plain.config, self.calls, self.device)
        told = [FORMAT, run, self.plain.recipe.resolved(), len(self.some), *self.ranks]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def alone(self) -> tuple[str, ...]:
        """Return the choices that a whole checkpoint is made in, to take linears from."""
        return (*_ALONE, *map(ranked, self.ranks))

    def choices(self) -> Choices:
        """Return what each group is measured in."""
        return {
            group: tuple(kind for kind in self.alone() if _fits(self.plain, group, parts(kind)[1]))
            for group in self.plain.family.groups(self.plain.config)
        }


@dataclass(frozen=True, eq=False)
class Searched(Result):
    """What :func:`search` found: what search.json holds, and where the files are.

    Attributes:
        format: of search.json.
        recipe: what the recipe searched for says.
        budget: what might be spent beyond NVFP4.
        of: what the budget is of.
        calls: captured calls that errors were measured on, 0 where that was done earlier.
        sensitivity: the groups, as :meth:`calibration.layer_choice.sensitivity.Sensitivity.as_dict` has them.
        frontier: the points, by budget.
        data: path of search.json.
        recipe_file: path of recipe.yaml.
        picture: path of frontier.png; None without matplotlib.
        table: the frontier for people.
        ranks: of branches that there was a choice of; None without any, as the next two.
        launch_cost: of each kernel that a branch adds, in FLOPs of NVFP4.
        frontier_without_ranks: the points that formats alone reach, by budget.
    """

    format: str
    recipe: Mapping[str, Any]
    budget: float
    of: str
    calls: int
    sensitivity: Mapping[str, Any]
    frontier: Sequence[Mapping[str, Any]]
    data: str
    recipe_file: str
    picture: str | None
    table: str = field(metadata=PEOPLE)
    ranks: Sequence[int] | None = None
    launch_cost: float | None = None
    frontier_without_ranks: Sequence[Mapping[str, Any]] | None = None


@verb
@takes(
    source=file_name,
    output=file_name,
    calibration=file_name,
    of=one_of("both", "flops", "bytes"),
    calls=at_least(1),
    ranks=each_at_least(1, (8, 16)),
)
def search(
    source: str | Path,
    output: str | Path,
    budget: float,
    *,
    of: str = "both",
    recipe: str | Path = "nvfp4-quality",
    calibration: str | Path | None = None,
    bf16: bool = True,
    calls: int = 16,
    sensitivity: str | Path | None = None,
    ranks: Sequence[int] = (),
    launch_cost: float | None = None,
    force: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Searched:
    """Choose NVFP4, with or without a low-rank branch, FP8 or BF16 for each group of linears; write that as a recipe.

    The model is quantized by the recipe's method to NVFP4, to FP8, and to NVFP4 with each rank; then each group's
    linears are put into the plain model alone, and the error of the model's output is what the group costs. The model
    is in memory for that. A run that is killed resumes after the block that it had measured last.

    Args:
        source: BF16 checkpoint (see :func:`calibration.checkpoints.plain.find_source`).
        output: folder of the result: recipe.yaml, search.json and, with matplotlib, frontier.png.
        budget: what may be spent beyond NVFP4; all linears in FP8 cost 1.
        of: ``flops``, ``bytes``, or ``both``: neither may exceed the budget.
        recipe: whose method and attention; it may name no formats, which are to be chosen.
        calibration: captured inputs (``.safetensors``); None for the built-in model's words.
        bf16: whether linears may stay in 16 bit.
        calls: captured calls to measure on, at most, spread over the schedule.
        sensitivity: search.json of an earlier search, in place of measuring again.
        ranks: of low-rank branches to choose from, for each linear, as the recipe option ``rank`` of the method
            ``quality`` has it; a group whose matrix is too small for one is not offered it. None means no branches.
        launch_cost: of each of the two kernels that a branch adds, in FLOPs of NVFP4; None for
            :data:`calibration.layer_choice.sensitivity.LAUNCH`.
        force: replace an earlier result.
        device: where to compute, ``cpu`` or ``cuda``.
        progress: called with each step.

    Raises:
        BadOption, BadRecipe, BadCheckpoint, BadInputs, OutputExists: naming what is wrong.
    """
    if not isinstance(budget, Real) or not 0 <= budget <= LARGEST:
        raise BadInputs(
            f"the budget is {budget!r}; expected a number from 0 to {LARGEST:g}, where 1 is all linears in FP8"
        )
    launch_cost = LAUNCH if launch_cost is None else launch_cost
    if not isinstance(launch_cost, Real) or not 0 <= launch_cost < math.inf:
        raise BadInputs(f"the launch cost is {launch_cost!r}; expected FLOPs, 0 at least, such as {LAUNCH:g}")
    require_device(device)
    directory, folder = Path(output), find_source(source)
    chosen = load_recipe(recipe)
    ours = (DATA, RECIPE, PICTURE) if _is_search(directory) else ()
    publish.refuse_foreign(directory, force, ours)
    plain = checked(folder, _without_training(chosen))
    offered = tuple(sorted(set(ranks)))
    _require_ranks(chosen, plain, offered)
    formats, budgets = tuple(BITS) if bf16 else _ALONE, {*BUDGETS, budget}
    if sensitivity is not None:
        found = replace(_sensitivity_of(Path(sensitivity), plain, offered), launch_cost=float(launch_cost))
        identity, measured_on = "", 0
    else:
        captured = captured_from(folder, calibration).calls
        task = _Task(plain, chosen, calibration, captured, spread(captured, calls), device, offered)
        identity, measured_on = task.identity(), len(task.some)

    def frontiers() -> tuple[list[Point], list[Point]]:
        """Return the frontier, and where branches are offered that without them."""
        plainly = frontier(found, budgets, of, formats)
        return (frontier(found, budgets, of, (*formats, *map(ranked, offered))), plainly) if offered else (plainly, [])

    with suited_threads(plain.config), publish.replacing(directory, force, identity, ours) as partial:
        if sensitivity is not None:
            points, without = frontiers()
        else:
            with _measured(task, partial, runs=len(budgets) * (2 if offered else 1)) as (measured, measure):
                found = replace(measured, launch_cost=float(launch_cost))
                points, without = (list(map(measure, each)) for each in frontiers())
            for kind in task.alone():
                shutil.rmtree(partial / kind)
        if offered:
            _note_prices(found, budget, of)
        point = next(point for point in points if point.budget == budget)
        result: dict[str, Any] = {
            "format": FORMAT,
            "recipe": chosen.resolved(),
            "budget": budget,
            "of": of,
            "calls": measured_on,
            "sensitivity": found.as_dict(),
            "frontier": [point.as_dict() for point in points],
        }
        if offered:
            result["ranks"], result["launch_cost"] = list(offered), found.launch_cost
            result["frontier_without_ranks"] = [point.as_dict() for point in without]
        publish.write_json(partial / DATA, result)
        _write_recipe(partial / RECIPE, _recipe(chosen, found, point, of))
        drawn = draw(found, points, point, partial / PICTURE, without)
    files = {"data": DATA, "recipe_file": RECIPE, "picture": PICTURE}
    paths: dict[str, Any] = {key: str((directory / name).resolve()) for key, name in files.items()}
    lines = table(points, budget, offered, without)
    return Searched(**result, **(paths if drawn else {**paths, "picture": None}), table=lines)


def _is_search(directory: Path) -> bool:
    """Whether a folder holds a result of ours."""
    try:
        return load_json(directory / DATA).get("format") == FORMAT
    except (BadCheckpoint, OSError):
        return False


def _without_training(recipe: Recipe) -> Recipe:
    """Return the recipe whose method chooses values: of one that trains, that which it starts from.

    Raises:
        BadRecipe: it chooses formats itself.
    """
    if recipe.formats != FormatRules():
        raise BadRecipe(f"{recipe.name} says which linears get which format; expected a recipe that leaves that open")
    if isinstance(recipe.method, QAT):
        start = load_recipe(recipe.method.start)
        return start.model_copy(update={"formats": FormatRules(), "attention": BF16})
    return recipe.model_copy(update={"attention": BF16})


def _fits(plain: Plain, group: Sequence[str], rank: int) -> bool:
    """Whether linears that read the same input can have a branch of a rank for each of them; 0 is none."""
    method, shapes = plain.recipe.method, {path: plain.stored[f"{path}.weight"].shape for path in group}
    if not rank:
        return True
    return isinstance(method, Quality) and method.pooled(len(group), rank) <= registry.largest_rank(group, shapes)


def _require_ranks(recipe: Recipe, plain: Plain, ranks: Sequence[int]) -> None:
    """Refuse ranks that there is nothing to choose from with; say which groups are too small for one.

    Raises:
        BadRecipe: the recipe is of another method, or chooses ranks itself.
        BadInputs: a rank is too large for every group.
    """
    method = recipe.method
    if ranks and not isinstance(method, Quality):
        raise BadRecipe(
            f"ranks are to be chosen, and {recipe.name} is of the method {method.name}; expected one of the method "
            "quality, such as nvfp4-quality"
        )
    if ranks and isinstance(method, Quality) and (method.rank or method.ranks):
        raise BadRecipe(f"{recipe.name} says which linears get which rank; expected a recipe without rank and ranks")
    groups = plain.family.groups(plain.config)
    for rank in ranks:
        small = [group[0] for group in groups if not _fits(plain, group, rank)]
        if len(small) == len(groups):
            raise BadInputs(f"rank {rank} is too large for every group of linears of this model; give smaller ones")
        if small:
            others = f" and {len(small) - 1} other groups" if len(small) > 1 else ""
            note(f"rank {rank} is left out for {small[0]}{others}: what its members pool is more than its matrix has")


def _note_prices(sensitivity: Sensitivity, budget: float, of: str) -> None:
    """Say it where no branch is within the budget."""
    for unit in UNITS[of]:
        price = min(sensitivity.price(group, each, unit) for group in sensitivity.groups for each in group.branches)
        if price > budget:
            launched = f", {sensitivity.launch_cost:g} a kernel (--launch-cost)" if unit == "flops" else ""
            note(f"no branch is within the budget of {budget:g}: the cheapest takes {price:.3g} in {unit}{launched}")


def _sensitivity_of(file: Path, plain: Plain, ranks: Sequence[int]) -> Sensitivity:
    """Read what an earlier search measured.

    Raises:
        BadInputs: it is of another model, another method or other ranks.
    """
    if not file.is_file():
        raise BadInputs(f"{file} is not a file; expected the search.json of an earlier fp4trt search")
    try:
        earlier = load_json(file)
    except BadCheckpoint:
        earlier = {}
    if earlier.get("format") != FORMAT:
        raise BadInputs(f"{file} was not written by fp4trt search; expected its search.json")
    try:
        found = Sensitivity.from_dict(earlier.get("sensitivity", {}))
        recipe = Recipe.model_validate(earlier.get("recipe"))
        method = _without_training(recipe).method
    except ValueError:
        raise BadInputs(f"{file} is damaged; expected search.json as it was written: search again") from None
    errors = {group.linears[0]: group.errors for group in found.groups}
    groups = plain.family.groups(plain.config)
    if [group.linears for group in found.groups] != list(groups) or found.groups != _sized(plain, errors):
        raise BadInputs(f"{file} is of a model with other linears; expected a search of this one: search again")
    if method != plain.recipe.method:
        raise BadInputs(
            f"{file} was measured with {recipe.name}, whose method is not that of {plain.recipe.name}; expected one: "
            f"give --recipe {recipe.name}, or search again"
        )
    for rank in ranks:
        if any(_fits(plain, group.linears, rank) and ranked(rank) not in group.errors for group in found.groups):
            known = ", ".join(map(str, earlier.get("ranks", []))) or "none"
            raise BadInputs(f"{file} was measured with the ranks {known}, and not with {rank}: search again")
    return found


@contextlib.contextmanager
def _measured(task: _Task, partial: Path, runs: int) -> Iterator[tuple[Sensitivity, Callable[[Point], Point]]]:
    """Measure every group; give the result, and what measures a choice.

    Args:
        task: what is searched.
        partial: folder for what is finished.
        runs: choices that will be measured.
    """
    finished = publish.progress_of(partial)
    publish.note_progress(partial, {"errors": {}, **finished})
    plain = task.plain
    quantized = {}
    for index, kind in enumerate(task.alone(), 1):
        note(f"quantizing the model to {kind}, {index} of {len(task.alone())}")
        quantized[kind] = Quantized(_uniform(task, partial / kind, kind))
    groups = task.choices()
    total = (2 + runs) * len(task.some) + runs_of(groups, len(task.some))
    with contextlib.ExitStack() as stack:
        changed = stack.enter_context(_folded(task, partial / "folds"))
        advance = stack.enter_context(tracking(total, "measuring"))
        reference = Mixture(plain.folder, {}, {}, task.device)
        with reference.loaded():
            wanted = reference.outputs(task.some, {}, advance)
        model = Mixture(plain.folder, changed, quantized, task.device)
        stack.enter_context(model.loaded())
        folded = relative_error(model.outputs(task.some, {}, advance), wanted)
        keep = lambda errors: publish.note_progress(partial, {"errors": errors})  # noqa: E731
        errors = measure_groups(model, groups, task.some, wanted, finished.get("errors", {}), keep, advance)
        base = folded or min(min(found.values()) for found in errors.values())
        sensitivity = Sensitivity(_sized(plain, _beyond(errors, base)), base)

        known: dict[tuple[str, ...], float] = {}

        def measure(point: Point) -> Point:
            chosen = tuple(point.choice(group[0]) for group in groups)
            if chosen in known:  # a point without branches that is on both frontiers
                advance(len(task.some))
            else:
                formats = {path: kind for group, kind in zip(groups, chosen, strict=True) for path in group}
                known[chosen] = relative_error(model.outputs(task.some, formats, advance), wanted) ** 0.5
            return replace(point, measured=known[chosen])

        yield sensitivity, measure


def _sized(plain: Plain, errors: Mapping[str, Mapping[str, float]]) -> tuple[Group, ...]:
    """Return a model's groups with their sizes and these errors."""
    shapes, method = {path: plain.stored[f"{path}.weight"].shape for path in plain.formats}, plain.recipe.method
    return groups_of(
        plain.family, plain.config, shapes, errors, *((method.pooled,) if isinstance(method, Quality) else ())
    )


def _uniform(task: _Task, directory: Path, kind: str) -> Checkpoint:
    """Return the checkpoint with all linears in one choice, which the recipe's method chooses the values of."""
    if not (directory / MANIFEST).is_file():
        format, rank = parts(kind)
        recipe = task.plain.recipe.model_copy(update={"formats": FormatRules.model_validate({"default": format})})
        if rank:
            small = [path for group, choices in task.choices().items() if kind not in choices for path in group]
            rules = (RankRule(linears=tuple(small), rank=0),) if small else ()
            method = recipe.method.model_copy(update={"rank": rank, "ranks": rules})
            recipe = recipe.model_copy(update={"method": method})
        quantize(task.plain.folder, directory, recipe=recipe, calibration=task.calibration, device=task.device)
    return read(directory)


@contextlib.contextmanager
def _folded(task: _Task, work: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """Give what the method makes of linears that stay in 16 bit, by name."""
    options = task.plain.recipe.method
    if not registry.changes_plain_linears(options):
        yield {}
        return
    method = registry.of_block(options, task.plain.family)
    formats = dict.fromkeys(task.plain.formats, BF16)
    recipe = task.plain.recipe.resolved()
    with prepared_by_block(task.plain.folder, task.calls, formats, method, recipe, work, task.device) as prepared:
        yield prepared.tensors


def _beyond(errors: Errors, base: float) -> Errors:
    """Return errors beyond that which any change of the model has, because it rounds otherwise in 16 bit."""
    less = {first: {kind: max(0.0, value - base) for kind, value in found.items()} for first, found in errors.items()}
    return {first: {**found, BF16: 0.0} for first, found in less.items()}


def _recipe(base: Recipe, sensitivity: Sensitivity, point: Point, of: str) -> Recipe:
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


def _write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe so that quantize takes it."""
    publish.write_text(path, yaml.safe_dump(recipe.described(), sort_keys=False, width=100))
    load_recipe(path)
