"""Who works on the blocks of a model: this process alone, or several processes of this machine.

Workers on other machines are Ray's (:mod:`calibration.by_block.ray_workers`). All are a :class:`Crew`, and none decides
anything: which block comes next, and what becomes of it, is said by :mod:`calibration.by_block.quantize_blocks`.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Final, Protocol

import torch

from calibration.by_block import fork_server
from calibration.by_block.cores import cores
from calibration.by_block.one_block import Finished, Job, Order, Ran, Worker
from calibration.checkpoints.plain import PlainCheckpoint
from calibration.checkpoints.threads import suited_threads
from calibration.inputs.captured import Inputs

__all__ = ["OUT_OF_MEMORY", "Crew", "Died", "OpenCrew", "in_processes", "in_this_process", "said_by"]

OUT_OF_MEMORY: Final = "most likely because memory ran out: take fewer workers, or a machine with more memory"


@dataclass(frozen=True)
class Died:
    """The process that worked on a block is no more.

    Attributes:
        why: what became of it, as the rest of a sentence.
    """

    why: str


class Crew(Protocol):
    """Workers of a run.

    Attributes:
        size: how many blocks they work on at a time.
    """

    size: int

    def start(self, order: Order) -> None:
        """Give a block to a worker that has none."""
        ...

    def wait(self) -> tuple[int, Ran | Finished | Died]:
        """Return what the next worker says, with its block's index; raise what is raised there."""
        ...


OpenCrew = Callable[[Job, PlainCheckpoint, Sequence[Inputs]], AbstractContextManager[Crew]]
"""Opens the workers for a job, whose checkpoint and inputs this process has at hand."""


@contextlib.contextmanager
def in_this_process(job: Job, source: PlainCheckpoint, calls: Sequence[Inputs]) -> Iterator[Crew]:
    """Give one worker, which is this process."""
    yield _Here(Worker(job, source, calls))


class _Here:
    """A worker that works while it is waited for."""

    size = 1

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._orders: deque[Order] = deque()
        self._said: deque[tuple[int, Ran | Finished]] = deque()

    def start(self, order: Order) -> None:
        self._orders.append(order)

    def wait(self) -> tuple[int, Ran | Finished | Died]:
        if not self._said:
            order = self._orders.popleft()
            finished = self._worker.work(order, lambda ran: self._said.append((order.index, ran)))
            self._said.append((order.index, finished))
        return self._said.popleft()


@contextlib.contextmanager
def in_processes(count: int, job: Job, _source: PlainCheckpoint, _calls: Sequence[Inputs]) -> Iterator[Crew]:
    """Give some processes of this machine, which share its cores, and its GPUs in turn.

    They end with this process, however that ends; Ctrl-C is this process's to hear.
    """
    crew = _Processes(count, job)
    try:
        yield crew
    finally:
        crew.close()


@dataclass
class _Process:
    """A process, the way to it, and the index of the block that it works on."""

    process: Any
    way: Connection
    index: int | None = None
    began: bool = False


class _Processes:
    """Some processes, each in a place of its own, where another follows when it dies.

    Where the system can fork, :mod:`calibration.by_block.fork_server` says what from.
    """

    def __init__(self, count: int, job: Job) -> None:
        self.size, self._job = count, job
        self._threads = max(1, min(torch.get_num_threads(), cores() // count))
        self._gpus = torch.cuda.device_count() if job.device == "cuda" else 0
        fork_server.start_early()
        self._places: list[_Process | None] = [None] * count

    def start(self, order: Order) -> None:
        place = next(place for place, one in enumerate(self._places) if one is None or one.index is None)
        one = self._places[place] or self._begin(place)
        try:
            one.way.send(order)
        except OSError:  # it died while it had nothing to do
            self._bury(one)
            one = self._begin(place)
            one.way.send(order)
        one.index, self._places[place] = order.index, one

    def wait(self) -> tuple[int, Ran | Finished | Died]:
        while True:
            busy = {one.way: one for one in self._places if one is not None and one.index is not None}
            for way in wait(list(busy)):
                one = busy[way]  # type: ignore[index]
                assert one.index is not None
                try:
                    said = one.way.recv()
                except (EOFError, OSError):
                    self._places[self._places.index(one)] = None
                    return one.index, self._bury(one)
                if said is None:
                    one.began = True
                    continue
                if isinstance(said, BaseException):
                    raise said
                index = one.index
                if not isinstance(said, Ran):
                    one.index = None
                return index, said

    def close(self) -> None:
        """End all processes."""
        for one in self._places:
            if one is not None:
                one.process.kill()
                self._bury(one)

    def _begin(self, place: int) -> _Process:
        job = replace(self._job, device=f"cuda:{place % self._gpus}") if self._gpus else self._job
        context = fork_server.context()
        ours, its = context.Pipe()
        process = context.Process(target=_work, args=(job, self._threads, its), daemon=True)
        process.start()
        its.close()
        return _Process(process, ours)

    @staticmethod
    def _bury(one: _Process) -> Died:
        one.process.join()
        one.way.close()
        status = one.process.exitcode
        if status == -getattr(signal, "SIGKILL", 0):
            return Died(f"was killed, {OUT_OF_MEMORY}")
        ended = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        if not one.began:
            ended += ' before it began: a script that takes workers needs `if __name__ == "__main__":` around it'
        return Died(ended)


def _work(job: Job, threads: int, way: Connection) -> None:
    """Work on the blocks that come through a pipe, as the main function of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    way.send(None)
    worker: list[Worker] = []
    with contextlib.suppress(EOFError):
        while True:
            order = way.recv()
            way.send(said_by(job, worker, order, way.send))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def said_by(job: Job, known: list[Worker], order: Order, say: Callable[[Ran], object]) -> Finished | BaseException:
    """Return what a worker of another process says of a block at last: what it became, or what was raised.

    Args:
        job: of the run.
        known: the worker, once this process has one; it is kept there.
        order: the block.
        say: told when the block has run.
    """
    try:
        if not known:
            known.append(Worker.of(job))
        with suited_threads(known[0].config):
            return known[0].work(order, say)
    except BaseException as error:
        error.add_note(f"in the worker of {order.path}:\n{traceback.format_exc()}")
        try:
            copy.copy(error)  # as the other process makes it anew
        except TypeError:
            return RuntimeError(f"{type(error).__name__}: {error}")
        return error
