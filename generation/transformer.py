"""One transformer for a model in any of its forms: a checkpoint in torch, a graph in ONNX Runtime, an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.dlpack import from_dlpack

from calibration.checkpoints.plain import load_source
from calibration.checkpoints.quantized import load
from fp4trt.account import is_quantized_checkpoint
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadCall, BadLora
from fp4trt.families import Transformer
from fp4trt.json_file import load_json
from fp4trt.make_source import folder_of
from trt_build.session import Session, open_session
from trt_build.signature import Port

__all__ = ["GraphTransformer", "SessionTransformer", "open_transformer"]

_DTYPES: Final = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
}
"""ONNX element type to torch's dtype, of all that a transformer's inputs have."""


def open_transformer(artifact: str | Path, device: str = "cpu", lora: str | Path | None = None) -> Transformer:
    """Open a model that is called with the family's inputs by name, and returns a tuple with the velocity first.

    Args:
        artifact: a checkpoint, plain or quantized (``digits`` for the built-in one), a graph, or an engine.
        device: where a checkpoint computes, ``cpu`` or ``cuda``; a graph runs on the CPU, an engine on its GPU,
            the first unless ``cuda:1`` or another is named.
        lora: what ``fp4trt lora`` wrote, for a graph or an engine with slots.

    Raises:
        BadCheckpoint, BadGraph, UnknownFamily: the artifact is damaged.
        BadLora: the factors are not for the artifact, or it has no slots.
    """
    path = Path(artifact)
    if path.suffix in (".onnx", ".engine"):
        number = int(device.partition(":")[2] or 0) if device.startswith("cuda") else 0
        return SessionTransformer(open_session(path, lora=lora, device=number))
    if lora is not None:
        raise BadLora(f"{path} is a checkpoint, which has no slots; quantize with --lora, or open its graph or engine")
    folder = folder_of(path)
    quantized = is_quantized_checkpoint(load_json(folder / "config.json"), tensors_in_folder(folder))
    model: Any = load(folder) if quantized else load_source(folder)
    return model.to(device)


class SessionTransformer:
    """A session as pipelines call a transformer: tensors of torch by name, in the pipeline's own types.

    Args:
        session: is closed with this.
    """

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, *, return_dict: bool = False, **inputs: Any) -> tuple[torch.Tensor, ...]:
        """Return the outputs, each in the dtype and on the device of the first input.

        Args:
            return_dict: False, as nothing but a tuple is returned.
            inputs: the family's, by name; those that the session does not have are ignored, as a pipeline gives some.

        Raises:
            BadCall: one that it has is missing, or not of its shape.
        """
        assert not return_dict, "a session returns a tuple"
        ports = self.session.inputs
        given = {name: self._converted(port, inputs[name]) for name, port in ports.items() if name in inputs}
        found = self.session.run(given)
        first = inputs[next(iter(ports))]
        return tuple(from_dlpack(found[name]).to(first.device, first.dtype) for name in self.session.outputs)

    def _converted(self, port: Port, value: Any) -> torch.Tensor:
        """Return a tensor in an input's own type, as pipelines give positions in BF16, and where a session reads it."""
        if not isinstance(value, torch.Tensor):
            raise BadCall(f"the input {port.name} is a {type(value).__name__}; expected a tensor")
        where = "cpu" if self.session.device == "cpu" else value.device
        return value.detach().to(where, _DTYPES[port.dtype]).contiguous()

    def close(self) -> None:
        """Close the session."""
        self.session.close()


class GraphTransformer(SessionTransformer):
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
        super().__init__(open_session(graph, lora=lora))
