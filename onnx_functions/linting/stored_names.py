"""Rules for names and bytes: does an initializer hold what its name says?"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Final

from onnx import TensorProto

from fp4trt.safetensors_file import StoredTensor
from onnx_functions.graph.external_data import BITS, BadSpan, Span, type_name
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject
from onnx_functions.linting.values import inner_bytes

__all__ = ["RULES"]


@rule("safetensors-header", "wrong", "copy the file again")
def safetensors_header(subject: Subject) -> Iterator[Hit]:
    """A .safetensors file whose header is damaged: nothing then says which bytes are whose.

    Source: the safetensors format; TensorRT-RTX does not read the header.
    """
    for file, tensors in subject.headers.items():
        if tensors is None:
            yield Hit("the header of the file cannot be read, or speaks of more than the file holds", tensor=file.name)


@rule("safetensors-name", "wrong", "let each initializer point at the tensor of its name: export again")
def safetensors_name(subject: Subject) -> Iterator[Hit]:
    """An initializer of a safetensors tensor's name holds that tensor's bytes, all of them and no others.

    One under a name that the files do not have may hold any tensor, a part of one, or whole neighbours, as a graph that
    renames, splits or concatenates needs it; but no parts of several. With a promise no constant that lies elsewhere
    stands in for a stored tensor, unless it has the same bytes inside the graph. Source: every exporter that points
    into a checkpoint keeps its names; TensorRT-RTX does not read them.
    """
    places: dict[str, list[Span]] = {}
    for place, name in _all_held(subject):
        places.setdefault(name, []).append(place)
    layouts = {file: _Layout(tensors or {}) for file, tensors in subject.headers.items()}
    for name, span in subject.spans.items():
        if not isinstance(span, Span) or span.file not in subject.headers:
            if subject.promises and name in places and not _is_copy(subject, name, places[name]):
                found = f"lies {'in the graph' if span is None else 'in another file'} with data of its own"
                yield Hit(f"{found}; the file {places[name][0].file.name} has {name} too", tensor=name)
            continue
        if name in places and span not in places[name]:
            owner = subject.held.get(span)
            own = places[name][0]
            found = f"holds the bytes of {owner} under the name {name}" if owner else f"lies at {_shown(span)}"
            yield Hit(f"{found}; the file {own.file.name} has {name} at {_shown(own)}", tensor=name)
        elif name not in places and (fault := layouts[span.file].cut(span)):
            yield Hit(fault, tensor=name)


@rule("safetensors-type", "wrong", "declare the initializer as its file stores it: export again")
def safetensors_type(subject: Subject) -> Iterator[Hit]:
    """An initializer has the type that its safetensors file gives its bytes, and no transposed shape.

    U8 holds anything of 4 or 8 bits, and a reshape is legal. Source: TensorRT-RTX does not read the header.
    """
    for name, span in subject.spans.items():
        if not isinstance(span, Span) or (owner := subject.held.get(span)) is None:
            continue
        held = (subject.headers[span.file] or {})[owner]
        tensor = subject.constants[name]
        if tensor.data_type not in _TYPES.get(held.dtype, (tensor.data_type,)):
            yield Hit(f"is declared {type_name(tensor.data_type)}; its file has {owner} as {held.dtype}", tensor=name)
        elif _is_turned(list(tensor.dims), list(_elements(held, tensor))):
            found = f"is declared {list(tensor.dims)}; its file has {owner} as {held.dtype} {list(held.shape)}"
            yield Hit(found, tensor=name)


@rule("external-shared", "wrong", "let each initializer have bytes of its own: export again")
def external_shared(subject: Subject) -> Iterator[Hit]:
    """Two initializers of different types on the same bytes; with a promise any two: an export writes a tensor once.

    Source: what two names share is read under the wrong one; TensorRT-RTX cannot know.
    """
    for name, other in _twins(subject):
        if subject.promises or subject.constants[name].data_type != subject.constants[other].data_type:
            yield Hit(f"has the bytes of {other}", tensor=name)


@rule("external-alias", "warning", "if they are one weight, let all nodes read one initializer")
def external_alias(subject: Subject) -> Iterator[Hit]:
    """Two initializers of one type on the same bytes: tied weights, or a crossed wire.

    Source: some exporters write tied weights so.
    """
    for name, other in _twins(subject):
        if not subject.promises and subject.constants[name].data_type == subject.constants[other].data_type:
            yield Hit(f"has the bytes of {other}", tensor=name)


RULES = (safetensors_header, safetensors_name, safetensors_type, external_shared, external_alias)

_TYPES: Final[Mapping[str, tuple[int, ...]]] = {
    **{kind: tuple(number for number, bits in BITS.items() if bits in (4, 8)) for kind in ("U8", "I8")},
    "BOOL": (TensorProto.BOOL,),
    "F8_E4M3": (TensorProto.FLOAT8E4M3FN,),
    "F8_E5M2": (TensorProto.FLOAT8E5M2,),
    "F16": (TensorProto.FLOAT16,),
    "BF16": (TensorProto.BFLOAT16,),
    "F32": (TensorProto.FLOAT,),
    "F64": (TensorProto.DOUBLE,),
    "I16": (TensorProto.INT16,),
    "U16": (TensorProto.UINT16,),
    "I32": (TensorProto.INT32,),
    "U32": (TensorProto.UINT32,),
    "I64": (TensorProto.INT64,),
    "U64": (TensorProto.UINT64,),
}
"""What ONNX calls a type of safetensors; a type that is not here may be read as any."""


def _all_held(subject: Subject) -> Iterator[tuple[Span, str]]:
    for file, tensors in subject.headers.items():
        for name, tensor in (tensors or {}).items():
            yield Span(file, tensor.offset, tensor.nbytes), name


def _is_copy(subject: Subject, name: str, places: list[Span]) -> bool:
    """Whether a constant inside the graph has the bytes of the stored tensor of its name."""
    span = subject.spans[name]
    if isinstance(span, BadSpan):
        return True  # a rule of its own
    if span is not None:
        return False
    try:
        inside = inner_bytes(subject.constants[name])
    except (ValueError, TypeError):
        return False
    return any(place.length == inside.size and _bytes_at(place) == inside.tobytes() for place in places)


def _bytes_at(span: Span) -> bytes:
    with span.file.open("rb") as file:
        file.seek(span.offset)
        return file.read(span.length)


def _shown(span: Span) -> str:
    return f"bytes {span.offset} to {span.offset + span.length}"


class _Layout:
    """Where the tensors of a safetensors file begin and end, in order."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.order = sorted((tensor.offset, tensor.offset + tensor.nbytes, name) for name, tensor in tensors.items())
        self.begins = [begin for begin, _, _ in self.order]
        self.ends = {end for _, end, _ in self.order}

    def cut(self, span: Span) -> str:
        """Return in which way a span holds parts of several tensors, "" where it does not."""
        last = span.offset + span.length
        index = bisect_right(self.begins, span.offset) - 1
        if not self.order or not span.length:
            return ""
        if index < 0:
            return f"{_shown(span)} begin before the file's first tensor"
        begin, end, name = self.order[index]
        if last <= end or (span.offset == begin and last in self.ends):
            return ""
        return f"{_shown(span)} hold a part of {name}, which ends at {end}, and of what follows it"


def _elements(held: StoredTensor, tensor: TensorProto) -> Iterator[int]:
    """Yield a stored tensor's shape in elements of the declared type: two of 4 bits in a byte of its last axis."""
    packed = BITS.get(tensor.data_type) == 4 and held.dtype in ("U8", "I8")
    for axis, size in enumerate(held.shape):
        yield size * 2 if packed and axis == len(held.shape) - 1 else size


def _is_turned(dims: list[int], stored: list[int]) -> bool:
    """Whether one shape is the other in another order; axes of 1 do not count."""
    left, right = ([size for size in sizes if size != 1] for sizes in (dims, stored))
    return left != right and sorted(left) == sorted(right)


def _twins(subject: Subject) -> Iterator[tuple[str, str]]:
    """Yield each initializer whose bytes another one before it has, and that one."""
    first: dict[Span, str] = {}
    for name, span in subject.spans.items():
        if isinstance(span, Span) and span.length and first.setdefault(span, name) != name:
            yield name, first[span]
