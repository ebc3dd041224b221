"""A family is one file of data: calibrate, quantize, export, validate and build need nothing else of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import exporter
import fp4trt.families
import onnx_functions
import trt_build
from calibration import calibrate, quantize
from calibration.by_block.runner import BlockRunner
from calibration.checkpoints.plain import empty_source, load_source
from calibration.inputs.captured import save_inputs
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.families import FAMILIES, Family, family_of
from fp4trt.json_file import load_json
from tests.frame.made_up import MADE_UP, MadeUpTransformer

FLUX2 = {
    "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2, "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 32, "timestep_guidance_channels": 32,
}  # fmt: skip
SIZES = ((1, 36, 8), (1, 16, 8), (2, 16, 5))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the made-up family be one of ours."""
    monkeypatch.setattr(fp4trt.families, "FAMILIES", (*FAMILIES, MADE_UP))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from diffusers import Flux2Transformer2DModel

    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    for name, model in (("flux2", Flux2Transformer2DModel(**FLUX2)), ("made-up", MadeUpTransformer())):
        model.bfloat16().save_pretrained(folder / name)
    return {name: folder / name for name in ("flux2", "made-up")}


def _calls(source: Path) -> tuple[Family, dict[str, Any], list[dict[str, torch.Tensor]]]:
    config = load_json(source / "config.json")
    family = family_of(config)
    return family, config, [family.example_inputs(config, size, 7, torch.bfloat16) for size in SIZES]


@pytest.mark.parametrize("name", ["flux2", "made-up"])
def test_the_data_are_those_of_the_model(name: str, sources: dict[str, Path]) -> None:
    family, config, _ = _calls(sources[name])
    state = {key: tuple(value.shape) for key, value in load_source(sources[name]).state_dict().items()}
    assert list(family.state(config).items()) == list(state.items())
    assert set(family.quantized(config)) <= family.linears(config).keys()


@pytest.mark.parametrize("name", ["flux2", "made-up"])
def test_block_by_block_equals_the_whole_model(name: str, sources: dict[str, Path]) -> None:
    family, config, calls = _calls(sources[name])
    model, stored = empty_source(sources[name])
    runner = BlockRunner(model, family.blocks(config), lambda key: stored[key].tensor())
    whole = load_source(sources[name])
    with torch.no_grad():
        for call in calls:
            before: tuple[torch.Tensor, ...] = ()
            for block in family.blocks(config):
                with runner.loaded(block):
                    before = runner.run(block, call, before)
            assert torch.equal(runner.finish(call, before), whole(**call, return_dict=False)[0])


@pytest.mark.parametrize(
    ("name", "recipe"), [("flux2", "nvfp4-quality"), ("flux2", "svdquant-r8"), ("made-up", "nvfp4-ptq")]
)
@pytest.mark.slow
def test_a_family_goes_all_the_way_to_an_engine(
    name: str, recipe: str, sources: dict[str, Path], tmp_path: Path, walk_to_engine: Callable[..., dict[str, Any]]
) -> None:
    family, config, _ = _calls(sources[name])
    engine = walk_to_engine(sources[name], recipe, tmp_path)
    assert engine["quantized_linears"] == engine["fp4_linears"] == len(family.quantized(config))
    assert engine["lost"] == []


@pytest.fixture
def walk_to_engine() -> Callable[..., dict[str, Any]]:
    """Return what takes a plain checkpoint to an engine by a recipe and checks every verdict on the way."""

    def walk(source: Path, recipe: str, folder: Path) -> dict[str, Any]:
        inputs, checkpoint = folder / "inputs.safetensors", folder / "fp4"
        family, config, calls = _calls(source)
        save_inputs(inputs, calls)
        measured = calibrate(source, folder / "amax.json", inputs=inputs)
        assert measured["linears"] == len(family.quantized(config))
        quantize(
            source, checkpoint, recipe=recipe, calibration=folder / "amax.json" if recipe == "nvfp4-ptq" else inputs
        )
        exporter.export(checkpoint)
        assert onnx_functions.lint(checkpoint).findings == ()
        report = onnx_functions.validate(checkpoint)
        assert report.passed, [gate.line for gate in report.failures]
        assert [gate.name for gate in report.gates if gate.was_skipped] == []
        return trt_build.build(checkpoint, output=folder / "x.engine")

    return walk


@pytest.mark.slow
def test_a_method_that_runs_the_model_rounds_what_lies_outside_the_blocks(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    _, _, calls = _calls(sources["made-up"])
    save_inputs(tmp_path / "inputs.safetensors", calls)
    for recipe in ("nvfp4-ptq", "nvfp4-quality"):
        quantize(sources["made-up"], tmp_path / recipe, recipe=recipe, calibration=tmp_path / "inputs.safetensors")
    plain, best = (tensors_in_folder(tmp_path / recipe) for recipe in ("nvfp4-ptq", "nvfp4-quality"))
    for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        assert torch.equal(plain[f"modulation.{leaf}"].tensor(), best[f"modulation.{leaf}"].tensor())
