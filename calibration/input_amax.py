"""``fp4trt calibrate``: how large the inputs of the linears become, measured over the denoising schedule."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration import ptq
from calibration.dataset import Inputs, check_inputs, load_inputs, save_inputs
from calibration.errors import BadAmax, BadInputs, OutputExists
from calibration.models import family_of
from calibration.prompts import Sampling, capture_prompts
from calibration.safetensors_file import sha256_of
from calibration.source import find_source, load_json, load_source
from calibration.write import refuse_existing, write_json

__all__ = ["Calibration", "calibrate", "calibration_from"]

METADATA: Final = "__metadata__"
"""The one key of a calibration file that is no module path."""


@dataclass(frozen=True)
class Calibration:
    """Maxima, and what they were measured on.

    Attributes:
        amax: module path of each quantized linear to the largest magnitude of its input.
        described: kind and hash of the data, for the manifest.
        calls: the captured inputs; none where a file of maxima was given.
    """

    amax: Mapping[str, float]
    described: Mapping[str, Any]
    calls: tuple[Inputs, ...] = field(default=(), repr=False)


def calibrate(
    source: str | Path,
    output: str | Path,
    inputs: str | Path | None = None,
    prompts: str | Path | None = None,
    save_inputs_to: str | Path | None = None,
    steps: int | None = None,
    resolution: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Measure the largest magnitude that enters every quantized linear and write ``{module path: amax}``.

    Args:
        source: BF16 checkpoint (see :func:`calibration.source.find_source`).
        output: the JSON file to write.
        inputs: captured inputs to run on; or
        prompts: a text file, one prompt a line, that the family's pipeline runs on. Neither: the built-in model's own.
        save_inputs_to: where to keep the captured inputs, so that calibration repeats exactly.
        steps: denoising steps for each prompt; None for the pipeline's own number.
        resolution: height and width of the prompts' pictures, in pixels; None for the pipeline's own.
        force: replace existing results.

    Returns:
        What the command prints as JSON.

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists: naming what is wrong.
    """
    output = Path(output)
    given = {Path(path).resolve() for path in (inputs, prompts) if path is not None}
    results = [Path(path) for path in (output, save_inputs_to) if path is not None]
    folder = find_source(source)
    for index, path in enumerate(results):
        if path.resolve() in given or path in results[:index]:
            raise OutputExists(f"{path} is named twice, as a result and as something else; give each file its own name")
        refuse_existing(path, force)
    measured = _measure(folder, inputs, prompts, Sampling(steps, resolution))
    if save_inputs_to is not None:
        save_inputs(save_inputs_to, measured.calls)
    partial = output.with_name(output.name + ".partial")
    try:
        write_json(partial, {METADATA: dict(measured.described), **measured.amax})
        os.replace(partial, output)
    finally:
        partial.unlink(missing_ok=True)
    return {
        "amax": str(output.resolve()),
        "inputs": str(Path(save_inputs_to).resolve()) if save_inputs_to is not None else None,
        "linears": len(measured.amax),
        **measured.described,
    }


def calibration_from(folder: Path, given: str | Path | None) -> Calibration:
    """Return the maxima to quantize ``folder`` with.

    Args:
        folder: the BF16 checkpoint.
        given: maxima (``.json``), captured inputs (``.safetensors``), or None for the built-in model's own prompts.

    Raises:
        BadAmax, BadInputs: naming what is wrong.
    """
    if given is None or Path(given).suffix != ".json":
        return _measure(folder, given, None, Sampling())
    config = load_json(folder / "config.json")
    values, paths = _load_amax(Path(given)), family_of(config).quantized(config)
    unknown = sorted(values.keys() - {METADATA} - set(paths))
    if unknown:
        raise BadAmax(f"{given} names {unknown[0]}, which this model does not quantize; give the maxima of this model")
    amax = ptq.checked(values, paths)
    return Calibration(amax, {"data": "amax", "sha256": sha256_of(Path(given))})


def _load_amax(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadAmax(f"{path} does not exist; expected maxima that fp4trt calibrate wrote") from None
    except ValueError as error:
        raise BadAmax(f"{path} is not JSON ({error}); expected maxima that fp4trt calibrate wrote") from None
    if not isinstance(values, dict):
        raise BadAmax(f"{path} holds a JSON {type(values).__name__}; expected an object of module paths and numbers")
    return values


def _measure(folder: Path, inputs: str | Path | None, prompts: str | Path | None, sampling: Sampling) -> Calibration:
    """Load the model, run it on captured inputs, or on what its pipeline makes of prompts."""
    config = load_json(folder / "config.json")
    family = family_of(config)
    if inputs is not None and prompts is not None:
        raise BadInputs("both captured inputs and prompts were given; expected one of them")
    model = load_source(folder)
    if inputs is not None:
        calls, described = (
            load_inputs(inputs),
            {"data": "captured inputs", "inputs_sha256": sha256_of(Path(inputs))},
        )
    else:
        calls, described = capture_prompts(model, folder, family, prompts, sampling), {"data": "prompts"}
    check_inputs(calls, family, config)
    amax = ptq.measure_input_amax(model, family.quantized(config), calls)
    return Calibration(amax, {**described, "calls": len(calls), "family": family.name}, tuple(calls))
