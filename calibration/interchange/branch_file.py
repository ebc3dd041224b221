"""Low-rank branches as a LoRA file beside a checkpoint for ComfyUI, which computes it as a bypass of the packed weight.

fp4trt adds ``(x * s) A^T B^T`` to a product, s being the ``pre_quant_scale`` of the input. ComfyUI's bypass reads the
input before s: it is given ``A * s`` in FP32, of which A is found again exactly. ComfyUI's usual LoRA loader adds the
product of the factors to the weight and rounds the sum to FP4 again, which is another model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

from calibration.interchange.byte_rows import ByteRows, halves_swapped, held, part, stored
from fp4trt.account import BRANCH, SMOOTHING
from fp4trt.errors import BadCheckpoint
from fp4trt.layouts import PROVENANCE
from fp4trt.safetensors_file import metadata_in_file, tensors_in_file
from fp4trt.single_files.names import Original

if TYPE_CHECKING:
    from calibration.interchange.source import Source

__all__ = ["branch_path", "branches_beside", "lora_names", "smoothed_factor"]

_PREFIX: Final = "diffusion_model."
_NUMBERS: Final[Mapping[str, Any]] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}

_Floats = npt.NDArray[np.float32]


def branch_path(output: Path) -> Path:
    """Return where the branches of a file for ComfyUI lie: ``OUT-branch.safetensors`` beside ``OUT.safetensors``."""
    return output.with_name(f"{output.stem}-branch{output.suffix}")


def lora_names(path: str) -> tuple[str, str]:
    """Return what the two factors of a linear are called in the file."""
    return f"{_PREFIX}{path}.lora_A.weight", f"{_PREFIX}{path}.lora_B.weight"


def smoothed_factor(a: ByteRows, smoothing: ByteRows | None) -> ByteRows:
    """Return the first factor [rank, K] of a branch that reads the input before it is smoothed, in FP32."""
    value = _floats(a) if smoothing is None else _floats(a) * _floats(smoothing)
    return _held(np.asarray(value, np.float32))


def branches_beside(source: Source, found: Mapping[str, ByteRows]) -> dict[str, ByteRows]:
    """Return the branches that lie beside a file for ComfyUI, as ModelOpt's layout has them.

    Raises:
        BadCheckpoint: the file is not there, or is not that of this checkpoint.
    """
    beside = source.branch
    assert beside is not None, "only of a checkpoint that says where its branches are"
    if not beside.is_file():
        raise BadCheckpoint(
            f"{source.path} has its low-rank branches in {beside.name}, which is not beside it; without them it is "
            "another model: copy it there"
        )
    left = {name: stored(tensor) for name, tensor in tensors_in_file(beside).items()}
    if metadata_in_file(beside).get(PROVENANCE) != source.metadata.get(PROVENANCE):
        raise BadCheckpoint(f"{beside} was not written with {source.path.name}; copy there the one that was")
    made: dict[str, ByteRows] = {}
    for name, original in source.originals.items():
        first, second = lora_names(name.removesuffix(".weight"))
        if first in left and second in left:
            made |= dict(_split(beside, first, left.pop(first), left.pop(second), original, found))
    if left:
        raise BadCheckpoint(
            f"{beside} has {next(iter(left))}, which belongs to no linear of {source.path.name}; copy it again"
        )
    return made


def _split(
    beside: Path, name: str, a: ByteRows, b: ByteRows, original: Original, found: Mapping[str, ByteRows]
) -> Iterator[tuple[str, ByteRows]]:
    """Yield the factors of the linears that a fused one is made of."""
    for each in original.parts:
        linear = each.name.removesuffix(".weight")
        smoothing = found.get(f"{linear}.{SMOOTHING}")
        given = _floats(a)
        plain = given if smoothing is None else given / _floats(smoothing)
        factor = plain.astype(ml_dtypes.bfloat16)
        again = factor.astype(np.float32) * (1 if smoothing is None else _floats(smoothing))
        if a.dtype != "F32" or not np.array_equal(again, given):
            raise BadCheckpoint(f"{name} in {beside} is not made of a BF16 factor and this checkpoint's smoothing")
        yield f"{linear}.{BRANCH[0]}", held("BF16", factor.shape, factor.view(np.uint8))
        rows = part(b, each.row, each.shape[0])
        yield f"{linear}.{BRANCH[1]}", halves_swapped(rows) if each.swapped else rows


def _floats(tensor: ByteRows) -> _Floats:
    return np.asarray(tensor.all().view(_NUMBERS[tensor.dtype]).reshape(tensor.shape).astype(np.float32))


def _held(value: _Floats) -> ByteRows:
    return held("F32", value.shape, np.ascontiguousarray(value).view(np.uint8))
