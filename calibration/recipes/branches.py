"""What a recipe's method gives linears beside codes, scales and bias: low-rank branches, scaled inputs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from calibration.recipes.method_options import Method, ModelOpt, Quality, SVDQuant
from fp4trt.account import BRANCH, SMOOTHING
from fp4trt.errors import BadRecipe
from fp4trt.families import Family
from fp4trt.safetensors_file import TensorPlan

__all__ = ["added_tensors", "largest_rank", "require_fit"]


def largest_rank(group: Sequence[str], shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the largest rank that a branch of linears which read the same input can have, together."""
    return min(sum(shapes[path][0] for path in group), shapes[group[0]][1])


def require_fit(options: Method, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse options that linears of these shapes cannot have.

    Args:
        options: of the recipe.
        groups: module paths of the linears in NVFP4 that read the same input.
        shapes: of their weights, [N, K].

    Raises:
        BadRecipe: naming the first linear.
    """
    if not isinstance(options, Quality | SVDQuant):
        return
    for group in groups:
        largest = largest_rank(group, shapes)
        if options.pooled_rank(group) > largest:
            together = "" if len(group) == 1 else f" with the {len(group) - 1} that read the same input"
            multiple = options.rank_multiple if isinstance(options, Quality) else 1
            rounded = f", rounded up to a multiple of {multiple}" if multiple > 1 else ""
            rank = options.rank_of(group[0]) if isinstance(options, Quality) else options.rank
            said = f"method.rank is {rank}" if rank == options.rank else f"method.ranks says {rank}"
            rows, columns = sum(shapes[path][0] for path in group), shapes[group[0]][1]
            fitting = largest // multiple * multiple // len(group)
            raise BadRecipe(
                f"{said}{rounded}, and {group[0]}{together} is a matrix of {rows} x {columns}; "
                + (f"expected at most {fitting}" if fitting else f"expected a rank_multiple of at most {largest}")
            )


def added_tensors(
    options: Method, family: Family, groups: Sequence[Sequence[str]], shapes: Mapping[str, Sequence[int]]
) -> Iterator[TensorPlan]:
    """Yield what a method gives linears beside codes, scales and bias, in the order of the file.

    Args:
        options: of the recipe.
        family: of the model.
        groups: the linears in NVFP4 of its blocks.
        shapes: of their weights, [N, K].
    """
    smooths = isinstance(options, SVDQuant) and options.smoothing
    smooths |= isinstance(options, ModelOpt) and options.algorithm == "awq_lite"
    for group in groups:
        rank = options.pooled_rank(group) if isinstance(options, Quality | SVDQuant) else 0
        for path in group:
            rows, columns = shapes[path]
            if rank:
                yield TensorPlan(f"{path}.{BRANCH[0]}", "BF16", (rank, columns))
            if smooths and family.rows(group[0]) > 1:
                yield TensorPlan(f"{path}.{SMOOTHING}", "BF16", (columns,))
            if rank:
                yield TensorPlan(f"{path}.{BRANCH[1]}", "BF16", (rows, rank))
