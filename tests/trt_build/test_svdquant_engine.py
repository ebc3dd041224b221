"""The whole road of SVDQuant on the built-in model: every gate passes, and the engine is as cheap as it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fp4trt
from fp4trt.checkpoint_folder import tensors_in_folder
from onnx_functions.inspection.inspect import describe
from onnx_functions.validation.run_gates import validate
from trt_build import build

pytestmark = pytest.mark.slow

GROUPS = 13
"""Of linears that read one input: each is one FP4 GEMM."""


@pytest.fixture(scope="module")
def built(svdquant_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return build(svdquant_digits, gpu="rtx5090", output=tmp_path_factory.mktemp("engine") / "rtx5090.engine")


@pytest.mark.parametrize("reference", ["svdquant_digits", "digits"])
def test_every_gate_passes(reference: str, svdquant_digits: Path, request: pytest.FixtureRequest) -> None:
    report = validate(svdquant_digits, reference=request.getfixturevalue(reference))
    assert report.passed, [gate.line for gate in report.gates if not gate.passed]


def test_every_linear_runs_in_fp4_and_every_group_is_one_gemm(built: dict[str, Any]) -> None:
    assert built["lost"] == []
    assert (built["fp4_linears"], built["quantized_linears"]) == (20, 20)
    assert built["fp4_gemms"] == GROUPS
    members = [set(gemm["linears"]) for gemm in built["gemms"] if gemm["format"] == "nvfp4"]
    block = "single_transformer_blocks.0"
    assert {f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"} in members


def test_a_branch_costs_two_kernels_a_group_though_nothing_is_concatenated(built: dict[str, Any]) -> None:
    branch = built["branch"]
    # The three modulations read one input, so that their first products are one.
    assert (branch["linears"], branch["kernels"]) == (20, 2 * GROUPS - 2)
    assert built["kernels"] > 100
    manifest = json.loads(Path(built["manifest"]).read_text(encoding="utf-8"))
    assert manifest["branch"] == branch


def test_build_and_inspect_tell_what_the_branches_cost(
    built: dict[str, Any], svdquant_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["build", str(svdquant_digits), "-o", built["engine"]]) == 0
    assert f"low-rank branches of 20 linears: {built['branch']['bytes']:,} bytes" in capsys.readouterr().out
    checkpoint, engine = describe(svdquant_digits), describe(built["engine"])
    stored = tensors_in_folder(svdquant_digits)
    nbytes = sum(tensor.nbytes for name, tensor in stored.items() if "svdquant" in name or "pre_quant" in name)
    assert checkpoint["branches"] == {"linears": 20, "ranks": [8, 24, 32], "smoothed": 17, "bytes": nbytes}
    assert checkpoint["graph"]["branches"]["bytes"] == built["branch"]["bytes"]
    assert len(checkpoint["graph"]["linears"]) == 30
    assert engine["branch"] == built["branch"]
    assert fp4trt.run(["inspect", str(svdquant_digits)]) == 0
    assert "20 low-rank branches of rank 8 and 24 and 32, 17 smoothed inputs" in capsys.readouterr().out
    assert fp4trt.run(["inspect", built["engine"]]) == 0
    assert f"{2 * GROUPS - 2} of" in capsys.readouterr().out
