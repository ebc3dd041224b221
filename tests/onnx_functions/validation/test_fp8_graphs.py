"""What `validate` and `inspect` say of a graph with linears in FP8, and of one with which something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnx_functions.graph.linears import Graph, promised_linears
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table, tree_table
from onnx_functions.validation.promise_gate import promise_gate
from onnx_functions.validation.run_gates import validate
from onnx_functions.validation.torch_reference import open_reference
from onnx_functions.validation.verdict import Report
from tests.onnx_functions.linting.damage import WEIGHTS, Damaged

ROOT = "transformer_blocks.0"
FIRST, CONTEXT = f"{ROOT}.norm1.linear", f"{ROOT}.norm1_context.linear"
IN_FP4 = f"{ROOT}.attn.to_q"


def details(report: Report) -> dict[str, str]:
    return {gate.name: gate.detail for gate in report.gates}


def failures(report: Report) -> dict[str, str]:
    return {gate.name: gate.detail for gate in report.failures}


@pytest.fixture
def in_fp8(fp8_digits: Path, tmp_path: Path) -> Damaged:
    return Damaged.copy(fp8_digits, tmp_path / "model")


def test_weights_quantizers_and_linears_of_both_formats_pass_every_gate(fp8_digits: Path) -> None:
    report = validate(fp8_digits, level="blocks", blocks=ROOT)
    assert failures(report) == {}
    told = details(report)
    assert told["promise"] == "30 linears, 17 of them in FP4 and 3 of them in FP8, as promised"
    assert told["quantizers"].endswith("of 13 quantizers differ")
    assert {row.path: row.differing_codes for row in report.linears if row.path in (FIRST, IN_FP4)} == {
        FIRST: 0,
        IN_FP4: 0,
    }


def test_against_the_16_bit_model_the_error_of_fp8_is_measured_and_bounded(fp8_digits: Path, digits: Path) -> None:
    report = validate(fp8_digits, digits, level="blocks", blocks="1")
    assert failures(report) == {}
    assert details(report)["rounded weights"].endswith("codes are those nearest to the reference")
    errors = {row.path: row.weight_error for row in report.linears}
    assert errors[FIRST] == pytest.approx(0.027, abs=0.004)
    assert errors[IN_FP4] > 0.08


def test_each_damage_to_a_linear_in_fp8_is_named(in_fp8: Damaged, fp8_digits: Path) -> None:
    codes = in_fp8.values(f"{FIRST}.weight")
    codes[5] ^= 1
    in_fp8.put(f"{FIRST}.weight", codes)
    scale = in_fp8.values(f"{CONTEXT}.input_scale")
    in_fp8.put(f"{CONTEXT}.input_scale", scale * np.float32(1.01))
    found = failures(validate(in_fp8.save(), fp8_digits, level="blocks", blocks=ROOT))
    assert f"{FIRST}.weight: 1 of" in found["weights"]
    assert f"(input of {CONTEXT})" in found["quantizers"]
    assert {"stored tensors", "weights", "quantizers", "linears"} <= found.keys()
    assert f"{CONTEXT}/MatMul" in found["linears"]
    assert FIRST not in found["quantizers"]


def test_a_weight_with_a_coarser_scale_than_it_needs_exceeds_the_limit_of_fp8(in_fp8: Damaged, digits: Path) -> None:
    """A weight of half as many bits: every code rounded to an even one."""
    in_fp8.put(f"{FIRST}.weight", in_fp8.values(f"{FIRST}.weight") & 0xFC)
    found = failures(validate(in_fp8.save(), digits, level="blocks", blocks=ROOT))
    assert f"{FIRST}.weight: relative L2 error 0.1" in found["weight error"]


def test_a_promise_of_fp8_is_held_against_the_checkpoint_and_the_nodes(in_fp8: Damaged, fp8_digits: Path) -> None:
    def verdict(linears: dict[str, list[str]]) -> str:
        entry = next(entry for entry in in_fp8.model.metadata_props if entry.key == "fp4trt.linears")
        entry.value = json.dumps(linears)
        return promise_gate(in_fp8.model, held.formats, held.linears).detail

    held = open_reference(in_fp8.model, fp8_digits / "model.onnx", None)
    promised = promised_linears(in_fp8.model)
    moved = {**promised, "fp8": promised["fp8"][1:], "bf16": [FIRST, *promised["bf16"]]}
    assert verdict(moved).startswith(f"{FIRST}: the checkpoint has it in FP8, the graph promises bf16")
    moved = {**promised, "fp8": [IN_FP4, *promised["fp8"]], "nvfp4": [p for p in promised["nvfp4"] if p != IN_FP4]}
    assert verdict(moved).startswith(f"{IN_FP4}: the checkpoint has it in NVFP4, the graph promises fp8")
    moved = {**promised, "fp8": promised["fp8"][1:]}
    assert "the checkpoint has it in FP8, the graph does not promise it" in verdict(moved)
    product = in_fp8.node(f"{FIRST}/MatMul")
    product.input[0] = Graph(in_fp8.model).linear(FIRST).input
    assert verdict(promised) == f"{FIRST}: node {FIRST}/MatMul reads an activation that is not quantized"
    product.input[0] = Graph(in_fp8.model).linear(IN_FP4).activation
    assert verdict(promised) == f"{FIRST}: node {FIRST}/MatMul reads an activation in FP4"


def test_a_zero_point_says_that_a_quantizer_gives_fp8_as_well_as_the_attribute_does(in_fp8: Damaged) -> None:
    quantizer = f"{FIRST}/input/QuantizeLinear"
    in_fp8.set(quantizer, output_dtype=None)
    assert Graph(in_fp8.model).linear(FIRST).quantizer is None
    in_fp8.put("zero", np.zeros((), np.uint8), (), TensorProto.FLOAT8E4M3FN)
    in_fp8.node(quantizer).input.append("zero")
    found = Graph(onnx.ModelProto.FromString(in_fp8.model.SerializeToString())).linear(FIRST).quantizer
    assert found is not None
    assert (found.format, found.node) == ("fp8", quantizer)
    assert (in_fp8.path.parent / WEIGHTS).is_file()


def test_a_checkpoint_and_its_graph_are_described_with_both_formats(fp8_digits: Path) -> None:
    checkpoint, graph = describe(fp8_digits), describe(fp8_digits / "model.onnx")
    for found in (checkpoint, graph):
        counts = {kind: entry["linears"] for kind, entry in found["formats"].items()}
        assert counts == {"nvfp4": 17, "fp8": 3, "bf16": 10}
        assert found["promise"]["differing"] == []
        assert found["group_count"] == 13
        assert "  every linear is as promised" in table(found)
    assert graph["promise"]["lost_groups"] == []
    assert graph["activation_quantizers"] == 13
    assert any("norm1.linear" not in line and " fp8 " in line for line in tree_table(checkpoint))
    assert found["fp4_linears"] == 17


def test_an_fp8_linear_that_reads_its_input_in_16_bit_is_described_as_weight_only(in_fp8: Damaged) -> None:
    in_fp8.node(f"{FIRST}/MatMul").input[0] = Graph(in_fp8.model).linear(FIRST).input
    (differing,) = describe(in_fp8.save())["promise"]["differing"]
    assert differing == {"path": FIRST, "promised": "fp8", "found": "fp8 weight-only"}


def test_an_engine_is_described_with_what_it_promises_in_fp8(tmp_path: Path) -> None:
    manifest = {
        "kind": "fp4trt engine",
        "request": {"promised_fp4": ["a"], "promised_fp8": ["b", "c"]},
        "gemms": [
            {"format": kind, "linears": [name]} for kind, name in (("nvfp4", "a"), ("fp8", "b"), ("bfloat16", "c"))
        ],
        "lost": [{"linear": "c", "kernel": "k", "reason": "the builder chose another kernel", "promised": "fp8"}],
        "fp4_gemms": 1,
        "fp4_linears": 1,
        "fp8_gemms": 1,
        "fp8_linears": 1,
        "quantized_linears": 3,
    }
    (tmp_path / "e.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = describe(tmp_path / "e.json")
    reason = "the builder chose another kernel"
    assert found["promise"]["differing"] == [{"path": "c", "promised": "fp8", "found": "bf16", "reason": reason}]
    counts = {"nvfp4": {"gemms": 0, "linears": 0}, "fp8": {"gemms": 3, "linears": 3}}
    for told, words in (
        (manifest, ["FP4 GEMMs 1", "linears in FP4 1 of 3 (33%)", "FP8 GEMMs 1", "linears in FP8 1 of 3 (33%)"]),
        (manifest | {"coverage": counts}, ["FP8 GEMMs 3", "linears in FP8 3 of 3 (100%)"]),
    ):
        (tmp_path / "e.json").write_text(json.dumps(told), encoding="utf-8")
        lines = [" ".join(line.split()) for line in table(describe(tmp_path / "e.json"))]
        first = lines.index("size 0 bytes") + 1
        assert lines[first : first + len(words)] == words
