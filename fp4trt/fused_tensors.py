"""Tensors that LoRA files change, made whole when they are read."""

from __future__ import annotations

import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadLora
from fp4trt.families import family_of
from fp4trt.made_tensors import MadeTensor
from fp4trt.safetensors_file import StoredTensor, bytes_of
from fp4trt.source_folder import Lora, Source

__all__ = ["changed_by", "left_out", "named", "with_loras"]

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


def left_out(source: Source, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the beginning of the LoRAs' keys that belong to no transformer, to their number."""
    reading = importlib.import_module("calibration.lora.reading")  # with torch
    counts: dict[str, int] = {}
    for lora in source.loras:
        for begin, count in reading.read_lora(lora.path, family_of(config), config).left_out.items():
            counts[begin] = counts.get(begin, 0) + count
    return counts


def with_loras(
    source: Source, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """Return a source's tensors with what its LoRAs change."""
    changed, found, held = changed_by(source, tensors, config), dict(tensors), _Held(named(source.loras))
    for name, make in changed.items():
        stored = found[name]
        rows = functools.partial(held.rows, name, make, stored.shape[0] if stored.shape else 1)
        found[name] = MadeTensor.of(stored, "BF16", stored.shape, rows)
    return found


def named(loras: Sequence[Lora]) -> str:
    """Return LoRAs with their strengths, in words."""
    return " and ".join(f"{lora.path.name} at {lora.strength:g}" for lora in loras)


class _Held:
    """The last tensors that were made, for the pieces in which they are read."""

    def __init__(self, loras: str) -> None:
        self._loras = loras
        self._lock = threading.Lock()
        self._made: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()

    def rows(self, name: str, make: Callable[[], Any], count: int, first: int, last: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            if name not in self._made:
                self._made[name] = bytes_of(self._finite(name, make())).reshape(count, -1)
                while len(self._made) > _KEPT:
                    self._made.popitem(last=False)
            self._made.move_to_end(name)
            return self._made[name][first:last].reshape(-1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process make them anew."""
        return _Held, (self._loras,)

    def _finite(self, name: str, value: Any) -> Any:
        if not value.isfinite().all():
            raise BadLora(f"{name} is no longer finite once {self._loras} is fused into it; give it less strength")
        return value
