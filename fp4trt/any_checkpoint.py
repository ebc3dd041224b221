"""Any producer's checkpoint on disk, a folder or a single file: its config, its headers, and where its tensors lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp4trt.built_in import path_of
from fp4trt.checkpoint_folder import STEM, metadata_in_folder, tensors_in_folder
from fp4trt.errors import UnknownArtifact
from fp4trt.file_kind import what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import transformer_folder
from fp4trt.safetensors_file import StoredTensor, metadata_in_file, tensors_in_file

__all__ = ["OpenCheckpoint", "open_checkpoint"]

_WHOLE: Final = f"{STEM}.safetensors"


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint on disk: `config` is empty where there is none, `metadata` that of all its headers."""

    path: Path
    config: dict[str, Any]
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def open_checkpoint(artifact: str | Path) -> OpenCheckpoint:
    """Open a folder of diffusers, a pipeline's, any folder of safetensors files, one such file, or `digits`.

    Raises:
        UnknownArtifact: it is none of these, or damaged.
    """
    path = path_of(artifact)
    if path.is_file():
        tensors = tensors_in_file(path)  # which says if the file is damaged
        return OpenCheckpoint(path, {}, metadata_in_file(path), tensors)
    if not path.is_dir():
        raise UnknownArtifact(f"{path} {what_it_lacks(path)}; expected a checkpoint's folder or a .safetensors file")
    if not any((path / name).is_file() for name in (_WHOLE, f"{_WHOLE}.index.json")):
        path = transformer_folder(path)  # single files may lie beside it
    config = load_json(path / "config.json") if (path / "config.json").is_file() else {}
    return OpenCheckpoint(path, config, *_in_folder(path))


def _in_folder(folder: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    if any((folder / name).is_file() for name in (_WHOLE, f"{_WHOLE}.index.json")):
        tensors = tensors_in_folder(folder)
        return metadata_in_folder(folder), tensors
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UnknownArtifact(f"{folder} holds no .safetensors file; expected a checkpoint's folder")
    metadata: dict[str, str] = {}
    tensors = {}
    for file in files:
        for name, tensor in tensors_in_file(file).items():
            if name in tensors:
                raise UnknownArtifact(f"{name} is both in {tensors[name].file.name} and in {file.name}; name one file")
            tensors[name] = tensor
        metadata |= metadata_in_file(file)
    return metadata, tensors
