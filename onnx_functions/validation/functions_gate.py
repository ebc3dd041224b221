"""The gate on what quantizes in ONNX Runtime: our functions, and its own operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper

from fp4trt.number_formats import FORMATS
from onnx_functions import library
from onnx_functions.formats import graph_format
from onnx_functions.simulation.simulate import runtime_session
from onnx_functions.validation.verdict import FloatArray, Gate, gate_of_offenders

__all__ = ["SlowQuantizer", "functions_gate"]

SlowQuantizer = Callable[[FloatArray, np.float32], Any]
"""The slow reference of a format: (FP32 [..., K], scale) to the bytes of its codes and, where it has some, scales."""

_SCALES: Final = (np.float32(1 / 448), np.float32(2.3e-7), np.float32(31.0))


def functions_gate(references: Mapping[str, SlowQuantizer]) -> Gate:
    """Check the quantizers in ONNX Runtime against the slow references, bit for bit.

    The data are normal values over 60 binary orders of magnitude, ties, zeros of both signs and subnormals.

    Args:
        references: name of a format to its reference.
    """
    x = _hard_values()
    offenders, differing = [], 0
    for name, reference in references.items():
        wrong_in = _check(name, reference)
        wrong = {float(scale): wrong_in(x, scale) for scale in _SCALES}
        differing += sum(wrong.values())
        if any(wrong.values()):
            scale, count = next((scale, count) for scale, count in wrong.items() if count)
            operator = "::".join(part for part in FORMATS[name].quantizer if part)
            offenders.append((operator, f"{count} values differ at global scale {scale:.8g}"))
    count = len(references) * len(_SCALES) * x.size
    told = f"{count} values and their block scales equal the slow reference"
    return gate_of_offenders("functions", offenders, differing, 0, told, count=count)


def _hard_values() -> FloatArray:
    rng = np.random.default_rng(0)
    spread = np.exp2(rng.uniform(-40, 20, (256, 1)))
    ties = np.tile([0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -2.5, -5, 6, -6], (8, 2))
    subnormal = rng.uniform(-1e-39, 1e-39, (8, 32))
    x = np.concatenate([rng.standard_normal((256, 32)) * spread, ties, subnormal, np.zeros((2, 32))])
    return x.astype(np.float32)


def _check(name: str, reference: SlowQuantizer) -> Callable[[FloatArray, np.float32], int]:
    """Return what counts the codes and block scales that differ."""
    format = graph_format(name)
    session = runtime_session(_model(format.quantizer_node(), format.functions()), Path.cwd())
    inputs = [value.name for value in session.get_inputs()]

    def count(x: FloatArray, scale: np.float32) -> int:
        given = {"x": x, "scale": np.asarray(scale)}
        found = format.bytes_of(session.run(None, {name: given[name] for name in inputs}))
        wanted = reference(x, scale)
        pairs = zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True)
        return sum(int((ours != theirs).sum()) for ours, theirs in pairs)

    return count


def _model(quantizer: onnx.NodeProto, functions: Sequence[onnx.FunctionProto]) -> onnx.ModelProto:
    """Return x, scale -> what a quantizer gives, all FP32."""
    value = helper.make_tensor_value_info
    casts = [helper.make_node("Cast", [name], [f"{name}:out"], to=TensorProto.FLOAT) for name in quantizer.output]
    graph = helper.make_graph(
        [quantizer, *casts],
        "quantizer",
        [value(name, TensorProto.FLOAT, ["M", "K"] if name == "x" else []) for name in quantizer.input],
        [value(node.output[0], TensorProto.FLOAT, ["M", f"{node.input[0]}:K"]) for node in casts],
    )
    domains = {"": library.FUNCTION_OPSET, library.TRT_DOMAIN: 1}
    domains |= {library.SIMULATION_DOMAIN: 1, library.MICROSOFT_DOMAIN: 1}
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
