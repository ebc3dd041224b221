"""The weights of a diffusers folder: one safetensors file, or shards with their index; or a single file elsewhere."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import what_it_is
from fp4trt.fused_tensors import with_loras
from fp4trt.json_file import load_json, strings_by_name
from fp4trt.safetensors_file import StoredTensor, metadata_in_file, tensors_in_file
from fp4trt.single_files.opening import open_file
from fp4trt.source_folder import Source, source_in

__all__ = ["STEM", "files_of", "metadata_in_folder", "tensors_in_folder", "tensors_without_loras"]

STEM: Final = "diffusion_pytorch_model"
"""What the names of the files begin with."""

_OF_TRANSFORMERS: Final = "model"
"""Likewise, of a model of transformers, such as a text encoder."""

_TIED: Final = {"encoder.embed_tokens.weight": "shared.weight"}
"""A tensor that may be stored in the place of another, or beside it, and is the same: T5's table of tokens."""

_CLIP: Final = "text_model."
_BARE: Final = ("embeddings.", "encoder.layers.", "final_layer_norm.")
"""What published files of CLIP's text encoder have before its names, and what they begin with where it is left out."""

_UNREAD: Final = ("text_model.embeddings.position_ids", "bn.num_batches_tracked")
"""Whole numbers that nothing reads: positions in older files of CLIP, a count of training steps in FLUX.2's VAE."""

_ENDS: Final = (".safetensors", ".safetensors.index.json")

_OTHER_WEIGHTS: Final = ("safetensors", "bin", "pt", "pth", "ckpt", "gguf")


class _Renamed(StoredTensor):
    """A tensor under another name than its file's, by which linting knows bytes: a graph gets a copy of it."""


def files_of(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, sharded or not, in the order of their names.

    Raises:
        BadCheckpoint: the index is damaged, or does not name a file that lies beside the shards.
    """
    if (source := source_in(folder)) is not None:
        return files_of(source.weights) if source.weights.is_dir() else (source.weights,)
    shards = _index(folder)
    names = sorted(set(shards.values())) if shards is not None else [f"{_stem(folder)}.safetensors"]
    return tuple(folder / name for name in names)


def tensors_in_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return where every tensor of a checkpoint lies.

    Raises:
        BadCheckpoint: a file is missing or damaged, or the index is not that of the files beside it.
    """
    if (source := source_in(folder)) is not None:
        return dict(_behind(source, json.dumps(load_json(folder / "config.json")), json.dumps(source.described())))
    shards, files = _index(folder), files_of(folder)
    if not any(file.exists() for file in files):
        _refuse_other_weights(folder)
    if shards is None:
        return _untied(folder, tensors_in_file(files[0]))
    index, tensors = _index_of(folder), dict[str, StoredTensor]()
    for file, found in [(file, tensors_in_file(file)) for file in files]:
        for name, tensor in found.items():
            if shards.get(name) != file.name:
                said = f"says that {shards[name]} holds {name}" if name in shards else f"does not name {name}"
                raise BadCheckpoint(f"{index} {said}, which {file.name} holds; copy the shards again")
            tensors[name] = tensor
    if absent := next((name for name in shards if name not in tensors), None):
        raise BadCheckpoint(f"{index} speaks of {absent}, which no shard holds; copy the shards again")
    return _untied(folder, tensors)


def metadata_in_folder(folder: Path) -> dict[str, str]:
    """Return the ``__metadata__`` of all files of a checkpoint that :func:`tensors_in_folder` reads, as one.

    That of a single file speaks of other names, and has been judged when it was opened.
    """
    if (source := source_in(folder)) is not None:
        return metadata_in_folder(source.weights) if source.weights.is_dir() else {}
    return {key: value for file in files_of(folder) for key, value in metadata_in_file(file).items()}


def tensors_without_loras(folder: Path) -> dict[str, StoredTensor]:
    """Return :func:`tensors_in_folder` as they are before any LoRA of a source changes them."""
    source = source_in(folder)
    return tensors_in_folder(folder) if source is None else dict(_unchanged(source, load_json(folder / "config.json")))


@functools.lru_cache(maxsize=2)
def _behind(source: Source, config: str, _identity: str) -> Mapping[str, StoredTensor]:
    """Return where the tensors of diffusers lie in the files that a folder stands for, or what makes them."""
    tensors = _unchanged(source, json.loads(config))
    return with_loras(source, tensors, json.loads(config)) if source.loras else tensors


def _unchanged(source: Source, config: Mapping[str, Any]) -> Mapping[str, StoredTensor]:
    return tensors_in_folder(source.weights) if source.weights.is_dir() else open_file(source.weights, config).tensors


def _index_of(folder: Path) -> Path:
    return folder / f"{_stem(folder)}.safetensors.index.json"


def _stem(folder: Path) -> str:
    """Return what the names of a folder's files begin with: transformers' name where they have that one alone."""
    found = (stem for stem in (STEM, _OF_TRANSFORMERS) for end in _ENDS if (folder / f"{stem}{end}").exists())
    return next(found, STEM)


def _untied(folder: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a model of transformers with each under the one name that is read."""
    for name in _UNREAD:
        tensors.pop(name, None)
    if _stem(folder) == _OF_TRANSFORMERS:
        for name in _TIED.keys() & tensors.keys():
            tensors.setdefault(_TIED[name], tensors[name])
            del tensors[name]
        for name in [name for name in tensors if name.startswith(_BARE)]:
            tensors[f"{_CLIP}{name}"] = _Renamed(**vars(tensors.pop(name)))
    return tensors


def _index(folder: Path) -> Mapping[str, str] | None:
    """Return tensor name to file name, or None where the checkpoint is one file."""
    index, whole = _index_of(folder), folder / f"{_stem(folder)}.safetensors"
    if not index.exists():
        return None
    try:
        shards = strings_by_name(load_json(index).get("weight_map"), "weight_map")
    except TypeError as error:
        raise BadCheckpoint(f"{index} is not an index of safetensors files ({error}); copy it again") from None
    if not shards:
        raise BadCheckpoint(f"{index} has an empty weight_map; copy it again")
    if outside := next((name for name in shards.values() if Path(name).name != name or "\\" in name), None):
        raise BadCheckpoint(f"{index} speaks of {outside!r}; expected the name of a file beside it: copy it again")
    if whole.is_file() and whole.name not in shards.values():
        raise BadCheckpoint(f"{index} does not speak of {whole.name}, which lies beside it; remove one of them")
    return shards


def _refuse_other_weights(folder: Path) -> None:
    """Refuse a folder that has weights, but in other files than the ones that are read.

    Raises:
        BadCheckpoint: naming one of them.
    """
    others = [file for kind in _OTHER_WEIGHTS for file in sorted(folder.glob(f"*.{kind}")) if file.is_file()]
    if not others:
        return
    file = others[0]
    if kind := what_it_is(file):
        what = kind
    elif file.suffix == ".safetensors":
        what = f"is not the name that is read: copy or link it as {STEM}.safetensors, shards with their index"
    else:
        what = "is not safetensors: save the model with save_pretrained(safe_serialization=True)"
    raise BadCheckpoint(f"{folder} has no {STEM}.safetensors, and its {file.name} {what}")
