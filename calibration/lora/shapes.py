"""Whether the tensors of a change have the shapes that the changed weight asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from calibration.lora.adapter import Tensors

__all__ = ["fits"]

Shape = tuple[int, ...]


def fits(kind: str, tensors: Tensors, shape: Shape, padded: bool = False) -> bool:
    """Return whether a module's tensors make a change of a weight.

    Args:
        kind: ``pair`` or one of LyCORIS' kinds, or a role whose tensor has the weight's own shape.
        tensors: of the module, of the roles that the kind needs.
        shape: of the weight.
        padded: whether the weight may have more columns than a pair.
    """
    if "alpha" in tensors and math.prod(tensors.shape("alpha")) != 1:
        return False
    if "dora_scale" in tensors and not _is_magnitude(tensors.shape("dora_scale"), shape):
        return False
    if kind in ("pair", "locon"):
        return _pair_fits(tensors, shape, padded)
    check = _CHECKS.get(kind)
    return check(tensors, shape) if check is not None else tensors.shape(kind) == shape


def _is_magnitude(magnitude: Shape, shape: Shape) -> bool:
    """Return whether a tensor holds a number for each row, or for each column: [N, 1, ...] or [1, K, ...]."""
    ones = (1,) * (len(shape) - 2)
    return magnitude in ((shape[0], 1, *ones), (1, shape[1], *ones)) if len(shape) > 1 else False


def _pair_fits(tensors: Tensors, shape: Shape, padded: bool) -> bool:
    down, up = tensors.shape("down"), tensors.shape("up")
    if min(len(down), len(up), len(shape)) < 2 or not down[0]:
        return False
    if "magnitude" in tensors and (tensors.shape("magnitude") != shape[:1] or len(shape) > 2):
        return False
    if "up_bias" in tensors and tensors.shape("up_bias") != shape[:1]:
        return False
    rank, columns = down[0], math.prod(down[1:])
    if "mid" in tensors:
        mid = tensors.shape("mid")
        if mid[:2] != (rank, rank):
            return False
        columns *= math.prod(mid[2:])
    wanted = math.prod(shape[1:])
    fit = columns == wanted or (padded and len(shape) == 2 and columns < wanted)
    return fit and (up[0], math.prod(up[1:])) == (shape[0], rank)


def _loha_fits(tensors: Tensors, shape: Shape) -> bool:
    for half in ("1", "2"):
        a, b = tensors.shape(f"hada_w{half}_a"), tensors.shape(f"hada_w{half}_b")
        if min(len(a), len(b), len(shape)) < 2:
            return False
        if "hada_t1" in tensors:
            core = tensors.shape(f"hada_t{half}")
            if len(core) < 2 or (a, b, core) != ((core[0], shape[0]), (core[1], shape[1]), (*core[:2], *shape[2:])):
                return False
        elif (a, b) != ((shape[0], b[0]), (b[0], math.prod(shape[1:]))):
            return False
    return True


def _lokr_fits(tensors: Tensors, shape: Shape) -> bool:
    rows, columns = 1, 1
    for half in ("1", "2"):
        if f"lokr_w{half}" in tensors:
            factor = tensors.shape(f"lokr_w{half}")
            if not factor:
                return False
        else:
            a, b = tensors.shape(f"lokr_w{half}_a"), tensors.shape(f"lokr_w{half}_b")
            core = tensors.shape(f"lokr_t{half}") if f"lokr_t{half}" in tensors else None
            if len(a) != 2 or len(b) < 2 or (core[:2] != (a[0], b[0]) if core else a[1] != b[0]):
                return False
            factor = (a[1], b[1], *core[2:]) if core else (a[0], *b[1:])
        rows, columns = rows * factor[0], columns * math.prod(factor[1:])
    return (rows, columns) == (shape[0], math.prod(shape[1:]))


def _glora_fits(tensors: Tensors, shape: Shape) -> bool:
    a1, a2, b1, b2 = (tensors.shape(role) for role in ("a1", "a2", "b1", "b2"))
    if min(len(a1), len(a2), len(b1), len(b2), len(shape)) < 2:
        return False
    inputs, outputs = (shape[1], a1[1]), (a1[1], shape[1])
    core = tensors.shape("bm") if "bm" in tensors else None
    size = math.prod(b2[1:]) * (math.prod(core[2:]) if core else 1)
    return (a1[:2], a2[:2], b1[:2], size) == (inputs, outputs, (shape[0], b2[0]), math.prod(shape[1:]))


def _ia3_fits(tensors: Tensors, shape: Shape) -> bool:
    if len(shape) < 2 or math.prod(tensors.shape("on_input")) != 1:
        return False
    axis = 1 if tensors.number("on_input") else 0
    return tensors.shape("value") == (shape[axis],)


def _oft_fits(tensors: Tensors, shape: Shape) -> bool:
    blocks = tensors.shape("oft_blocks")
    return len(blocks) == 3 and _turns(tensors, blocks, shape)


def _boft_fits(tensors: Tensors, shape: Shape) -> bool:
    blocks = tensors.shape("oft_blocks")
    if len(blocks) != 4 or blocks[-1] % 2 or not _turns(tensors, blocks[1:], shape):
        return False
    return shape[0] % (2 ** blocks[0] * (blocks[-1] // 2)) == 0


def _turns(tensors: Tensors, blocks: Shape, shape: Shape) -> bool:
    """Return whether blocks [count, size, size] turn all rows of a weight."""
    if "rescale" in tensors and tensors.shape("rescale") != (shape[0], *[1] * (len(shape) - 1)):
        return False
    return blocks[1] == blocks[2] and blocks[0] * blocks[1] == shape[0]


_CHECKS: Final[Mapping[str, Callable[[Tensors, Shape], bool]]] = {
    "loha": _loha_fits,
    "lokr": _lokr_fits,
    "baked_lokr": _lokr_fits,
    "glora": _glora_fits,
    "ia3": _ia3_fits,
    "oft": _oft_fits,
    "boft": _boft_fits,
}
