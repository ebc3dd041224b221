from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trt_build
from fp4trt.errors import OutputExistsError

pytest.importorskip("tensorrt_rtx")


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_an_unchanged_request_is_answered_without_building(attention_graph: Any) -> None:
    model = attention_graph()
    first = trt_build.build(model)
    written = Path(first["engine"]).stat().st_mtime_ns
    second = trt_build.build(model)
    assert second["cached"]
    assert Path(second["engine"]).stat().st_mtime_ns == written
    assert {**first, "cached": True, "seconds": 0} == {**second, "seconds": 0}


def test_a_changed_byte_of_external_data_misses_and_replaces_our_own_engine(attention_graph: Any) -> None:
    model = attention_graph()
    first = trt_build.build(model)
    flip_byte(model.parent / "weights.bin", 5000)
    second = trt_build.build(model)
    assert not second["cached"]
    assert second["engine_sha256"] != first["engine_sha256"]


def test_bytes_that_no_initializer_uses_do_not_miss(attention_graph: Any) -> None:
    model = attention_graph()
    trt_build.build(model)
    weights = model.parent / "weights.bin"
    weights.write_bytes(weights.read_bytes() + b"a checkpoint's other tensors")
    assert trt_build.build(model)["cached"]


def test_another_profile_target_or_flag_misses(attention_graph: Any) -> None:
    model = attention_graph()
    engine = model.parent / "out.engine"
    trt_build.build(model, output=engine, resolution="1024")
    assert not trt_build.build(model, output=engine, resolution="512")["cached"]
    assert not trt_build.build(model, output=engine, resolution="512", gpu="gb10")["cached"]
    assert not trt_build.build(model, output=engine, resolution="512", gpu="gb10", weight_streaming=True)["cached"]
    assert trt_build.build(model, output=engine, resolution="512", gpu="gb10", weight_streaming=True)["cached"]


def test_a_moved_directory_keeps_its_engine(attention_graph: Any, tmp_path: Path) -> None:
    model = attention_graph("before")
    trt_build.build(model)
    model.parent.rename(tmp_path / "after")
    assert trt_build.build(tmp_path / "after")["cached"]


def test_an_engine_that_changed_since_is_neither_trusted_nor_silently_replaced(attention_graph: Any) -> None:
    model = attention_graph()
    engine = Path(trt_build.build(model)["engine"])
    flip_byte(engine, 1000)
    with pytest.raises(OutputExistsError, match="has changed; replace it with --force"):
        trt_build.build(model)
    assert not trt_build.build(model, force=True)["cached"]


def test_a_deleted_engine_is_built_again(attention_graph: Any) -> None:
    model = attention_graph()
    Path(trt_build.build(model)["engine"]).unlink()
    assert not trt_build.build(model)["cached"]
