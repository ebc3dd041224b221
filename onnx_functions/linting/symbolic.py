"""Rules for symbolic sizes: does the graph follow those that its inputs declare."""

from __future__ import annotations

from collections.abc import Iterator

from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]


@rule("baked-size", "wrong", "export it again with that size dynamic, or declare the inputs at the only size it serves")
def baked_size(subject: Subject) -> Iterator[Hit]:
    """A graph whose inputs have symbolic sizes and that serves the size of one example: a Reshape, a Slice, a constant.

    Shapes are inferred at several pairs of sizes; what they leave open is not judged. Source: public exports; measured:
    an engine for a range is built and serves one size of it.
    """
    yield from (Hit(found.message, found.node, found.tensor) for found in subject.baked if found.wrong)


@rule("declared-size", "warning", "declare the output's axis by the symbol that it follows")
def declared_size(subject: Subject) -> Iterator[Hit]:
    """An output that is declared at one size and follows the inputs: readers that go by the declaration cut it.

    Source: the ONNX specification; TensorRT-RTX goes by what is computed.
    """
    yield from (Hit(found.message, found.node, found.tensor) for found in subject.baked if not found.wrong)


RULES = (baked_size, declared_size)
