"""What a safetensors file holds, read from its header alone.

Eight bytes of little-endian length, that many bytes of JSON (name to dtype, shape and data_offsets), then the
data. Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import UnknownArtifact
from fp4trt.file_kind import what_it_is, what_it_lacks
from fp4trt.json_file import object_of, read_object, strings_by_name

__all__ = ["HeldTensor", "metadata_in_file", "metadata_in_folder", "tensors_in_file", "tensors_in_folder"]

_STEM: Final = "diffusion_pytorch_model"
_LONGEST_HEADER: Final = 100_000_000
_BITS: Final = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class HeldTensor:
    """A tensor of a safetensors `file`: `dtype` by its name there, such as F8_E4M3; `offset` from the file's begin."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    file: Path

    def bytes(self) -> bytes:
        """Read its data."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)


def tensors_in_folder(folder: Path) -> dict[str, HeldTensor]:
    """Return the tensors of a diffusers folder, sharded or not.

    Raises:
        UnknownArtifact: a file is missing, damaged, shorter than its header says, or no safetensors file; or the index
            of a sharded folder is not that of the files beside it.
    """
    whole = folder / f"{_STEM}.safetensors"
    index = folder / f"{_STEM}.safetensors.index.json"
    if index.is_file():
        try:
            shards = strings_by_name(read_object(index).get("weight_map"), "weight_map")
        except TypeError as error:
            raise UnknownArtifact(f"{index} is not an index of safetensors files ({error}); copy it again") from None
        if not shards:
            raise UnknownArtifact(f"{index} speaks of no tensor; copy it again")
        tensors = _tensors_in_shards(index, shards)
        if whole.is_file() and whole.name not in shards.values():
            raise UnknownArtifact(f"{index} does not speak of {whole.name}, which lies beside it; remove one of them")
        return tensors
    return tensors_in_file(whole)


def _tensors_in_shards(index: Path, shards: Mapping[str, str]) -> dict[str, HeldTensor]:
    """Return the tensors of the files that an index names, each in the file where the index has it."""
    tensors = {}
    for file in (_shard(index, name) for name in sorted(set(shards.values()))):
        for name, tensor in tensors_in_file(file).items():
            if shards.get(name) != file.name:
                place = f"in {shards[name]}" if name in shards else "nowhere"
                raise UnknownArtifact(f"{index} has {name} {place}, but {file.name} holds it; copy the shards again")
            tensors[name] = tensor
    absent = next((name for name in shards if name not in tensors), None)
    if absent is not None:
        raise UnknownArtifact(f"{index} speaks of {absent}, which no shard holds; copy the shards again")
    return tensors


def _shard(index: Path, name: str) -> Path:
    if Path(name).name != name or "\\" in name:
        raise UnknownArtifact(f"{index} speaks of {name!r}; expected the name of a file beside it: copy it again")
    return index.with_name(name)


def tensors_in_file(path: Path) -> dict[str, HeldTensor]:
    """Return the tensors of one safetensors file.

    Raises:
        UnknownArtifact: the file is missing, damaged, shorter than its header says, or no safetensors file.
    """
    if not path.is_file():
        raise UnknownArtifact(f"{path} {what_it_lacks(path)}; expected the weights of a diffusers checkpoint there")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else _LONGEST_HEADER
        if length >= _LONGEST_HEADER or 8 + length > size:
            kind = what_it_is(path) or f"is not a safetensors file ({size} bytes); copy it again"
            raise UnknownArtifact(f"{path} {kind}")
        try:
            entries = object_of(json.loads(file.read(length)), "it")
            named = {name: entry for name, entry in entries.items() if name != "__metadata__"}
            return {name: _held(path, entry, 8 + length, size) for name, entry in named.items()}
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UnknownArtifact(f"{path} has a damaged safetensors header ({error}); copy it again") from None
        except EOFError as error:
            raise UnknownArtifact(f"{path} is cut short: {error}; copy it again") from None


def metadata_in_file(path: Path) -> dict[str, str]:
    """Return the `__metadata__` of a file that :func:`tensors_in_file` reads, empty without one.

    Raises:
        UnknownArtifact: it is not an object of strings.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    try:
        return strings_by_name(header.get("__metadata__") or {}, "__metadata__")
    except TypeError as error:
        raise UnknownArtifact(f"{path} has a damaged safetensors header ({error}); copy it again") from None


def metadata_in_folder(folder: Path) -> dict[str, str]:
    """Return the `__metadata__` of all files of a folder that :func:`tensors_in_folder` reads, as one."""
    index = folder / f"{_STEM}.safetensors.index.json"
    names = set(read_object(index)["weight_map"].values()) if index.is_file() else {f"{_STEM}.safetensors"}
    return {key: value for name in sorted(names) for key, value in metadata_in_file(folder / name).items()}


def _held(file: Path, entry: Any, start: int, size: int) -> HeldTensor:
    """Return what a header says of one tensor; the file's data begin at byte `start` and end at `size`."""
    begin, end = (int(n) for n in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
    bits = _BITS.get(dtype)
    if (
        not 0 <= begin <= end
        or min(shape, default=0) < 0
        or (bits is not None and math.prod(shape) * bits != 8 * (end - begin))
    ):
        raise ValueError(f"bytes {begin} to {end} for {dtype} {list(shape)}")
    if start + end > size:
        raise EOFError(f"it holds {size - start} bytes of data, its header speaks of {end}")
    return HeldTensor(dtype, shape, end - begin, start + begin, file)
