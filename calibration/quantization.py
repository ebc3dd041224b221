"""``fp4trt quantize``: a BF16 checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from calibration.by_block import processes
from calibration.by_block.calibration import Calibration, calibration_from, captured_from, is_amax
from calibration.by_block.measure_amax import require_device
from calibration.by_block.quantize_blocks import Prepared, prepared_by_block
from calibration.checkpoints.threads import suited_threads
from calibration.crew import Crewed
from calibration.first_checks import first_checked
from calibration.formats.fp8_attention import attention_quantizers, attention_scales
from calibration.formats.shared_scales import sharing_groups
from calibration.methods import registry
from calibration.methods.plan import Plain, checked
from calibration.recipes.recipe import QAT, Recipe, load_start
from calibration.recipes.servers import SERVERS
from calibration.results.by_block import ResultByBlock
from calibration.results.write import Given, write_result
from fp4trt import publish
from fp4trt.checkpoint_folder import files_of
from fp4trt.checkpoint_manifest import MANIFEST, load_manifest
from fp4trt.errors import BadRecipe
from fp4trt.number_formats import FP8, counted_by_format
from fp4trt.options import at_least, file_name, file_names, one_of, takes, word
from fp4trt.progress import Progress, note
from fp4trt.safetensors_file import hold
from fp4trt.verb import Result, verb

__all__ = ["quantize"]


@dataclass(frozen=True, eq=False)
class Quantized(Result):
    """A quantized checkpoint, and what became of the plain one.

    Attributes:
        checkpoint: its folder.
        family: of the model.
        recipe: name of the recipe.
        quantized_linears: how many linears are quantized, in any format.
        fp8_linears: how many of them are in FP8.
        formats: how many are in each format that any is in.
        fp8_attentions: how many attentions are in FP8.
        groups: how many groups of linears share their scales, in NVFP4 or FP8.
        bytes: size of its weights.
        source_bytes: size of the plain checkpoint's.
        sharing_cost: relative error of the weights with scales of their own and shared; None where none are shared.
        modelopt_state: of a state, how far the result is from its own model; None otherwise.
    """

    checkpoint: str
    family: str
    recipe: str
    quantized_linears: int
    fp8_linears: int
    fp8_attentions: int
    groups: int
    bytes: int
    source_bytes: int
    sharing_cost: Mapping[str, float] | None
    modelopt_state: Mapping[str, Any] | None = None
    formats: Mapping[str, int] = field(default_factory=dict)


@verb
@takes(
    source=file_name,
    output=file_name,
    calibration=file_names,
    modelopt_state=file_name,
    workers=at_least(1),
    ray=word("auto"),
    like=file_name,
    lora=file_names,
    server=one_of(*SERVERS),
)
def quantize(
    source: str | Path,
    output: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    modelopt_state: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
    device: str = "cpu",
    workers: int | None = None,
    ray: str | None = None,
    like: str | Path | None = None,
    lora: str | Path | Sequence[str | Path] = (),
    server: str | None = None,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> Quantized:
    """Quantize a BF16 checkpoint and write the quantized one.

    The source is read once: block by block where the model is run on captured inputs (see
    :mod:`calibration.by_block.quantize_blocks`), with one block in memory at a time; from an amax file in the order of
    its bytes, a few MiB at a time (see :mod:`calibration.checkpoints.one_pass`). A killed run resumes, when it is
    started again, after what it had brought to disk.

    Args:
        source: BF16 checkpoint (see :func:`calibration.checkpoints.plain.find_source`).
        output: folder of the result, written as ``OUTPUT.partial`` and renamed.
        recipe: a preset's name or a YAML file (see :func:`calibration.recipes.recipe.load_recipe`), or what was read;
            None for the best that the calibration allows: ``nvfp4-quality`` with captured inputs, ``nvfp4-ptq`` with an
            amax file; and with a state for what that says. A recipe that says anything else than a state is refused.
        calibration: amax values (``.json``), or several files of them to be merged, or captured inputs
            (``.safetensors``); None for the built-in model's words, and for a recipe that rounds to nearest in formats
            without a scale of their input, which needs no data.
        modelopt_state: a state that ``modelopt.torch.opt.save`` wrote, in place of calibrating here. The result is
            given its name only when it computes what the state's own model does.
        trust: allow reading that state, which is a pickle and can run code.
        force: replace an existing result.
        device: where to run the model on captured inputs, and to pack: ``cpu`` or ``cuda``.
        workers: how many processes share the blocks, each with a part of the cores, and a GPU in turn; None for this
            process alone. For methods that quantize block by block, and for the checkpoint that ``qat`` starts from
            where that is of such a method; refused for others. A script that gives it needs ``if __name__ ==
            "__main__":`` around what it does.
        ray: ``local``, or the address of a Ray cluster whose machines share the blocks; ``workers`` then says how many
            blocks are worked on at a time, None for as many as there are cores and memory for.
        like: the config of a single file's model, as :func:`calibration.checkpoints.plain.find_source` takes it.
        lora: LoRA files to fuse into the weights, likewise.
        server: ``sglang``, ``vllm-omni`` or ``tensorrt-llm``, which is to load the result: linears that it takes in
            BF16 alone stay so, and a recipe that it cannot load is refused (:mod:`calibration.recipes.servers`).
        progress: called with each step.

    Raises:
        BadOption, BadRecipe, BadCheckpoint, BadInputs, BadAmax, OutputExists, TooLittleSpace, UnsupportedLinear,
            Untrusted, BadEnvironment: naming what is wrong.
        NotReproduced: the result does not compute what a state's own model does.
    """
    chosen, folder = first_checked(source, output, recipe, calibration, modelopt_state, force, workers, ray, like, lora)
    require_device(device)
    directory, crew = Path(output), Crewed(workers, ray)
    if modelopt_state is not None:
        if server is not None:
            raise BadRecipe("a ModelOpt state says itself what it holds, and a server was named; drop one of them")
        asked = checked(folder, chosen) if recipe is not None else None
        return _from_state(folder, directory, asked, Path(modelopt_state), trust, force, device)
    plain = checked(folder, chosen, server)
    chosen = plain.recipe
    _tell_of_masks(plain)
    work = directory.with_name(f"{directory.name}.calibration.partial")
    by_method = registry.needs_activations(chosen.method)
    to_measure = bool(calibration) or by_method or plain.needs_calibration
    if (
        not isinstance(chosen.method, QAT)
        and to_measure
        and (by_method or (not is_amax(calibration) and processes.count() == 1))
    ):
        if processes.is_main():  # it goes block by block in one process
            _by_block(plain, calibration or None, directory, force, work, device, crew)
        processes.wait(device)
        return _summary(directory, plain, load_manifest(directory / MANIFEST))
    given_by: AbstractContextManager[Given]
    if isinstance(chosen.method, QAT):
        training = directory.with_name(f"{directory.name}.training.partial")
        given_by = _trained(plain, chosen.method, calibration or None, training, device, crew)
    elif not to_measure:
        given_by = contextlib.nullcontext(Given(Calibration({}, {"data": "none"})))
    else:
        given_by = _calibrated(plain, calibration or None, work, device)
    with suited_threads(plain.config), given_by as given:
        if processes.is_main():
            with publish.replacing(directory, force, given.identity(plain)) as partial:
                write_result(partial, plain, given, device)
    processes.wait(device)
    return _summary(directory, plain, load_manifest(directory / MANIFEST))


def _tell_of_masks(plain: Plain) -> None:
    """Say which attentions of a model stay in 16 bit where others are in FP8."""
    masked = [path for stack in plain.family.stacks for path in stack.masked]
    if plain.fp8_attentions and masked:
        note(f"attentions with a mask stay in 16 bit, as FP8 takes none: {' and '.join(masked)} of each block")


@contextlib.contextmanager
def _calibrated(
    plain: Plain, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> Iterator[Given]:
    """Read what an earlier run measured; in one of several processes run a plain checkpoint on captured inputs."""
    with calibration_from(plain.folder, calibration, work, device) as calibrated:
        yield Given(calibrated, _attention(plain, calibrated))


def _attention(plain: Plain, calibrated: Calibration) -> Prepared:
    """Return the scales of the attentions in FP8.

    Raises:
        BadAmax: one was not measured.
    """
    scales = attention_scales(calibrated.amax, plain.fp8_attentions)
    tensors = {name: hold(name, scale) for name, scale in scales.items()}
    return Prepared(tensors, amax=attention_quantizers(calibrated.amax, plain.fp8_attentions))


def _by_block(
    plain: Plain,
    calibration: str | Path | Sequence[str | Path] | None,
    directory: Path,
    force: bool,
    work: Path,
    device: str,
    crew: Crewed,
) -> None:
    """Run a plain checkpoint on captured inputs, and let the recipe's method quantize each block on its own."""
    with suited_threads(plain.config):
        captured = captured_from(plain.folder, calibration)
        method = registry.of_block(plain.method, plain.family, plain.config)
        result = ResultByBlock(plain, captured, directory, force, device)
        task = (plain.folder, captured.calls, plain.formats, method, plain.recipe.resolved(), work, device)
        workers = crew.opened(plain, captured.calls, device)
        with prepared_by_block(*task, plain.fp8_attentions, result.opened, workers) as prepared:
            result.complete(prepared)


@contextlib.contextmanager
def _trained(
    plain: Plain,
    options: QAT,
    calibration: str | Path | Sequence[str | Path] | None,
    work: Path,
    device: str,
    crew: Crewed,
) -> Iterator[Given]:
    """Quantize a plain checkpoint by the recipe to start from, and train what comes of it."""
    from calibration.methods.qat.distillation import trained

    first = load_start(plain.recipe)
    first = first.model_copy(update={"formats": plain.recipe.formats, "attention": plain.recipe.attention})
    start = checked(plain.folder, first)
    if not start.groups:
        raise BadRecipe(
            f"the formats of {plain.recipe.name} leave no linear in nvfp4, and no other is trained; expected some"
        )
    if options.learn == "branch" and not registry.branched(start.method, start.groups):
        raise BadRecipe(
            f"{plain.recipe.name} trains low-rank branches (learn: branch), and its start {first.name} makes none for "
            "the linears in NVFP4: its ranks are 0; expected a rank above 0 for some"
        )
    captured = captured_from(plain.folder, calibration)
    recipe = {**plain.recipe.resolved(), "start": first.resolved()}

    def begin(directory: Path) -> None:
        quantize(
            plain.folder,
            directory,
            recipe=first,
            calibration=calibration,
            device=device,
            workers=crew.workers,
            ray=crew.ray,
        )

    with trained(plain.folder, captured.calls, options, recipe, begin, work, device) as result:
        yield Given(captured, Prepared(result.tensors, amax=result.amax), kept=result.files, training=result.figures)


def _from_state(
    folder: Path, directory: Path, asked: Plain | None, state: Path, trust: bool, force: bool, device: str
) -> Quantized:
    """Write what a ModelOpt state of a plain checkpoint's model says, once it computes what the state's model does."""
    from calibration.modelopt_states.reference import INPUTS, require_reproduced
    from calibration.modelopt_states.to_checkpoint import take

    taken = take(folder, state, trust, asked)
    plain = taken.plain
    difference = 0.0
    if processes.is_main():
        if taken.rounded:
            note(f"warning: the weights of {state} are {taken.rounded}; they were rounded to bfloat16")
        with publish.replacing(directory, force) as partial:
            write_result(partial, plain, taken.given, device)
            note(f"comparing the result with the model of {state.name} on {INPUTS} inputs")
            difference = require_reproduced(partial, taken.expected, plain.family, plain.config, state.name)
    processes.wait(device)
    found = {"difference": difference, "inputs": INPUTS, "algorithms": list(taken.algorithms), "apart": taken.apart}
    return replace(_summary(directory, plain, load_manifest(directory / MANIFEST)), modelopt_state=found)


def _summary(directory: Path, plain: Plain, manifest: Mapping[str, Any]) -> Quantized:
    def size(root: Path) -> int:
        return sum(file.stat().st_size for file in files_of(root))

    return Quantized(
        checkpoint=str(directory.resolve()),
        family=plain.family.name,
        recipe=plain.recipe.name,
        quantized_linears=len(plain.quantized_linears),
        fp8_linears=len(plain.of_format(FP8.name)),
        fp8_attentions=len(plain.fp8_attentions),
        groups=len(sharing_groups(plain.quantized_groups, plain.formats)),
        bytes=size(directory),
        source_bytes=size(plain.folder),
        sharing_cost=manifest.get("sharing_cost"),
        formats=counted_by_format(plain.quantized_linears),
    )
