"""LoRA files' changes fused into weights, a tensor at a time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from calibration.formats.bfloat16 import refuse_other_types
from calibration.lora.adapter import Rows
from calibration.lora.lycoris import Lycoris
from calibration.lora.pairs import Pair
from calibration.lora.reading import Change, LoraFile
from fp4trt.errors import BadLora
from fp4trt.families import Family
from fp4trt.safetensors_file import StoredTensor

__all__ = ["Changes", "FusedTensor", "changed_weight", "fused_tensors", "is_low_rank", "low_rank_of"]

Changes = Mapping[str, tuple[Change, ...]]
"""Name of a tensor of diffusers to what a LoRA does to it."""

Base = Callable[[str], torch.Tensor]


def changed_weight(name: str, base: Base, loras: Sequence[tuple[Changes, float]]) -> torch.Tensor:
    """Return a tensor with the changes of LoRAs, one after the other, each rounded to the tensor's dtype.

    Args:
        name: of a tensor of diffusers, a weight or a bias.
        base: name to the tensor before any LoRA. It is asked for other names too, where a LoRA turns the rows of a
            linear that several tensors of diffusers make.
        loras: (what a LoRA changes, its strength), in the order in which they are fused; strength 0 changes nothing.
    """
    if not loras:
        return base(name)
    *before, (changes, strength) = loras
    weight = changed_weight(name, base, before)
    for change in changes.get(name, ()) if strength else ():
        weight = _changed(change, weight, strength, base(name), lambda other: changed_weight(other, base, before))
    return weight


def _changed(change: Change, weight: torch.Tensor, strength: float, unchanged: torch.Tensor, at: Base) -> torch.Tensor:
    parts, rows = change.original.parts, change.rows
    part = parts[change.index]
    if change.adapter.by_rows or rows.all:
        weight, unchanged = _turned(weight, part.swapped), _turned(unchanged, part.swapped)
        changed = change.adapter.changed(weight, strength, rows, unchanged)
    else:
        whole = torch.cat([_turned(at(each.name), each.swapped) for each in parts])
        everything = Rows(0, len(whole), 0, (len(whole),))
        changed = rows.of(change.adapter.changed(whole, strength, everything, whole))
    return _turned(changed, part.swapped)


def is_low_rank(change: Change) -> bool:
    """Return whether a change of a linear's weight is a product of two factors, and nothing else."""
    return isinstance(change.adapter, Pair | Lycoris) and change.adapter.is_low_rank


def low_rank_of(change: Change, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a change that :func:`is_low_rank` as (down [rank, K], up [N, rank]), FP32: ``up @ down`` is added.

    Strength and alpha are in ``up``.
    """
    assert isinstance(change.adapter, Pair | Lycoris)
    down, up = change.adapter.low_rank(strength, change.rows)
    return down, _turned(up, change.original.parts[change.index].swapped)


def _turned(value: torch.Tensor, swapped: bool) -> torch.Tensor:
    """Return a tensor with its halves of rows swapped, where they are in single files."""
    return torch.cat(value.chunk(2)[::-1]) if swapped else value


@dataclass(frozen=True)
class FusedTensor:
    """A tensor of a checkpoint with the changes of LoRAs, made when it is called.

    It can be pickled, and holds of checkpoint and LoRAs what it needs.

    Attributes:
        name: of the tensor.
        stored: this tensor and those that it is fused with.
        loras: what each LoRA does to these, and its strength.
        in_fp32: the tensors that diffusers computes with in FP32.
    """

    name: str
    stored: Mapping[str, StoredTensor]
    loras: tuple[tuple[Changes, float], ...]
    in_fp32: frozenset[str] = frozenset()

    def __call__(self) -> torch.Tensor:
        """Return the tensor in BF16, in the shape that it is stored in.

        Raises:
            BadLora: a LoRA holds NaN or infinity.
            BadCheckpoint: the checkpoint's tensor is no floating-point number of 16 or 32 bit.
        """
        return changed_weight(self.name, self._base, self.loras).to(torch.bfloat16)

    def _base(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        refuse_other_types(f"{stored.file}: {name}", stored)
        return stored.tensor().to(torch.float32 if name in self.in_fp32 else torch.bfloat16)


def fused_tensors(
    stored: Mapping[str, StoredTensor], loras: Sequence[tuple[LoraFile, float]], family: Family
) -> dict[str, FusedTensor]:
    """Return name to what makes each tensor that LoRA files change, in BF16.

    Args:
        stored: the tensors of a plain checkpoint, by diffusers' names.
        loras: (file, strength), in the order in which they are fused.
        family: of the model.

    Raises:
        BadLora: a file changes a tensor that the checkpoint does not have.
    """
    changed = {name: lora.path for lora, strength in loras if strength for name in lora.changes}
    if absent := next((name for name in changed if name not in stored), None):
        raise BadLora(
            f"{changed[absent]} changes {absent}, which the checkpoint does not have; take a whole checkpoint"
        )
    in_fp32 = _in_fp32(family, stored)
    made = {}
    for name in changed:
        needed = _needed(name, [lora.changes for lora, _ in loras])
        made[name] = FusedTensor(
            name,
            {each: stored[each] for each in sorted(needed)},
            tuple(
                ({each: lora.changes[each] for each in sorted(needed) if each in lora.changes}, strength)
                for lora, strength in loras
            ),
            in_fp32 & needed,
        )
    return made


def _needed(name: str, loras: Sequence[Changes]) -> set[str]:
    """Return the tensors that one is made of: itself, and those whose rows a LoRA mixes with its own."""
    needed, open_names = set[str](), {name}
    while open_names:
        needed |= open_names
        open_names = {
            part.name
            for changes in loras
            for each in open_names
            for change in changes.get(each, ())
            if not change.adapter.by_rows
            for part in change.original.parts
        } - needed
    return needed


def _in_fp32(family: Family, names: Mapping[str, Any]) -> frozenset[str]:
    """Return the tensors that diffusers holds in FP32 where the rest is loaded in BF16."""
    if family.make is not None:
        return frozenset()
    cls = getattr(importlib.import_module("diffusers"), family.class_name)
    kept = set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    return frozenset(name for name in names if not kept.isdisjoint(name.split(".")))
