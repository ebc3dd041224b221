"""`inspect` describes any graph by its own pattern, and says where it is not what was promised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import fp4trt
from onnx_functions.inspection.inspect import describe
from onnx_functions.inspection.table import table, tree_table

NOTHING = "  promises nothing of its linears; described by its own pattern"


def _without(path: Path, *keys: str) -> Path:
    model = onnx.load(path, load_external_data=False)
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key not in keys}
    del model.metadata_props[:]
    helper.set_model_props(model, kept)
    onnx.save(model, path)
    return path


def _foreign(path: Path, placeholders: bool) -> Path:
    """Write y = (x W1^T) W2 as TorchScript names it: /up/Gemm reads [48, 32] transposed, the other node has no name."""
    nodes = [
        helper.make_node("Gemm", ["x", "marked" if placeholders else "up.weight"], ["h"], "/block/up/Gemm", transB=1),
        helper.make_node("MatMul", ["h", "down.weight"], ["y"]),
    ]
    if placeholders:
        nodes.insert(0, helper.make_node("TRT_FP4QDQ", ["up.weight"], ["marked"], "/q", domain="trt"))
    weights = [
        numpy_helper.from_array(np.ones((48, 32), np.float32), "up.weight"),
        numpy_helper.from_array(np.ones((48, 16), np.float32), "down.weight"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["B", k]) for n, k in (("x", 32), ("y", 16)))
    onnx.save(helper.make_model(helper.make_graph(nodes, "foreign", [x], [y], weights), producer_name="theirs"), path)
    return path


def _shapes(found: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    return {linear["path"]: (linear["format"], linear["shape"]) for linear in found["linears"]}


def test_the_real_export_is_what_it_promises(quantized_digits: Path) -> None:
    promise = describe(quantized_digits / "model.onnx")["promise"]
    assert promise["promised"] == promise["found"] == {"nvfp4": 20, "bf16": 10}
    assert promise["differing"] == promise["lost_groups"] == []
    assert describe(quantized_digits)["promise"]["differing"] == []


@pytest.mark.parametrize("keys", [("fp4trt.linears",), ("fp4trt.linears", "fp4trt.groups", "fp4trt.scale_dtype")])
def test_our_graph_without_its_metadata_is_read_from_its_chains(small_graph: Any, keys: tuple[str, ...]) -> None:
    whole = describe(small_graph.path)
    found = describe(_without(small_graph.path, *keys))
    assert found["promise"] is None
    assert NOTHING in table(found)
    for key in ("formats", "linears", "groups", "fp4_coverage"):
        assert found[key] == whole[key]
    assert found["groups"] == [["first", "second"]]
    assert found["formats"] == {"nvfp4": {"linears": 3, "parameters": 3 * 512, "bytes": 3 * 512 * 9 // 16}}


def test_a_foreign_graph_is_described_with_the_shapes_of_its_weights(tmp_path: Path) -> None:
    found = describe(_foreign(tmp_path / "theirs.onnx", placeholders=False))
    assert _shapes(found) == {"block.up": ("fp32", [48, 32]), "down": ("fp32", [16, 48])}
    assert found["fp4_coverage"] == 0
    assert found["placeholders"] is None
    assert found["producer"] == "theirs"


def _branch(name: str, weight: str, stored: bool) -> onnx.GraphProto:
    """Return x W^T; both branches call their tensors and nodes the same."""
    nodes = [
        helper.make_node("Transpose", [weight], ["turned"], "turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["inside"], "/inner/up/MatMul"),
    ]
    value = helper.make_tensor_value_info("inside", TensorProto.FLOAT, ["B", 48])
    weights = [numpy_helper.from_array(np.ones((48, 32), np.float16), weight)] if stored else []
    return helper.make_graph(nodes, name, [], [value], weights)


def test_linears_in_subgraphs_count_and_are_named(tmp_path: Path) -> None:
    path = _foreign(tmp_path / "theirs.onnx", placeholders=True)
    model = onnx.load(path)
    branches = {"then_branch": _branch("a", "up.weight", False), "else_branch": _branch("b", "local.weight", True)}
    either = helper.make_node("If", ["c"], ["z"], "choice", **branches)
    body = helper.make_graph([either], "body", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    model.graph.node.append(helper.make_node("If", ["c"], ["out"], "outer", then_branch=body, else_branch=body))
    model.graph.node[-1].attribute.pop()
    mark = helper.make_node("TRT_FP4QDQ", ["down.weight"], ["hidden"], "hidden", domain="trt")
    model.graph.node[-1].attribute[0].g.node.append(mark)
    onnx.save(model, path)
    found = describe(path)
    assert _shapes(found) == {
        "block.up": ("fp32 marked", [48, 32]),
        "down": ("fp32", [16, 48]),
        "inner.up": ("fp16", [48, 32]),
        "choice/then_branch/inner/up": ("fp32", [48, 32]),
    }
    assert found["placeholders"]["weights"] == 2
    assert found["bytes"] == 48 * 32 * 4 + 48 * 16 * 4 + 48 * 32 * 2


def test_a_scale_dtype_is_shown_only_where_there_is_fp4(small_graph: Any) -> None:
    assert describe(small_graph.path)["scale_dtype"] == small_graph.scale_dtype
    model = onnx.load(small_graph.path, load_external_data=False)
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Identity", ["x"], [model.graph.output[0].name]))
    onnx.save(model, small_graph.path)
    assert describe(small_graph.path)["scale_dtype"] is None


def test_a_graph_with_placeholders_names_the_next_command(tmp_path: Path) -> None:
    found = describe(_foreign(tmp_path / "theirs.onnx", placeholders=True))
    assert _shapes(found)["block.up"] == ("fp32 marked", [48, 32])
    assert found["placeholders"] == {"weights": 1, "activations": 0, "next": "fp4trt export theirs.onnx -o ours"}
    assert any("not FP4 yet; next: fp4trt export theirs.onnx -o ours" in line for line in table(found))


def test_a_plain_bf16_export_is_as_promised(copied_plain: Path) -> None:
    found = describe(copied_plain / "model.onnx")
    assert found["promise"]["promised"] == found["promise"]["found"] == {"bf16": 30}
    assert "  every linear is as promised" in table(found)


def test_linears_whose_activations_lost_their_quantizers_are_named(mutant: Any) -> None:
    mutant.bypass_quantizers()
    found = describe(mutant.path)
    assert len(found["promise"]["differing"]) == 20
    first = found["promise"]["differing"][0]
    assert (first["promised"], first["found"]) == ("nvfp4", "nvfp4 weight-only")
    assert len(found["promise"]["lost_groups"]) == 3
    assert any(f"{first['path']}: promised nvfp4, found nvfp4 weight-only" in line for line in table(found))
    assert any("(promised: nvfp4)" in line for line in tree_table(found))


def test_a_promised_linear_that_is_not_there_and_one_that_nobody_promised_are_named(small_graph: Any) -> None:
    model = onnx.load(small_graph.path, load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == "fp4trt.linears":
            entry.value = json.dumps({"nvfp4": ["first", "second", "fourth"], "bf16": []})
    onnx.save(model, small_graph.path)
    assert describe(small_graph.path)["promise"]["differing"] == [
        {"path": "fourth", "promised": "nvfp4", "found": None},
        {"path": "third", "promised": None, "found": "nvfp4"},
    ]


def test_a_graph_whose_data_are_elsewhere_is_described_and_the_file_named(small_graph: Any) -> None:
    (small_graph.path.parent / "small.safetensors").unlink()
    found = describe(small_graph.path)
    assert found["missing_files"] == ["small.safetensors"]
    assert found["fp4_linears"] == 3


def test_an_engine_names_the_linear_that_runs_in_16_bit_and_why(tmp_path: Path) -> None:
    manifest = {
        "kind": "fp4trt engine",
        "request": {"promised_fp4": ["a.0", "a.1"]},
        "gemms": [{"format": "nvfp4", "linears": ["a.0"]}, {"format": "bfloat16", "linears": ["a.1", "b"]}],
        "lost": [{"linear": "a.1", "kernel": "k", "reason": "the builder chose another kernel"}],
        "fp4_linears": 1,
        "quantized_linears": 2,
    }
    (tmp_path / "e.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = describe(tmp_path / "e.json")
    reason = "the builder chose another kernel"
    assert found["promise"]["differing"] == [{"path": "a.1", "promised": "nvfp4", "found": "bf16", "reason": reason}]
    assert found["fp4_coverage"] == 0.5
    assert any(f"a.1: promised nvfp4, found bf16 ({reason})" in line for line in table(found))


def test_groups_are_counted_as_the_manifest_of_the_checkpoint_counts_them(quantized_digits: Path) -> None:
    manifest = json.loads((quantized_digits / "fp4trt.json").read_text(encoding="utf-8"))
    for path in (quantized_digits, quantized_digits / "model.onnx"):
        found = describe(path)
        assert found["group_count"] == len(manifest["groups"]) == 13
        assert sum("13 groups, 3 of more than one linear" in line for line in table(found)) == 1


def test_a_checkpoint_is_described_with_the_graph_that_lies_in_it(quantized_digits: Path, digits: Path) -> None:
    found = describe(quantized_digits)
    assert found["graph"] == describe(quantized_digits / "model.onnx")
    for lines in (table(found), tree_table(found)):
        graph = lines[lines.index("  of its model.onnx:") + 1 :]
        assert graph == ["    promised: 20 nvfp4, 10 bf16; found: 10 bf16, 20 nvfp4", "    every linear is as promised"]
    assert describe(digits)["graph"] is None
    assert not any("model.onnx" in line for line in table(describe(digits)))


def test_a_graph_in_a_checkpoint_that_lost_its_quantizers_is_said_though_the_checkpoint_is_whole(
    mutant: Any, quantized_digits: Path
) -> None:
    mutant.bypass_quantizers()
    for name in ("config.json", "fp4trt.json"):
        shutil.copy(quantized_digits / name, mutant.path.parent)
    found = describe(mutant.path.parent)
    assert found["promise"]["differing"] == []
    assert len(found["graph"]["promise"]["differing"]) == 20
    assert "    20 differ from the promise:" in table(found)


def test_the_tree_has_each_linear_with_format_shape_and_bytes_and_equal_blocks_once(
    quantized_built_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fp4trt.run(["inspect", str(quantized_built_in / "model.onnx"), "--tree"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "transformer_blocks.0-1 (2 equal blocks)" in lines
    assert "single_transformer_blocks.0-3 (4 equal blocks)" in lines
    assert lines.count("to_q nvfp4 [128, 128] 9,216 bytes") == 2
    assert "x_embedder bf16 [128, 16] 4,096 bytes" in lines


def test_blocks_that_differ_are_not_collapsed_whatever_order_they_come_in() -> None:
    paths = [("b.2.k", "fp4"), ("b.1.q", "fp4"), ("b.1.k", "fp4"), ("b.2.q", "fp4"), ("b.0.q", "bf16")]
    linears = [{"path": path, "format": kind, "shape": None, "nbytes": None} for path, kind in paths]
    lines = tree_table({"kind": "engine", "path": "e", "promise": None, "linears": linears})
    assert [line.split("  ")[1] for line in lines[1:3]] == ["b.0.q", "b.1-2 (2 equal blocks)"]
    assert len(lines) == 6


def test_linears_in_mxfp8_are_told_from_those_in_fp8_and_counted_with_their_scales(mixed_digits: Path) -> None:
    found = describe(mixed_digits)
    counts = {"nvfp4": 12, "fp8": 2, "mxfp8": 6}
    assert found["promise"]["promised"] == counts
    assert found["promise"]["found"] == {**counts, "bf16": 10}
    assert found["promise"]["differing"] == found["graph"]["promise"]["differing"] == []
    entry = found["formats"]["mxfp8"]
    assert entry["bytes"] == entry["parameters"] * 33 // 32 == found["graph"]["formats"]["mxfp8"]["bytes"]
