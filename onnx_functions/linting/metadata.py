"""Rules for the metadata themselves: is there a promise that anything can be held against?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Final

from onnx import TensorProto

from fp4trt.errors import BadGraph
from fp4trt.families import FAMILIES, family_named
from fp4trt.families.dim import BOUNDS, out_of_order
from fp4trt.json_file import lists_of_strings, object_of, strings
from fp4trt.number_formats import FORMATS, FP8, NVFP4
from onnx_functions.graph.branches import Branch
from onnx_functions.graph.external_data import type_name
from onnx_functions.graph.index import name_of
from onnx_functions.graph.lora_slots import FACTORS, SYMBOL, slots_of
from onnx_functions.graph.stored_linears import FORMAT_OF
from onnx_functions.graph.symbols import symbolic_inputs
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject
from onnx_functions.linting.weights import output_type

__all__ = ["KEYS", "RULES"]

KEYS: Final = ("family", "recipe", "scale_dtype", "linears", "groups", "symbols")
"""The entries, after `fp4trt.`, of the metadata of a graph that promises something."""
_RECIPE: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""What `fp4trt.recipe` may say: a recipe's name; `unknown`, of another program's; `none` where nothing is in FP4."""
_SCALE_DTYPES: Final[Mapping[str, int]] = {"float32": TensorProto.FLOAT, "bfloat16": TensorProto.BFLOAT16}


@rule("duplicate-metadata", "wrong", "keep one entry of each key")
def duplicate_metadata(subject: Subject) -> Iterator[Hit]:
    """Two entries of one key in the metadata: readers take the first or the last.

    Source: the ONNX specification: keys are distinct; onnx's checker refuses it, TensorRT-RTX does not look.
    """
    for key, count in Counter(entry.key for entry in subject.model.metadata_props).items():
        if count > 1:
            yield Hit(f"the key stands {count} times in the metadata", tensor=key)


@rule("promise-metadata", "wrong", "export again")
def promise_metadata(subject: Subject) -> Iterator[Hit]:
    """A promise that is incomplete or unreadable, or has values that are unknown, impossible, or not the graph's.

    Source: fp4trt export writes all of it.
    """
    if not subject.promises:
        return
    for key in (f"fp4trt.{key}" for key in KEYS):
        if key not in subject.metadata:
            yield Hit("the key is missing in the metadata", tensor=key)
    for key, check in _CHECKS.items():
        if (text := subject.metadata.get(f"fp4trt.{key}")) is not None:
            for fault in check(subject, text):
                yield Hit(fault, tensor=f"fp4trt.{key}")


@rule("promise-family", "warning", "check inputs and outputs yourself, or export again")
def promise_family(subject: Subject) -> Iterator[Hit]:
    """A family whose inputs and outputs are not known here cannot be held against them.

    Source: the table of families.
    """
    family = subject.metadata.get("fp4trt.family")
    if family is not None and family_named(family) is None:
        known = ", ".join(sorted(known.name for known in FAMILIES))
        yield Hit(f"the family {family!r} is unknown; known are {known}", tensor="fp4trt.family")


RULES = (duplicate_metadata, promise_metadata, promise_family)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TypeError("the value is not JSON") from None


def _recipe(subject: Subject, text: str) -> Iterator[str]:
    if not text.strip():
        yield "the recipe has no name; expected one, or none"
    elif (text == "none") == (subject.has_fp4 or bool(subject.quantized_products)):
        yield f"the recipe is {text!r}, and the graph holds {'FP4' if subject.has_fp4 else 'no FP4'}"
    elif not _RECIPE.fullmatch(text):
        yield f"the recipe {text!r} is not a name of one; expected small letters, digits, dots and dashes"


_KNOWN: Final = sorted({*FORMATS, *FORMAT_OF.values()})
"""What metadata may call the format of a linear."""


def _scale_dtype(subject: Subject, text: str) -> Iterator[str]:
    if text not in _SCALE_DTYPES:
        yield f"the value is {text!r}; expected one of: {', '.join(_SCALE_DTYPES)}"
        return
    for chain in subject.weights:
        kind = output_type(subject, chain.scales) if chain.scales is not None else _SCALE_DTYPES[text]
        if kind != _SCALE_DTYPES[text]:
            yield f"the value is {text!r}; {name_of(chain.values)} has scales in {type_name(kind)}"
            return


def _linears(subject: Subject, text: str) -> Iterator[str]:
    try:
        formats = object_of(_json(text), "the value")
        paths = [path for kind, listed in formats.items() for path in strings(listed, repr(kind))]
    except TypeError as error:
        yield str(error)
        formats, paths = {}, []
    for kind in formats:
        if kind not in _KNOWN:
            yield f"the format {kind!r} is unknown; known are {', '.join(_KNOWN)}"
    for path, count in Counter(paths).items():
        if count > 1:
            yield f"{path} is promised {count} times"
    for number, held in ((NVFP4, subject.weights), (FP8, subject.fp8_products)):
        if not subject.promised.get(number.name) and held:
            yield f"no linear is promised in {number.name}, but the graph holds {number.gemm} weights"


def _attention(_: Subject, text: str) -> Iterator[str]:
    try:
        formats = object_of(_json(text), "the value")
        paths = [path for kind, listed in formats.items() for path in strings(listed, repr(kind))]
    except TypeError as error:
        yield str(error)
        return
    yield from (f"the format {kind!r} is unknown; known is fp8" for kind in formats if kind != FP8.name)
    yield from (f"{path} is promised {count} times" for path, count in Counter(paths).items() if count > 1)


def _lora(subject: Subject, text: str) -> Iterator[str]:
    """Yield what is wrong with slots for LoRAs: each declared linear has one, which reads the inputs of its name."""
    try:
        slots = slots_of(_json(text))
    except TypeError as error:
        yield str(error)
        return
    shapes = symbolic_inputs(subject.model)
    for group in slots.groups:
        for path in group:
            found = _slot(subject, path)
            wanted = (f"{group[0]}.{FACTORS[0]}", f"{path}.{FACTORS[1]}")
            if found is None or found.factors != wanted:
                yield f"{path} has no slot that reads {wanted[0]} and {wanted[1]}"
                continue
            a, b = (shapes.get(name, ()) for name in wanted)
            if not (a[:1] == b[1:] == (SYMBOL,)):
                yield f"the inputs of the slot of {path} are {a} and {b}"


def _slot(subject: Subject, path: str) -> Branch | None:
    try:
        return subject.graph.linear(path).slot
    except BadGraph:  # other rules tell what is wrong with the linear
        return None


def _groups(subject: Subject, text: str) -> Iterator[str]:
    try:
        members = [path for group in lists_of_strings(_json(text), "the value") for path in group]
    except TypeError as error:
        yield str(error)
        return
    quantized = {path for kind in FORMATS for path in subject.promised.get(kind, ())}
    for path, count in Counter(members).items():
        if path not in quantized:
            yield f"{path} is in a group, but not promised in nvfp4 or fp8"
        elif count > 1:
            yield f"{path} is in {count} groups"


def _symbols(subject: Subject, text: str) -> Iterator[str]:
    family = family_named(subject.metadata.get("fp4trt.family", ""))
    kinds = {name: dim.kind for name, dim in family.dims.items()} if family else {}
    try:
        symbols = object_of(_json(text), "the value")
        for name, symbol in symbols.items():
            yield from _symbol(name, object_of(symbol, repr(name)), kinds.get(name))
    except TypeError as error:
        yield str(error)
        return
    dims = (dim for value in subject.model.graph.input for dim in value.type.tensor_type.shape.dim)
    found = dict.fromkeys(dim.dim_param for dim in dims if dim.dim_param)
    for name in found:
        if name not in symbols:
            yield f"nothing is said of the inputs' symbolic dimension {name}"
    for name in symbols:
        if name not in found:
            yield f"no input has the promised symbolic dimension {name}"


def _symbol(name: str, symbol: Mapping[str, Any], expected: str | None) -> Iterator[str]:
    kind = symbol.get("kind")
    if not isinstance(kind, str):
        yield f"the symbol {name!r} has no kind"
        return
    if expected not in (None, kind):
        yield f"the symbol {name!r} is of the kind {kind!r}; expected {expected!r}"
    if kind not in BOUNDS:
        yield f"the symbol {name!r} is of the kind {kind!r}; known are {', '.join(BOUNDS)}"
        return
    if out_of_order(symbol, kind):
        shown = ", ".join(f"{key} {symbol.get(key)!r}" for keys in BOUNDS[kind] for key in keys)
        yield f"the symbol {name!r} has {shown}; expected positive numbers, each range in order"


_CHECKS: Final[Mapping[str, Any]] = {
    "recipe": _recipe,
    "scale_dtype": _scale_dtype,
    "linears": _linears,
    "groups": _groups,
    "symbols": _symbols,
    "attention": _attention,
    "lora": _lora,
}
