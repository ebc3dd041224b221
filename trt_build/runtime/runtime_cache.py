"""TensorRT-RTX's runtime cache on disk: the kernels that it compiled for this card, so that the next start is quick.

The file is ours: one line that names engine, version and GPU, then TensorRT's bytes, which it checks against its own
version, driver and GPU. A file of another engine, or one that TensorRT refuses, is thrown away. It is written beside
its place and renamed, so that two processes may share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any, Final

from fp4trt.make_source import cache_folder
from fp4trt.progress import note

__all__ = ["RuntimeCache", "cache_path"]

_MAGIC: Final = "fp4trt runtime cache 1"


def cache_path(identity: str, compute_capability: str) -> Path:
    """Return where the cache of an engine lies that was given no other place: in FP4TRT_CACHE, by hash."""
    return cache_folder() / "runtime" / f"{identity[:24]}-{compute_capability.lower()}.cache"


class RuntimeCache:
    """The cache of one engine.

    Args:
        path: of the file.
        identity: the engine's hash.
        version: TensorRT's.
        gpu: the name of the card.
        config: an ``IRuntimeConfig``, which gets what the file holds.

    Attributes:
        was_used: whether the file held kernels that TensorRT took.
    """

    def __init__(self, path: Path, identity: str, version: str, gpu: str, config: Any) -> None:
        self.path = path
        self._line = f"{_MAGIC} {identity} {version} {gpu}\n".encode()
        self._cache: Any = config.create_runtime_cache()
        stored = self._stored()
        self.was_used = bool(stored) and bool(self._cache.deserialize(stored))
        self._written = hashlib.sha256(stored).digest() if self.was_used else b""
        if stored and not self.was_used:
            note(f"the runtime cache {path} is of another driver or version; it is made anew")
            with contextlib.suppress(OSError):
                path.unlink()
        config.set_runtime_cache(self._cache)

    def _stored(self) -> bytes:
        """Return TensorRT's bytes; nothing where there is no file, or one of another engine."""
        try:
            content = self.path.read_bytes()
        except OSError:
            return b""
        if content.startswith(self._line):
            return content[len(self._line) :]
        if content.startswith(_MAGIC.encode()):
            with contextlib.suppress(OSError):
                self.path.unlink()
        return b""

    def save(self) -> None:
        """Write what TensorRT has compiled so far, if that has changed; without room on the disk, say so."""
        if self.path.exists() and not self._is_ours():
            note(f"{self.path} is no runtime cache of fp4trt's and is kept; name another file")
            return
        content = bytes(self._cache.serialize()) if self._cache is not None else b""
        if not content or hashlib.sha256(content).digest() == self._written:
            return
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(self._line + content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            self._written = hashlib.sha256(content).digest()
        except OSError as error:
            note(f"the runtime cache {self.path} cannot be written ({error.strerror}): kernels will be compiled again")
            with contextlib.suppress(OSError):
                partial.unlink()

    def release(self) -> None:
        """Let go of TensorRT's object; after this nothing is saved."""
        self._cache = None

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError), self.path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC.encode()
        return False
