"""Engines with several optimization profiles, of a small graph and of the built-in model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fp4trt
import trt_build
from fp4trt.errors import BackendMissingError, BadProfileError, CoverageError
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table
from tests.trt_build.stand_in import STAND_IN
from trt_build import builder
from trt_build.layer_info import find_gemms, layers_of_profiles, parse_layers
from trt_build.memory import memory_lines

pytest.importorskip("tensorrt_rtx")

PROFILES = ["resolution=1024 batch=1", {"resolution": (512, 768, 1024), "batch": (1, 2, 4)}]
LINEARS = ["block.to_q", "block.to_k", "block.to_v", "block.to_out"]


class Log:
    """What the builder's process said of its layers."""

    def __init__(self) -> None:
        self.layers = ""

    def run(self, request: dict[str, Any], on_progress: Any) -> dict[str, Any]:
        event = RUN(request, on_progress)
        self.layers = event["layers"]
        return event


RUN = builder.run_child


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    made = Log()
    monkeypatch.setattr(builder, "run_child", made.run)
    return made


def test_one_engine_has_both_profiles_and_each_its_own_fp4_gemms(attention_graph: Any, log: Log) -> None:
    model = attention_graph()
    result = trt_build.build(model, profiles=PROFILES)
    assert [each["symbols"] for each in result.profiles] == [
        {"B": [1, 1, 1], "L": [4096, 4096, 4096]},
        {"B": [1, 2, 4], "L": [1024, 2304, 4096]},
    ]
    assert result.profile == result.profiles[0]["symbols"]
    for each in result.profiles:
        assert (each["fp4_gemms"], each["fp4_linears"], each["lost"]) == (2, 4, [])
    assert (result.fp4_gemms, result.fp4_linears) == (2, 4)
    assert sum(each["kernels"] for each in result.profiles) == len(parse_layers(log.layers))
    (told,) = (line for line in log.layers.splitlines() if line.startswith(" Name: hidden_states, IOMode: Input"))
    assert told.count("MinShape") == 2  # the engine's own word; without a GPU it cannot be loaded and asked
    assert "MaxShape: [4,4096,128]" in told

    content = json.loads(Path(result.manifest).read_text())
    assert content["request"]["profile"] == content["request"]["profiles"][0] == content["profiles"][0]["shapes"]
    assert content["profiles"] == result["profiles"]
    assert [each["shapes"] for each in content["profiles"]] == content["request"]["profiles"]

    again = trt_build.build(model, profiles=PROFILES)
    assert again.cached
    assert {**again, "cached": False, "seconds": 0} == {**result, "seconds": 0}
    assert not trt_build.build(model, profiles=PROFILES[::-1]).cached

    found = describe(model.parent / "rtx5090.engine")
    assert len(found["profiles"]) == 2
    lines = "\n".join(table(found))
    assert "profiles               2" in lines
    assert "hidden_states [[1, 1024, 128], [2, 2304, 128], [4, 4096, 128]]" in lines


def test_one_profile_is_the_request_of_the_plain_options(attention_graph: Any) -> None:
    model = attention_graph()
    plain = trt_build.build(model, resolution="768x1360", batch=1)
    written = Path(plain.manifest).read_bytes()
    assert "profiles" not in json.loads(written)
    assert "profiles" not in json.loads(written)["request"]
    assert "profiles" not in plain.as_dict()
    told: list[str] = []
    both = ["resolution=768x1360", "resolution=1360x768"]
    assert trt_build.build(model, batch=1, profiles=both, on_line=told.append).cached
    assert Path(plain.manifest).read_bytes() == written
    assert told[0].startswith("--profile 'resolution=1360x768': pictures of as many tokens")


def test_the_command_says_how_many_and_what_each_is(attention_graph: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = attention_graph()
    asked = ["--profile", "resolution=1024", "--profile", "resolution=512 batch=1:1:4"]
    assert fp4trt.run(["build", str(model), "--batch", "1", *asked]) == 0
    out, err = capsys.readouterr()
    assert ", 2 profiles, built in" in out
    assert "\n  profile 0: B 1, L 4096; 2 FP4 GEMMs, " in out
    assert "\n  profile 1: B 1:1:4, L 1024; 2 FP4 GEMMs, " in out
    assert "for 2 profiles as for one" in err
    for wrong, said in ((["--profile", "batch=1"], "is equal to"), (["--profile", "batch 1"], "expected KEY=VALUE")):
        assert fp4trt.run(["build", str(model), "--profile", "batch=1", *wrong]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_a_profile_that_the_graph_cannot_serve_is_named(attention_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "require_served", _refuse_the_second())
    with pytest.raises(BadProfileError, match="--profile 'batch=2'"):
        trt_build.build(attention_graph(), profiles=["batch=1", "batch=2"])


def _refuse_the_second() -> Any:
    seen: list[str] = []

    def refuse(_model: Any, _folder: Any, profile: Any) -> None:
        seen.append(profile.label)
        if len(seen) == 2:
            raise BadProfileError(f"the graph cannot serve the minimum of {profile.label}")

    return refuse


def test_what_one_profile_loses_is_lost(attention_graph: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is known that FP4 leaves in one profile alone, so the log of one is made up."""
    model = attention_graph()

    def run(request: dict[str, Any], on_progress: Any) -> dict[str, Any]:
        event = RUN(request, on_progress)
        lines = event["layers"].splitlines()
        lost = [line.startswith("Name: block.to_out/MatMul [profile 1]") for line in lines]
        assert sum(lost) == 1
        lines = [re.sub("FP4E2M1|FP8", "BFloat16", line) if of else line for line, of in zip(lines, lost, strict=True)]
        return {**event, "layers": "\n".join(lines)}

    monkeypatch.setattr(builder, "run_child", run)
    with pytest.raises(CoverageError, match=r"1 of 4 linears .* block\.to_out \(in profile 1: the builder chose"):
        trt_build.build(model, profiles=PROFILES)
    result = trt_build.build(model, profiles=PROFILES, allow_slow=True)
    assert (result.fp4_linears, result.fp4_gemms) == (3, 2)
    assert [each["fp4_linears"] for each in result.profiles] == [4, 3]
    assert [item["linear"] for item in result.lost] == ["block.to_out"]
    promise = describe(Path(result.manifest))["promise"]
    assert [(item["path"], item["found"]) for item in promise["differing"]] == [("block.to_out", "bf16")]


@pytest.mark.slow
def test_an_attention_that_falls_apart_in_one_profile_is_lost(fp8_attention_digits: Path, tmp_path: Path) -> None:
    wide, short = "resolution=32 text=8", "resolution=8:16:16 text=8"
    with pytest.raises(BadProfileError, match=f"^--profile '{short}': attention in FP8 needs 32 tokens"):
        trt_build.build(fp8_attention_digits, profiles=[wide, short])
    engine = tmp_path / "digits.engine"
    result = trt_build.build(fp8_attention_digits, output=engine, profiles=[wide, short], allow_slow=True)
    assert [each["fp8_attentions"] for each in result.profiles] == [2, 0]
    assert (result.fp8_attentions, result.quantized_attentions) == (0, 2)
    assert result.lost_attentions[0]["reason"].startswith("in profile 1: the builder took it apart")


@pytest.mark.slow
def test_the_built_in_model_is_all_in_fp4_in_each_profile(quantized_digits: Path, tmp_path: Path) -> None:
    result = trt_build.build(
        quantized_digits,
        output=tmp_path / "e.engine",
        batch=1,
        profiles=["resolution=16 text=8", "resolution=16:16:32"],
    )
    for each in result.profiles:
        assert each["fp4_linears"] == each["quantized_linears"] == 20
        assert each["fp4_gemms"] <= 13


def test_a_log_without_one_of_the_profiles_is_no_proof(attention_graph: Any, log: Log) -> None:
    trt_build.build(attention_graph(), profiles=PROFILES)
    first, second, third = layers_of_profiles(log.layers, 3)
    assert len(first) + len(second) == len(parse_layers(log.layers))
    assert third == ()
    products = {f"{linear}/MatMul" for linear in LINEARS}
    for layers in (first, second):
        assert {name for gemm in find_gemms(layers, products) for name in gemm.linears} == products


def test_the_memory_of_several_is_that_of_one() -> None:
    one, several = (memory_lines(1 << 30, (), profiles) for profiles in (1, 3))
    assert several == [f"{one[0]} for 3 profiles as for one; it compiles them one after the other"]


@pytest.mark.parametrize("lost", [False, True])
def test_the_build_script_builds_all_profiles_and_checks_each(
    lost: bool, attention_graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", _without_tensorrt())
    model = attention_graph(unquantized_input=lost)
    with pytest.raises(BackendMissingError):
        trt_build.build(model, gpu="b200", profiles=PROFILES, allow_slow=lost)
    (tmp_path / "tensorrt.py").write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, str(model.parent / "b200.build.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if lost else 0), done.stderr
    result: Mapping[str, Any] = json.loads(done.stdout)
    assert result["lost"] == (["block.to_out"] if lost else [])
    assert [each["fp4_gemms"] for each in result["profiles"]] == [1 if lost else 2] * 2
    assert result["engine_bytes"] == (model.parent / "b200.engine").stat().st_size


def _without_tensorrt() -> Any:
    import importlib.util

    find = importlib.util.find_spec
    return lambda name: None if name == "tensorrt" else find(name)
