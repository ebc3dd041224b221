"""``fp4trt calibrate``: how large what linears and attentions read becomes, measured over the denoising schedule."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from calibration.by_block import processes
from calibration.by_block.measure_amax import measured_by_block, require_device
from calibration.checkpoints.plain import find_source, load_source, open_plain, weights_fingerprint
from calibration.checkpoints.threads import suited_threads
from calibration.formats import input_quantizers
from calibration.formats.attention_amax import operands_of
from calibration.inputs.captured import Inputs, check_inputs, load_inputs, save_inputs, warnings_of
from calibration.inputs.given import is_amax, paths_of
from calibration.inputs.prompts import SMALLEST, Sampling, capture_prompts, refuse_no_data, refuse_sampling
from calibration.inputs.settings import refuse_of_pipelines
from fp4trt.errors import BadAmax, BadInputs, OutputExists
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from fp4trt.options import at_least, file_name, file_names, not_negative, takes
from fp4trt.progress import Progress, note
from fp4trt.publish import refuse_existing, write_json
from fp4trt.safetensors_file import sha256_of
from fp4trt.verb import FLAT, Result, verb

__all__ = ["Calibration", "calibrate", "calibration_from", "captured_from", "is_amax", "merged"]

METADATA: Final = "__metadata__"
"""The one key of a calibration file that is no module path."""

SOURCE: Final = "source_weights"
"""In it, the fingerprint of the model that was measured."""


@dataclass(frozen=True)
class Calibration:
    """Amax values, and what they were measured on.

    Attributes:
        amax: module path of each quantized linear to the largest magnitude of its input; ``A.q``, ``A.k`` and ``A.v``
            to those of each attention's operands, which files of before have not.
        described: kind and hash of the data, for the manifest.
        calls: the captured inputs; none where a file of amax values was given.
    """

    amax: Mapping[str, float]
    described: Mapping[str, Any]
    calls: Sequence[Inputs] = field(default=(), repr=False)


@dataclass(frozen=True, eq=False)
class Calibrated(Result):
    """What :func:`calibrate` measured.

    Attributes:
        amax: path of the JSON file.
        inputs: path of the captured inputs that were kept; None without.
        linears: how many linears it covers.
        attentions: how many attentions it covers.
        described: what it was measured on: ``data``, ``calls``, ``family`` and more.
    """

    amax: str
    inputs: str | None
    linears: int
    attentions: int
    described: Mapping[str, Any] = field(metadata=FLAT)


@verb
@takes(
    source=file_name,
    output=file_name,
    inputs=file_name,
    prompts=file_name,
    steps=at_least(1),
    resolution=at_least(SMALLEST),
    frames=at_least(1),
    guidance=not_negative,
    like=file_name,
    lora=file_names,
)
def calibrate(
    source: str | Path,
    output: str | Path,
    *,
    inputs: str | Path | None = None,
    prompts: str | Path | None = None,
    save_inputs_to: str | Path | None = None,
    steps: int | None = None,
    resolution: int | None = None,
    force: bool = False,
    device: str = "cpu",
    pictures: str | Path | None = None,
    frames: int | None = None,
    guidance: float | None = None,
    like: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Calibrated:
    """Measure the largest magnitude that enters every quantized linear and write ``{module path: amax}``.

    And that of the operands of every attention's products, as ``A.q``, ``A.k`` and ``A.v``.

    Goes block by block in bounded memory (see :mod:`calibration.by_block.measure_amax`). What is finished lies in
    ``OUTPUT.partial`` and is taken over by the same command after a kill.

    Args:
        source: BF16 checkpoint (see :func:`calibration.checkpoints.plain.find_source`).
        output: the JSON file to write.
        inputs: captured inputs to run on; or
        prompts: a text file, one prompt a line, that the family's pipeline runs on. Neither: the built-in model's own.
        save_inputs_to: where to keep the captured inputs, so that calibration repeats exactly.
        steps: denoising steps for each prompt; None for the pipeline's own number.
        resolution: height and width of the prompts' pictures or videos, in pixels; None for the pipeline's own.
        force: replace existing results.
        device: ``cpu`` or ``cuda``, for the calibration; the prompts' pipeline uses a GPU where there is one.
        pictures: a picture or a folder of them, which the prompts take in turn; for a pipeline that reads some.
        frames: of each prompt's video; None for the pipeline's own number.
        guidance: scale of the pipeline's guidance; None for the pipeline's own.
        like: the config of a single file's model, as :func:`calibration.checkpoints.plain.find_source` takes it.
        lora: LoRA files to fuse into the weights, likewise.
        progress: called with each step.

    Raises:
        BadOption, BadCheckpoint, BadInputs, BadAmax, OutputExists: naming what is wrong.
    """
    require_device(device)
    output = Path(output)
    given = {Path(path).resolve() for path in (inputs, prompts, pictures) if path is not None}
    results = [Path(path) for path in (output, save_inputs_to) if path is not None]
    folder = find_source(source, like, lora)
    for index, path in enumerate(results):
        if path.resolve() in given or path in results[:index]:
            raise OutputExists(f"{path} is named twice, as a result and as something else; give each file its own name")
        refuse_existing(path, force)
    work = output.with_name(output.name + ".partial")
    sampling = Sampling(steps, resolution, None if pictures is None else Path(pictures), frames, guidance)
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    inputs_to = (inputs, prompts, sampling, save_inputs_to)
    with suited_threads(config), _measured(folder, *inputs_to, work, device) as measured:
        if processes.is_main():
            described = {**measured.described, SOURCE: weights_fingerprint(folder)}
            write_json(work / output.name, {METADATA: described, **measured.amax})
            os.replace(work / output.name, output)
    processes.wait(device)
    return Calibrated(
        amax=str(output.resolve()),
        inputs=str(Path(save_inputs_to).resolve()) if save_inputs_to is not None else None,
        linears=len(family.quantized(config)),
        attentions=len(family.fp8_attentions(config)),
        described=measured.described,
    )


@contextlib.contextmanager
def calibration_from(
    folder: Path, given: str | Path | Sequence[str | Path] | None, work: Path, device: str = "cpu"
) -> Iterator[Calibration]:
    """Give the amax values to quantize ``folder`` with.

    Args:
        folder: the BF16 checkpoint.
        given: amax (``.json``), several files of it to be merged, captured inputs (``.safetensors``), or None for
            the built-in model's own prompts.
        work: where this keeps finished blocks until the end of the ``with`` statement, and an earlier one left its own.
        device: where to calibrate.

    Raises:
        BadAmax, BadInputs: naming what is wrong.
    """
    files = paths_of(given)
    if is_amax(given):
        config = load_json(folder / "config.json")
        family = family_of(config, folder)
        yield merged(files, family.quantized(config), family.attentions(config), weights_fingerprint(folder))
        return
    with _measured(folder, files[0] if files else None, None, Sampling(), None, work, device) as measured:
        yield measured


def merged(
    files: Sequence[Path], paths: Sequence[str], attentions: Sequence[str] = (), source: str | None = None
) -> Calibration:
    """Return, for each linear and operand of an attention, the largest maximum that any of the files has.

    Args:
        files: of amax values; each may cover a part of the linears.
        paths: module paths of the linears, all of which the files together have to cover.
        attentions: module paths of the attentions, whose operands they may cover.
        source: fingerprint of the model that is to be quantized; None does not ask on which the files were measured.

    Raises:
        BadAmax: a file is missing or holds something else, was measured on another model, names another linear, or
            has a number that is no maximum; or a linear is in none of them.
    """
    known = (*paths, *operands_of(attentions))
    amax: dict[str, float] = {}
    sources = []
    for file in files:
        values = _load_amax(file)
        unknown = sorted(values.keys() - {METADATA} - set(known))
        if unknown:
            raise BadAmax(
                f"{file} names {unknown[0]}, which this model does not quantize; give amax values of this model"
            )
        for path, value in input_quantizers.checked(values, [path for path in known if path in values]).items():
            amax[path] = max(value, amax.get(path, value))
        if source is not None:
            _refuse_other_source(file, values.get(METADATA), source)
        sources.append({"sha256": sha256_of(file), "described": values.get(METADATA, {})})
    if len(files) == 1:
        described = {"data": "amax", "sha256": sources[0]["sha256"]}
    else:
        described = {"data": "amax", "merged": sources}
    return Calibration(
        input_quantizers.checked(amax, paths) | {path: amax[path] for path in known if path in amax}, described
    )


def _refuse_other_source(file: Path, metadata: Any, source: str) -> None:
    """Refuse amax that was measured on another model; warn where the file does not say on which."""
    measured_on = metadata.get(SOURCE) if isinstance(metadata, dict) else None
    if measured_on is None:
        note(
            f"warning: {file} does not say on which model it was measured, as fp4trt calibrate does; make sure that it "
            "was this one"
        )
    elif measured_on != source:
        raise BadAmax(
            f"{file} was measured on another model (weights {str(measured_on)[:12]}, this one's are {source[:12]}); "
            "calibrate this model, with the same --lora where there is one"
        )


def _load_amax(path: Path) -> dict[str, Any]:
    expected = "amax values that fp4trt calibrate wrote"
    if path.is_dir():
        raise BadAmax(f"{path} is a folder; expected {expected}")
    return load_json(path, expected, BadAmax)


def captured_from(folder: Path, given: str | Path | Sequence[str | Path] | None) -> Calibration:
    """Return captured inputs, without amax values, for a method that needs more than these.

    Args:
        folder: the BF16 checkpoint.
        given: captured inputs (``.safetensors``), or None for the built-in model's own prompts.

    Raises:
        BadInputs: naming what is wrong.
    """
    files = paths_of(given)
    if is_amax(given):
        raise BadInputs(
            f"{files[0]} holds amax values; this recipe needs captured inputs (.safetensors), which fp4trt calibrate "
            "--save-inputs writes"
        )
    return _captured(folder, files[0] if files else None, None, Sampling(), None)


@contextlib.contextmanager
def _measured(
    folder: Path,
    inputs: str | Path | None,
    prompts: str | Path | None,
    sampling: Sampling,
    save_inputs_to: str | Path | None,
    work: Path,
    device: str,
) -> Iterator[Calibration]:
    """Run the model on captured inputs, or on what its pipeline makes of prompts."""
    captured = _captured(folder, inputs, prompts, sampling, save_inputs_to)
    calls, own = processes.share(captured.calls), processes.own_folder(work)
    with measured_by_block(folder, calls, own, device) as amax:
        yield replace(captured, amax=processes.largest(amax, device))


def _captured(
    folder: Path,
    inputs: str | Path | None,
    prompts: str | Path | None,
    sampling: Sampling,
    save_inputs_to: str | Path | None,
) -> Calibration:
    """Read captured inputs, or capture them while the pipeline runs on prompts, for which the model is loaded whole."""
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    if inputs is not None and prompts is not None:
        raise BadInputs("both captured inputs and prompts were given; expected one of them")
    if inputs is not None and sampling.pictures is not None:
        raise BadInputs("both captured inputs and pictures were given; pictures go with prompts: leave them out")
    calls: Sequence[Inputs]
    if inputs is not None:
        refuse_of_pipelines(sampling)
        open_plain(folder)
        calls = load_inputs(inputs)
        described: dict[str, Any] = {"data": "captured inputs", "inputs_sha256": sha256_of(Path(inputs))}
    else:
        refuse_sampling(folder, family, prompts, sampling)
        refuse_no_data(folder, family, prompts)
        calls = capture_prompts(load_source(folder), folder, family, prompts, sampling)
        described = {"data": "prompts"}
    calls = check_inputs(calls, family, config)
    if save_inputs_to is not None and processes.is_main():
        save_inputs(save_inputs_to, calls)
    described |= {"calls": len(calls), "family": family.name}
    if warnings := warnings_of(calls, family, config):
        for warning in warnings:
            note(f"warning: {warning}")
        described["warnings"] = warnings
    return Calibration({}, described, calls)
