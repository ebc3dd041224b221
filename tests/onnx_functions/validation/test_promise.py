"""No graph passes by promising little, and no gate by comparing nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fp4trt.errors import BadGraph, BadReference, UnknownArtifact
from onnx_functions.graph.linears import promised_linears
from onnx_functions.validation.run_gates import validate
from onnx_functions.validation.verdict import Report, gate_of_offenders

TO_Q = "transformer_blocks.0.attn.to_q"
NOTHING: dict[str, list[str]] = {"nvfp4": [], "bf16": []}


def gate(report: Report, name: str) -> str:
    return next(gate.line for gate in report.gates if gate.name == name)


@pytest.mark.parametrize("reference", ["quantized_digits", "digits"])
def test_a_graph_that_promises_nothing_fails_and_names_what_is_missing(
    mutant, reference: str, request: pytest.FixtureRequest
) -> None:
    mutant.bypass_quantizers(NOTHING)
    report = validate(mutant.path, request.getfixturevalue(reference), level="blocks")
    assert not report.passed
    offenders = next(gate for gate in report.gates if gate.name == "promise").offenders
    assert len(offenders) == 30
    assert TO_Q in offenders
    for name in ("linears", "modules", "quantizers"):
        assert "skipped (there is nothing to compare" in gate(report, name)


def test_a_bypassed_quantizer_is_named_though_the_metadata_keep_their_promise(mutant, quantized_digits: Path) -> None:
    mutant.bypass_quantizers()
    report = validate(mutant.path, quantized_digits, level="blocks")
    found = next(gate for gate in report.gates if gate.name == "promise")
    assert len(found.offenders) == 20
    assert TO_Q in found.offenders
    assert "/MatMul reads an activation that is not quantized" in found.detail


@pytest.mark.slow
def test_a_linear_that_is_promised_in_16_bit_but_stored_in_fp4_is_named(
    mutant, quantized_digits: Path, digits: Path
) -> None:
    import onnx

    promised = promised_linears(onnx.load(mutant.path, load_external_data=False))
    promised["nvfp4"].remove(TO_Q)
    promised["bf16"].append(TO_Q)
    mutant.describe("fp4trt.linears", json.dumps(promised))
    found = gate(validate(mutant.path, quantized_digits, level="blocks"), "promise")
    assert f"FAILED ({TO_Q}: the checkpoint has it in NVFP4, the graph promises bf16)" in found
    found = gate(validate(mutant.path, digits, level="blocks"), "promise")
    assert f"FAILED ({TO_Q}: its weight is FP4 in the graph)" in found


def test_a_gate_that_compared_nothing_does_not_pass() -> None:
    gate = gate_of_offenders("weights", [], 0, 0, "0 elements of 0 weights", count=0)
    assert gate.was_skipped
    assert "nothing to compare: 0 elements" in gate.line


@pytest.mark.slow
def test_without_a_manifest_the_files_gate_is_skipped_with_the_reason(mutant, digits: Path) -> None:
    found = gate(validate(mutant.path, digits, level="blocks"), "files")
    assert found.startswith("files: skipped (no fp4trt.json")


@pytest.mark.parametrize("text", ['{"nvfp4":5}', '{"nvfp4":"abc"}', "[]", "null", "{", '{"nvfp4":[1]}'])
def test_a_promise_that_cannot_be_read_is_refused_in_one_line(mutant, quantized_digits: Path, text: str) -> None:
    mutant.describe("fp4trt.linears", text)
    with pytest.raises(BadGraph, match=r"fp4trt\.linears cannot be read .* export the graph again"):
        validate(mutant.path, quantized_digits)


@pytest.mark.parametrize("value", [{"files": []}, {"quantized": []}, {"quantized": {"nvfp4": 5}}, {"files": {"a": 1}}])
def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(copy_of_digits: Path, value: dict[str, object]) -> None:
    (copy_of_digits / "fp4trt.json").write_text(json.dumps(value))
    with pytest.raises(UnknownArtifact, match=r"fp4trt\.json is not a manifest of fp4trt .*; quantize again") as caught:
        validate(copy_of_digits)
    assert caught.value.exit_code == 2


def test_a_graph_apart_from_its_checkpoint_asks_for_the_reference(quantized_digits: Path, tmp_path: Path) -> None:
    shutil.copy(quantized_digits / "model.onnx", tmp_path)
    with pytest.raises(
        BadReference, match=r"--copy-weights; expected config\.json there, or .* --reference CHECKPOINT"
    ):
        validate(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.slow
def test_a_global_scale_of_zero_is_named_without_a_warning(mutant, quantized_digits: Path, tmp_path: Path) -> None:
    mutant.scale(f"{TO_Q}.input_scale", 0)
    report = validate(mutant.path, quantized_digits, report_dir=tmp_path / "out")
    assert f"{TO_Q}.input_scale: is 0; expected a global scale above zero" in gate(report, "stored tensors")
    assert (tmp_path / "out" / "report.json").is_file()
