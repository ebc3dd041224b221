"""What a run over the blocks of a model has finished, kept on disk, so that a killed run resumes.

A folder with ``blocks.json``, which says what was run, what each finished block gave and of which shapes the outputs
are that a block still has to read; and those outputs, in a file for each block, for every call, as plain bytes one
after another. Where blocks run one after the other that is one file. A block counts as finished once ``blocks.json``
says so, which is written beside, synced and renamed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from calibration.by_block.runner import Outputs
from fp4trt.errors import BadCheckpoint
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import StoredTensor, TensorPlan, bytes_of, naming, plan_of
from fp4trt.work_folder import work_folder, write_mark

__all__ = ["STATE", "BlockCheckpoint", "OutputsFile", "Stored", "finished_blocks"]

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


Stored = Sequence[Sequence[StoredTensor]]
"""For every call, where the tensors lie that a block returned."""


class OutputsFile:
    """Takes what a block returns for one call after another."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._calls: list[list[StoredTensor]] = []

    def add(self, outputs: Outputs) -> None:
        """Append what the block returns for the next call."""
        stored = []
        with naming(self._path), self._path.open("ab" if self._calls else "wb") as stream:
            for value in outputs:
                plan = plan_of("", value)
                stored.append(StoredTensor(self._path, plan.dtype, plan.shape, stream.tell(), plan.nbytes))
                stream.write(bytes_of(value).data)
        self._calls.append(stored)

    def close(self) -> Stored:
        """Bring the file to disk; return what is in it."""
        with naming(self._path), self._path.open("r+b") as stream:
            os.fsync(stream.fileno())
        return self._calls


@dataclass
class BlockCheckpoint:
    """Finished blocks in a folder.

    Blocks are counted in the order in which the model runs them, from 0. Whoever finishes them in this order names no
    index.

    Attributes:
        folder: where.
        run: what is run on what.
        results: finished block to its result, as JSON, in the order in which they finished.
    """

    folder: Path
    run: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    _entering: dict[int, Stored] = field(default_factory=dict)
    _next: OutputsFile | None = None

    def entering(self, index: int) -> Stored | None:
        """Return where what enters a block lies, for every call: nothing for the first, None if it is not there."""
        return self._entering.get(index) if index else ()

    def outputs(self, call: int) -> Outputs:
        """Return what the last finished block gave for a call; nothing before the first."""
        stored = self._entering.get(len(self.results))
        return tuple(tensor.tensor() for tensor in stored[call]) if stored else ()

    def add(self, outputs: Outputs) -> None:
        """Append what the block that is being run gives for the next call."""
        if self._next is None:
            self._next = OutputsFile(self.outputs_of(len(self.results)))
        self._next.add(outputs)

    def outputs_of(self, index: int) -> Path:
        """Return the file for what a block gives."""
        return self.folder.resolve() / f"{index + 1:03d}.outputs"

    def ran(self, index: int, outputs: Stored) -> None:
        """Keep what a block gives, which is on disk, until the block behind it is finished."""
        self._entering[index + 1] = outputs
        self.save()

    def finish(self, block: str, result: Any, index: int | None = None) -> None:
        """Count a block as finished: its outputs, where it has any, are kept; what entered it goes."""
        index = len(self.results) if index is None else index
        if self._next is not None:
            self._entering[index + 1] = self._next.close()
            self._next = None
        self.results[block] = result
        self._entering.pop(index, None)
        self.save()
        self.outputs_of(index - 1).unlink(missing_ok=True)

    def forget(self) -> None:
        """Begin anew."""
        if self.results or self._entering:
            old = [self.outputs_of(index - 1) for index in self._entering]
            self.results, self._entering = {}, {}
            self.save()
            for file in old:
                file.unlink(missing_ok=True)

    def save(self) -> None:
        """Write what is finished."""
        entering = {
            index: [[(tensor.dtype, tensor.shape) for tensor in call] for call in calls]
            for index, calls in self._entering.items()
        }
        write_mark(
            self.folder,
            STATE,
            {"run": self.run, "order": list(self.results), "results": self.results, "entering": entering},
        )

    def resume(self) -> bool:
        """Take over what a killed run of the same kind left; return whether there was any."""
        try:
            state = load_json(self.folder / STATE)
            if state["run"] != self.run:
                return False
            results = {block: state["results"][block] for block in state["order"]}
            entering: dict[int, Stored] = {
                int(index): list(_spans(self.outputs_of(int(index) - 1), calls))
                for index, calls in state["entering"].items()
            }
        except (BadCheckpoint, KeyError, TypeError, ValueError):
            return False
        self.results, self._entering = results, entering
        return True


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
