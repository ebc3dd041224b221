"""Write the weights of a quantized checkpoint: each byte decided once, here, and none of it held for long."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from calibration import nvfp4
from calibration.bfloat16 import bits_of, pieces_of
from calibration.checkpoint import WEIGHTS
from calibration.in_order import in_order, workers
from calibration.packing import DevicePacker, Packer
from calibration.safetensors_file import DTYPE_BYTES, StoredTensor, TensorPlan, write

__all__ = ["INDEX", "SHARD_BYTES", "Groups", "Quantization", "Shard", "index_of", "plan_shards", "write_shard"]

INDEX: Final = f"{WEIGHTS}.index.json"

SHARD_BYTES: Final = 2_000_000_000
"""A shard is closed before it grows beyond this: what an interruption may cost."""

_PIECE: Final = 1 << 22
"""Weights that one job packs: 8 MiB in BF16."""

_WEIGHTS_PER_BYTE: Final = {"BF16": 0.5, "U8": 2}
"""Of the tensors that stand for weights of the plain checkpoint."""

MEMORY: Final = 4 * workers() * 6 * _PIECE
"""Bytes, about: pieces that are being packed or wait to be written, with what packing them needs."""

_GLOBAL_SCALES: Final = ("weight_scale_2", "input_scale")

Piece = tuple[str, npt.NDArray[np.uint8]]


Groups = Sequence[Sequence[str]]
"""Module paths of the quantized linears, by shared input, in graph order."""


@dataclass(frozen=True)
class Quantization:
    """What is to be written.

    Attributes:
        stored: name to tensor of the plain checkpoint, in the order in which 16-bit tensors are written.
        groups: the quantized linears.
        weight_amax: module path to the amax that its weight is quantized with.
        input_amax: likewise for its input.
        device: where to pack.
    """

    stored: Mapping[str, StoredTensor]
    groups: Groups
    weight_amax: Mapping[str, float]
    input_amax: Mapping[str, float]
    device: str = "cpu"

    def packer(self, amax: float) -> Packer | DevicePacker:
        """Return what packs a weight of that amax."""
        return Packer(_scale(amax)) if self.device == "cpu" else DevicePacker(_scale(amax), self.device)

    def global_scale(self, name: str) -> np.float32:
        """Return the FP32 scale that is stored under a name such as ``X.input_scale``."""
        path, _, kind = name.rpartition(".")
        return _scale((self.input_amax if kind == _GLOBAL_SCALES[1] else self.weight_amax)[path])


@dataclass(frozen=True)
class Shard:
    """One file: first 32- and 16-bit tensors, where it has any, then whole groups, codes before block scales."""

    name: str
    plan: tuple[TensorPlan, ...]
    groups: tuple[Sequence[str], ...]

    @property
    def nbytes(self) -> int:
        """Size of its tensors."""
        return sum(tensor.nbytes for tensor in self.plan)


def plan_shards(stored: Mapping[str, StoredTensor], groups: Groups, limit: int = SHARD_BYTES) -> list[Shard]:
    """Return the files to write: one, or more where a file would grow beyond ``limit`` bytes.

    Order of the bytes: 32-bit tensors, 16-bit tensors, then group by group in graph order the codes of its members and
    their block scales. So every offset is a multiple of the element size, and a merged group's codes are one span.
    """
    quantized = {f"{path}.weight" for group in groups for path in group}
    plain = [TensorPlan(f"{path}.{kind}", "F32", ()) for kind in _GLOBAL_SCALES for group in groups for path in group]
    plain += [TensorPlan(name, "BF16", tensor.shape) for name, tensor in stored.items() if name not in quantized]
    parts: list[tuple[list[TensorPlan], list[Sequence[str]]]] = [(plain, [])]
    for group in groups:
        plan = _group_plan(stored, group)
        if sum(tensor.nbytes for tensor in (*parts[-1][0], *plan)) > limit:
            parts.append(([], []))
        parts[-1][0].extend(plan)
        parts[-1][1].append(group)
    stem = WEIGHTS.removesuffix(".safetensors")
    names = [f"{stem}-{index:05d}-of-{len(parts):05d}.safetensors" for index in range(1, len(parts) + 1)]
    return [
        Shard(name if len(parts) > 1 else WEIGHTS, tuple(plan), tuple(groups))
        for name, (plan, groups) in zip(names, parts, strict=True)
    ]


def _group_plan(stored: Mapping[str, StoredTensor], group: Sequence[str]) -> list[TensorPlan]:
    shapes = {path: stored[f"{path}.weight"].shape for path in group}
    codes = [TensorPlan(f"{path}.weight", "U8", (n, k // 2)) for path, (n, k) in shapes.items()]
    block = nvfp4.BLOCK_SIZE
    return codes + [TensorPlan(f"{path}.weight_scale", "F8_E4M3", (n, k // block)) for path, (n, k) in shapes.items()]


def index_of(shards: Sequence[Shard]) -> dict[str, Any]:
    """Return what the index file of several shards holds, as diffusers reads it."""
    names = {tensor.name: shard.name for shard in shards for tensor in shard.plan}
    return {"metadata": {"total_size": sum(shard.nbytes for shard in shards)}, "weight_map": names}


def source_bytes(shard: Shard) -> int:
    """Return how many bytes, in BF16, the plain weights of a shard are: the unit of progress."""
    return sum(int(2 * _WEIGHTS_PER_BYTE.get(tensor.dtype, 0) * tensor.nbytes) for tensor in shard.plan)


def estimated_seconds(count: int) -> float:
    """Return about how long packing so many bytes in BF16 takes here, from packing a little."""
    bits = np.random.default_rng(0).integers(0x3800, 0x3F00, (256, 4096), np.uint16)
    packer = Packer(_scale(1.0))
    packer.pack(bits)
    start = time.perf_counter()
    packer.pack(bits)
    return count / bits.nbytes * (time.perf_counter() - start) / workers()


def write_shard(folder: Path, shard: Shard, quantization: Quantization, progress: Callable[[int], object]) -> str:
    """Write one file, beside its name and then renamed; return its SHA-256.

    Args:
        folder: where.
        shard: one of :func:`plan_shards`.
        quantization: what they were planned for.
        progress: told of every so many bytes of the plain checkpoint that are done with.
    """
    partial = folder / f"{shard.name}.partial"
    try:
        digest = write(partial, shard.plan, _pieces(shard, quantization, progress), {"format": "pt"})
        os.replace(partial, folder / shard.name)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def _pieces(shard: Shard, quantization: Quantization, progress: Callable[[int], object]) -> Iterator[Piece]:
    for tensor in shard.plan:
        if tensor.dtype == "F32":
            yield tensor.name, np.asarray(quantization.global_scale(tensor.name)).reshape(1).view(np.uint8)
        elif tensor.dtype == "BF16":
            for bits in pieces_of(quantization.stored[tensor.name]):
                yield tensor.name, bits.view(np.uint8)
                progress(bits.nbytes)
    packed = in_order(_jobs(shard.groups, quantization))
    for group in shard.groups:
        scales: dict[str, list[npt.NDArray[np.uint8]]] = {path: [] for path in group}
        for path in group:
            missing = quantization.stored[f"{path}.weight"].shape[0]
            while missing:
                codes, block_scales = next(packed)
                scales[path].append(block_scales)
                yield f"{path}.weight", codes
                progress(codes.nbytes * 4)
                missing -= len(codes)
        yield from ((f"{path}.weight_scale", piece) for path in group for piece in scales[path])


_Packed = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]
"""Codes and block scales of some rows."""


def _jobs(groups: Groups, quantization: Quantization) -> Iterator[Callable[[], _Packed]]:
    """Yield jobs that each pack some rows of a weight, in file order."""
    packers: dict[float, Packer | DevicePacker] = {}
    for group in groups:
        amax = {path: quantization.weight_amax[path] for path in group}
        packers = {value: packers.get(value) or quantization.packer(value) for value in amax.values()}
        for path in group:
            stored = quantization.stored[f"{path}.weight"]
            rows, columns = stored.shape
            together = max(1, _PIECE // columns)
            for begin in range(0, rows, together):
                end = min(begin + together, rows)
                stored.expect(begin * columns * DTYPE_BYTES[stored.dtype], end * columns * DTYPE_BYTES[stored.dtype])
                yield functools.partial(_pack, packers[amax[path]], stored, begin, end)


def _pack(packer: Packer | DevicePacker, stored: StoredTensor, begin: int, end: int) -> _Packed:
    columns = stored.shape[1]
    return packer.pack(bits_of(stored, begin * columns, end * columns).reshape(-1, columns))


def _scale(amax: float) -> np.float32:
    return np.float32(nvfp4.global_scale(amax).item())
