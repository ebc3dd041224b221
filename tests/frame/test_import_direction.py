"""Imports run one way, between the rooms and inside each, and each room imports only what its extra brings."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import fp4trt
from benchmarks.house import read_house

ROOT = Path(fp4trt.__file__).parents[1]

LIGHT = {"click", "numpy", "ml_dtypes", "onnx"}
TORCH = {"accelerate", "diffusers", "huggingface_hub", "modelopt", "safetensors", "torch", "transformers"}

# Which rooms, and which packages, each room may import.
ALLOWED = {
    "fp4trt": {"click", "filelock", "numpy"},
    "calibration": TORCH
    | {"click", "filelock", "ml_dtypes", "numba", "numpy"}
    | {"PIL", "matplotlib", "pydantic", "ray", "scipy", "yaml"},
    "exporter": TORCH | LIGHT | {"onnx_ir", "onnxscript", "calibration", "onnx_functions"},
    "onnx_functions": LIGHT | {"onnxruntime", "matplotlib"},
    "trt_build": LIGHT | {"polygraphy", "tensorrt", "tensorrt_rtx", "onnx_functions"},
    "generation": TORCH
    | {"click", "numpy", "matplotlib", "PIL", "pydantic", "scipy", "torchmetrics", "yaml", "calibration"}
    | {"onnx_functions", "trt_build"},
}
# Files that may import more than their room, and why.
EXCEPTIONS = {
    # GGUF's own package, where such a file is read
    "fp4trt/single_files/gguf_file.py": {"gguf"},
    # FP8 as numpy has it not
    "fp4trt/single_files/cast_fp8.py": {"ml_dtypes"},
    # a family's example inputs are torch's, and it is imported where they are made
    "fp4trt/families/family.py": {"torch"},
    # a module of the user's is looked at where it is described
    "fp4trt/custom_checks.py": {"torch"},
    "fp4trt/custom_model.py": {"torch"},
    # a tensor that is asked for as torch has it, likewise
    "fp4trt/safetensors_file.py": {"torch"},
    # run the torch reference
    "onnx_functions/validation/block_gates.py": {"calibration", "torch"},
    "onnx_functions/validation/torch_reference.py": {"calibration", "torch"},
    "onnx_functions/validation/run_gates.py": {"calibration", "torch"},
}
# Floors of each room: a sub-package, or a file beside them, imports only what lies below it.
FLOORS = {
    "calibration": (
        {"adapters", "formats", "pixel_space", "recipes", "source_options"},
        {"digits", "lora"},
        {"checkpoints", "inputs"},
        {"by_block", "lora_inputs"},
        {"methods"},
        {"results"},
        {"crew", "first_checks", "modelopt_states"},
        {"interchange", "quantization"},
        {"cli", "layer_choice"},
    ),
    "onnx_functions": (
        {"library"},
        {"formats", "graph"},
        {"layouts", "simulation"},
        {"linting"},
        {"inspection", "validation"},
        {"cli"},
    ),
    "trt_build": (
        {"layer_info", "least_tokens", "lint_notes", "local_gpu", "memory", "progress", "signature", "supervise"},
        {"callbacks", "disk_space", "profiles"},
        {"child", "graph", "profile_set", "served_sizes"},
        {"attention_coverage", "branch_cost", "coverage", "manifest", "script"},
        {"engine_losses", "runtime"},
        {"builder", "packages", "session"},
        {"cli"},
    ),
    "generation": (
        {"comparison", "planning", "transformer"},
        {"bench", "demo", "pipelines", "step_caching"},
        {"generate"},
    ),
}


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the top-level package of each absolute import in a file, wherever it stands in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]


def unwelcome(path: Path) -> set[str]:
    """Return the packages that a file imports and its room may not."""
    name = path.relative_to(ROOT).as_posix()
    room = name.partition("/")[0]
    allowed = ALLOWED[room] | EXCEPTIONS.get(name, set()) | {room, "fp4trt"} | sys.stdlib_module_names
    return set(imported_packages(path)) - allowed


def test_every_file_imports_only_what_its_room_may():
    paths = [path for room in ALLOWED for path in (ROOT / room).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix(): found for path in paths if (found := unwelcome(path))} == {}


def test_every_exception_is_still_needed():
    unused = {
        name: extra - set(imported_packages(ROOT / name))
        for name, extra in EXCEPTIONS.items()
        if extra - set(imported_packages(ROOT / name))
    }
    assert unused == {}


def test_no_unit_imports_itself_by_way_of_others():
    assert read_house(ROOT).circles() == []


def test_every_unit_imports_only_what_lies_below_it_in_its_room():
    house = read_house(ROOT)
    up = []
    for room, floors in FLOORS.items():
        level = {f"{room}.{name}": index for index, names in enumerate(floors) for name in names}
        units = {house.unit(name) for name in house.files if name.startswith(f"{room}.")}
        assert units == level.keys()
        up += [(unit, name) for unit in units for name in house.inside(unit) - {room} if level[name] >= level[unit]]
    assert up == []
