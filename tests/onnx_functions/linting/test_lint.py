"""Each mutation of the table is refused by name; what is right passes; TensorRT-RTX does what the table says."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

import fp4trt
from fp4trt.errors import BadGraph, LintError
from onnx_functions.graph.external_data import type_name
from onnx_functions.linting import RULES, lint, normalise, promise, require_clean, values
from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations import MUTATIONS
from tests.onnx_functions.linting.mutations.mutation import DEEP, MODULATION, OUT, TRT, Mutation
from tests.onnx_functions.linting.table import page, verdict
from trt_build.graph import read_graph

SEVERITY = {rule.name: rule.severity for rule in RULES}
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
BUILT = (
    "weight block size 32",
    "block scales of another quantizer",
    "a negative block scale",
    "activation scale zero",
    "quantizer in the empty domain",
    "weight axis 0",
    "block scales transposed",
    "an fp8 activation dequantized with another scale",
)
"""Mutations that the tests build, of each verdict; benchmarks/lint_verdicts.py builds all."""


@pytest.fixture(scope="module")
def untouched(quantized_digits: Path, fp8_digits: Path) -> dict[str, Path]:
    """What the mutations start from, by their base."""
    return {"fp4": quantized_digits, "fp8": fp8_digits}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found_by_its_rule_which_names_the_place(
    mutation: Mutation, untouched: dict[str, Path], tmp_path: Path
) -> None:
    damaged = Damaged.copy(untouched[mutation.base], tmp_path / "model")
    mutation.apply(damaged)
    report = lint(damaged.save())
    found = [finding for finding in report.findings if finding.rule == mutation.rule]
    assert mutation.where in {place for finding in found for place in (finding.node, finding.tensor)}
    assert all(finding.node or finding.tensor for finding in report.findings)
    assert report.passed == (SEVERITY[mutation.rule] == "warning")
    assert replace(report, allow_slow=True).passed == (SEVERITY[mutation.rule] != "wrong")


def test_every_rule_has_a_mutation_and_every_mutation_a_name_of_its_own() -> None:
    assert {mutation.rule for mutation in MUTATIONS} == {rule.name for rule in RULES}
    assert len(BY_NAME) == len(MUTATIONS)


def test_the_table_in_the_documentation_is_that_of_the_code() -> None:
    text = (Path(fp4trt.__file__).parents[1] / "docs" / "lint.md").read_text(encoding="utf-8")
    assert page(text) == text, "run python -m tests.onnx_functions.linting.table"


def test_an_untouched_export_has_no_finding(
    quantized_digits: Path, bfloat16_digits: Path, fp8_digits: Path, copied_digits: Path, copied_plain: Path
) -> None:
    for folder in (quantized_digits, bfloat16_digits, fp8_digits, copied_digits, copied_plain):
        assert lint(folder / "model.onnx").findings == (), folder


def test_an_untouched_export_without_its_promise_is_warned_of_what_could_be_merged(damaged: Damaged) -> None:
    """The modulations of all blocks read one SiLU; their family keeps them apart."""
    del damaged.model.metadata_props[:]
    (finding,) = lint(damaged.save()).findings
    assert (finding.rule, finding.node) == ("merge-scales", f"{MODULATION}/MatMul")


def test_a_weight_only_graph_is_reported_and_not_refused(damaged: Damaged) -> None:
    BY_NAME["no activation quantized and nothing promised"].apply(damaged)
    (finding,) = lint(damaged.save()).findings
    assert finding.message == "20 FP4 weights and no activation quantizer: a weight-only graph"


def test_the_contracts_are_those_of_the_model_families() -> None:
    assert promise.contract_of("flux") == promise.contract_of("flux-digits")
    assert promise.contract_of("unheard-of") is None
    contract = promise.contract_of("flux")
    assert contract is not None
    inputs, (latent,) = contract
    assert [(tensor.name, type_name(tensor.type), tensor.shape) for tensor in inputs] == [
        ("hidden_states", "BFLOAT16", ("B", "L", None)),
        ("encoder_hidden_states", "BFLOAT16", ("B", "T", None)),
        ("pooled_projections", "BFLOAT16", ("B", None)),
        ("timestep", "BFLOAT16", ("B",)),
        ("img_ids", "FLOAT", ("L", 3)),
        ("txt_ids", "FLOAT", ("T", 3)),
        ("guidance", "FLOAT", ("B",)),
    ]
    assert [tensor.name for tensor in inputs if tensor.optional] == ["guidance"]
    assert (latent.name, type_name(latent.type), latent.shape) == ("latent", "BFLOAT16", ("B", "L", None))


def test_no_byte_is_read_twice(quantized_digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    original = values._read

    def recording(file: Any, span: Any, *rest: Any) -> Any:
        read.append((span.offset, span.offset + span.length))
        return original(file, span, *rest)

    monkeypatch.setattr(values, "_read", recording)
    assert lint(quantized_digits).passed
    assert len(read) == 112
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(read))


def test_a_chunk_boundary_hides_no_bad_value(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_CHUNK", 64)
    BY_NAME["a nan written into the weights file"].apply(damaged)
    assert [finding.rule for finding in lint(damaged.save()).findings] == ["block-scale-values"]


def test_normalise_declares_opset_23_and_cleans_the_inputs(damaged: Damaged) -> None:
    BY_NAME["opset 22"].apply(damaged)
    BY_NAME["an initializer among the inputs"].apply(damaged)
    assert {finding.rule for finding in lint(damaged.save()).findings} == {"opset-declared", "initializer-input"}
    damaged.model = normalise(damaged.model)
    assert lint(damaged.save()).findings == ()
    BY_NAME["opset 17"].apply(damaged)
    with pytest.raises(BadGraph, match="opset 17"):
        normalise(damaged.model)


@pytest.mark.slow
def test_a_damaged_file_is_bad_input_or_judged_and_never_a_crash(damaged: Damaged) -> None:
    whole = damaged.save().read_bytes()
    choose = random.Random(3)
    for _ in range(60):
        data = bytearray(whole)
        data[choose.randrange(len(data))] = choose.randrange(128)
        damaged.path.write_bytes(data)
        try:
            assert lint(damaged.path).findings is not None
        except BadGraph:
            continue


def test_a_refusal_says_in_one_line_what_and_where(damaged: Damaged) -> None:
    BY_NAME["weight axis 0"].apply(damaged)
    with pytest.raises(LintError, match=rf"weight-axis: {OUT}/weight/Dequ.*pass --allow-slow") as caught:
        require_clean(damaged.save())
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert require_clean(damaged.path, allow_slow=True).passed


def test_the_command_prints_a_line_for_each_finding_and_exits_with_1(
    damaged: Damaged, quantized_digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["lint", str(quantized_digits)]) == 0
    assert capsys.readouterr().out == f"{len(RULES)} rules, 0 findings, 0 refused: passed\n"
    BY_NAME["weight axis 0"].apply(damaged)
    assert fp4trt.run(["lint", str(damaged.save())]) == 1
    assert capsys.readouterr().out.startswith(f"slow: weight-axis: {OUT}/weight/DequantizeLinear [{OUT}.weight]: ")
    assert fp4trt.run(["lint", str(damaged.path), "--allow-slow", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["passed"], answer["refused"], answer["findings"][0]["rule"]) == (True, 0, "weight-axis")


def test_an_export_that_the_lint_refuses_leaves_nothing(copy_of_digits: Path) -> None:
    from exporter import export

    shutil.rmtree(copy_of_digits / "validation", ignore_errors=True)
    (copy_of_digits / "model.onnx").rename(copy_of_digits / "old.onnx")
    graph = Damaged(copy_of_digits / "old.onnx", onnx.load(copy_of_digits / "old.onnx", load_external_data=False))
    BY_NAME["a nan written into the weights file"].apply(graph)
    with pytest.raises(LintError, match="block-scale-values"):
        export(copy_of_digits)
    assert not list(copy_of_digits.glob("model.onnx*"))


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.slow
def test_tensorrt_does_what_the_table_says(name: str, untouched: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    source = untouched[BY_NAME[name].base]
    damaged = Damaged.copy(source, tmp_path / "model")
    BY_NAME[name].apply(damaged)
    assert verdict(damaged.save(), read_graph(source)) == BY_NAME[name].tensorrt


@pytest.mark.parametrize("text", ['{"nvfp4": null}', "{}", "null", "[" * 5000])
def test_a_promise_of_nothing_over_fp4_weights_is_refused(text: str, damaged: Damaged) -> None:
    _metadata(damaged.model, "fp4trt.linears").value = text
    assert "promise-metadata" in {finding.rule for finding in lint(damaged.save()).refused}


@pytest.mark.parametrize("text", ["{}", "null", '{"B": null}', '{"B": {}}', '{"B": {"kind": "batch"}}', "[" * 5000])
def test_symbols_that_say_too_little_are_refused(text: str, damaged: Damaged) -> None:
    _metadata(damaged.model, "fp4trt.symbols").value = text
    assert "promise-metadata" in {finding.rule for finding in lint(damaged.save()).refused}


@pytest.mark.parametrize("text", ["[null]", "[" * 5000, '[["a"], 5]', f'[["{OUT}"], ["{OUT}"]]'])
def test_groups_that_are_none_are_refused(text: str, damaged: Damaged) -> None:
    _metadata(damaged.model, "fp4trt.groups").value = text
    assert "promise-metadata" in {finding.rule for finding in lint(damaged.save()).refused}


def _metadata(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    return next(entry for entry in model.metadata_props if entry.key == key)


def test_a_graph_without_fp4_is_told_so_at_any_opset_and_passes(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", onnx.TensorProto.FLOAT, [4, 2], [1.0] * 8)
    product = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    for opset in (11, 17, 21, 23):
        report = lint(_graph([product], [weight], tmp_path / "plain.onnx", opset))
        assert [(finding.rule, finding.severity) for finding in report.findings] == [("no-fp4", "warning")]
        assert report.passed


def test_blocks_in_8_bit_need_an_opset_that_has_them(tmp_path: Path) -> None:
    codes = helper.make_tensor("codes", onnx.TensorProto.INT8, [32, 2], [1] * 64)
    scales = helper.make_tensor("scales", onnx.TensorProto.FLOAT, [2, 2], [1.0] * 4)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], name="blocked", axis=0, block_size=16),
        helper.make_node("MatMul", ["w", "x"], ["y"], name="out"),
    ]
    found = lint(_graph(nodes, [codes, scales], tmp_path / "blocked.onnx", 17)).refused
    assert [(finding.rule, finding.tensor) for finding in found] == [("opset", "opset_import")]


def test_an_operator_lacks_nothing_by_the_schema_of_its_own_opset(tmp_path: Path) -> None:
    """ReduceSum has had its axes as an attribute, then as an input; a Dropout of opset 7 has lost its own since."""
    reduced = helper.make_node("ReduceSum", ["x"], ["r"], name="reduce", axes=[0])
    dropped = helper.make_node("Dropout", ["r"], ["y"], name="drop", ratio=0.5)
    assert lint(_graph([reduced, dropped], [], tmp_path / "old.onnx", 11)).passed
    chosen = helper.make_node("Where", ["x", "", "x"], ["y"], name="choose")
    (finding,) = lint(_graph([chosen], [], tmp_path / "hole.onnx")).findings
    assert (finding.rule, finding.node, finding.message) == ("operator-form", "choose", "the Where lacks its input X")


def test_an_attribute_without_a_type_is_named_whosever_operator_has_it(damaged: Damaged) -> None:
    damaged.node(f"{OUT}/{TRT}").attribute.append(onnx.AttributeProto(name="odd"))
    (finding,) = lint(damaged.save()).findings
    assert (finding.rule, finding.node) == ("operator-form", f"{OUT}/{TRT}")


def test_an_operator_inside_a_subgraph_is_held_to_its_schema_too(tmp_path: Path) -> None:
    inner = helper.make_node("Cast", ["x"], ["inner"], name="inner cast")
    value = helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph([inner], "branch", [], [value])
    condition = helper.make_tensor("condition", onnx.TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["condition"], ["y"], name="if", then_branch=branch, else_branch=branch)
    found = lint(_graph([node], [condition], tmp_path / "if.onnx")).refused
    assert {(finding.node, finding.message) for finding in found} == {("inner cast", "the Cast lacks its attribute to")}


def test_a_product_whose_shapes_are_not_declared_is_held_to_the_inferred_ones(damaged: Damaged) -> None:
    del damaged.model.graph.value_info[:]
    assert lint(damaged.save()).findings == ()
    BY_NAME["an activation of another length"].apply(damaged)
    assert f"{DEEP}/MatMul" in {f.node for f in lint(damaged.save()).findings if f.rule == "product-shapes"}


def test_a_recipe_over_a_graph_without_fp4_is_refused(tmp_path: Path) -> None:
    added = helper.make_node("Add", ["x", "x"], ["y"], name="added")
    model = onnx.load(_graph([added], [], tmp_path / "plain.onnx"))
    helper.set_model_props(model, {"fp4trt.recipe": "nvfp4-ptq"})
    onnx.save(model, tmp_path / "claimed.onnx")
    found = {
        finding.message for finding in lint(tmp_path / "claimed.onnx").refused if finding.tensor == "fp4trt.recipe"
    }
    assert found == {"the recipe is 'nvfp4-ptq', and the graph holds no FP4"}


@pytest.mark.parametrize("amax", [6.0e-8, 6.0, 65504.0])
def test_a_global_scale_of_any_amax_that_a_layer_could_have_is_fine(amax: float, damaged: Damaged) -> None:
    damaged.scalar(f"{OUT}.input_scale", amax / (6 * 448))
    assert lint(damaged.save()).findings == ()


@pytest.mark.parametrize("amax", [5.9e-8, 1.68e7])
def test_a_global_scale_beyond_that_is_not(amax: float, damaged: Damaged) -> None:
    damaged.scalar(f"{OUT}.input_scale", amax / (6 * 448))
    found = [finding.rule for finding in lint(damaged.save()).findings]
    assert found == ["scale-magnitude", *(["input-scale-reciprocal"] if amax > 1 else [])]


def test_readers_at_the_end_of_a_long_chain_are_found(damaged: Damaged) -> None:
    last = damaged.node(f"{OUT}/MatMul").input[1]
    position = next(i for i, node in enumerate(damaged.model.graph.node) if node.name == f"{OUT}/MatMul")
    for i in range(1500):
        node = helper.make_node("Identity", [last], [f"link_{i}"], f"link_{i}")
        damaged.model.graph.node.insert(position + i, node)
        last = f"link_{i}"
    damaged.node(f"{OUT}/MatMul").input[1] = last
    assert lint(damaged.save()).findings == ()


def _graph(nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], path: Path, opset: int = 23) -> Path:
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 4])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def test_a_long_chain_of_casts_is_followed_to_its_end(tmp_path: Path) -> None:
    chain = [helper.make_node("Identity", [f"w{i}"], [f"w{i + 1}"], name=f"i{i}") for i in range(3000)]
    weight = helper.make_tensor("w0", onnx.TensorProto.FLOAT, [4, 2], [float("inf"), *[1.0] * 7])
    product = helper.make_node("MatMul", ["x", "w3000"], ["y"], name="product")
    found = lint(_graph([*chain, product], [weight], tmp_path / "deep.onnx")).refused
    assert [(finding.rule, finding.tensor) for finding in found] == [("plain-weight-values", "w0")]


def test_an_infinite_mask_of_one_axis_is_meant(tmp_path: Path) -> None:
    mask = helper.make_tensor("mask", onnx.TensorProto.FLOAT, [4], [0.0, 0.0, float("-inf"), 0.0])
    added = helper.make_node("Add", ["x", "mask"], ["y"], name="masked")
    assert lint(_graph([added], [mask], tmp_path / "mask.onnx")).refused == ()


def test_bytes_that_are_written_as_odd_integers_are_read_as_bytes(tmp_path: Path) -> None:
    scale = onnx.TensorProto(
        name="scale", data_type=onnx.TensorProto.FLOAT8E4M3FN, dims=[4], int32_data=[-1, 300, 1, 2]
    )
    one = helper.make_tensor("one", onnx.TensorProto.FLOAT, [], [1.0])
    read = helper.make_node("DequantizeLinear", ["scale", "one"], ["s"], name="read")
    added = helper.make_node("Add", ["x", "s"], ["y"], name="added")
    lint(_graph([read, added], [scale, one], tmp_path / "odd.onnx"))
