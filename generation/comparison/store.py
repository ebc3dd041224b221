"""What a comparison has finished, on disk: the reference's batches, and what each checkpoint drew of each seed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from calibration.inputs.captured import Inputs
from fp4trt.errors import BadCheckpoint
from fp4trt.safetensors_file import DTYPE_BYTES, bytes_of, plan_of, tensors_in_file, write
from generation.comparison.drawing import Batch, Drawn

__all__ = ["Store"]

_IMAGES: Final = "images"
_VELOCITY: Final = "velocity"
_DRAWN: Final = (_IMAGES, "squared_error", "squared_norm", "times")


@dataclass(frozen=True)
class Store:
    """A folder of finished work; a file has its name only once it is whole and on disk."""

    folder: Path

    def keep_batch(self, seed: int, index: int, batch: Batch) -> None:
        """Write one batch of the reference; an input that is the same in all calls, as the text's is, once."""
        tensors = {_IMAGES: batch.images}
        for number, (call, velocity) in enumerate(zip(batch.calls, batch.velocities, strict=True)):
            first = {} if number == 0 else batch.calls[0]
            new = {name: value for name, value in call.items() if name not in first or _differ(value, first[name])}
            tensors |= {f"{number:04d}.{name}": value for name, value in {**new, _VELOCITY: velocity}.items()}
        self._write(self._batch_file(seed, index), tensors)

    def batches(self, seed: int, count: int) -> Iterator[Batch]:
        """Read the reference's batches of a seed, one at a time."""
        for index in range(count):
            stored = tensors_in_file(self._batch_file(seed, index))
            images = stored.pop(_IMAGES).tensor()
            calls: dict[str, Inputs] = {}
            for name in sorted(stored):
                number, _, key = name.partition(".")
                calls.setdefault(number, {})[key] = stored[name].tensor()
            velocities = [call.pop(_VELOCITY) for call in calls.values()]
            first = next(iter(calls.values()))
            yield Batch(images, [{**first, **call} for call in calls.values()], velocities)

    def reference_images(self, seed: int, count: int) -> torch.Tensor:
        """Read the images alone of the reference's batches of a seed."""
        files = [self._batch_file(seed, index) for index in range(count)]
        return torch.cat([tensors_in_file(file)[_IMAGES].tensor() for file in files])

    def has_batch(self, seed: int, index: int) -> bool:
        """Whether this batch of the reference is there."""
        return _is_whole(self._batch_file(seed, index))

    def keep(self, key: str, seed: int, drawn: Drawn) -> None:
        """Write what the checkpoint of this key drew of a seed."""
        self._write(self._file(key, seed), {name: getattr(drawn, name) for name in _DRAWN})

    def drawn(self, key: str, seed: int) -> Drawn:
        """Read what the checkpoint of this key drew of a seed."""
        return Drawn(**{name: stored.tensor() for name, stored in tensors_in_file(self._file(key, seed)).items()})

    def has(self, key: str, seed: int) -> bool:
        """Whether that is there."""
        return _is_whole(self._file(key, seed))

    def _batch_file(self, seed: int, index: int) -> Path:
        return self.folder / f"reference-{seed}-{index:05d}.safetensors"

    def _file(self, key: str, seed: int) -> Path:
        return self.folder / f"{key}-{seed}.safetensors"

    def _write(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        plan = [plan_of(name, value) for name, value in tensors.items()]
        plan.sort(key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name))
        write(partial, plan, ((each.name, bytes_of(tensors[each.name])) for each in plan), {})
        os.replace(partial, file)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype != other.dtype or not torch.equal(one, other)


def _is_whole(file: Path) -> bool:
    """Whether a file is there and as long as its header says; a power failure may leave another."""
    try:
        return bool(tensors_in_file(file))
    except BadCheckpoint:
        return False
