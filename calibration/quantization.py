"""``fp4trt quantize``: a BF16 checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
import torch
from torch import nn

from calibration import ptq, shards, sharing, write
from calibration.block_calibration import require_device
from calibration.checkpoint import MANIFEST
from calibration.dataset import save_inputs
from calibration.errors import BadInputs, TooLittleSpace
from calibration.input_amax import Calibration, calibration_from
from calibration.models import Family, family_of
from calibration.models.family import require_blocks_of_16
from calibration.safetensors_file import StoredTensor, hold, sha256_of
from calibration.source import (
    empty_source,
    files_of,
    find_source,
    load_json,
    load_source,
    model_class,
    source_hashes,
)
from calibration.survey import Survey, survey

__all__ = ["RECIPES", "quantize"]

RECIPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "nvfp4-ptq": {"method": "ptq", "format": "nvfp4", "algorithm": "max", "share_global_scales": True},
}
"""Recipe name to what it resolves to."""

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt", "numpy", "ml_dtypes")

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
        surveyed: the maxima of the weights, and the hashes of the files; None until they have been read.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    stored: Mapping[str, StoredTensor]
    calibrated: Calibration
    surveyed: Survey | None

    @property
    def paths(self) -> tuple[str, ...]:
        """The linears to quantize."""
        return self.family.quantized(self.config)

    def identity(self, recipe: str) -> str:
        """Return what tells the result from any other before a weight was read; empty where nothing is to be read."""
        if self.surveyed is not None:
            return ""
        stats = {file.name: file.stat() for file in files_of(self.folder)}
        files = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        parts = [self.config, recipe, RECIPES[recipe], dict(self.calibrated.amax), dict(self.calibrated.described)]
        parts += [files, _versions()]
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

    The source is read twice: once for its hashes and largest weights, once to be packed. A run that is killed goes on,
    when it is started again, after the last file that it had finished.

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
    if modelopt_state is not None:
        given = _restored(folder, modelopt_state, trust)
    else:
        given = _calibrated(folder, calibration, directory.with_name(f"{directory.name}.calibration.partial"), device)
    with write.replacing(directory, force, given.identity(recipe)) as partial:
        manifest = _write(partial, given, recipe, device)
    return _summary(directory, given, manifest)


def _calibrated(
    folder: Path, calibration: str | Path | Sequence[str | Path] | None, work: Path, device: str
) -> _Source:
    """Check a plain checkpoint against its config; run it on captured inputs, or read what an earlier run measured."""
    model, config, family, stored = _checked(folder)
    ordered = {name: stored[name] for name in model.state_dict()}
    return _Source(folder, config, family, ordered, calibration_from(folder, calibration or None, work, device), None)


def _restored(folder: Path, modelopt_state: str | Path, trust: bool) -> _Source:
    """Take weights and maxima from a ModelOpt state of a plain checkpoint's model, which is held in memory for that."""
    from calibration.modelopt_state import maxima, restore

    model, config, family, _ = _checked(folder)
    restored = restore(load_source(folder), family.quantized(config), modelopt_state, trust)
    held = {name: hold(name, restored.state_dict()[name]) for name in model.state_dict()}
    inputs, weights = maxima(restored, family.quantized(config))
    described = {"data": "modelopt state", "sha256": sha256_of(Path(modelopt_state))}
    surveyed = Survey(source_hashes(folder), {f"{path}.weight": value for path, value in weights.items()})
    return _Source(folder, config, family, held, Calibration(inputs, described), surveyed)


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
    planned, done = shards.plan_shards(given.stored, groups), write.progress_of(partial)
    finished: dict[str, str] = done.get("shards", {})
    _foresee(partial, given, [shard for shard in planned if shard.name not in finished])
    with _bar(given.stored) as progress:
        surveyed = given.surveyed or (Survey(**done["survey"]) if done else None)
        if surveyed is None:
            surveyed = survey(given.folder, {f"{path}.weight" for path in given.paths}, progress)
        own = ptq.checked_weights({path: surveyed.amax[f"{path}.weight"] for path in given.paths})
        common = sharing.shared(own, groups)
        inputs = sharing.shared(given.calibrated.amax, groups)
        quantization = shards.Quantization(given.stored, groups, common, inputs, device)
        files = dict(finished)
        for shard in planned:
            if shard.name in finished:
                progress(shards.source_bytes(shard))
                continue
            files[shard.name] = shards.write_shard(partial, shard, quantization, progress)
            if len(planned) > 1:
                write.note_progress(partial, {"survey": asdict(surveyed), "shards": files})
    if len(planned) > 1:
        files[shards.INDEX] = write.write_json(partial / shards.INDEX, shards.index_of(planned))
    config = {**given.config, "quantization_config": _quantization_config(given)}
    files["config.json"] = write.write_json(partial / "config.json", config)
    files |= _keep_calibration(partial, given.calibrated)
    cost = sharing.measure_cost(given.stored, own, common)
    manifest = {**_description(given, recipe, quantization), "sharing_cost": asdict(cost), "files": files}
    write.write_json(partial / MANIFEST, {**manifest, "source": surveyed.sha256})
    return manifest


def _description(given: _Source, recipe: str, quantization: shards.Quantization) -> dict[str, Any]:
    """Return what the manifest says of the quantization itself."""
    amax = {f"{path}.input_quantizer": value for path, value in quantization.input_amax.items()}
    amax |= {f"{path}.weight_quantizer": value for path, value in quantization.weight_amax.items()}
    return {
        "format": 1,
        "family": given.family.name,
        "recipe": {"name": recipe, **RECIPES[recipe]},
        "quantized": {"nvfp4": given.paths},
        "groups": quantization.groups,
        "amax": amax,
        "calibration": dict(given.calibrated.described),
        "versions": _versions(),
    }


def _foresee(folder: Path, given: _Source, missing: Sequence[shards.Shard]) -> None:
    """Say, before a long run, what it reads, writes and needs.

    Raises:
        TooLittleSpace: the result does not fit on its disk.
    """
    needed, free = sum(shard.nbytes for shard in missing), shutil.disk_usage(folder).free
    if free < needed:
        raise TooLittleSpace(
            f"{folder.parent} has {_size(free)} free, the result needs {_size(needed)}; make room, or choose another "
            "--output"
        )
    reads = sum(tensor.nbytes for tensor in given.stored.values())
    if reads >= _WORTH_SAYING:
        packed = sum(shards.source_bytes(shard) for shard in missing)
        click.echo(
            f"reading {_size(reads)} twice, writing {_size(needed)} ({_size(free)} are free) into {len(missing)} "
            f"files, with {_size(shards.MEMORY)} of memory beside the libraries'; packing alone takes about "
            f"{shards.estimated_seconds(packed):.0f} s",
            err=True,
        )


def _size(count: int) -> str:
    """Return a number of bytes for people."""
    unit, name = next((unit for unit in ((1e9, "GB"), (1e6, "MB")) if count >= unit[0]), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


@contextlib.contextmanager
def _bar(stored: Mapping[str, StoredTensor]) -> Iterator[Callable[[int], None]]:
    """Show how far the two passes are; give what several threads may tell of bytes that are done with."""
    lock = threading.Lock()
    length = sum(tensor.nbytes + 2 * math.prod(tensor.shape) for tensor in stored.values())
    with click.progressbar(length=length, label="quantizing", file=sys.stderr) as bar:

        def update(count: int) -> None:
            with lock:
                bar.update(count)

        yield update


def _quantization_config(given: _Source) -> dict[str, Any]:
    from calibration.modelopt_config import quantization_config

    with torch.device("meta"):
        model: nn.Module = model_class(given.family).from_config(given.config)
    return quantization_config(model, given.paths)


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
