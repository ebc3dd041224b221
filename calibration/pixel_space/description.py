"""How a pixel-space model is sampled, calibrated and judged: ``sampling.json``, beside the config of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fp4trt.errors import BadCheckpoint, BadInputs
from fp4trt.json_file import load_json
from fp4trt.publish import write_json

__all__ = [
    "FILE_NAME",
    "PATCH",
    "Classifier",
    "Description",
    "Pixels",
    "Run",
    "Text",
    "read_description",
    "write_description",
]

FILE_NAME: Final = "sampling.json"
PATCH: Final = 4
"""Pixels of a token's side."""

Prompts = Annotated[tuple[str, ...], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Pixels(_Strict):
    """An image.

    Attributes:
        size: pixels of a side.
        channels: 1 or 3.
    """

    size: int = Field(ge=PATCH, multiple_of=PATCH)
    channels: Literal[1, 3]

    @property
    def tokens(self) -> int:
        """How many tokens an image has."""
        return (self.size // PATCH) ** 2

    @property
    def token_channels(self) -> int:
        """How many channels a token has."""
        return self.channels * PATCH**2


class Text(_Strict):
    """A prompt.

    Attributes:
        words: text tokens, one for each word, and so the longest prompt.
        width: numbers of a token.
    """

    words: int = Field(ge=1)
    width: int = Field(ge=1, le=256)


class Run(_Strict):
    """Prompts that are drawn together, and the seed of their noise."""

    seed: int = Field(ge=0)
    prompts: Prompts


class Classifier(_Strict):
    """What judges the images.

    Attributes:
        file: its weights, beside this description.
        labels: prompt to the label that its image should get.
    """

    file: str = Field(pattern=r"^[\w-]+\.safetensors$")
    labels: dict[str, int]


class Description(_Strict):
    """How a model is sampled that needs no pipeline.

    Attributes:
        format: of the file.
        image: what it draws.
        text: what it reads.
        steps: of Euler's method.
        guidance: what the embedding of distilled guidance is told; models without one do not read it.
        prompts: to compare with; image i of a seed has prompt ``i % len(prompts)``.
        calibration: what is drawn to calibrate.
        classifier: of the images; None where there is none.
    """

    format: Literal["fp4trt sampling 1"] = "fp4trt sampling 1"
    image: Pixels
    text: Text
    steps: int = Field(ge=1)
    guidance: float
    prompts: Prompts
    calibration: Annotated[tuple[Run, ...], Field(min_length=1)]
    classifier: Classifier | None = None

    def known(self, prompts: list[str]) -> tuple[str, ...]:
        """Return prompts that the model can read.

        Raises:
            BadInputs: naming one with too many words, or a word that is in none of the model's own prompts.
        """
        own = [*self.prompts, *(prompt for run in self.calibration for prompt in run.prompts)]
        known = dict.fromkeys(word for prompt in own for word in prompt.split())
        for prompt in prompts:
            words = prompt.split()
            if unknown := [word for word in words if word not in known]:
                raise BadInputs(f"'{unknown[0]}' is not a word of this model's prompts; it knows: {', '.join(known)}")
            if len(words) > self.text.words:
                raise BadInputs(f"'{prompt}' has {len(words)} words; this model reads up to {self.text.words}")
        return tuple(prompts)


def read_description(folder: Path) -> Description:
    """Return what the ``sampling.json`` of a checkpoint's folder says.

    Raises:
        BadCheckpoint: it is missing or damaged, or describes another model than the config beside it.
    """
    path = folder / FILE_NAME
    try:
        found = Description.model_validate(load_json(path, "how the model is sampled"))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadCheckpoint(f"{path}: {where}: {problem['msg']}; copy it again") from None
    config = load_json(folder / "config.json")
    sizes = {"in_channels": found.image.token_channels, "joint_attention_dim": found.text.width}
    for key, size in sizes.items():
        if config.get(key) != size:
            raise BadCheckpoint(
                f"{path} describes a model whose {key} is {size}, config.json has {config.get(key)}; take the one that "
                "belongs to it"
            )
    return found


def write_description(folder: Path, description: Description) -> None:
    """Write ``sampling.json`` into a checkpoint's folder."""
    write_json(folder / FILE_NAME, description.model_dump(mode="json", exclude_none=True))
