"""How far the graph is from the reference at several times between noise and picture, all in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from fp4trt.families.family import Config, Family
from onnx_functions.validation.output_pictures import pictures_of
from onnx_functions.validation.structure_gates import Run, output_key
from onnx_functions.validation.verdict import (
    ByTime,
    FloatArray,
    OutputPicture,
    refuse_environment,
    relative_l2,
    runtime_errors,
)

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["NO_TIME", "TIMES", "batch_of_times", "errors_by_time"]

TIMES: Final = tuple(eighths / 8 for eighths in range(8, 0, -1))
"""From pure noise, 1, towards a picture, 0; BF16 holds them."""

NO_TIME: Final = "no input of the model is a time for each picture of a batch"


def batch_of_times(family: Family, config: Config, call: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a call, of batch 1, once for each of TIMES, as one batch; None where the model knows no time.

    Args:
        family: of the model.
        config: of the model.
        call: inputs by name, tensors of torch.
    """
    batch = _batch(family)
    symbolic = family.input_shapes(config)
    times = [name for name in symbolic if family.inputs[name].role == "time" and batch in symbolic[name]]
    if not times:
        return None
    found = {}
    for name, value in call.items():
        many = value.expand([len(TIMES) if size == batch else -1 for size in symbolic[name]]).clone()
        if name in times:
            for place, time in enumerate(TIMES):
                many.select(symbolic[name].index(batch), place).fill_(time * family.inputs[name].noise_at)
        found[name] = many
    return found


def errors_by_time(
    family: Family, config: Config, session: Callable[[], ort.InferenceSession], runs: Sequence[Run]
) -> tuple[ByTime, list[OutputPicture]]:
    """Run the graph at all TIMES and compare it with the reference's run of :func:`batch_of_times`.

    Args:
        family: of the model.
        config: of the model.
        session: opens the graph, in BF16 with quantized activations.
        runs: that run, or nothing where there is none.

    Returns:
        The errors, and the outputs that can be drawn.

    Raises:
        BadEnvironment: the machine cannot run the graph.
    """
    if not runs:
        return ByTime(left_out=NO_TIME), []
    try:
        found: Sequence[FloatArray] = session().run(None, dict(runs[0].inputs))
    except runtime_errors() as error:  # what is wrong with the graph is the gates' to tell
        refuse_environment(error, "the error by time")
        return ByTime(left_out=f"the graph did not run on a batch of {len(TIMES)}"), []
    points, pictures = [], []
    for place, time in enumerate(TIMES):
        run, outputs = _one(family, runs[0], found, place, time)
        pairs = zip(family.outputs, outputs, strict=False)
        errors = {
            name: relative_l2(values, run.values[output_key("", index)]) for index, (name, values) in enumerate(pairs)
        }
        points.append((time, errors))
        pictures += pictures_of(family, config, run, outputs)
    return ByTime(tuple(points)), pictures


def _one(
    family: Family, run: Run, found: Sequence[FloatArray], place: int, time: float
) -> tuple[Run, Sequence[FloatArray]]:
    """Return the reference's outputs, and the graph's, of one of a batch."""
    batch = _batch(family)

    def kept(values: FloatArray, symbolic: Sequence[Any]) -> FloatArray:
        at = symbolic.index(batch) if batch in symbolic else None
        whole = at is None or values.ndim <= at or values.shape[at] != len(TIMES)
        return values if whole else values.take([place], axis=at)

    shapes = list(family.outputs.values())
    keys = [output_key("", index) for index in range(len(shapes))]
    expected = {key: kept(run.values[key], shape) for key, shape in zip(keys, shapes, strict=True)}
    outputs = [kept(values, shape) for values, shape in zip(found, shapes, strict=False)]
    return Run(f"time {time:g}", run.inputs, expected), outputs


def _batch(family: Family) -> str | None:
    return next((name for name, dim in family.dims.items() if dim.kind == "batch"), None)
