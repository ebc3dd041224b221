"""Tensors that LoRA files change, made whole when they are read."""

from __future__ import annotations

import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.families import family_of
from fp4trt.made_tensors import MadeTensor
from fp4trt.safetensors_file import StoredTensor, bytes_of
from fp4trt.source_folder import Source

__all__ = ["changed_by", "with_loras"]

_KEPT: Final = 8
"""Tensors that are held, because they are made whole and read in pieces."""


def changed_by(source: Source, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return name to what makes each tensor that a source's LoRAs change.

    Raises:
        BadLora: a file is damaged, or is another model's.
    """
    fusing = importlib.import_module("calibration.lora.fusing")  # with torch
    pairs = [(lora.path, lora.strength) for lora in source.loras]
    made: Mapping[str, Any] = fusing.lora_tensors(tensors, pairs, family_of(config), config)
    return made


def with_loras(
    source: Source, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """Return a source's tensors with what its LoRAs change."""
    changed, found, held = changed_by(source, tensors, config), dict(tensors), _Held()
    for name, make in changed.items():
        stored = found[name]
        rows = functools.partial(held.rows, name, make, stored.shape[0] if stored.shape else 1)
        found[name] = MadeTensor.of(stored, "BF16", stored.shape, rows)
    return found


class _Held:
    """The last tensors that were made, for the pieces in which they are read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()

    def rows(self, name: str, make: Callable[[], Any], count: int, first: int, last: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            if name not in self._made:
                self._made[name] = bytes_of(make()).reshape(count, -1)
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(name)
            return self._made[name][first:last].reshape(-1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process make them anew."""
        return _Held, ()
