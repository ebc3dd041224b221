"""``fp4trt lora``: LoRA files to the inputs of a graph that has slots for LoRAs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from calibration.checkpoints.folds import folded_linears
from calibration.checkpoints.quantized import Checkpoint, read
from calibration.lora.fusing import is_low_rank, low_rank_of
from calibration.lora.option import parse_lora
from calibration.lora.reading import LoraFile, read_lora
from fp4trt.errors import BadLora, BadOption, OutputExists
from fp4trt.file_output import all_or_none
from fp4trt.options import at_least, file_name, takes
from fp4trt.progress import PATIENCE_S, Progress, tracking
from fp4trt.publish import refuse_existing
from fp4trt.safetensors_file import TensorPlan, bytes_of, write
from fp4trt.verb import Result, verb

__all__ = ["Given", "LoraInputs", "lora_inputs"]

Given = str | Path | tuple[str | Path, float]
"""A LoRA file: ``FILE[:STRENGTH]``, a path, or a path with its strength."""

_METADATA: Final[Mapping[str, str]] = {"format": "fp4trt-lora-inputs"}

_FACTORS: Final = ("lora_a", "lora_b")
"""Inputs of a slot, after the path of a linear, as ``fp4trt export --lora-rank`` names them."""


@dataclass(frozen=True, eq=False)
class LoraInputs(Result):
    """What :func:`lora_inputs` wrote.

    Attributes:
        output: the file.
        rank: of all factors: the ``lora_rank`` that the engine is run at.
        linears: how many linears the LoRAs change.
        slots: how many have a slot.
        left_out: beginning of the keys that belong to no transformer, to their number.
    """

    output: str
    rank: int
    linears: int
    slots: int
    left_out: Mapping[str, int]


@verb
@takes(output=file_name, checkpoint=file_name, rank=at_least(0))
def lora_inputs(
    files: Given | Sequence[Given],
    output: str | Path,
    *,
    checkpoint: str | Path,
    rank: int | None = None,
    force: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> LoraInputs:
    """Turn LoRA files into the inputs of a graph with slots: BF16 factors of all its slots, strengths folded in.

    Linears that read one input share the first factor. So the ranks of LoRAs that have a first factor for each of them
    add up, as those of several LoRAs do.

    Args:
        files: the LoRAs, which are added up.
        output: the safetensors file: ``X.lora_a`` [rank, K] of the first linear of each group, ``X.lora_b`` [N, rank]
            of each linear.
        checkpoint: the quantized checkpoint that the graph was exported of.
        rank: of the factors, padded with zeros; by default the least that the LoRAs need.
        force: replace an existing file.
        progress: called with each step.

    Raises:
        BadLora: a LoRA is of another model, changes what has no slot, is no product of two factors, or needs more.
        BadCheckpoint: the checkpoint is not quantized, or damaged.
        BadOption, OutputExists: naming what is wrong.
    """
    given = _given(files)
    held = read(Path(checkpoint))
    output = Path(output)
    if output.resolve() in {path.resolve() for path, _ in given}:
        raise OutputExists(f"{output} is one of the LoRA files; choose another --output")
    refuse_existing(output, force)
    paths = list(dict.fromkeys((*held.family.quantized(held.config), *held.formats)))
    loras = [(read_lora(path, held.family, held.config), strength) for path, strength in given]
    for lora, _ in loras:
        _refuse_without_slot(lora, held, set(paths))
    groups = [_Group(group, loras) for group in held.groups_of(paths)]
    needed = max((group.rank for group in groups), default=0)
    if rank is not None and needed > rank:
        raise BadLora(
            f"the LoRAs need factors of rank {needed}, more than {rank}; give --rank {needed} or leave some out"
        )
    _write(output, groups, needed if rank is None else rank, held)
    left_out = sum((Counter(lora.left_out) for lora, _ in loras), Counter[str]())
    linears = sum(len(group.changed) for group in groups)
    return LoraInputs(str(output.resolve()), needed if rank is None else rank, linears, len(paths), dict(left_out))


def _given(files: Given | Sequence[Given]) -> list[tuple[Path, float]]:
    """Return files and strengths.

    Raises:
        BadOption: one is not a LoRA file, or its strength is not a number.
    """
    many = [files] if isinstance(files, str | Path | tuple) else list(files)
    found = []
    for one in many:
        if isinstance(one, str):
            found.append(parse_lora(one))
        elif isinstance(one, Path):
            found.append((one, 1.0))
        elif len(one) == 2 and isinstance(one[1], int | float) and math.isfinite(one[1]):
            found.append((Path(one[0]), float(one[1])))
        else:
            raise BadOption(f"files has {one!r}; expected 'FILE:STRENGTH', a path, or a path with its strength")
    if not found:
        raise BadOption("files is empty; expected at least one LoRA file")
    return found


def _refuse_without_slot(lora: LoraFile, checkpoint: Checkpoint, slots: set[str]) -> None:
    """Refuse a LoRA that changes what no slot stands for.

    Raises:
        BadLora: naming the first tensor.
    """
    folded = folded_linears(checkpoint)
    for name, changes in lora.changes.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or path not in slots:
            raise BadLora(
                f"{lora.path} changes {name}, for which a graph has no slot; fuse it into the weights before they are "
                "quantized"
            )
        if not all(map(is_low_rank, changes)):
            raise BadLora(
                f"{lora.path} changes {name} by what is no product of two factors, as DoRA, LoHa and LoKr are none; "
                "fuse it into the weights before they are quantized"
            )
        if path in folded:
            raise BadLora(
                f"{lora.path} changes {name}, whose channels {checkpoint.directory} scales unlike the model, "
                f"by recipe {checkpoint.recipe}; quantize with shift_fold and smooth_fold false in its method"
            )


class _Group:
    """The slot of some linears that read one input, and what LoRAs put into it.

    Attributes:
        paths: of the linears.
        changed: those that a LoRA changes.
        rank: of the factors.
    """

    def __init__(self, paths: Sequence[str], loras: Sequence[tuple[LoraFile, float]]) -> None:
        self.paths = tuple(paths)
        self._loras = [(lora, strength) for lora, strength in loras if strength and self._changes(lora)]
        self.changed = {path for lora, _ in self._loras for path in self.paths if f"{path}.weight" in lora.changes}
        self.rank = sum(a.shape[0] for a, _ in self._blocks())

    def _changes(self, lora: LoraFile) -> bool:
        return any(f"{path}.weight" in lora.changes for path in self.paths)

    def _blocks(self) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Yield first factors [rank, K], each with the second factors [N, rank] of the linears that read it."""
        for lora, strength in self._loras:
            found: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
            for path in self.paths:
                for change in lora.changes.get(f"{path}.weight", ()):
                    down, up = low_rank_of(change, strength)
                    alike = next((ups for a, ups in found if path not in ups and torch.equal(a, down)), None)
                    if alike is None:
                        found.append((down, {path: up}))
                    else:
                        alike[path] = up
            yield from found

    def factors(self, rank: int, sizes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each input and its value, BF16."""
        a = torch.zeros(rank, sizes[self.paths[0]][1], dtype=torch.bfloat16)
        b = {path: torch.zeros(sizes[path][0], rank, dtype=torch.bfloat16) for path in self.paths}
        begin = 0
        for down, ups in self._blocks():
            end = begin + down.shape[0]
            a[begin:end, : down.shape[1]] = down  # of a model with fewer channels, as FLUX.1-dev is for Fill
            for path, up in ups.items():
                b[path][:, begin:end] = up
            begin = end
        yield f"{self.paths[0]}.{_FACTORS[0]}", a
        yield from ((f"{path}.{_FACTORS[1]}", value) for path, value in b.items())


def _write(output: Path, groups: Sequence[_Group], rank: int, checkpoint: Checkpoint) -> None:
    sizes = checkpoint.family.linears(checkpoint.config)
    plan = [
        TensorPlan(name, "BF16", shape)
        for group in groups
        for name, shape in (
            (f"{group.paths[0]}.{_FACTORS[0]}", (rank, sizes[group.paths[0]][1])),
            *((f"{path}.{_FACTORS[1]}", (sizes[path][0], rank)) for path in group.paths),
        )
    ]
    with all_or_none([output]) as partials, tracking(len(groups), "writing", PATIENCE_S) as advance:

        def pieces() -> Iterator[tuple[str, npt.NDArray[np.uint8]]]:
            for group in groups:
                yield from ((name, bytes_of(value)) for name, value in group.factors(rank, sizes) if value.numel())
                advance()

        write(partials[output], plan, pieces(), _METADATA)
