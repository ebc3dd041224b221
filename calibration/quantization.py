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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from torch import nn

from calibration import shards, sharing, write
from calibration.block_calibration import require_device
from calibration.checkpoint import MANIFEST
from calibration.dataset import save_inputs
from calibration.errors import BadInputs, TooLittleSpace
from calibration.input_amax import Calibration, calibration_from
from calibration.models import Family, family_of
from calibration.models.family import require_blocks_of_16
from calibration.one_pass import MEMORY, Done, Work, estimated_seconds, quantize_in_one_pass
from calibration.quantization_config import quantization_config
from calibration.safetensors_file import StoredTensor, hold, sha256_of
from calibration.source import (
    empty_source,
    files_of,
    find_source,
    load_json,
    load_source,
    source_hashes,
)

__all__ = ["RECIPES", "quantize"]

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "nvfp4-ptq": {"method": "ptq", "format": "nvfp4", "algorithm": "max", "share_global_scales": True},
}
"""Recipe name to what it resolves to."""

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt", "numpy", "ml_dtypes")

_LAYOUT: Final = "one pass"
"""What an interrupted run leaves; one that left something else cannot go on."""

_WORTH_SAYING: Final = 1_000_000_000
"""Bytes of a source that takes long enough to say first what is going to happen."""


@dataclass(frozen=True)
class _Source:
    """What is quantized.

    Attributes:
        folder: the plain checkpoint.
        config: its config.
        family: its family.
        stored: its tensors, in the order of the model's own.
        calibrated: the maxima of the linears' inputs, and what they come from.
        quantization_config: what the result's config says of its formats.
        done: what is known of the weights from elsewhere; None where their files are to be read.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    stored: Mapping[str, StoredTensor]
    calibrated: Calibration
    quantization_config: Mapping[str, Any]
    done: Done | None

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears to quantize."""
        return self.family.quantized(self.config)

    def identity(self, recipe: str) -> str:
        """Return what tells the result from any other before a weight was read; empty where nothing is to be read."""
        if self.done is not None:
            return ""
        stats = {file.name: file.stat() for file in files_of(self.folder)}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        parts = [self.config, recipe, RECIPES[recipe], dict(self.calibrated.amax), dict(self.calibrated.described)]
        parts += [files, _versions(), _LAYOUT]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def quantize(
    source: str | Path,
    output: str | Path,
    recipe: str = "nvfp4-ptq",
    calibration: str | Path | Sequence[str | Path] | None = None,
    modelopt_state: str | Path | None = None,
    trust: bool = False,
    force: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """Quantize a BF16 checkpoint and write the quantized one, a few MiB of it in memory at a time.

    The source is read once (see :mod:`calibration.one_pass`). A run that is killed goes on, when it is started again,
    after what it had brought to disk.

    Args:
        source: BF16 checkpoint (see :func:`calibration.source.find_source`).
        output: folder of the result, written as ``OUTPUT.partial`` and renamed.
        recipe: a name of :data:`RECIPES`.
        calibration: maxima (``.json``), or several files of them to be merged, or captured inputs
            (``.safetensors``); None for the built-in model's words.
        modelopt_state: a state that ``modelopt.torch.opt.save`` wrote, in place of calibrating here.
        trust: allow reading that state, which is a pickle and can run code.
        force: replace an existing result.
        device: where to run the model on captured inputs, and to pack: ``cpu`` or ``cuda``.

    Returns:
        What the command prints as JSON: paths, counts, bytes, the cost of sharing scales.

    Raises:
        BadCheckpoint, BadInputs, BadAmax, OutputExists, TooLittleSpace, UnsupportedLinear, Untrusted: naming what is
            wrong.
    """
    if recipe not in RECIPES:
        raise BadInputs(f"there is no recipe '{recipe}'; choose one of: {', '.join(RECIPES)}")
    if calibration and modelopt_state is not None:
        raise BadInputs("both a calibration and a ModelOpt state were given; expected one of them")
    require_device(device)
    directory, folder = Path(output), find_source(source)
    write.refuse_foreign(directory, force)
    work = directory.with_name(f"{directory.name}.calibration.partial")
    if modelopt_state is not None:
        source_of: AbstractContextManager[_Source] = contextlib.nullcontext(_restored(folder, modelopt_state, trust))
    else:
        source_of = _calibrated(folder, calibration, work, device)
    with source_of as given, write.replacing(directory, force, given.identity(recipe)) as partial:
        manifest = _write(partial, given, recipe, device)
    return _summary(directory, given, manifest)


@contextlib.contextmanager
def _calibrated(
    folder: Path, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> Iterator[_Source]:
    """Check a plain checkpoint against its config; run it on captured inputs, or read what an earlier run measured."""
    model, config, family, stored = _checked(folder)
    ordered = {name: stored[name] for name in model.state_dict()}
    formats = quantization_config(model, family.quantized(config))
    with calibration_from(folder, calibration or None, work, device) as calibrated:
        yield _Source(folder, config, family, ordered, calibrated, formats, None)


def _restored(folder: Path, modelopt_state: str | Path, trust: bool) -> _Source:
    """Take weights and maxima from a ModelOpt state of a plain checkpoint's model, which is held in memory for that."""
    from calibration.modelopt_state import maxima, restore

    model, config, family, _ = _checked(folder)
    restored = restore(load_source(folder), family.quantized(config), modelopt_state, trust)
    held = {name: hold(name, restored.state_dict()[name]) for name in model.state_dict()}
    inputs, weights = maxima(restored, family.quantized(config))
    described = {"data": "modelopt state", "sha256": sha256_of(Path(modelopt_state))}
    done = Done(source_hashes(folder), {f"{path}.weight": value for path, value in weights.items()})
    formats = quantization_config(model, family.quantized(config))
    return _Source(folder, config, family, held, Calibration(inputs, described), formats, done)


def _checked(folder: Path) -> tuple[nn.Module, dict[str, Any], Family, dict[str, StoredTensor]]:
    """Return the empty model of a plain checkpoint, its config and family, and where its tensors lie."""
    model, stored = empty_source(folder)
    config = load_json(folder / "config.json")
    family = family_of(config)
    for path in family.quantized(config):
        require_blocks_of_16(path, stored[f"{path}.weight"].shape[1])
    return model, config, family, stored


def _write(partial: Path, given: _Source, recipe: str, device: str) -> dict[str, Any]:
    """Write everything into ``DIR.partial``, or what an earlier run has not finished; return the manifest."""
    groups = given.family.groups(given.config)
    planned = shards.plan_shards(given.stored, groups)
    earlier = write.progress_of(partial)
    if earlier and shards.are_reserved(partial, planned):
        done = Done(**earlier)
        click.echo(f"going on: {len(done.written)} of {len(given.stored)} tensors are done", err=True)
    else:
        done = given.done or Done()
    inputs = sharing.shared(given.calibrated.amax, groups)
    sources = files_of(given.folder) if given.done is None else []
    files = shards.ShardFiles(partial, planned, shards.results_of(done.written, groups))
    to_read = [
        tensor for tensor in given.stored.values() if tensor.file in sources and tensor.file.name not in done.sha256
    ]
    _foresee(partial, sum(tensor.nbytes for tensor in to_read), files.missing())
    work = Work(sources, given.stored, groups, inputs, device)
    with _bar(given.stored) as progress:
        quantize_in_one_pass(work, files, done, functools.partial(write.note_progress, partial), progress)
    written = {shard.name: done.files[shard.name] for shard in planned}
    if len(planned) > 1:
        written[shards.INDEX] = write.write_json(partial / shards.INDEX, shards.index_of(planned))
    config = {**given.config, "quantization_config": given.quantization_config}
    written["config.json"] = write.write_json(partial / "config.json", config)
    written |= _keep_calibration(partial, given.calibrated)
    own = {path: done.amax[f"{path}.weight"] for path in given.paths}
    common = sharing.shared(own, groups)
    manifest = {
        **_description(given, recipe, groups, common, inputs),
        "sharing_cost": asdict(sharing.measure_cost(given.stored, own, common)),
        "files": written,
        "source": {"config.json": sha256_of(given.folder / "config.json"), **done.sha256},
    }
    write.write_json(partial / MANIFEST, manifest)
    return manifest


def _description(
    given: _Source, recipe: str, groups: shards.Groups, weights: Mapping[str, float], inputs: Mapping[str, float]
) -> dict[str, Any]:
    """Return what the manifest says of the quantization itself."""
    amax = {f"{path}.input_quantizer": value for path, value in inputs.items()}
    amax |= {f"{path}.weight_quantizer": value for path, value in weights.items()}
    return {
        "format": 1,
        "family": given.family.name,
        "recipe": {"name": recipe, **RECIPES[recipe]},
        "quantized": {"nvfp4": given.paths},
        "groups": groups,
        "amax": amax,
        "calibration": dict(given.calibrated.described),
        "versions": _versions(),
    }


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
def _bar(stored: Mapping[str, StoredTensor]) -> Iterator[Callable[[int], None]]:
    """Show how far the pass is; give what several threads may tell of bytes that were read, or packed."""
    lock = threading.Lock()
    length = sum(2 * tensor.nbytes for tensor in stored.values())
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


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def _summary(directory: Path, given: _Source, manifest: Mapping[str, Any]) -> dict[str, Any]:
    def size(root: Path) -> int:
        return sum(file.stat().st_size for file in files_of(root))

    return {
        "checkpoint": str(directory.resolve()),
        "family": given.family.name,
        "recipe": manifest["recipe"]["name"],
        "quantized_linears": len(given.paths),
        "groups": len(manifest["groups"]),
        "bytes": size(directory),
        "source_bytes": size(given.folder),
        "sharing_cost": manifest["sharing_cost"],
    }
