"""Workers on the machines of a Ray cluster: a task for each block, files in folders that all machines share.

Ray starts the processes, tells when one is lost, and holds the captured inputs; what enters a block lies in the work
folder, and what a block became comes back as the task's result.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import torch

from calibration.by_block.one_block import Finished, Job, Order, Ran, Worker
from calibration.by_block.progress import STATE
from calibration.by_block.ray_cluster import LOCAL, connect, joined, library
from calibration.by_block.workers import OUT_OF_MEMORY, Crew, Died, said_by
from calibration.checkpoints.plain import PlainCheckpoint
from calibration.inputs.captured import Inputs
from fp4trt.errors import BadEnvironment

__all__ = ["on_ray"]

_ALIKE: Final = ("torch", "numpy", "nvidia-modelopt", "diffusers")
"""Packages whose versions decide about bytes."""

_PATIENCE_S: Final = 120
"""Seconds that a machine of the cluster has to answer."""


@contextlib.contextmanager
def on_ray(
    address: str, count: int | None, memory: int, job: Job, source: PlainCheckpoint, _: Sequence[Inputs]
) -> Iterator[Crew]:
    """Give workers of a Ray cluster.

    Args:
        address: of the cluster, or :data:`~calibration.by_block.ray_cluster.LOCAL`.
        count: of blocks that are worked on at a time; None for as many as the cluster has cores and memory for.
        memory: bytes that one of them takes, about.
        job: of the run; its folders have to be at the same place on every machine.
        source: the job's checkpoint.

    Raises:
        BadEnvironment: there is no such cluster, or a machine of it sees other files, or has other packages.
    """
    ray = library()
    ours = joined() or not ray.is_initialized()
    if not ray.is_initialized():
        connect(address)
    try:
        size, threads = _divided(count, memory, job.device != "cpu", len(source.family.blocks(source.config)) + 1)
        if address != LOCAL:
            _require_alike([*{one.file for one in source.stored.values()}, job.work / STATE])
        yield _Ray(job, size, threads, memory)
    finally:
        if ours:
            ray.shutdown()


def _divided(count: int | None, memory: int, on_gpu: bool, most: int) -> tuple[int, int]:
    """Return how many blocks are worked on at a time, and by how many threads each.

    Raises:
        BadEnvironment: the cluster has no room for them.
    """
    ray = library()
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = [
        int(min(one.get("CPU", 0), one.get("memory", 0) // memory, one.get("GPU", 0) if on_gpu else most))
        for one in machines
    ]
    each = f"a core{' and a GPU' if on_gpu else ''} and {memory / 1e9:.1f} GB of memory"
    if not sum(room) or (count or 0) > sum(room):
        raise BadEnvironment(
            f"the Ray cluster has room for {sum(room)} workers, each of which takes {each}"
            + (f"; expected {count}: take fewer --workers" if count else "; add a machine to it")
        )
    size = min(count or sum(room), most)
    with_room = [int(one["CPU"]) for one, fit in zip(machines, room, strict=True) if fit]
    return size, max(1, min(*with_room, sum(with_room) // size))


def _require_alike(seen: Sequence[Path]) -> None:
    """Refuse a cluster whose machines would give other bytes, or none.

    Args:
        seen: files that all machines have to see.

    Raises:
        BadEnvironment: naming the machine, and what is wrong there.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    ray = library()
    answer, given = _asked(), ([str(file) for file in sorted(seen)], _ALIKE)
    ask = ray.remote(num_cpus=0, max_retries=0)(answer)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = [
        (address, ask.options(scheduling_strategy=On(node, soft=False)).remote(*given))
        for node, address in nodes.items()
    ]
    packages, sizes, code = answer(*given)
    for address, told in asked:
        try:
            theirs, their_sizes, their_code = ray.get(told, timeout=_PATIENCE_S)
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise BadEnvironment(f"the Ray worker at {address} does not answer: {reason}") from None
        for name, version in packages.items():
            if theirs[name] != version:
                raise BadEnvironment(
                    f"the Ray worker at {address} has {name} {theirs[name] or 'not installed'}, this machine has "
                    f"{version}; install the same version on all machines"
                )
        if their_code != code:
            raise BadEnvironment(
                f"the Ray worker at {address} has other files of fp4trt {packages['fp4trt']} than this machine; "
                "install the same ones on all machines"
            )
        for file, size in sizes.items():
            if their_sizes[file] != size:
                raise BadEnvironment(
                    f"the Ray worker at {address} does not see {file} as this machine does; put source and output into "
                    "a folder that all machines have under the same path"
                )


Answer = tuple[dict[str, str | None], dict[str, int], str]
"""Name of a package to its version, name of a file to its size, and a hash of the files that quantize."""


def _asked() -> Callable[[Sequence[str], Sequence[str]], Answer]:
    """Return a function that says what a machine has; Ray takes it there as it stands, where fp4trt may be missing."""

    def answer(files: Sequence[str], packages: Sequence[str]) -> Answer:
        import hashlib
        from importlib import metadata
        from pathlib import Path

        found: dict[str, str | None] = dict.fromkeys(packages)
        for name in {one.metadata["Name"] for one in metadata.distributions()} & set(packages):
            found[name] = metadata.version(name)
        digest, found["fp4trt"] = hashlib.sha256(), None
        try:
            import fp4trt
        except ImportError:
            pass
        else:
            found["fp4trt"], root = fp4trt.__version__, Path(fp4trt.__file__).parents[1]
            for file in sorted(file for room in ("calibration", "fp4trt") for file in (root / room).rglob("*.py")):
                digest.update(file.relative_to(root).as_posix().encode() + file.read_bytes())
        sizes = {file: Path(file).stat().st_size if Path(file).exists() else -1 for file in files}
        return found, sizes, digest.hexdigest()

    return answer


class _Ray:
    """A task for each block; what it says are the items of its generator."""

    def __init__(self, job: Job, size: int, threads: int, memory: int) -> None:
        ray = library()
        self.size, self._run = size, uuid4().hex
        self._job = ray.put(job)
        resources: Mapping[str, Any] = {
            "num_cpus": threads, "num_gpus": int(job.device != "cpu"), "memory": memory, "max_retries": 0
        }  # fmt: skip
        self._task = ray.remote(_items).options(**resources, num_returns="streaming", scheduling_strategy="SPREAD")
        self._threads = threads
        self._running: dict[int, Any] = {}

    def start(self, order: Order) -> None:
        self._running[order.index] = self._task.remote(self._job, self._run, self._threads, order)

    def wait(self) -> tuple[int, Ran | Finished | Died]:
        ray = library()
        ready = ray.wait(list(self._running.values()), num_returns=1)[0][0]
        index = next(index for index, items in self._running.items() if items is ready)
        try:
            said = ray.get(next(ready))
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            del self._running[index]
            known = isinstance(error, ray.exceptions.OutOfMemoryError | ray.exceptions.WorkerCrashedError)
            return index, Died(f"was lost ({type(error).__name__}){f', {OUT_OF_MEMORY}' if known else ''}")
        if isinstance(said, BaseException):
            raise said
        if not isinstance(said, Ran):
            del self._running[index]
        return index, said


_WORKERS: Final[dict[str, list[Worker]]] = {}
"""The worker of this process of Ray's, by run."""


def _items(job: Job, run: str, threads: int, order: Order) -> Iterator[Ran | Finished | BaseException]:
    """Work on a block, and yield what is said of it meanwhile."""
    if run not in _WORKERS:
        _WORKERS.clear()
    known = _WORKERS.setdefault(run, [])
    said: queue.SimpleQueue[Ran | None] = queue.SimpleQueue()

    def work() -> Finished | BaseException:
        torch.set_num_threads(threads)
        try:
            return said_by(job, known, order, said.put)
        finally:
            said.put(None)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        while (ran := said.get()) is not None:
            yield ran
        yield result.result()
