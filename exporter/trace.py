"""From a checkpoint's config to an ONNX graph without weights: torch.export on the meta device."""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import onnx_ir as ir
import torch
from torch import nn
from torch._dynamo.exc import UserError

from calibration.checkpoints.plain import model_class, stays_fp32
from calibration.checkpoints.quantized import Checkpoint, plain_config
from exporter.decompose import decompose
from exporter.passes.stamp_blocks import TRACED_BLOCKS
from exporter.quiet import quiet
from exporter.trt_ops import TracedLinear, translations
from fp4trt.errors import UnsupportedModel
from fp4trt.families import Family

__all__ = ["OPSET", "other_linears", "trace", "traced_config", "translate"]

OPSET = 23
"""The first ONNX opset with FLOAT4E2M1 and DequantizeLinear's ``output_dtype``."""

_EXPORTER: Final = threading.RLock()

_BATCH, _IMAGE_TOKENS, _TEXT_TOKENS = 2, 16, 8
"""Sizes to trace with: a batch of 1 would be baked in. Nothing else depends on them."""


def trace(checkpoint: Checkpoint) -> torch.export.ExportedProgram:
    """Return the checkpoint's model as torch.export sees it, with a TracedLinear for every linear.

    Its weights are on the meta device: nothing of the checkpoint's data is read. It is the model of
    :func:`traced_config`; what format this checkpoint has the linears in makes no difference yet, because a stack's
    blocks have to be equal.
    """
    family = checkpoint.family
    config = traced_config(family, plain_config(checkpoint.config))
    with _alone():
        model = _meta_model(family, config)
        with torch.device("meta"):
            for path, linear in [*model.named_modules()]:
                if isinstance(linear, nn.Linear):
                    model.set_submodule(path, TracedLinear(linear, path))
        example = family.example_inputs(config, (_BATCH, _IMAGE_TOKENS, _TEXT_TOKENS), 0, torch.bfloat16)
        inputs = {name: value.to("meta") for name, value in example.items()}
        try:
            return torch.export.export(
                model,
                (),
                kwargs={**inputs, "return_dict": False},
                dynamic_shapes={**_dynamic_shapes(family.input_shapes(config)), "return_dict": None},
                strict=False,
            )
        except UserError as error:
            reason = str(error).strip().partition("!")[0]
            raise UnsupportedModel(
                f"torch.export cannot trace {family.name} with sizes that change: {reason}; "
                "a size that the model divides, as that of a picture it cuts into patches, has to be outside of it"
            ) from None


def traced_config(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose stacks of equal blocks are :data:`~exporter.passes.stamp_blocks.TRACED_BLOCKS` high."""
    equal = {stack.count: TRACED_BLOCKS + stack.tail for stack in family.stacks if stack.equal}
    return {**config, **{count: min(config[count], height) for count, height in equal.items()}}


def translate(checkpoint: Checkpoint, program: torch.export.ExportedProgram) -> ir.Model:
    """Return the traced program as an ONNX graph with the placeholders of :mod:`exporter.trt_ops`.

    Inputs and output have the family's names, order, dtypes and symbolic shapes. Initializers have their state-dict
    names and no values; they are BF16, or FP32 where the model computes with them so. The program is used up.
    """
    with _alone():
        exported = torch.onnx.export(
            decompose(program),
            custom_translation_table=translations(),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert exported is not None
    for value in exported.model.graph.initializers.values():
        if getattr(getattr(value.const_value, "raw", None), "is_meta", False):
            value.const_value = None
    family = checkpoint.family
    _name_interface(exported.model.graph, family.input_shapes(checkpoint.config), list(family.outputs))
    return exported.model


def other_linears(checkpoint: Checkpoint) -> list[str]:
    """Return the module paths of the linears that stay in 16 bit and that the graph has."""
    model = _meta_model(checkpoint.family, plain_config(checkpoint.config))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    family, config = checkpoint.family, checkpoint.config
    return [name for name in linears if name not in checkpoint.formats and not family.is_unused(config, name)]


def _meta_model(family: Family, config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"), _alone():
        model: nn.Module = model_class(family).from_config(config)
        nn.Module.to(model, torch.bfloat16)  # not diffusers' own, which warns of what stays in FP32
        for name, value in model.named_parameters():
            value.data = value.data.float() if stays_fp32(model, name) else value.data
    return model.eval()


def _dynamic_shapes(shapes: Mapping[str, Sequence[str | int]]) -> dict[str, dict[int, Any]]:
    dims: dict[str, Any] = {}
    for shape in shapes.values():
        for size in shape:
            if isinstance(size, str):
                dims.setdefault(size, torch.export.Dim(size))
    return {
        name: {axis: dims[size] for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in shapes.items()
    }


def _name_interface(graph: ir.Graph, shapes: Mapping[str, Sequence[str | int]], outputs: Sequence[str]) -> None:
    """Give inputs, outputs and symbolic dimensions the family's names, everywhere in the graph."""
    names: dict[str, str] = {}
    kept = [value for value in graph.inputs if value.name in shapes]
    assert [value.name for value in kept] == list(shapes), [value.name for value in graph.inputs]
    graph.inputs[:] = kept
    for value in kept:
        assert value.name is not None
        assert value.shape is not None
        for traced, ours in zip(value.shape, shapes[value.name], strict=True):
            if isinstance(ours, str):
                names[str(traced)] = ours
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """Return a dimension with its symbols renamed; in sums and products such as ``s2 + 8*s3`` too."""
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size.value))


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Let one thread at a time into torch's exporter, which changes torch itself meanwhile.

    And keep its remarks on itself (torchvision is absent, a cast is a no-op) from the user.
    """
    with _EXPORTER, quiet("torch.onnx", "diffusers"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
