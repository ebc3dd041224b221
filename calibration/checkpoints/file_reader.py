"""Read a file of a plain checkpoint from beginning to end: hashed, checked, and the largest weights noted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from calibration.formats.bfloat16 import as_bits, largest_magnitude, refuse_other_types, why_unusable
from fp4trt.errors import BadCheckpoint
from fp4trt.safetensors_file import read_header

__all__ = ["FileReader"]


class FileReader:
    """Reads a file tensor by tensor, a piece of it in memory at a time.

    Args:
        file: safetensors.
        progress: told of every so many bytes that were read.

    Attributes:
        sha256: hash of the whole file, once :meth:`advance` has come to its end.
    """

    def __init__(self, file: Path, progress: Callable[[int], object]) -> None:
        self.file = file
        self.sha256 = ""
        self._tensors = iter(sorted(read_header(file).items(), key=lambda item: item[1].offset))
        self._digest, self._position, self._progress = hashlib.sha256(), 0, progress

    def advance(self) -> tuple[str, float] | None:
        """Read the next tensor; return its name and its largest magnitude in BF16, or None at the end.

        Raises:
            BadCheckpoint: it holds what BF16 cannot, is no floating-point number, or overlaps the one before.
        """
        name, stored = next(self._tensors, ("", None))
        if stored is None:
            self._skip_to(self.file.stat().st_size)
            self.sha256 = self._digest.hexdigest()
            return None
        refuse_other_types(f"{self.file}: {name}", stored)
        if stored.offset < self._position:
            raise BadCheckpoint(f"{self.file}: {name} overlaps the tensor before it; copy the file again")
        self._skip_to(stored.offset)
        largest = 0.0
        for piece in stored.pieces():
            self._digest.update(piece.data)
            found = largest_magnitude(as_bits(piece, stored.dtype))
            if found is None:
                raise BadCheckpoint(f"{self.file}: {name} {why_unusable(stored)}")
            largest = max(largest, found)
            self._progress(piece.nbytes)
        self._position += stored.nbytes
        return name, largest

    def _skip_to(self, offset: int) -> None:
        """Hash the bytes up to there that belong to no tensor: the header, and gaps."""
        with self.file.open("rb") as opened:
            opened.seek(self._position)
            self._digest.update(opened.read(offset - self._position))
        self._position = offset
