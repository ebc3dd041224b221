"""The verb `plan`: what a model needs on a GPU, whether it fits, and what to change where it does not."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from calibration.recipes.recipe import load_recipe
from fp4trt.errors import BadRecipe, UnknownGpuError, UnsupportedLinear
from fp4trt.file_output import check_writable
from fp4trt.number_formats import BF16, FORMATS
from fp4trt.options import file_name, file_names, names, takes
from fp4trt.publish import refuse_existing
from fp4trt.targets import Target, parse_gpus, require_format
from fp4trt.verb import verb
from generation.planning.advice import Change, changes_for
from generation.planning.call import Call, Model, call_of
from generation.planning.peaks import RUNTIME
from generation.planning.picture import require_kind, write_picture
from generation.planning.result import Plan
from generation.planning.roofline import call_flops, sixteen_bit_of
from generation.planning.rows import FP16, Row, decoding_bytes, make_row
from generation.planning.source import STORED, Source, read_source
from generation.planning.weights import Weights, plain_weights, planned_weights
from trt_build.memory import GIB
from trt_build.profiles import Count, Pixels

__all__ = ["plan"]

_RECIPES: Final = ("fp8-ptq", "mxfp8-ptq", "nvfp4-quality", "nvfp4-quality-r32")
"""What is shown where no recipe is asked for: one of each format, and one with low-rank branches."""


@verb
@takes(source=file_name, gpu=names("rtx5070"), recipe=file_names, shapes=names("L=4096"))
def plan(
    source: str | Path,
    *,
    gpu: str = "rtx5090",
    # the sizes of a call
    resolution: Pixels | None = None,
    batch: Count | None = None,
    text: Count | None = None,
    frames: Count | None = None,
    audio: Count | None = None,
    reference_images: Count | None = None,
    shapes: str | Sequence[str] = (),
    # the forms of the weights
    recipe: str | Path | Sequence[str | Path] = (),
    like: str | Path | None = None,
    # the picture
    output: str | Path | None = None,
    force: bool = False,
) -> Plan:
    """Return what a model needs on a GPU, from its config and headers alone.

    Args:
        source: as :func:`generation.planning.source.read_source` takes it.
        gpu: one GPU, by its name.
        resolution: as :func:`trt_build.profiles.make_profile` takes it, but one size, as all that follow.
        batch, text, frames, audio, reference_images, shapes: likewise; without one, the family's default.
        recipe: one or several: what to show in place of one recipe of each format.
        like: the config of a single file's model.
        output: of a picture, ``.html`` or ``.png``, with matplotlib.
        force: replace a picture that is there.

    Raises:
        BadCheckpoint, UnknownFamily, BadOption: as :func:`generation.planning.source.read_source`.
        UnknownGpuError: no GPU has the name, or several are named.
        BadProfileError: a size is malformed, or outside what the model takes.
        BadRecipe, UnsupportedLinear, UnsupportedFormatError: a recipe that is asked for is not for this model or GPU.
        OutputExists: the picture is there already.
    """
    target = _one_target(gpu)
    if output is not None:
        require_kind(Path(output))
    read = read_source(source, like)
    options = {
        "resolution": resolution, "batch": batch, "text": text, "frames": frames, "audio": audio,
        "reference_images": reference_images, "shapes": shapes,
    }  # fmt: skip
    call = call_of(Model(read.family, read.config), options)
    if output is not None:
        _require_place(Path(output), force)
    asked = (recipe,) if isinstance(recipe, str | Path) else tuple(recipe)
    rows, left_out = _rows(read, call, target, asked)
    chosen = _chosen(rows, target, asked)
    others = [row for row in rows if row is not chosen]
    changes = changes_for(read, chosen, others, call, target, functools.partial(_resized, call, options))
    made = _result(read, call, target, rows, chosen, changes)
    made = replace(made, notes=[*made.notes, *left_out])
    if output is None:
        return made
    write_picture(made, Path(output))
    return replace(made, picture=str(Path(output).resolve()))


def _resized(call: Call, options: Mapping[str, Any], batch: int, width: int, height: int) -> Call:
    """Return a call with another batch and picture than its options say."""
    changed: dict[str, Any] = {"batch": batch} if batch != call.batch else {}
    changed |= {"resolution": (width, height)} if (width, height) != (call.width, call.height) else {}
    return call_of(call.model, {**options, **changed})


def _one_target(gpu: str) -> Target:
    targets = parse_gpus(gpu)
    if len(targets) > 1:
        raise UnknownGpuError(f"a plan is for one GPU, got {', '.join(one.name for one in targets)}; name one")
    return targets[0]


def _require_place(path: Path, force: bool) -> None:
    """Refuse a picture that cannot be written there."""
    check_writable(path)
    refuse_existing(path, force)


def _rows(source: Source, call: Call, target: Target, asked: Sequence[str | Path]) -> tuple[list[Row], list[str]]:
    """Return the forms of the weights: as they are stored, in 16 bit, and by each recipe; and which are left out.

    Raises:
        BadRecipe, UnsupportedLinear, UnsupportedFormatError: of a recipe that was asked for.
    """
    family, config = source.family, source.config
    forms: list[Weights] = [] if source.stored is None else [source.stored]
    forms += [plain_weights(name, family, config) for name in (FP16, BF16)]
    left_out = []
    for name in asked or _RECIPES:
        try:
            weights = planned_weights(load_recipe(name), family, config)
        except (BadRecipe, UnsupportedLinear) as error:
            if asked:
                raise
            left_out.append(f"without {name}: {error}")
            continue
        if weights.name in {form.name for form in forms}:
            raise BadRecipe(f"{name}: {weights.name!r} names another row of the plan; name a recipe once, or rename it")
        for kind in weights.kinds if asked else ():
            if FORMATS[kind].elsewhere is None:
                require_format((target,), kind)
        forms.append(weights)
    return [make_row(source, weights, call, target) for weights in forms], left_out


def _chosen(rows: Sequence[Row], target: Target, asked: Sequence[str | Path]) -> Row:
    """Return the row that the advice is for: the first recipe asked for, what is stored, or what the GPU is best at."""
    by_name = {row.weights.name: row for row in rows if row.peaks}
    plain = (STORED, *(("nvfp4-quality", "fp8-ptq") if not asked else ()), sixteen_bit_of(target))
    first = [row.weights.name for row in rows if row.weights.name not in (FP16, BF16, STORED)] if asked else []
    return next(by_name[name] for name in (*first, *plain) if name in by_name)


def _result(
    source: Source, call: Call, target: Target, rows: Sequence[Row], chosen: Row, changes: Sequence[Change]
) -> Plan:
    memory = target.memory_gib * GIB
    state = source.family.state(source.config)
    return Plan(
        source=source.name,
        family=source.family.name,
        parameters=sum(map(math.prod, state.values())),
        transformers=source.transformers,
        gpu={
            "name": target.name,
            "compute_capability": target.compute_capability,
            "memory_bytes": memory,
            "bandwidth": target.bandwidth * 10**9,
            "tflops": dict(target.tflops),
        },
        sizes={**call.sizes, "width": call.width, "height": call.height, "frames": call.frames},
        flops=call_flops(call),
        components=[
            {
                "name": part.name,
                "stage": part.stage,
                "bytes": part.nbytes(),
                "workspace_bytes": decoding_bytes(part, call),
            }
            for part in source.components
        ],
        runtime_bytes=RUNTIME,
        forms=[row.as_dict(memory) for row in rows],
        chosen=chosen.weights.name,
        fits=chosen.peaks["resident"].nbytes <= memory,
        changes=[change.as_dict() for change in changes],
        quantize={
            "source_bytes": plain_weights(BF16, source.family, source.config).checkpoint_bytes,
            "checkpoint_bytes": chosen.weights.checkpoint_bytes,
            "bytes_of_a_call": call.stream_bytes(),
        },
        notes=[*source.notes, *call.notes, *_notes(source, call, target, rows)],
        picture=None,
    )


def _notes(source: Source, call: Call, target: Target, rows: Sequence[Row]) -> list[str]:
    """Return what is not in the numbers."""
    found = []
    unknown = [part.name for part in source.components if part.elements is None]
    if unknown:
        found.append(f"the size of {', '.join(unknown)} is not known: peaks are without it")
    if call.width and any(part.decoder is not None and not part.decoder.known for part in source.components):
        found.append("the VAE's class is not known: its workspace is taken to be AutoencoderKL's")
    for row in rows:
        unpacked = [FORMATS[kind] for kind in row.weights.kinds if row.peaks and kind not in target.formats]
        found += [
            f"{row.weights.name}: {kind.title} is {kind.elsewhere} on {target.compute_capability}" for kind in unpacked
        ]
    if sixteen_bit_of(target) == FP16:
        found.append(
            f"{target.compute_capability} multiplies no BF16, which fp4trt's graphs are in: figures for comparison"
        )
    if target.shares_memory:
        found.append(
            f"{target.name} shares its memory with the host: loading on demand and streaming save nothing there"
        )
    return found
