"""The result of the verb `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4trt.verb import Result

__all__ = ["Plan"]


@dataclass(frozen=True, eq=False)
class Plan(Result):
    """What a model needs.

    Attributes:
        source: as it was given.
        family: name of its family.
        parameters: of the transformer.
        transformers: how many such transformers the pipeline has.
        gpu: ``name``, ``compute_capability``, ``memory_bytes``, ``bandwidth`` in bytes a second, and ``tflops`` by
            format.
        sizes: of the symbolic dimensions; ``width``, ``height`` and ``frames``.
        flops: of a call.
        components: beside the transformer: ``name``, ``stage``, ``bytes`` of weights, null where nobody knows, and
            ``workspace_bytes`` of a VAE that decodes.
        runtime_bytes: that are taken whatever the model.
        forms: of the weights, each with its bytes, and its peak in every mode.
        chosen: name of the form that the advice is for.
        fits: whether that fits with all components resident.
        changes: what lets it fit, the smallest change first; where nothing does, what needs least.
        quantize: ``source_bytes`` in 16 bit, ``checkpoint_bytes``, and ``bytes_of_a_call``, which calibration by block
            keeps on disk of each captured call.
        notes: what is to be told besides.
        picture: absolute path of the picture, null without one.
    """

    source: str
    family: str
    parameters: int
    transformers: int
    gpu: Mapping[str, Any]
    sizes: Mapping[str, int]
    flops: int
    components: Sequence[Mapping[str, Any]]
    runtime_bytes: int
    forms: Sequence[Mapping[str, Any]]
    chosen: str
    fits: bool
    changes: Sequence[Mapping[str, Any]]
    quantize: Mapping[str, int]
    notes: Sequence[str]
    picture: str | None
