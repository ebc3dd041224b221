"""`fp4trt bench`: what is timed where, how a schedule goes, and what is left out. No figure is judged."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fp4trt
from fp4trt.errors import BadCheckpoint, BadOption, CannotRun, UnknownArtifact
from generation.bench import bench as benching
from generation.bench import child
from generation.bench.memory import CardWatch, resident_peak
from generation.bench.peers import PEERS, asked_for
from generation.bench.place import Place, on_cpu, runnable
from generation.bench.processes import NotRun, run
from generation.bench.schedule import Schedule, Times, summary, timed
from generation.transformer import SessionTransformer
from tests.frame.diffusers_models import MODELS
from tests.trt_build.stand_in_card import HostCard

NO_GPU = on_cpu("no NVIDIA GPU is here: a reason")
CARD = Place("cuda:0", "NVIDIA GeForce RTX 5090", "SM120")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Time in this process, without a card; gives the kinds that are asked for."""
    kinds: list[str] = []

    def measure(request: Any, advance: Callable[[], None]) -> dict[str, Any]:
        kinds.append(request["kind"])
        try:
            return child.measure(json.loads(json.dumps(request)), advance)
        except Exception as error:
            raise NotRun(child._one_line(error)) from None

    monkeypatch.setattr(benching, "run", measure)
    monkeypatch.setattr(benching, "here", lambda: NO_GPU)
    return kinds


def test_without_a_card_the_graph_is_timed_beside_torch_and_all_else_has_its_reason(
    quantized_digits: Path, in_process: list[str]
) -> None:
    result = fp4trt.bench(quantized_digits, steps=2, repeats=2, warmup=1)
    ours, bf16, fp32 = result.subjects
    assert in_process == [each["name"] for each in result.subjects] == ["session", "bf16", "fp32"]
    assert {each["name"] for each in result.not_run} == set(PEERS) - {"bf16", "fp32"}
    assert all(each["reason"] for each in result.not_run)
    assert (result.baseline, bf16["speed"], result.weights) == ("bf16", 1.0, "random")
    assert ours["speed"] == bf16["per_step"]["median_s"] / ours["per_step"]["median_s"]
    for each in (ours, bf16, fp32):
        assert each["per_step"]["calls"] == 4
        assert len(each["warmup_s"]) == 1
        assert 0 < each["per_step"]["min_s"] <= each["per_step"]["median_s"] <= each["per_step"]["p90_s"]
        assert each["end_to_end"]["min_s"] >= 2 * each["per_step"]["min_s"]
    assert result.sizes == {"B": 1, "L": 16, "T": 8}
    lines = result.table.splitlines()
    assert lines[1].startswith("no NVIDIA GPU is here: a reason; so it is the graph in ONNX Runtime, beside torch")
    assert sum(line.startswith("not run: ") for line in lines) == 3
    assert "table" not in result.as_dict()


def test_the_command_times_a_session_in_a_process_of_its_own(
    quantized_digits: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benching, "here", lambda: NO_GPU)
    options = ["--peers", "none", "--steps", "1", "--repeats", "1", "--warmup", "1", "--resolution", "32", "--json"]
    assert fp4trt.run(["bench", str(quantized_digits / "model.onnx"), *options]) == 0
    result = json.loads(capfd.readouterr().out)
    (ours,) = result["subjects"]
    assert (result["baseline"], ours["speed"], result["sizes"]["L"]) == (None, None, 64)
    assert result["place"]["no_gpu_because"] == "a graph is timed in ONNX Runtime on the CPU"
    if resident_peak() is not None:
        # Without torch, which would take several times as much.
        assert 20e6 < ours["memory_peak_bytes"] < 250e6


def test_a_process_that_fails_is_told_with_its_reason(tmp_path: Path) -> None:
    schedule = vars(Schedule(1, 1, 1, "x", {}))
    request = {
        "kind": "session",
        "path": str(tmp_path / "no.onnx"),
        "device": "cpu",
        "inputs": "",
        "schedule": schedule,
    }
    with pytest.raises(NotRun, match=r"no\.onnx does not exist"):
        run(request, lambda: None)


def test_a_schedule_moves_the_state_and_tells_the_time_in_the_inputs_own_types() -> None:
    seen: list[tuple[float, float]] = []

    def call(given: Any) -> Any:
        seen.append((float(given["t"][0]), float(given["x"][0])))
        assert given["x"].dtype == inputs["x"].dtype
        return inputs["x"] * 0 + 2

    for inputs in (
        {"x": torch.tensor([8.0]).bfloat16(), "t": torch.zeros(1)},
        {"x": np.array([8.0], np.float32), "t": np.zeros(1, np.float32)},
    ):
        seen.clear()
        calls = itertools.count()
        times = timed(Schedule(4, 1, 2, "x", {"t": 1000.0}), inputs, call, calls.__next__)
        assert seen[1:5] == seen[5:] == [(1000.0, 8.0), (750.0, 7.5), (500.0, 7.0), (250.0, 6.5)]
        assert (len(times.warmup), len(times.calls), len(times.schedules), next(calls)) == (1, 8, 2, 9)


def test_figures_are_medians_and_ninetieth_percentiles() -> None:
    found = summary(Times((9.0, 3.0), tuple(map(float, range(1, 12))), (5.0, 7.0, 6.0)))
    assert found["first_call_s"] == 9.0
    assert found["per_step"] == {"median_s": 6.0, "p90_s": 10.0, "min_s": 1.0, "calls": 11}
    assert found["end_to_end"] == {"median_s": 6.0, "min_s": 5.0}


def test_what_is_timed_is_the_engine_for_the_card_or_the_graph_without_one(
    attention_manifest: Callable[[str, str], Path], tmp_path: Path
) -> None:
    with pytest.raises(CannotRun, match=r"holds no engine for NVIDIA GeForce RTX 5090 \(SM120\); build one"):
        runnable(tmp_path, CARD)
    engine, _ = attention_manifest("rtx5090", "SM120"), attention_manifest("gb10", "SM121")
    assert runnable(tmp_path, CARD) == runnable(engine, CARD) == (engine, CARD)
    attention_manifest("other", "SM120")
    with pytest.raises(CannotRun, match=r"several engines for .*: other\.engine, rtx5090\.engine; name one"):
        runnable(tmp_path, CARD)
    with pytest.raises(
        CannotRun, match=r"a reason; and .*model\.onnx, to time in ONNX Runtime instead, does not exist"
    ):
        runnable(engine, NO_GPU)
    graph = tmp_path / "model.onnx"
    graph.touch()
    assert runnable(engine, NO_GPU) == runnable(tmp_path, NO_GPU) == (graph, NO_GPU)
    assert runnable(graph, CARD)[1].device == "cpu"
    with pytest.raises(UnknownArtifact, match=r"x\.bin does not exist; expected what fp4trt export or build wrote"):
        runnable(tmp_path / "x.bin", CARD)
    for path in tmp_path.glob("*.json"):
        path.write_text("{")
    with pytest.raises(CannotRun, match=r"\(SM120\) \(.*rtx5090\.json is not JSON .*; copy it again\); build one"):
        runnable(tmp_path, CARD)


@pytest.fixture
def attention_manifest(tmp_path: Path) -> Callable[[str, str], Path]:
    """Return what writes an engine that is none, with the JSON of one."""

    def write(name: str, capability: str) -> Path:
        engine = tmp_path / f"{name}.engine"
        engine.write_bytes(b"vtrt")
        request = {"backend": "tensorrt_rtx", "compute_capabilities": [capability]}
        manifest = {"kind": "fp4trt engine", "format": 1, "engine_bytes": 4, "request": request}
        engine.with_suffix(".json").write_text(json.dumps(manifest))
        return engine

    return write


def test_a_peer_runs_or_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    old = Place("cuda:0", "NVIDIA H200", "SM90")
    runs = {
        "cpu": asked_for(NO_GPU, None),
        "asked": asked_for(NO_GPU, ("compile", "nvfp4")),
        "old": asked_for(old, None),
        "without torchao": asked_for(CARD, None),
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    runs["all"] = asked_for(CARD, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runs["torch for a CPU"] = asked_for(CARD, None)
    assert all(set(run) | set(not_run) == set(PEERS) for run, not_run in runs.values())
    assert {name: list(run) for name, (run, _) in runs.items()} == {
        "cpu": ["bf16", "fp32"],
        "asked": ["compile"],
        "old": ["bf16", "compile"],
        "without torchao": ["bf16", "compile"],
        "all": ["bf16", "compile", "nvfp4", "mxfp8"],
        "torch for a CPU": [],
    }
    assert "here is SM90" in runs["old"][1]["nvfp4"]
    assert "pip install torchao" in runs["without torchao"][1]["mxfp8"]
    assert "sees no GPU" in runs["torch for a CPU"][1]["bf16"]


def test_a_benchmark_without_a_model_or_of_a_range_is_refused(
    quantized_digits: Path, digits: Path, tmp_path: Path, in_process: list[str], tiny_flux: Callable[..., Path]
) -> None:
    shutil.copy(quantized_digits / "model.onnx", tmp_path)
    with pytest.raises(BadCheckpoint, match=r"holds no config\.json, .* name its source with --reference"):
        fp4trt.bench(tmp_path)
    with pytest.raises(BadOption, match=r"--resolution is 8:16:32; expected one size to time"):
        fp4trt.bench(quantized_digits, resolution=(8, 16, 32))
    with pytest.raises(BadOption, match="--frames is 9, and flux-digits has no such dimension; leave it out"):
        fp4trt.bench(quantized_digits, frames=9)
    for other in (tiny_flux(tmp_path / "flux"), "digits"):  # of another family; with more blocks
        with pytest.raises(BadCheckpoint, match=r"is another model than .*model\.onnx; name the checkpoint"):
            fp4trt.bench(quantized_digits, reference=other)
    with pytest.raises(BadCheckpoint, match=r"is quantized already; expected the BF16 checkpoint"):
        fp4trt.bench(quantized_digits, reference=quantized_digits)
    with pytest.raises(BadOption, match=r"peers is \['trt'\]; expected names in a list, each one of: bf16"):
        fp4trt.bench(quantized_digits, peers=["trt"])
    with pytest.raises(CannotRun, match=r"model\.onnx does not run"):
        fp4trt.bench(tmp_path, reference=digits, peers=[])
    shutil.copy(quantized_digits / "diffusion_pytorch_model.safetensors", tmp_path)
    other_config = {**MODELS["wan"].config, "_class_name": MODELS["wan"].class_name}
    (tmp_path / "config.json").write_text(json.dumps(other_config))
    with pytest.raises(CannotRun, match="it takes guidance, pooled_projections, txt_ids, which the model of its conf"):
        fp4trt.bench(tmp_path, peers=[])
    assert in_process == ["session", "session"]


def test_on_a_card_a_session_is_called_as_a_pipeline_calls_it_and_its_memory_is_the_card_s(
    quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from calibration.checkpoints.quantized import read
    from trt_build.session import open_session

    checkpoint = read(quantized_digits)
    inputs = checkpoint.family.example_inputs(checkpoint.config, (1, 16, 8), 0, torch.bfloat16)
    benching._save(tmp_path / "inputs", inputs)
    with open_session(quantized_digits / "model.onnx") as session:
        given, call = child._on_card(session, tmp_path / "inputs", "cpu")
        on_card = call(given)
        given, call = child._on_cpu(session, tmp_path / "inputs")
        assert np.array_equal(call(given).astype(np.float32), on_card.float().numpy())
        assert torch.equal(SessionTransformer(session)(**inputs)[0], on_card)
    card = HostCard(limit=1000)
    with CardWatch(card) as watch:
        card.free(card.allocate(600))
        card.allocate(200)
    assert 200 <= watch.peak <= 800
