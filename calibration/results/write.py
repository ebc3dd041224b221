"""Write a quantized checkpoint: the tensors, and beside them config, manifest and what calibrated it.

The tensors come in one pass over the files of the source (:func:`write_result`), or block by block, as each is read to
be run (:mod:`calibration.results.by_block`). Either way the source is read once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration.by_block.calibration import Calibration
from calibration.by_block.quantize_blocks import Prepared
from calibration.checkpoints import layout
from calibration.checkpoints.one_pass import MEMORY, Done, Work, estimated_seconds, quantize_in_one_pass
from calibration.checkpoints.quantized import BRANCH, SMOOTHING
from calibration.formats import shared_scales
from calibration.formats.quantization_config import AWQ, SVDQUANT, quantization_config
from calibration.inputs.captured import save_inputs
from calibration.methods.plan import Plain
from fp4trt import publish
from fp4trt.account import TensorHeader
from fp4trt.checkpoint_folder import files_of
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.disk_space import WORTH_SAYING, foresee, readable_size
from fp4trt.number_formats import FORMATS, FP8
from fp4trt.progress import note, tracking
from fp4trt.safetensors_file import sha256_of
from fp4trt.source_folder import loras_of, source_in, stamp_of

__all__ = ["Given", "complete", "shared_input_amax", "versions", "write_result"]

_VERSIONED: Final = ("torch", "diffusers", "nvidia-modelopt", "numpy", "ml_dtypes")

_LAYOUT: Final = "one pass, errors noted"
"""What an interrupted run leaves; one that left something else cannot be resumed."""


@dataclass(frozen=True)
class Given:
    """What is known before the weights are read.

    Attributes:
        calibrated: amax of the inputs of those linears that are packed in the pass, and what it comes from.
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

    def identity(self, plain: Plain) -> str:
        """Return what tells the result from any other before a weight was read; empty where nothing is to be read."""
        if self.done is not None:
            return ""
        files = {file.name: stamp_of(file) for file in files_of(plain.folder)}
        parts: list[Any] = [
            plain.config,
            plain.recipe.resolved(),
            dict(self.calibrated.amax),
            dict(self.calibrated.described),
        ]
        parts += [self.prepared.figures, self.training, files, loras_of(plain.folder)]
        parts += [versions(), _LAYOUT, shared_scales.SHARING]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_result(partial: Path, plain: Plain, given: Given, device: str) -> dict[str, Any]:
    """Write everything into ``DIR.partial``, or what an earlier run has not finished; return the manifest.

    Args:
        partial: as :func:`fp4trt.publish.replacing` gives it.
        plain: what is quantized.
        given: what is known of it.
        device: where to pack, ``cpu`` or ``cuda``.

    Raises:
        BadCheckpoint, BadAmax, TooLittleSpace: naming what is wrong.
    """
    groups, prepared, linears = plain.quantized_groups, given.prepared.tensors, plain.quantized_linears
    planned = layout.plan_shards(plain.stored, groups, linears, prepared, plain.wide)
    earlier = publish.progress_of(partial)
    if earlier and layout.are_reserved(partial, planned):
        done = Done(**earlier)
        note(f"resuming: {len(done.written)} of {len(plain.stored)} tensors are done")
    else:
        done = given.done or Done()
    sources = files_of(plain.folder) if given.done is None else []
    files = layout.ShardFiles(partial, planned, layout.results_of(done.written, groups, linears, prepared))
    to_read = [
        tensor for tensor in plain.stored.values() if tensor.file in sources and tensor.file.name not in done.sha256
    ]
    reads, needed = sum(tensor.nbytes for tensor in to_read), files.missing()
    foresee(partial.parent, reads, needed)
    if reads >= WORTH_SAYING:
        seconds = estimated_seconds(reads, needed)
        words = f"it takes {readable_size(MEMORY)} of memory beside the libraries', and about {seconds:.0f} s where the"
        note(f"{words} disk keeps up")
    inputs = shared_input_amax(plain, _packed(plain, prepared), given.calibrated.amax)
    work = Work(sources, plain.stored, groups, linears, inputs, prepared, device)
    with tracking(work.nbytes, "quantizing") as advance:
        quantize_in_one_pass(work, files, done, functools.partial(publish.note_progress, partial), advance)
    return complete(partial, plain, given, prepared, planned, done)


def _packed(plain: Plain, decided: Container[str]) -> layout.Groups:
    """Return the groups of linears whose weights are rounded to nearest here."""
    return [group for group in plain.quantized_groups if f"{group[0]}.weight" not in decided]


def shared_input_amax(plain: Plain, groups: layout.Groups, amax: Mapping[str, float]) -> dict[str, float]:
    """Return the amax that each linear shares with those that read the same input."""
    kinds = plain.quantized_linears
    return shared_scales.shared(amax, [group for group in groups if FORMATS[kinds[group[0]]].needs_input_amax])


def complete(
    partial: Path,
    plain: Plain,
    given: Given,
    decided: Mapping[str, TensorHeader],
    planned: Sequence[layout.Shard],
    done: Done,
) -> dict[str, Any]:
    """Write all that lies beside the tensors; return the manifest.

    Args:
        partial: the folder.
        plain: what is quantized.
        given: what is known of it.
        decided: the tensors that were not packed or copied, by name.
        planned: the files of the tensors.
        done: what was found and written.
    """
    written = {shard.name: done.files[shard.name] for shard in planned}
    if len(planned) > 1:
        written[layout.INDEX] = publish.write_json(partial / layout.INDEX, layout.index_of(planned))
    branches = _branches(decided)
    ranks = {path: rank for path, rank in branches.items() if path in plain.paths}
    formats = {**plain.formats, **dict.fromkeys((_smoothed(decided) & set(plain.paths)) - branches.keys(), AWQ)}
    formats |= dict.fromkeys(ranks, SVDQUANT)
    described = quantization_config(plain.model, formats, set(ranks.values()))
    config = {**plain.config, "quantization_config": described}
    written["config.json"] = publish.write_json(partial / "config.json", config)
    written |= _keep_calibration(partial, given.calibrated) | _keep_training(partial, given.kept)
    packed = _packed(plain, decided)
    own = {path: done.amax[f"{path}.weight"] for group in packed for path in group}
    sharing = shared_scales.sharing_groups(packed, plain.formats)
    common = own | shared_scales.shared(own, sharing)
    inputs = shared_input_amax(plain, packed, given.calibrated.amax)
    manifest = {
        **_description(plain, given, branches),
        "amax": {
            **given.prepared.amax,
            **{f"{path}.input_quantizer": value for path, value in inputs.items()},
            **{f"{path}.weight_quantizer": value for path, value in common.items()},
        },
        "files": written,
        "source": {"config.json": sha256_of(plain.folder / "config.json"), **done.sha256},
    }
    if errors := [done.errors[f"{path}.weight"] for group in sharing for path in group]:
        manifest["sharing_cost"] = asdict(shared_scales.sharing_cost(errors))
    publish.write_json(partial / MANIFEST, manifest)
    return manifest


def _description(plain: Plain, given: Given, branches: Iterable[str]) -> dict[str, Any]:
    """Return what the manifest says of the quantization itself."""
    formats = {kind: plain.of_format(kind) for kind in FORMATS}
    formats["svdquant"] = tuple(branches)
    described = {
        "format": 1,
        "family": plain.family.name,
        "recipe": plain.recipe.resolved(),
        "quantized": {kind: paths for kind, paths in formats.items() if paths},
        "groups": plain.quantized_groups,
        "calibration": dict(given.calibrated.described),
        "versions": versions(),
    }
    if (source := source_in(plain.folder)) is not None and source.loras:
        loras = ({"file": lora.path.name, "sha256": lora.sha256, "strength": lora.strength} for lora in source.loras)
        described["lora"] = list(loras)
    if given.training:
        described["training"] = dict(given.training)
    if plain.fp8_attentions:
        described["attention"] = {FP8.name: plain.fp8_attentions}
    return {**described, "blocks": dict(given.prepared.figures)} if given.prepared.figures else described


def _branches(prepared: Mapping[str, TensorHeader]) -> dict[str, int]:
    """Return the linears that a low-rank branch was prepared for, and its rank."""
    factors = {name.rpartition("."): tensor.shape for name, tensor in prepared.items()}
    return {path: shape[0] for (path, _, leaf), shape in factors.items() if leaf == BRANCH[0]}


def _smoothed(prepared: Iterable[str]) -> set[str]:
    """Return the linears whose input is scaled by channel."""
    return {path for path, _, leaf in (name.rpartition(".") for name in prepared) if leaf == SMOOTHING}


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


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _VERSIONED}
