"""What a run over the blocks of a model has finished, kept on disk, so that a killed run resumes.

A folder with two files: ``blocks.json``, which says what was run, what each finished block gave and of which shapes the
last one's outputs are; and those outputs, for every call, as plain bytes one after another. A block counts as finished
once ``blocks.json`` says so, which is written beside, synced and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration.by_block.runner import Outputs
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import StoredTensor, TensorPlan, bytes_of, naming, plan_of
from fp4trt.work_folder import work_folder, write_mark

__all__ = ["BlockCheckpoint", "finished_blocks"]

STATE: Final = "blocks.json"
"""Tells a folder of ours from one of the user's."""


@contextlib.contextmanager
def finished_blocks(folder: Path, run: Mapping[str, Any]) -> Iterator[BlockCheckpoint]:
    """Give the checkpoint in a folder, which is gone afterwards: whatever is made of it is to be safe by then.

    It stays where the process was killed, and, with what is finished, where it was interrupted or the system failed it.

    Args:
        folder: is made, with its parents; one that an earlier run left is taken over.
        run: what is run on what, as JSON; another run's checkpoint is not used.

    Raises:
        OutputExists: the folder is there and is none of ours, or another command works in it.
    """
    checkpoint = BlockCheckpoint(folder, json.loads(json.dumps(run)))

    def keeps() -> str:
        return "the finished blocks" if checkpoint.results else ""

    with work_folder(folder, STATE, checkpoint.resume, checkpoint.save, keeps):
        yield checkpoint


@dataclass
class BlockCheckpoint:
    """Finished blocks in a folder.

    Attributes:
        folder: where.
        run: what is run on what.
        results: finished block to its result, as JSON, in the order in which they finished.
    """

    folder: Path
    run: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    _calls: list[list[StoredTensor]] = field(default_factory=list)
    _next: list[list[StoredTensor]] = field(default_factory=list)

    def outputs(self, call: int) -> Outputs:
        """Return what the last finished block gave for a call; nothing before the first."""
        return tuple(stored.tensor() for stored in self._calls[call]) if self._calls else ()

    def add(self, outputs: Outputs) -> None:
        """Append what the block that is being run gives for the next call."""
        file, stored = self._file(len(self.results) + 1), []
        with naming(file), file.open("ab" if self._next else "wb") as stream:
            for value in outputs:
                plan = plan_of("", value)
                stored.append(StoredTensor(file, plan.dtype, plan.shape, stream.tell(), plan.nbytes))
                stream.write(bytes_of(value).data)
        self._next.append(stored)

    def finish(self, block: str, result: Any) -> None:
        """Count a block as finished: its outputs, where it has any, take the place of those of the one before."""
        old, new = self._file(len(self.results)), self._file(len(self.results) + 1)
        if self._next:
            with naming(new), new.open("r+b") as stream:
                os.fsync(stream.fileno())
        self.results[block] = result
        self._calls, self._next = self._next, []
        self.save()
        old.unlink(missing_ok=True)

    def forget(self) -> None:
        """Begin anew."""
        if self.results:
            old = self._file(len(self.results))
            self.results, self._calls = {}, []
            self.save()
            old.unlink(missing_ok=True)

    def save(self) -> None:
        """Write what is finished."""
        calls = [[(stored.dtype, stored.shape) for stored in call] for call in self._calls]
        state = {"run": self.run, "order": list(self.results), "results": self.results, "calls": calls}
        write_mark(self.folder, STATE, state)

    def resume(self) -> bool:
        """Take over what a killed run of the same kind left; return whether there was any."""
        try:
            state = load_json(self.folder / STATE)
            if state["run"] != self.run:
                return False
            results = {block: state["results"][block] for block in state["order"]}
            calls = list(_spans(self._file(len(results)), state["calls"]))
        except (BadCheckpoint, KeyError, TypeError, ValueError):
            return False
        self.results, self._calls = results, calls
        return True

    def _file(self, finished: int) -> Path:
        return self.folder / f"{finished:03d}.outputs"


def _spans(file: Path, calls: list[list[tuple[str, list[int]]]]) -> Iterator[list[StoredTensor]]:
    offset = 0
    for call in calls:
        stored = []
        for dtype, shape in call:
            plan = TensorPlan("", dtype, tuple(shape))
            stored.append(StoredTensor(file, dtype, plan.shape, offset, plan.nbytes))
            offset += plan.nbytes
        yield stored
    if offset and (not file.is_file() or file.stat().st_size != offset):
        raise ValueError(f"{file} does not hold {offset} bytes")
