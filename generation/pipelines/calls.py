"""From what a pipeline calls its transformer with to the family's inputs, and from a graph's outputs back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from calibration.checkpoints.plain import model_class
from calibration.inputs.captured import Inputs
from fp4trt.errors import BadInputs
from fp4trt.families import Family
from fp4trt.families.family import Config

__all__ = ["Calls", "in_model_types", "stub_of"]

_ATTENTION: Final = ("joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs")
"""Arguments that hold what is asked of attention, such as a LoRA's scale or an IP adapter."""

_OF_LTX2: Final = (
    *("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states"),
    *("encoder_attention_mask", "audio_encoder_attention_mask", "audio_timestep", "sigma", "audio_sigma"),
    *("video_coords", "audio_coords", "num_frames", "height", "width", "fps", "audio_num_frames"),
    "use_cross_timestep",
)
"""What LTX-2's adapter reads of a call by name."""

_DTYPES: Final = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
}


def stub_of(family: Family, config: Config) -> Any:
    """Return a model without weights, on the meta device, of one block each: what pipelines and adapters ask it for.

    Args:
        family: of the model.
        config: its config.
    """
    few = {stack.count: min(1, int(config[stack.count])) for stack in family.stacks}
    with torch.device("meta"):
        return model_class(family).from_config({**config, **few})


class Calls:
    """What the calls of a pipeline's transformer mean to a graph of the model.

    Args:
        family: of the model.
        stub: its model, without weights; None of a model of the user's own, whose calls are the family's inputs.
        config: its config.
    """

    def __init__(self, family: Family, stub: Any, config: Config) -> None:
        self._inputs = tuple(family.input_shapes(config))
        self._adapter = stub if hasattr(stub, "inputs_of") else None
        self._several = getattr(self._adapter, "calls_of", None)
        read: Any = self._several or getattr(self._adapter, "inputs_of", None)
        named = () if read is None else tuple(inspect.signature(read).parameters)
        self._read = {*self._inputs, *named, *(_OF_LTX2 if family.name == "ltx2" else ())}

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Inputs]:
        """Return the family's inputs of each call that a graph has to answer for one of the pipeline's.

        Raises:
            BadInputs: the call asks for what no graph computes, or lacks an input.
        """
        self._refuse_unread(kwargs)
        call = {name: value for name, value in kwargs.items() if name not in _ATTENTION}
        if self._adapter is None or set(call) == set(self._inputs):
            found: list[Inputs] = [dict(zip(self._inputs, args, strict=False)) | call]
        elif self._several is not None:
            found = self._several(*args, **call)
        else:
            found = [self._adapter.inputs_of(*args, **call)]
        return [self._complete(each) for each in found]

    def answer(
        self, outputs: Sequence[tuple[torch.Tensor, ...]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        """Return what diffusers' class returns, of the outputs of each call."""
        if self._adapter is not None and hasattr(self._adapter, "answer_of"):
            call = {name: value for name, value in kwargs.items() if name not in _ATTENTION}
            return (self._adapter.answer_of([each[0] for each in outputs], *args, **call),)
        return tuple(torch.cat(each) if len(each) > 1 else each[0] for each in zip(*outputs, strict=True))

    def _refuse_unread(self, kwargs: Mapping[str, Any]) -> None:
        for name, value in kwargs.items():
            if name in _ATTENTION:
                _refuse_attention(name, value)
            elif name not in self._read and _says_something(value):
                raise BadInputs(
                    f"the pipeline calls its transformer with {name}, which this model's graph has no input for; leave "
                    "out what makes it, or draw with the transformer of diffusers"
                )

    def _complete(self, call: Inputs) -> Inputs:
        absent = [name for name in self._inputs if call.get(name) is None]
        if absent:
            raise BadInputs(
                f"the pipeline calls its transformer without {absent[0]}, which the model reads by its "
                "config; expected a pipeline of this model"
            )
        return {name: call[name] for name in self._inputs}


def _refuse_attention(name: str, value: Mapping[str, Any] | None) -> None:
    for key, asked in (value or {}).items():
        if key == "scale" and asked == 1:
            continue
        if _says_something(asked):
            advice = "give the strength with the LoRA" if key == "scale" else "leave it out"
            raise BadInputs(f"{name} has {key}, which no graph computes; {advice}")


def _says_something(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return value is not None and value is not False and not (hasattr(value, "__len__") and len(value) == 0)


def in_model_types(call: Inputs, family: Family, config: Config) -> Inputs:
    """Return inputs in the types and with the dimensions that a graph has them in.

    Args:
        call: the family's inputs; position ids may have a batch dimension whose members are equal.
        family: of the model.
        config: of the model.

    Raises:
        BadInputs: an input is of another shape.
    """
    found = {}
    for name, shape in family.input_shapes(config).items():
        value = call[name]
        if value.ndim == len(shape) + 1 and "B" not in shape:
            if not torch.equal(value, value[:1].expand_as(value)):
                raise BadInputs(
                    f"{name} has shape {list(value.shape)} and differs between the pictures of the batch; the model "
                    "takes one for all of them: draw one picture at a time"
                )
            value = value[0]
        fixed = [(size, wanted) for size, wanted in zip(value.shape, shape, strict=False) if isinstance(wanted, int)]
        if value.ndim != len(shape) or any(size != wanted for size, wanted in fixed):
            raise BadInputs(
                f"the pipeline gives {name} of shape {list(value.shape)}; this model takes {list(shape)}: expected the "
                "pipeline that belongs to it"
            )
        found[name] = value.to(_DTYPES[family.inputs[name].dtype])
    return found
