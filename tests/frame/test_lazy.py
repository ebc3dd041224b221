"""`fp4trt --help` imports no room; no `--help` imports a heavy library; inspect and build need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
ROOMS = {"calibration", "exporter", "generation", "onnx_functions", "trt_build"}
HEAVY = {
    "accelerate", "diffusers", "matplotlib", "modelopt", "numpy", "onnx", "onnx_ir", "onnxruntime",
    "onnxscript", "polygraphy", "safetensors", "scipy", "tensorrt", "tensorrt_rtx", "torch",
}  # fmt: skip

# Refuses torch, and what needs it, as an environment without them would.
WITHOUT_TORCH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "modelopt", "accelerate", "onnxscript"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level modules in memory after the command has run in a process of its own."""
    script = "import sys, fp4trt; fp4trt.run(sys.argv[1:]); print('|', sorted(sys.modules))"
    done = python(script, *arguments)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in ast.literal_eval(done.stdout.rpartition("|")[2].strip())}


def test_the_list_of_commands_imports_no_room():
    assert imported_by("--help") & (ROOMS | HEAVY) == set()


@pytest.mark.parametrize("name", fp4trt.COMMANDS)
def test_a_command_s_help_imports_nothing_heavy(name):
    assert imported_by(name, "--help") & HEAVY == set()


@pytest.mark.parametrize("name", fp4trt.COMMANDS)
def test_a_command_s_help_has_an_example_and_takes_json(name, capfd):
    assert fp4trt.run([name, "--help"]) == 0
    help_text = capfd.readouterr().out
    assert f"Example:\n    fp4trt {name}" in help_text
    assert "--json" in help_text
    assert help_text.startswith(f"Usage: fp4trt {name} ")


WITH_TORCH = ("run_gates", "block_gates", "torch_reference")  # run the torch reference


def torch_free_modules() -> list[str]:
    rooms = ("fp4trt", "generation/planning", "onnx_functions", "trt_build")
    paths = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    left_out = (*WITH_TORCH, "__main__")
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths if path.stem not in left_out]


def test_fp4trt_onnx_functions_trt_build_and_planning_import_without_torch():
    script = WITHOUT_TORCH + "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = python(script, *torch_free_modules())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [("inspect",), ("build", "--gpu", "rtx5090")])
def test_inspect_and_build_reach_their_verdict_without_torch(tmp_path, arguments):
    name, *options = arguments
    model = tmp_path / "model.onnx"
    script = WITHOUT_TORCH + "import fp4trt\nsys.exit(fp4trt.run(sys.argv[1:]))"
    python(
        "import sys, onnx; from onnx import helper as h, TensorProto as t\n"
        "x, y = (h.make_tensor_value_info(n, t.FLOAT, [1, 4]) for n in 'xy')\n"
        "graph = h.make_graph([h.make_node('Relu', ['x'], ['y'], name='relu')], 'g', [x], [y])\n"
        "onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid('', 23)]), sys.argv[1])",
        str(model),
    )
    done = python(script, name, str(model), *options)
    assert done.returncode in (0, 1, 2), done.stderr
    assert "torch" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_needs_no_torch():
    script = WITHOUT_TORCH + "import fp4trt\nsys.exit(fp4trt.run(sys.argv[1:]))"
    done = python(script, "plan", "Z-Image", "--gpu", "rtx5070", "--recipe", "svdquant-r8")
    assert done.returncode == 0, done.stderr
    assert "svdquant-r8" in done.stdout
