"""ModelOpt's own calibrations become checkpoints whose graph is that of plain rounding; AWQ's goes to an engine."""

from __future__ import annotations

import pytest

import fp4trt
from calibration.recipes.recipe import load_recipe, preset_names
from fp4trt.json_file import load_json

pytestmark = pytest.mark.slow

AWQ = "nvfp4-modelopt-awq"
PLAIN = [name for name in preset_names() if load_recipe(name).method.name == "modelopt" and name != AWQ]


@pytest.mark.parametrize("name", PLAIN)
def test_a_preset_changes_no_more_than_the_weights(name, quantize_plain):
    assert max(quantize_plain(name).values()) < 0.2


def test_awq_becomes_an_engine_with_all_gates_passed(walk, tmp_path, capsys):
    engine = walk(AWQ)
    assert (engine["branch"]["linears"], engine["branch"]["kernels"]) == (0, 0)
    assert engine["branch"]["bytes"] > 0
    described = load_json(tmp_path / "fp4" / "config.json")["quantization_config"]
    kinds = {layer["quant_algo"] for layer in described["quantized_layers"].values()}
    assert kinds == {"NVFP4", "NVFP4_AWQ"}  # the modulations are not smoothed
    assert fp4trt.run(["inspect", str(tmp_path / "fp4")]) == 0
    assert "AWQ: 17 smoothed inputs" in capsys.readouterr().out
