"""Gates on what is stored: files, weights as ONNX Runtime dequantizes them, tensors byte by byte."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.errors import BadGraph
from fp4trt.number_formats import FORMATS, NVFP4
from fp4trt.progress import tracking
from onnx_functions.formats import graph_format
from onnx_functions.graph.branches import FACTORS, SMOOTHING, effective_weight
from onnx_functions.graph.cut import cut
from onnx_functions.graph.external_data import array_of, span_of
from onnx_functions.graph.index import Index
from onnx_functions.graph.linears import Graph, Linear, declared_groups
from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation.verdict import FloatArray, Gate, gate_of_offenders, relative_l2, skipped

__all__ = [
    "Reference",
    "files_gate",
    "graph_weights",
    "quantization_gates",
    "rounded_weights_gate",
    "stored_tensors_gate",
    "weights_gate",
]

CHUNK_BYTES: Final = 256 << 20
"""How much of dequantized weights is held at a time."""

SCALE_BIAS_LIMIT: Final = 0.03

_SHARED_SCALES: Final = {leaf for kind in FORMATS.values() for leaf in kind.shared}
_SCALES: Final = {leaf for kind in FORMATS.values() for leaf in kind.leaves}


class Reference(Protocol):
    """A checkpoint as the gates want it; numpy only."""

    @property
    def directory(self) -> Path:
        """Where it lies."""

    @property
    def names(self) -> Sequence[str]:
        """Its tensors."""

    def raw(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor as it is stored."""

    def weight(self, path: str) -> FloatArray:
        """Return the weight [N, K] of a linear as the graph must multiply by it, as FP32."""


def files_gate(model: onnx.ModelProto, directory: Path, checkpoints: Sequence[Path]) -> Gate:
    """Check that checkpoint files hash as their manifest says and that every initializer's bytes exist.

    What calibrated or trained a checkpoint lies in sub-folders, and is often not published with it: that is told, no
    fault.

    Args:
        model: the deployable graph.
        directory: where its external data lie.
        checkpoints: folders whose `fp4trt.json`, where there is one, is held against their files.
    """
    offenders, checked, left_out = [], 0, []
    for folder in dict.fromkeys(path.resolve() for path in checkpoints):
        manifest = read_checkpoint_manifest(folder)
        for name, wanted in sorted(manifest.files.items() if manifest else ()):
            found = _sha256(folder / name)
            if not found and "/" in name:
                left_out.append(name)
                continue
            checked += 1
            if found != wanted:
                what = f"SHA-256 is {found[:12]}, the manifest says {wanted[:12]}" if found else "is missing"
                offenders.append((f"{folder.name}/{name}", what))
    for tensor in model.graph.initializer:
        try:
            span_of(tensor, directory)
        except BadGraph as error:
            offenders.append((tensor.name, str(error)))
    compared = f"{checked} hashes, the byte ranges of {len(model.graph.initializer)} initializers"
    if left_out:
        compared += f"; not there, and not needed: {', '.join(dict.fromkeys(left_out))}"
    if not checked and not offenders:
        return skipped("files", f"no fp4trt.json says what the files' hashes should be; checked {compared}")
    return gate_of_offenders("files", offenders, len(offenders), 0, compared, count=checked)


def _sha256(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def graph_weights(
    model: onnx.ModelProto, directory: Path, linears: Sequence[Linear]
) -> Iterator[tuple[Linear, FloatArray]]:
    """Yield each linear's weight [N, K], FP32, as ONNX Runtime hands it to the MatMul; bounded memory."""
    constants = Index(model).constants
    chunk: list[Linear] = []
    held = 0
    with tracking(len(linears), "weights") as advance:
        for index, linear in enumerate(linears):
            chunk.append(linear)
            held += 4 * int(np.prod(constants[linear.weight_source].dims))
            if held < CHUNK_BYTES and index + 1 < len(linears):
                continue
            names = list(dict.fromkeys(member.weight for member in chunk))
            session = runtime_session(simulate(cut(model, {}, names)), directory)
            arrays = dict(zip(names, session.run(names, {}), strict=True))
            for member in chunk:
                yield member, arrays[member.weight].T
            advance(len(chunk))
            chunk, held = [], 0


def weights_gate(model: onnx.ModelProto, directory: Path, reference: Reference, linears: Sequence[Linear]) -> Gate:
    """Check that each MatMul's weight is, bit for bit, the reference's weight of that linear."""
    dims = {name: tuple(tensor.dims) for name, tensor in Index(model).constants.items()}
    offenders, differing, elements = [], 0, 0
    for linear, found in graph_weights(model, directory, linears):
        expected = reference.weight(linear.path)
        elements += expected.size
        wrong = _differing(found, expected)
        if wrong:
            differing += wrong
            same = [other for other in linears if dims[other.weight_source] == dims[linear.weight_source]]
            offenders.append((f"{linear.path}.weight", _diagnosis(linear, found, same, reference)))
    compared = f"{elements} elements of {len(linears)} weights, dequantized by ONNX Runtime, equal the checkpoint's"
    return gate_of_offenders("weights", offenders, differing, 0, compared, count=elements)


def _differing(found: FloatArray, expected: FloatArray) -> int:
    if found.shape != expected.shape:
        return max(found.size, expected.size)
    left, right = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    return int((left.view(np.uint32) != right.view(np.uint32)).sum())


def _diagnosis(linear: Linear, found: FloatArray, same_shape: Sequence[Linear], reference: Reference) -> str:
    """Say in what way a weight is wrong."""
    expected = reference.weight(linear.path)
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    wrong = np.argwhere(found.view(np.uint32) != expected.view(np.uint32))
    text = f"{len(wrong)} of {found.size} elements differ, the first at {wrong[0].tolist()}"
    pairs = expected.reshape(expected.shape[0], -1, 2)[:, :, ::-1].reshape(expected.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = found[expected != 0] / expected[expected != 0]
    if np.array_equal(np.sign(found), np.sign(pairs)):
        return f"{text}: the two codes of each byte are exchanged"
    if len(ratio) and abs(ratio - np.median(ratio)).max() < 0.01 * abs(np.median(ratio)):
        return f"{text}: all are {np.median(ratio):.3g} times the checkpoint's, so its global scale is wrong"
    if len(wrong) > 1:
        for other in same_shape:
            candidate = reference.weight(other.path) if other.path != linear.path else None
            if candidate is not None and not _differing(found, candidate):
                return f"{text}: the node {linear.matmul} reads the weight of {other.path}"
    return text


def stored_tensors_gate(model: onnx.ModelProto, directory: Path, reference: Reference) -> Gate:
    """Check every initializer that carries a checkpoint tensor's name: codes, scales, biases, norms.

    A checkpoint tensor that the graph does not hold is named too, save what a merged group shares.
    """
    graph, names = Graph(model), set(reference.names)
    offenders, checked = [], 0
    for name in reference.names:
        tensor = graph.initializers.get(name)
        if tensor is None:
            if name.rpartition(".")[2] not in _SHARED_SCALES and not _is_shared(name, graph, reference):
                offenders.append((name, "is in the checkpoint but not in the graph"))
            continue
        try:
            found, expected = _bytes(array_of(tensor, directory)), _bytes(_as_in_graph(tensor, reference.raw(name)))
        except BadGraph as error:
            offenders.append((name, str(error)))
            continue
        checked += 1
        if found.size != expected.size:
            offenders.append((name, f"has {found.size} bytes, the checkpoint {expected.size}"))
        elif not np.array_equal(found, expected):
            wrong = np.flatnonzero(found != expected)
            offenders.append((name, f"{len(wrong)} of {found.size} bytes differ, the first at {wrong[0]}"))
    offenders += [(who, what) for who, what in _biases(graph) if who in names]
    offenders += _bad_scales(graph, directory)
    compared = f"{checked} initializers equal the checkpoint's tensors of the same name"
    return gate_of_offenders("stored tensors", offenders, len(offenders), 0, compared, count=checked)


def _as_in_graph(tensor: onnx.TensorProto, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a stored tensor as a graph has it: what is in FP16 or FP32 in BF16, or FP32, where the graph has that."""
    if stored.dtype not in (np.float16, np.float32):
        return stored
    if tensor.data_type == TensorProto.BFLOAT16:
        return stored.astype(ml_dtypes.bfloat16)
    return stored.astype(np.float32) if tensor.data_type == TensorProto.FLOAT else stored


def _bytes(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _is_shared(name: str, graph: Index, reference: Reference) -> bool:
    """Whether another linear of the group has the same tensor in the graph, and the same bytes in the checkpoint."""
    path, _, leaf = name.rpartition(".")
    if leaf not in (FACTORS[0], SMOOTHING):
        return False
    group = next((group for group in declared_groups(graph.model) if path in group), [])
    others = (f"{other}.{leaf}" for other in group if f"{other}.{leaf}" in graph.initializers)
    return any(np.array_equal(_bytes(reference.raw(name)), _bytes(reference.raw(other))) for other in others)


def _biases(graph: Graph) -> Iterator[tuple[str, str]]:
    """Yield the biases that a linear adds though they are another's, or does not add at all."""
    for linear in graph.linears():
        wanted = f"{linear.path}.bias"
        source = graph.to_source(linear.bias) if linear.bias else None
        if source != wanted:
            yield wanted, f"node {linear.add or linear.matmul} adds {source} in its place"


def _bad_scales(graph: Index, directory: Path) -> Iterator[tuple[str, str]]:
    """Yield the global scales that divide by zero or lead to values that are no numbers."""
    for name, tensor in graph.initializers.items():
        if name.rpartition(".")[2] in _SCALES and tensor.data_type == TensorProto.FLOAT:
            with contextlib.suppress(BadGraph):  # which the gate on files says
                value = float(array_of(tensor, directory).reshape(-1)[0])
                if not 0 < value < np.inf:
                    yield name, f"is {value:g}; expected a global scale above zero: calibrate again"


def quantization_gates(
    model: onnx.ModelProto, directory: Path, reference: Reference, linears: Sequence[Linear]
) -> tuple[Gate, Gate, Mapping[str, tuple[float, float]]]:
    """Check quantized weights, with what stands beside them, against the 16-bit weights that they were made of.

    Returns:
        The gate on the relative L2 error, the gate on the scale bias <w, w_q> / <w, w> - 1, and (error, bias)
        of each linear by path.
    """
    errors, large, biased = {}, [], []
    graph = Graph(model)
    constants = graph.constants
    for linear, residual in graph_weights(model, directory, linears):
        found = effective_weight(residual, linear.branch, linear.smoothing, constants, directory)
        expected = reference.weight(linear.path)
        if found.shape != expected.shape:
            large.append((f"{linear.path}.weight", f"shape {list(found.shape)}, expected {list(expected.shape)}"))
            continue
        error = relative_l2(found, expected)
        w = expected.astype(np.float64).reshape(-1)
        bias = float(np.dot(w, found.reshape(-1)) / max(np.dot(w, w), 1e-30)) - 1
        errors[linear.path] = (error, bias)
        if not error <= graph_format(graph.weight_format(linear.weight) or NVFP4.name).ERROR_LIMIT:
            large.append((f"{linear.path}.weight", f"relative L2 error {error:.3g}"))
        if not abs(bias) <= SCALE_BIAS_LIMIT:
            biased.append((f"{linear.path}.weight", f"is {1 + bias:.4g} times as large as the reference's"))
    worst = max((error for error, _ in errors.values()), default=0.0)
    worst_bias = max((abs(bias) for _, bias in errors.values()), default=0.0)
    told = f"largest relative L2 error of {len(errors)} weights {worst:.3g}"
    told_bias = f"largest scale bias of {len(errors)} weights {worst_bias:.2%}"
    return (
        gate_of_offenders("weight error", large, worst, graph_format(NVFP4.name).ERROR_LIMIT, told, count=len(errors)),
        gate_of_offenders("scale bias", biased, worst_bias, SCALE_BIAS_LIMIT, told_bias, count=len(errors)),
        errors,
    )


def rounded_weights_gate(
    model: onnx.ModelProto,
    directory: Path,
    reference: Reference,
    linears: Sequence[Linear],
    dequantize: Callable[[str, FloatArray, np.float32], FloatArray],
) -> Gate:
    """Check that every weight is the reference's, rounded under the graph's own global scale.

    Only plain rounding promises this (the method `ptq`). It finds a single flipped code, which no norm
    would.

    Args:
        model: the deployable graph.
        directory: where its external data lie.
        reference: the 16-bit checkpoint.
        linears: the quantized linears.
        dequantize: (path, weight [N, K], global scale) to the weight as the graph's chain has it after
            quantization.
    """
    graph = Graph(model)
    offenders, differing, elements = [], 0, 0
    for linear, found in graph_weights(model, directory, linears):
        kind = FORMATS[graph.weight_format(linear.weight) or NVFP4.name]
        stored = array_of(graph.constants[graph.weight_scale(linear)], directory) if kind.weight_scale else np.ones(())
        expected = dequantize(linear.path, reference.weight(linear.path), np.float32(stored.reshape(())))
        wrong = _differing(found, expected)
        elements += expected.size
        if wrong:
            differing += wrong
            what = f"{wrong} of {found.size} elements are not the reference's, rounded to the nearest code"
            offenders.append((f"{linear.path}.weight", what))
    compared = f"{elements} codes are those nearest to the reference"
    return gate_of_offenders("rounded weights", offenders, differing, 0, compared, count=elements)
