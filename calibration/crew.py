"""What ``--workers`` and ``--ray`` of ``fp4trt quantize`` mean for a model and a recipe, said first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from calibration.by_block.ray_workers import on_ray
from calibration.by_block.workers import OpenCrew, in_processes, in_this_process
from calibration.inputs.captured import Inputs
from calibration.methods import registry
from calibration.methods.plan import Plain
from fp4trt.disk_space import readable_size
from fp4trt.errors import BadEnvironment
from fp4trt.free_memory import available_memory
from fp4trt.progress import note

__all__ = ["Crewed"]


@dataclass(frozen=True)
class Crewed:
    """The workers that were asked for.

    Attributes:
        workers: how many; None for this process alone, or for as many as a Ray cluster has room for.
        ray: address of a Ray cluster.
    """

    workers: int | None
    ray: str | None

    def opened(self, plain: Plain, calls: Sequence[Inputs], device: str) -> OpenCrew:
        """Return what opens the workers, having said what they take.

        Raises:
            BadEnvironment: they take more memory than there is.
        """
        if self.ray is None and self.workers in (None, 1):
            return in_this_process
        blocks = plain.family.blocks(plain.config)
        shapes = {path: plain.stored[f"{path}.weight"].shape for path in plain.formats}
        need = registry.memory_of_block(plain.recipe.method, plain.quantized_groups, shapes, blocks)
        kept = _entering(plain, calls)
        if self.ray is not None:
            words = f"each worker holds a block, in about {readable_size(need)} of memory; "
            note(f"{words}what enters one takes {readable_size(kept)} on the disk")
            return partial(on_ray, self.ray, self.workers, need)
        count, free = min(self.workers or 1, len(blocks)), available_memory()
        memory, disk = readable_size(count * need), readable_size((count + 1) * kept)
        note(
            f"{count} workers hold {count} blocks, in about {memory} of memory, and keep what enters {count + 1}, in "
            f"about {disk} on the disk"
        )
        if device == "cpu" and free is not None and count * need > free:
            raise BadEnvironment(
                f"{count} workers take about {memory} of memory, and {readable_size(free)} are free; take --workers "
                f"{max(1, free // need)}"
            )
        return partial(in_processes, count)


def _entering(plain: Plain, calls: Sequence[Inputs]) -> int:
    """Return about how many bytes enter a block: its width in BF16 for each token of every call."""
    first = plain.family.groups(plain.config)[0]
    width = max(plain.stored[f"{path}.weight"].shape[1] for path in first)
    tokens = sum(
        math.prod(call[name].shape[:-1])
        for call in calls
        for name, given in plain.family.inputs.items()
        if given.role == "normal" and name in call and call[name].ndim > 2
    )
    return 2 * width * tokens
