"""A small folder that stands for a single file as a checkpoint of diffusers, so that every step takes it as one.

It holds the model's config.json and :data:`SOURCE`, which says where the file lies; no weights. The tensors are read,
and those that need it made, from the file itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.built_in import path_of
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import index_of, transformer_folder
from fp4trt.progress import note
from fp4trt.safetensors_file import StoredTensor
from fp4trt.single_files.opening import config_like, open_file

__all__ = ["SOURCE", "cache_folder", "file_behind", "folder_for_file", "folder_of", "stands_in", "tensors_behind"]

SOURCE: Final = "fp4trt-source.json"
"""What tells such a folder."""

_FORMAT: Final = 1


def cache_folder() -> Path:
    """Return where fp4trt keeps what it can make again: ``$FP4TRT_CACHE``, else ``fp4trt`` in the user's cache."""
    if given := os.environ.get("FP4TRT_CACHE"):
        return Path(given)
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(local) if local else Path.home() / ".cache") / "fp4trt"


def folder_for_file(file: Path, like: str | Path | None = None) -> Path:
    """Return the folder that stands for a single file, and say how the file is read.

    Args:
        file: safetensors or GGUF.
        like: what :func:`fp4trt.single_files.opening.config_like` takes; None finds the config by the shapes.

    Raises:
        BadCheckpoint, UnknownFamily: the file is damaged, quantized, of no known model, or not of this config.
    """
    opened = open_file(file, None if like is None else config_like(like))
    described = {"format": _FORMAT, "file": str(file.resolve()), **_identity(file), **_beside(like)}
    texts = {"config.json": opened.config, SOURCE: described}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / "sources" / f"{file.stem}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in texts.items():
        beside = folder / f"{name}.{os.getpid()}"
        beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, folder / name)
    note(f"{file.name}: {opened.config['_class_name']} under {opened.described}")
    return folder


def _beside(like: str | Path | None) -> dict[str, str]:
    """Return the transformer's folder that the config is from, where that lies in a pipeline."""
    if like is None:
        return {}
    places = (Path(like) / "transformer", Path(like), Path(like).parent)
    found = [each for each in places if (each / "config.json").is_file() and index_of(each.parent) is not None]
    return {"in_place_of": str(found[0].resolve())} if found else {}


def stands_in(folder: Path) -> Path:
    """Return the folder in a pipeline in whose place a single file is taken; any other folder as it is."""
    if file_behind(folder) is None:
        return folder
    return Path(load_json(folder / SOURCE).get("in_place_of", folder))


def folder_of(artifact: str | Path) -> Path:
    """Return the folder of a transformer: a folder, that in a pipeline's, or one that stands for a single file.

    Raises:
        BadCheckpoint: it is a pipeline's without a transformer, or as :func:`folder_for_file`.
    """
    path = path_of(artifact)
    return folder_for_file(path) if path.is_file() else transformer_folder(path)


def file_behind(folder: Path) -> Path | None:
    """Return the single file that a folder stands for, None where it is any other folder.

    Raises:
        BadCheckpoint: the file has changed since, or is gone.
    """
    if not (folder / SOURCE).is_file():
        return None
    described = load_json(folder / SOURCE)
    file = Path(str(described.get("file")))
    if not file.is_file() or {key: described.get(key) for key in ("bytes", "modified_ns")} != _identity(file):
        raise BadCheckpoint(f"{file}, for which {folder} stands, has changed or is gone; give the file itself again")
    return file


def tensors_behind(folder: Path, file: Path) -> Mapping[str, StoredTensor]:
    """Return where the tensors of diffusers lie in the file that a folder stands for."""
    return _opened(file, json.dumps(_config(folder), sort_keys=True), json.dumps(_identity(file)))


@functools.lru_cache(maxsize=2)
def _opened(file: Path, config: str, _identity: str) -> Mapping[str, StoredTensor]:
    return open_file(file, json.loads(config)).tensors


def _config(folder: Path) -> dict[str, Any]:
    return load_json(folder / "config.json")


def _identity(file: Path) -> dict[str, int]:
    stat = file.stat()
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}
