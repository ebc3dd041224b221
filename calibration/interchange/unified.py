"""A checkpoint of any layout as ModelOpt's unified layout has it: diffusers' names, rows of blocks, low nibbles first.

Every other layout is made from this one, and every tensor of it is accounted for before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np

from calibration.interchange.branch_file import branches_beside
from calibration.interchange.byte_rows import (
    ByteRows,
    cropped,
    halves_swapped,
    held,
    nibbles_swapped,
    part,
    reshaped,
    stored,
    untiled,
)
from calibration.interchange.provenance import Provenance
from calibration.interchange.source import COMFYUI, MODELOPT, Source
from fp4trt.account import SMOOTHING, Account, account_of
from fp4trt.errors import BadAmax, BadCheckpoint
from fp4trt.layouts import swizzled_shapes
from fp4trt.number_formats import FORMATS, FP8, MXFP8, NVFP4, NumberFormat, StoredScale, stored_format
from fp4trt.progress import note
from fp4trt.safetensors_file import StoredTensor
from fp4trt.single_files.names import Original, Part

__all__ = ["COMFYUI_FORMATS", "PADDING", "Unified", "unified"]

COMFYUI_FORMATS: Final[Mapping[str, str]] = {NVFP4.name: "nvfp4", FP8.name: "float8_e4m3fn", MXFP8.name: "mxfp8"}
"""What ComfyUI's marks call the number formats."""

PADDING: Final[Mapping[str, int]] = {NVFP4.name: 16, FP8.name: 1, MXFP8.name: 32}
"""Multiples to which rows and columns of a weight are padded for ComfyUI. Source: comfy-kitchen's get_padded_shape."""

_WEIGHT: Final = ".weight"
_SCALE: Final = "weight_scale"
_INPUT: Final = "input_scale"
_FULL_PRECISION: Final = "full_precision_matrix_mult"
_KNOWN_IN_A_MARK: Final = {"format", "group_size", _FULL_PRECISION}
_SAME_BYTES: Final[Mapping[str, tuple[str, ...]]] = {"F8_E4M3": ("U8",), "U8": ("F8_E8M0",)}
"""Dtype of block scales to others that ComfyUI's files have for the same bytes."""
_NUMBERS: Final[Mapping[str, Any]] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class Unified:
    """A quantized checkpoint whose tensors are made, in ModelOpt's unified layout, when they are read.

    Attributes:
        path: what it is made from, for messages.
        config: of diffusers, without ``quantization_config``.
        tensors: name to tensor, in the order in which fp4trt's own files have those that are not quantized.
        account: what each of them means.
        provenance: what its source says of itself.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, ByteRows]
    account: Account
    provenance: Provenance

    def form(self, path: str) -> NumberFormat | None:
        """Return the number format of a linear, None for one in 16 bit."""
        return FORMATS.get(self.account.linears[path].format)


def unified(source: Source, amax: Mapping[str, float] | None = None) -> Unified:
    """Return a checkpoint in ModelOpt's unified layout.

    Args:
        source: of :func:`calibration.interchange.source.open_source`.
        amax: module path to the largest magnitude of a linear's input, for those whose scale the source lacks.

    Raises:
        BadCheckpoint: a tensor is missing, contradictory, of another shape, or of no meaning here.
        BadAmax: a scale of an input is missing, and no amax gives it.
    """
    where = str(source.path)
    reading = _Reading(source, where)
    found = {name: rows for original in source.originals.items() for name, rows in reading.tensors(*original)}
    found |= reading.rest()
    if source.provenance.branch:
        found |= branches_beside(source, found)
    found |= _input_scales(source, found, amax)
    tensors = _ordered(found, source.provenance.order)
    account = account_of(where, source.declared, {}, tensors, lambda name: _number(tensors[name]), source.manifest)
    reading.tell()
    return Unified(source.path, source.config, _with_scales_of_attention(tensors, account), account, source.provenance)


class _Reading:
    """A source while its tensors are read; each is taken once."""

    def __init__(self, source: Source, where: str) -> None:
        self.source, self.where = source, where
        self.is_comfyui = source.layout == COMFYUI
        self.left = dict(source.tensors)
        self.marks = dict(source.marks)
        self.in_full: list[str] = []

    def tensors(self, name: str, original: Original) -> Iterator[tuple[str, ByteRows]]:
        """Yield the tensors of diffusers that one of the source holds, and the scales of a quantized linear."""
        if name not in self.left:
            raise BadCheckpoint(
                f"{self.where} lacks {name}, which holds {original.parts[0].name}; expected all tensors of a "
                f"{self.source.family.class_name}: copy it again, or give the config of this model (--like)"
            )
        tensor, path = self.left.pop(name), name.removesuffix(_WEIGHT)
        scale = self.left.get(f"{path}.{_SCALE}")
        kind = stored_format(tensor.dtype, None if scale is None else scale.dtype.replace("F8_E8M0", "U8"))
        if path == name or kind is None:
            yield from self._plain(name, tensor, original)
        else:
            self._read_mark(path, kind)
            yield from self._linear(path, tensor, original, kind)

    def rest(self) -> dict[str, ByteRows]:
        """Return what has not been taken and has diffusers' names: scales of attention, branches, and strangers.

        Raises:
            BadCheckpoint: a linear is marked as quantized, and is not; or a single file has a tensor of no meaning.
        """
        if self.marks:
            path, mark = next(iter(self.marks.items()))
            raise BadCheckpoint(
                f"{self.where} marks {path} as {mark.get('format')!r}, and has no such weight; expected codes of "
                f"{', '.join(COMFYUI_FORMATS.values())}: copy it again"
            )
        if self.source.layout != MODELOPT and self.left:
            name, stranger = next(iter(self.left.items()))
            raise BadCheckpoint(
                f"{self.where} has {name}, {stranger.dtype}{list(stranger.shape)}, which nothing here reads, and "
                f"without it this is another model; expected the tensors of a {self.source.family.class_name} alone"
            )
        return {name: stored(tensor) for name, tensor in self.left.items()}

    def tell(self) -> None:
        """Say what is computed otherwise than the source's program computes it."""
        if self.in_full:
            note(
                f"{self.in_full[0]} and {len(self.in_full) - 1} more linears are marked with {_FULL_PRECISION}: "
                "ComfyUI leaves their inputs in 16 bit; here they are quantized as all others"
            )

    def _plain(self, name: str, tensor: StoredTensor, original: Original) -> Iterator[tuple[str, ByteRows]]:
        if not original.is_stored_as(tensor.shape):
            raise self._wrong(name, tensor, f"{list(original.shape)} by the config of the model")
        whole = reshaped(stored(tensor), original.shape)
        for each in original.parts:
            yield each.name, _rows_of(whole, each) if original.shape else whole

    def _linear(
        self, path: str, tensor: StoredTensor, original: Original, kind: NumberFormat
    ) -> Iterator[tuple[str, ByteRows]]:
        """Yield codes and scales of the linears that a quantized one is made of, and the smoothing of their input."""
        linears = {each.name.removesuffix(_WEIGHT): each for each in original.parts}
        codes = self._codes(path, tensor, original, kind)
        yield from ((each.name, _rows_of(codes, each)) for each in original.parts)
        for scale in kind.scales:
            name = f"{path}.{scale.leaf}"
            if name not in self.left:
                continue  # which the account says of
            taken = self.left.pop(name)
            whole = self._block_scales(name, taken, original, scale) if scale.block else stored(taken)
            for linear, each in linears.items():
                of_part = _rows_of(whole, each) if scale.block else self._scalar(name, whole, each, original.shape[0])
                yield f"{linear}.{scale.leaf}", of_part
        if (smoothing := self.left.pop(f"{path}.{SMOOTHING}", None)) is not None:
            yield from ((f"{linear}.{SMOOTHING}", stored(smoothing)) for linear in linears)

    def _codes(self, path: str, tensor: StoredTensor, original: Original, kind: NumberFormat) -> ByteRows:
        shape = kind.codes_shape(original.shape[0], original.shape[1])
        multiple = PADDING[kind.name] if self.is_comfyui else 1
        high, wide = (-(-size // multiple) * multiple for size in original.shape)
        if tensor.shape not in (shape, kind.codes_shape(high, wide)):
            raise self._wrong(f"{path}{_WEIGHT}", tensor, f"{list(shape)}, the codes of {kind.title} by the config")
        codes = cropped(stored(tensor), *shape)
        return nibbles_swapped(codes) if self.is_comfyui and kind.codes_per_byte == 2 else codes

    def _block_scales(self, name: str, tensor: StoredTensor, original: Original, scale: StoredScale) -> ByteRows:
        shape = scale.shape(original.shape[0], original.shape[1])
        wanted = swizzled_shapes(shape[0], shape[1]) if self.is_comfyui else (shape,)
        if tensor.shape not in wanted or tensor.dtype not in (scale.dtype, *_SAME_BYTES.get(scale.dtype, ())):
            order = " in cuBLAS tiles" if self.is_comfyui else ""
            raise self._wrong(name, tensor, f"{scale.dtype}{list(wanted[0])}, block scales{order}")
        whole = replace(stored(tensor), dtype=scale.dtype)
        return untiled(whole, shape[0], shape[1]) if self.is_comfyui else whole

    def _scalar(self, name: str, whole: ByteRows, each: Part, count: int) -> ByteRows:
        """Return the scale of one linear, which files for diffusers repeat for each of the ``count`` rows."""
        if whole.shape in ((), (1,)):
            return held(whole.dtype, (), whole.all())
        if whole.shape == (count,):
            values = part(whole, each.row, each.shape[0]).rows(0, each.shape[0])
            if (values == values[0]).all():
                return held(whole.dtype, (), values[0])
        raise BadCheckpoint(
            f"{self.where} has {name} as {whole.dtype}{list(whole.shape)}; expected one scale for the whole of "
            f"{each.name}: scales of rows or columns are not converted, quantize with one for each tensor"
        )

    def _read_mark(self, path: str, kind: NumberFormat) -> None:
        """Hold ComfyUI's mark of a linear against what it is.

        Raises:
            BadCheckpoint: it says something else, or more than is known here.
        """
        mark = self.marks.pop(path, None)
        if mark is None:
            return
        unknown = sorted(mark.keys() - _KNOWN_IN_A_MARK)
        wanted = {"format": COMFYUI_FORMATS[kind.name], "group_size": kind.block}
        said = next((key for key, value in wanted.items() if mark.get(key, value) != value), None)
        if unknown or said:
            key = said or unknown[0]
            raise BadCheckpoint(
                f"{self.where} marks {path} with {key} {mark[key]!r}, and its tensors are {kind.title}'s; expected "
                f"what they are, one of {', '.join(COMFYUI_FORMATS.values())}: no other of its formats is converted"
            )
        if mark.get(_FULL_PRECISION):
            self.in_full.append(path)

    def _wrong(self, name: str, tensor: StoredTensor, expected: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"{name} is {tensor.dtype}{list(tensor.shape)} in {self.where}; expected {expected}: copy it again, or say "
            "which model (--like) or layout (--from) it is"
        )


def _rows_of(whole: ByteRows, each: Part) -> ByteRows:
    rows = part(whole, each.row, each.shape[0])
    return halves_swapped(rows) if each.swapped else rows


def _input_scales(
    source: Source, found: Mapping[str, ByteRows], amax: Mapping[str, float] | None
) -> dict[str, ByteRows]:
    """Return the scales of inputs that a checkpoint lacks, equal among those that read one input.

    Raises:
        BadAmax: nothing gives one.
    """
    kinds = _formats(found)
    lacking = [path for path, kind in kinds.items() if kind.needs_input_amax and f"{path}.{_INPUT}" not in found]
    if lacking and amax is None:
        raise BadAmax(
            f"{source.path} has no input_scale for {len(lacking)} linears, {lacking[0]} first, whose inputs ComfyUI "
            "scales by what they are at run time; expected calibrated scales: give --calibration amax.json, which "
            "fp4trt calibrate writes for the 16-bit model"
        )
    for path in lacking:
        if amax is not None and path not in amax:
            raise BadAmax(f"no amax for the input of {path}, which has no input_scale in {source.path}; calibrate it")
        if f"{path}.{SMOOTHING}" in found:
            raise BadAmax(
                f"{path} in {source.path} has a pre_quant_scale and no input_scale; expected both: an amax of the "
                "unsmoothed input gives another scale"
            )
    groups = source.family.groups_of(source.config, lacking)
    largest = {path: max((amax or {})[member] for member in group) for group in groups for path in group}
    return {f"{path}.{_INPUT}": _scale(largest[path], kinds[path]) for path in lacking}


def _formats(found: Mapping[str, ByteRows]) -> dict[str, NumberFormat]:
    """Return module path to number format of what is quantized."""
    named = {name.removesuffix(_WEIGHT): rows for name, rows in found.items() if name.endswith(_WEIGHT)}
    scales = {path: found.get(f"{path}.{_SCALE}") for path in named}
    kinds = {
        path: stored_format(rows.dtype, None if (scale := scales[path]) is None else scale.dtype)
        for path, rows in named.items()
    }
    return {path: kind for path, kind in kinds.items() if kind is not None}


def _scale(amax: float, kind: NumberFormat) -> ByteRows:
    """Return the scale that quantization gives an input of this amax."""
    assert kind.amax_factor is not None, f"{kind.name} has no scale of its input"
    return held("F32", (), (np.float32(amax) / np.float32(kind.amax_factor)).reshape(1).view(np.uint8))


def _ordered(found: Mapping[str, ByteRows], order: Sequence[str]) -> dict[str, ByteRows]:
    first = [name for name in order if name in found]
    names: Iterable[str] = (*first, *sorted(found.keys() - set(first)))
    return {name: found[name] for name in names}


def _with_scales_of_attention(tensors: Mapping[str, ByteRows], account: Account) -> dict[str, ByteRows]:
    """Return the tensors with scales of attention in place of the amax that ModelOpt has."""
    named = {name: f"{path}.{scale}" for path, scales in account.attentions.items() for scale, name in scales.items()}
    return {
        named.get(name, name): rows if named.get(name, name) == name else _scale(_number(rows), FP8)
        for name, rows in tensors.items()
    }


def _number(scalar: ByteRows) -> float:
    """Return the value of a scalar; NaN for one of no floating-point type."""
    kind = _NUMBERS.get(scalar.dtype)
    return float(scalar.all().view(kind)[0]) if kind is not None else float("nan")
