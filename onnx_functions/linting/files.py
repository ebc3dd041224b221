"""Rules for external data: where the tensors' bytes lie."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_functions.graph.external_data import BadSpan, Fault, Span
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]


@rule("external-file", "wrong", "put the file back beside the graph, or export with --copy-weights")
def external_file(subject: Subject) -> Iterator[Hit]:
    """An initializer's file is missing.

    Source: the ONNX specification; TensorRT-RTX refuses it as well.
    """
    yield from _faults(subject, "file")


@rule("external-length", "wrong", "copy the file again, or export again")
def external_length(subject: Subject) -> Iterator[Hit]:
    """Data that ends before the tensor does, is not as long as its shape needs, or lies both in and outside the graph.

    Source: the ONNX specification: `length` is that of the tensor's bytes; data inside beside data outside are
    accepted, and none at all are refused.
    """
    yield from _faults(subject, "length")


@rule("external-outside", "wrong", "keep the data in the folder of the graph")
def external_outside(subject: Subject) -> Iterator[Hit]:
    """External data at an absolute path or above the graph's folder works on one machine, or reads another's files.

    So does a link out of that folder, unless a hub's cache has put it there. Source: the ONNX specification; onnx's own
    checker and TensorRT-RTX refuse the former.
    """
    yield from _faults(subject, "outside")
    yield from _faults(subject, "link")


@rule("external-overlap", "wrong", "export again")
def external_overlap(subject: Subject) -> Iterator[Hit]:
    """Two tensors that share some, but not all, of their bytes: one of the two offsets is wrong.

    Source: no exporter writes that; TensorRT-RTX cannot know.
    """
    places = [(span, name) for name, span in subject.spans.items() if isinstance(span, Span) and span.length]
    places.sort(key=lambda place: (place[0].file, place[0].offset, place[0].length))
    before: tuple[Span, str] | None = None
    for span, name in places:
        if before is not None and span.file == before[0].file and span != before[0]:
            last = before[0].offset + before[0].length
            if span.offset < last:
                found = f"its bytes from {span.offset} on overlap those of {before[1]}, which end at {last}"
                yield Hit(found, tensor=name)
                if span.offset + span.length <= last:
                    continue
        before = (span, name)


@rule("external-link", "warning", "for a reader that refuses it, copy the file in place of the link")
def external_link(subject: Subject) -> Iterator[Hit]:
    """A file of external data that is a link, as in the cache of a hub.

    Source: all of fp4trt and TensorRT-RTX read it; onnx's own loader and checker refuse it.
    """
    files = {span.file for span in subject.spans.values() if isinstance(span, Span)}
    for file in sorted(files):
        if file.is_symlink() or file.stat().st_nlink > 1:
            yield Hit("the file is a link", tensor=file.name)


@rule("tensor-type", "wrong", "store the tensor in a type that TensorRT-RTX reads")
def tensor_type(subject: Subject) -> Iterator[Hit]:
    """An initializer of a type that TensorRT-RTX does not read: FLOAT8E8M0, FLOAT8E5M2, UINT4, or an unknown one.

    Source: measured: refused by the parser.
    """
    yield from _faults(subject, "type")
    for name, tensor in subject.graph.initializers.items():
        if tensor.data_type in _UNREAD:
            yield Hit(f"its type is {_UNREAD[tensor.data_type]}", tensor=name)


_UNREAD = {18: "FLOAT8E4M3FNUZ", 19: "FLOAT8E5M2", 20: "FLOAT8E5M2FNUZ", 21: "UINT4", 24: "FLOAT8E8M0"}

RULES = (external_file, external_length, external_outside, external_overlap, external_link, tensor_type)


def _faults(subject: Subject, fault: Fault) -> Iterator[Hit]:
    for name, span in subject.spans.items():
        if isinstance(span, BadSpan) and span.fault == fault:
            yield Hit(str(span), tensor=name)
