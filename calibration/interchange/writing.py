"""Write tensors as they are made, and fp4trt's own checkpoint of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from calibration.checkpoints import layout
from calibration.formats.quantization_config import AWQ, SVDQUANT, described_linears
from calibration.interchange.byte_rows import ByteRows, Bytes
from calibration.interchange.unified import Unified
from fp4trt.checkpoint_folder import STEM
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.number_formats import BF16, FORMATS, NVFP4
from fp4trt.publish import write_json
from fp4trt.safetensors_file import TensorPlan, write
from fp4trt.version import __version__

__all__ = ["DIFFUSERS_FILES", "Advance", "unusual_order", "write_checkpoint", "write_tensors"]

DIFFUSERS_FILES: Final = ("config.json", f"{STEM}.safetensors")
"""What a folder for diffusers consists of: the config without which the file cannot be loaded offline, and the file."""

Advance = Callable[[int], object]
"""Called with the number of bytes that have been written since the last call."""


def write_tensors(path: Path, tensors: Mapping[str, ByteRows], metadata: Mapping[str, str], advance: Advance) -> str:
    """Write a safetensors file of tensors as they are made, a piece in memory at a time; return its SHA-256."""
    plan = [rows.plan(name) for name, rows in tensors.items()]
    return write(path, plan, _pieces(plan, tensors, advance), metadata)


def _pieces(plan: list[TensorPlan], tensors: Mapping[str, ByteRows], advance: Advance) -> Iterator[tuple[str, Bytes]]:
    for tensor in plan:
        for piece in tensors[tensor.name].pieces():
            yield tensor.name, piece
            advance(piece.nbytes)


def write_checkpoint(folder: Path, checkpoint: Unified, said: Mapping[str, Any], advance: Advance) -> None:
    """Write a checkpoint as ``fp4trt quantize`` does: shards, ``config.json`` and ``fp4trt.json``.

    Args:
        folder: not yet under its final name.
        checkpoint: what is written.
        said: more keys of the manifest: ``source`` and what else it came from.
        advance: called as bytes are written.
    """
    groups, formats = _groups(checkpoint), _formats(checkpoint)
    weights = {f"{path}.weight": TensorPlan(path, BF16, checkpoint.account.linears[path].shape) for path in formats}
    others = {name: checkpoint.tensors[name].plan(name) for name in _unpacked(checkpoint)}
    shards = layout.plan_shards(weights, groups, formats, others)
    files = {}
    for shard in shards:
        pieces = _pieces(list(shard.plan), checkpoint.tensors, advance)
        files[shard.name] = write(folder / shard.name, shard.plan, pieces, layout.METADATA)
    if len(shards) > 1:
        files[layout.INDEX] = write_json(folder / layout.INDEX, layout.index_of(shards))
    config = {**checkpoint.config, "quantization_config": _described(checkpoint)}
    files["config.json"] = write_json(folder / "config.json", config)
    write_json(folder / MANIFEST, {**_manifest(checkpoint, groups), **said, "files": files})


def unusual_order(checkpoint: Unified) -> list[str]:
    """Return the order of the tensors that are not packed where it is not the usual one, by name: for the way back."""
    names = _unpacked(checkpoint)
    return names if names != sorted(names) else []


def _unpacked(checkpoint: Unified) -> list[str]:
    """Return the tensors that are neither codes nor scales of a quantized linear, in order."""
    formats = _formats(checkpoint)
    packed = {f"{path}.{leaf}" for path, kind in formats.items() for leaf in ("weight", *FORMATS[kind].leaves)}
    return [name for name in checkpoint.tensors if name not in packed]


def _formats(checkpoint: Unified) -> dict[str, str]:
    """Return module path to number format of the linears that are quantized."""
    return {path: form.format for path, form in checkpoint.account.linears.items() if form.format in FORMATS}


def _groups(checkpoint: Unified) -> list[list[str]]:
    """Return the quantized linears by shared input, as far as they have one format and equal shared scales."""
    formats = _formats(checkpoint)
    groups: list[list[str]] = []
    for group in checkpoint.account.family.groups_of(checkpoint.config, formats):
        alike: dict[tuple[str, ...], list[str]] = {}
        for path in group:
            shared = (checkpoint.tensors[f"{path}.{leaf}"].all() for leaf in FORMATS[formats[path]].shared)
            alike.setdefault((formats[path], *(bytes(value).hex() for value in shared)), []).append(path)
        groups += alike.values()
    return groups


def _described(checkpoint: Unified) -> dict[str, Any]:
    """Return the ``quantization_config``."""
    account = checkpoint.account
    ranks = {form.rank for form in account.linears.values() if form.rank}
    in_nvfp4 = {path: form for path, form in account.linears.items() if form.format == NVFP4.name}
    smoothed = {path: AWQ for path, form in in_nvfp4.items() if form.smoothed}
    formats = _formats(checkpoint) | smoothed | {path: SVDQUANT for path, form in in_nvfp4.items() if form.rank}
    linears = [
        path for name in account.family.state(checkpoint.config) if (path := name.removesuffix(".weight")) != name
    ]
    linears = [path for path in linears if path in account.linears]
    producer = checkpoint.provenance.producer or {"name": "fp4trt", "version": __version__}
    return described_linears(linears, formats, ranks, producer)


def _manifest(checkpoint: Unified, groups: list[list[str]]) -> dict[str, Any]:
    account, found = checkpoint.account, _formats(checkpoint)
    formats = {kind: [path for group in groups for path in group if found[path] == kind] for kind in FORMATS}
    formats["svdquant"] = [path for path, form in account.linears.items() if form.rank]
    described = {
        "format": 1,
        "family": account.family.name,
        "recipe": {"name": "converted"},
        "calibration": {"data": "none"},
        **checkpoint.provenance.carried,
        "quantized": {kind: paths for kind, paths in formats.items() if paths},
        "groups": groups,
        "versions": {"fp4trt": __version__, "numpy": np.__version__},
    }
    if account.attentions:
        described["attention"] = {"fp8": list(account.attentions)}
    return described
