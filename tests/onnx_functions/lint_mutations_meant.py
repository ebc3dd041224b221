"""More of the table in lint_mutations.py: graphs that look whole, and in which another tensor or wire does the work."""

from __future__ import annotations

import numpy as np
from lint_damage import Damaged
from lint_mutations import OUT, mutation
from lint_mutations_names import MUTATIONS
from onnx import TensorProto, helper

__all__ = ["MUTATIONS"]

# Data inside the graph under the name of a stored tensor


def _inline(graph: Damaged, name: str, dims: tuple[int, ...], raw: bytes) -> TensorProto:
    tensor = graph.tensor(name)
    tensor.CopyFrom(TensorProto(name=name, data_type=tensor.data_type, dims=dims, raw_data=raw))
    return tensor


@mutation("safetensors-name", f"{OUT}.weight", "accepted")
def a_weight_inside_the_graph_under_a_stored_name(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.weight", (128, 128), b"\x33" * 8192)


@mutation("safetensors-name", f"{OUT}.bias", "accepted")
def a_bias_of_one_element_under_a_stored_name(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.bias", (1,), b"\x33\x40")


@mutation("safetensors-name", f"{OUT}.weight", "accepted")
def a_weight_in_a_constant_node_under_a_stored_name(graph: Damaged) -> None:
    value = TensorProto()
    value.CopyFrom(_inline(graph, f"{OUT}.weight", (128, 128), b"\x33" * 8192))
    graph.model.graph.initializer.remove(graph.tensor(f"{OUT}.weight"))
    graph.model.graph.node.insert(0, helper.make_node("Constant", [], [f"{OUT}.weight"], "constant", value=value))


@mutation("safetensors-name", f"{OUT}.input_scale", "accepted")
def an_activation_scale_inside_the_graph(graph: Damaged) -> None:
    _inline(graph, f"{OUT}.input_scale", (), np.float32(3).tobytes())
