"""Imports run one way between the rooms, and each room imports only what its extra brings."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
ROOMS = ("calibration", "exporter", "fp4trt", "onnx_functions", "trt_build")

LIGHT = {"click", "numpy", "ml_dtypes", "onnx"}
TORCH = {"accelerate", "diffusers", "huggingface_hub", "modelopt", "safetensors", "torch", "transformers"}

# Which rooms, and which packages, each room may import.
ALLOWED = {
    "calibration": TORCH
    | {"click", "filelock", "ml_dtypes", "numba", "numpy"}
    | {"PIL", "matplotlib", "pydantic", "scipy", "torchmetrics", "yaml"},
    "fp4trt": {"click"},
    "exporter": TORCH | LIGHT | {"onnx_ir", "onnxscript", "calibration", "onnx_functions"},
    "onnx_functions": LIGHT | {"onnxruntime", "matplotlib"},
    "trt_build": LIGHT | {"polygraphy", "tensorrt", "tensorrt_rtx", "onnx_functions"},
}
# Files that may import more than their room, and why.
EXCEPTIONS = {
    # a family's example inputs are torch's, and it is imported where they are made
    "fp4trt/families/family.py": {"torch"},
    "fp4trt/families/flux.py": {"torch"},
    # run the torch reference
    "onnx_functions/block_gates.py": {"calibration", "torch"},
    "onnx_functions/torch_reference.py": {"calibration", "torch"},
    "onnx_functions/validation.py": {"calibration", "torch"},
}


def sources() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


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
    assert {path.relative_to(ROOT).as_posix(): found for path in sources() if (found := unwelcome(path))} == {}


def test_every_exception_is_still_needed():
    unused = {
        name: extra - set(imported_packages(ROOT / name))
        for name, extra in EXCEPTIONS.items()
        if extra - set(imported_packages(ROOT / name))
    }
    assert unused == {}
