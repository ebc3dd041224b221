"""Pictures that a pipeline reads beside its prompts: what to edit, fill, or be led by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from calibration.inputs.pipelines import PIPELINES
from fp4trt.errors import BadInputs
from fp4trt.file_kind import what_it_is, what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.pipeline_folder import PIPELINE, index_of
from fp4trt.safetensors_file import sha256_of

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Conditions", "class_of", "conditions_of", "mask_of", "opened_picture", "refuse_other_channels", "scaled"]

_CONCATENATING: Final = ("FluxFillPipeline", "FluxControlPipeline")
"""Pipelines of FLUX.1 whose transformer reads the picture as further channels."""

_MASK: Final = ".mask.png"


@dataclass(frozen=True)
class Conditions:
    """What a pipeline is called with beside a prompt.

    Attributes:
        pipeline: name of its class.
        pictures: files; the prompts take them in order, and again from the first.
    """

    pipeline: str
    pictures: tuple[Path, ...] = ()

    def arguments(self, index: int, resolution: int | None) -> dict[str, Any]:
        """Return the arguments for the prompt of an index.

        Args:
            index: of the prompt.
            resolution: pixels of a side, where the user gave one: then Kontext's picture is scaled to that area, and
                not to one of the sizes of about a megapixel that it was trained on.

        Raises:
            BadInputs: a file is not a picture, is too small a one, or has no mask where one is needed.
        """
        if not self.pictures:
            return {}
        file = self.pictures[index % len(self.pictures)]
        picture, called = opened_picture(file), PIPELINES[self.pipeline]
        if min(picture.size) < called.side:
            raise BadInputs(
                f"{file} has {picture.width} x {picture.height} pixels; a {self.pipeline} reads pictures of "
                f"{called.side} x {called.side} at least"
            )
        values = dict.fromkeys(("image", "control_image"), picture.convert(called.mode))
        if "mask_image" in called.pictures:
            values["mask_image"] = mask_of(file, picture)
        own: dict[str, Any] = {}
        if self.pipeline == "FluxKontextPipeline" and resolution is not None:
            own = {"max_area": resolution**2, "_auto_resize": False}
            values["image"] = scaled(values["image"], resolution**2)
        return {name: values[name] for name in called.pictures} | own

    def described(self) -> dict[str, str]:
        """Return the pictures by name, each with the hash of its file."""
        return {file.name: sha256_of(file) for file in self.pictures}


def class_of(root: Path) -> str:
    """Return the class of the pipeline in a folder, one of those that can be sampled.

    Raises:
        BadInputs: it is of another.
    """
    index = index_of(root)
    name = str(None if index is None else load_json(index).get("_class_name"))
    if name not in PIPELINES:
        raise BadInputs(
            f"{root} is a {name}; prompts are sampled with one of: {', '.join(PIPELINES)}: "
            "capture what its transformer is given yourself (docs/models.md), and give that as --inputs"
        )
    return name


def conditions_of(root: Path, config: Mapping[str, Any], pictures: Path | None) -> Conditions:
    """Return what a pipeline is to be called with, before it is loaded.

    Args:
        root: the pipeline's folder.
        config: of its transformer.
        pictures: a picture, or a folder of pictures, taken in the order of their names.

    Raises:
        BadInputs: the pipeline needs pictures and none are given, or takes none, or is of a class that is not known.
    """
    name = class_of(root)
    called = PIPELINES[name]
    if pictures is None and called.pictures and not called.optional:
        raise BadInputs(f"{root} is a {name}, which reads pictures beside prompts; give --pictures FOLDER|FILE")
    if pictures is not None and not called.pictures:
        raise BadInputs(f"{root} is a {name}, which reads no pictures; leave out --pictures")
    if called.flux1:
        refuse_other_channels(root, name, config)
    found = Conditions(name, () if pictures is None else _files(pictures))
    for index in range(len(found.pictures)):  # each is opened once before hours are spent on the others
        found.arguments(index, 64)
    return found


def refuse_other_channels(root: Path, name: str, config: Mapping[str, Any]) -> None:
    """Refuse a transformer that is another pipeline's, by its channels: 2 x 2 of the VAE's latents, and more."""
    channels, out = config.get("in_channels"), config.get("out_channels") or config.get("in_channels")
    takes_more = name in _CONCATENATING
    wrong = (channels != out) != takes_more
    wanted = ""
    if (root / "vae" / "config.json").is_file():
        vae = load_json(root / "vae" / "config.json")
        latents, widths = vae.get("latent_channels"), vae.get("block_out_channels")
        if isinstance(latents, int) and isinstance(widths, list):
            mask = 4 * 4 ** (len(widths) - 1) if name == "FluxFillPipeline" else 0
            made = 4 * latents * (1 + takes_more) + mask
            wrong, wanted = wrong or channels != made, f", which takes {made} with its VAE"
    if wrong:
        raise BadInputs(
            f"{root} is a {name} by its {PIPELINE}{wanted}, but its transformer has {channels} channels in and {out} "
            "out; expected the pipeline of this transformer"
        )


def _files(pictures: Path) -> tuple[Path, ...]:
    if pictures.is_file():
        return (pictures,)
    if not pictures.is_dir():
        raise BadInputs(f"{pictures} {what_it_lacks(pictures)}; expected a picture, or a folder of pictures")
    files = sorted(file for file in pictures.iterdir() if file.is_file() and not file.name.startswith("."))
    files = [file for file in files if not file.name.endswith(_MASK)]
    if not files:
        raise BadInputs(f"{pictures} holds no picture; expected some, such as cat.png")
    return tuple(files)


def opened_picture(file: Path) -> Image.Image:
    """Return the picture in a file, turned as its EXIF says.

    Raises:
        BadInputs: it is none.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).copy()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        kind = _other_kind(file) or f"is not a picture that can be read ({reason})"
        raise BadInputs(f"{file} {kind}; expected PNG, JPEG or such") from None


def _other_kind(file: Path) -> str | None:
    """Return what a file is in place of a picture, such as a Git LFS pointer, where it can be read and tells."""
    try:
        return what_it_is(file)
    except OSError:
        return None


def mask_of(file: Path, picture: Image.Image) -> Image.Image:
    """Return what is to be filled, in white: ``NAME.mask.png`` beside the picture, or what is transparent in it."""
    from PIL import ImageOps

    beside = file.with_name(f"{file.stem}{_MASK}")
    if beside.is_file():
        return opened_picture(beside).convert("L")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        raise BadInputs(
            f"{file} has no mask; expected {beside.name} beside it, white where to fill, or a picture that is "
            "transparent there"
        )
    return ImageOps.invert(picture.convert("RGBA").getchannel("A"))


def scaled(picture: Image.Image, area: int) -> Image.Image:
    """Return a picture of the same proportions, of about so many pixels."""
    factor = area**0.5 / (picture.width * picture.height) ** 0.5
    return picture.resize((max(16, round(picture.width * factor)), max(16, round(picture.height * factor))))
