"""Keep two commands from writing one result at a time."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fp4trt.errors import OutputExists

__all__ = ["alone"]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only command on this machine that works in a folder; it need not be there yet.

    The lock lies in the system's folder for temporary files, and is the system's own: it ends with the process, however
    that ends. Where no lock can be made, as over a file of another user's, nothing is locked.

    Raises:
        OutputExists: another command is working there.
    """
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    lock = FileLock(Path(tempfile.gettempdir()) / f"fp4trt-{place[:32]}.lock", is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputExists(
            f"another command is writing {folder}; wait until it has ended, or choose another --output"
        ) from None
    except OSError:
        yield
        return
    try:
        yield
    finally:
        lock.release()
