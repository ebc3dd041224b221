"""The files of a quantized checkpoint: what lies where is decided here, and filled in any order."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fp4trt.account import TensorHeader
from fp4trt.checkpoint_folder import STEM
from fp4trt.number_formats import FORMATS, NumberFormat
from fp4trt.safetensors_file import TensorPlan, is_reserved, naming, reserve, sha256_of

__all__ = [
    "INDEX",
    "METADATA",
    "SHARD_BYTES",
    "Groups",
    "Shard",
    "ShardFiles",
    "are_reserved",
    "index_of",
    "plan_shards",
    "results_of",
    "seal",
]

INDEX: Final = f"{STEM}.safetensors.index.json"

SHARD_BYTES: Final = 2_000_000_000
"""A shard is closed before it grows beyond this."""

METADATA: Final = {"format": "pt"}
"""What the headers of a checkpoint say of it."""

Groups = Sequence[Sequence[str]]
"""Module paths of the quantized linears, by shared input, in graph order."""


@dataclass(frozen=True)
class Shard:
    """One file: first 32- and 16-bit tensors, where it has any, then whole groups, codes before block scales."""

    name: str
    plan: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.plan)


def plan_shards(
    stored: Mapping[str, TensorHeader],
    groups: Groups,
    formats: Mapping[str, str],
    prepared: Mapping[str, TensorHeader] = MappingProxyType({}),
    kept: Container[str] = (),
    limit: int = SHARD_BYTES,
) -> list[Shard]:
    """Return the files to write: one, or more where a file would grow beyond ``limit`` bytes.

    Order of the bytes: 32-bit tensors, 16-bit tensors, then group by group in graph order the codes of its members and
    their block scales. So every offset is a multiple of the element size, and a merged group's codes are one span.

    Args:
        stored: name to tensor of the plain checkpoint.
        groups: the quantized linears that read the same input.
        formats: module path of each of them to its format.
        prepared: tensors of the result that are made already, in the place of what would be made of ``stored``, or
            beside it.
        kept: those of ``stored`` that stay in FP32; all others that are not quantized are in BF16.
        limit: in bytes.
    """
    quantized = {f"{path}.weight" for group in groups for path in group}
    wide: dict[str, tuple[str, tuple[int, ...]]]
    paths = [path for group in groups for path in group]
    wide = {
        f"{path}.{leaf}": ("F32", ())
        for kind in FORMATS.values()
        for leaf in kind.scalars
        for path in paths
        if formats[path] == kind.name
    }
    plans = [_group_plan(stored, group, FORMATS[formats[group[0]]]) for group in groups]
    packed = {tensor.name for plan in plans for tensor in plan}
    others = {
        name: ("F32" if name in kept else "BF16", tensor.shape)
        for name, tensor in stored.items()
        if name not in quantized
    }
    others |= {name: (tensor.dtype, tensor.shape) for name, tensor in prepared.items() if name not in packed}
    wide |= {name: one for name, one in others.items() if one[0] == "F32"}
    narrow = {name: one for name, one in others.items() if one[0] != "F32"}
    parts = [[TensorPlan(name, dtype, shape) for name, (dtype, shape) in (*wide.items(), *narrow.items())]]
    for plan in plans:
        if sum(tensor.nbytes for tensor in (*parts[-1], *plan)) > limit:
            parts.append([])
        parts[-1].extend(plan)
    count = len(parts)
    names = [
        f"{STEM}-{i:05d}-of-{count:05d}.safetensors" if count > 1 else f"{STEM}.safetensors"
        for i in range(1, count + 1)
    ]
    return [Shard(name, tuple(plan)) for name, plan in zip(names, parts, strict=True)]


def _group_plan(stored: Mapping[str, TensorHeader], group: Sequence[str], kind: NumberFormat) -> list[TensorPlan]:
    """Return the tensors of a group that are as large as its weights: codes, then block scales."""
    shapes = {path: stored[f"{path}.weight"].shape for path in group}
    codes = [TensorPlan(f"{path}.weight", kind.codes, kind.codes_shape(n, k)) for path, (n, k) in shapes.items()]
    return codes + [
        TensorPlan(f"{path}.{scale.leaf}", scale.dtype, scale.shape(n, k))
        for scale in kind.scales
        if scale.block is not None
        for path, (n, k) in shapes.items()
    ]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return what the index file of several shards holds, as diffusers reads it."""
    names = {tensor.name: shard.name for shard in shards for tensor in shard.plan}
    return {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": names}


def are_reserved(folder: Path, shards: Iterable[Shard]) -> bool:
    """Whether all files are in a folder as :class:`ShardFiles` made them: what is written in them can be relied on."""
    return all(is_reserved(folder / shard.name, shard.plan, METADATA) for shard in shards)


def results_of(
    names: Iterable[str], groups: Groups, formats: Mapping[str, str], prepared: Container[str] = ()
) -> list[str]:
    """Return what tensors of the plain checkpoint become: a quantized weight its codes and scales.

    A tensor that is prepared already is its own result.
    """
    quantized = {f"{path}.weight": path for group in groups for path in group if f"{path}.weight" not in prepared}

    def of(name: str) -> list[str]:
        path = quantized.get(name)
        if path is None:
            return [name]
        return [f"{path}.{leaf}" for leaf in ("weight", *FORMATS[formats[path]].leaves)]

    return [result for name in names for result in of(name)]


class ShardFiles:
    """The files of a result, filled by several threads in any order.

    Args:
        folder: where.
        shards: of :func:`plan_shards`. Data that an earlier run wrote into them stay.
        written: those of their tensors that are there already.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], written: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._places: dict[str, tuple[Path, int]] = {}
        self._dtypes = {tensor.name: tensor.dtype for shard in shards for tensor in shard.plan}
        self._missing: dict[Path, int] = {}
        sizes: dict[str, int] = {}
        for shard in shards:
            path = folder / shard.name
            begins = reserve(path, shard.plan, METADATA)
            self._places |= {name: (path, begin) for name, begin in begins.items()}
            self._missing[path] = shard.nbytes
            sizes |= {tensor.name: tensor.nbytes for tensor in shard.plan}
        for name in written:
            self._missing[self._places[name][0]] -= sizes[name]

    def dtype(self, name: str) -> str:
        """Return the type that a tensor is stored in, by its safetensors name."""
        return self._dtypes[name]

    def put(self, name: str, begin: int, data: npt.NDArray[Any]) -> None:
        """Write some of a tensor.

        Args:
            name: of the tensor.
            begin: byte of the tensor that ``data`` start with.
            data: contiguous.
        """
        path, offset = self._places[name]
        with naming(path), path.open("r+b") as file:
            file.seek(offset + begin)
            file.write(data.reshape(-1).view(np.uint8).data)
        with self._lock:
            self._missing[path] -= data.nbytes

    def sync(self) -> None:
        """Bring to disk what has been written."""
        for path in self._missing:
            _sync(path)

    def missing(self) -> int:
        """Return how many bytes are still to be written."""
        with self._lock:
            return sum(self._missing.values())

    def whole(self) -> list[Path]:
        """Return the files that nothing is missing in."""
        with self._lock:
            return [path for path, missing in self._missing.items() if not missing]


def seal(path: Path) -> str:
    """Bring a whole file to disk and return its SHA-256."""
    digest = sha256_of(path)
    _sync(path)
    return digest


def _sync(path: Path) -> None:
    with naming(path), path.open("r+b") as file:
        os.fsync(file.fileno())
