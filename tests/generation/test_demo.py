"""`fp4trt demo`: the whole road by its own commands, as a user gets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fp4trt
from calibration.digits import demo

KEYS = {
    "checkpoint", "onnx", "engine", "validation", "engine_bytes", "fp4_gemms", "fp4_linears", "quantized_linears",
    "accuracy_bf16", "recipe", "recipes",
}  # fmt: skip


def _recipe(path: Path, method: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump({"name": "mine", "method": method}), encoding="utf-8")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the demo says with a recipe of the user's in a row, which at first cannot be followed."""
    folder = tmp_path_factory.mktemp("demo")
    directory, mine = folder / "result", folder / "mine.yaml"
    command = [sys.executable, "-m", "fp4trt", "demo", "-o", directory, "--images", "40", "--row", mine, "--json"]
    said = []
    for method in ({"name": "svdquant", "rank": 1000}, {"name": "ptq"}):
        _recipe(mine, method)
        root = Path(fp4trt.__file__).parents[1]
        done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", cwd=root, check=False)
        said.append(done.stderr)
        assert done.returncode == (0 if method["name"] == "ptq" else 2), done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return {**found, "first": said[0], "second": said[1]}


def test_the_demo_tells_everything_and_keeps_the_promise(result: dict[str, object]) -> None:
    assert set(result) >= KEYS
    assert result["validation"]["passed"] is True  # type: ignore[index]
    assert result["fp4_linears"] == result["quantized_linears"] == 14 * 2 + 6 * 4
    assert result["fp4_gemms"] <= 10 * 2 + 3 * 4  # type: ignore[operator]
    assert result["accuracy_bf16"] >= 0.95  # type: ignore[operator]
    assert result["recipe"] == "nvfp4-ptq"
    rows: dict[str, dict[str, float]] = result["recipes"]  # type: ignore[assignment]
    assert list(rows) == ["nvfp4-ptq", "nvfp4-quality", "svdquant-r8", "mine"]
    plain, best, branches = (rows[name] for name in ("nvfp4-ptq", "nvfp4-quality", "svdquant-r8"))
    assert plain["psnr_db"] >= 34
    assert best["psnr_db"] >= plain["psnr_db"] + 3.5
    assert best["velocity_error"] < 0.8 * plain["velocity_error"] < 0.064
    assert branches["psnr_db"] >= best["psnr_db"] + 1
    for each, share in ((plain, 0.4), (best, 0.4), (branches, 0.55)):
        assert each["accuracy"] >= 0.95
        assert each["bytes"] < share * result["bf16_bytes"]  # type: ignore[operator]


def test_a_recipe_of_the_users_is_compared_too(result: dict[str, object]) -> None:
    rows: dict[str, dict[str, float]] = result["recipes"]  # type: ignore[assignment]
    assert rows["mine"] == rows["nvfp4-ptq"]  # the same method by another name
    headings = [line.split() for line in str(result["second"]).splitlines() if line.strip().startswith("BF16")]
    assert headings == [["BF16", *rows]]


def test_after_a_failure_the_demo_goes_on_with_the_recipe_that_it_was_at(result: dict[str, object]) -> None:
    assert "method.rank is 1000" in str(result["first"])
    assert "keeps what is finished" in str(result["first"])
    commands = [line for line in str(result["second"]).splitlines() if line.startswith("$ fp4trt")]
    assert len(commands) == 1
    assert "mine.yaml" in commands[0]


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
    text = str(result["first"]) + str(result["second"])
    for command in ("quantize digits", "export", "validate", "build"):
        assert f"$ fp4trt {command}" in text
    assert "linears they cover" in text
    assert "52 of 52" in text


def test_a_failing_stage_leaves_an_earlier_result_as_it_was(
    result: dict[str, object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The last stage fails, over what the first three made for the earlier result."""
    directory, run = Path(str(result["checkpoint"])), demo._run

    def made_already(stage: str, *arguments: str, **options: bool) -> dict[str, object]:
        if stage == "build":
            return run(stage, *arguments, **options)
        if stage == "quantize":
            shutil.copytree(directory, arguments[2])
        return {}

    monkeypatch.setattr(demo, "_run", made_already)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in directory.rglob("*"))
    assert fp4trt.run(["demo", "-o", str(directory), "--gpu", "rtx4090", "--force"]) == 2
    assert "rtx4090" in capfd.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in directory.rglob("*")) == before
    assert not directory.with_name("result.partial").exists()


def test_an_unknown_recipe_stops_the_demo_before_it_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fp4trt.run(["demo", "-o", str(tmp_path / "result"), "--row", "nvfp5"]) == 2
    assert "there is no recipe 'nvfp5'" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_files_of_the_users_stop_the_demo_before_it_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("demo.json", "digits.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert fp4trt.run(["demo", "-o", str(tmp_path), "--force"]) == 2
    assert "which fp4trt did not write" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "digits.png", "notes.txt"]
