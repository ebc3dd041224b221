"""Engines that this machine does not run: each refused in one line, before it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fp4trt.errors import BackendMissingError, BadEngine, BadOption, CannotRun
from fp4trt.progress import reporting
from tests.trt_build.conftest import WIDTH
from tests.trt_build.stand_in_card import HostCard
from tests.trt_build.stand_in_tensorrt import HEADER, Opens, StandIn, write_engine
from trt_build.runtime import engine as engines
from trt_build.session import open_session

trt = pytest.importorskip("tensorrt_rtx")


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        (manifest["request"] if key in manifest["request"] else manifest)[key] = value

    return change


CHANGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "version": (
        _set("tensorrt_version", "1.4.0.76"),
        r"with TensorRT for RTX 1\.4\.0\.76, and 1\..* is installed; build it again, or pip install .*==1\.4\.0\.76",
    ),
    "gpu": (
        _set("compute_capabilities", ["SM89", "SM121"]),
        r"was built for SM89, SM121, and the GPU here is a stand-in \(SM120\); build it with --gpu for that",
    ),
    "size": (_set("engine_bytes", 5), r"bytes, and rtx5090\.json tells of 5: it is cut off or another engine"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_the_json_beside_an_engine_rules_out_is_refused_before_it_is_loaded(
    what: str, opens: Opens, attention_engine: tuple[Path, Path], tmp_path: Path
) -> None:
    change, words = CHANGED[what]
    engine = shutil.copy(attention_engine[1], tmp_path / "rtx5090.engine")
    manifest = json.loads(attention_engine[1].with_suffix(".json").read_text())
    change(manifest)
    engine.with_suffix(".json").write_text(json.dumps(manifest))
    modules: list[StandIn] = []
    with pytest.raises(BadEngine, match=words) as caught:
        opens(engine, change=modules.append)
    assert "\n" not in str(caught.value)
    assert (modules[0].loaded, modules[0].looked_at) == (0, [])


def test_a_built_engine_is_held_against_its_json_and_runs_at_its_profile(
    opens: Opens, attention_engine: tuple[Path, Path], tmp_path: Path
) -> None:
    graph, engine = attention_engine
    profile = {"hidden_states": ((1, 1024, WIDTH), (1, 1024, WIDTH), (2, 1024, WIDTH))}
    session, module = opens(engine, of=graph, profiles=[profile])
    with session, open_session(graph) as reference:
        assert session.inputs["hidden_states"].dims == ("B", "L", WIDTH)
        states = torch.randn(1, 1024, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
        found, wanted = (each.run({"hidden_states": states})["latent"] for each in (session, reference))
        assert np.array_equal(np.asarray(found).view(np.uint16), np.asarray(wanted).view(np.uint16))
    assert module.looked_at == [engine.read_bytes()[:HEADER]]
    modules: list[StandIn] = []
    with pytest.raises(BadOption, match="built to hold all weights on the GPU"):
        opens(engine, of=graph, profiles=[profile], weight_streaming_budget=8, change=modules.append)
    assert modules[0].loaded == 0
    other = shutil.copy(engine, tmp_path / "x.engine")
    manifest = json.loads(engine.with_suffix(".json").read_text())
    manifest["inputs"][0]["dtype"] = "FLOAT"
    other.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(BadEngine, match=r"hidden_states is BFLOAT16 \[.*128\], and its JSON tells of FLOAT"):
        opens(other, of=graph, profiles=[profile])


def _diagnosed(*names: str) -> Callable[[StandIn], None]:
    def change(module: StandIn) -> None:
        bits = sum(getattr(trt.EngineInvalidityDiagnostics, name).value for name in names)
        module.validity = (trt.EngineValidity.INVALID, bits)

    return change


DIAGNOSED: dict[str, tuple[Callable[[StandIn], None], str]] = {
    "version": (
        _diagnosed("VERSION_MISMATCH"),
        r"built with another version than TensorRT for RTX 1\..*: build it again",
    ),
    "two": (_diagnosed("OLD_CUDA_DRIVER", "INSUFFICIENT_GPU_MEMORY"), r"driver is too old: .*; it does not fit into"),
    "nothing": (_diagnosed(), r"cannot run here: no reason given"),
}


@pytest.mark.parametrize("what", DIAGNOSED)
def test_what_tensorrt_diagnoses_from_the_header_is_said_in_words(what: str, opens: Opens) -> None:
    change, words = DIAGNOSED[what]
    modules: list[StandIn] = []

    def keep(module: StandIn) -> None:
        change(module)
        modules.append(module)

    with pytest.raises(BadEngine, match=words):
        opens(change=keep)
    assert modules[0].loaded == 0


def test_an_engine_without_json_is_judged_by_its_header(opens: Opens, tmp_path: Path) -> None:
    with pytest.raises(BadEngine, match=r"was not built for a stand-in \(SM120\): build it with --gpu for that"):
        opens(write_engine(tmp_path / "other.engine", "SM89"))
    (tmp_path / "junk.engine").write_bytes(b"no engine" * 100)
    with pytest.raises(BadEngine, match=r"it is damaged, or of another version than TensorRT"):
        opens(tmp_path / "junk.engine")
    with pytest.raises(BadEngine, match=r"no\.engine does not exist; expected an engine of fp4trt build"):
        opens(tmp_path / "no.engine")
    (tmp_path / "empty.engine").touch()
    with pytest.raises(BadEngine, match=r"empty\.engine is empty"):
        opens(tmp_path / "empty.engine")
    with pytest.raises(BadEngine, match=r"cannot be loaded: IRuntime.*the plan is broken"):
        opens(change=lambda module: setattr(module, "broken", True))
    told: list[str] = []
    with reporting(note=told.append):
        session, _ = opens(change=lambda each: setattr(each, "validity", (trt.EngineValidity.SUBOPTIMAL, 4)))
        session.close()
    assert "runs slower here than it could: the driver is too old" in told[0]
    # One that has no room for all weights may fit with a budget.
    session, _ = opens(change=_diagnosed("INSUFFICIENT_GPU_MEMORY"), streamable=1000, weight_streaming_budget=10)
    session.close()


def test_without_a_card_or_what_runs_an_engine_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = write_engine(tmp_path / "x.engine")
    monkeypatch.setattr("ctypes.CDLL", _no_library)
    with pytest.raises(
        CannotRun, match=r"needs an NVIDIA GPU, and no NVIDIA GPU is here: .*; run its graph, the \.onnx,"
    ):
        open_session(engine)
    monkeypatch.setattr(engines, "open_card", lambda _: HostCard())
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(BackendMissingError, match=r"tensorrt_rtx is not installed; pip install 'fp4trt\[rtx\]'"):
        open_session(engine)


def _no_library(_: str) -> Any:
    raise OSError
