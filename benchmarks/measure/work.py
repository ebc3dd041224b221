"""How much a recipe has to compute for a block of FLUX.1, counted by shape: for an estimate where there is no GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from measure.checkpoints import Size
from synthetic.flux import config_of
from torch.utils._python_dispatch import TorchDispatchMode

from calibration.checkpoints.plain import model_class
from calibration.formats import nvfp4
from calibration.methods.quality import column_rounding, gptq
from calibration.recipes.recipe import Quality, SVDQuant
from fp4trt.families.flux import FLUX

EXPONENTS = 12
"""AWQ-lite runs a linear for each of 11, and once as it is."""


@dataclass(frozen=True)
class Data:
    """Captured calls, and the tokens of picture and text in each."""

    calls: int
    image: int
    text: int

    def rows(self, path: str) -> int:
        """Return how many rows a linear reads of each call."""
        return {"": 1, "L": self.image, "T": self.text, "L+T": self.image + self.text}[FLUX.stream(path)]


@dataclass(frozen=True)
class Group:
    """Linears that read one input: [N, K] of them together, how many they are, and rows of a call."""

    n: int
    k: int
    linears: int
    rows: int


def groups_of(size: Size, block: str, data: Data) -> list[Group]:
    config = config_of(1, 1, size.heads)
    with torch.device("meta"):
        model = model_class(FLUX).from_config(config)
    found = []
    for group in FLUX.groups(config):
        if group[0].startswith(f"{block}."):
            shapes = [model.get_submodule(path).weight.shape for path in group]
            found.append(Group(sum(shape[0] for shape in shapes), shapes[0][1], len(group), data.rows(group[0])))
    return found


def work_of(options: Any, found: Sequence[Group], data: Data, inner: int) -> dict[str, float]:
    """Return multiplications and additions by type, and launches of kernels.

    Args:
        options: a recipe's method.
        found: groups of a block.
        data: what it is calibrated on.
        inner: channels of the attention.
    """
    run = sum(2 * group.n * group.k * group.rows for group in found) + 4 * inner * (data.image + data.text) ** 2
    run *= data.calls
    if isinstance(options, Quality):
        return _of_quality(options, found, data, run)
    if isinstance(options, SVDQuant):
        smoothed = [group for group in found if group.rows > 1]
        tried = sum(2 * group.n * group.k * group.rows for group in smoothed) * EXPONENTS * data.calls
        return {"bf16": 3.0 * run + tried, "fp32": 0, "fp64": sum(map(_decomposition, found)), "launches": 0}
    return {"bf16": 1.0 * run, "fp32": 0, "fp64": 0, "launches": 0}


def _of_quality(options: Quality, found: Sequence[Group], data: Data, run: float) -> dict[str, float]:
    runs = 2 + (len(found) if options.sequential else 1) / 2  # of the last ones half is left out, on the average
    fp32 = 0.0
    for group in found:
        rows = min(group.rows, options.rows_per_call) * data.calls
        of_rows, of_weights = 1, 1 + 2 * options.descent_sweeps  # of the symmetric moments a half is computed
        fp32 += group.k**3 / 3
        if options.wiener:
            of_rows, of_weights = of_rows + 2, of_weights + 2
            fp32 += 2 * min(group.n, group.k) * group.k**2
        fp32 += of_rows * rows * group.k**2 + of_weights * group.n * group.k**2
    columns = sum(group.k for group in found)
    return {
        "bf16": runs * run,
        "fp32": fp32,
        "fp64": 0.0,
        "launches": columns * launches_of_a_column(options.descent_sweeps),
    }


def _decomposition(group: Group) -> float:
    """Return what a thin singular value decomposition takes (Golub and Van Loan, the R-SVD)."""
    long, short = max(group.n, group.k), min(group.n, group.k)
    return 6.0 * long * short**2 + 20.0 * short**3


class _Count(TorchDispatchMode):
    """Counts operators that are no views; those inside of a fused function are one."""

    def __init__(self) -> None:
        super().__init__()
        self.operators, self._inside = 0, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        views = ("view", "slice", "select", "expand", "as_strided", "unsqueeze", "t", "detach", "alias", "split")
        self.operators += not self._inside and function._schema.name.split("::")[-1] not in views
        return result

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return what computes the same and counts as one kernel."""

        def one(*args: Any) -> Any:
            self.operators, self._inside = self.operators + 1, True
            try:
                return function(*args)
            finally:
                self._inside = False

        return one


@functools.cache
def launches_of_a_column(sweeps: int) -> float:
    """Return how many kernels GPTQ and descent launch for one more column on a GPU."""
    counts = [_operators(columns, sweeps) for columns in (64, 128)]
    return (counts[1] - counts[0]) / 64


def _operators(columns: int, sweeps: int) -> int:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(32, columns, generator=random)
    moments = torch.eye(columns) + 0.1
    scale = nvfp4.global_scale(weight.abs().max())
    root = gptq.root(moments)
    with _Count() as count, _in_torch(count.fused):
        start = gptq.round_with_feedback(weight, root, scale)
        for _ in range(sweeps):  # a single one each time: it ends where nothing changes
            gptq.descend(weight, moments, scale, start, 1)
    return count.operators


@contextmanager
def _in_torch(fuse: Callable[[Any], Any]) -> Iterator[None]:
    kept = column_rounding.feed_back, column_rounding.descend
    column_rounding.feed_back = functools.partial(column_rounding.feed_back_in_torch, fuse=fuse)
    column_rounding.descend = functools.partial(column_rounding.descend_in_torch, fuse=fuse)
    try:
        yield
    finally:
        column_rounding.feed_back, column_rounding.descend = kept
