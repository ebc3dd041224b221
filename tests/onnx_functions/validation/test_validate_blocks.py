"""Validation one block at a time: what it finds, what it leaves out and says so, and that a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from fp4trt.errors import BadSelection, OutputExists
from onnx_functions.graph.element_types import element_types
from onnx_functions.validation import run_gates
from onnx_functions.validation.block_selection import chosen_blocks, token_counts
from onnx_functions.validation.run_gates import validate
from onnx_functions.validation.torch_reference import Outputs, Walk, open_reference
from onnx_functions.validation.verdict import Gate, Report

pytestmark = pytest.mark.slow

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
FLUX = [f"{DOUBLE}.{index}" for index in range(19)] + [f"{SINGLE}.{index}" for index in range(38)]


def gate(report: Report, name: str) -> Gate:
    return next(gate for gate in report.gates if gate.name == name)


def structure_of(path: Path, reference: Path) -> Gate:
    return gate(validate(path, reference, level="blocks"), "structure")


@pytest.fixture(scope="module")
def quantized_digits(quantized_built_in: Path) -> Path:
    """The whole built-in model: what lies between blocks needs some of each kind."""
    return quantized_built_in


@pytest.fixture(scope="module")
def digits(built_in: Path) -> Path:
    return built_in


@pytest.fixture(scope="module")
def clean(quantized_digits: Path) -> Report:
    return validate(quantized_digits, level="blocks")


def test_every_block_passes_on_the_references_inputs_and_every_linear_has_its_figures(clean: Report) -> None:
    assert [gate.detail for gate in clean.failures] == []
    assert gate(clean, "structure").detail.startswith("6 blocks and what lies outside them")
    assert 0 < gate(clean, "structure").figure < 1e-3
    assert all(row.structure_error is not None and row.structure_error < 1e-3 for row in clean.linears)
    assert all(row.output_error is not None for row in clean.linears)
    skipped = {gate.name: gate.detail for gate in clean.gates if gate.was_skipped}
    assert skipped == dict.fromkeys(
        ("inputs", "end to end", "second witness"), "it runs the whole graph; --level full does"
    )
    assert clean.as_dict()["error_by_time"] == {"points": [], "left_out": skipped["end to end"]}


def test_a_residual_that_adds_the_wrong_tensor_is_named(mutant, quantized_digits: Path) -> None:
    # No input or output of a linear in this block changes, so that the block's output alone can tell.
    node = _node(mutant.path, f"{DOUBLE}.1/Add_3")
    mutant.rewire(node.name, 0, node.input[1])
    found = structure_of(mutant.path, quantized_digits)
    assert not found.passed
    assert f"node {node.name} gives output" in found.detail
    assert f"of {DOUBLE}.1 ({node.output[0]}), which differs by" in found.detail


def test_a_crossed_wire_inside_a_block_is_named(mutant, quantized_digits: Path) -> None:
    mutant.negate(_node(mutant.path, f"{SINGLE}.1.attn.to_q/Add").output[0])
    found = structure_of(mutant.path, quantized_digits)
    assert "negation" in found.offenders


def test_a_block_that_reads_the_block_before_the_last_is_named(mutant, quantized_digits: Path) -> None:
    streams = [f"{SINGLE}.0/Slice_1_output_0", f"{SINGLE}.1/Slice_1_output_0"]
    readers = [(node.name, place) for node, place in _readers(mutant.path, streams[1]) if node.name.startswith(SINGLE)]
    assert readers
    for name, place in readers:
        mutant.rewire(name, place, streams[0])
    found = structure_of(mutant.path, quantized_digits)
    assert not found.passed
    assert f"{SINGLE}.2 depends on {SINGLE}." in found.detail


@pytest.mark.parametrize("tensor", ["latent", f"{SINGLE}.3/Slice_output_0", f"{DOUBLE}.0/Add_3_output_0"])
def test_a_negation_between_or_behind_the_blocks_is_named(tensor: str, mutant, quantized_digits: Path) -> None:
    mutant.negate(tensor)
    found = structure_of(mutant.path, quantized_digits)
    assert not found.passed
    assert "negation" in found.offenders


def test_against_the_16_bit_model_a_negated_output_is_found_block_by_block_too(mutant, digits: Path) -> None:
    assert structure_of(mutant.path, digits).passed
    mutant.negate("latent")
    assert "node negation gives graph output latent" in structure_of(mutant.path, digits).detail


def test_chosen_blocks_alone_are_checked(quantized_digits: Path) -> None:
    report = validate(quantized_digits, blocks="1")
    assert report.passed
    checked = {row.block for row in report.linears if row.output_error is not None}
    assert checked == {"", f"{DOUBLE}.0", f"{SINGLE}.0", f"{SINGLE}.3"}
    assert gate(report, "end to end").detail == "it runs the whole graph; without --blocks it does"
    assert f"of {3 * 6 + 14 - 6 + 10} linears" in gate(report, "linears").detail


def test_blocks_that_share_a_modulation_pass_where_others_between_them_are_left_out(flux2_in_mxfp8: Path) -> None:
    report = validate(flux2_in_mxfp8, blocks="1", tokens="16,8")
    assert report.passed, [gate.line for gate in report.failures]
    assert gate(report, "structure").detail.startswith("3 blocks and what lies outside them")


def test_damage_between_blocks_that_share_a_modulation_is_named(flux2_mutant, flux2_in_mxfp8: Path) -> None:
    (stream,) = _last_of(flux2_mutant.path, f"{DOUBLE}.1")
    flux2_mutant.negate(stream)
    found = gate(validate(flux2_mutant.path, flux2_in_mxfp8, blocks="1", tokens="16,8"), "structure")
    assert not found.passed
    assert "negation" in found.offenders


def test_a_block_left_out_that_is_passed_over_is_named(flux2_mutant, flux2_in_mxfp8: Path) -> None:
    (earlier,), (later,) = (_last_of(flux2_mutant.path, f"{SINGLE}.{index}") for index in (0, 1))
    for name, place in ((node.name, place) for node, place in _readers(flux2_mutant.path, later)):
        flux2_mutant.rewire(name, place, earlier)
    found = gate(validate(flux2_mutant.path, flux2_in_mxfp8, blocks="1", tokens="16,8"), "structure")
    assert not found.passed


def test_a_size_can_be_asked_for(quantized_digits: Path) -> None:
    report = validate(quantized_digits, level="blocks", blocks="1", tokens="20,9")
    assert report.passed
    assert gate(report, "structure").detail.endswith("at B=1 L=20 T=9")


def test_blocks_are_spread_over_each_stack_with_the_first_and_the_last_of_all() -> None:
    wanted = [f"{DOUBLE}.{index}" for index in (0, 6, 12, 18)] + [f"{SINGLE}.{index}" for index in (0, 12, 24, 37)]
    assert list(chosen_blocks(FLUX, "4")) == wanted
    assert chosen_blocks(FLUX, f"{SINGLE}.7, {DOUBLE}.3") == (
        f"{DOUBLE}.0",
        f"{DOUBLE}.3",
        f"{SINGLE}.0",
        f"{SINGLE}.7",
        f"{SINGLE}.37",
    )
    assert chosen_blocks(FLUX, None) == chosen_blocks(FLUX, "99") == tuple(FLUX)


@pytest.mark.parametrize("asked", ["0", "-1", "transformer_blocks", f"{DOUBLE}.19", ""])
def test_blocks_that_do_not_exist_are_refused(asked: str) -> None:
    with pytest.raises(BadSelection, match="is not a block of this model"):
        chosen_blocks(FLUX, asked)


@pytest.mark.parametrize("asked", [1.5, True, 0])
def test_what_is_no_number_of_blocks_is_refused(asked: Any) -> None:
    with pytest.raises(BadSelection, match="expected a number above 0, or paths"):
        chosen_blocks(FLUX, asked)


@pytest.mark.parametrize(
    ("asked", "words"), [("512", "such as"), (5, "such as"), ("0,4", "such as"), ("a,b", "such as"), ("8,8", "unlike")]
)
def test_token_counts_that_cannot_be_run_are_refused(asked: Any, words: str) -> None:
    assert token_counts("512, 128") == (512, 128)
    with pytest.raises(BadSelection, match=words):
        token_counts(asked)


def test_a_graph_that_does_not_fit_is_run_block_by_block_and_the_estimate_is_told(
    quantized_digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gates, "available_memory", lambda: 1 << 20)
    report = validate(quantized_digits, blocks=None)
    assert report.passed
    assert gate(report, "structure").detail.startswith("6 blocks and what lies outside them")
    why = "it runs the whole graph, which needs about 0.0 GiB of memory, more than is free here"
    assert gate(report, "end to end").detail == why


def test_the_estimate_counts_every_weight_once(quantized_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_reference(
        onnx.load(quantized_digits / "model.onnx", load_external_data=False), quantized_digits / "x", None
    )
    asked: list[int] = []

    class Free(int):
        def __ge__(self, need: int) -> bool:
            asked.append(need)
            return True

    monkeypatch.setattr(run_gates, "available_memory", Free)
    assert run_gates._why_by_block("full", None, model) is None
    assert asked[0] == pytest.approx(6 * 2.35e6, rel=0.07)


def test_the_reference_holds_one_block_at_a_time(quantized_digits: Path) -> None:
    path = quantized_digits / "model.onnx"
    held = open_reference(onnx.load(path, load_external_data=False), path, None)
    walk, call, outputs = Walk(held, torch.bfloat16, True), held.example((1, 16, 8), torch.bfloat16), Outputs()
    for block in held.blocks:
        for _, after in walk.block(block, [(call, outputs)]):
            outputs = after
            loaded = [b for b in held.blocks if not walk._model.get_submodule(b).attn.to_q.weight.is_meta]
            assert loaded == [block]


def test_a_killed_validation_goes_on_with_the_next_block_and_writes_the_same_report(
    quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_after: Callable[..., None]
) -> None:
    validate(quantized_digits, level="blocks", report_dir=tmp_path / "whole")
    kill_after(4, "validate", quantized_digits, "--level", "blocks", "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "whole"]
    ran: list[str] = []
    block = Walk.block
    monkeypatch.setattr(Walk, "block", lambda self, path, calls: ran.append(path) or block(self, path, calls))
    validate(quantized_digits, level="blocks", report_dir=tmp_path / "out")
    assert sorted(set(ran)) == [f"{SINGLE}.2", f"{SINGLE}.3"]
    for name in ("report.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passed"] is True


@pytest.mark.parametrize(
    ("error", "left"), [(ValueError("bad"), []), (OSError(28, "No space left on device"), ["new", "new/out.partial"])]
)
def test_a_validation_that_fails_leaves_finished_blocks_where_the_system_failed_it(
    error: Exception, left: list[str], quantized_digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(Walk, "finish", full)
    with pytest.raises(type(error)):
        validate(quantized_digits, level="blocks", blocks="1", report_dir=tmp_path / "new" / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_dir()] == left


def test_a_folder_of_the_users_in_the_way_of_the_finished_blocks_stays(quantized_digits: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"out\.partial is in the way"):
        validate(quantized_digits, level="blocks", report_dir=tmp_path / "out")
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "mine"


def test_what_shape_gives_is_an_integer(quantized_digits: Path) -> None:
    model = onnx.load(quantized_digits / "model.onnx", load_external_data=False)
    types = element_types(model)
    shapes = [node.output[0] for node in model.graph.node if node.op_type == "Shape"]
    assert shapes
    assert {types[name] for name in shapes} == {onnx.TensorProto.INT64}


def _node(path: Path, name: str) -> onnx.NodeProto:
    return next(node for node in onnx.load(path, load_external_data=False).graph.node if node.name == name)


def _readers(path: Path, tensor: str) -> list[tuple[onnx.NodeProto, int]]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [(node, place) for node in nodes for place, name in enumerate(node.input) if name == tensor]


def _last_of(path: Path, block: str) -> list[str]:
    """Return the last tensor that nodes of a block make and others read."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    inside = [node for node in nodes if node.name.startswith((f"{block}/", f"{block}."))]
    outside = {name for node in nodes if node not in inside for name in node.input}
    return [name for node in inside for name in node.output if name in outside][-1:]
