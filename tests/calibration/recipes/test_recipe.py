"""Recipes are checked key by key, and against the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import fp4trt
from calibration.inputs.captured import load_inputs, save_inputs
from calibration.quantization import quantize
from calibration.recipes.recipe import FormatRules, Rule, linear_formats, load_recipe, preset_names
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadRecipe
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.number_formats import NAMES

MODULATION = "*.norm*.linear"


def _written(folder: Path, **changes: object) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "method": {"name": "ptq"}, **changes}), encoding="utf-8")
    return path


def _formats(digits: Path, **rules: object) -> dict[str, str]:
    config = load_json(digits / "config.json")
    family, tensors = family_of(config), tensors_in_folder(digits)
    shapes = {path: tensors[f"{path}.weight"].shape for path in family.quantized(config)}
    return linear_formats(FormatRules.model_validate(rules), family, config, shapes)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_named_as_its_file_and_says_what_it_does(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methd": 1}, "there is no key methd; expected one of: name, description, method, formats, attention"),
        ({"method": {"name": "magic"}}, "method is {name: magic}; expected a method whose name is one of: 'ptq', "),
        ({"method": "ptq"}, "method is 'ptq'; expected a mapping of keys"),
        ({"method": {}}, "method.name is missing"),
        ({"method": {"name": "svdquant", "rank": 0}}, "rank is 0; expected 1 at least"),
        ({"method": {"name": "svdquant", "rank": "x"}}, "rank is 'x'; expected a whole number"),
        ({"method": {"name": "quality", "rank": True}}, "method.rank is true; expected a whole number"),
        ({"method": {"name": "quality", "rank": "8"}}, "method.rank is '8'; expected a whole number"),
        ({"method": {"name": "quality", "gptq": 1}}, "method.gptq is 1; expected true or false"),
        ({"method": {"name": "quality", "wiener": True}}, "method.wiener is true; expected a finite number"),
        ({"method": {"name": "qat", "steps": 1, "learning_rate": float("inf")}}, "learning_rate is .inf; expected a"),
        ({"str": 3}, "there is no key str; expected one of: name, description"),
        ({"method": {"name": "quality", "strange": 1}}, "there is no key method.strange; expected one of: name, shift"),
        ({"method": {"name": "quality", "wiener": float("nan")}}, "method.wiener is .nan; expected a finite number"),
        ({"description": None}, "description is null; expected a string"),
        ({"name": "!" * 5000}, "name is '!!!"),
        ({"method": {"name": "qat"}}, "method.steps and method.learning_rate are missing"),
        (
            {"method": {"name": "qat", "steps": 1, "learning_rate": "1e-4", "start": "nvfp4"}},
            "mine: method.start: there is no recipe 'nvfp4'; choose one of: ",
        ),
        (
            {"method": {"name": "qat", "steps": 1, "learning_rate": "1e-4", "start": "nvfp4-qat"}},
            "mine starts from nvfp4-qat, which trains too; expected one that does not",
        ),
        (
            {"method": {"name": "qat", "steps": 1, "learning_rate": 1, "start": "nvfp4-ptq", "learn": "branch"}},
            "its start nvfp4-ptq makes none; expected one like nvfp4-quality-r8",
        ),
        ({"description": 3}, "description is 3; expected a string"),
        ({"formats": {"defalt": "bf16"}}, "there is no key formats.defalt; expected one of: default, min_size, rules"),
        ({"formats": {"default": "int3"}}, "formats.default is 'int3'; expected 'nvfp4', "),
        ({"formats": {"rules": [{"linear": "*"}]}}, "formats.rules.0.format is missing"),
        (
            {"formats": {"rules": [{"linear": "*", "format": "fp8"}]}},
            "there is no key formats.rules.0.linear; expected one of: linears, blocks, format",
        ),
        (
            {"formats": {"rules": [{"format": "fp8"}]}},
            "formats.rules.0 is {format: fp8}; expected linears, blocks or both",
        ),
        (
            {"formats": {"rules": [{"blocks": {"last": 0}, "format": "fp8"}]}},
            "formats.rules.0.blocks is {last: 0}; expected first, last or both",
        ),
        (
            {"formats": {"rules": [{"blocks": {"frist": 1}, "format": "fp8"}]}},
            "there is no key formats.rules.0.blocks.frist; expected one of: first, last, stack",
        ),
        ({"formats": {"rules": [{"blocks": 3, "format": "fp8"}]}}, "0.blocks is 3; expected a mapping of keys"),
        (
            {"formats": {"rules": [{"blocks": {"first": -1}, "format": "fp8"}]}},
            "formats.rules.0.blocks.first is -1; expected 0 at least",
        ),
        (
            {"formats": {"rules": [{"blocks": {"first": True}, "format": "fp8"}]}},
            "formats.rules.0.blocks.first is true; expected a whole number",
        ),
        (
            {"formats": {"rules": [{"linears": 3, "format": "fp8"}]}},
            "rules.0.linears is 3; expected a pattern of",
        ),
        (
            {"formats": {"rules": [{"linears": [], "format": "fp8"}]}},
            "linears is []; expected a pattern of module paths",
        ),
        ({"formats": {"rules": {"a": 1}}}, "formats.rules is {a: 1}; expected a list"),
        (
            {"formats": {"rules": {"a": [None, True, "8", {"b": 1.5}]}}},
            "formats.rules is {a: [null, true, '8', {b: 1.5}]}; expected a list",
        ),
        ({"formats": 7}, "formats is 7; expected a mapping of keys"),
        ({"method": {"name": "quality", "ranks": [{"linears": "*"}]}}, "ranks.0.rank is missing"),
        ({"method": {"name": "quality", "ranks": [{"linears": 3, "rank": 1}]}}, "linears is 3; expected a pattern of"),
        ({"method": {"name": "quality", "ranks": [{"linears": "*", "rank": -1}]}}, "rank is -1; expected 0 at least"),
        (
            {"method": {"name": "quality", "ranks": [{"linears": "*", "rank": 1, "format": "fp8"}]}},
            "ranks.0.format; expected one of: linears, blocks, rank",
        ),
        ({"method": {"name": "ptq", "ranks": []}}, "there is no key method.ranks; expected one of: name"),
        ({"method": {"name": "svdquant", "alpha_step": 1e-9}}, "alpha_step"),
        ({"attention": "int8"}, "attention is 'int8'"),
        ({"name": "No Name"}, "name is 'No Name'"),
    ],
)
def test_a_recipe_with_a_mistake_is_refused_in_one_line_that_names_the_key(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadRecipe) as raised:
        load_recipe(_written(tmp_path, **changes))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


_DEEP = ("name: " + "[" * depth + "]" * depth for depth in (300, 350, 400, 3000))


@pytest.mark.parametrize("text", ["- a list", "{", "\x00", *_DEEP])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadRecipe, match=r"mine\.yaml") as raised:
        load_recipe(path)
    assert "\n" not in str(raised.value)


def test_an_unknown_recipe_ends_with_status_2(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fp4trt.run(["quantize", str(digits), "-o", str(tmp_path / "out"), "--recipe", "nvfp5"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert fp4trt.run(["recipes", str(tmp_path / "absent.yaml")]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\nmethod: {name: ptq}\n", "the key name is there twice"),
        ("name: 2020-99-99\nmethod: {name: ptq}\n", "is not YAML"),
        (f"name: a\nmethod: {{name: svdquant, rank: {'9' * 5000}}}\n", "is not YAML"),
    ],
)
def test_what_yaml_cannot_say_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadRecipe, match=message) as raised:
        load_recipe(tmp_path / "mine.yaml")
    assert "\n" not in str(raised.value)


def test_a_pattern_that_matches_nothing_is_refused(digits: Path) -> None:
    with pytest.raises(BadRecipe, match="matches no linear"):
        _formats(digits, rules=[{"linears": "*.norm7.*", "format": "bf16"}])


def test_two_rules_for_one_linear_are_refused(digits: Path) -> None:
    rules = [{"linears": MODULATION, "format": "bf16"}, {"linears": "transformer_blocks.0.*", "format": "nvfp4"}]
    with pytest.raises(BadRecipe, match=r"two rules name transformer_blocks\.0\.norm1\.linear"):
        _formats(digits, rules=rules)


def test_a_rule_must_not_split_what_is_one_gemm(digits: Path) -> None:
    with pytest.raises(BadRecipe, match="one GEMM"):
        _formats(digits, rules=[{"linears": "*.to_q", "format": "bf16"}])


def test_rules_that_leave_nothing_to_quantize_are_refused(digits: Path) -> None:
    with pytest.raises(BadRecipe, match="every linear in bf16"):
        _formats(digits, default="bf16")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"linears": "*.norm7.*", "rank": 2}], "the rule for '*.norm7.*' matches no linear"),
        (
            [{"linears": MODULATION, "rank": 2}, {"linears": ["*.norm1.linear"], "rank": 3}],
            f"two rules name transformer_blocks.0.norm1.linear: '{MODULATION}' (rank 2) and '*.norm1.linear' (rank 3)",
        ),
        ([{"linears": "*.to_q", "rank": 2}], "share a branch get several ranks (transformer_blocks.0.attn.to_q 2, "),
        ([{"linears": "*.norm1.linear", "rank": 129}], "method.ranks says 129, and transformer_blocks.0.norm1.linear"),
    ],
)
def test_rules_for_ranks_that_the_model_cannot_have_are_refused_in_one_line(
    rules: list[dict[str, object]], message: str, digits: Path, tmp_path: Path
) -> None:
    recipe = _written(tmp_path, method={"name": "quality", "ranks": rules})
    with pytest.raises(BadRecipe) as raised:
        quantize(digits, tmp_path / "out", recipe=recipe)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_recipe_shows_its_ranks_and_without_any_is_recorded_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = [{"linears": ["*.to_out.0", "*.proj_out"], "rank": 4}, {"linears": MODULATION, "rank": 0}]
    recipe = _written(tmp_path, method={"name": "quality", "rank": 1, "ranks": rules, "rank_multiple": 2})
    assert fp4trt.run(["recipes", str(recipe)]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    shown = load_recipe(tmp_path / "shown.yaml")
    assert shown == load_recipe(recipe)
    assert shown.resolved()["method"]["ranks"] == rules
    paths = ("a.proj_out", "a.norm.linear", "a.proj_mlp")
    assert [shown.method.pooled_rank([path]) for path in paths] == [4, 0, 2]
    plain = load_recipe("nvfp4-quality-r8")
    assert (plain.described()["method"]["ranks"], "ranks" in plain.resolved()["method"]) == ([], False)


def test_the_size_rule_looks_at_both_sizes_of_the_weight_and_at_the_rows(digits: Path) -> None:
    formats = _formats(digits, min_size=16)  # 16 image tokens, 8 text tokens, one row of modulation
    assert formats["transformer_blocks.0.attn.to_q"] == "nvfp4"
    assert formats["transformer_blocks.0.attn.add_q_proj"] == "bf16"
    assert formats["single_transformer_blocks.0.proj_out"] == "nvfp4"
    assert formats["single_transformer_blocks.0.norm.linear"] == "bf16"
    kept = _formats(digits, min_size=16, rules=[{"linears": "*.norm.linear", "format": "nvfp4"}])
    assert kept["single_transformer_blocks.0.norm.linear"] == "nvfp4"


def test_linears_that_a_rule_leaves_in_bf16_are_stored_as_they_were(
    digits: Path, five_calls: Path, tmp_path: Path
) -> None:
    rules = FormatRules(rules=(Rule(linears=MODULATION, format="bf16"),))
    quantize(digits, tmp_path / "out", recipe=_written(tmp_path, formats=rules.model_dump()), calibration=five_calls)
    manifest = load_json(tmp_path / "out" / "fp4trt.json")
    assert manifest["recipe"] == {
        "name": "mine",
        "method": {"name": "ptq"},
        "formats": {"default": "nvfp4", "min_size": 0, "rules": [{"linears": MODULATION, "format": "bf16"}]},
        "attention": "bf16",
    }
    assert len(manifest["quantized"]["nvfp4"]) == 20 - 2 - 1
    name = "transformer_blocks.0.norm1.linear.weight"
    assert (tensors_in_folder(tmp_path / "out")[name].bytes() == tensors_in_folder(digits)[name].bytes()).all()


def test_calibration_data_of_a_part_of_the_schedule_give_a_warning_that_the_manifest_keeps(
    digits: Path, quantized_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = load_inputs(quantized_digits / "calibration" / "inputs.safetensors")[:10]  # the schedule, once
    save_inputs(tmp_path / "inputs.safetensors", [call for call in calls if float(call["timestep"][0]) > 0.5])
    quantize(digits, tmp_path / "out", recipe="nvfp4-ptq", calibration=tmp_path / "inputs.safetensors")
    (warning,) = load_json(tmp_path / "out" / "fp4trt.json")["calibration"]["warnings"]
    assert "no step between timestep 0.00 and 0.60" in warning
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert "warnings" not in load_json(quantized_digits / "fp4trt.json")["calibration"]


def test_the_documents_name_every_recipe_and_every_format() -> None:
    root = Path(__file__).parents[3]
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in preset_names():
        assert f"`{name}`" in readme or f"`{name.removeprefix('nvfp4-modelopt')}`" in readme, name
    lines = (root / "docs" / "command-line.md").read_text(encoding="utf-8").splitlines()
    (told,) = (line for line in lines if line.startswith("| `formats.default`"))
    assert [name for name in NAMES if f"`{name}`" not in told] == []
