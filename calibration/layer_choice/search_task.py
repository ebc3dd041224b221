"""Measure for a search what each group of linears costs the model's output, in every choice that it has."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from calibration.by_block.measure_amax import identity_of
from calibration.by_block.quantize_blocks import prepared_by_block
from calibration.checkpoints.quantized import Checkpoint, read
from calibration.formats.shared_scales import SHARING
from calibration.inputs.captured import Inputs
from calibration.layer_choice.frontier import Point
from calibration.layer_choice.measurement import Choices, Errors, measure_groups, relative_error, runs_of
from calibration.layer_choice.mixture import Mixture, Quantized
from calibration.layer_choice.sensitivity import BITS, Group, Sensitivity, groups_of, parts, ranked
from calibration.methods import registry
from calibration.methods.plan import Plain
from calibration.quantization import quantize
from calibration.recipes.recipe import FormatRules, Quality, RankRule, Recipe
from fp4trt import publish
from fp4trt.checkpoint_manifest import MANIFEST
from fp4trt.number_formats import BF16
from fp4trt.progress import note, tracking
from fp4trt.safetensors_file import StoredTensor

__all__ = ["ALONE", "FORMAT", "SearchTask", "fits", "measured", "sized"]

FORMAT: Final = "fp4trt search 1"
"""What tells our search.json from another."""

ALONE: Final = tuple(name for name in BITS if name != BF16)
"""Formats that a whole checkpoint is made in, to take linears from."""


@dataclass(frozen=True)
class SearchTask:
    """What is searched, and on which data.

    Attributes:
        plain: the checkpoint, with the recipe whose method chooses values.
        recipe: what the result is written for: the same, or one that trains from there.
        calibration: captured inputs, as the user gave them.
        calls: all of them.
        some: those that errors are measured on.
        device: where to compute.
        ranks: of branches to choose from, rising.
    """

    plain: Plain
    recipe: Recipe
    calibration: str | Path | None
    calls: Sequence[Inputs]
    some: Sequence[Inputs]
    device: str
    ranks: tuple[int, ...]

    def identity(self) -> str:
        """Return what tells measurements from those of another model, method or data."""
        run = identity_of(self.plain.folder, self.plain.config, self.calls, self.device)
        told = [FORMAT, SHARING, run, self.plain.recipe.resolved(), len(self.some), *self.ranks]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def alone(self) -> tuple[str, ...]:
        """Return the choices that a whole checkpoint is made in, to take linears from."""
        return (*ALONE, *map(ranked, self.ranks))

    def choices(self) -> Choices:
        """Return what each group is measured in."""
        return {
            group: tuple(kind for kind in self.alone() if fits(self.plain, group, parts(kind)[1]))
            for group in self.plain.family.groups(self.plain.config)
        }


def fits(plain: Plain, group: Sequence[str], rank: int) -> bool:
    """Whether linears that read the same input can have a branch of a rank for each of them; 0 is none."""
    method, shapes = plain.recipe.method, {path: plain.stored[f"{path}.weight"].shape for path in group}
    if not rank:
        return True
    return isinstance(method, Quality) and method.pooled(len(group), rank) <= registry.largest_rank(group, shapes)


@contextlib.contextmanager
def measured(task: SearchTask, partial: Path, runs: int) -> Iterator[tuple[Sensitivity, Callable[[Point], Point]]]:
    """Measure every group; give the result, and what measures a choice.

    Args:
        task: what is searched.
        partial: folder for what is finished.
        runs: choices that will be measured.
    """
    finished = publish.progress_of(partial)
    publish.note_progress(partial, {"errors": {}, **finished})
    plain = task.plain
    quantized = {}
    for index, kind in enumerate(task.alone(), 1):
        note(f"quantizing the model to {kind}, {index} of {len(task.alone())}")
        quantized[kind] = Quantized(_uniform(task, partial / kind, kind))
    groups = task.choices()
    total = (2 + runs) * len(task.some) + runs_of(groups, len(task.some))
    with contextlib.ExitStack() as stack:
        changed = stack.enter_context(_folded(task, partial / "folds"))
        advance = stack.enter_context(tracking(total, "measuring"))
        reference = Mixture(plain.folder, {}, {}, task.device)
        with reference.loaded():
            wanted = reference.outputs(task.some, {}, advance)
        model = Mixture(plain.folder, changed, quantized, task.device)
        stack.enter_context(model.loaded())
        folded = relative_error(model.outputs(task.some, {}, advance), wanted)
        keep = lambda errors: publish.note_progress(partial, {"errors": errors})  # noqa: E731
        errors = measure_groups(model, groups, task.some, wanted, finished.get("errors", {}), keep, advance)
        base = folded or min(min(found.values()) for found in errors.values())
        sensitivity = Sensitivity(sized(plain, _beyond(errors, base)), base)

        known: dict[tuple[str, ...], float] = {}

        def measure(point: Point) -> Point:
            chosen = tuple(point.choice(group[0]) for group in groups)
            if chosen in known:  # a point without branches that is on both frontiers
                advance(len(task.some))
            else:
                formats = {path: kind for group, kind in zip(groups, chosen, strict=True) for path in group}
                known[chosen] = relative_error(model.outputs(task.some, formats, advance), wanted) ** 0.5
            return replace(point, measured=known[chosen])

        yield sensitivity, measure


def sized(plain: Plain, errors: Mapping[str, Mapping[str, float]]) -> tuple[Group, ...]:
    """Return a model's groups with their sizes and these errors."""
    shapes, method = {path: plain.stored[f"{path}.weight"].shape for path in plain.formats}, plain.recipe.method
    return groups_of(
        plain.family, plain.config, shapes, errors, *((method.pooled,) if isinstance(method, Quality) else ())
    )


def _uniform(task: SearchTask, directory: Path, kind: str) -> Checkpoint:
    """Return the checkpoint with all linears in one choice, which the recipe's method chooses the values of."""
    if not (directory / MANIFEST).is_file():
        format, rank = parts(kind)
        recipe = task.plain.recipe.model_copy(update={"formats": FormatRules.model_validate({"default": format})})
        if rank:
            small = [path for group, choices in task.choices().items() if kind not in choices for path in group]
            rules = (RankRule(linears=tuple(small), rank=0),) if small else ()
            method = recipe.method.model_copy(update={"rank": rank, "ranks": rules})
            recipe = recipe.model_copy(update={"method": method})
        quantize(task.plain.folder, directory, recipe=recipe, calibration=task.calibration, device=task.device)
    return read(directory)


@contextlib.contextmanager
def _folded(task: SearchTask, work: Path) -> Iterator[Mapping[str, StoredTensor]]:
    """Give what the method makes of linears that stay in 16 bit, by name."""
    options = task.plain.method
    if not registry.changes_plain_linears(options):
        yield {}
        return
    method = registry.of_block(options, task.plain.family, task.plain.config)
    formats = dict.fromkeys(task.plain.formats, BF16)
    recipe = task.plain.recipe.resolved()
    with prepared_by_block(task.plain.folder, task.calls, formats, method, recipe, work, task.device) as prepared:
        yield prepared.tensors


def _beyond(errors: Errors, base: float) -> Errors:
    """Return errors beyond that which any change of the model has, because it rounds otherwise in 16 bit."""
    less = {first: {kind: max(0.0, value - base) for kind, value in found.items()} for first, found in errors.items()}
    return {first: {**found, BF16: 0.0} for first, found in less.items()}
