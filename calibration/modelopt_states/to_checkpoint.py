"""A quantized checkpoint from a ModelOpt state: what the state says is taken as it is, and held against a recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from calibration.by_block.calibration import Calibration
from calibration.by_block.quantize_blocks import Prepared
from calibration.checkpoints.one_pass import Done
from calibration.checkpoints.plain import empty_source, load_source, source_hashes
from calibration.methods.plan import Plain
from calibration.modelopt_states.contents import Contents, amax_of, contents_of, tensors_of
from calibration.modelopt_states.reference import outputs_of
from calibration.modelopt_states.state import Restored, restore
from calibration.recipes.recipe import PTQ, FormatRules, ModelOpt, Recipe, SVDQuant
from calibration.results.write import Given
from fp4trt.account import BRANCH, SMOOTHING
from fp4trt.errors import BadCheckpoint, BadInputs
from fp4trt.families import Family, family_of
from fp4trt.json_file import load_json
from fp4trt.number_formats import BF16, FORMATS, NAMES, NumberFormat
from fp4trt.safetensors_file import HeldTensor, hold, sha256_of

__all__ = ["Taken", "take"]

NAME: Final = "modelopt-state"
"""What manifest and graph call the recipe of a result whose weights were decided elsewhere."""


class FromState(BaseModel):
    """The method of such a result.

    Attributes:
        algorithms: ModelOpt's calibrations that the state has been through.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["modelopt-state"] = NAME
    algorithms: tuple[str, ...] = ()


class StateRecipe(Recipe):
    """What the manifest says of how such a result was made; no YAML file can ask for it."""

    method: FromState  # type: ignore[assignment]


@dataclass(frozen=True)
class Taken:
    """What was taken from a state.

    Attributes:
        plain: the source with the state's weights, and its formats.
        given: what the linears became.
        expected: what the state's own model gives on some inputs.
        algorithms: ModelOpt's calibrations that the state has been through.
        rounded: the type of the state's weights, where they were rounded to BF16.
    """

    plain: Plain
    given: Given
    expected: list[torch.Tensor]
    algorithms: tuple[str, ...]
    rounded: str | None

    @property
    def apart(self) -> int:
        """How many FP4 GEMMs there are more than if linears that read one input shared their scales."""
        together = {path: group[0] for group in self.plain.family.groups(self.plain.config) for path in group}
        groups = self.plain.groups
        return len(groups) - len({together.get(group[0], group[0]) for group in groups})


def take(folder: Path, state: Path, trust: bool, asked: Plain | None) -> Taken:
    """Restore a state of a plain checkpoint's model, which is held in memory for that, and take all that it says.

    Args:
        folder: the plain checkpoint.
        state: a file that ``modelopt.torch.opt.save`` wrote.
        trust: see :func:`calibration.modelopt_states.state.restore`.
        asked: what a recipe asks for; None takes the formats from the state.

    Raises:
        Untrusted, BadCheckpoint, BadAmax, BadInputs, UnsupportedLinear: naming what is wrong.
    """
    if asked is not None:
        _refuse_other_methods(asked.recipe)
    config = load_json(folder / "config.json")
    family = family_of(config, folder)
    restored = restore(load_source(folder), state, trust)
    model = restored.model
    contents = contents_of(model, family, config, str(state))
    if all(kind == BF16 for kind in contents.formats.values()):
        raise BadCheckpoint(f"{state}: no linear's quantizers are on; expected some: quantize with ModelOpt first")
    tensors = tensors_of(model, contents)
    if asked is not None:
        _require_agreement(asked, restored, contents, tensors, state)
    plain = _plain(folder, family, config, restored, contents, tensors)
    described = {"data": "modelopt state", "sha256": sha256_of(state)}
    rounded = None if restored.dtype == torch.bfloat16 else str(restored.dtype).removeprefix("torch.")
    if rounded:
        described["rounded_from"] = rounded
    held = {name: hold(name, value) for name, value in tensors.items()}
    given = Given(
        Calibration({}, described), Prepared(held, amax=amax_of(model, contents)), Done(source_hashes(folder))
    )
    return Taken(plain, given, outputs_of(model, contents, family, config), restored.algorithms, rounded)


def _plain(
    folder: Path,
    family: Family,
    config: dict[str, Any],
    restored: Restored,
    contents: Contents,
    tensors: Mapping[str, torch.Tensor],
) -> Plain:
    """Return the source with the state's weights and formats in the place of its own."""
    model, _ = empty_source(folder)
    values = restored.model.state_dict()
    ordered = {
        name: _shape_of(name, values[name]) if name in tensors else _held(name, values[name])
        for name in model.state_dict()
    }
    own = set(family.quantized(config))
    formats = {path: kind for path, kind in contents.formats.items() if path in own or kind != BF16}
    recipe = StateRecipe(
        name=NAME,
        method=FromState(algorithms=restored.algorithms),
        formats=_rules(formats),
        attention="fp8" if contents.attentions else "bf16",
    )
    groups = _groups(formats, tensors, family.groups_of(config, formats))
    return Plain(folder, config, family, model, ordered, recipe, formats, groups, tuple(contents.attentions))


def _held(name: str, value: torch.Tensor) -> HeldTensor:
    """Return a tensor of the state, in BF16 where that holds it exactly, as in what was loaded from BF16 into FP32."""
    narrow = value.to(torch.bfloat16)
    return hold(name, narrow if torch.equal(narrow.to(value.dtype), value) else value)


def _shape_of(name: str, value: torch.Tensor) -> HeldTensor:
    """Return a weight that stands in the result as something else, without its values, which would fill memory."""
    return replace(hold(name, value), data=np.empty(0, np.uint8))


def _rules(formats: Mapping[str, Any]) -> FormatRules:
    """Return formats as a recipe says them."""
    (default, _), *_ = Counter(formats.values()).most_common()
    others = {kind: tuple(path for path in formats if formats[path] == kind) for kind in NAMES}
    rules = [{"linears": paths, "format": kind} for kind, paths in others.items() if paths and kind != default]
    return FormatRules.model_validate({"default": default, "rules": rules})


def _groups(
    formats: Mapping[str, str], tensors: Mapping[str, torch.Tensor], groups: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    """Return the quantized linears by what they share: TensorRT merges those of one input with equal scales."""

    def shared(path: str) -> tuple[Any, ...]:
        scales = tuple(float(tensors[f"{path}.{leaf}"]) for leaf in FORMATS[formats[path]].scalars)
        smoothing = tensors.get(f"{path}.{SMOOTHING}")
        return formats[path], scales, None if smoothing is None else tuple(smoothing.tolist())

    found: list[tuple[str, ...]] = []
    for group in groups:
        parts: dict[tuple[Any, ...], list[str]] = {}
        for path in group:
            if formats[path] != BF16:
                parts.setdefault(shared(path), []).append(path)
        found += [tuple(part) for part in parts.values()]
    return tuple(found)


def _refuse_other_methods(recipe: Recipe) -> None:
    """Refuse a recipe that nothing in a state can answer to."""
    if not isinstance(recipe.method, PTQ | SVDQuant | ModelOpt):
        raise BadInputs(
            f"a ModelOpt state was given, and the recipe {recipe.name}, whose method {recipe.method.name} is not "
            "ModelOpt's; leave --recipe out: the state says it all"
        )


def _require_agreement(
    asked: Plain, restored: Restored, contents: Contents, tensors: Mapping[str, torch.Tensor], state: Path
) -> None:
    """Refuse a state that is not what a recipe asks for.

    Raises:
        BadCheckpoint: naming the first thing that differs.
    """
    name = asked.recipe.name
    hint = "leave --recipe out to take what the state says"
    words = {name: f"{kind.title} {_blocks(kind)}" for name, kind in FORMATS.items()}
    for path, kind in contents.formats.items():
        wanted = asked.formats.get(path, BF16)
        if kind == wanted:
            continue
        quantizer: Any = restored.model.get_submodule(f"{path}.weight_quantizer")
        if kind == BF16:
            raise BadCheckpoint(
                f"{state}: {path} is not quantized, which the recipe {name} wants in {words[wanted]}; {hint}"
            )
        if wanted == BF16:
            raise BadCheckpoint(f"{state}: {path} is quantized, which the recipe {name} does not want; {hint}")
        raise BadCheckpoint(
            f"{state}: {path} has num_bits {quantizer.num_bits}; expected {words[wanted]} by the recipe {name}: {hint}"
        )
    if set(contents.attentions) != set(asked.fp8_attentions):
        raise BadCheckpoint(
            f"{state} has {len(contents.attentions)} attentions in FP8, and the recipe {name} asks for "
            f"{len(asked.fp8_attentions)}; {hint}"
        )
    if (problem := _other_algorithm(asked.recipe, restored.algorithms, tensors)) is not None:
        raise BadCheckpoint(f"{state}: {problem}; {hint}")


def _blocks(kind: NumberFormat) -> str:
    return "with one scale a tensor" if kind.block is None else f"in blocks of {kind.block}"


_ALGORITHMS: Final[Mapping[str, str]] = {"fp8_scale_sweep": "mse", "four_over_six": "mse"}
"""A recipe's algorithm to ModelOpt's, where that has another name."""


def _other_algorithm(recipe: Recipe, algorithms: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return how a state was made otherwise than a recipe says; None where it was not."""
    made = f"it was calibrated by ModelOpt's {', '.join(algorithms)}"
    method = recipe.method
    if isinstance(method, PTQ):
        plain = set(algorithms) <= {"max", "none"}
        return None if plain else f"{made}, and the recipe {recipe.name} is plain PTQ"
    wanted = "svdquant" if isinstance(method, SVDQuant) else ""
    if isinstance(method, ModelOpt):
        wanted = _ALGORITHMS.get(method.algorithm, method.algorithm)
    if wanted not in algorithms:
        return f"{made}, and the recipe {recipe.name} is {wanted or method.name}"
    ranks = sorted({len(value) for name, value in tensors.items() if name.endswith(f".{BRANCH[0]}")})
    if isinstance(method, SVDQuant) and ranks != [method.rank]:
        return (
            f"its branches have rank {', '.join(map(str, ranks))}, and the recipe {recipe.name} asks for {method.rank}"
        )
    return None
