"""Tensors that LoRA files change, made whole when they are read."""

from __future__ import annotations

import functools
import importlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.errors import BadLora
from fp4trt.families import family_of
from fp4trt.made_tensors import MadeTensor
from fp4trt.safetensors_file import StoredTensor, bytes_of
from fp4trt.source_folder import Lora, Source

__all__ = ["Fused", "fused", "named", "with_loras"]

_KEPT: Final = 8
"""Tensors that are held, because they are made whole and read in pieces."""


@dataclass(frozen=True)
class Fused:
    """What a source's LoRAs do to it.

    Attributes:
        makers: name of each tensor that they change to what makes it.
        left_out: what of their keys is left out, to the number of these.
    """

    makers: Mapping[str, Callable[[], Any]]
    left_out: Mapping[str, int]


def fused(source: Source, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Fused:
    """Read a source's LoRAs against its model.

    Raises:
        BadLora: a file is damaged, or is another model's.
    """
    reading, fusing = map(importlib.import_module, ("calibration.lora.reading", "calibration.lora.fusing"))  # torch's
    family = family_of(config)
    files = [(reading.read_lora(lora.path, family, config), lora.strength) for lora in source.loras]
    left_out: Counter[str] = Counter()
    for file, _ in files:
        left_out.update(file.left_out)
    return Fused(fusing.fused_tensors(tensors, files, family), left_out)


def with_loras(
    source: Source, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Mapping[str, StoredTensor]:
    """Return a source's tensors with what its LoRAs change."""
    found, held = dict(tensors), _Held(named(source.loras))
    for name, make in fused(source, tensors, config).makers.items():
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
