"""The verdict on the built-in model: clean it passes, and each kind of damage is found and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fp4trt
from calibration.checkpoints.quantized import read
from fp4trt.errors import BadGraph, BadReference
from onnx_functions.validation.run_gates import validate
from onnx_functions.validation.verdict import Report

TO_Q = "transformer_blocks.0.attn.to_q"
TO_K = "transformer_blocks.0.attn.to_k"
PROJ_MLP = "single_transformer_blocks.0.proj_mlp"
PROJ_OUT = "single_transformer_blocks.0.proj_out"


def failures(report: Report) -> dict[str, str]:
    return {gate.name: gate.detail for gate in report.failures}


def blocks_only(path: Path, reference: Path) -> dict[str, str]:
    report = validate(path, reference, level="blocks")
    assert not report.passed
    return failures(report)


def feeds_of(folder: Path, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    checkpoint = read(folder)
    inputs = checkpoint.family.example_inputs(checkpoint.config, shape, 0, torch.bfloat16)
    return {name: value.float().numpy() for name, value in inputs.items()}


@pytest.fixture(scope="module")
def clean(quantized_digits: Path) -> Report:
    return validate(quantized_digits)


def test_the_built_in_model_passes_every_gate(clean: Report) -> None:
    assert failures(clean) == {}
    assert [gate.name for gate in clean.gates] == [
        "functions",
        "files",
        "promise",
        "stored tensors",
        "weights",
        "quantizers",
        "linears",
        "modules",
        "structure",
        "inputs",
        "end to end",
        "second witness",
    ]
    assert not any(gate.was_skipped for gate in clean.gates)
    assert "inspect --against the 16-bit source proves the layout" in clean.note


def test_the_outputs_are_drawn_and_their_error_is_known_by_time(clean: Report) -> None:
    gates = {gate.name: gate for gate in clean.gates}
    assert [time for time, _ in clean.by_time.points] == [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    errors = [errors["latent"] for _, errors in clean.by_time.points]
    assert all(0 < error < gates["end to end"].limit for error in errors)
    assert len(set(errors)) == len(errors)
    whole, *others = clean.pictures
    assert whole.caption == "end to end, B=1 L=16 T=8"
    assert whole.note == f"relative L2 error {gates['end to end'].figure:.3g}"
    assert [picture.note for picture in others] == [f"relative L2 error {error:.3g}" for error in errors]
    assert {picture.reference.shape for picture in clean.pictures} == {(16, 16)}
    assert whole.reference.std() > 20
    assert 0 < abs(whole.graph.astype(int) - whole.reference).max() < 40


def test_no_code_and_no_block_scale_differs_and_linears_are_within_1e_4(clean: Report) -> None:
    quantized = [row for row in clean.linears if row.differing_codes is not None]
    assert len(quantized) == 20
    assert all(row.differing_codes == 0 for row in quantized)
    assert all(row.output_error is not None and row.output_error <= 1e-4 for row in clean.linears)
    assert all(row.structure_error is not None and row.structure_error <= 1e-3 for row in clean.linears)


@pytest.mark.slow
def test_against_the_16_bit_model_the_gates_measure_the_quantization_error(
    quantized_digits: Path, digits: Path
) -> None:
    report = validate(quantized_digits, digits, level="blocks")
    gates = {gate.name: gate for gate in report.gates}
    assert report.reference_kind == "plain"
    assert report.note == ""
    assert failures(report) == {}
    assert 0.08 < gates["weight error"].figure < 0.12
    assert gates["scale bias"].figure < 0.03
    assert gates["rounded weights"].figure == 0


@pytest.mark.slow
def test_the_bfloat16_scale_chain_passes_every_gate_too(bfloat16_digits: Path, quantized_digits: Path) -> None:
    report = validate(bfloat16_digits / "model.onnx", quantized_digits)
    assert failures(report) == {}
    assert not any(gate.was_skipped for gate in report.gates)


def test_one_flipped_code_is_named(mutant, quantized_digits: Path) -> None:
    mutant.flip_code(f"{TO_Q}.weight", 100)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"{TO_Q}.weight: 1 of" in found["weights"]
    assert f"{TO_Q}.weight" in found["stored tensors"]


@pytest.mark.slow
def test_one_flipped_code_is_named_against_the_16_bit_model(mutant, digits: Path) -> None:
    mutant.flip_code(f"{TO_Q}.weight", 100)
    assert f"{TO_Q}.weight: 1 of" in blocks_only(mutant.path, digits)["rounded weights"]


@pytest.mark.slow
def test_swapped_nibbles_are_named(mutant, quantized_digits: Path) -> None:
    mutant.swap_nibbles(f"{PROJ_MLP}.weight")
    detail = blocks_only(mutant.path, quantized_digits)["weights"]
    assert f"{PROJ_MLP}.weight" in detail
    assert "the two codes of each byte are exchanged" in detail


@pytest.mark.slow
def test_two_exchanged_initializers_are_named(mutant, quantized_digits: Path) -> None:
    mutant.exchange_pointers(f"{TO_Q}.weight", f"{TO_K}.weight")
    mutant.exchange_pointers(f"{TO_Q}.weight_scale", f"{TO_K}.weight_scale")
    detail = blocks_only(mutant.path, quantized_digits)["weights"]
    assert f"reads the weight of {TO_K}" in detail
    assert f"reads the weight of {TO_Q}" in detail


@pytest.mark.slow
def test_two_exchanged_wires_are_named_although_every_stored_byte_is_right(mutant, quantized_digits: Path) -> None:
    mutant.exchange_wires(TO_Q, TO_K)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"the node {TO_Q}/MatMul reads the weight of {TO_K}" in found["weights"]
    assert "stored tensors" not in found


def test_a_weight_global_scale_10_percent_off_is_named(mutant, quantized_digits: Path) -> None:
    mutant.scale(f"{PROJ_OUT}.weight_scale_2", 1.1)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"{PROJ_OUT}.weight_scale_2" in found["stored tensors"]
    assert f"{PROJ_OUT}.weight" in found["weights"]
    assert "are 1.1 times" in found["weights"]


@pytest.mark.slow
def test_a_weight_global_scale_10_percent_off_is_a_scale_bias_against_the_16_bit_model(mutant, digits: Path) -> None:
    mutant.scale(f"{PROJ_OUT}.weight_scale_2", 1.1)
    assert f"{PROJ_OUT}.weight" in blocks_only(mutant.path, digits)["scale bias"]


def test_an_activation_global_scale_10_percent_off_is_named(mutant, quantized_digits: Path) -> None:
    mutant.scale(f"{PROJ_OUT}.input_scale", 1.1)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"{PROJ_OUT}.input_scale" in found["stored tensors"]
    assert PROJ_OUT in found["quantizers"]


@pytest.mark.parametrize(("leaf", "count"), [("weight", 1), ("weight_scale", 1), ("bias", 2)])
@pytest.mark.slow
def test_an_offset_shifted_by_one_element_is_named(mutant, quantized_digits: Path, leaf: str, count: int) -> None:
    mutant.shift(f"{TO_K}.{leaf}", count)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"{TO_K}.{leaf}" in found["stored tensors"]


def test_an_offset_behind_the_end_of_the_file_is_named(mutant, quantized_digits: Path) -> None:
    mutant.shift(f"{TO_K}.weight", 10_000_000)
    found = blocks_only(mutant.path, quantized_digits)
    assert f"initializer {TO_K}.weight needs bytes" in found["files"]


@pytest.mark.slow
def test_a_negated_graph_output_is_named(mutant, quantized_digits: Path) -> None:
    mutant.negate("latent")
    found = failures(validate(mutant.path, quantized_digits))
    assert "node negation gives graph output latent" in found["structure"]


@pytest.mark.slow
def test_a_negated_graph_output_is_named_against_the_16_bit_model(digits: Path, mutant) -> None:
    mutant.negate("latent")
    found = failures(validate(mutant.path, digits))
    assert found.keys() == {"structure", "end to end"}
    assert "node negation gives graph output latent" in found["structure"]


@pytest.mark.slow
def test_a_negated_tensor_inside_is_named(mutant, quantized_digits: Path) -> None:
    mutant.negate(_output_of(mutant.path, f"{TO_Q}/Add"))
    found = failures(validate(mutant.path, quantized_digits))
    assert "negation" in found["structure"]


@pytest.mark.parametrize("as_node", [True, False], ids=["constant node", "initializer"])
@pytest.mark.slow
def test_an_activation_baked_to_a_constant_is_named(mutant, quantized_digits: Path, as_node: bool) -> None:
    tensor = _input_of(mutant.path, f"{PROJ_OUT}/TRT_FP4DynamicQuantize")
    maker = _maker_of(mutant.path, tensor)
    mutant.bake(tensor, feeds_of(quantized_digits, (1, 16, 8)), as_node)
    found = failures(validate(mutant.path, quantized_digits))
    assert (maker if as_node else "initializer baked") in found["structure"]
    assert f"input of {PROJ_OUT}" in found["structure"]


@pytest.mark.slow
def test_the_command_exits_with_1_and_names_the_tensor(
    mutant, quantized_digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mutant.flip_code(f"{TO_Q}.weight", 0)
    arguments = ["--reference", str(quantized_digits), "--level", "blocks", "-o", str(tmp_path / "out"), "--json"]
    assert fp4trt.run(["validate", str(mutant.path), *arguments]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert f"{TO_Q}.weight" in json.dumps(found["gates"])
    assert json.loads(Path(found["report"]).read_text())["passed"] is False
    assert "<svg" in Path(found["html"]).read_text(encoding="utf-8")


def test_a_reference_of_another_model_is_refused(quantized_digits: Path, tmp_path: Path) -> None:
    with pytest.raises(BadReference, match=r"config\.json"):
        validate(quantized_digits, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"norm1\.linear\.weight is \[192, 32\] in .* and \[768, 128\] in the graph: it is a checkpoint of other"),
        (
            {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "in_channels": 16, "patch_size": 1}
            | {"joint_attention_dim": 64, "pooled_projection_dim": 64, "num_single_layers": 2},
            r"has a single_transformer_blocks\.1, of which the graph has nothing: it is a checkpoint of another depth",
        ),
    ],
)
def test_a_reference_of_other_sizes_is_refused(
    changes: dict[str, object], words: str, quantized_digits: Path, tiny_flux: Callable[..., Path], tmp_path: Path
) -> None:
    other = tiny_flux(tmp_path / "other", **{"num_layers": 1, "num_single_layers": 1, **changes})
    with pytest.raises(BadReference, match=words):
        validate(quantized_digits, other)


def test_a_missing_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadGraph, match="does not exist"):
        validate(tmp_path)


def _node(path: Path, name: str):
    import onnx

    return next(node for node in onnx.load(path, load_external_data=False).graph.node if node.name == name)


def _output_of(path: Path, node: str) -> str:
    return _node(path, node).output[0]


def _input_of(path: Path, node: str) -> str:
    return _node(path, node).input[0]


def _maker_of(path: Path, tensor: str) -> str:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return next(node.name for node in model.graph.node if tensor in node.output)
