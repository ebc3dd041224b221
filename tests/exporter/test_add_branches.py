"""The branches of SVDQuant in a graph: what a group shares, what nobody stores twice, what differs and stays apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from calibration.checkpoints.quantized import read
from exporter.onnx_export import branches, group_leaders
from exporter.passes.add_branches import Branch, add_branches
from exporter.trt_ops import ACTIVATION_PLACEHOLDER, DOMAIN
from fp4trt.safetensors_file import tensors_in_file
from onnx_functions.graph.linears import Graph

GROUP = tuple(f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"))
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def graph(svdquant_digits: Path) -> Graph:
    return Graph(onnx.load(svdquant_digits / "model.onnx", load_external_data=False))


def test_a_group_shares_smoothing_and_first_product_and_each_member_adds_its_own_before_its_bias(graph: Graph) -> None:
    linears = [graph.linear(path) for path in GROUP]
    assert {linear.smoothing for linear in linears} == {f"{GROUP[0]}.pre_quant_scale"}
    assert len({linear.quantizer for linear in linears}) == 1
    assert len({linear.input for linear in linears}) == 1
    for path, linear in zip(GROUP, linears, strict=True):
        assert linear.branch is not None
        assert linear.branch.factors == (f"{GROUP[0]}.svdquant_lora_a", f"{path}.svdquant_lora_b")
        assert linear.branch.products[0] == f"{GROUP[0]}/svdquant_lora_a/MatMul"
        assert linear.add is not None
        assert graph.nodes[linear.add].input[0] == linear.branch.output
        assert linear.bias == f"{path}.bias"


def test_a_branch_points_into_the_checkpoint(graph: Graph, svdquant_digits: Path) -> None:
    held = tensors_in_file(svdquant_digits / WEIGHTS)
    factors = [name for name in graph.initializers if "svdquant" in name or "pre_quant" in name]
    # a second factor for each linear, a first one for each group, a smoothing for each but the 3 modulations
    assert len(factors) == 20 + 13 + 10
    for name in factors:
        place = {entry.key: entry.value for entry in graph.initializers[name].external_data}
        assert (place["location"], int(place["offset"])) == (WEIGHTS, held[name].offset)


def test_members_that_differ_stay_apart(svdquant_digits: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(svdquant_digits, tmp_path / "changed")
    held = tensors_in_file(folder / WEIGHTS)
    _change(folder, held[f"{GROUP[1]}.svdquant_lora_a"].offset)
    _change(folder, held[f"{GROUP[2]}.pre_quant_scale"].offset)
    checkpoint = read(folder)
    to_q, to_k, to_v, proj_mlp = (branches(checkpoint)[path] for path in GROUP)
    assert [branch.smoothing for branch in (to_q, to_k, to_v, proj_mlp)] == [GROUP[index] for index in (0, 0, 2, 0)]
    assert [branch.factor for branch in (to_q, to_k, to_v, proj_mlp)] == [GROUP[index] for index in (0, 1, 2, 0)]
    assert [group_leaders(checkpoint)[path] for path in GROUP] == list(GROUP)
    untouched = branches(read(svdquant_digits))
    assert {untouched[path] for path in GROUP} == {Branch(GROUP[0], GROUP[0], 32)}


def test_what_stays_apart_gets_a_smoothing_and_a_first_product_of_its_own() -> None:
    model = _two_linears()
    add_branches(model, {"one": Branch("one", "one", 4), "two": Branch(None, "two", 2)})
    names = [node.name for node in model.graph if node.op_type in ("Mul", "MatMul", "Add")]
    first = ["one/pre_quant_scale/Mul", "one/svdquant_lora_a/MatMul", "one/svdquant_lora_b/MatMul", "one/MatMul"]
    second = ["two/svdquant_lora_a/MatMul", "two/svdquant_lora_b/MatMul", "two/MatMul"]
    assert names == [*first, "one/svdquant/Add", *second, "two/svdquant/Add", "sum/Add"]
    stored = {str(name): list(value.shape or ()) for name, value in model.graph.initializers.items()}
    assert stored == {
        "one.pre_quant_scale": [64],
        "one.svdquant_lora_a": [4, 64],
        "one.svdquant_lora_b": [32, 4],
        "two.svdquant_lora_a": [2, 64],
        "two.svdquant_lora_b": [32, 2],
    }
    assert [value.name for value in model.graph.outputs[0].producer().inputs] == [  # type: ignore[union-attr]
        "one/svdquant/Add_output_0",
        "two/svdquant/Add_output_0",
    ]


def _two_linears() -> ir.Model:
    """Return x [B, 64] through two linears with placeholders, added."""
    kind = ir.TensorType(ir.DataType.BFLOAT16)
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["B", 64]))
    nodes, results = [], []
    for path in ("one", "two"):
        marked = ir.node(ACTIVATION_PLACEHOLDER, [x], {"linear": path}, domain=DOMAIN, name=f"{path}/marked")
        weight = ir.Value(name=f"{path}.weight", type=kind, shape=ir.Shape([64, 32]))
        product = ir.node("MatMul", [marked.outputs[0], weight], name=f"{path}/MatMul")
        product.outputs[0].shape = ir.Shape(["B", 32])
        nodes += [marked, product]
        results.append(product.outputs[0])
    total = ir.node("Add", results, name="sum/Add")
    return ir.Model(ir.Graph([x], total.outputs, nodes=[*nodes, total], opset_imports={"": 23}), ir_version=11)


def _change(folder: Path, offset: int) -> None:
    """Change the least significant bit of a stored number."""
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
