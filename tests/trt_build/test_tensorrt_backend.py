"""Targets that need the tensorrt package, which is not installed here; TensorRT-RTX stands in for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import trt_build
from fp4trt.errors import BackendMissingError, OutputExistsError
from tests.trt_build.stand_in import STAND_IN

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorrt" else find(name))


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt_a_build_script_is_written_and_said(attention_graph: Any) -> None:
    model = attention_graph()
    with pytest.raises(BackendMissingError, match=r"b200 \(SM100\) needs .*b200\.build\.py") as caught:
        trt_build.build(model, gpu="b200", resolution="1024", batch="1:1:4")
    assert caught.value.exit_code == 2
    text = (model.parent / "b200.build.py").read_text()
    assert "'hidden_states': ((1, 4096, 128), (1, 4096, 128), (4, 4096, 128))," in text
    assert str(model.parent) not in text
    assert not (model.parent / "b200.engine").exists()


@pytest.mark.usefixtures("no_tensorrt")
def test_a_build_script_that_was_edited_is_kept_unless_forced(attention_graph: Any) -> None:
    model = attention_graph()
    script = model.parent / "b200.build.py"
    for _ in range(2):  # an unchanged script is no obstacle
        with pytest.raises(BackendMissingError):
            trt_build.build(model, gpu="b200")
    written = script.read_bytes()
    assert written.startswith(b"# Written by fp4trt: ")
    script.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"b200\.build\.py exists with other content .* --force"):
        trt_build.build(model, gpu="b200")
    assert script.read_text() == "mine"
    with pytest.raises(BackendMissingError):
        trt_build.build(model, gpu="b200", force=True)
    assert script.read_bytes() == written


@pytest.mark.usefixtures("no_tensorrt")
def test_the_build_script_says_what_is_tested_and_what_is_not(attention_graph: Any) -> None:
    model = attention_graph()
    with pytest.raises(BackendMissingError):
        trt_build.build(model, gpu="b200")
    text = " ".join((model.parent / "b200.build.py").read_text().split())
    assert "Tested: this script, with TensorRT for RTX" in text
    assert "Not tested: any version of the tensorrt package, and this GPU" in text


@pytest.mark.usefixtures("no_tensorrt")
@pytest.mark.parametrize("lost", [False, True])
def test_the_build_script_builds_and_checks_coverage_by_itself(
    attention_graph: Any, tmp_path: Path, lost: bool
) -> None:
    model = attention_graph(unquantized_input=lost)
    output = tmp_path / "elsewhere" / "b300.engine"
    with pytest.raises(BackendMissingError):
        trt_build.build(model, gpu="b300", output=output, allow_slow=lost)
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "tensorrt.py").write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, str(output.with_suffix(".build.py"))],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "stand_in")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if lost else 0), done.stderr
    result = json.loads(done.stdout)
    assert result["engine_bytes"] == output.stat().st_size
    assert result["lost"] == (["block.to_out"] if lost else [])
    assert result["fp4_gemms"] == (1 if lost else 2)


def test_with_tensorrt_but_another_gpu_the_script_is_written_too(
    attention_graph: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find("tensorrt_rtx" if name == "tensorrt" else name))
    monkeypatch.setattr("trt_build.builder.local_compute_capabilities", lambda: ("SM90",))
    model = attention_graph()
    with pytest.raises(BackendMissingError, match="needs a b200 in this machine"):
        trt_build.build(model, gpu="b200")
    assert (model.parent / "b200.build.py").is_file()


def test_with_tensorrt_and_the_gpu_the_same_code_builds(
    attention_graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "tensorrt.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path / "stand_in"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stand_in"))
    monkeypatch.setattr("trt_build.builder.local_compute_capabilities", lambda: ("SM100",))
    result = trt_build.build(attention_graph(), gpu="b200")
    assert (result["fp4_linears"], result["quantized_linears"]) == (4, 4)
    assert result["compute_capabilities"] == ["SM100"]
    assert json.loads(Path(result["manifest"]).read_text())["request"]["backend"] == "tensorrt"
