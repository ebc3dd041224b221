"""A preset's whole way, on a cut of the built-in model; and that of one whose graph is that of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Walk = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="session")
def short_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with the first of its double and the first of its single blocks: trained weights."""
    from diffusers import FluxTransformer2DModel

    from calibration.source import load_json, load_source

    config = load_json(digits / "config.json") | {"num_layers": 1, "num_single_layers": 1}
    model = FluxTransformer2DModel.from_config(config)
    wanted = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in load_source(digits).state_dict().items() if name in wanted})
    folder = tmp_path_factory.mktemp("short") / "digits"
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few calls to calibrate on, over the whole schedule: what enters the cut model is what enters the whole one."""
    from calibration.dataset import save_inputs
    from calibration.digits.model import load_transformer
    from calibration.digits.sampling import capture

    file = tmp_path_factory.mktemp("captured") / "inputs.safetensors"
    save_inputs(file, capture(load_transformer(), seeds=(0,), steps=5))
    return file


@pytest.fixture
def walk(short_digits: Path, captured: Path, tmp_path: Path) -> Walk:
    """Return what takes a preset from the checkpoint to an engine, and checks every promise on the way.

    It returns what was built.
    """

    def check(name: str) -> dict[str, Any]:
        from calibration import quantize
        from calibration.recipe import load_recipe
        from exporter import export
        from onnx_functions import validate
        from trt_build import build

        recipe = load_recipe(name)
        quantized = quantize(short_digits, tmp_path / "fp4", name, captured)
        assert quantized["recipe"] == name
        export(tmp_path / "fp4")
        report = validate(tmp_path / "fp4")
        assert report.passed, [gate.line for gate in report.gates if not gate.passed]
        engine = build(tmp_path / "fp4", gpu="rtx5090")
        assert recipe.formats.default == "nvfp4"
        assert not recipe.formats.rules
        assert engine["fp4_linears"] == engine["quantized_linears"] == 14 + 6
        assert engine["lost"] == []
        merged = {frozenset(gemm["linears"]) for gemm in engine["gemms"]}
        block, single = "transformer_blocks.0.attn", "single_transformer_blocks.0"
        for expected in (
            [f"{block}.to_q", f"{block}.to_k", f"{block}.to_v"],
            [f"{block}.add_q_proj", f"{block}.add_k_proj", f"{block}.add_v_proj"],
            [*(f"{single}.attn.to_{one}" for one in "qkv"), f"{single}.proj_mlp"],
        ):
            assert frozenset(expected) in merged, expected
        assert engine["fp4_gemms"] <= 10 + 3
        return engine

    return check


def _graph_is_made_of(folder: Path) -> tuple[Any, ...]:
    """Return all that the exporter makes a graph of: names, types and shapes, who leads a group, what has a branch."""
    from calibration.checkpoint import read
    from exporter.onnx_export import branches, group_leaders

    checkpoint = read(folder)
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return tensors, group_leaders(checkpoint), branches(checkpoint), checkpoint.account.linears


@pytest.fixture(scope="session")
def plain_graph(short_digits: Path, captured: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What the graph of plain post-training quantization is made of."""
    from calibration import quantize

    folder = tmp_path_factory.mktemp("plain") / "fp4"
    quantize(short_digits, folder, "nvfp4-ptq", captured)
    return _graph_is_made_of(folder)


@pytest.fixture
def quantize_plain(short_digits: Path, captured: Path, plain_graph: tuple[Any, ...], tmp_path: Path) -> Walk:
    """Return what quantizes by a preset whose graph has to be that of plain rounding, which a walk takes further.

    It returns the relative error of each weight.
    """

    def check(name: str) -> dict[str, float]:
        from calibration import quantize
        from calibration.checkpoint import read
        from calibration.source import load_source

        assert quantize(short_digits, tmp_path / "fp4", name, captured)["recipe"] == name
        assert _graph_is_made_of(tmp_path / "fp4") == plain_graph
        checkpoint, source = read(tmp_path / "fp4"), load_source(short_digits).float()
        weights = {path: source.get_submodule(path).weight for path in checkpoint.quantized}
        return {path: float((checkpoint.weight(path) - w).norm() / w.norm()) for path, w in weights.items()}

    return check
