"""``fp4trt search``: measure what each linear costs the model's output, and spend a budget where it buys most."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any, Final

from calibration.by_block.calibration import captured_from
from calibration.by_block.measure_amax import require_device
from calibration.checkpoints.plain import find_source
from calibration.checkpoints.threads import suited_threads
from calibration.layer_choice.allocation import UNITS
from calibration.layer_choice.chosen_recipe import chosen_recipe, write_recipe
from calibration.layer_choice.frontier import BUDGETS, Point, draw, frontier, table
from calibration.layer_choice.measurement import spread
from calibration.layer_choice.search_task import ALONE, FORMAT, SearchTask, fits, measured, sized
from calibration.layer_choice.sensitivity import BITS, LAUNCH, Sensitivity, ranked
from calibration.methods.plan import Plain, checked
from calibration.recipes.recipe import QAT, FormatRules, Quality, Recipe, load_recipe, load_start
from fp4trt import publish
from fp4trt.errors import BadCheckpoint, BadInputs, BadRecipe
from fp4trt.json_file import load_json
from fp4trt.number_formats import BF16
from fp4trt.options import at_least, each_at_least, file_name, file_names, one_of, takes
from fp4trt.progress import Progress, note
from fp4trt.verb import PEOPLE, Result, verb

__all__ = ["DATA", "LARGEST", "PICTURE", "RECIPE", "Searched", "search"]

DATA: Final = "search.json"
RECIPE: Final = "recipe.yaml"
PICTURE: Final = "frontier.png"
LARGEST: Final = 4.0
"""Budget; less pays for every linear in BF16."""


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
    like=file_name,
    lora=file_names,
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
    like: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
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
        like: the config of a single file's model, as :func:`calibration.checkpoints.plain.find_source` takes it.
        lora: LoRA files to fuse into the weights, likewise.
        progress: called with each step.

    Raises:
        BadOption, BadRecipe, BadCheckpoint, BadInputs, OutputExists: naming what is wrong.
    """
    if not isinstance(budget, Real) or not 0 <= budget <= LARGEST:
        raise BadInputs(
            f"the budget is {budget!r}; expected a number from 0 to {LARGEST:g}, where 1 is all linears in FP8"
        )
    if launch_cost is not None and not ranks:
        raise BadInputs("a launch cost is given and no rank, whose branches it prices; give ranks too, or leave it out")
    launch_cost = LAUNCH if launch_cost is None else launch_cost
    if not isinstance(launch_cost, Real) or not 0 <= launch_cost < math.inf:
        raise BadInputs(f"the launch cost is {launch_cost!r}; expected FLOPs, 0 at least, such as {LAUNCH:g}")
    require_device(device)
    directory, folder = Path(output), find_source(source, like, lora)
    chosen = load_recipe(recipe)
    ours = (DATA, RECIPE, PICTURE) if _is_search(directory) else ()
    publish.refuse_foreign(directory, force, ours)
    plain = checked(folder, _without_training(chosen))
    offered = tuple(sorted(set(ranks)))
    _require_ranks(chosen, plain, offered)
    formats, budgets = tuple(BITS) if bf16 else ALONE, {*BUDGETS, budget}
    if sensitivity is not None:
        found = replace(_sensitivity_of(Path(sensitivity), plain, offered), launch_cost=float(launch_cost))
        identity, measured_on = "", 0
    else:
        captured = captured_from(folder, calibration).calls
        task = SearchTask(plain, chosen, calibration, captured, spread(captured, calls), device, offered)
        identity, measured_on = task.identity(), len(task.some)

    def frontiers() -> tuple[list[Point], list[Point]]:
        """Return the frontier, and where branches are offered that without them."""
        plainly = frontier(found, budgets, of, formats)
        return (frontier(found, budgets, of, (*formats, *map(ranked, offered))), plainly) if offered else (plainly, [])

    with suited_threads(plain.config), publish.replacing(directory, force, identity, ours) as partial:
        if sensitivity is not None:
            points, without = frontiers()
        else:
            with measured(task, partial, runs=len(budgets) * (2 if offered else 1)) as (costs, measure):
                found = replace(costs, launch_cost=float(launch_cost))
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
        write_recipe(partial / RECIPE, chosen_recipe(chosen, found, point, of))
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
        start = load_start(recipe)
        return start.model_copy(update={"formats": FormatRules(), "attention": BF16})
    return recipe.model_copy(update={"attention": BF16})


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
        small = [group[0] for group in groups if not fits(plain, group, rank)]
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
    if [group.linears for group in found.groups] != list(groups) or found.groups != sized(plain, errors):
        raise BadInputs(f"{file} is of a model with other linears; expected a search of this one: search again")
    if method != plain.recipe.method:
        raise BadInputs(
            f"{file} was measured with {recipe.name}, whose method is not that of {plain.recipe.name}; expected one: "
            f"give --recipe {recipe.name}, or search again"
        )
    for rank in ranks:
        if any(fits(plain, group.linears, rank) and ranked(rank) not in group.errors for group in found.groups):
            known = ", ".join(map(str, earlier.get("ranks", []))) or "none"
            raise BadInputs(f"{file} was measured with the ranks {known}, and not with {rank}: search again")
    return found
