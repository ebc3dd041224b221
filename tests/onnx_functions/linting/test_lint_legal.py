"""What third-party graphs do and the lint has to let pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from calibration.recipes.recipe import preset_names
from onnx_functions.graph.linears import metadata_of
from onnx_functions.linting import lint
from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import MODULATION, OUT, K, Q


def test_a_gemm_does_as_well_as_a_matmul(damaged: Damaged) -> None:
    product, bias = damaged.node(f"{MODULATION}/MatMul"), damaged.node(f"{MODULATION}/Add")
    weight = damaged.node(f"{MODULATION}/Transpose").input[0]
    inputs = [product.input[0], weight, f"{MODULATION}.bias"]
    product.CopyFrom(helper.make_node("Gemm", inputs, bias.output, f"{MODULATION}/Gemm", transB=1))
    damaged.remove(f"{MODULATION}/Transpose", f"{MODULATION}/Add")
    assert lint(damaged.save()).findings == ()


def test_scales_in_constant_nodes_count_as_initializers(damaged: Damaged) -> None:
    """Exporters that go by TorchScript write them so."""
    name = f"{OUT}.input_scale"
    value = helper.make_tensor("value", onnx.TensorProto.FLOAT, [], damaged.values(name))
    damaged.model.graph.initializer.remove(damaged.tensor(name))
    damaged.model.graph.node.insert(0, helper.make_node("Constant", [], [name], "scale", value=value))
    assert lint(damaged.save()).findings == ()


def test_a_concatenation_a_part_and_a_new_name_of_stored_tensors_are_legal(damaged: Damaged) -> None:
    """What a third-party graph does with a checkpoint that it points into."""
    del damaged.model.metadata_props[:]
    clean = lint(damaged.save()).findings
    first, second = f"{Q}.weight_scale", f"{K}.weight_scale"
    assert damaged.offset(second) == damaged.offset(first) + 128 * 8
    stored = damaged.tensor(first)
    for name, rows, begin in (("both", 256, 0), ("upper half", 64, 0), ("lower half", 64, 64 * 8), ("renamed", 128, 0)):
        tensor = onnx.TensorProto()
        tensor.CopyFrom(stored)
        tensor.name, tensor.dims[:] = name, [rows, 8]
        damaged.model.graph.initializer.append(tensor)
        damaged.entry(name, "offset", damaged.offset(first) + begin)
        damaged.entry(name, "length", rows * 8)
    rules = {finding.rule for finding in lint(damaged.save()).findings if finding not in clean}
    assert rules == {"dead-initializer", "external-alias", "external-overlap"}


def test_a_weight_with_an_axis_of_1_in_front_is_judged_by_its_own_shape(damaged: Damaged) -> None:
    """TensorRT-RTX builds it in FP4; what the graph declares of the tensors behind it is of the matrix."""
    for name in (f"{OUT}.weight", f"{OUT}.weight_scale"):
        damaged.tensor(name).dims.insert(0, 1)
    damaged.set(f"{OUT}/Transpose", perm=[0, 2, 1])
    assert lint(damaged.save()).findings == ()


def test_a_move_that_keeps_the_last_axis_is_looked_through(damaged: Damaged) -> None:
    """TensorRT-RTX builds it in FP4."""
    damaged.put("tokens", np.array([0, -1, 128], np.int64), (3,), onnx.TensorProto.INT64)
    damaged.between(f"{OUT}/MatMul", 0, "Reshape", "tokens")
    damaged.between(f"{OUT}/Transpose", 0, "Flatten", axis=1)
    assert lint(damaged.save()).findings == ()


def test_a_move_to_another_last_axis_is_looked_through_in_fp8(fp8_digits: Path, tmp_path: Path) -> None:
    """One scale for the whole tensor is the same wherever its elements are; TensorRT-RTX builds it in FP8."""
    graph = Damaged.copy(fp8_digits, tmp_path / "model")
    clean = lint(graph.save()).findings
    for name, size in (("rows", (-1, 128)), ("one row", (1, -1))):
        graph.put(name, np.array(size, np.int64), (2,), onnx.TensorProto.INT64)
    graph.between(f"{MODULATION}/MatMul", 0, "Reshape", "rows")
    graph.between(f"{MODULATION}/MatMul/inserted_0", 0, "Reshape", "one row")
    assert lint(graph.save()).findings == clean


def test_a_cast_of_block_scales_gives_both_dequantizations_one_type(damaged: Damaged) -> None:
    """TensorRT-RTX builds it in FP4, and refuses it without the Cast."""
    kind = int(onnx.TensorProto.BFLOAT16)
    damaged.set(f"{OUT}/weight/DequantizeLinear", output_dtype=kind)
    assert [finding.rule for finding in lint(damaged.save()).findings] == ["weight-output-type"]
    damaged.between(f"{OUT}/weight/DequantizeLinear", 1, "Cast", to=kind)
    assert lint(damaged.save()).findings == ()


def test_every_preset_and_a_name_of_the_users_own_are_recipes(damaged: Damaged) -> None:
    for name in (*preset_names(), "my-own.v2", "unknown"):
        helper.set_model_props(damaged.model, {**metadata_of(damaged.model), "fp4trt.recipe": name})
        assert lint(damaged.save()).findings == (), name


def test_a_copy_of_a_stored_tensor_inside_the_graph_is_legal(damaged: Damaged) -> None:
    tensor, raw = damaged.tensor(f"{OUT}.bias"), damaged.values(f"{OUT}.bias").tobytes()
    tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw))
    assert lint(damaged.save()).findings == ()


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE])
def test_a_cast_to_another_wide_type_and_back_is_legal(kind: int, damaged: Damaged) -> None:
    damaged.between(f"{OUT}/MatMul", 1, "Cast", to=int(onnx.TensorProto.BFLOAT16)).name = "back"
    damaged.between("back", 0, "Cast", to=kind)
    assert lint(damaged.save()).findings == ()


def test_a_bias_that_is_cast_is_added(damaged: Damaged) -> None:
    """As that of a linear that computes in FP32 is."""
    index = list(damaged.node(f"{OUT}/Add").input).index(f"{OUT}.bias")
    damaged.between(f"{OUT}/Add", index, "Cast", to=onnx.TensorProto.BFLOAT16)
    assert lint(damaged.save()).findings == ()


def test_a_linear_that_only_a_subgraph_reads_is_alive(damaged: Damaged) -> None:
    name = damaged.node(f"{OUT}/Add").output[0]
    inner = helper.make_node("Identity", [name], ["inner"], "inner")
    branch = helper.make_graph([inner], "branch", [], [helper.make_tensor_value_info("inner", 16, None)])
    damaged.put("condition", b"\x01", (), onnx.TensorProto.BOOL)
    node = helper.make_node("If", ["condition"], ["chosen"], "if", then_branch=branch, else_branch=branch)
    for reader in damaged.model.graph.node:
        reader.input[:] = ["chosen" if read == name else read for read in reader.input]
    position = next(i for i, node in enumerate(damaged.model.graph.node) if node.name == f"{OUT}/Add")
    damaged.model.graph.node.insert(position + 1, node)
    assert lint(damaged.save()).findings == ()


def test_one_domain_that_is_imported_twice_at_one_opset_is_legal(damaged: Damaged) -> None:
    damaged.model.opset_import.append(helper.make_opsetid("ai.onnx", 23))
    assert lint(damaged.save()).findings == ()


def test_a_zero_point_of_zeros_under_block_scales_is_legal(damaged: Damaged) -> None:
    damaged.put("zero", b"", (), onnx.TensorProto.FLOAT8E4M3FN)
    damaged.tensor("zero").raw_data = bytes(1)
    damaged.node(f"{OUT}/weight_scale/DequantizeLinear").input.append("zero")
    assert lint(damaged.save()).findings == ()
