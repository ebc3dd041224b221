"""Measure how much of the error of a model's output comes from each group of linears.

One group at a time is quantized in a model that is plain otherwise. Small errors that have nothing to do with each
other add up as squares, so that these figures foretell every choice of formats (``docs/quality.md`` says how well).
What stands before a group's block is the plain model, so it is run once for all groups of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from calibration.by_block.runner import Outputs
from calibration.inputs.captured import Inputs
from calibration.layer_choice.mixture import Mixture

__all__ = ["Choices", "Errors", "measure_groups", "relative_error", "runs_of", "spread"]

Errors = dict[str, dict[str, float]]
"""First linear of a group to choice to squared relative error of the model's outputs."""


Choices = Mapping[tuple[str, ...], Sequence[str]]
"""Module paths of the linears of each group to what they are measured in."""


def spread(calls: Sequence[Inputs], most: int) -> list[Inputs]:
    """Return at most so many of some calls, evenly over the denoising schedule."""
    order = sorted(range(len(calls)), key=lambda index: -float(calls[index]["timestep"].float().mean()))
    picked = torch.linspace(0, len(order) - 1, min(most, len(order))).round().long().tolist()
    return [calls[order[index]] for index in picked]


def relative_error(outputs: Sequence[Outputs], wanted: Sequence[Outputs]) -> float:
    """Return the mean over all calls, and a model's outputs, of the squared error relative to the wanted output's."""
    calls = zip(outputs, wanted, strict=True)
    pairs = [(f.double(), r.double()) for found, right in calls for f, r in zip(found, right, strict=True)]
    return sum(float((f - r).square().sum() / r.square().sum()) for f, r in pairs) / len(pairs)


def runs_of(groups: Choices, calls: int) -> int:
    """Return how often :func:`measure_groups` tells of progress."""
    return sum(map(len, groups.values())) * calls


def measure_groups(
    model: Mixture,
    groups: Choices,
    calls: Sequence[Inputs],
    wanted: Sequence[Outputs],
    finished: Mapping[str, Mapping[str, float]],
    keep: Callable[[Errors], object],
    tell: Callable[[int], object],
) -> Errors:
    """Return the error of the output with each group alone in each of its choices.

    Args:
        model: loaded.
        groups: what is measured.
        calls: inputs.
        wanted: the plain model's outputs.
        finished: what an earlier run has measured.
        keep: called after each block with all that is measured.
        tell: called after every run of the model.
    """
    errors: Errors = {first: dict(found) for first, found in finished.items()}
    before: list[Outputs] = [() for _ in calls]
    for block in model.blocks:
        for group, choices in groups.items():
            if not group[0].startswith(f"{block}."):
                continue
            if group[0] in errors:
                tell(len(choices) * len(calls))
                continue
            found = {}
            for kind in choices:
                with model.exchanged(dict.fromkeys(group, kind)):
                    found[kind] = relative_error(model.rest(block, calls, before, tell), wanted)
            errors[group[0]] = found
        keep(errors)
        if block != model.blocks[-1]:
            before = model.after(block, calls, before)
    return errors
