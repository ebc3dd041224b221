"""What inspect says of attention in FP8, promised against found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fp4trt.checkpoint_manifest import MANIFEST
from onnx_functions.inspection.attention import of_engine
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table
from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.attention import A, B, in_fp8


def test_a_checkpoint_and_its_graph_are_described(fp8_attention_digits: Path) -> None:
    found = describe(fp8_attention_digits)
    for described in (found["attention"], found["graph"]["attention"]):
        assert len(described["fp8"]) == len(described["promised"]) == 2
        assert described["differing"] == []
    assert "  attention in FP8: 2, promised 2" in table(found)


def test_nothing_is_said_where_there_is_none(quantized_digits: Path) -> None:
    found = describe(quantized_digits)
    assert found["attention"] is found["graph"]["attention"] is None
    assert not any("attention" in line for line in table(found))


def test_a_promise_that_is_not_kept_is_told_of(damaged: Damaged) -> None:
    in_fp8(damaged, A, B)
    damaged.node(f"{B}/output/MatMul").input[1] = damaged.node(f"{B}/v/QuantizeLinear").input[0]
    described = describe(damaged.save())["attention"]
    assert described == {"fp8": [A], "promised": [A, B], "differing": [{"path": B, "reason": "v not in FP8"}]}


def test_a_graph_of_other_origin_promises_nothing(damaged: Damaged) -> None:
    in_fp8(damaged, A)
    del damaged.model.metadata_props[:]
    assert describe(damaged.save())["attention"] == {"fp8": [A], "promised": None, "differing": []}


def test_a_checkpoint_without_its_manifest_is_described_by_its_tensors(
    fp8_attention_digits: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(fp8_attention_digits, tmp_path / "alone", ignore=shutil.ignore_patterns("*.onnx"))
    (folder / MANIFEST).unlink()
    described = describe(folder)["attention"]
    assert (len(described["fp8"]), described["promised"]) == (2, None)


@pytest.mark.parametrize("request_", [{}, {"promised_attentions": [A, B]}])
def test_an_engine_has_what_was_promised_and_not_lost(request_: dict[str, list[str]]) -> None:
    lost = [{"attention": B, "kernels": [], "reason": "why"}]
    described = of_engine({"request": request_, "lost_attentions": lost if request_ else []})
    expected = {"fp8": [A], "promised": [A, B], "differing": [{"path": B, "reason": "why"}]}
    assert described == (expected if request_ else None)
