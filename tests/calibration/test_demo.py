"""`fp4trt demo`: the whole road by its own commands, as a user gets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fp4trt

KEYS = {
    "checkpoint", "onnx", "engine", "validation", "engine_bytes", "fp4_gemms", "fp4_linears", "quantized_linears",
    "accuracy_bf16", "recipe", "recipes",
}  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("demo") / "result"

    command = [sys.executable, "-m", "fp4trt", "demo", "-o", str(directory), "--images", "100", "--json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=Path(fp4trt.__file__).parent, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return {**found, "stderr": done.stderr}


def test_the_demo_tells_everything_and_keeps_the_promise(result: dict[str, object]) -> None:
    assert set(result) >= KEYS
    assert result["validation"]["passed"] is True  # type: ignore[index]
    assert result["fp4_linears"] == result["quantized_linears"] == 14 * 2 + 6 * 4
    assert result["fp4_gemms"] <= 10 * 2 + 3 * 4  # type: ignore[operator]
    assert result["accuracy_bf16"] >= 0.95  # type: ignore[operator]
    assert result["recipe"] == "nvfp4-ptq"
    plain, best = (result["recipes"][name] for name in ("nvfp4-ptq", "nvfp4-quality"))  # type: ignore[index]
    assert plain["psnr_db"] >= 34
    assert best["psnr_db"] >= plain["psnr_db"] + 3.5
    assert best["velocity_error"] < 0.8 * plain["velocity_error"] < 0.064
    for each in (plain, best):
        assert each["accuracy"] >= 0.95
        assert each["bytes"] < 0.4 * result["bf16_bytes"]  # type: ignore[operator]


def test_the_demo_leaves_every_artifact_where_it_says(result: dict[str, object]) -> None:
    for key in ("checkpoint", "onnx", "engine", "grid", "report"):
        path = Path(str(result[key]))
        assert path.is_absolute()
        assert path.exists(), key
    directory = Path(str(result["checkpoint"]))
    assert Path(str(result["engine"])).stat().st_size == result["engine_bytes"]
    assert Path(str(result["grid"])).read_bytes().startswith(b"\x89PNG")
    assert not directory.with_name("result.partial").exists()
    for path in (directory / "demo.json", directory / "validation" / "report.json", directory / "rtx5090.json"):
        assert str(directory.parent) not in path.read_text(encoding="utf-8"), path


def test_the_demo_prints_the_commands_and_one_table(result: dict[str, object]) -> None:
    text = str(result["stderr"])
    for command in ("quantize digits", "export", "validate", "build"):
        assert f"$ fp4trt {command}" in text
    assert "linears they cover" in text
    assert "52 of 52" in text


def test_a_failing_stage_leaves_an_earlier_result_as_it_was(
    result: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    directory = Path(str(result["checkpoint"]))
    before = sorted((path.name, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    assert fp4trt.run(["demo", "-o", str(directory), "--gpu", "rtx4090", "--force"]) == 2
    assert "rtx4090" in capfd.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in directory.rglob("*")) == before
    assert not directory.with_name("result.partial").exists()


def test_files_of_the_users_stop_the_demo_before_it_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("demo.json", "digits.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert fp4trt.run(["demo", "-o", str(tmp_path), "--force"]) == 2
    assert "which fp4trt did not write" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "digits.png", "notes.txt"]
