"""Exports of one config share one trace, kept in `build/test-folders`: tracing is nine tenths of an export.

It reads nothing of a checkpoint but the config. `tests/exporter/test_export.py` compares an export that shares with one
that does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from filelock import FileLock

from tests.shared_folders import KEPT, sources

TRACES = KEPT / "traces"


@pytest.fixture(scope="session")
def shared_traces() -> None:
    """Let exports share traces."""
    import exporter  # noqa: F401

    share_traces()


def share_traces() -> None:
    """Let exports from now on share traces, if anybody has imported the exporter."""
    if "exporter" not in sys.modules:
        return
    from exporter import onnx_export

    onnx_export.trace = lambda checkpoint: None
    onnx_export.translate = lambda checkpoint, program: _translated(checkpoint)


def _translated(checkpoint: Any) -> Any:
    from exporter import trace
    from exporter.decompose import decompose
    from fp4trt.families import FAMILIES

    if checkpoint.family not in FAMILIES or trace.decompose is not decompose:  # a test's own
        return trace.translate(checkpoint, trace.trace(checkpoint))
    config = {key: value for key, value in checkpoint.config.items() if key[0] != "_" and value is not None}
    config = trace.traced_config(checkpoint.family, config)
    config.pop("quantization_config", None)
    key = json.dumps([checkpoint.family.name, config, trace.TRACED_BLOCKS], sort_keys=True)
    digests = [hashlib.sha256(each).hexdigest()[:12] for each in (sources(), key.encode())]
    path = TRACES / f"{'-'.join(digests)}.onnx"
    TRACES.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{TRACES}.lock"):
        if not path.exists():
            for old in TRACES.glob("*.onnx"):
                if not old.name.startswith(digests[0]):
                    old.unlink()
            _write(trace.translate(checkpoint, trace.trace(checkpoint)), path)
    return _read(path)


def _write(model: Any, path: Path) -> None:
    """Write a graph whose weights have no values."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = ir.ExternalTensor("", 0, 0, value.dtype, shape=value.shape, name=value.name)
    path.with_suffix(".partial").write_bytes(ir.to_proto(model).SerializeToString())
    os.replace(path.with_suffix(".partial"), path)


def _read(path: Path) -> Any:
    import onnx_ir as ir

    model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
