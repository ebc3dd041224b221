"""``fp4trt quantize``: a BF16 checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import shutil
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import click
from torch import nn

from calibration import methods, nvfp4, processes, shards, sharing, write
from calibration.block_calibration import require_device
from calibration.checkpoint import BRANCH, MANIFEST, load_manifest
from calibration.dataset import save_inputs
from calibration.errors import BadInputs, BadRecipe, TooLittleSpace
from calibration.fp8_attention import SCALES, attention_scales
from calibration.input_amax import Calibration, calibration_from, captured_from
from calibration.models import Family, family_of
from calibration.models.family import require_blocks_of_16
from calibration.one_pass import MEMORY, Done, Work, estimated_seconds, quantize_in_one_pass
from calibration.preparation import Prepared, prepared_by_block
from calibration.quantization_config import quantization_config
from calibration.recipe import QAT, Recipe, linear_formats, load_recipe
from calibration.safetensors_file import StoredTensor, hold, sha256_of
from calibration.source import (
    empty_source,
    files_of,
    find_source,
    load_json,
    load_source,
    source_hashes,
)

__all__ = ["quantize"]

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt", "numpy", "ml_dtypes")

_LAYOUT: Final = "one pass"
"""What an interrupted run leaves; one that left something else cannot go on."""

_WORTH_SAYING: Final = 1_000_000_000
"""Bytes of a source that takes long enough to say first what is going to happen."""


@dataclass(frozen=True)
class _Plain:
    """What is to be quantized, and how.

    Attributes:
        folder: the plain checkpoint.
        config: its config.
        family: its family.
        model: empty.
        stored: its tensors, in the order of the model's own.
        recipe: how to quantize it.
        formats: module path of every linear that the family can quantize to its format.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    model: nn.Module
    stored: Mapping[str, StoredTensor]
    recipe: Recipe
    formats: Mapping[str, str]

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears in NVFP4."""
        return self.of_format("nvfp4")

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Those of them that share their scales."""
        return tuple(group for group in self.quantized_groups if self.formats[group[0]] == "nvfp4")

    @property
    def quantized_groups(self) -> tuple[tuple[str, ...], ...]:
        """All quantized linears by the input that they read."""
        return tuple(group for group in self.family.groups(self.config) if self.formats[group[0]] != "bf16")

    def of_format(self, kind: str) -> tuple[str, ...]:
        """Return the linears in a format."""
        return tuple(path for path, found in self.formats.items() if found == kind)

    @property
    def fp8_attentions(self) -> tuple[str, ...]:
        """The attentions in FP8."""
        return self.family.attentions(self.config) if self.recipe.attention == "fp8" else ()


@dataclass(frozen=True)
class _Given:
    """What is known before the weights are read.

    Attributes:
        calibrated: the maxima of the linears' inputs, of those that are packed in the pass, and what they come from.
        prepared: what a method has decided that looks at the model's activations.
        done: what is known of the weights from elsewhere; None where their files are to be read.
        kept: files that go into the result's folder ``training``, by name.
        training: what the manifest says of a training.
    """

    calibrated: Calibration
    prepared: Prepared = field(default_factory=Prepared)
    done: Done | None = None
    kept: Mapping[str, Path] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def identity(self, plain: _Plain) -> str:
        """Return what tells the result from any other before a weight was read; empty where nothing is to be read."""
        if self.done is not None:
            return ""
        stats = {file.name: file.stat() for file in files_of(plain.folder)}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        parts: list[Any] = [
            plain.config,
            plain.recipe.resolved(),
            dict(self.calibrated.amax),
            dict(self.calibrated.described),
        ]
        parts += [self.prepared.figures, self.training, files, _versions(), _LAYOUT]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def quantize(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe | None = None,
    calibration: str | Path | Sequence[str | Path] | None = None,
    modelopt_state: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Quantize a BF16 checkpoint and write the quantized one, a few MiB of it in memory at a time.

    The source is read once (see :mod:`calibration.one_pass`), after what the recipe's method does block by block (see
    :mod:`calibration.preparation`). A run that is killed goes on, when it is started again, after what it had brought
    to disk.

    Args:
        source: BF16 checkpoint (see :func:`calibration.source.find_source`).
        output: folder of the result, written as ``OUTPUT.partial`` and renamed.
        recipe: a preset's name or a YAML file (see :func:`calibration.recipe.load_recipe`), or what was read; None for
            the best that the calibration allows: ``nvfp4-quality`` with captured inputs, ``nvfp4-ptq`` with maxima or a
            state.
        calibration: maxima (``.json``), or several files of them to be merged, or captured inputs
            (``.safetensors``); None for the built-in model's words.
        modelopt_state: a state that ``modelopt.torch.opt.save`` wrote, in place of calibrating here.
        trust: allow reading that state, which is a pickle and can run code.
        force: replace an existing result.
        device: where to run the model on captured inputs, and to pack: ``cpu`` or ``cuda``.

    Returns:
        What the command prints as JSON: paths, counts, bytes, the cost of sharing scales.

    Raises:
        BadRecipe, BadCheckpoint, BadInputs, BadAmax, OutputExists, TooLittleSpace, UnsupportedLinear, Untrusted: naming
            what is wrong.
    """
    if isinstance(recipe, Recipe):
        chosen = recipe
    else:
        chosen = load_recipe(recipe or _usual_recipe(calibration, modelopt_state))
    if calibration and modelopt_state is not None:
        raise BadInputs("both a calibration and a ModelOpt state were given; expected one of them")
    require_device(device)
    directory, folder = Path(output), find_source(source)
    write.refuse_foreign(directory, force)
    plain = _checked(folder, chosen)
    work = directory.with_name(f"{directory.name}.calibration.partial")
    given_by: AbstractContextManager[_Given]
    if modelopt_state is not None:
        plain, restored = _restored(plain, modelopt_state, trust)
        given_by = contextlib.nullcontext(restored)
    elif isinstance(chosen.method, QAT):
        training = directory.with_name(f"{directory.name}.training.partial")
        given_by = _trained(plain, chosen.method, calibration or None, training, device)
    elif methods.needs_activations(chosen.method):
        if not processes.is_main():  # goes block by block in one process
            processes.wait(device)
            return _summary(directory, plain, load_manifest(directory / MANIFEST))
        given_by = _prepared(plain, calibration or None, work, device)
    else:
        given_by = _calibrated(plain, calibration or None, work, device)
    with given_by as given:
        if processes.is_main():
            with write.replacing(directory, force, given.identity(plain)) as partial:
                _write(partial, plain, given, device)
    processes.wait(device)
    return _summary(directory, plain, load_manifest(directory / MANIFEST))


def _usual_recipe(calibration: str | Path | Sequence[str | Path] | None, modelopt_state: str | Path | None) -> str:
    """Return the preset that makes the most of what is there: maxima allow no more than rounding to nearest."""
    files = [Path(path) for path in ([calibration] if isinstance(calibration, str | Path) else calibration or ())]
    only_maxima = modelopt_state is not None or len(files) > 1 or any(path.suffix == ".json" for path in files)
    return "nvfp4-ptq" if only_maxima else "nvfp4-quality"


@contextlib.contextmanager
def _calibrated(
    plain: _Plain, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> Iterator[_Given]:
    """Run a plain checkpoint on captured inputs, or read what an earlier run measured."""
    with calibration_from(plain.folder, calibration, work, device) as calibrated:
        yield _Given(calibrated, _attention(plain, calibrated))


def _attention(plain: _Plain, calibrated: Calibration) -> Prepared:
    """Return the scales of the attentions in FP8.

    Raises:
        BadAmax: one was not measured.
    """
    scales = attention_scales(calibrated.amax, plain.fp8_attentions)
    return Prepared({name: hold(name, scale) for name, scale in scales.items()})


@contextlib.contextmanager
def _prepared(
    plain: _Plain, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> Iterator[_Given]:
    """Run a plain checkpoint on captured inputs, and let the recipe's method quantize each block on its own."""
    captured = captured_from(plain.folder, calibration)
    method = methods.of_block(plain.recipe.method, plain.family)
    recipe = plain.recipe.resolved()
    task = (plain.folder, captured.calls, plain.formats, method, recipe, work, device, plain.fp8_attentions)
    with prepared_by_block(*task) as prepared:
        yield _Given(captured, prepared)


@contextlib.contextmanager
def _trained(
    plain: _Plain, options: QAT, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> Iterator[_Given]:
    """Quantize a plain checkpoint by the recipe to start from, and train what comes of it."""
    from calibration.qat.distillation import trained

    first = load_recipe(options.start)
    if isinstance(first.method, QAT):
        raise BadRecipe(f"{plain.recipe.name} starts from {first.name}, which trains too; expected one that does not")
    first = first.model_copy(update={"formats": plain.recipe.formats})
    captured = captured_from(plain.folder, calibration)
    recipe = {**plain.recipe.resolved(), "start": first.resolved()}

    def begin(directory: Path) -> None:
        quantize(plain.folder, directory, first, calibration, device=device)

    with trained(plain.folder, captured.calls, options, recipe, begin, work, device) as result:
        yield _Given(captured, Prepared(result.tensors), kept=result.files, training=result.figures)


def _restored(plain: _Plain, modelopt_state: str | Path, trust: bool) -> tuple[_Plain, _Given]:
    """Take weights and maxima from a ModelOpt state of a plain checkpoint's model, which is held in memory for that."""
    from calibration.modelopt_state import maxima, restore

    if methods.needs_activations(plain.recipe.method):
        raise BadInputs(f"a ModelOpt state was given, and the recipe {plain.recipe.name}; expected one of plain PTQ")
    formats = {path: kind for path, kind in plain.formats.items() if kind != "bf16"}
    restored = restore(load_source(plain.folder), formats, modelopt_state, trust)
    held = {name: hold(name, restored.state_dict()[name]) for name in plain.stored}
    inputs, weights = maxima(restored, formats)
    described = {"data": "modelopt state", "sha256": sha256_of(Path(modelopt_state))}
    done = Done(source_hashes(plain.folder), {f"{path}.weight": value for path, value in weights.items()})
    calibrated = Calibration(inputs, described)
    return replace(plain, stored=held), _Given(calibrated, _attention(plain, calibrated), done)


def _checked(folder: Path, recipe: Recipe) -> _Plain:
    """Check a plain checkpoint against its config, and a recipe against both."""
    model, stored = empty_source(folder)
    config = load_json(folder / "config.json")
    family = family_of(config)
    shapes = {path: stored[f"{path}.weight"].shape for path in family.quantized(config)}
    formats = linear_formats(recipe.formats, family, config, shapes)
    for path, kind in formats.items():
        if kind == "nvfp4":
            require_blocks_of_16(path, shapes[path][1])
    ordered = {name: stored[name] for name in model.state_dict()}
    plain = _Plain(folder, config, family, model, ordered, recipe, formats)
    methods.require_fit(recipe.method, plain.groups, shapes)
    return plain


def _write(partial: Path, plain: _Plain, given: _Given, device: str) -> dict[str, Any]:
    """Write everything into ``DIR.partial``, or what an earlier run has not finished; return the manifest."""
    groups, prepared, fp8 = plain.quantized_groups, given.prepared.tensors, frozenset(plain.of_format("fp8"))
    planned = shards.plan_shards(plain.stored, groups, prepared, fp8)
    earlier = write.progress_of(partial)
    if earlier and shards.are_reserved(partial, planned):
        done = Done(**earlier)
        click.echo(f"going on: {len(done.written)} of {len(plain.stored)} tensors are done", err=True)
    else:
        done = given.done or Done()
    packed = [group for group in groups if f"{group[0]}.weight" not in prepared]
    inputs = sharing.shared(given.calibrated.amax, packed)
    sources = files_of(plain.folder) if given.done is None else []
    files = shards.ShardFiles(partial, planned, shards.results_of(done.written, groups, prepared, fp8))
    to_read = [
        tensor for tensor in plain.stored.values() if tensor.file in sources and tensor.file.name not in done.sha256
    ]
    _foresee(partial, sum(tensor.nbytes for tensor in to_read), files.missing())
    work = Work(sources, plain.stored, groups, inputs, prepared, device, fp8)
    with _bar(work.nbytes) as progress:
        quantize_in_one_pass(work, files, done, functools.partial(write.note_progress, partial), progress)
    written = {shard.name: done.files[shard.name] for shard in planned}
    if len(planned) > 1:
        written[shards.INDEX] = write.write_json(partial / shards.INDEX, shards.index_of(planned))
    ranks = set(_branches(prepared).values())
    config = {**plain.config, "quantization_config": quantization_config(plain.model, plain.formats, ranks)}
    written["config.json"] = write.write_json(partial / "config.json", config)
    written |= _keep_calibration(partial, given.calibrated) | _keep_training(partial, given.kept)
    own = {path: done.amax[f"{path}.weight"] for group in packed for path in group}
    common = own | sharing.shared(own, [group for group in packed if group[0] not in fp8])
    manifest = {
        **_description(plain, given),
        "amax": _amax(inputs, common, prepared, fp8),
        "files": written,
        "source": {"config.json": sha256_of(plain.folder / "config.json"), **done.sha256},
    }
    if alone := {path: amax for path, amax in own.items() if path not in fp8}:
        manifest["sharing_cost"] = asdict(sharing.measure_cost(plain.stored, alone, common))
    write.write_json(partial / MANIFEST, manifest)
    return manifest


def _amax(
    inputs: Mapping[str, float],
    weights: Mapping[str, float],
    prepared: Mapping[str, StoredTensor],
    fp8: Container[str],
) -> dict[str, float]:
    """Return what the manifest says of each quantizer: what was packed here, and what a method has decided."""
    amax = {f"{path}.input_quantizer": value for path, value in inputs.items()}
    amax |= {f"{path}.weight_quantizer": value for path, value in weights.items()}
    for name, tensor in prepared.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("input_scale", "weight_scale" if path in fp8 else "weight_scale_2"):
            quantizer = "input_quantizer" if leaf == "input_scale" else "weight_quantizer"
            largest = nvfp4.E4M3_MAX * (1 if path in fp8 else nvfp4.E2M1_MAX)
            amax[f"{path}.{quantizer}"] = float(tensor.tensor()) * largest
        elif leaf in SCALES:
            amax[f"{path}.{leaf.removesuffix('_scale')}_bmm_quantizer"] = float(tensor.tensor()) * nvfp4.E4M3_MAX
    return amax


def _description(plain: _Plain, given: _Given) -> dict[str, Any]:
    """Return what the manifest says of the quantization itself."""
    formats = {kind: plain.of_format(kind) for kind in ("nvfp4", "fp8")}
    formats["svdquant"] = tuple(_branches(given.prepared.tensors))
    described = {
        "format": 1,
        "family": plain.family.name,
        "recipe": plain.recipe.resolved(),
        "quantized": {kind: paths for kind, paths in formats.items() if paths},
        "groups": plain.quantized_groups,
        "calibration": dict(given.calibrated.described),
        "versions": _versions(),
    }
    if given.training:
        described["training"] = dict(given.training)
    if plain.fp8_attentions:
        described["attention"] = {"fp8": plain.fp8_attentions}
    return {**described, "blocks": dict(given.prepared.figures)} if given.prepared.figures else described


def _branches(prepared: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Return the linears that a low-rank branch was prepared for, and its rank."""
    factors = {name.rpartition("."): tensor.shape for name, tensor in prepared.items()}
    return {path: shape[0] for (path, _, leaf), shape in factors.items() if leaf == BRANCH[0]}


def _foresee(folder: Path, reads: int, needed: int) -> None:
    """Say, before a long run, what it reads, writes and needs, in bytes.

    Raises:
        TooLittleSpace: the result does not fit on its disk.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TooLittleSpace(
            f"{folder.parent} has {_size(free)} free, the result needs {_size(needed)}; make room, or choose another "
            "--output"
        )
    if reads >= _WORTH_SAYING:
        click.echo(
            f"reading {_size(reads)}, writing {_size(needed)} ({_size(free)} are free), with {_size(MEMORY)} of memory "
            f"beside the libraries'; hashing and packing take about {estimated_seconds(reads, needed):.0f} s where the "
            "disk keeps up",
            err=True,
        )


def _size(count: int) -> str:
    """Return a number of bytes for people."""
    unit, name = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


@contextlib.contextmanager
def _bar(length: int) -> Iterator[Callable[[int], None]]:
    """Show how far the pass is; give what several threads may tell of bytes that were read, or packed."""
    lock = threading.Lock()
    with click.progressbar(length=length, label="quantizing", file=sys.stderr) as bar:

        def update(count: int) -> None:
            with lock:
                bar.update(count)

        yield update


def _keep_calibration(partial: Path, calibrated: Calibration) -> dict[str, str]:
    """Keep the inputs that were captured here, in a sub-folder where no loader takes them for weights."""
    if not calibrated.calls:
        return {}
    kept = partial / "calibration" / "inputs.safetensors"
    kept.parent.mkdir(exist_ok=True)
    save_inputs(kept, calibrated.calls)
    return {"calibration/inputs.safetensors": sha256_of(kept)}


def _keep_training(partial: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Keep what tells how a training went."""
    kept = {f"training/{name}": file for name, file in files.items()}
    for name, file in kept.items():
        (partial / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, partial / name)
    return {name: sha256_of(partial / name) for name in kept}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def _summary(directory: Path, plain: _Plain, manifest: Mapping[str, Any]) -> dict[str, Any]:
    def size(root: Path) -> int:
        return sum(file.stat().st_size for file in files_of(root))

    return {
        "checkpoint": str(directory.resolve()),
        "family": plain.family.name,
        "recipe": plain.recipe.name,
        "quantized_linears": len(plain.paths) + len(plain.of_format("fp8")),
        "fp8_linears": len(plain.of_format("fp8")),
        "fp8_attentions": len(plain.fp8_attentions),
        "groups": len(plain.groups),
        "bytes": size(directory),
        "source_bytes": size(plain.folder),
        "sharing_cost": manifest.get("sharing_cost"),
    }
