"""What a pipeline is called with beside a prompt and a seed, held against its class before it is loaded."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calibration.inputs.pictures import mask_of, opened_picture, refuse_other_channels, scaled
from calibration.inputs.pipelines import PIPELINES, Pipeline
from calibration.inputs.settings import refuse_missing_package, refuse_settings
from fp4trt.errors import BadInputs
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import PIPELINE, index_of
from generation.generate.request import Request
from generation.pipelines import Model

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["arguments_of", "called_of", "refuse_request"]

_SEVERAL: Final = ("Flux2Pipeline", "Flux2KleinPipeline", "QwenImageEditPlusPipeline")
"""Pipelines that read several pictures with one prompt."""

_SECOND: Final = "transformer_2"


def called_of(root: Path, model: Model) -> tuple[str, Pipeline]:
    """Return the class of the pipeline in a folder, and how it is called.

    Raises:
        BadInputs: it cannot be drawn with, or is around another model.
    """
    index = load_json(path) if (path := index_of(root)) is not None else {}
    name = str(index.get("_class_name"))
    called = PIPELINES.get(name)
    if called is None or called.blocks is not None:
        known = ", ".join(each for each, one in PIPELINES.items() if one.blocks is None)
        raise BadInputs(
            f"{root} is a {name}; pictures are generated with one of: {known}: with yours draw in Python, "
            "with fp4trt.pipeline_transformer as its transformer"
        )
    around, own = index.get("transformer"), model.config.get("_class_name")
    if not isinstance(around, list) or around[-1] != own:
        found = around[-1] if isinstance(around, list) else "no transformer"
        raise BadInputs(f"{root} is a pipeline around a {found}, but {model.path} is a {own}; give the model's own")
    if called.flux1:
        refuse_other_channels(root, name, model.config)
    return name, called


def refuse_request(
    root: Path, name: str, request: Request, second: str | Path | None, fps: float | None = None
) -> None:
    """Refuse what pipelines of a class do not take.

    Raises:
        BadInputs: naming the option.
        BadEnvironment: a package is missing that the pipeline needs.
    """
    for side in dict.fromkeys(request.size or (None,)):
        refuse_settings(root, name, request.sampling(side))
    _refuse_sides(root, name, request)
    if fps is not None and PIPELINES[name].frames is None:
        raise BadInputs(f"--fps {fps:g} was given, but {root} is a {name}, which draws no video: leave it out")
    _refuse_pictures(root, name, request)
    _refuse_guidance(root, name, request)
    refuse_missing_package(root, name)
    two = isinstance(part := load_json(root / PIPELINE).get(_SECOND), list) and part[0] is not None
    if two and second is None:
        raise BadInputs(f"{root} has two transformers; give what stands for {_SECOND} as --transformer-2")
    if second is not None and not two:
        raise BadInputs(f"--transformer-2 {second} was given, but {root} has one transformer: leave it out")


def _refuse_sides(root: Path, name: str, request: Request) -> None:
    if request.size is not None and len(PIPELINES[name].resolution) == 1 and len(set(request.size)) == 2:
        width, height = request.size
        raise BadInputs(f"--resolution {width}x{height} was given, but {root} is a {name}, which takes one side alone")


def _refuse_pictures(root: Path, name: str, request: Request) -> None:
    """Refuse pictures that are missing, superfluous, or cannot be read."""
    called, given = PIPELINES[name], request.pictures
    if not given and called.pictures and not called.optional:
        raise BadInputs(f"{root} is a {name}, which reads a picture beside a prompt; give it as --image FILE")
    if given and not called.pictures:
        raise BadInputs(f"--image {given[0]} was given, but {root} is a {name}, which reads no picture: leave it out")
    if len(given) > 1 and name not in _SEVERAL:
        raise BadInputs(f"{len(given)} pictures were given, but {root} is a {name}, which reads one: give one --image")
    if request.mask is not None and "mask_image" not in called.pictures:
        raise BadInputs(f"--mask {request.mask} was given, but {root} is a {name}, which reads no mask: leave it out")
    _pictures(name, request)


def _refuse_guidance(root: Path, name: str, request: Request) -> None:
    """Refuse guidance that the class has not, and a negative prompt that would say nothing."""
    import diffusers

    taken = inspect.signature(getattr(diffusers, name).__call__).parameters
    scale = request.true_cfg_scale
    if scale is not None and "true_cfg_scale" not in taken:
        raise BadInputs(f"--true-cfg-scale {scale:g} was given, but {root} is a {name}, which has none: leave it out")
    if scale is not None and request.negative_prompt is None:
        raise BadInputs("--true-cfg-scale is of the guidance by a negative prompt; give --negative-prompt too")
    if request.negative_prompt is None:
        return
    if "negative_prompt" not in taken:
        raise BadInputs(f"--negative-prompt was given, but {root} is a {name}, which takes none: leave it out")
    if "true_cfg_scale" in taken and (taken["true_cfg_scale"].default if scale is None else scale) <= 1:
        raise BadInputs(
            f"--negative-prompt was given, but a {name} heeds none where --true-cfg-scale is not above 1: give "
            "one such as 3.5"
        )


def arguments_of(name: str, request: Request) -> dict[str, Any]:
    """Return the arguments of a pipeline's call, but for prompt and generator."""
    called = PIPELINES[name]
    found: dict[str, Any] = {key: value for key, value in called.settings.items() if key != "output_type"}
    found |= {"output_type": "pil"} | request.sampling(None).as_arguments(called)
    if request.size is not None:
        width, height = request.size
        found |= {key: width if key == "width" else height for key in called.resolution}
    given = {"negative_prompt": request.negative_prompt, "true_cfg_scale": request.true_cfg_scale}
    found |= {key: value for key, value in given.items() if value is not None}
    return found | _pictures(name, request)


def _pictures(name: str, request: Request) -> dict[str, Any]:
    """Return the arguments that are pictures.

    Raises:
        BadInputs: a file is not a picture, is too small a one, or has no mask where one is needed.
    """
    if not request.pictures:
        return {}
    called = PIPELINES[name]
    opened = [opened_picture(file) for file in request.pictures]
    for file, picture in zip(request.pictures, opened, strict=True):
        if min(picture.size) < called.side:
            raise BadInputs(
                f"{file} has {picture.width} x {picture.height} pixels; a {name} reads pictures of {called.side} x "
                f"{called.side} at least"
            )
    shown: list[Image.Image] = [picture.convert(called.mode) for picture in opened]
    own: dict[str, Any] = {}
    if name == "FluxKontextPipeline" and request.size is not None:
        area = request.size[0] * request.size[1]
        own, shown = {"max_area": area, "_auto_resize": False}, [scaled(picture, area) for picture in shown]
    values: dict[str, Any] = dict.fromkeys(("image", "control_image"), shown if len(shown) > 1 else shown[0])
    if "mask_image" in called.pictures:
        given = request.mask
        values["mask_image"] = (
            mask_of(request.pictures[0], opened[0]) if given is None else opened_picture(given).convert("L")
        )
    return {key: values[key] for key in called.pictures} | own
