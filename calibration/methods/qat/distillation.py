"""From a plain checkpoint to a trained student: quantize to start, train, and hand over what is to be stored."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from calibration.by_block import processes
from calibration.by_block.measure_amax import identity_of, require_device
from calibration.checkpoints.plain import load_source, open_plain
from calibration.checkpoints.quantized import Checkpoint, read
from calibration.formats.shared_scales import SHARING
from calibration.inputs.captured import Inputs
from calibration.methods.qat.loss_curve import write_losses
from calibration.methods.qat.student import make_student, student_tensors
from calibration.methods.qat.training import train
from calibration.recipes.recipe import QAT
from fp4trt.errors import BadCheckpoint, BadRecipe
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import DTYPE_BYTES, StoredTensor, bytes_of, plan_of, tensors_in_file, write
from fp4trt.work_folder import work_folder, write_mark

__all__ = ["Trained", "trained"]

_MARK: Final = "training.json"
"""Tells a folder of ours from one of the user's, and holds what is trained on what."""

_START: Final = "start"
_RESULT: Final = "trained.safetensors"


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Attributes:
        tensors: every tensor of the quantized checkpoint.
        amax: of each quantizer; training leaves them.
        files: name to file of the loss curve.
        figures: for the manifest.
    """

    tensors: Mapping[str, StoredTensor]
    amax: Mapping[str, float]
    files: Mapping[str, Path]
    figures: Mapping[str, Any]


@contextlib.contextmanager
def trained(
    folder: Path,
    calls: Sequence[Inputs],
    options: QAT,
    recipe: Mapping[str, Any],
    begin: Callable[[Path], object],
    work: Path,
    device: str = "cpu",
) -> Iterator[Trained]:
    """Train on captured inputs; what comes of it is there until the end of the ``with`` statement.

    All processes of ``accelerate launch`` call this together. A run that was killed resumes with the state that it kept
    last, and in one process ends with the same bytes.

    Args:
        folder: a plain checkpoint.
        calls: captured inputs.
        options: of the recipe.
        recipe: what the result depends on besides, as JSON.
        begin: makes the quantized checkpoint to start from, in a folder that is not there yet.
        work: folder for what is finished.
        device: where to compute, ``cpu`` or ``cuda``.

    Raises:
        BadCheckpoint, BadInputs, BadRecipe, OutputExists: naming what is wrong.
    """
    require_device(device)
    config = load_json(folder / "config.json")
    _refuse_several_outputs(family_of(config))
    identity = {**identity_of(folder, config, calls, device), "recipe": dict(recipe), "processes": processes.count()}
    identity["scales"] = SHARING
    with _kept(work, identity, device):
        if _missing(work / _START, device):
            begin(work / _START)
        start = read(work / _START)
        if _missing(work / _RESULT, device):
            _train(folder, config, start, calls, options, work, device)
        losses = load_json(work / "loss.json")
        figures = {"start": start.manifest["recipe"], "velocity_loss": _ends(losses["velocity"])}
        files = {path.name: path for path in (work / "loss.json", work / "loss.png") if path.is_file()}
        tensors = {**start.tensors, **tensors_in_file(work / _RESULT)}
        yield Trained(tensors, start.manifest["amax"], files, figures)


def _refuse_several_outputs(family: Family) -> None:
    """Refuse a model with several outputs: the loss, and the way from noise to image, are of one.

    Raises:
        BadRecipe: saying what to take instead.
    """
    if len(family.outputs) > 1:
        raise BadRecipe(
            f"qat trains a model with one output, and {family.name} has {' and '.join(family.outputs)}; "
            "expected another method, such as quality"
        )


def _train(
    folder: Path,
    config: dict[str, Any],
    start: Checkpoint,
    calls: Sequence[Inputs],
    options: QAT,
    work: Path,
    device: str,
) -> None:
    plain = functools.partial(open_plain(folder).tensor, dtype=torch.float32)
    student = make_student(start, plain, options.learn)
    teacher = load_source(folder, torch.float32)
    state, losses = train(student, teacher, calls, start.family, config, options, work, device)
    if processes.is_main():
        tensors = student_tensors(student, state)
        plan = sorted((plan_of(name, value) for name, value in tensors.items()), key=lambda t: -DTYPE_BYTES[t.dtype])
        write_losses(losses, work)
        partial = work / f"{_RESULT}.partial"
        write(partial, plan, ((one.name, bytes_of(tensors[one.name])) for one in plan), {"format": "fp4trt-trained"})
        partial.replace(work / _RESULT)
    processes.wait(device)


def _missing(path: Path, device: str) -> bool:
    """Whether a result is not there; all processes see the same, because none makes it before all have looked."""
    missing = not path.exists()
    processes.wait(device)
    return missing


def _ends(losses: Sequence[float], part: int = 20) -> dict[str, float]:
    """Return the mean loss of the first and of the last steps."""
    first, last = losses[:part], losses[-part:]
    return {"first": sum(first) / len(first), "last": sum(last) / len(last)}


@contextlib.contextmanager
def _kept(work: Path, identity: Mapping[str, Any], device: str) -> Iterator[None]:
    """Give the main process a folder that goes when all is done, and stays where the run was killed or interrupted."""
    if not processes.is_main():
        processes.wait(device)
        yield
        return
    wanted = json.loads(json.dumps(identity))

    def resume() -> bool:
        return _holds(work / _MARK, wanted)

    def begin() -> None:
        write_mark(work, _MARK, wanted)

    def keeps() -> str:
        return "the training" if (work / _MARK).is_file() else ""

    with work_folder(work, _MARK, resume, begin, keeps):
        processes.wait(device)
        yield


def _holds(mark: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        return load_json(mark) == wanted
    except BadCheckpoint:
        return False
