"""The first pass over a checkpoint: each byte is read once, hashed, checked, and the largest weights are noted."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.bfloat16 import as_bits, largest_magnitude, refuse_other_types
from calibration.errors import BadCheckpoint
from calibration.in_order import in_order
from calibration.safetensors_file import read_header, sha256_of
from calibration.source import files_of

__all__ = ["Survey", "survey"]


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Attributes:
        sha256: name of each file of the source, config.json included, to its hash.
        amax: name of each wanted tensor to its largest magnitude in BF16.
    """

    sha256: dict[str, str]
    amax: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it; ``Survey(**d)`` undoes this, because JSON keeps every float."""
        return {"sha256": self.sha256, "amax": self.amax}


def survey(folder: Path, wanted: Collection[str], progress: Callable[[int], object]) -> Survey:
    """Read a plain checkpoint from beginning to end, several files at a time, a few MiB of each in memory.

    Args:
        folder: the checkpoint.
        wanted: tensors whose largest magnitude is asked for.
        progress: told of every so many bytes that were read.

    Raises:
        BadCheckpoint: a tensor holds NaN or infinite values, or is no floating-point number; the first by name.
    """
    files = files_of(folder)
    results = list(in_order(functools.partial(_survey_file, file, progress) for file in files))
    amax = {name: value for _, largest in results for name, value in largest.items()}
    for name in sorted(amax):
        if amax[name] is None:
            raise BadCheckpoint(f"{folder}: {name} holds NaN or infinite values; expected finite weights")
    hashes = {file.name: digest for file, (digest, _) in zip(files, results, strict=True)}
    known = {name: value for name, value in amax.items() if name in wanted and value is not None}
    return Survey({"config.json": sha256_of(folder / "config.json"), **hashes}, known)


def _survey_file(file: Path, progress: Callable[[int], object]) -> tuple[str, dict[str, float | None]]:
    """Return a file's hash, and each tensor's largest magnitude, None where it is not finite."""
    digest, position = hashlib.sha256(), 0
    amax: dict[str, float | None] = {}
    for name, stored in sorted(read_header(file).items(), key=lambda item: item[1].offset):
        refuse_other_types(name, stored)
        if stored.offset < position:
            raise BadCheckpoint(f"{file}: {name} overlaps the tensor before it; copy the file again")
        digest.update(_between(file, position, stored.offset))
        largest: list[float | None] = [0.0]
        for data in stored.pieces():
            digest.update(data.data)
            largest.append(largest_magnitude(as_bits(data, stored.dtype)))
            progress(data.nbytes)
        amax[name] = None if None in largest else max(value for value in largest if value is not None)
        position = stored.offset + stored.nbytes
    digest.update(_between(file, position, file.stat().st_size))
    return digest.hexdigest(), amax


def _between(file: Path, begin: int, end: int) -> bytes:
    """Return the bytes of a file that belong to no tensor: its header, and gaps."""
    with file.open("rb") as opened:
        opened.seek(begin)
        return opened.read(end - begin)
