"""Run jobs on several threads and take their results in order, few in memory at a time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order", "workers"]

T = TypeVar("T")


def workers() -> int:
    """Return how many threads share the work: one a processor, at most 8."""
    return min(os.cpu_count() or 1, 8)


def in_order(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Yield each job's result, in the order of the jobs; numpy, hashing and files let threads run side by side.

    At most four times as many jobs as workers are started and not yet taken, which bounds the memory. A job that raises
    ends everything with its error.

    Args:
        jobs: asked for as they are needed.
    """
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers()) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) >= 4 * workers():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
