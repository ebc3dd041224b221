"""What a converted file says of itself: in its header's metadata, and again in the manifest that is made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp4trt.layouts import PROVENANCE
from fp4trt.progress import PATIENCE_S, tracking
from fp4trt.safetensors_file import sha256_of
from fp4trt.version import __version__

__all__ = ["Provenance", "header_of", "manifest_of", "read_header", "source_hashes"]

_CARRIED: Final = ("recipe", "training", "calibration", "sharing_cost")
"""What a manifest says of how its checkpoint was quantized, whatever the layout of the bytes."""


@dataclass(frozen=True)
class Provenance:
    """Where a checkpoint comes from, as far as it says so.

    Attributes:
        carried: what fp4trt's manifest says of the quantization; empty for a checkpoint of another program.
        error: measured when it was quantized: relative L2, by what it was measured on.
        config: of diffusers; empty where the header has none.
        producer: that ModelOpt's layout names in its config; empty without one.
        order: names of diffusers' tensors as they lie in fp4trt's own files, where that is not the usual order.
        branch: name of the file beside it with the low-rank branches; "" without.
    """

    carried: Mapping[str, Any] = field(default_factory=dict)
    error: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    order: Sequence[str] = ()
    branch: str = ""

    @property
    def recipe(self) -> str:
        """Name of the recipe; "" where another program has quantized."""
        recipe = self.carried.get("recipe")
        return str(recipe.get("name", "")) if isinstance(recipe, Mapping) else ""


def manifest_of(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> Provenance:
    """Return what the manifest and the config of a checkpoint's folder say."""
    described = config.get("quantization_config")
    producer = described.get("producer") if isinstance(described, Mapping) else None
    carried = {key: manifest[key] for key in _CARRIED if key in manifest}
    return Provenance(carried, _errors(manifest), producer=producer if isinstance(producer, Mapping) else {})


def _errors(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Return the errors that were measured when a checkpoint was made."""
    found: dict[str, float] = {}
    cost, blocks = manifest.get("sharing_cost"), manifest.get("blocks")
    if isinstance(cost, Mapping) and isinstance(value := cost.get("weight_shared"), float):
        found["weights"] = value
    outputs = list(_output_errors(blocks.values() if isinstance(blocks, Mapping) else ()))
    if outputs:
        found |= {"largest_linear": max(outputs), "mean_linear": sum(outputs) / len(outputs)}
    return found


def _output_errors(blocks: Iterable[Any]) -> Iterable[float]:
    """Yield the errors of the outputs of linears that a method has noted by block."""
    linears = (linear for block in blocks if isinstance(block, Mapping) for linear in block.values())
    values = (linear.get("error") for linear in linears if isinstance(linear, Mapping))
    return (value for value in values if isinstance(value, float))


def header_of(
    layout: str, source: Mapping[str, str], provenance: Provenance, order: Sequence[str], branch: str
) -> dict[str, str]:
    """Return the metadata of a single file: no absolute path, no time.

    Args:
        layout: what ``fp4trt convert`` calls it.
        source: file name to hash of the checkpoint that it is made of.
        provenance: of that, with its config.
        order: of the tensors in fp4trt's own files, where that is not the usual one.
        branch: name of the file with the low-rank branches, "" without.
    """
    said: dict[str, Any] = {
        "version": __version__,
        "layout": layout,
        "recipe": provenance.recipe or "unknown",
        "source": dict(source),
        "config": dict(provenance.config),
        "quantization": dict(provenance.carried),
        "producer": dict(provenance.producer),
        "error": dict(provenance.error),
        "order": list(order),
        "branch": branch,
    }
    kept = {key: value for key, value in said.items() if value}
    return {"format": "pt", PROVENANCE: json.dumps(kept, sort_keys=True, separators=(",", ":"))}


def read_header(metadata: Mapping[str, str]) -> Provenance:
    """Return what the metadata of a file that ``fp4trt convert`` wrote say; nothing of another program's."""
    try:
        said = json.loads(metadata.get(PROVENANCE, "{}"))
    except (ValueError, RecursionError):
        return Provenance()
    if not isinstance(said, dict):
        return Provenance()

    def objects(key: str) -> dict[str, Any]:
        value = said.get(key)
        return value if isinstance(value, dict) else {}

    order, branch = said.get("order"), said.get("branch")
    return Provenance(
        {key: value for key, value in objects("quantization").items() if key in _CARRIED},
        {key: value for key, value in objects("error").items() if isinstance(value, float)},
        objects("config"),
        {key: value for key, value in objects("producer").items() if isinstance(value, str)},
        [name for name in order if isinstance(name, str)] if isinstance(order, list) else (),
        branch if isinstance(branch, str) and Path(branch).name == branch else "",
    )


def source_hashes(files: Sequence[Path]) -> dict[str, str]:
    """Return file name to SHA-256 of the files that a checkpoint consists of."""
    with tracking(sum(file.stat().st_size for file in files), "hashing the source", PATIENCE_S) as advance:
        found = {}
        for file in files:
            found[file.name] = sha256_of(file)
            advance(file.stat().st_size)
    return found
