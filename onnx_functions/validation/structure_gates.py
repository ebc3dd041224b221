"""Gates on the whole graph: is it the reference's network, does it use every input, do witnesses agree."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto

from onnx_functions.graph.cut import cut
from onnx_functions.graph.index import Index
from onnx_functions.graph.linears import Linear
from onnx_functions.graph.lora_slots import is_factor_input
from onnx_functions.simulation.simulate import runtime_session, simulate
from onnx_functions.validation.example_inputs import other_values
from onnx_functions.validation.verdict import (
    FloatArray,
    Gate,
    failed_to_run,
    refuse_environment,
    relative_l2,
    runtime_errors,
    skipped,
)

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = [
    "FoundTaps",
    "Run",
    "Tap",
    "end_to_end_gate",
    "inputs_gate",
    "output_key",
    "structure_gate",
    "taps_of",
    "witness_gate",
]

STRUCTURE_LIMIT: Final = 1e-3
QUANTIZED_STRUCTURE_LIMIT: Final = 0.4
"""Against 16-bit weights: a tensor may carry the error of every weight before it, but not another sign or value."""

END_TO_END_LIMIT: Final = 0.2
"""Difference of two correct runs: a code that falls the other way is a whole step, and steps add up over blocks."""

INPUT_CHANGE: Final = 1e-6
"""Relative L2 change of the output that counts as one, a few times FP32's rounding."""

WITNESS_ELEMENTS: Final = 30_000_000
"""The ReferenceEvaluator holds FP32 copies and multiplies BF16 in numpy: for graphs of at most so many weights."""


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph with a counterpart in the reference: a linear's input or output, or the graph's.

    Attributes:
        tensor: its name in the graph.
        label: what it is, for people.
        key: (module path, "input" or "output"), or an :func:`output_key`: the reference's name for it.
    """

    tensor: str
    label: str
    key: tuple[str, str]


@dataclass(frozen=True)
class Run:
    """One run of the reference: what went in, and the tensors that the taps ask for.

    Attributes:
        shape: the symbolic sizes, for people, such as `B=1 L=16 T=8`.
        inputs: graph input to FP32 values.
        values: tap key to FP32 values.
    """

    shape: str
    inputs: Mapping[str, FloatArray]
    values: Mapping[tuple[str, str], FloatArray]


def output_key(block: str, index: int) -> tuple[str, str]:
    """Return what :class:`Run` calls an output of a block, or, where that is empty, of the model."""
    return block, f"output {index}"


FoundTaps = Callable[[Mapping[str, FloatArray], Run], Sequence[Tap]]


def taps_of(model: onnx.ModelProto, linears: Sequence[Linear], outputs: Sequence[str] = ()) -> list[Tap]:
    """Return every linear's input and output, and outputs of the graph that the reference has too, in order."""
    taps = []
    for linear in linears:
        taps.append(Tap(linear.input, f"input of {linear.path}", (linear.path, "input")))
        taps.append(Tap(linear.output, f"output of {linear.path}", (linear.path, "output")))
    taps += [Tap(name, f"graph output {name}", output_key("", place)) for place, name in enumerate(outputs)]
    return _in_order(model, taps)


def _in_order(model: onnx.ModelProto, taps: Sequence[Tap]) -> list[Tap]:
    graph = Index(model)

    def position(tap: Tap) -> int:
        node = graph.producer.get(tap.tensor)
        return graph.order[node.name] if node is not None else -1

    return sorted(taps, key=position)


def module_taps(model: onnx.ModelProto, keys: Collection[tuple[str, str]]) -> list[Tap]:
    """Return the inputs and outputs of the reference's other modules, as far as node names give them away.

    Nodes of a module are named `PATH/...`. Where one computed tensor enters them and one leaves, these are
    taken to be its input and output. That holds for norms and activations but is no promise of the exporter,
    so these taps only narrow down a divergence that others found.
    """
    graph = Index(model)
    inside: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        inside.setdefault(node.name.rpartition("/")[0], []).append(node)
    taps = []
    for path in dict.fromkeys(path for path, _ in keys):
        nodes = inside.get(path, [])
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input if name}
        enters = [name for name in read - made if name not in graph.initializers]
        leaves = [
            name for name in made if any(reader.name not in _names(nodes) for reader in graph.consumers.get(name, ()))
        ]
        for which, found in (("input", enters), ("output", leaves)):
            if len(found) == 1 and (path, which) in keys:
                taps.append(Tap(found[0], f"{which} of {path}", (path, which)))
    return taps


def _names(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    return {node.name for node in nodes}


def float32_session(model: onnx.ModelProto, directory: Path, taps: Sequence[Tap] = ()) -> ort.InferenceSession:
    """Open the graph in FP32 with activations unquantized; its outputs, then every tap that a node computes."""
    made = {name for node in model.graph.node for name in node.output}
    outputs = [value.name for value in model.graph.output]
    names = dict.fromkeys([*outputs, *(tap.tensor for tap in taps if tap.tensor in made)])
    piece = cut(model, {value.name: value.name for value in model.graph.input}, list(names))
    return runtime_session(simulate(piece, bypass_activation_quantizers=True, float32=True), directory)


def structure_gate(
    model: onnx.ModelProto,
    directory: Path,
    linears: Sequence[Linear],
    runs: Sequence[Run],
    limit: float = STRUCTURE_LIMIT,
    outputs: Sequence[str] | None = None,
    found_taps: FoundTaps | None = None,
) -> tuple[Gate, Mapping[str, float]]:
    """Compare graph and reference, both in FP32 with activations unquantized, at every shape.

    Args:
        model: the deployable graph, or a piece of it.
        directory: where its external data lie.
        linears: of the graph.
        runs: the reference's values.
        limit: relative L2 of each tensor.
        outputs: those of the graph that are the reference's outputs; None for all.
        found_taps: (values by tensor, run) to more taps, which only values can tell.

    Returns:
        The gate, which names the first tensor that diverges in topological order, and each linear's worst
        error.
    """
    outputs = [value.name for value in model.graph.output] if outputs is None else outputs
    own = taps_of(model, linears, outputs)
    gate, errors = _first_divergence(model, directory, own, runs, limit, found_taps)
    if gate.passed:
        return gate, errors
    known = {(linear.path, which) for linear in linears for which in ("input", "output")}
    keys = {key for key in runs[0].values if key not in known and key[0]}
    taps = _in_order(model, [*own, *module_taps(model, keys)])
    return _first_divergence(model, directory, taps, runs, limit, found_taps)[0], errors


def _first_divergence(
    model: onnx.ModelProto,
    directory: Path,
    taps: Sequence[Tap],
    runs: Sequence[Run],
    limit: float,
    found_taps: FoundTaps | None,
) -> tuple[Gate, Mapping[str, float]]:
    session = cache(lambda: float32_session(model, directory, taps))
    errors: dict[str, float] = {}
    diverging: Gate | None = None
    broken: Gate | None = None
    worst = 0.0
    more: Sequence[Tap] = ()
    for run in runs:
        found, reached, reason = _computed(model, directory, taps, run, session)
        agreeing: list[str] = []
        more = found_taps(found, run) if found_taps is not None else ()
        for tap in (*reached, *more):
            error = _tap_error(tap, found, run)
            worst = max(worst, error)
            if tap.key[1] == "output" and tap.key[0]:
                errors[tap.key[0]] = max(errors.get(tap.key[0], 0.0), error)
            if error <= limit:
                agreeing.append(tap.tensor)
            elif diverging is None:
                diverging = _divergence(model, tap, error, limit, run.shape, agreeing)
        if len(reached) < len(taps) and broken is None:
            broken = _unreached(model, taps[len(reached)], run.shape, agreeing, reason)
    shapes = " and ".join(run.shape for run in runs)
    told = f"{len(taps) + len(more)} tensors, largest relative L2 error {worst:.2g}, at {shapes}"
    return diverging or broken or Gate("structure", True, worst, limit, told), errors


def _computed(
    model: onnx.ModelProto,
    directory: Path,
    taps: Sequence[Tap],
    run: Run,
    session: Callable[[], ort.InferenceSession],
) -> tuple[Mapping[str, FloatArray], Sequence[Tap], str]:
    """Return the taps' values, the taps that could be computed, and why the others could not.

    A graph that cannot be run to its end is cut shorter, by halving, until it can.
    """
    try:
        return _outputs(session(), run), taps, ""
    except runtime_errors() as failed:
        refuse_environment(failed, "structure")
        reason = next((line for line in str(failed).splitlines() if line.strip()), type(failed).__name__)
    made = {name for node in model.graph.node for name in node.output}
    inputs = {value.name: value.name for value in model.graph.input}
    works: Mapping[str, FloatArray] = {}
    low, high = 0, len(taps) - 1
    while low < high:
        middle = (low + high + 1) // 2
        names = list(dict.fromkeys(tap.tensor for tap in taps[:middle] if tap.tensor in made))
        try:
            piece = simulate(cut(model, inputs, names), bypass_activation_quantizers=True, float32=True)
            works, low = _outputs(runtime_session(piece, directory), run) if names else {}, middle
        except runtime_errors() as failed:
            refuse_environment(failed, "structure")
            high = middle - 1
    return works, taps[:low], reason


def _outputs(session: ort.InferenceSession, run: Run) -> dict[str, FloatArray]:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(run.inputs)), strict=True))


def _unreached(model: onnx.ModelProto, tap: Tap, shape: str, agreeing: Sequence[str], reason: str) -> Gate:
    """Return the failed gate for a graph that breaks off before a tap."""
    suspects = _suspects(Index(model), tap.tensor, set(agreeing))
    told = f"{tap.label} ({tap.tensor}) cannot be computed at {shape}: {reason}; nodes: {', '.join(suspects[:8])}"
    return Gate("structure", False, float("inf"), STRUCTURE_LIMIT, told, tuple(suspects))


def _tap_error(tap: Tap, found: Mapping[str, FloatArray], run: Run) -> float:
    expected = run.values[tap.key]
    if tap.tensor in found:
        return relative_l2(found[tap.tensor], expected)
    if tap.tensor in run.inputs:
        return relative_l2(run.inputs[tap.tensor], expected)
    return float("inf")  # an initializer where the reference computes something


def _divergence(
    model: onnx.ModelProto, tap: Tap, error: float, limit: float, shape: str, agreeing: Sequence[str]
) -> Gate:
    """Return the failed gate for the first diverging tensor, naming the nodes that can have caused it."""
    graph = Index(model)
    node = graph.producer.get(tap.tensor)
    maker = f"node {node.name}" if node is not None else f"initializer {tap.tensor}"
    suspects = _suspects(graph, tap.tensor, set(agreeing))
    constants = [name for name in suspects if _reads_constant_alone(graph, name)]
    named = [*constants, *(name for name in suspects if name not in constants)]
    detail = f"{maker} gives {tap.label} ({tap.tensor}), which differs by {error:.3g} (relative L2) at {shape}"
    if constants:
        detail += f"; it depends on constants in {', '.join(constants[:3])}"
    others = [name for name in named if node is None or name != node.name]
    if others:
        detail += f"; between it and the last tensors that agree: {', '.join(others[:8])}"
        detail += f" and {len(others) - 8} more nodes" if len(others) > 8 else ""
    first = (node.name,) if node is not None else (tap.tensor,)
    return Gate("structure", False, error, limit, detail, (*first, *others))


def _suspects(graph: Index, tensor: str, agreeing: set[str]) -> list[str]:
    """Return the nodes between tensors that agree and one that does not, the nearest to it first."""
    return [node.name for node in reversed(graph.above(tensor, until=agreeing))]


def _reads_constant_alone(graph: Index, name: str) -> bool:
    """Return whether a node brings in floats that neither the checkpoint nor an input of the graph gave."""
    node = graph.nodes[name]
    if node.op_type == "Constant":
        return any(attribute.t.dims for attribute in node.attribute if attribute.name == "value")
    return any(
        name in graph.initializers
        and "." not in name
        and len(graph.initializers[name].dims) > 1
        and graph.initializers[name].data_type in (TensorProto.FLOAT, TensorProto.BFLOAT16)
        for name in node.input
    )


def inputs_gate(model: onnx.ModelProto, directory: Path, inputs: Mapping[str, FloatArray]) -> Gate:
    """Check that each graph input, changed alone, changes an output (FP32, activations unquantized).

    Not the factors of slots for LoRAs: with each of them its linear is checked.
    """
    if not model.graph.input:
        return Gate("inputs", False, 0, 0, "the graph has no input: it computes a constant")
    session = float32_session(model, directory)
    base = session.run(None, dict(inputs))
    rng = np.random.default_rng(0)
    without, changes = [], {}
    for value in (value for value in model.graph.input if not is_factor_input(value.name)):
        given = inputs[value.name]
        if given.dtype == np.float32:
            changed = (given * 0.5 + rng.uniform(0.5, 1.5, given.shape)).astype(np.float32)
        else:
            changed = next(other_values(given))
        found = session.run(None, {**inputs, value.name: changed})
        changes[value.name] = max(map(relative_l2, found, base))
        if not changes[value.name] > INPUT_CHANGE:
            without.append(value.name)
    smallest = min(changes, key=lambda name: changes[name])
    if without:
        detail = f"changing {', '.join(without)} changes nothing in the output"
        return Gate("inputs", False, len(without), 0, detail, tuple(without))
    told = f"all {len(changes)} change the output, {smallest} the least: by {changes[smallest]:.2g}"
    return Gate("inputs", True, 0, 0, told)


def end_to_end_gate(
    model: onnx.ModelProto,
    session: ort.InferenceSession,
    run: Run,
    limit: float = END_TO_END_LIMIT,
    keep: Callable[[Sequence[FloatArray]], None] | None = None,
) -> Gate:
    """Compare the graph, in BF16 with quantized activations (`session`), with the reference's fake quantization.

    `keep` is called with the graph's outputs.
    """
    found = session.run(None, dict(run.inputs))
    if keep is not None:
        keep(found)
    errors = [relative_l2(values, run.values[output_key("", place)]) for place, values in enumerate(found)]
    error = max(errors)
    detail = f"relative L2 {error:.3g} between ONNX Runtime and torch at {run.shape}"
    name = model.graph.output[errors.index(error)].name
    node = Index(model).producer[name].name
    if error <= limit:
        return Gate("end to end", True, error, limit, detail)
    return Gate("end to end", False, error, limit, f"{name}, of node {node}: {detail}", (node,))


def witness_gate(path: Path, model: onnx.ModelProto, session: ort.InferenceSession, run: Run) -> Gate:
    """Run the unmodified file in onnx's ReferenceEvaluator and compare with the simulation (`session`)."""
    from onnx_functions.simulation.reference_ops import reference_evaluator

    elements = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    if elements > WITNESS_ELEMENTS:
        why = f"{elements} weights are too many for the ReferenceEvaluator; it takes {WITNESS_ELEMENTS}"
        return skipped("second witness", why)
    types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    feeds = {
        name: value.astype(ml_dtypes.bfloat16) if types[name] == TensorProto.BFLOAT16 else value
        for name, value in run.inputs.items()
    }
    try:
        outputs: Any = reference_evaluator(path).run(None, feeds)
    except Exception as refusal:  # the evaluator raises whatever numpy does
        refuse_environment(refusal, "second witness")
        return failed_to_run("second witness", refusal)
    found = session.run(None, dict(run.inputs))
    error = max(relative_l2(values, other.astype(np.float32)) for values, other in zip(found, outputs, strict=True))
    detail = f"relative L2 {error:.3g} between ONNX Runtime and the ReferenceEvaluator at {run.shape}"
    return Gate("second witness", error <= END_TO_END_LIMIT, error, END_TO_END_LIMIT, detail)
