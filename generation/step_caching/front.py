"""The modulated input of the first block, as TeaCache compares it: a model's front alone, loaded as it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.checkpoints.plain import open_plain
from calibration.checkpoints.quantized import empty_model, read, reader
from fp4trt.account import is_quantized_checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import UnsupportedModel
from fp4trt.families import Family, family_of
from fp4trt.families.family import Config
from fp4trt.json_file import load_json
from generation.step_caching.deciders import Signal

__all__ = ["first_reader", "modulated_signal"]

Read = Callable[[str], torch.Tensor]


class _Reached(Exception):
    """The model has got to the first block's input, which this carries."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


def modulated_signal(folder: Path, dtype: torch.dtype = torch.float32) -> Signal:
    """Return what gives the input of the first block's attention: embedded, normalised and modulated picture tokens.

    A call runs the embedders and the first block's norm and no further. The weights that this takes are read at the
    first call; no other is.

    Args:
        folder: of a plain or quantized checkpoint.
        dtype: to compute in.

    Raises:
        BadCheckpoint: it is damaged.
        UnsupportedModel: no linear of its first block reads picture tokens.
    """
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    model, value_of = _opened(folder, config, dtype)
    for name, module in model.named_modules():
        module.register_forward_pre_hook(_loading(name, value_of))
    model.get_submodule(first_reader(family, config)).register_forward_pre_hook(_stopping)

    def signal(inputs: Mapping[str, Any]) -> torch.Tensor:
        given = {name: inputs[name] for name in family.input_shapes(config)}
        computed_in = {name for name in given if family.inputs[name].dtype == "bf16"}
        given = {name: value.to(dtype) if name in computed_in else value for name, value in given.items()}
        try:
            with torch.inference_mode():
                model(**given, return_dict=False)
        except _Reached as reached:
            return reached.value.float()
        raise AssertionError("the first block was not run")

    return signal


def first_reader(family: Family, config: Config) -> str:
    """Return the path of the first linear that reads tokens of the picture.

    Raises:
        UnsupportedModel: there is none.
    """
    block = family.blocks(config)[0]
    for stack in family.stacks:
        for path, reads in stack.reads.items():
            if block.startswith(f"{stack.path}.") and "L" in reads.split("+"):
                return f"{block}.{path}"
    raise UnsupportedModel(f"no linear of {block} reads tokens of the picture; take the decider time, or latents")


def _opened(folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> tuple[nn.Module, Read]:
    """Return the model on the meta device, and what reads a tensor of it."""
    if is_quantized_checkpoint(config, tensors_in_folder(folder)):
        checkpoint = read(folder)
        model = empty_model(checkpoint)
        return model.eval(), reader(checkpoint, model, dtype)
    source = open_plain(folder)
    return source.model.eval(), lambda name: source.tensor(name, dtype)


def _loading(path: str, value_of: Read) -> Callable[..., None]:
    """Return a hook that gives a module its own weights before it runs for the first time."""

    def load(module: nn.Module, _: Any) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = value_of(f"{path}.{name}" if path else name)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name not in module._non_persistent_buffers_set:
                setattr(module, name, value_of(f"{path}.{name}" if path else name))

    return load


def _stopping(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(given[0])
