"""A budget goes where it spares the model's output most: by the definition, by measurement, and as a recipe."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import calibration
import fp4trt
from calibration.by_block.calibration import captured_from
from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load, read
from calibration.layer_choice import measurement
from calibration.layer_choice.allocation import UNITS, allocate
from calibration.layer_choice.frontier import frontier
from calibration.layer_choice.measurement import relative_error, spread
from calibration.layer_choice.search import DATA, PICTURE, RECIPE, search
from calibration.layer_choice.sensitivity import BITS, Branch, Group, Sensitivity, ranked
from calibration.quantization import quantize
from calibration.recipes.recipe import FormatRules, load_recipe
from fp4trt.errors import BadInputs, BadRecipe
from fp4trt.families import family_of
from fp4trt.json_file import load_json

CALLS = 2


@pytest.fixture(scope="module")
def digits(built_in: Path) -> Path:
    """The whole built-in model: a budget needs groups to choose from."""
    return built_in


@pytest.fixture(scope="module")
def searched(digits: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search on the built-in model by plain PTQ, a fifth of what FP8 costs; not to be changed."""
    folder = tmp_path_factory.mktemp("search") / "found"
    search(digits, folder, 0.2, recipe="nvfp4-ptq", calibration=five_calls, calls=CALLS)
    return folder


@pytest.fixture(scope="module")
def found(searched: Path) -> Sensitivity:
    return Sensitivity.from_dict(load_json(searched / DATA)["sensitivity"])


def _random(groups: int, seed: int, ranks: Sequence[int] = ()) -> Sensitivity:
    draw = random.Random(seed)
    made = []
    for index in range(groups):
        error = draw.lognormvariate(-8, 1.5)
        size, rows = draw.randint(1, 400), draw.choice((2, 512))
        errors = {"nvfp4": error, "fp8": error * draw.uniform(0.02, 0.5), "bf16": 0.0}
        fit = ranks[: draw.randint(0, len(ranks))]
        branches = {ranked(rank): Branch(rank, rank * size, rank * size * rows // 64) for rank in fit}
        errors |= {choice: error * draw.uniform(0.05, 0.9) for choice in branches}
        made.append(Group((f"linear{index}",), 64 * size, size * rows, errors, branches))
    return Sensitivity(tuple(made), launch_cost=draw.choice((0.0, 3000.0)))


@pytest.mark.parametrize("of", UNITS)
@pytest.mark.parametrize(("groups", "ranks", "seed"), [(7, (), 0), (7, (), 1), (5, (1, 4), 2), (6, (2,), 3)])
def test_no_other_choice_within_the_budget_has_a_smaller_error(
    of: str, groups: int, ranks: Sequence[int], seed: int
) -> None:
    sensitivity = _random(groups, seed, ranks)
    names = [group.linears[0] for group in sensitivity.groups]
    every = itertools.product(*(group.errors for group in sensitivity.groups))
    choices = [dict(zip(names, kinds, strict=True)) for kinds in every]
    priced = [(max(sensitivity.spent(each, unit) for unit in UNITS[of]), each) for each in choices]
    for budget in (0.0, 0.07, 0.3, 1.0, 4.0):
        best = min(sensitivity.predicted(each) for price, each in priced if price <= budget)
        chosen = allocate(sensitivity, budget, of, (*BITS, *map(ranked, ranks)))
        assert sensitivity.predicted(chosen) == pytest.approx(best, rel=1e-5)
        assert all(sensitivity.spent(chosen, unit) <= budget + 1e-6 for unit in UNITS[of])


def test_the_verb_is_there_from_python() -> None:
    assert calibration.search is search


def test_a_budget_of_one_pays_for_everything_in_fp8() -> None:
    sensitivity = _random(9, 0)
    every = dict.fromkeys((group.linears[0] for group in sensitivity.groups), "fp8")
    assert [sensitivity.spent(every, unit) for unit in ("flops", "bytes")] == pytest.approx([1, 1])
    assert set(allocate(sensitivity, 1, "both", ("nvfp4", "fp8")).values()) == {"fp8"}
    assert set(allocate(sensitivity, 4).values()) == {"bf16"}


@pytest.mark.slow
def test_the_error_of_a_group_is_that_of_the_whole_model_with_its_linears_exchanged(
    found: Sensitivity, digits: Path, five_calls: Path, tmp_path: Path
) -> None:
    calls = spread(captured_from(digits, five_calls).calls, CALLS)
    plain = load_source(digits)
    checkpoints = {}
    for kind in ("nvfp4", "fp8"):
        formats = FormatRules.model_validate({"default": kind})
        recipe = load_recipe("nvfp4-ptq").model_copy(update={"formats": formats})
        quantize(digits, tmp_path / kind, recipe=recipe, calibration=five_calls)
        checkpoints[kind] = load(tmp_path / kind)
    with torch.no_grad():
        wanted = [plain(**call, return_dict=False) for call in calls]
        for group in (found.groups[2], found.groups[-2]):
            for kind, checkpoint in checkpoints.items():
                model = load_source(digits)
                for path in group.linears:
                    model.set_submodule(path, checkpoint.get_submodule(path))
                outputs = [model(**call, return_dict=False) for call in calls]
                assert group.errors[kind] == relative_error(outputs, wanted) - found.base > 0


@pytest.mark.slow
def test_what_the_groups_add_up_to_is_what_the_mixture_has(searched: Path) -> None:
    points = load_json(searched / DATA)["frontier"]
    assert [point["budget"] for point in points] == sorted(point["budget"] for point in points)
    for point in points:
        assert point["predicted"] == pytest.approx(point["measured"], rel=0.25)
        assert max(point["flops"], point["bytes"]) <= point["budget"] + 1e-6
    assert points[-1]["measured"] < 0.5 * points[0]["measured"]


@pytest.mark.slow
def test_the_choice_is_better_than_others_of_its_price(found: Sensitivity) -> None:
    """By prediction, which the test before holds to what is measured."""
    (best,) = frontier(found, [0.2], "both", tuple(BITS))
    groups, draw = list(found.groups), random.Random(0)
    for _ in range(50):
        draw.shuffle(groups)
        formats = dict.fromkeys((group.linears[0] for group in groups), "nvfp4")
        for group in groups:
            tried = {**formats, group.linears[0]: "fp8"}
            if max(found.spent(tried, unit) for unit in UNITS["both"]) <= 0.2:
                formats = tried
        assert found.predicted(formats) > best.predicted


@pytest.mark.slow
def test_the_recipe_quantizes_as_it_was_chosen(searched: Path, digits: Path, five_calls: Path, tmp_path: Path) -> None:
    result = load_json(searched / DATA)
    chosen = next(point for point in result["frontier"] if point["budget"] == result["budget"])["formats"]
    quantize(digits, tmp_path / "mixed", recipe=searched / RECIPE, calibration=five_calls)
    checkpoint = read(tmp_path / "mixed")
    stored = {**dict.fromkeys(checkpoint.quantized, "nvfp4"), **dict.fromkeys(checkpoint.fp8, "fp8")}
    config = load_json(digits / "config.json")
    for group in family_of(config).groups(config):
        assert {stored.get(path, "bf16") for path in group} == {chosen[group[0]]}
    assert checkpoint.manifest["recipe"]["name"] == "nvfp4-ptq-both-20"
    assert sorted(path.name for path in searched.iterdir()) == sorted((DATA, RECIPE, PICTURE))


@pytest.mark.slow
def test_another_budget_needs_no_other_measurement(digits: Path, searched: Path, tmp_path: Path) -> None:
    search(digits, tmp_path / "same", 0.2, recipe="nvfp4-ptq", sensitivity=searched / DATA)
    assert (tmp_path / "same" / RECIPE).read_bytes() == (searched / RECIPE).read_bytes()
    search(digits, tmp_path / "less", 0.05, of="flops", recipe="nvfp4-ptq", bf16=False, sensitivity=searched / DATA)
    rules = yaml.safe_load((tmp_path / "less" / RECIPE).read_text())["formats"]["rules"]
    assert [rule["format"] for rule in rules] == ["fp8"]


@pytest.mark.slow
def test_a_recipe_that_trains_is_searched_by_what_it_starts_from(digits: Path, searched: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "qat.yaml"
    method = {"name": "qat", "start": "nvfp4-ptq", "steps": 10, "learning_rate": 1e-4}
    recipe.write_text(yaml.safe_dump({"name": "mine", "method": method, "attention": "fp8"}))
    search(digits, tmp_path / "found", 0.2, recipe=recipe, sensitivity=searched / DATA)
    written = load_recipe(tmp_path / "found" / RECIPE)
    assert (written.method.name, written.attention) == ("qat", "fp8")
    assert written.formats == load_recipe(searched / RECIPE).formats


@pytest.mark.slow
def test_an_interrupted_search_goes_on_and_ends_with_the_same_bytes(
    digits: Path,
    searched: Path,
    five_calls: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measure, measured = measurement.relative_error, []
    inner = "calibration.layer_choice.measurement.relative_error"

    def interrupt(*of: object) -> float:
        measured.append(of)
        if len(measured) == 30:
            raise KeyboardInterrupt
        return measure(*of)

    monkeypatch.setattr(inner, interrupt)
    options = {"-o": tmp_path / "found", "--fp8-budget": 0.2, "--recipe": "nvfp4-ptq", "--calls": CALLS}
    options |= {"--calibration": five_calls}
    arguments = ["search", str(digits), *(str(word) for option in options.items() for word in option)]
    assert fp4trt.run(arguments) == 2
    assert "keeps what is finished" in capsys.readouterr().err
    assert not (tmp_path / "found").exists()
    before = len(measured)
    assert fp4trt.run(arguments) == 0
    groups = len(json.loads((searched / DATA).read_text())["sensitivity"]["groups"])
    assert len(measured) - before == 2 * groups - 20  # the first block has ten
    for name in (DATA, RECIPE):
        assert (tmp_path / "found" / name).read_bytes() == (searched / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


@pytest.mark.slow
def test_what_cannot_be_searched_is_refused_in_one_line(
    digits: Path, searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(expected: type[Exception], message: str, **options: object) -> None:
        with pytest.raises(expected, match=message) as raised:
            search(digits, tmp_path / "out", 0.2, **options)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.glob("out*")) == []

    refused(BadRecipe, "says which linears", recipe=searched / RECIPE)
    refused(BadInputs, "was measured with nvfp4-ptq", sensitivity=searched / DATA)
    refused(BadInputs, "is not a file", sensitivity=tmp_path / "nothing.json")
    refused(BadInputs, "is not a file", sensitivity=tmp_path)
    refused(BadInputs, "was not written by fp4trt search", sensitivity=_json(tmp_path / "a.json", {}))
    for kind, value in (("nvfp4", float("nan")), ("fp8", -1), ("bf16", "a"), ("other", 0.1)):
        refused(
            BadInputs, "is damaged", recipe="nvfp4-ptq", sensitivity=_changed(searched, tmp_path, "errors", kind, value)
        )
    for size, value in (("flops", float("inf")), ("parameters", 7)):
        refused(
            BadInputs, "other linears", recipe="nvfp4-ptq", sensitivity=_changed(searched, tmp_path, size, "", value)
        )
    other = load_json(searched / DATA)
    other["sensitivity"]["groups"].pop()
    refused(BadInputs, "other linears", recipe="nvfp4-ptq", sensitivity=_json(tmp_path / "c.json", other))
    refused(BadInputs, "needs captured inputs", calibration=_json(tmp_path / "amax.json", {}))


@pytest.mark.parametrize("budget", ["nan", "inf", "-1", "4.5"])
def test_a_budget_that_is_none_is_refused_at_once(
    digits: Path, budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["search", str(digits), "-o", str(tmp_path / "out"), "--fp8-budget", budget]) == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def _changed(searched: Path, folder: Path, key: str, kind: str, value: object) -> Path:
    result = load_json(searched / DATA)
    group = result["sensitivity"]["groups"][0]
    if kind:
        group[key][kind] = value
    else:
        group[key] = value
    return _json(folder / "changed.json", result)


def _json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path
