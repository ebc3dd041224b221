"""Every preset of ModelOpt's own calibrations goes all the way to an engine, and keeps what it promises."""

from __future__ import annotations

import pytest

import fp4trt
from calibration.recipe import load_recipe, preset_names
from calibration.source import load_json


@pytest.mark.parametrize("name", [name for name in preset_names() if load_recipe(name).method.name == "modelopt"])
def test_a_preset_becomes_an_engine_with_all_gates_passed(name, walk, tmp_path, capsys):
    engine = walk(name)
    if name != "nvfp4-modelopt-awq":
        assert engine["branch"] is None
        return
    assert (engine["branch"]["linears"], engine["branch"]["kernels"]) == (0, 0)
    assert engine["branch"]["bytes"] > 0
    described = load_json(tmp_path / "fp4" / "config.json")["quantization_config"]
    kinds = {layer["quant_algo"] for layer in described["quantized_layers"].values()}
    assert kinds == {"NVFP4", "NVFP4_AWQ"}  # the modulations are not smoothed
    assert fp4trt.run(["inspect", str(tmp_path / "fp4")]) == 0
    assert "AWQ: 17 smoothed inputs" in capsys.readouterr().out
