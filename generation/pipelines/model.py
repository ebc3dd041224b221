"""Which model an artifact is, and what made it: read from headers and manifests, before it is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from fp4trt.account import is_quantized_checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.checkpoint_manifest import MANIFEST, read_checkpoint_manifest
from fp4trt.errors import BadGraph, UnknownArtifact
from fp4trt.families import Family, family_of
from fp4trt.families.family import Config
from fp4trt.file_kind import what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.make_source import folder_of

__all__ = ["Kind", "Model", "Profile", "model_of"]

Kind = Literal["checkpoint", "quantized checkpoint", "onnx", "engine"]

Profile = Mapping[str, Sequence[Sequence[int]]]
"""Input to its least, usual and largest shape."""

_CONFIG: Final = "config.json"


@dataclass(frozen=True)
class Model:
    """What is known of an artifact before it is opened.

    Attributes:
        path: of the artifact: a file, or a checkpoint's folder.
        kind: what it is.
        family: of the model.
        config: diffusers' config, without what is said of quantization.
        recipe: that quantized it; None where nothing is quantized, or nothing says so.
        hashes: what identifies it, name to SHA-256: hashes of weights are those that a manifest holds.
        profiles: of an engine.
        has_slots: whether a graph, or an engine, has slots for LoRAs.
    """

    path: Path
    kind: Kind
    family: Family
    config: Config
    recipe: str | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    profiles: tuple[Profile, ...] = ()
    has_slots: bool = False

    @property
    def folder(self) -> Path:
        """The checkpoint's folder, or the one that the file lies in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def runs_in_torch(self) -> bool:
        """Whether it is a checkpoint."""
        return self.kind in ("checkpoint", "quantized checkpoint")


def model_of(artifact: str | Path) -> Model:
    """Return which model an artifact is.

    Args:
        artifact: a checkpoint, plain or quantized (``digits`` for the built-in one), a graph (``.onnx``), or an engine
            (``.engine``) with its JSON beside it.

    Raises:
        BadGraph, UnknownArtifact: the file is missing, or does not say which model it is.
        BadCheckpoint: the checkpoint is damaged.
        UnknownFamily: the model is of no known family.
    """
    path = Path(artifact)
    if path.suffix == ".onnx" and not path.is_dir():
        return _of_graph(path)
    if path.suffix == ".engine" and not path.is_dir():
        return _of_engine(path)
    return _of_checkpoint(folder_of(artifact))


def _of_graph(path: Path) -> Model:
    from onnx_functions.graph.external_data import load_graph
    from onnx_functions.graph.linears import metadata_of
    from onnx_functions.graph.lora_slots import METADATA as LORA

    said = metadata_of(load_graph(path))
    config = _config_in(path, said["fp4trt.config"]) if "fp4trt.config" in said else _config_beside(path)
    recipe = said.get("fp4trt.recipe")
    hashes = {"graph": hashlib.sha256(path.read_bytes()).hexdigest(), **_weights_beside(path.parent)}
    recipe = None if recipe in ("none", "unknown") else recipe
    return Model(path, "onnx", family_of(config, path), config, recipe, hashes, has_slots=LORA in said)


def _of_engine(path: Path) -> Model:
    beside = path.with_suffix(".json")
    if not path.is_file():
        raise UnknownArtifact(f"{path} {what_it_lacks(path)}; expected an engine that fp4trt build wrote")
    manifest = load_json(beside, f"the JSON that fp4trt build writes beside {path.name}", UnknownArtifact)
    model, request = manifest.get("model"), manifest.get("request")
    if not isinstance(request, dict) or "engine_sha256" not in manifest:
        raise UnknownArtifact(f"{beside} is not what fp4trt build writes beside an engine; build it again")
    known = isinstance(model, dict) and isinstance(model.get("config"), dict)
    config = dict(model["config"]) if isinstance(model, dict) and known else _config_beside(path)
    recipe = model.get("recipe") if isinstance(model, dict) else None
    hashes = {"engine": str(manifest["engine_sha256"]), "graph and weights": str(request.get("onnx_sha256"))}
    profiles = request.get("profiles") or [request.get("profile", {})]
    has_slots = manifest.get("lora") is not None
    return Model(path, "engine", family_of(config, path), config, recipe, hashes, tuple(profiles), has_slots)


def _of_checkpoint(folder: Path) -> Model:
    from calibration.checkpoints.plain import weights_fingerprint

    config = load_json(folder / _CONFIG)
    family = family_of(config, folder)
    if is_quantized_checkpoint(config, tensors_in_folder(folder)):
        manifest = read_checkpoint_manifest(folder)
        recipe = manifest.recipe if manifest is not None else None
        return Model(folder, "quantized checkpoint", family, _public(config), recipe, _weights_beside(folder))
    hashes = {"weights (first values of each tensor)": weights_fingerprint(folder)}
    return Model(folder, "checkpoint", family, _public(config), None, hashes)


def _weights_beside(folder: Path) -> dict[str, str]:
    """Return the hashes that the manifest of a quantized checkpoint holds, and its own."""
    manifest = read_checkpoint_manifest(folder)
    if manifest is None:
        return {}
    return {
        **{name: digest for name, digest in sorted(manifest.files.items()) if "/" not in name},
        MANIFEST: hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
    }


def _config_in(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise BadGraph(f"{path}: its metadata fp4trt.config is not JSON ({error}); export it again") from None
    if not isinstance(config, dict):
        raise BadGraph(f"{path}: its metadata fp4trt.config is no object; export it again")
    return config


def _config_beside(path: Path) -> dict[str, Any]:
    """Return the config of what an earlier version wrote, which does not hold it itself."""
    beside = path.parent / _CONFIG
    if not beside.is_file():
        made = "build" if path.suffix == ".engine" else "export"
        raise BadGraph(
            f"{path} does not say which model it is of, and there is no {_CONFIG} beside it; {made} it again, "
            f"or copy the checkpoint's {_CONFIG} to {path.parent}"
        )
    return _public(load_json(beside))


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without what is said of quantization, and of the file that it was read from."""
    private = {key for key in config if key.startswith("_")} - {"_class_name"} | {"quantization_config"}
    return {key: value for key, value in config.items() if key not in private}
