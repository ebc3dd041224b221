"""Low-rank branches are bought where they spare the model's output most, and the recipe says which."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import fp4trt
from calibration.checkpoints.quantized import read
from calibration.layer_choice.allocation import allocate
from calibration.layer_choice.search import DATA, PICTURE, RECIPE, search
from calibration.layer_choice.sensitivity import BITS, LAUNCH, Branch, Group, Sensitivity
from calibration.quantization import quantize
from calibration.recipes.recipe import load_recipe
from fp4trt.errors import BadInputs, BadOption, BadRecipe
from fp4trt.families import family_of
from fp4trt.json_file import load_json


@pytest.fixture(scope="module")
def searched(digits: Path, five_calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search by a quick ``quality`` and over ranks, one of which not all groups can have; not to be changed."""
    folder = tmp_path_factory.mktemp("ranks")
    method = {"name": "quality", "sequential": False, "descent_sweeps": 0, "smooth_fold": False, "rank_multiple": 2}
    (folder / "quick.yaml").write_text(yaml.safe_dump({"name": "quick", "method": method}))
    options = ["--recipe", folder / "quick.yaml", "--calibration", five_calls, "--calls", 2, "--fp8-budget", 0.2]
    options += ["--rank", 64, "--rank", 3, "--launch-cost", 0]
    assert fp4trt.run(["search", str(digits), "-o", str(folder / "found"), *map(str, options)]) == 0
    return folder / "found"


def test_the_price_of_a_branch_is_that_of_its_products_its_bytes_and_its_kernels() -> None:
    branch = Branch(8, 8 * (64 + 128), 2 * 8 * (64 + 128) * 10)
    errors = {"nvfp4": 0.2, "fp8": 0.1, "bf16": 0.0}
    group = Group(("a",), 64 * 128, 2 * 64 * 128 * 10, {**errors, "nvfp4-r8": 0.1}, {"nvfp4-r8": branch})
    sensitivity = Sensitivity((group, Group(("b",), 300, 5000, errors)), launch_cost=70)
    flops, parameters = group.flops + 5000, group.parameters + 300
    assert sensitivity.price(group, "nvfp4-r8", "flops") == pytest.approx((4 * branch.flops + 2 * 70) / flops)
    assert sensitivity.price(group, "nvfp4-r8", "bytes") == pytest.approx(16 / 3.5 * branch.parameters / parameters)
    chosen = {"a": "nvfp4-r8", "b": "nvfp4"}
    plain = {"a": "nvfp4", "b": "nvfp4"}
    assert sensitivity.weight_bytes(chosen) - sensitivity.weight_bytes(plain) == 2 * branch.parameters
    assert Sensitivity.from_dict(json.loads(json.dumps(sensitivity.as_dict()))) == sensitivity
    assert "branches" not in str(Sensitivity((Group(("b",), 1, 1, errors),)).as_dict())
    dear = replace(sensitivity, launch_cost=LAUNCH)
    assert allocate(dear, 1, "flops", ("nvfp4", "nvfp4-r8")) == plain


def test_ranks_are_measured_where_they_fit_and_make_the_frontier_no_worse(searched: Path, digits: Path) -> None:
    result = load_json(searched / DATA)
    assert (result["ranks"], result["launch_cost"]) == ([3, 64], 0)
    found = Sensitivity.from_dict(result["sensitivity"])
    for group in found.groups:
        members = len(group.linears)
        pooled = {"nvfp4-r3": {1: 4, 3: 10, 4: 12}[members]} | ({"nvfp4-r64": 64} if members == 1 else {})
        assert {name: branch.rank for name, branch in group.branches.items()} == pooled
    ranked, plain = (sum(group.errors[kind] for group in found.groups) for kind in ("nvfp4-r3", "nvfp4"))
    assert ranked < 0.9 * plain
    for point, without in zip(result["frontier"], result["frontier_without_ranks"], strict=True):
        assert point["budget"] == without["budget"]
        assert point["predicted"] <= without["predicted"] * (1 + 1e-6)
        assert point["predicted"] == pytest.approx(point["measured"], rel=0.25)
        assert set(point["formats"].values()) <= BITS.keys()
        assert "ranks" not in without
    assert any(point["ranks"] for point in result["frontier"])
    assert (searched / PICTURE).is_file()


def test_the_recipe_searched_quantizes_as_it_was_chosen(
    searched: Path, digits: Path, five_calls: Path, tmp_path: Path
) -> None:
    result = load_json(searched / DATA)
    chosen = next(point for point in result["frontier"] if point["budget"] == result["budget"])
    branches = {group["linears"][0]: group["branches"] for group in result["sensitivity"]["groups"]}
    quantize(digits, tmp_path / "mixed", recipe=searched / RECIPE, calibration=five_calls)
    checkpoint = read(tmp_path / "mixed")
    assert {checkpoint.rank(path) for path in checkpoint.quantized} > {0}
    config = load_json(digits / "config.json")
    for group in family_of(config).groups(config):
        rank = chosen["ranks"].get(group[0])
        wanted = branches[group[0]][f"nvfp4-r{rank}"]["rank"] if rank else 0
        assert {(checkpoint.formats.get(path, "bf16"), checkpoint.rank(path)) for path in group} == {
            (chosen["formats"][group[0]], wanted)
        }
    told = checkpoint.config["quantization_config"]["quantized_layers"]
    assert {path for path, layer in told.items() if layer["quant_algo"] == "NVFP4_SVD"} == set(checkpoint.branched)
    assert checkpoint.manifest["recipe"]["name"] == "quick-ranks-both-20"


def test_ranks_that_cannot_be_searched_are_refused_in_one_line(searched: Path, digits: Path, tmp_path: Path) -> None:
    def refused(message: str, **options: object) -> None:
        with pytest.raises((BadInputs, BadOption, BadRecipe), match=message) as raised:
            search(digits, tmp_path / "out", 0.2, **options)
        assert "\n" not in str(raised.value)
        assert list(tmp_path.iterdir()) == []

    quick = searched.parent / "quick.yaml"
    refused("of the method ptq; expected one of the method quality", recipe="nvfp4-ptq", ranks=[8])
    refused("says which linears get which rank", recipe="nvfp4-quality-r8", ranks=[8])
    refused("says which linears get which format", recipe=searched / RECIPE, ranks=[8])
    refused("rank 1000 is too large for every group", ranks=[8, 1000])
    refused("ranks is .0.; expected whole numbers, 1 at least, in a list", ranks=[0])
    refused("a launch cost is given and no rank", launch_cost=0)
    refused("the launch cost is nan", ranks=[8], launch_cost=float("nan"))
    refused("was measured with the ranks 3, 64, and not with 8", recipe=quick, ranks=[8], sensitivity=searched / DATA)


def test_a_search_over_ranks_serves_one_without_and_says_where_no_branch_is_within_the_budget(
    searched: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick, data = searched.parent / "quick.yaml", searched / DATA
    plain = search(digits, tmp_path / "plain", 0.2, recipe=quick, sensitivity=data)
    assert plain["ranks"] is None
    wanted = [point["predicted"] for point in load_json(data)["frontier_without_ranks"]]
    assert [point["predicted"] for point in plain["frontier"]] == wanted
    assert "ranks" not in load_recipe(tmp_path / "plain" / RECIPE).resolved()["method"]
    dear = search(digits, tmp_path / "dear", 0.2, recipe=quick, sensitivity=data, ranks=[3])
    assert "no branch is within the budget" in capsys.readouterr().err
    assert dear["frontier"][4]["ranks"] == {}
