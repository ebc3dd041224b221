"""The transformers to draw with: the BF16 one, quantized checkpoints, and recipes that make one first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protocol.album import saved
from protocol.prompts import Asked, Choice

from calibration.checkpoints.plain import load_source, weights_fingerprint
from calibration.checkpoints.quantized import load, read
from calibration.inputs.captured import check_inputs, save_inputs
from calibration.inputs.prompts import Sampling, capture_prompts, read_prompts
from calibration.methods import registry
from calibration.methods.plan import checked
from calibration.quantization import quantize
from calibration.recipes.recipe import Recipe, load_recipe
from fp4trt.checkpoint_folder import files_of
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.errors import BadInputs, BadRecipe
from fp4trt.families import Family
from fp4trt.progress import note
from fp4trt.safetensors_file import sha256_of
from generation.comparison.compare import opened

BASELINE = "bf16"
QUANTIZED_SHARE = 0.35
"""Bytes of a quantized checkpoint by those of the BF16 one, at most, for a transformer of FLUX.1's shape."""


@dataclass(frozen=True)
class Source:
    """The plain checkpoint.

    Attributes:
        root: the pipeline's folder.
        folder: the transformer's.
        config: its config.
        family: its family.
    """

    root: Path
    folder: Path
    config: dict[str, Any]
    family: Family

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(file.stat().st_size for file in files_of(self.folder))


@dataclass(frozen=True)
class Model:
    """One transformer.

    Attributes:
        label: for people, and for its folder of images.
        folder: of its checkpoint, which a recipe's need not be there yet.
        recipe: that makes it; None of one that is given.
        is_plain: whether it is the baseline.
    """

    label: str
    folder: Path
    recipe: Recipe | None = None
    is_plain: bool = False

    @property
    def recipe_name(self) -> str:
        """What it was made by."""
        return BASELINE if self.is_plain else read(self.folder).recipe

    def load(self) -> Any:
        """Return it in BF16, on the CPU."""
        return load_source(self.folder, torch.bfloat16) if self.is_plain else load(self.folder)

    def identity(self) -> str:
        """Return what tells its weights from others'."""
        if self.is_plain:
            return weights_fingerprint(self.folder)
        manifest = self.folder / MANIFEST
        files = [manifest] if manifest.is_file() else [self.folder / "config.json", *files_of(self.folder)]
        return "-".join(sha256_of(file) for file in files)


def models_of(source: Source, given: Sequence[str], made: Path) -> list[Model]:
    """Return the baseline and what is compared with it, in the order given.

    Args:
        source: the plain checkpoint.
        given: folders of quantized checkpoints, names of presets, and recipes' files.
        made: where checkpoints are that recipes make.

    Raises:
        BadCheckpoint, BadRecipe: naming what is wrong.
    """
    models = [Model(BASELINE, source.folder, is_plain=True)]
    for word in given:
        model = _model(word, made)
        if any(model.label == other.label for other in models):
            raise BadRecipe(f"--recipe {word} is the second one named {model.label}; give each its own name")
        if model.folder.is_dir():
            checkpoint = opened(model.label, model.folder, source.config)
            if model.recipe is not None and checkpoint.manifest.get("recipe") != model.recipe.resolved():
                raise BadRecipe(
                    f"{model.folder} was made by another recipe than {word}, of the same name; remove it, or rename one"
                )
        elif model.recipe is not None:
            checked(source.folder, model.recipe)
        models.append(model)
    return models


def _model(word: str, made: Path) -> Model:
    if Path(word).is_dir():
        return Model(Path(word).resolve().name, Path(word))
    recipe = load_recipe(word)
    return Model(recipe.name, made / recipe.name, recipe)


def needs_data(source: Source, model: Model) -> bool:
    """Whether a model has still to be made, by a recipe that calibrates."""
    if model.recipe is None or model.folder.is_dir():
        return False
    return registry.needs_activations(model.recipe.method) or checked(source.folder, model.recipe).needs_calibration


@dataclass(frozen=True)
class Data:
    """What recipes calibrate on: a file that is given, or calls that the pipeline makes of spare prompts.

    Attributes:
        file: captured inputs, or amax values; one that is not given is made.
        prompts: to draw it from; None of a file that is given.
        asked: how many of them were asked for.
        sampling: how these are drawn.
        source: the file of the prompts.
    """

    file: Path
    prompts: tuple[str, ...] | None
    asked: int
    sampling: Sampling
    source: str

    @property
    def described(self) -> str:
        """In words."""
        if self.prompts is None:
            return f"{self.file.name}, which was given"
        if self._listed.is_file():
            return f"{self.asked} prompts of {self.source} that are not evaluated on"
        return "nothing here; see each checkpoint's manifest"

    @property
    def _listed(self) -> Path:
        """The prompts that were captured."""
        return self.file.with_name("prompts.txt")

    def require(self) -> None:
        """Refuse what cannot be calibrated on.

        Raises:
            BadInputs: the file is missing, or there are not so many spare prompts.
        """
        if self.prompts is None:
            if not self.file.is_file():
                raise BadInputs(f"--calibration {self.file} is not a file; expected captured inputs, or amax values")
        elif len(self.prompts) < self.asked:
            raise BadInputs(
                f"{self.source} leaves {len(self.prompts)} prompts that are not evaluated on, and calibration takes "
                f"{self.asked}; lower --count or --calibration-prompts, or give --calibration"
            )

    def ready(self, source: Source) -> Path:
        """Return the file; draw it where it is not there."""
        if self.prompts is None or self.file.is_file():
            return self.file
        text = "".join(f"{prompt}\n" for prompt in self.prompts)
        saved(self._listed, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        note(f"capturing calibration inputs on {len(self.prompts)} prompts that are not evaluated on")
        model = load_source(source.folder, torch.bfloat16)
        calls = capture_prompts(model, source.folder, source.family, self._listed, self.sampling)
        save_inputs(self.file, check_inputs(calls, source.family, source.config))
        return self.file


def data_of(given: Path | None, choice: Choice, count: int, sampling: Sampling, made: Path) -> Data:
    """Return what recipes calibrate on.

    Args:
        given: a file of the user's.
        choice: the prompts; some that are spare are calibrated on.
        count: how many of them.
        sampling: how they are drawn.
        made: where what is captured goes.

    Raises:
        BadInputs: what an earlier run calibrated on is evaluated on now, or is another number of prompts.
    """
    if given is not None:
        return Data(given, None, count, sampling, choice.file)
    data = Data(made / "inputs.safetensors", tuple(map(_line, choice.spare[:count])), count, sampling, choice.file)
    if data.file.is_file():
        captured = read_prompts(made / "prompts.txt")
        if set(captured) & set(map(_line, choice.asked)):
            raise BadInputs(f"{data.file} was captured on prompts that are evaluated on now; lower --count")
        if tuple(captured) != data.prompts:
            raise BadInputs(
                f"{data.file} was captured on {len(captured)} other prompts; give the same --prompts and "
                f"--calibration-prompts {len(captured)}, or choose another --output"
            )
    return data


def _line(asked: Asked) -> str:
    """Return a prompt in one line."""
    return " ".join(asked.prompt.split())


def space_for_making(source: Source, models: Sequence[Model], data: Data, image_tokens: int, text_tokens: int) -> int:
    """Return about how many bytes of disk it takes to quantize: checkpoints, calls, and two blocks' outputs of each.

    Args:
        source: the plain checkpoint.
        models: those that have a checkpoint too.
        data: what recipes calibrate on.
        image_tokens: of a call.
        text_tokens: of a call.
    """
    checkpoints = sum(not model.folder.is_dir() for model in models) * source.bytes * QUANTIZED_SHARE
    calls = data.asked * (data.sampling.steps or 0) if any(needs_data(source, model) for model in models) else 0
    width = source.config["num_attention_heads"] * source.config["attention_head_dim"]
    of_call = (image_tokens + text_tokens) * 2 * width + text_tokens * source.config["joint_attention_dim"]
    return int(checkpoints) + calls * of_call * 2


def make(source: Source, model: Model, data: Data, device: str) -> None:
    """Quantize by a model's recipe, where that has not been done; a killed run resumes."""
    if model.recipe is None or model.folder.is_dir():
        return
    calibration = data.ready(source) if needs_data(source, model) else None
    note(f"quantizing by {model.label}")
    quantize(source.folder, model.folder, recipe=model.recipe, calibration=calibration, device=device)
