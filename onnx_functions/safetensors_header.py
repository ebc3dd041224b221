"""What a safetensors file holds, read from its header alone.

Eight bytes of little-endian length, that many bytes of JSON (name to dtype, shape and data_offsets), then the
data. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from onnx_functions.errors import UnknownArtifact

__all__ = ["HeldTensor", "tensors_in_folder"]

_STEM: Final = "diffusion_pytorch_model"
_LONGEST_HEADER: Final = 100_000_000


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of a safetensors file; `dtype` by its safetensors name, such as F8_E4M3."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def tensors_in_folder(folder: Path) -> dict[str, HeldTensor]:
    """Return the tensors of a diffusers folder, sharded or not.

    Raises:
        UnknownArtifact: a file is missing or no safetensors file.
    """
    index = folder / f"{_STEM}.safetensors.index.json"
    files = [folder / f"{_STEM}.safetensors"]
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
        files = [folder / name for name in sorted(set(shards))]
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _header(path: Path) -> dict[str, HeldTensor]:
    if not path.is_file():
        raise UnknownArtifact(f"{path} does not exist; expected the weights of a diffusers checkpoint there")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LONGEST_HEADER
        if length >= _LONGEST_HEADER or 8 + length > size:
            raise UnknownArtifact(f"{path} is no safetensors file ({size} bytes); copy it again")
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
            return {name: _held(entry) for name, entry in entries.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnknownArtifact(f"{path} has a damaged safetensors header ({error}); copy it again") from None


def _held(entry: dict[str, Any]) -> HeldTensor:
    begin, end = entry["data_offsets"]
    return HeldTensor(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]), int(end) - int(begin))
