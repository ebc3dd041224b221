"""When a step is left out, and what is taken in its place: ``teacache.yaml``."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from calibration.checkpoints.quantized import plain_config
from calibration.formats.bfloat16 import bits_of
from fp4trt.checkpoint_folder import tensors_in_folder
from fp4trt.errors import BadStepCache
from fp4trt.families import Family, family_named, family_of
from fp4trt.families.family import Config
from fp4trt.file_kind import is_file, what_it_lacks
from fp4trt.json_file import kind_of, load_json

__all__ = [
    "DECIDERS",
    "FILE_NAME",
    "RULES",
    "Decider",
    "Model",
    "Polynomial",
    "Rule",
    "StepCaching",
    "described_as",
    "model_of",
    "read_settings",
    "refuse_other_model",
]

FILE_NAME: Final = "teacache.yaml"
"""Its name beside a checkpoint, where :func:`read_settings` of the folder finds it."""

Decider = Literal["time", "latents", "modulated"]
Rule = Literal["linear", "hold"]
DECIDERS: Final[tuple[Decider, ...]] = ("time", "latents", "modulated")
RULES: Final[tuple[Rule, ...]] = ("linear", "hold")

_SAMPLED: Final = 2048
"""Values of each tensor that tell one model from another."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Polynomial(_Strict):
    """What a change of the decider's signal does to the model's output, both as relative L1 distances.

    Attributes:
        coefficients: of the powers 0, 1, 2 ... of the distance, which ``domain`` is mapped to -1 ... 1 for.
        domain: smallest and largest distance that it was fitted to; one outside of them counts as the nearer of them.
        least: smallest result, so that no step comes for free.
    """

    coefficients: tuple[Finite, ...] = Field(min_length=1)
    domain: tuple[Finite, Finite]
    least: float = Field(gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> Polynomial:
        if self.domain[0] >= self.domain[1]:
            raise ValueError(f"the domain is {list(self.domain)}; expected the smaller number first")
        return self

    def __call__(self, distance: float) -> float:
        """Return the relative L1 distance of the outputs that a distance of the signals stands for."""
        low, high = self.domain
        place = (2 * min(max(distance, low), high) - low - high) / (high - low)
        value = 0.0
        for coefficient in reversed(self.coefficients):
            value = value * place + coefficient
        return max(value, self.least)


class Model(_Strict):
    """What a model is known by, in 16 bit and in any number format.

    Attributes:
        family: name.
        config: SHA-256 of its config, without what quantization and diffusers note in it.
        embedders: SHA-256 over tensors outside of the blocks, which no recipe changes.
    """

    family: str
    config: str
    embedders: str


class StepCaching(_Strict):
    """Which steps a model leaves out.

    Attributes:
        format: of the file.
        model: that it was fitted for.
        steps: of the schedule that it was fitted for.
        decider: whose signal is compared from step to step.
        polynomial: from that distance to the output's.
        threshold: a step is left out while the sum of the outputs' distances since the last computed step is below it.
        first: steps that are always computed at the start.
        last: and at the end.
        reuse: what stands for the velocity: the last computed one, or the line through the last two.
        figures: what was measured, as JSON.
    """

    format: Literal["fp4trt step caching 1"] = "fp4trt step caching 1"
    model: Model
    steps: int = Field(ge=1)
    decider: Decider
    polynomial: Polynomial
    threshold: float = Field(ge=0, allow_inf_nan=False)
    first: int = Field(ge=1)
    last: int = Field(ge=0)
    reuse: Rule
    figures: dict[str, Any] = {}

    def family(self) -> Family:
        """Return the model's family.

        Raises:
            BadStepCache: none has its name.
        """
        found = family_named(self.model.family)
        if found is None:
            raise BadStepCache(f"model.family is {self.model.family!r}, which is no family of ours; fit it again")
        return found

    def as_yaml(self) -> str:
        """Return the text of the file: the same settings give the same bytes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=120, default_flow_style=None)


def read_settings(path: Path) -> StepCaching:
    """Return what a file says; of a folder, its ``teacache.yaml``.

    Raises:
        BadStepCache: it is missing, damaged, or something else.
    """
    path = path / FILE_NAME if path.is_dir() else path
    wanted = "what fp4trt teacache wrote"
    if not is_file(path):
        raise BadStepCache(f"{path} {what_it_lacks(path)}; expected {wanted}")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadStepCache(f"{path} is not YAML ({reason}); expected {wanted}") from None
    if not isinstance(value, dict):
        raise BadStepCache(f"{path} holds {kind_of(value)}; expected {wanted}")
    try:
        return StepCaching.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadStepCache(f"{path}: {where}: {problem['msg']}; expected {wanted}") from None


def model_of(folder: Path) -> Model:
    """Return what a checkpoint's model is known by; reads a few KB of it.

    Args:
        folder: of a plain or quantized checkpoint.

    Raises:
        BadCheckpoint, UnknownFamily: it is damaged, or of no family of ours.
    """
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    blocks = tuple(f"{stack.path}." for stack in family.stacks)
    changed = tuple(f"{path}." for path in family.quantized(config))
    digest = hashlib.sha256()
    for name, stored in sorted(tensors_in_folder(folder).items()):
        if name.startswith((*blocks, *changed)) or stored.dtype not in ("BF16", "F16", "F32"):
            continue
        digest.update(f"{name} {list(stored.shape)}".encode())
        digest.update(bits_of(stored, 0, min(math.prod(stored.shape), _SAMPLED)).tobytes())
    return Model(family=family.name, config=described_as(config), embedders=digest.hexdigest())


def described_as(config: Config) -> str:
    """Return the SHA-256 of a config, without what quantization and diffusers, from copy to copy, note in it."""
    own = {key: value for key, value in plain_config(config).items() if not key.startswith("_")}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def refuse_other_model(settings: StepCaching, folder: Path, path: Path) -> None:
    """Refuse settings that were fitted for another model than a checkpoint's, in 16 bit or in any number format.

    Args:
        settings: from ``path``.
        folder: of the checkpoint.
        path: for the message.

    Raises:
        BadStepCache: naming what differs.
    """
    found, wanted = model_of(folder), settings.model
    advice = f"fit one for it: fp4trt teacache {folder}"
    if found.family != wanted.family:
        raise BadStepCache(f"{path} is for a {wanted.family} model, {folder} is a {found.family} model; {advice}")
    for key, what in (("config", "config"), ("embedders", "embedders' weights")):
        if getattr(found, key) != getattr(wanted, key):
            raise BadStepCache(f"{path} is for a {wanted.family} model of another {what} than {folder}; {advice}")
