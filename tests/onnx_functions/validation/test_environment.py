"""What the machine lacks says nothing of a graph: it is told as what it is, and no gate fails over it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import fp4trt
from fp4trt.errors import BadEnvironment, BadGraph
from onnx_functions.validation import weight_gates
from onnx_functions.validation.verdict import Gate, guarded, require_runtime, runtime_errors


def raising(error: Exception) -> Iterator[Gate]:
    yield from ()
    raise error


FAIL, *_, RUNTIME = runtime_errors()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9.00 GiB for an array"), "memory is lacking"),
        (RUNTIME("Exception during initialization: std::bad_alloc"), "memory is lacking"),
        (FAIL("bfc_arena.cc Failed to allocate memory for requested buffer of size 9663676416"), "memory is lacking"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "memory is lacking",
        ),
        (FAIL("open file weights.data fail, errcode = 13 - unknown error"), "the rights to a file are lacking"),
        (FAIL("[ONNXRuntimeError] : 18 : SystemError : 13 : open file"), "the rights to a file are lacking"),
        (FAIL("Unsupported model IR version: 14, max supported IR version: 13"), "this ONNX Runtime is too old"),
        (ImportError("libonnxruntime.so.1: cannot open shared object file"), "a package cannot be imported"),
    ],
)
def test_what_the_machine_lacks_fails_no_gate(error: Exception, words: str) -> None:
    with pytest.raises(BadEnvironment, match=f"the check of weights could not be run: {words}"):
        guarded("weights", lambda: raising(error))


def test_a_full_disk_is_told_as_the_system_tells_it() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        guarded("weights", lambda: raising(OSError(28, "No space left on device", "report.json")))


@pytest.mark.parametrize("error", [BadGraph("node q reads nothing"), FAIL("Type Error: Type parameter (T) of MatMul")])
def test_what_a_graph_has_broken_is_a_failed_gate(error: Exception) -> None:
    (gate,) = guarded("weights", lambda: raising(error))
    assert not gate.passed
    assert gate.detail == f"could not be run: {error}"


def test_the_last_line_speaks_of_no_failed_numerics(
    quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking(*_: object) -> Gate:
        raise np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.float32))

    monkeypatch.setattr(weight_gates, "weights_gate", lacking)
    assert fp4trt.run(["validate", str(quantized_digits), "-o", str(tmp_path / "report")]) == 2
    printed = capsys.readouterr()
    assert "the check of weights could not be run: memory is lacking (Unable to allocate 4.00 TiB" in printed.err
    assert "FAILED" not in printed.out
    assert not (tmp_path / "report").exists()


def test_without_onnx_runtime_nothing_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.capi", None)
    monkeypatch.delitem(sys.modules, "onnxruntime.capi.onnxruntime_pybind11_state", raising=False)
    with pytest.raises(BadEnvironment, match="ONNX Runtime, which validates, cannot be imported"):
        require_runtime()
