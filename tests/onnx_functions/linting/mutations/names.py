"""Names and bytes that do not belong together, and operators out of form."""

from __future__ import annotations

import importlib.resources
import json
import shutil

import ml_dtypes
import numpy as np
from onnx import StringStringEntryProto, TensorProto, helper

from tests.onnx_functions.linting.damage import Damaged
from tests.onnx_functions.linting.mutations.mutation import DEEP, OUT, TRT, WIDE, K, Q, mutation
from tests.onnx_functions.linting.mutations.outside import linears_of, unpromise

V = "transformer_blocks.0.attn.to_v"
TIME = "time_text_embed.timestep_embedder.linear_1"
GUIDANCE = "time_text_embed.guidance_embedder.linear_1"
NORM_Q = "transformer_blocks.0.attn.norm_q"
NORM_K = "transformer_blocks.0.attn.norm_k"

# Bytes under another tensor's name


@mutation("safetensors-name", f"{Q}.weight", "accepted")
def the_bytes_of_two_weights_exchanged(graph: Damaged) -> None:
    graph.exchange_bytes(f"{Q}.weight", f"{K}.weight")


@mutation("safetensors-name", f"{Q}.weight_scale", "accepted")
def the_bytes_of_two_block_scales_exchanged(graph: Damaged) -> None:
    graph.exchange_bytes(f"{Q}.weight_scale", f"{OUT}.weight_scale")


@mutation("safetensors-name", f"{OUT}.weight_scale_2", "accepted")
def the_bytes_of_two_global_scales_exchanged(graph: Damaged) -> None:
    graph.exchange_bytes(f"{OUT}.weight_scale_2", f"{DEEP}.weight_scale_2")


@mutation("safetensors-name", f"{OUT}.bias", "accepted")
def the_bytes_of_two_biases_exchanged(graph: Damaged) -> None:
    graph.exchange_bytes(f"{OUT}.bias", f"{DEEP}.bias")


@mutation("safetensors-name", "renamed", "accepted")
def a_bias_under_a_new_name_cut_out_of_two(graph: Damaged) -> None:
    unpromise(graph)
    graph.entry(f"{OUT}.bias", "offset", graph.offset(f"{OUT}.bias") + 2)
    graph.rename(f"{OUT}.bias", "renamed")


@mutation("safetensors-type", f"{OUT}.bias", "refused")
def a_bias_declared_in_float16(graph: Damaged) -> None:
    graph.tensor(f"{OUT}.bias").data_type = TensorProto.FLOAT16


@mutation("safetensors-type", "context_embedder.weight", "refused")
def a_weight_declared_transposed(graph: Damaged) -> None:
    tensor = graph.tensor("context_embedder.weight")
    tensor.dims[:] = list(tensor.dims)[::-1]


@mutation("safetensors-header", "diffusion_pytorch_model.safetensors", "accepted")
def the_header_of_the_weights_damaged(graph: Damaged) -> None:
    with graph.weights.open("r+b") as file:
        file.seek(8)
        file.write(b"[")


def _one_place_for_two(graph: Damaged) -> None:
    """Let two biases have the same bytes of a file that has no header."""
    shutil.copyfile(graph.weights, graph.weights.with_name("weights.bin"))
    for path in (Q, K):
        graph.entry(f"{path}.bias", "location", "weights.bin")
    graph.entry(f"{K}.bias", "offset", graph.offset(f"{Q}.bias"))


@mutation("external-shared", f"{K}.bias", "accepted")
def two_biases_on_the_same_bytes(graph: Damaged) -> None:
    _one_place_for_two(graph)


@mutation("external-alias", f"{K}.bias", "accepted")
def two_biases_on_the_same_bytes_and_nothing_promised(graph: Damaged) -> None:
    unpromise(graph)
    _one_place_for_two(graph)


# Wires that lead to another linear's tensors


@mutation("promised-weight", f"{TIME}/MatMul", "accepted")
def the_16_bit_weights_of_two_linears_exchanged(graph: Damaged) -> None:
    graph.exchange_inputs(f"{TIME}/Transpose", f"{GUIDANCE}/Transpose", 0)


@mutation("promised-weight", f"{Q}/MatMul", "accepted")
def the_weights_of_two_linears_exchanged_under_new_names(graph: Damaged) -> None:
    for kind in ("weight", "weight_scale"):
        graph.rename(f"{Q}.{kind}", f"q.{kind}")
        graph.rename(f"{K}.{kind}", f"k.{kind}")
        graph.exchange_bytes(f"q.{kind}", f"k.{kind}")


@mutation("promised-scale", f"{OUT}/MatMul", "accepted")
def the_global_scales_of_two_weights_exchanged(graph: Damaged) -> None:
    graph.exchange_inputs(f"{OUT}/weight_scale/DequantizeLinear", f"{DEEP}/weight_scale/DequantizeLinear", 1)


@mutation("promised-scale", f"{V}/MatMul", "slow")
def one_weight_of_a_group_under_the_global_scale_of_another(graph: Damaged) -> None:
    graph.node(f"{V}/weight_scale/DequantizeLinear").input[1] = f"{OUT}.weight_scale_2"


@mutation("promised-scale", f"{WIDE}/MatMul", "accepted")
def the_scales_of_two_activations_exchanged(graph: Damaged) -> None:
    for node in (TRT, "input_scale/DequantizeLinear"):
        graph.exchange_inputs(f"{OUT}/{node}", f"{WIDE}/{node}", 1)


@mutation("promised-scale", f"{WIDE}/MatMul", "accepted")
def the_activation_of_another_linear(graph: Damaged) -> None:
    graph.node(f"{WIDE}/MatMul").input[0] = graph.node(f"{OUT}/MatMul").input[0]


@mutation("promised-bias", f"{OUT}/MatMul", "accepted")
def the_biases_of_two_linears_exchanged(graph: Damaged) -> None:
    for path, other in ((OUT, DEEP), (DEEP, OUT)):
        node = graph.node(f"{path}/Add")
        node.input[:] = [f"{other}.bias" if name == f"{path}.bias" else name for name in node.input]


@mutation("promised-bias", f"{OUT}/MatMul", "accepted")
def the_bias_of_another_linear_through_a_cast(graph: Damaged) -> None:
    index = list(graph.node(f"{OUT}/Add").input).index(f"{OUT}.bias")
    graph.between(f"{OUT}/Add", index, "Cast", to=TensorProto.BFLOAT16).input[0] = f"{DEEP}.bias"


@mutation("promised-bias", f"{OUT}/MatMul", "accepted")
def a_bias_that_is_not_added(graph: Damaged) -> None:
    node = graph.node(f"{OUT}/Add")
    node.op_type = "Identity"
    node.input[:] = [name for name in node.input if name != f"{OUT}.bias"]


@mutation("module-tensor", f"{NORM_Q}/RMSNormalization", "accepted")
def the_weights_of_two_norms_exchanged(graph: Damaged) -> None:
    graph.exchange_inputs(f"{NORM_Q}/RMSNormalization", f"{NORM_K}/RMSNormalization", 1)


# Operators


@mutation("operator-form", f"{OUT}/MatMul", "refused")
def a_product_without_its_weight(graph: Damaged) -> None:
    del graph.node(f"{OUT}/MatMul").input[1]


@mutation("operator-form", f"{OUT}/Add", "accepted")
def a_sum_of_one(graph: Damaged) -> None:
    del graph.node(f"{OUT}/Add").input[1]


@mutation("operator-form", f"{OUT}/weight/Cast", "refused")
def a_cast_to_nothing(graph: Damaged) -> None:
    graph.set(f"{OUT}/weight/Cast", to=None)


@mutation("operator-form", f"{OUT}/Transpose", "slow")
def a_permutation_of_fractions(graph: Damaged) -> None:
    graph.set(f"{OUT}/Transpose", perm=[1.5, 0.5])


@mutation("transpose-axes", f"{OUT}/Transpose", "slow")
def a_permutation_of_three_axes_over_a_matrix(graph: Damaged) -> None:
    graph.set(f"{OUT}/Transpose", perm=[0, 1, 2])


@mutation("transpose-axes", f"{OUT}/Transpose", "refused")
def a_permutation_that_names_an_axis_twice(graph: Damaged) -> None:
    graph.set(f"{OUT}/Transpose", perm=[1, 1])


@mutation("weight-product", f"{OUT}/MatMul", "slow")
def a_transpose_that_exchanges_nothing(graph: Damaged) -> None:
    graph.set(f"{OUT}/Transpose", perm=[0, 1])


@mutation("product-shapes", f"{DEEP}/MatMul", "refused")
def an_activation_of_another_length(graph: Damaged) -> None:
    graph.node(f"{DEEP}/MatMul").input[0] = graph.node(f"{OUT}/MatMul").input[0]


@mutation("duplicate-tensor-name", f"{OUT}.bias", "refused")
def two_initializers_of_one_name(graph: Damaged) -> None:
    copy = TensorProto()
    copy.CopyFrom(graph.tensor(f"{DEEP}.bias"))
    copy.name = f"{OUT}.bias"
    graph.model.graph.initializer.append(copy)


@mutation("no-fp4", "plain", "slow")
def no_fp4_at_opset_17(graph: Damaged) -> None:
    unpromise(graph)
    model = graph.model
    model.opset_import[0].version = 17
    twice = helper.make_node("Add", ["hidden_states", "hidden_states"], ["latent"], "twice")
    model.graph.CopyFrom(helper.make_graph([twice], "plain", model.graph.input[:1], model.graph.output))


# Scales that no layer has


@mutation("scale-magnitude", f"{OUT}.input_scale", "accepted")
def activation_scale_of_1e_minus_30(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", 1e-30)


@mutation("scale-magnitude", f"{OUT}.input_scale", "accepted")
def activation_scale_of_1e30(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.input_scale", 1e30)


@mutation("scale-magnitude", f"{OUT}.weight_scale_2", "accepted")
def weight_global_scale_that_is_subnormal(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", 1e-41)


@mutation("scale-magnitude", f"{OUT}.weight_scale_2", "accepted")
def weight_global_scale_of_1e30(graph: Damaged) -> None:
    graph.scalar(f"{OUT}.weight_scale_2", 1e30)


# The metadata


@mutation("promise-metadata", "fp4trt.symbols", "accepted")
def a_promise_of_no_symbols(graph: Damaged) -> None:
    graph.metadata("fp4trt.symbols", "{}")


@mutation("promise-metadata", "fp4trt.linears", "accepted")
def a_promise_of_an_unknown_format(graph: Damaged) -> None:
    graph.metadata("fp4trt.linears", json.dumps({**linears_of(graph), "fp4": None}))


@mutation("unpromised-fp4", f"{OUT}/MatMul", "accepted")
def a_linear_in_fp4_that_nothing_promises(graph: Damaged) -> None:
    linears = linears_of(graph)
    linears["nvfp4"].remove(OUT)
    graph.metadata("fp4trt.linears", json.dumps(linears))


@mutation("promise-metadata", "fp4trt.scale_dtype", "accepted")
def a_promise_of_an_unknown_scale_type(graph: Damaged) -> None:
    graph.metadata("fp4trt.scale_dtype", "float8")


@mutation("promise-metadata", "fp4trt.recipe", "accepted")
def a_promise_without_a_recipe(graph: Damaged) -> None:
    graph.metadata("fp4trt.recipe", "")


@mutation("duplicate-metadata", "fp4trt.linears", "accepted")
def two_promises_of_one_key(graph: Damaged) -> None:
    text = json.dumps({"nvfp4": [OUT], "bf16": []})
    graph.model.metadata_props.append(StringStringEntryProto(key="fp4trt.linears", value=text))


# A checkpoint that has more than its graph


@mutation("stored-unread", f"{NORM_Q}.weight", "accepted")
def a_norm_without_its_stored_scale_beside_the_checkpoint(graph: Damaged) -> None:
    config = json.loads((importlib.resources.files("calibration") / "digits" / "config.json").read_text("utf-8"))
    names = [tensor.name.split(".") for tensor in graph.model.graph.initializer]
    for key, stack in (("num_layers", "transformer_blocks"), ("num_single_layers", "single_transformer_blocks")):
        config[key] = 1 + max(int(name[1]) for name in names if name[0] == stack)
    graph.path.with_name("config.json").write_text(json.dumps(config), encoding="utf-8")
    graph.rename(f"{NORM_Q}.weight", "ones")
    graph.put("ones", np.ones(64, ml_dtypes.bfloat16))
