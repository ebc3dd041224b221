"""One transformer for a model in any of its forms: a checkpoint in torch, or a graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load
from fp4trt.account import is_quantized_checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadLora, UnknownArtifact
from fp4trt.families import Transformer
from fp4trt.json_file import load_json
from fp4trt.make_source import folder_of
from fp4trt.safetensors_file import tensors_in_file
from onnx_functions.graph.lora_slots import is_factor_input
from onnx_functions.simulation import session

__all__ = ["GraphTransformer", "open_transformer"]

Slots = Mapping[str, Sequence[int | str]]
"""Factor of a slot to its shape; the rank has a name."""

Factors = dict[str, npt.NDArray[np.float32]]


def open_transformer(artifact: str | Path, device: str = "cpu") -> Transformer:
    """Open a model that is called with the family's inputs by name, and returns a tuple with the velocity first.

    Args:
        artifact: a checkpoint, plain or quantized (``digits`` for the built-in one), or an exported ONNX file.
        device: where a checkpoint computes, ``cpu`` or ``cuda``; a graph runs on the CPU.

    Raises:
        BadCheckpoint, BadGraph, UnknownFamily: the artifact is damaged.
        UnknownArtifact: it is neither; an engine runs on its GPU alone.
    """
    path = Path(artifact)
    if path.suffix == ".onnx":
        return GraphTransformer(path)
    if path.suffix == ".engine":
        raise UnknownArtifact(f"{path} is an engine, which is not run here; expected the checkpoint or graph it is of")
    folder = folder_of(path)
    quantized = is_quantized_checkpoint(load_json(folder / "config.json"), tensors_in_folder(folder))
    model: Any = load(folder) if quantized else load_source(folder)
    return model.to(device)


class GraphTransformer:
    """An exported graph in ONNX Runtime on the CPU, with the numerics that the engine should have.

    Args:
        graph: what ``fp4trt export`` wrote; its weights stay where they are.
        lora: what ``fp4trt lora`` wrote, for the slots of a graph that has some; without it they are left empty.

    Raises:
        BadGraph: it is no such graph.
        BadLora: the factors are not those of its slots.
        BadCheckpoint: their file is missing or damaged.
    """

    def __init__(self, graph: Path, lora: Path | None = None) -> None:
        self._session = session(graph)
        inputs = {value.name: value.shape for value in self._session.get_inputs()}
        slots = {name: shape for name, shape in inputs.items() if is_factor_input(name)}
        self._inputs = [name for name in inputs if name not in slots]
        self._factors = _empty(slots) if lora is None else _factors(slots, lora)

    def __call__(self, *, return_dict: bool = False, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs, each in the dtype of the first input.

        Args:
            return_dict: False, as nothing but a tuple is returned.
            inputs: the family's, by name; those that the graph does not have are ignored, as a pipeline gives some.
        """
        assert not return_dict, "a graph returns a tuple"
        given = {name: inputs[name].detach().float().cpu().numpy() for name in self._inputs}
        dtype = inputs[self._inputs[0]].dtype
        found = self._session.run(None, {**given, **self._factors})
        return tuple(torch.from_numpy(value).to(dtype) for value in found)


def _empty(slots: Slots) -> Factors:
    """Return factors of rank 0, with which a graph computes what it does without slots."""
    return {
        name: np.zeros([0 if isinstance(n, str) else n for n in shape], np.float32) for name, shape in slots.items()
    }


def _factors(slots: Slots, lora: Path) -> Factors:
    """Return the factors that a file holds.

    Raises:
        BadLora: they are not those of the slots.
    """
    stored = tensors_in_file(lora)
    for name in sorted(slots.keys() ^ stored.keys()):
        there = "has no slot for" if name in stored else "needs"
        raise BadLora(f"{lora} is not made for this graph, which {there} {name}: make it with fp4trt lora --checkpoint")
    for name, shape in slots.items():
        found = stored[name].shape
        if len(found) != len(shape) or any(isinstance(b, int) and a != b for a, b in zip(found, shape, strict=True)):
            raise BadLora(
                f"{lora}: {name} is {list(found)}, and the graph's {shape}: make it of the graph's checkpoint"
            )
    return {name: stored[name].tensor().float().numpy() for name in slots}
