"""The object that stands in for ``pipe.transformer``: a pipeline's calls in, an artifact's velocities out."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch

from calibration.inputs.captured import Inputs
from fp4trt.families import Transformer
from fp4trt.options import file_name, one_of, takes
from generation.pipelines.batches import joined, largest_batch, split
from generation.pipelines.calls import Calls, in_model_types, stub_of
from generation.pipelines.model import Model, model_of
from generation.transformer import open_transformer

__all__ = ["PipelineTransformer", "pipeline_transformer"]

_ASKED_FOR: Final = ("in_channels", "out_channels", "rope", "audio_rope")
"""What pipelines read of a transformer besides its config, where its class has it."""


@takes(artifact=file_name, device=one_of("cpu", "cuda"), lora=file_name)
def pipeline_transformer(
    artifact: str | Path, *, device: str = "cpu", lora: str | Path | None = None
) -> PipelineTransformer:
    """Open an artifact as what stands in for ``pipe.transformer`` in a diffusers pipeline.

    Args:
        artifact: a checkpoint, plain or quantized, a graph (``.onnx``), or an engine (``.engine``).
        device: where a checkpoint computes; a graph runs on the CPU, an engine on its GPU.
        lora: what ``fp4trt lora`` wrote, for the slots of a graph or an engine.

    Raises:
        BadOption: an option has a value that it does not take.
        UnknownArtifact, BadGraph, BadCheckpoint, UnknownFamily, BadLora: as
            :func:`generation.transformer.open_transformer`.
    """
    model = model_of(artifact)
    found = PipelineTransformer(model, lambda: open_transformer(artifact, device, lora), device)
    found.open()
    return found


class PipelineTransformer:
    """A model in any of its forms, called as diffusers' pipelines call their transformer.

    A pipeline's call becomes the family's inputs, in the types that the model computes in; a batch that is larger than
    an engine's profiles take becomes several calls. What the model cannot honour is refused by name.

    Args:
        model: which model it is.
        opener: opens it, at the first call.
        device: where a checkpoint computes.
        around: gives what stands around the model, such as a step cache: called with a transformer, returns one.

    Attributes:
        config: diffusers' config, by attribute and by key.
        dtype: that pipelines compute in around it.
        device: of tensors that it is called with.
        in_channels, out_channels, rope, audio_rope: as its diffusers class has them, where it does.
    """

    def __init__(
        self,
        model: Model,
        opener: Callable[[], Transformer],
        device: str = "cpu",
        around: Callable[[Transformer], Transformer] | None = None,
    ) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.model = model
        self.dtype, self.device = torch.bfloat16, torch.device(device)
        self._opener = opener
        self._opened: Transformer | None = None
        self._step: Transformer = self._in_parts if around is None else around(self._in_parts)
        stub = None if model.family.make is not None else stub_of(model.family, model.config)
        defaults = {} if stub is None else {key: value for key, value in stub.config.items() if key[:1] != "_"}
        self.config: Any = FrozenDict({**defaults, **model.config})  # type: ignore[no-untyped-call]
        held = {} if stub is None else {**vars(stub), **dict(stub.named_children())}  # not what a config is asked for
        for name in _ASKED_FOR:
            if name in held:
                setattr(self, name, held[name])
        self._signature = inspect.signature(self.__call__ if stub is None else stub.forward)
        self._shapes = model.family.input_shapes(model.config)
        self._calls = Calls(model.family, stub, model.config)

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Return what diffusers' class returns for the call.

        Raises:
            BadInputs: the call asks for what the model does not compute.
        """
        calls = self._calls.inputs(args, kwargs)
        latents = calls[0][next(iter(self._shapes))]
        outputs = [self._run(in_model_types(call, self.model.family, self.model.config)) for call in calls]
        answer = self._calls.answer([tuple(each.to(latents) for each in found) for found in outputs], args, kwargs)
        return _as_output(answer) if return_dict else answer

    def _run(self, call: Inputs) -> tuple[torch.Tensor, ...]:
        """Return the outputs of a call of the family's inputs."""
        with torch.inference_mode():
            found: tuple[torch.Tensor, ...] = self._step(
                **{name: value.to(self.device) for name, value in call.items()}, return_dict=False
            )
            return found

    def _in_parts(self, *, return_dict: bool = False, **call: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of a call, of a batch as large as the model takes at once, or of several such."""
        assert not return_dict
        transformer = self.open()
        parts = split(call, self._shapes, largest_batch(self.model.profiles, self._shapes, call))
        return joined([tuple(transformer(**part, return_dict=False)) for part in parts])

    def open(self) -> Transformer:
        """Open the model if it is not, and return it."""
        if self._opened is None:
            self._opened = self._opener()
        return self._opened

    def close(self) -> None:
        """Let the model go; the next call opens it again."""
        close = getattr(self._opened, "close", None)
        if close is not None:
            close()
        self._opened = None

    @property
    def forward(self) -> Callable[..., Any]:
        """This, by the signature of the class that it stands for, which modular pipelines look at."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        call.__signature__ = self._signature  # type: ignore[attr-defined]
        return call

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Say which of several calls a step those within are, to what stands around the model."""
        context = getattr(self._step, "cache_context", None)
        with contextlib.nullcontext() if context is None else context(name):
            yield


def _as_output(answer: tuple[Any, ...]) -> Any:
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

    return Transformer2DModelOutput(sample=answer[0]) if len(answer) == 1 else AudioVisualModelOutput(*answer)
