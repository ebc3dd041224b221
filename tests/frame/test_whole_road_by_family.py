"""A family is one file of data: calibrate, quantize, export, validate and build need nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import onnx
import pytest
import torch
from torch import nn

import exporter
import fp4trt.families
import onnx_functions
import trt_build
from calibration import calibrate, quantize
from calibration.by_block.runner import BlockRunner
from calibration.checkpoints.plain import empty_source, load_source, model_class
from calibration.inputs.captured import capturing, save_inputs
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.families import FAMILIES, Family, family_named, family_of
from fp4trt.json_file import load_json
from onnx_functions.simulation.simulate import session
from tests.frame.diffusers_models import MODELS, Call
from tests.frame.made_up import MADE_UP, MadeUpTransformer

SIZES = ((1, 36, 8), (1, 16, 8), (2, 16, 5))

# Their structure is another's here: one that goes all the way, or a newer one of the same class.
ALIKE = ("qwen-image", "qwen-image-layered", "ltx2", "sd3", "sd3.5-large", "wan", "wan-i2v")


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the made-up family be one of ours."""
    monkeypatch.setattr(fp4trt.families, "FAMILIES", (*FAMILIES, MADE_UP))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, model in MODELS.items():
        model.save(folder / name)
    torch.manual_seed(0)
    MadeUpTransformer().bfloat16().save_pretrained(folder / "made-up")
    return {name: folder / name for name in (*MODELS, "made-up")}


def _calls(source: Path) -> tuple[Family, dict[str, Any], list[dict[str, torch.Tensor]]]:
    config = load_json(source / "config.json")
    family = family_of(config)
    return family, config, [family.example_inputs(config, size, 7, torch.bfloat16) for size in SIZES]


@pytest.mark.parametrize("name", [*MODELS, "made-up"])
def test_the_data_are_those_of_the_model(name: str, sources: dict[str, Path]) -> None:
    family, config, _ = _calls(sources[name])
    model = load_source(sources[name])
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert list(family.state(config).items()) == list(state.items())
    linears = {path: tuple(m.weight.shape) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert family.linears(config) == linears
    assert list(family.linears(config))[: len(family.quantized(config))] == list(family.quantized(config))


@pytest.mark.parametrize(
    "name",
    [
        "flux2",
        "flux3",
        "z-image",
        "krea2",
        "sd3.5-large",
        "sd3.5-medium",
        "chroma",
        "wan-ti2v",
        "ltx2",
        "ltx2.3",
        "made-up",
    ],
)
def test_block_by_block_equals_the_whole_model(name: str, sources: dict[str, Path]) -> None:
    family, config, calls = _calls(sources[name])
    model, stored = empty_source(sources[name])
    runner = BlockRunner(model, family.blocks(config), lambda key: stored[key].tensor(), read_by=family.read_by)
    whole = load_source(sources[name])
    with torch.no_grad():
        for call in calls:
            before: tuple[torch.Tensor, ...] = ()
            for block in family.blocks(config):
                with runner.loaded(block):
                    before = runner.run(block, call, before)
            for found, wanted in zip(runner.finish(call, before), whole(**call, return_dict=False), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not model.same])
def test_an_adapter_computes_what_diffusers_class_does(name: str, sources: dict[str, Path]) -> None:
    model = MODELS[name]
    stock, family = model.make(torch.float32), _calls(sources[name])[0]
    adapter: Any = model_class(family)(**model.config)
    adapter.load_state_dict(stock.state_dict())
    for sizes in ((2, 8, 8), (1, 12, 5)):
        call = model.call(model.config, sizes)
        with torch.no_grad():
            wanted = _tokens(call, stock)
            with capturing(adapter, family, dict(model.config)) as captured:
                driven = _tokens(call, adapter)
            (inputs,) = captured
            assert list(inputs) == list(family.input_shapes(model.config))
            found = adapter(**inputs, return_dict=False)
        assert _difference(driven, wanted) < 1e-6
        assert _difference(found, wanted) < 1e-5


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if not model.same])
def test_an_adapter_rounds_to_bf16_where_diffusers_class_does(name: str, sources: dict[str, Path]) -> None:
    model = MODELS[name]
    stock = getattr(diffusers, model.class_name).from_pretrained(sources[name], torch_dtype=torch.bfloat16).eval()
    call = model.call(model.config, (2, 8, 8))
    adapter = load_source(sources[name])
    args, kwargs = [_in_bf16(value) for value in call.args], {key: _in_bf16(v, key) for key, v in call.kwargs.items()}
    with torch.no_grad():
        wanted, driven = (_tokens(Call(tuple(args), kwargs, call.tokens), m) for m in (stock, adapter))
        found = adapter(**adapter.inputs_of(*args, **kwargs), return_dict=False)
    assert _difference(driven, wanted) < 1e-3
    assert _difference(found, wanted) < 1e-3


def _in_bf16(value: Any, name: str = "") -> Any:
    """Return latents and texts, alone or as a list, in BF16; all else as it is."""
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [one.bfloat16() for one in value]
    is_rounded = (
        isinstance(value, torch.Tensor) and value.is_floating_point() and (value.ndim > 2 or name.startswith("pooled"))
    )
    return value.bfloat16() if is_rounded else value


def test_chromas_mask_of_numbers_hides_text_in_a_graphs_inputs_alone() -> None:
    model = MODELS["chroma"]
    call = dict(model.call(model.config, (2, 8, 8)).kwargs)
    numbers = {**call, "attention_mask": call["attention_mask"].float()}
    stock, adapter = model.make(torch.float32), model_class(family_named("chroma"))(**model.config)
    adapter.load_state_dict(stock.state_dict())
    with torch.no_grad():
        hidden, dimmed = (stock(**each, return_dict=False) for each in (call, numbers))
        assert _difference(dimmed, hidden) > 1e-3
        assert _difference(adapter(**numbers, return_dict=False), dimmed) < 1e-6
        assert _difference(adapter(**adapter.inputs_of(**numbers), return_dict=False), hidden) < 1e-5
        del call["attention_mask"]
        seen = adapter(**adapter.inputs_of(**call), return_dict=False)
        assert _difference(seen, stock(**call, return_dict=False)) < 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.thorough) if name in ALIKE else name for name in MODELS]
)
@pytest.mark.slow
def test_a_graph_computes_what_diffusers_class_does(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    model = MODELS[name]
    graph = exporter.export(sources[name], tmp_path / "plain.onnx", precision="bf16").onnx
    nodes = {node.name: len(node.input) for node in onnx.load(graph, load_external_data=False).graph.node}
    family, config, _ = _calls(sources[name])
    masked = [path for path in family.attentions(config) if nodes[f"{path}/Attention"] > 3]
    assert masked == [path for path in family.attentions(config) if path not in family.fp8_attentions(config)]
    run = session(graph, float32=True)
    stock = model.make(torch.float32)
    stock.load_state_dict(model.make().state_dict())  # rounded; what is in no checkpoint is not
    adapter = model_class(family)(**model.config)
    for sizes in ((1, 12, 5), (2, 8, 8), (3, 10, 40)):
        call = model.call(model.config, sizes)
        with torch.no_grad():
            wanted = _tokens(call, stock)
        inputs = dict(call.kwargs) if model.same else adapter.inputs_of(*call.args, **call.kwargs)
        found = run.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert _difference([torch.from_numpy(value) for value in found], wanted) < 1e-4


def _tokens(call: Call, model: nn.Module) -> list[torch.Tensor]:
    """Return a model's outputs for a call, as a graph gives them."""
    return [call.tokens(output) for output in model(*call.args, **call.kwargs, return_dict=False)]


def _difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest relative difference of outputs, in L2, without tokens that pad the found ones."""
    pairs = [(one[:, : other.shape[1]], other) for one, other in zip(found, wanted, strict=True)]
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


# One of each kind of structure; tests/frame/models_table.py takes all.
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("flux2", "svdquant-r8"),
        ("qwen-image", "nvfp4-quality-r8"),
        ("z-image", "nvfp4-quality"),
        pytest.param("sd3.5-medium", "nvfp4-quality", marks=pytest.mark.thorough),
        pytest.param("chroma", "nvfp4-quality", marks=pytest.mark.thorough),
        ("wan", "nvfp4-quality"),
        ("ltx2.3", "nvfp4-quality"),
        ("made-up", "nvfp4-ptq"),
    ],
)
@pytest.mark.slow
def test_a_family_goes_all_the_way_to_an_engine(
    name: str, recipe: str, sources: dict[str, Path], tmp_path: Path, walk_to_engine: Callable[..., dict[str, Any]]
) -> None:
    family, config, _ = _calls(sources[name])
    engine = walk_to_engine(sources[name], recipe, tmp_path)
    assert engine["quantized_linears"] == engine["fp4_linears"] == len(family.quantized(config))
    assert engine["lost"] == []
    if name in MODELS:
        assert engine["fp4_gemms"] == MODELS[name].gemms


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
        has_own_road = family.read_by or family.noise_at > 1 or len(family.outputs) > 1
        if has_own_road or any(stack.tail or not stack.equal for stack in family.stacks):
            by_block = onnx_functions.validate(checkpoint, level="blocks")
            assert by_block.passed, [gate.line for gate in by_block.failures]
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
