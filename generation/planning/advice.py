"""What to change where a model does not fit, the smallest change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Final

from fp4trt.number_formats import FORMATS
from fp4trt.targets import TARGETS, Target
from generation.planning.call import Call
from generation.planning.peaks import MODES, Mode, peak_of
from generation.planning.rows import Row, parts_of, verdict
from generation.planning.source import Source
from trt_build.memory import GIB

__all__ = ["Change", "Resize", "changes_for"]

Resize = Callable[[int, int, int], Call]
"""(batch, width, height) to the same call at those."""

_LITTLE_MORE: Final = 1.05
"""Times the least memory of all: what counts as no more."""

_SMALL: Final = Fraction(3, 4)
"""The part of a picture's sides that is left after a change that counts as small."""

_SAID: Final[dict[Mode, str]] = {
    "resident": "",
    "on_demand": "low VRAM (each component loaded for its stage)",
    "streaming": "low VRAM, weight streaming (fp4trt build --weight-streaming)",
}
_ON_HOST: Final = "text encoders on the CPU"


@dataclass(frozen=True)
class Change:
    """Something to change, and the peak that it leads to.

    Attributes:
        change: in words.
        form: name of the weights' form.
        mode: of loading.
        width, height: of the picture.
        batch: of pictures in a call.
        peak_bytes: with it.
        fits: whether that is within the GPU's memory.
    """

    change: str
    form: str
    mode: Mode
    width: int
    height: int
    batch: int
    peak_bytes: int
    fits: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def changes_for(
    source: Source, chosen: Row, others: Sequence[Row], call: Call, target: Target, resize: Resize
) -> tuple[Change, ...]:
    """Return what lets the chosen form of the weights, or another one, fit; nothing where it fits as it is.

    Where nothing does, the one change is the one that needs least.

    Args:
        source: of the plan.
        chosen: the form that is asked for.
        others: the other forms.
        call: at the sizes that are asked for.
        target: the GPU.
        resize: to the same call at other sizes; as far as it is resizable or divisible.
    """
    memory = target.memory_gib * GIB
    if chosen.peaks["resident"].nbytes <= memory:
        return ()
    advisor = _Advisor(source, call, target, resize)
    found = tuple(advisor.working(chosen, others))
    return found or (advisor.least(chosen, others),)


@dataclass(frozen=True)
class _Advisor:
    source: Source
    call: Call
    target: Target
    resize: Resize

    @property
    def memory(self) -> int:
        return self.target.memory_gib * GIB

    def working(self, chosen: Row, others: Sequence[Row]) -> Iterator[Change]:
        """Yield the changes that work, the smallest first; of each kind the smallest alone."""
        ways = (
            iter([self._fewer(chosen, "resident"), self._smaller(chosen, "resident", self.call, _SMALL)]),
            self._of_loading(chosen),
            self._of_other_forms(chosen, others),
        )
        found: list[Change] = []
        for way in ways:
            found += self._until_certain(way, found)
        yield from found or self._drastic(chosen)

    def _until_certain(self, way: Iterator[Change | None], found: Sequence[Change]) -> Iterator[Change]:
        """Yield the first change of one kind; where that is close, as all before, the first that is not besides."""
        first = next((each for each in way if each is not None), None)
        if first is not None:
            yield first
            if not any(map(self._certain, (*found, first))):
                yield from [each for each in way if each is not None and self._certain(each)][:1]

    def _certain(self, change: Change) -> bool:
        return verdict(change.peak_bytes, self.memory) == "fits"

    def _of_loading(self, row: Row) -> Iterator[Change | None]:
        """Yield other ways to load the same form, and with fewer or slightly smaller pictures, the best first."""
        for mode in MODES[1:]:
            whole = self._change(row, mode, self.call)
            yield whole
            if whole is None:
                yield self._fewer(row, mode)
                yield self._smaller(row, mode, self.call, _SMALL)
        for mode in MODES[1:]:
            yield self._change(row, mode, self.call, text=False)

    def _drastic(self, row: Row) -> Iterator[Change]:
        """Yield one change to whatever fits: one picture at a time, of any size, and perhaps no text encoders."""
        call = self._divided(self.call.usual_batch) if self.call.divisible else self.call
        for text in (True, False):
            for mode in MODES:
                change = self._change(row, mode, call, text) or self._smaller(row, mode, call, Fraction(0), text)
                if change is not None:
                    yield change
                    return

    def _of_other_forms(self, chosen: Row, others: Sequence[Row]) -> Iterator[Change | None]:
        """Yield forms of fewer bytes, the largest first: all resident, and then with their components on demand."""
        leaner = [row for row in others if row.peaks and row.weights.engine_bytes < chosen.weights.engine_bytes]
        leaner.sort(key=lambda row: -row.weights.engine_bytes)
        for mode in MODES[:2]:
            for row in leaner:
                yield self._change(row, mode, self.call)

    def least(self, chosen: Row, others: Sequence[Row]) -> Change:
        """Return the form and the mode that need least at the sizes asked for."""
        rows = [row for row in (chosen, *others) if row.peaks]
        ways = [(row, mode, text) for text in (True, False) for row in rows for mode in MODES]
        peaks = [self._peak(row, mode, self.call, text) for row, mode, text in ways]
        # what needs hardly more, and changes less, is as good
        index = next(index for index, peak in enumerate(peaks) if peak <= _LITTLE_MORE * min(peaks))
        (row, mode, text), peak = ways[index], peaks[index]
        kinds = {
            kind
            for kind in row.weights.kinds or (row.weights.name,)
            if kind not in FORMATS or FORMATS[kind].elsewhere is None
        }
        able = [gpu for gpu in TARGETS.values() if gpu.memory_gib * GIB >= peak and kinds <= gpu.tflops.keys()]
        gpu = min(able, key=lambda gpu: gpu.memory_gib, default=None)
        said = f"a GPU of {gpu.memory_gib} GiB or more, such as {gpu.name}" if gpu is not None else "a larger GPU"
        way = ", ".join(part for part in (_SAID[mode], "" if text else _ON_HOST) if part)
        return self._made(f"{said}, for {row.weights.name}{f', with {way}' if way else ''}", row, mode, self.call, peak)

    def _change(self, row: Row, mode: Mode, call: Call, text: bool = True) -> Change | None:
        """Return the change to a form, a mode, a size, and perhaps no text encoders on the GPU, if that fits."""
        peak = self._peak(row, mode, call, text)
        if peak > self.memory:
            return None
        smaller = (call.width, call.height) != (self.call.width, self.call.height)
        resolution = f"--resolution {call.width}x{call.height}" if smaller else ""
        batch = f"--batch {call.batch}" if call.batch != self.call.batch else ""
        said = [_SAID[mode], batch, resolution, "" if text else _ON_HOST]
        words = ", ".join(part for part in said if part) or "all components resident"
        return self._made(f"{row.weights.name}: {words}", row, mode, call, peak)

    def _peak(self, row: Row, mode: Mode, call: Call, text: bool) -> int:
        parts = parts_of(self.source, row.weights, call, self.target)
        return peak_of(mode, [part for part in parts if text or part.stage != "encode"]).nbytes

    def _divided(self, batch: int) -> Call:
        return self.resize(batch, self.call.width, self.call.height)

    def _fewer(self, row: Row, mode: Mode) -> Change | None:
        """Return the change to the most pictures, fewer than these, that fit."""
        usual = self.call.usual_batch
        batches = range((self.call.pictures - 1) * usual, 0, -usual) if self.call.divisible else ()
        changes = (self._change(row, mode, self._divided(batch)) for batch in batches)
        return next((change for change in changes if change is not None), None)

    def _smaller(self, row: Row, mode: Mode, call: Call, least: Fraction, text: bool = True) -> Change | None:
        """Return the change to the largest smaller picture that fits, whose sides are no less than a part of these."""
        dim = next((dim for dim in call.model.family.dims.values() if dim.pixels_per_token), None)
        if not call.resizable or dim is None or dim.pixels_per_token is None:
            return None
        step, width, height = dim.pixels_per_token, call.width, call.height
        count = max(width, height) // step
        low, high = max(1, -(-least * count // 1)), count - 1
        best = None
        while low <= high:
            middle = (low + high) // 2
            sides = [max(step, side * middle // count // step * step) for side in (width, height)]
            too_small = min(sides) < (dim.min_resolution or 1)
            change = None if too_small else self._change(row, mode, self.resize(call.batch, *sides), text)
            best = change or best
            low, high = (middle + 1, high) if change is not None or too_small else (low, middle - 1)
        return best

    def _made(self, words: str, row: Row, mode: Mode, call: Call, peak: int) -> Change:
        return Change(words, row.weights.name, mode, call.width, call.height, call.batch, peak, peak <= self.memory)
