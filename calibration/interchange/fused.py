"""The linears that a single file fuses into one: what they have to have in common, and the tensors of the fused one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from calibration.interchange.byte_rows import ByteRows, halves_swapped, joined, repeated
from calibration.interchange.unified import Unified
from fp4trt.account import BRANCH, SMOOTHING, StoredForm
from fp4trt.errors import BadCheckpoint
from fp4trt.number_formats import FORMATS, NumberFormat
from fp4trt.single_files.names import Original, Part

__all__ = ["Fused", "fused_linears", "plain_tensors"]


@dataclass(frozen=True)
class Fused:
    """A linear of a single file that is quantized, or has a branch or a smoothed input.

    Attributes:
        path: its module path in the file.
        shape: [N, K] of its weight, in elements.
        parts: the linears of diffusers that make its rows, in order.
        kind: its number format; None for one in 16 bit.
        checkpoint: that these lie in.
    """

    path: str
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    kind: NumberFormat | None
    checkpoint: Unified

    @property
    def linears(self) -> tuple[str, ...]:
        """Module paths of its parts in diffusers."""
        return tuple(part.name.removesuffix(".weight") for part in self.parts)

    def rows(self, leaf: str) -> ByteRows:
        """Return a tensor that each part has for its own rows, such as the codes."""
        return _joined(self.checkpoint, self.path, [f"{path}.{leaf}" for path in self.linears], self.parts)

    def common(self, leaf: str) -> ByteRows | None:
        """Return a tensor that all parts have alike, None where none has it.

        Raises:
            BadCheckpoint: they differ in it.
        """
        found = {path: self.checkpoint.tensors.get(f"{path}.{leaf}") for path in self.linears}
        first, tensor = next(iter(found.items()))
        for path, other in found.items():
            if not _are_equal(tensor, other):
                raise BadCheckpoint(
                    f"{self.checkpoint.path}: {first} and {path} are one linear in a single file, {self.path}, and "
                    f"each has its own {leaf}; expected one: quantize with fp4trt, whose groups share it, or "
                    "leave them in 16 bit"
                )
        return tensor

    def by_row(self, leaf: str) -> ByteRows:
        """Return a scalar that each part has for itself, repeated for each of its rows, [N]."""
        scalars = (self.checkpoint.tensors[f"{path}.{leaf}"] for path in self.linears)
        return joined([repeated(scalar, part.shape[0]) for scalar, part in zip(scalars, self.parts, strict=True)])

    @property
    def has_branch(self) -> bool:
        """Whether a low-rank branch is added to its product."""
        return f"{self.linears[0]}.{BRANCH[0]}" in self.checkpoint.tensors

    @property
    def is_smoothed(self) -> bool:
        """Whether its input is scaled by channel first."""
        return f"{self.linears[0]}.{SMOOTHING}" in self.checkpoint.tensors


def fused_linears(checkpoint: Unified, originals: Mapping[str, Original]) -> Iterator[Fused]:
    """Yield the linears of a single file that are more than a weight in 16 bit.

    Raises:
        BadCheckpoint: linears that are one there have different formats here.
    """
    account = checkpoint.account
    for name, original in originals.items():
        linears = [part.name.removesuffix(".weight") for part in original.parts]
        if not name.endswith(".weight") or linears[0] not in account.linears:
            continue
        forms = {path: account.linears[path] for path in linears}
        first = forms[linears[0]]
        for path, form in forms.items():
            if (form.format, form.rank, form.smoothed) != (first.format, first.rank, first.smoothed):
                raise BadCheckpoint(
                    f"{checkpoint.path}: {linears[0]} and {path} are one linear in a single file, {name}, and one is "
                    f"{_in_words(first)}, the other {_in_words(form)}; expected the same: give both one format in the "
                    "recipe (formats.rules)"
                )
        kind = checkpoint.form(linears[0])
        if kind is not None or first.rank or first.smoothed:
            shape = original.shape[0], original.shape[1]
            yield Fused(name.removesuffix(".weight"), shape, original.parts, kind, checkpoint)


def plain_tensors(
    checkpoint: Unified, originals: Mapping[str, Original], packed: Sequence[Fused]
) -> Iterator[tuple[str, ByteRows]]:
    """Yield the tensors of a single file that are no quantized weights.

    Raises:
        BadCheckpoint: tensors that are one there have different types here.
    """
    weights = {f"{linear.path}.weight" for linear in packed if linear.kind is not None}
    for name, original in originals.items():
        if name not in weights:
            yield name, _joined(checkpoint, name, [part.name for part in original.parts], original.parts)


def _joined(checkpoint: Unified, name: str, names: Sequence[str], parts: Sequence[Part]) -> ByteRows:
    tensors = [checkpoint.tensors[each] for each in names]
    for each, tensor in zip(names, tensors, strict=True):
        if tensor.dtype != tensors[0].dtype:
            raise BadCheckpoint(
                f"{checkpoint.path}: {names[0]} and {each} are one tensor in a single file, {name}, and are "
                f"{tensors[0].dtype} and {tensor.dtype}; expected one type: save them in BF16"
            )
    placed = zip(parts, tensors, strict=True)
    return joined([halves_swapped(tensor) if part.swapped else tensor for part, tensor in placed])


def _are_equal(one: ByteRows | None, other: ByteRows | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    same = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same and bytes(one.all()) == bytes(other.all())


def _in_words(form: StoredForm) -> str:
    what = [f"a branch of rank {form.rank}"] if form.rank else []
    what += ["a smoothed input"] if form.smoothed else []
    title = FORMATS[form.format].title if form.format in FORMATS else "16-bit"
    return f"{title} with {' and '.join(what)}" if what else title
