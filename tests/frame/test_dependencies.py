"""What the packages import is declared, pinned and argued for; nothing else is."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
ROOMS = ("calibration", "exporter", "fp4trt", "generation", "onnx_functions", "trt_build")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Where the module's name is not the distribution's.
DISTRIBUTIONS = {"PIL": "pillow", "modelopt": "nvidia-modelopt", "yaml": "pyyaml"}
# Used by what we import, not by us: a pipeline of diffusers cleans prompts with it, torch.onnx translates with it, and
# the last two hold networks of torchmetrics.
THROUGH_OTHERS = {"ftfy", "onnxscript", "torch-fidelity", "torchvision"}


def normalized(requirement: str) -> str:
    """Return the distribution's name of a requirement or a pin, as an index normalizes it."""
    return re.match(r"[\w.-]+", requirement)[0].replace("_", "-").replace(".", "-").lower()


def names(requirements: list[str]) -> set[str]:
    return {normalized(line) for line in requirements} - {"fp4trt"}


def imported() -> set[str]:
    """Return the distributions that the packages import."""
    found: set[str] = set()
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add((node.module or "").partition(".")[0])
    found -= {*sys.stdlib_module_names, *ROOMS}
    return {normalized(DISTRIBUTIONS.get(name, name)) for name in found}


def pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def shipped() -> set[str]:
    """Return the declared distributions that a user's installation may have."""
    return names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in EXTRAS if extra != "dev"))


def test_every_import_is_declared_and_every_declaration_is_used():
    # tensorrt and tensorrt-rtx may be imported by a name that is chosen while running
    assert imported() | THROUGH_OTHERS | {"tensorrt", "tensorrt-rtx"} == shipped()


def test_every_declared_distribution_is_pinned_but_the_one_that_cannot_be_tested_here():
    wanted = shipped() | names(EXTRAS["dev"])
    assert wanted - names(pins()) == {"tensorrt"}


def test_every_pin_is_one_exact_public_version():
    assert [line for line in pins() if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []


def test_no_install_option_or_host_stands_in_the_constraints():
    assert not re.search(r"^\s*-|://", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_modelopt_comes_without_its_onnx_extra():
    assert not any("modelopt[" in line for extra in EXTRAS.values() for line in extra)


def test_every_extra_the_front_door_advises_is_declared_and_brings_the_package():
    for module, extra in fp4trt.EXTRAS.items():
        assert normalized(DISTRIBUTIONS.get(module, module)) in names(EXTRAS[extra])


def test_every_shipped_distribution_has_its_reason():
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    assert {name for name in shipped() if not re.search(rf"\b{name.replace('-', '[-_]')}\b", text)} == set()


@pytest.mark.parametrize("name", fp4trt.COMMANDS)
def test_every_command_has_its_section_in_the_documentation(name):
    assert f"\n## {name}\n" in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert f"`fp4trt {name} " in (ROOT / "README.md").read_text(encoding="utf-8")
