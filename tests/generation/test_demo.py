"""`fp4trt demo`: the whole road by its own commands, as a user gets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import fp4trt
from generation.demo import demo
from tests import warm_python

KEYS = {
    "checkpoint", "onnx", "engine", "validation", "engine_bytes", "fp4_gemms", "fp4_linears", "quantized_linears",
    "accuracy_bf16", "recipe", "recipes",
}  # fmt: skip


def _recipe(path: Path, method: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump({"name": "mine", "method": method}), encoding="utf-8")


DEMO = """
import os, sys
import fp4trt
from tests import warm_python
from calibration.digits import sampling
from generation.demo import demo


def in_a_fork(command):
    reader, writer = os.pipe()
    stage = os.fork()
    if not stage:
        os.dup2(writer, 1)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        status = fp4trt.run(command[3:])
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        printed = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(stage, 0)[1]), printed


if hasattr(os, "fork"):
    demo._completed = in_a_fork  # in place of a process that imports everything again
sampling.capture.__defaults__ = (sampling.capture.__defaults__[0], (0,))
sampling.capture.__kwdefaults__["steps"] = 6  # calibrate on a short schedule
fp4trt.main()
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the demo says with a recipe of the user's in a row, which at first cannot be followed."""
    folder = tmp_path_factory.mktemp("demo")
    directory, mine = folder / "result", folder / "mine.yaml"
    said = []
    for method in ({"name": "svdquant", "rank": 1000}, {"name": "ptq"}):
        _recipe(mine, method)
        status, printed = warm_python.run(DEMO, "demo", "-o", directory, "--images", 20, "--row", mine, "--json")
        said.append(printed)
        assert status == (0 if method["name"] == "ptq" else 2), printed
    found: dict[str, object] = json.loads(printed.splitlines()[-1])
    return {**found, "first": said[0], "second": said[1]}


@pytest.mark.slow
def test_the_demo_tells_everything_and_keeps_the_promise(result: dict[str, object]) -> None:
    assert set(result) >= KEYS
    assert result["validation"]["passed"] is True  # type: ignore[index]
    assert result["fp4_linears"] == result["quantized_linears"] == 14 * 2 + 6 * 4
    assert result["fp4_gemms"] <= 10 * 2 + 3 * 4  # type: ignore[operator]
    assert result["accuracy_bf16"] >= 0.95  # type: ignore[operator]
    assert result["recipe"] == "nvfp4-ptq"
    rows: dict[str, dict[str, float]] = result["recipes"]  # type: ignore[assignment]
    assert list(rows) == ["nvfp4-ptq", "nvfp4-quality", "nvfp4-quality-r8", "mine"]
    plain, best, branches = (rows[name] for name in ("nvfp4-ptq", "nvfp4-quality", "nvfp4-quality-r8"))
    assert plain["psnr_db"] >= 34
    assert best["psnr_db"] >= plain["psnr_db"] + 3.5
    assert best["velocity_error"] < 0.8 * plain["velocity_error"] < 0.064
    assert branches["psnr_db"] >= best["psnr_db"] + 2.5
    for each, share in ((plain, 0.4), (best, 0.4), (branches, 0.55)):
        assert each["accuracy"] >= 0.95
        assert each["bytes"] < share * result["bf16_bytes"]  # type: ignore[operator]


@pytest.mark.slow
def test_a_recipe_of_the_users_is_compared_too(result: dict[str, object]) -> None:
    rows: dict[str, dict[str, float]] = result["recipes"]  # type: ignore[assignment]
    assert rows["mine"] == rows["nvfp4-ptq"]  # the same method by another name
    headings = [line.split() for line in str(result["second"]).splitlines() if line.strip().startswith("BF16")]
    assert headings == [["BF16", *rows]]


@pytest.mark.slow
def test_after_a_failure_the_demo_goes_on_with_the_recipe_that_it_was_at(result: dict[str, object]) -> None:
    assert "method.rank is 1000" in str(result["first"])
    assert "keeps what is finished" in str(result["first"])
    commands = [line for line in str(result["second"]).splitlines() if line.startswith("$ fp4trt")]
    assert len(commands) == 1
    assert "mine.yaml" in commands[0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_demo_prints_the_commands_and_one_table(result: dict[str, object]) -> None:
    text = str(result["first"]) + str(result["second"])
    for command in ("quantize digits", "export", "validate", "build"):
        assert f"$ fp4trt {command}" in text
    assert "linears they cover" in text
    assert "52 of 52" in text


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("gpu", "words"),
    [("h100", "the graph is NVFP4, which h100 (SM90) cannot compute; choose a GPU of SM100"), ("h1OO", "unknown GPU")],
)
def test_a_gpu_that_the_build_would_refuse_stops_the_demo_before_it_starts(
    gpu: str, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["demo", "-o", str(tmp_path / "demo"), "--gpu", gpu]) == 2
    assert words in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_files_of_the_users_stop_the_demo_before_it_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("demo.json", "digits.png", "notes.txt"):
        (tmp_path / name).write_text("mine")
    assert fp4trt.run(["demo", "-o", str(tmp_path), "--force"]) == 2
    assert "which fp4trt did not write" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "digits.png", "notes.txt"]
