"""Compute what does not depend on the inputs, and drop what is computed twice or never used."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from exporter.passes.remove_no_op_slices import remove_no_op_slices
from exporter.quiet import quiet

__all__ = ["fold_constants"]

_LARGEST_CONSTANT: Final = 16384
"""Elements; above the rotary frequencies of any head size, and the ones of a LayerNorm of any width."""


def fold_constants(model: ir.Model) -> None:
    """Fold in place, linear in the number of nodes.

    1. Weights are left alone: while folding, initializers have no value, so that nothing reads or transposes them.
    2. Sequences of slices (``chunk``, ``unbind``) become Split.
    3. Small constants become initializers, each value once.
    4. Equal nodes on equal inputs become one; what takes everything or is read by nothing goes.
    """
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    for value in model.graph.initializers.values():
        value.const_value = None
    # With shape inference, because the number of slices in a sequence is read off the shape of their sizes.
    optimizer.fold_constants(model, onnx_shape_inference=True)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    with quiet("onnx_ir"):  # it reports each weight, which has no value now, as an initializer that it skips
        common.DeduplicateInitializersPass(size_limit=_LARGEST_CONSTANT)(model)
    remove_no_op_slices(model)
    for tidy in (
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    ):
        tidy(model)
    for name, value in model.graph.initializers.items():
        if name in weights:
            value.const_value = weights[name]
