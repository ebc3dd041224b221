"""The wheel holds every module and every data file, and its command runs anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fp4trt

ROOT = Path(fp4trt.__file__).parents[1]
PACKAGES = ("calibration", "exporter", "fp4trt", "generation", "onnx_functions", "trt_build")
DATA = {".json", ".safetensors", ".yaml", ".html", ".css", ".js"}


def packaged_files() -> set[str]:
    """Return what the working tree has for the wheel, as POSIX paths."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*"))
    kept = (path for path in paths if path.suffix in DATA | {".py"} and path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in kept}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy: nothing of an earlier build gets in, nothing is left behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def run_installed(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == packaged_files()


def test_the_wheel_declares_its_extras_license_and_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        (scripts,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        lines = archive.read(metadata).decode().splitlines()
        assert "fp4trt = fp4trt:main" in archive.read(scripts).decode()
    assert {"Name: fp4trt", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(lines)
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"quantize", "prompts", "rtx", "tensorrt", "report", "ray", "gguf", "metrics", "plan", "dev"}


def test_the_installed_command_runs_from_another_directory(installed, tmp_path):
    script = next(path for path in (installed / "bin").iterdir() if path.stem == "fp4trt")
    for command in ([str(script)], ["-m", "fp4trt"]):
        done = run_installed(installed, tmp_path, *command, "--version")
        assert done.stdout == f"fp4trt, version {fp4trt.__version__}\n", done.stderr


@pytest.mark.parametrize("name", fp4trt.COMMANDS)
def test_the_installed_copy_has_every_command(installed, tmp_path, name):
    done = run_installed(installed, tmp_path, "-m", "fp4trt", name, "--help")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_copy_is_the_one_that_runs_and_finds_the_built_in_model(installed, tmp_path):
    code = (
        "import fp4trt, importlib.resources as r; print(fp4trt.__file__)\n"
        "d = r.files('calibration.digits')\n"
        "print(all((d / n).is_file() for n in"
        " ('config.json', 'diffusion_pytorch_model.safetensors', 'classifier.safetensors')))"
    )
    done = run_installed(installed, tmp_path, "-c", code)
    assert done.stdout.splitlines() == [str(installed / "fp4trt" / "__init__.py"), "True"], done.stderr
