"""Rules pick linears by the place of their block, whatever the depth of the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import fp4trt
from calibration.methods.plan import checked
from calibration.quantization import quantize
from calibration.recipes.recipe import FormatRules, Recipe, linear_formats, load_recipe
from calibration.recipes.selection import Blocks
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadRecipe
from fp4trt.families import family_named
from fp4trt.json_file import load_json

SIZES = {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 16, "joint_attention_dim": 32}
FLUX = {**SIZES, "pooled_projection_dim": 32, "num_layers": 3, "num_single_layers": 4}
WAN = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "in_channels": 4, "out_channels": 4}
WAN |= {"freq_dim": 32, "text_dim": 32, "patch_size": [1, 2, 2], "cross_attn_norm": True}
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def _kept(rules: list[dict[str, Any]], family: str, config: dict[str, Any]) -> list[str]:
    """Return the linears that rules leave in BF16."""
    known = family_named(family)
    formats = FormatRules.model_validate({"rules": rules})
    found = linear_formats(formats, known, config, known.linears(config))
    return [path for path, kind in found.items() if kind == "bf16"]


def _blocks(paths: list[str]) -> list[str]:
    """Return the blocks that linears lie in, in order."""
    return list(dict.fromkeys(re.sub(r"(?<=\.\d)\..*", "", path) for path in paths))


@pytest.mark.parametrize(
    ("preset", "family", "config", "kept"),
    [
        ("nvfp4-quality-first-last-3", "wan", {**WAN, "num_layers": 40}, [0, 1, 2, 37, 38, 39]),
        ("nvfp4-quality-first-last-3", "wan", {**WAN, "num_layers": 30}, [0, 1, 2, 27, 28, 29]),
        ("nvfp4-quality-first-last-2", "qwen-image", {**SIZES, "out_channels": 4, "num_layers": 60}, [0, 1, 58, 59]),
    ],
)
def test_the_presets_keep_all_linears_of_the_first_and_last_blocks_of_models_of_any_depth(
    preset: str, family: str, config: dict[str, Any], kept: list[int]
) -> None:
    known, stack = family_named(family), family_named(family).stacks[0].path
    formats = linear_formats(load_recipe(preset).formats, known, config, known.linears(config))
    inside = tuple(f"{stack}.{index}." for index in kept)
    assert formats == {path: "bf16" if path.startswith(inside) else "nvfp4" for path in known.quantized(config)}


def test_blocks_are_counted_over_all_stacks_in_the_order_in_which_they_run_or_in_one() -> None:
    def kept(**blocks: object) -> list[str]:
        return _blocks(_kept([{"blocks": blocks, "format": "bf16"}], "flux", FLUX))

    assert kept(first=4, last=1) == [f"{DOUBLE}.0", f"{DOUBLE}.1", f"{DOUBLE}.2", f"{SINGLE}.0", f"{SINGLE}.3"]
    assert kept(last=2) == [f"{SINGLE}.2", f"{SINGLE}.3"]
    assert kept(first=1, last=1, stack=DOUBLE) == [f"{DOUBLE}.0", f"{DOUBLE}.2"]
    assert kept(first=1, stack=SINGLE) == [f"{SINGLE}.0"]


def test_the_refiners_of_z_image_come_first_unless_its_layers_are_named() -> None:
    z_image = family_named("z-image")
    config = {"n_layers": 5, "n_refiner_layers": 2}
    assert Blocks(first=3, last=1).paths(z_image, config) == (
        "noise_refiner.0",
        "noise_refiner.1",
        "context_refiner.0",
        "layers.4",
    )
    assert Blocks(first=1, last=1, stack="layers").paths(z_image, config) == ("layers.0", "layers.4")


def test_a_linear_has_to_match_the_pattern_and_lie_in_the_blocks() -> None:
    rules = [{"linears": ["*.norm1.linear", "*.norm.linear"], "blocks": {"first": 2, "last": 1}, "format": "bf16"}]
    assert _kept(rules, "flux", FLUX) == [
        f"{DOUBLE}.0.norm1.linear",
        f"{DOUBLE}.1.norm1.linear",
        f"{SINGLE}.3.norm.linear",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"blocks": {"first": 5, "last": 3}}],
            "a rule is for the first 5 blocks and the last 3 blocks, and this model (flux) has 7; expected no more",
        ),
        (
            [{"blocks": {"last": 4, "stack": DOUBLE}}],
            f"a rule is for the last 4 blocks of {DOUBLE}, and this model (flux) has 3; expected no more than that",
        ),
        (
            [{"blocks": {"last": 1, "stack": "layers"}}],
            f"flux has no stack 'layers'; expected one of: {DOUBLE}, {SINGLE}",
        ),
        (
            [{"linears": "*.norm1.linear", "blocks": {"last": 1}}],
            "the rule for '*.norm1.linear' in the last block matches no linear that flux can quantize; expected a",
        ),
        (
            [{"blocks": {"first": 1}}, {"linears": "*.norm1.linear"}],
            f"two rules name {DOUBLE}.0.norm1.linear: '*' in the first block (bf16) and '*.norm1.linear' (bf16)",
        ),
        ([{"blocks": {"first": 3, "last": 4}}], "the rules leave every linear in bf16"),
        (
            [{"linears": "*.to_q", "blocks": {"first": 1}}],
            f"linears that are one GEMM get several formats ({DOUBLE}.0.attn.to_q bf16, ",
        ),
    ],
)
def test_rules_for_blocks_that_the_model_does_not_have_are_refused_in_one_line(
    rules: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(BadRecipe) as raised:
        _kept([{**rule, "format": "bf16"} for rule in rules], "flux", FLUX)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_recipe_that_names_blocks_is_shown_as_it_is_and_is_itself_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {
        "name": "mine",
        "method": {"name": "ptq"},
        "formats": {"rules": [{"blocks": {"last": 3}, "format": "bf16"}]},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    assert fp4trt.run(["recipes", str(tmp_path / "mine.yaml")]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    shown = load_recipe(tmp_path / "shown.yaml")
    assert shown == load_recipe(tmp_path / "mine.yaml")
    rule = {"linears": "*", "blocks": {"first": 0, "last": 3}, "format": "bf16"}
    assert yaml.safe_load((tmp_path / "shown.yaml").read_text())["formats"]["rules"] == [rule]
    assert shown.resolved()["formats"]["rules"] == [rule]


def test_a_checkpoint_keeps_the_blocks_as_they_were_and_the_recipe_as_it_was_said(
    digits: Path, five_calls: Path, tmp_path: Path
) -> None:
    rule = {"linears": "*", "blocks": {"first": 1, "last": 0}, "format": "bf16"}
    recipe = tmp_path / "mine.yaml"
    said = {
        "name": "mine",
        "method": {"name": "ptq"},
        "formats": {"rules": [{"blocks": {"first": 1}, "format": "bf16"}]},
    }
    recipe.write_text(yaml.safe_dump(said), encoding="utf-8")
    quantize(digits, tmp_path / "out", recipe=recipe, calibration=five_calls)
    manifest = load_json(tmp_path / "out" / "fp4trt.json")
    assert manifest["recipe"]["formats"]["rules"] == [rule]
    assert {path.partition(".")[0] for path in manifest["quantized"]["nvfp4"]} == {SINGLE}
    made, plain = tensors_in_folder(tmp_path / "out"), tensors_in_folder(digits)
    kept = [name for name in plain if name.startswith(f"{DOUBLE}.0.")]
    assert len(kept) > 14
    assert all((made[name].bytes() == plain[name].bytes()).all() for name in kept)


def test_rules_for_ranks_pick_blocks_too(digits: Path, five_calls: Path, tmp_path: Path) -> None:
    fast = {"gptq": False, "descent_sweeps": 0, "sequential": False, "wiener": 0, "shift_fold": False}
    ranks = [
        {"blocks": {"first": 1}, "rank": 2},
        {"linears": ["*.norm.linear", "*.proj_out"], "blocks": {"last": 1}, "rank": 1},
    ]
    method = {"name": "quality", "ranks": ranks, "smooth_fold": False, **fast}
    recipe = Recipe.model_validate({"name": "mine", "method": method})
    quantize(digits, tmp_path / "out", recipe=recipe, calibration=five_calls)
    made = tensors_in_folder(tmp_path / "out")
    factors = {name.removesuffix(".svdquant_lora_a"): made[name].shape[0] for name in made if name.endswith("lora_a")}
    assert factors.pop(f"{SINGLE}.0.norm.linear") == factors.pop(f"{SINGLE}.0.proj_out") == 1
    assert factors.pop(f"{DOUBLE}.0.attn.to_q") == 2 * 3
    assert all(path.startswith(f"{DOUBLE}.0.") for path in factors)
    assert len(factors) == 14 - 1
    assert load_json(tmp_path / "out" / "fp4trt.json")["recipe"]["method"]["ranks"][0]["blocks"]["first"] == 1


def test_ranks_for_more_blocks_than_there_are_are_refused(digits: Path) -> None:
    ranks = [{"blocks": {"first": 3}, "rank": 2}]
    recipe = Recipe.model_validate({"name": "mine", "method": {"name": "quality", "ranks": ranks}})
    with pytest.raises(BadRecipe, match=r"a rule is for the first 3 blocks, and this model \(flux-digits\) has 2"):
        checked(digits, recipe)
