"""A rule for what a checkpoint holds and its graph leaves out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fp4trt.account import BMM_AMAX, BRANCH, SMOOTHING
from onnx_functions.graph.checkpoint_beside import CheckpointBeside
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES"]

_SHARED = ("weight_scale_2", "input_scale", BRANCH[0], SMOOTHING)
"""What one linear of a group may stand for with the others', where they are equal."""


@rule("stored-unread", "wrong", "the checkpoint is not the one that was exported: export again")
def stored_unread(subject: Subject) -> Iterator[Hit]:
    """A tensor of the quantized checkpoint beside a graph with a promise, which the graph does not read.

    Scales, smoothings and first factors that are equal in a group of linears may be read once. Source: a low-rank
    branch, a smoothing or a scale of attention that is left out makes another model, and the engine builds.
    """
    beside = subject.checkpoint
    if beside is None or not subject.promises:
        return
    account = beside.account
    for name in account.meanings:
        if not account.family.is_unused(account.config, name) and not _is_read(subject, beside, name):
            yield Hit(f"is stored in {beside.tensors[name].file.name}, and no node reads it", tensor=name)


def _is_read(subject: Subject, beside: CheckpointBeside, name: str) -> bool:
    constants = subject.graph.initializers
    if name in constants:
        return True
    path, _, leaf = name.rpartition(".")
    if leaf in _SHARED:
        others = (f"{member}.{leaf}" for member in _group_of(beside, path) if f"{member}.{leaf}" in constants)
        wanted = beside.tensors[name].bytes()
        return any(
            other in beside.tensors and np.array_equal(beside.tensors[other].bytes(), wanted) for other in others
        )
    made = next((f"{name.removesuffix(amax)}{scale}" for amax, scale in BMM_AMAX.items() if name.endswith(amax)), "")
    return made in constants


def _group_of(beside: CheckpointBeside, path: str) -> tuple[str, ...]:
    groups = beside.account.groups
    return next((group for group in groups if path in group), ())


RULES = (stored_unread,)
