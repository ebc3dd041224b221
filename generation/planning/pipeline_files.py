"""The components beside the transformer in a pipeline's folder: their sizes, from headers, or from an index alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json, object_of, strings_by_name
from fp4trt.pipeline_folder import index_of
from fp4trt.safetensors_file import tensors_in_file
from generation.planning.components import Component, Stage, decoder_of

__all__ = ["components_in", "transformers_in"]

_FLOATS: Final[Mapping[str, float]] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of weights that are loaded in 16 bit, whatever they are stored in."""

_STEMS: Final = ("model", "diffusion_pytorch_model")
"""What the names of weights begin with: of transformers' models, and of diffusers'."""

_NO_MODELS: Final = (
    "tokenizer",
    "scheduler",
    "processor",
    "feature_extractor",
    "image_processor",
    "guider",
    "prompt_upsampler",
)
"""What the names of a pipeline's parts begin with that are no models, or models that a pipeline runs without."""

_DECODERS: Final = ("vae", "audio_vae", "vocoder")


def components_in(pipeline: Path) -> tuple[Component, ...]:
    """Return the models beside the transformers in a pipeline's folder, in the order of its index.

    Raises:
        BadCheckpoint: a file is damaged.
    """
    return tuple(_component(pipeline / name) for name in _parts(pipeline) if not name.startswith("transformer"))


def transformers_in(pipeline: Path) -> int:
    """Return how many transformers a pipeline's folder has: two where each has a part of the schedule."""
    return sum(name.startswith("transformer") for name in _parts(pipeline))


def _parts(pipeline: Path) -> Iterator[str]:
    """Yield the names of a pipeline's models."""
    index = index_of(pipeline)
    for name in load_json(index) if index is not None else ():
        is_model = not name.startswith(("_", *_NO_MODELS))
        if is_model and (pipeline / name / "config.json").is_file():
            yield name


def _component(folder: Path) -> Component:
    config = load_json(folder / "config.json")
    stage: Stage = "decode" if folder.name in _DECODERS else "encode"
    decoder = decoder_of(config) if folder.name == "vae" else None
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    name = f"{folder.name} ({kind})" if isinstance(kind, str) else folder.name
    if (files := _files(folder)) is None:
        return Component(name, stage, _indexed(folder, config), decoder=decoder)
    tensors = {key: tensor for file in files for key, tensor in tensors_in_file(file).items()}
    elements = {key: math.prod(tensor.shape) for key, tensor in tensors.items() if tensor.dtype in _FLOATS}
    others = sum(tensor.nbytes for key, tensor in tensors.items() if key not in elements)
    kept = sum(count for key, count in elements.items() if str(kind).endswith("T5EncoderModel") and ".wo." in key)
    return Component(name, stage, sum(elements.values()), others, kept, decoder)


def _files(folder: Path) -> tuple[Path, ...] | None:
    """Return the files of a model's weights; None where they are not there."""
    for stem in _STEMS:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            names = sorted(set(_weight_map(index).values()))
        else:
            names = [f"{stem}.safetensors"]
        if all((folder / name).is_file() for name in names):
            return tuple(folder / name for name in names)
    return None


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        names = strings_by_name(load_json(index).get("weight_map"), "weight_map")
    except TypeError as error:
        raise BadCheckpoint(f"{index} is not an index of safetensors files ({error}); copy it again") from None
    if outside := next((name for name in names.values() if Path(name).name != name), None):
        raise BadCheckpoint(f"{index} speaks of {outside!r}; expected the name of a file beside it: copy it again")
    return names


def _indexed(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Return a model's elements as the size in its index and the type in its config tell, None without an index."""
    index = next((file for stem in _STEMS if (file := folder / f"{stem}.safetensors.index.json").is_file()), None)
    if index is None:
        return None
    try:
        total = object_of(load_json(index).get("metadata"), "metadata").get("total_size")
    except TypeError as error:
        raise BadCheckpoint(f"{index} is not an index of safetensors files ({error}); copy it again") from None
    if type(total) is not int or total < 0:
        return None
    wide = config.get("dtype", config.get("torch_dtype")) == "float32"
    return total // (4 if wide else 2)
