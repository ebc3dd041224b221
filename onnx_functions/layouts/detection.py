"""The layout of a checkpoint, proven against the 16-bit checkpoint that it was made of.

Names and metadata say who wrote a file; only its source says what the bytes mean. Each quantized linear is dequantized
in a few tiles under every reading (:mod:`onnx_functions.layouts.readings`), and the one that comes out as its source is
the layout (:mod:`onnx_functions.layouts.fits`). Only the bytes of the tiles are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from fp4trt.account import account_of
from fp4trt.any_checkpoint import OpenCheckpoint, open_checkpoint
from fp4trt.checkpoint_manifest import read_checkpoint_manifest
from fp4trt.errors import BadCheckpoint, UnknownArtifact, UnknownFamily
from fp4trt.layouts import recognised, refuse_foreign_layout
from fp4trt.number_formats import FORMATS
from fp4trt.progress import PATIENCE_S, tracking
from onnx_functions.layouts.fits import Fit, fits_of
from onnx_functions.layouts.names import Rows, index_of, stretches_of
from onnx_functions.layouts.readings import HIGH_FIRST, LOW_FIRST, NONE, ROW_MAJOR, TILES
from onnx_functions.layouts.sources import FLOATS, QuantizedLinear, quantized_linears

__all__ = ["detect", "lines_of"]

_SHOWN: Final = 12
_PATIENCE_S: Final = 2.0

_MOVING: Final = ("quality", "qat")
"""Methods of fp4trt's recipes that move factors of channels between a norm and the linears behind it."""

_NAMES: Final = {
    (ROW_MAJOR, LOW_FIRST, "multiplier"): "ModelOpt's unified export, which fp4trt writes",
    (TILES, LOW_FIRST, "multiplier"): "ModelOpt's enable_swizzle_layout",
    (TILES, HIGH_FIRST, "multiplier"): "ComfyUI",
    (ROW_MAJOR, HIGH_FIRST, "multiplier"): "ModelOpt's unified export with swapped nibbles",
    (ROW_MAJOR, LOW_FIRST, "reciprocal"): "compressed-tensors and LightX2V (reciprocal global scale)",
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Found:
    """What a quantized linear was found to be.

    Attributes:
        path: its name as it is stored.
        shape: [N, K] of its weight.
        best: the closest reading, None where there is none to try.
        ours: the reading under which fp4trt takes it, None where the shapes forbid that.
        factor: by what the global scale is too small for the closest one, 1 where it fits.
        reason: why it is not proven; "" where the closest fits.
        layout: what the closest is called.
    """

    path: str
    shape: tuple[int, int] | None
    best: Fit | None
    ours: Fit | None
    factor: float
    reason: str
    layout: str | None = None

    @property
    def fits(self) -> bool:
        """Whether a reading was found."""
        return self.best is not None and not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        best = self.best
        return {
            "path": self.path,
            "shape": list(self.shape) if self.shape else None,
            "fits": self.fits,
            "layout": self.layout,
            **({**asdict(best.reading), "global_scale": best.global_scale, "moved": best.moved} if best else {}),
            "error": best.error if best else None,
            "error_as_fp4trt_reads": self.ours.error if self.ours else None,
            "reason": self.reason or None,
        }


def detect(artifact: str | Path, against: str | Path) -> dict[str, Any]:
    """Return the layout of a checkpoint as its 16-bit source proves it, as JSON holds it.

    Args:
        artifact: a quantized checkpoint of any producer, a folder or a .safetensors file.
        against: the 16-bit checkpoint: a folder, a pipeline's, a .safetensors file, or `digits`.

    Returns:
        `layout` (its name, None where not all linears have one), `passed` (whether it is what fp4trt reads),
        `recognised` (what names and metadata alone say), `refused` (why every verb refuses it, None where none does),
        `summary`, and `linears`: for each the closest reading, its relative error, and that of the reading that fp4trt
        takes.

    Raises:
        UnknownArtifact: one of the two cannot be read, nothing is quantized, or no linear is in both.
    """
    theirs, source = open_checkpoint(artifact), open_checkpoint(against)
    layout = recognised(theirs.config, theirs.metadata, theirs.tensors)
    linears, unread = quantized_linears(theirs.tensors)
    if not linears:
        more = f"; {': '.join(next(iter(unread.items())))}" if unread else ""
        raise UnknownArtifact(
            f"{theirs.path} holds no linear whose codes can be dequantized (by its names: {layout.name}{more}); "
            f"expected {', '.join(kind.title for kind in FORMATS.values())}"
        )
    index = _index(source)
    if not any(stretches_of(path, index) for path in linears):
        raise UnknownArtifact(
            f"{source.path} holds the 16-bit weights of none of the {len(linears)} quantized linears of {theirs.path}, "
            f"such as {next(iter(linears))}; expected the checkpoint that it was made of"
        )
    moves = _moves(theirs.path)
    found = [_found(path, linear, index, source, moves) for path, linear in _shown(linears.items(), len(linears))]
    found += [Found(path, None, None, None, 1.0, reason) for path, reason in unread.items()]
    return _described(theirs, source, found)


def _refusal(theirs: OpenCheckpoint) -> str | None:
    """Return what every verb says of a checkpoint that it refuses for its names, shapes and metadata."""
    facts = str(theirs.path), theirs.config, theirs.metadata, theirs.tensors
    try:
        if theirs.config:
            account_of(*facts)
        else:  # a single file: whose layout it is in is all that can be asked
            refuse_foreign_layout(*facts)
    except (BadCheckpoint, UnknownFamily) as error:
        return str(error)
    return None


def _index(source: OpenCheckpoint) -> dict[str, Rows]:
    shapes = {
        name: stored.shape
        for name, stored in source.tensors.items()
        if name.endswith(".weight") and len(stored.shape) == 2 and stored.dtype in FLOATS
    }
    if not shapes:
        raise UnknownArtifact(f"{source.path} holds no matrix in 16 bit; expected the checkpoint before quantization")
    return index_of(shapes)


def _moves(path: Path) -> bool:
    """Whether a checkpoint's own manifest says that its recipe moves factors of channels."""
    manifest = read_checkpoint_manifest(path) if path.is_dir() else None
    return manifest is not None and manifest.method in _MOVING


def _found(path: str, linear: QuantizedLinear, index: Mapping[str, Rows], source: OpenCheckpoint, moves: bool) -> Found:
    stretches = stretches_of(path, index)
    if not stretches:
        return Found(path, None, None, None, 1.0, f"{source.path.name} has no such linear")
    shape = sum(stretch.count for stretch in stretches), source.tensors[stretches[0].tensor].shape[1]
    fits, factor = fits_of(linear, stretches, source.tensors, moves)
    if not fits:
        stored = list(linear.stored.codes.shape)
        return Found(path, shape, None, None, 1.0, f"codes {stored} do not fit a weight {list(shape)}")
    best = fits[0]
    ours = [fit for fit in fits if fit.is_ours]
    ours.sort(key=lambda fit: fit.moved != best.moved)
    name = _name(best, linear.scale.rpartition(".")[2])
    return Found(path, shape, best, ours[0] if ours else None, factor, _fault(best, factor, moves), name)


def _fault(best: Fit, factor: float, moves: bool) -> str:
    """Return why the closest reading of a linear proves nothing, "" where it does."""
    if best.fits:
        if best.moved == "nothing" or moves:
            return ""
        return f"fits only up to a factor of each of its {best.moved}: is a pre_quant_scale lost?"
    if factor != 1.0:
        return f"fits but for its global scale, which is too small by a factor of {factor:.4g}"
    return f"no reading fits: the closest is off by {best.error:.3g}"


def _described(theirs: OpenCheckpoint, source: OpenCheckpoint, found: Sequence[Found]) -> dict[str, Any]:
    refused = _refusal(theirs)
    names = Counter(each.layout for each in found if each.fits and each.layout)
    proven = sum(names.values()) == len(found)
    as_read = proven and all(each.best is not None and each.best.is_ours for each in found)
    return {
        "kind": "layout detection",
        "path": str(theirs.path.resolve()),
        "against": str(source.path.resolve()),
        "recognised": asdict(recognised(theirs.config, theirs.metadata, theirs.tensors)),
        "refused": refused,
        "layout": next(iter(names)) if proven and len(names) == 1 else None,
        "layouts": dict(names),
        "passed": as_read and refused is None,
        "summary": _summary(refused, found, names, as_read),
        "linears": [each.as_dict() for each in found],
    }


def _summary(refused: str | None, found: Sequence[Found], names: Mapping[str, int], as_read: bool) -> str:
    """Return the verdict in one line."""
    lost = [each for each in found if not each.fits]
    if lost:
        first = lost[0]
        more = (
            f", {' and '.join(f'{count} are in the layout of {name}' for name, count in names.items())}"
            if names
            else ""
        )
        advice = "is this the checkpoint that it was made of?" if not names else "see the table"
        return f"not proven: {len(lost)} of {len(found)} linears, {first.path}: {first.reason}{more}; {advice}"
    worst = max(each.best.error for each in found if each.best)
    fitted = " and ".join(
        f"{count} of {len(found)} linears are in the layout of {name}" for name, count in names.items()
    )
    proof = f"{fitted} (largest error {worst:.3f})"
    if as_read:
        return f"{proof}, and so fp4trt reads them" if refused is None else f"{proof}, but fp4trt refuses it: {refused}"
    wrong = max((each.ours.error for each in found if each.ours), default=None)
    misread = f"; read as fp4trt's own they would be off by up to {wrong:.3g}" if wrong is not None else ""
    return f"{proof}, which fp4trt does not read{misread}"


def _name(fit: Fit, scale: str) -> str:
    """Return what a reading is called: by its producer where one writes so, else in its own words.

    Args:
        fit: the reading.
        scale: the last part of the name of its global scale, "" without one.
    """
    reading = fit.reading
    turned = "" if reading.orientation == "rows" else f", {reading.orientation}"
    if reading.number != "E2M1" and reading.block_scales != NONE:
        return f"MXFP8 ({reading.number}, block scales {reading.block_scales})"
    if reading.number != "E2M1":
        producer = "ComfyUI's scaled FP8" if scale == "scale_weight" else "FP8"
        kind = "without a scale" if fit.global_scale == "none" else f"scale a {fit.global_scale}"
        return f"{producer} ({reading.number}, {kind}{turned})"
    known = _NAMES.get((reading.block_scales, reading.nibbles, fit.global_scale))
    if known is not None and not turned:
        return known
    return f"nobody known (block scales {reading.block_scales}, {reading.nibbles}{turned}, scale a {fit.global_scale})"


def lines_of(found: Mapping[str, Any]) -> list[str]:
    """Return a detection as lines for a terminal: a table of the linears, worst first, and the verdict."""
    linears = sorted(found["linears"], key=lambda each: (each["fits"], -(each["error"] or 0.0)))
    width = max(len(each["path"]) for each in linears[:_SHOWN])
    recognised_as = found["recognised"]
    lines = [
        f"layout  {found['path']}  against  {found['against']}",
        f"  by names and metadata: {recognised_as['name']} ({recognised_as['evidence']})",
        f"  {'linear':{width}} {'error':>7} {'as read':>8}  layout",
    ]
    lines += [
        f"  {each['path']:{width}} {_number(each['error']):>7} {_number(each['error_as_fp4trt_reads']):>8}  "
        f"{each['reason'] or each['layout']}{_up_to(each)}"
        for each in linears[:_SHOWN]
    ]
    if len(linears) > _SHOWN:
        lines.append(f"  and {len(linears) - _SHOWN} more, none of them worse")
    return [*lines, found["summary"]]


def _up_to(each: Mapping[str, Any]) -> str:
    moved = each.get("moved", "nothing")
    return f" (up to factors of its {moved})" if each["fits"] and moved != "nothing" else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _shown(items: Iterable[_T], count: int) -> Iterator[_T]:
    """Yield items, and report each."""
    with tracking(count, "linears", PATIENCE_S) as advance:
        for item in items:
            yield item
            advance()
