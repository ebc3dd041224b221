"""Read a plain checkpoint once: every tensor is hashed and checked, and its amax noted, while it is at hand.

A file that is read from beginning to end is identified by its SHA-256. Where a model runs block by block, the tensors
are read in another order, and a file is identified by ``tensors-sha256:`` and the SHA-256 of a sequence of SHA-256
digests: that of the header, with the eight bytes of its length, then those of the tensors in file order.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch

from calibration.formats.bfloat16 import as_bits, as_fp32, largest_magnitude, refuse_other_types, why_unusable
from fp4trt.errors import BadCheckpoint
from fp4trt.safetensors_file import StoredTensor, hold

__all__ = ["FileReader", "ReadTensors", "TensorReader", "hash_of_tensors"]

_PIECE: Final = 1 << 20
_LONGEST_HEADER: Final = 100_000_000


class FileReader:
    """Reads a file tensor by tensor, a piece of it in memory at a time.

    Args:
        file: safetensors, or a single file of another kind.
        tensors: name to tensor, all that are to be read of the file.
        progress: called as bytes are read.

    Attributes:
        sha256: hash of the whole file, once :meth:`advance` has come to its end.
    """

    def __init__(self, file: Path, tensors: Mapping[str, StoredTensor], progress: Callable[[int], object]) -> None:
        self.file = file
        self.sha256 = ""
        self._tensors = iter(_in_file_order(file, tensors).items())
        self._digest, self._position, self._progress = hashlib.sha256(), 0, progress

    def advance(self) -> tuple[str, float] | None:
        """Read the next tensor; return its name and its largest magnitude in BF16, or None at the end.

        Raises:
            BadCheckpoint: it holds what BF16 cannot, or is not a floating-point number.
        """
        name, stored = next(self._tensors, ("", None))
        if stored is None:
            self._skip_to(self.file.stat().st_size)
            self.sha256 = self._digest.hexdigest()
            return None
        refuse_other_types(f"{self.file}: {name}", stored)
        self._skip_to(stored.offset if stored.is_as_in_file else stored.end)
        largest = 0.0
        for piece in stored.pieces():
            if stored.is_as_in_file:
                self._digest.update(piece.data)
            found = largest_magnitude(as_bits(piece, stored.dtype))
            if found is None:
                raise BadCheckpoint(f"{self.file}: {name} {why_unusable(stored)}")
            largest = max(largest, found)
            self._progress(piece.nbytes)
        self._position = max(self._position, stored.end)
        return name, largest

    def _skip_to(self, offset: int) -> None:
        """Hash the bytes up to there: the header, gaps, and what a tensor is made of that is not as it lies there."""
        with self.file.open("rb") as opened:
            opened.seek(self._position)
            while self._position < offset:
                piece = opened.read(min(_PIECE, offset - self._position))
                if not piece:
                    raise BadCheckpoint(f"{self.file} has become shorter while it was read; copy it again")
                self._digest.update(piece)
                self._position += len(piece)


@dataclass(frozen=True)
class ReadTensors:
    """Some tensors of a plain checkpoint, as they were read.

    Attributes:
        held: name to value, in BF16 or, of those that stay so, in FP32; of those that are wanted again.
        amax: name to the largest magnitude in BF16.
        sha256: name to the hash of the bytes.
    """

    held: Mapping[str, StoredTensor] = field(default_factory=dict)
    amax: Mapping[str, float] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)


class TensorReader:
    """Reads tensors in any order, each of them once, and holds them until they are taken: as BF16, or as FP32.

    Args:
        stored: name to tensor of a plain checkpoint.
        passed_on: names of tensors that only the caller needs: they are not held.
        changed: prefixes of names; of these tensors the caller gets copies, which it may change.
        wide: names of those that stay in FP32.
        forgets: let the system drop what was read from its cache.

    Raises:
        BadCheckpoint: two tensors overlap.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        passed_on: Container[str],
        changed: tuple[str, ...],
        wide: Container[str] = (),
        forgets: bool = False,
    ) -> None:
        self._stored, self._passed_on, self._changed, self._forgets = stored, passed_on, changed, forgets
        self._wide = wide
        self._held: dict[str, torch.Tensor] = {}
        self._amax: dict[str, float] = {}
        self._sha256: dict[str, str] = {}
        for file in {tensor.file for tensor in stored.values()}:
            _in_file_order(file, stored)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            BadCheckpoint: it holds what BF16 cannot, or is not a floating-point number.
        """
        stored = self._stored[name]
        refuse_other_types(f"{stored.file}: {name}", stored)
        data = stored.bytes()
        self._sha256[name] = hashlib.sha256(data.data).hexdigest()
        bits = as_bits(data, stored.dtype)
        largest = largest_magnitude(bits)
        if largest is None:
            raise BadCheckpoint(f"{stored.file}: {name} {why_unusable(stored)}")
        self._amax[name] = largest
        if self._forgets:
            stored.forget()
        wide = torch.from_numpy(as_fp32(data, stored.dtype)) if name in self._wide else None
        value = (torch.from_numpy(bits).view(torch.bfloat16) if wide is None else wide).reshape(stored.shape)
        if name in self._passed_on:
            return value
        self._held[name] = value
        return value.clone() if name.startswith(self._changed) else value

    def take(self, prefix: str = "") -> ReadTensors:
        """Return the tensors that were read and whose names begin so, and hold them no longer."""
        names = [name for name in self._amax if name.startswith(prefix)]
        held = {name: hold(name, self._held.pop(name)) for name in names if name in self._held}
        amax = {name: self._amax.pop(name) for name in names}
        return ReadTensors(held, amax, {name: self._sha256.pop(name) for name in names})


def hash_of_tensors(file: Path, stored: Mapping[str, StoredTensor], sha256: Mapping[str, str]) -> str:
    """Return ``tensors-sha256:...`` of a file from the hashes of its tensors.

    Args:
        file: whose header is hashed; of a GGUF file its first 8 bytes, and as many as they say.
        stored: name to tensor, of this file and of others.
        sha256: name to the hash of its bytes.
    """
    with file.open("rb") as opened:
        length = opened.read(8)
        count = min(struct.unpack("<Q", length)[0], _LONGEST_HEADER)
        digest = hashlib.sha256(hashlib.sha256(length + opened.read(count)).digest())
    for name in _in_file_order(file, stored):
        digest.update(bytes.fromhex(sha256[name]))
    return f"tensors-sha256:{digest.hexdigest()}"


def _in_file_order(file: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of a file in the order of their bytes.

    Raises:
        BadCheckpoint: two overlap.
    """
    here = {name: tensor for name, tensor in stored.items() if tensor.file == file}
    tensors = dict(sorted(here.items(), key=lambda item: (item[1].offset, item[0])))
    end = 0
    for name, tensor in tensors.items():
        if tensor.offset < end:
            raise BadCheckpoint(f"{file}: {name} overlaps the tensor before it; copy the file again")
        end = tensor.end
    return tensors
