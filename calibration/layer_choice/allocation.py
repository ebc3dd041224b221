"""Spend a budget on formats and branches of groups of linears: an integer program, solved by HiGHS through SciPy."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from typing import Final

import numpy as np

from calibration.layer_choice.sensitivity import BITS, Sensitivity
from fp4trt.number_formats import NVFP4

__all__ = ["UNITS", "allocate"]

UNITS: Final = {"flops": ("flops",), "bytes": ("bytes",), "both": ("flops", "bytes")}
"""What a budget is of, to what may not exceed it."""

_GAP: Final = 1e-6
"""How far from the best the error of a choice may be, relative."""


def allocate(
    sensitivity: Sensitivity, budget: float, of: str = "both", formats: Collection[str] = tuple(BITS)
) -> dict[str, str]:
    """Return the choices with the least error of the output that a budget allows, by each group's first linear.

    Each group has exactly one; the sum of the groups' errors is least, and the sum of what they cost beyond
    NVFP4 stays within the budget.

    Args:
        sensitivity: of the groups.
        budget: beyond NVFP4; all linears in FP8 cost 1.
        of: ``flops``, ``bytes``, or ``both``: then neither may exceed the budget.
        formats: choices, where a group has them; NVFP4 is always there.
    """
    from scipy import optimize, sparse

    allowed = {NVFP4.name, *formats}
    choices = [
        (row, group, name)
        for row, group in enumerate(sensitivity.groups)
        for name in (*BITS, *group.branches)
        if name in allowed
    ]
    errors = np.array([group.errors[name] for _, group, name in choices])
    largest = float(np.abs(errors).max()) or 1.0
    rows = [row for row, _, _ in choices]
    one_each = sparse.csr_array((np.ones(len(rows)), (rows, range(len(rows)))))
    prices = np.array([[sensitivity.price(group, name, unit) for _, group, name in choices] for unit in UNITS[of]])
    with _silent():
        found = optimize.milp(
            errors / largest,
            constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(prices, ub=budget)],
            integrality=np.ones(errors.size),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": _GAP},
        )
    assert found.x is not None, f"no choice for a budget of {budget}: {found.message}"  # all in NVFP4 costs nothing
    return {group.linears[0]: name for (_, group, name), taken in zip(choices, found.x, strict=True) if taken > 0.5}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what native code writes to stdout: HiGHS 1.11 says now and then which of its functions it is in."""
    try:
        saved = os.dup(1)
    except OSError:  # no such descriptor, so that nothing is heard in any case
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(nowhere)
        os.close(saved)
