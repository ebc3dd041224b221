"""A preset's whole way, on a cut of the built-in model; and that of one whose graph is that of another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shared_folders import SharedFolder

Walk = Callable[[str], dict[str, Any]]


@pytest.fixture
def walk(digits: Path, five_calls: Path, tmp_path: Path) -> Walk:
    """Return what takes a preset from the checkpoint to an engine, and checks every promise on the way.

    It returns what was built.
    """

    def check(name: str) -> dict[str, Any]:
        from calibration import quantize
        from calibration.recipes.recipe import load_recipe
        from exporter import export
        from onnx_functions import validate
        from trt_build import build

        recipe = load_recipe(name)
        quantized = quantize(digits, tmp_path / "fp4", recipe=name, calibration=five_calls)
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
    from calibration.checkpoints.quantized import read
    from exporter.onnx_export import branches, group_leaders

    checkpoint = read(folder)
    tensors = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    return tensors, group_leaders(checkpoint), branches(checkpoint), checkpoint.account.linears


@pytest.fixture(scope="session")
def plain_graph(digits: Path, five_calls: Path, shared_folder: SharedFolder) -> tuple[Any, ...]:
    """What the graph of plain post-training quantization is made of."""

    def make(folder: Path) -> None:
        from calibration import quantize

        quantize(digits, folder / "fp4", recipe="nvfp4-ptq", calibration=five_calls)

    return _graph_is_made_of(shared_folder("short-plain", make) / "fp4")


@pytest.fixture
def quantize_plain(digits: Path, five_calls: Path, plain_graph: tuple[Any, ...], tmp_path: Path) -> Walk:
    """Return what quantizes by a preset whose graph has to be that of plain rounding, which a walk takes further.

    It returns the relative error of each weight.
    """

    def check(recipe: str | Path) -> dict[str, float]:
        from calibration import quantize
        from calibration.checkpoints.plain import load_source
        from calibration.checkpoints.quantized import read
        from calibration.recipes.recipe import load_recipe

        assert (
            quantize(digits, tmp_path / "fp4", recipe=recipe, calibration=five_calls)["recipe"]
            == load_recipe(recipe).name
        )
        assert _graph_is_made_of(tmp_path / "fp4") == plain_graph
        checkpoint, source = read(tmp_path / "fp4"), load_source(digits).float()
        weights = {path: source.get_submodule(path).weight for path in checkpoint.quantized}
        return {path: float((checkpoint.weight(path) - w).norm() / w.norm()) for path, w in weights.items()}

    return check
