"""What is to be planned: a transformer's config, its weights where they are quantized already, and its pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibration.checkpoints import hub
from calibration.checkpoints.source import names_a_file
from fp4trt.account import is_quantized_checkpoint
from fp4trt.built_in import path_of
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadCheckpoint, BadOption, QuantizedAlready
from fp4trt.families import Family, family_of
from fp4trt.file_kind import what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import index_of, transformer_folder
from fp4trt.single_files.config import published_config
from fp4trt.single_files.opening import SUFFIXES, config_beside, config_like, open_file, require_config
from fp4trt.single_files.tables import SINGLE_FILES
from generation.planning.components import Component
from generation.planning.pipeline_files import components_in, transformers_in
from generation.planning.published import published_components, transformers_of
from generation.planning.weights import Weights, stored_weights

__all__ = ["STORED", "Source", "read_source"]

STORED: Final = "stored"
"""Name of the form that a quantized checkpoint has already."""


@dataclass(frozen=True)
class Source:
    """A transformer, and what runs beside it.

    Attributes:
        name: as the user gave it.
        family: of the model.
        config: its config, without what quantization added.
        stored: its weights, where they are quantized already.
        components: beside the transformer.
        transformers: how many such transformers the pipeline has.
        notes: what is to be told of them.
    """

    name: str
    family: Family
    config: Mapping[str, Any]
    stored: Weights | None
    components: tuple[Component, ...]
    transformers: int
    notes: tuple[str, ...] = ()


def read_source(source: str | Path, like: str | Path | None = None) -> Source:
    """Return what a user names; of files, headers and JSON are read alone.

    Args:
        source: a checkpoint's folder, plain or quantized; a pipeline's; a config.json; a single file; the name of a
            repository of the hub, from the cache, else its JSON files are fetched; a file of one, from the cache; or
            the name of a published model, such as ``FLUX.1``.
        like: of a single file, as :func:`fp4trt.single_files.opening.config_like` takes it.

    Raises:
        BadCheckpoint: there is none, or it is damaged.
        BadOption: ``like`` is given for something else than a single file.
        UnknownFamily: the model is of no family of ours.
    """
    place = path_of(source)
    if not place.exists() and names_a_file(source):
        place = hub.cached_file(str(source))
    is_single = place.suffix.lower() in SUFFIXES
    if is_single and not place.is_dir() and not place.is_file():
        raise BadCheckpoint(f"{source} {what_it_lacks(place)}; expected a single file there")
    if like is not None and not (place.is_file() and is_single):
        raise BadOption(f"like is {str(like)!r}, which gives a single file its config; {source} has its own: drop it")
    if place.suffix in (".onnx", ".engine") and place.is_file():
        raise BadCheckpoint(f"{source} is no checkpoint; give the folder of the one that it was made from")
    if place.is_file():
        return _single_file(str(source), place, like) if is_single else _config_file(str(source), place)
    if place.is_dir():
        return _folder(str(source), transformer_folder(place))
    if (config := published_config(str(source))) is not None:
        return _described(str(source), None, config, None)
    known = ", ".join(name for table in SINGLE_FILES.values() for name in table.published)
    if str(source).count("/") == 1 and not place.is_absolute():
        try:
            snapshot = hub.described_in(str(source))
        except BadCheckpoint as error:
            raise BadCheckpoint(f"{error}, or plan for one of: {known}") from None
        return _folder(str(source), transformer_folder(snapshot))
    raise BadCheckpoint(
        f"{source} is not a folder or file here; expected a checkpoint, a config.json, a single file, a hub name such "
        f"as black-forest-labs/FLUX.1-dev, or one of: {known}"
    )


def _config_file(name: str, file: Path) -> Source:
    config = load_json(file, expected="a single file (.safetensors, .sft, .gguf) or the config.json of a model")
    require_config(file, config)
    return _described(name, file.parent, config, None)


def _single_file(name: str, file: Path, like: str | Path | None) -> Source:
    config: Mapping[str, Any]
    stored = None
    try:
        config = open_file(file, config_beside(file) if like is None else config_like(like)).config
    except QuantizedAlready:
        config, stored = _quantized_file(file, like)
    places = () if like is None else (Path(like), Path(like).parent)
    pipeline = next((place for place in places if place.is_dir() and index_of(place) is not None), None)
    return _described(name, None if pipeline is None else pipeline / "transformer", config, stored)


def _quantized_file(file: Path, like: str | Path | None) -> tuple[Mapping[str, Any], Weights]:
    """Return config and weights of a file that `fp4trt convert` turns into a checkpoint."""
    from calibration.interchange.source import open_source
    from calibration.interchange.unified import unified

    made = unified(open_source(file, like=like))
    return made.config, stored_weights(STORED, made.account, made.tensors)


def _folder(name: str, folder: Path) -> Source:
    config = load_json(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        return _described(name, folder, config, None)
    tensors = tensors_in_folder(folder)
    if not is_quantized_checkpoint(config, tensors):
        return _described(name, folder, config, None)
    from onnx_functions.graph.checkpoint_beside import account_in

    account = account_in(folder, config, tensors)
    return _described(name, folder, config, stored_weights(STORED, account, tensors))


def _described(name: str, folder: Path | None, config: Mapping[str, Any], stored: Weights | None) -> Source:
    """Return a source of a config, and of the pipeline that the folder of it lies in."""
    family = family_of(config, folder)
    notes = []
    if "quantization_config" in config and stored is None:
        notes.append("the config is of a quantized checkpoint, whose weights are not there: planned as from 16 bit")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    pipeline = None if folder is None or index_of(folder.parent) is None else folder.parent
    components = published_components(family.name, config) if pipeline is None else components_in(pipeline)
    count = transformers_of(family.name, config) if pipeline is None else max(1, transformers_in(pipeline))
    if folder is not None and (folder / "sampling.json").is_file():
        components = ()
    if any(part.elements is None for part in components) and pipeline is not None:
        components = published_components(family.name, config)
        notes.append(f"not all weights of {pipeline} are there: sizes beside the transformer are the published model's")
    return Source(name, family, plain, stored, components, count, tuple(notes))
