"""Real engines of the built-in model: all of it in FP4, for each target, and rebuilt when weights change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fp4trt
from calibration import quantize
from calibration.inputs.captured import load_inputs, save_inputs
from onnx_functions.validation.run_gates import validate
from trt_build import build

pytestmark = pytest.mark.slow

ROOT = Path(fp4trt.__file__).parents[1]
DOUBLE_BLOCKS, SINGLE_BLOCKS = 1, 1


def _covers_everything(result: dict[str, object]) -> bool:
    return result["fp4_linears"] == result["quantized_linears"] == 14 * DOUBLE_BLOCKS + 6 * SINGLE_BLOCKS


@pytest.mark.parametrize(
    ("gpu", "capabilities"), [("rtx5090", ["SM120"]), ("gb10", ["SM121"]), ("rtx5090,gb10", ["SM120", "SM121"])]
)
def test_one_graph_builds_for_each_target_with_merged_fp4_gemms(
    gpu: str, capabilities: list[str], quantized_digits: Path, tmp_path: Path
) -> None:
    result = build(quantized_digits, gpu=gpu, output=tmp_path / "digits.engine")
    assert _covers_everything(result)
    assert result["fp4_gemms"] <= 10 * DOUBLE_BLOCKS + 3 * SINGLE_BLOCKS
    assert result["compute_capabilities"] == capabilities
    assert (tmp_path / "digits.engine").stat().st_size == result["engine_bytes"]


def test_bfloat16_scales_build_with_full_coverage_too(bfloat16_digits: Path, tmp_path: Path) -> None:
    result = build(bfloat16_digits, gpu="rtx5090", output=tmp_path / "digits.engine")
    assert _covers_everything(result)
    assert result["fp4_gemms"] <= 10 * DOUBLE_BLOCKS + 3 * SINGLE_BLOCKS


def test_a_recipe_of_fp4_and_fp8_gives_a_graph_that_passes_every_gate_and_an_engine_with_both(
    fp8_digits: Path, tmp_path: Path
) -> None:
    """The modulation is in FP8: 8 of a double block's 10 groups and 2 of a single block's 3 are left in FP4."""
    report = validate(fp8_digits)
    assert [gate.detail for gate in report.failures] == []
    assert not [gate.name for gate in report.gates if gate.was_skipped]
    result = build(fp8_digits, gpu="rtx5090", output=tmp_path / "digits.engine")
    assert result["lost"] == []
    assert (result["fp4_linears"], result["fp8_linears"], result["quantized_linears"]) == (17, 3, 20)
    assert (result["fp4_gemms"], result["fp8_gemms"]) == (8 * DOUBLE_BLOCKS + 2 * SINGLE_BLOCKS, 3)
    merged = {tuple(gemm["linears"]) for gemm in result["gemms"] if len(gemm["linears"]) > 1}
    for index in range(DOUBLE_BLOCKS):
        attention = f"transformer_blocks.{index}.attn"
        assert tuple(f"{attention}.to_{name}" for name in "qkv") in merged
        assert tuple(f"{attention}.add_{name}_proj" for name in "qkv") in merged


def test_requantizing_with_other_data_misses_the_cache(digits: Path, copy_of_digits: Path, tmp_path: Path) -> None:
    engine = tmp_path / "digits.engine"
    assert not build(copy_of_digits, gpu="rtx5090", output=engine)["cached"]
    assert build(copy_of_digits, gpu="rtx5090", output=engine)["cached"]
    graph = (copy_of_digits / "model.onnx").read_bytes()
    calls = load_inputs(copy_of_digits / "calibration" / "inputs.safetensors")
    save_inputs(
        tmp_path / "other.safetensors", [{**call, "hidden_states": call["hidden_states"] * 2} for call in calls]
    )
    quantize(digits, copy_of_digits, recipe="nvfp4-ptq", calibration=tmp_path / "other.safetensors", force=True)
    # The same graph, byte for byte, over other scales: only the external bytes tell.
    (copy_of_digits / "model.onnx").write_bytes(graph)
    assert not build(copy_of_digits, gpu="rtx5090", output=engine)["cached"]


WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "modelopt", "onnxscript", "onnx_ir", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import fp4trt

sys.exit(fp4trt.run(["build", *sys.argv[1:], "--gpu", "rtx5090", "--json"]))
"""


def test_the_command_builds_where_torch_is_not_installed(quantized_digits: Path, tmp_path: Path) -> None:
    engine = tmp_path / "digits.engine"
    command = [sys.executable, "-c", WITHOUT_TORCH, str(quantized_digits / "model.onnx"), "-o", str(engine)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert _covers_everything(json.loads(done.stdout))
    assert engine.exists()
