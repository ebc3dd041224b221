"""Text embeddings on disk, under the hash of all that decides about them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fp4trt.make_source import cache_folder
from fp4trt.progress import note_once

__all__ = ["EmbeddingCache", "identity_of_files"]

_FORMAT: Final = "fp4trt embeddings 1"
_SAMPLED: Final = 1 << 16
"""Bytes of both ends of a file that its identity is of."""


def identity_of_files(root: Path, parts: Sequence[str]) -> str:
    """Return what tells the files of a pipeline's parts from others, without reading them whole.

    That is a SHA-256 over name, size, time of the last change, and both ends of each file.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        for path in sorted(path for path in (root / part).rglob("*") if path.is_file()):
            status = path.stat()
            digest.update(f"{path.relative_to(root).as_posix()} {status.st_size} {status.st_mtime_ns}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED))
                file.seek(max(0, status.st_size - _SAMPLED))
                digest.update(file.read(_SAMPLED))
    return digest.hexdigest()


class EmbeddingCache:
    """What text encoders made of prompts: in memory, and on disk as safetensors where a folder is given.

    Args:
        encoders: what identifies them.
        on_disk: whether to keep it for later runs, in ``embeddings`` of the cache's folder.
    """

    def __init__(self, encoders: Mapping[str, str], on_disk: bool) -> None:
        self._encoders = dict(encoders)
        self._folder = cache_folder() / "embeddings" if on_disk else None
        self._held: dict[str, Any] = {}
        self.taken = 0

    def key(self, arguments: Mapping[str, Any]) -> str:
        """Return the hash of a call of the encoders."""
        described = {"encoders": self._encoders, "call": {name: _described(value) for name, value in arguments.items()}}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def get(self, key: str, device: torch.device) -> Any:
        """Return what is known of a call; None where nothing is. What a file lacks, or is damaged in, is not known."""
        if key in self._held:
            return self._held[key]
        path = None if self._folder is None else self._folder / f"{key}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                found = _rebuilt(json.loads(file.metadata()["value"]), tensors)
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError):
            note_once(f"warning: {path} is damaged; its text embeddings are computed again")
            return None
        note_once(f"text embeddings are taken from the cache, {self._folder}")
        self.taken += 1
        self._held[key] = found
        return found

    def put(self, key: str, value: Any) -> None:
        """Keep what a call gave."""
        self._held[key] = value
        if self._folder is None:
            return
        tensors: dict[str, torch.Tensor] = {}
        structure = _taken_apart(value, tensors)
        path = self._folder / f"{key}.safetensors"
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, beside, {"format": _FORMAT, "value": json.dumps(structure)})
            os.replace(beside, path)
        except OSError as error:
            note_once(f"warning: text embeddings are not kept: {self._folder} cannot be written to ({error.strerror})")
        finally:
            beside.unlink(missing_ok=True)


def _described(value: Any) -> Any:
    """Return an argument of a call as JSON: tensors and pictures by their hashes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(torch.uint8) if value.ndim else value.detach().cpu().float()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(data.numpy().tobytes()).hexdigest()]
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _described(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture
        return [
            "picture",
            str(getattr(value, "mode", "")),
            list(value.size),
            hashlib.sha256(value.tobytes()).hexdigest(),
        ]
    return [type(value).__name__, str(value)]


def _taken_apart(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON, its tensors by name beside it."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):03d}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_taken_apart(item, tensors) for item in value]}
    return {"value": value}


def _rebuilt(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what :func:`_taken_apart` took apart."""
    ((kind, value),) = described.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("list", "tuple"):
        items = [_rebuilt(item, tensors) for item in value]
        return items if kind == "list" else tuple(items)
    return value
