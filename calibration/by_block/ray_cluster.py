"""The connection to a Ray cluster. One of this machine can start early, while this process imports the libraries."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import logging
import os
import socket
import threading
from typing import Any, Final

from calibration.by_block.cores import cores
from calibration.by_block.fork_server import PRELOADED
from fp4trt.errors import BadEnvironment

__all__ = ["LOCAL", "connect", "joined", "library", "start_early"]

LOCAL: Final = "local"
"""The address that stands for a Ray of this machine alone, which is started and ended here."""

_CONNECTING_S: Final = 10

_READY: list[threading.Event] = []
"""Set when the Ray that was started early runs, or cannot; gone when somebody has waited for it."""


def library() -> Any:
    """Return Ray; some of its functions have no types."""
    import ray

    return ray


def start_early() -> None:
    """Start a Ray of this machine in a thread, whose workers then import the libraries; where Ray is installed."""
    if importlib.util.find_spec("ray") is not None:
        _READY.append(threading.Event())
        threading.Thread(target=_start, args=_READY, name="started Ray", daemon=True).start()
        atexit.register(_end)


def joined() -> bool:
    """Wait for the Ray that was started early; return whether it runs."""
    if not _READY:
        return False
    _READY.pop().wait()
    return bool(library().is_initialized())


def _end() -> None:
    """End the Ray that was started early, where nobody has waited for it: some of its processes would outlive this."""
    if joined():
        library().shutdown()


def _start(ready: threading.Event) -> None:
    """Start it, and stay: the system ends Ray's processes with the thread that started them."""
    try:
        connect(LOCAL)
        task = library().remote(num_cpus=1, max_retries=0)(_import_libraries)
        for _ in range(cores()):
            task.remote()
    except BadEnvironment:  # who needs it connects again, and hears why not
        return
    finally:
        ready.set()
    threading.Event().wait()


def _import_libraries() -> None:
    for name in PRELOADED:
        importlib.import_module(name)


def connect(address: str) -> None:
    """Connect to a cluster, or start one.

    Raises:
        BadEnvironment: nobody answers there.
    """
    ray = library()
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of workers that are started here; Ray's own is 15
    try:
        if address == LOCAL:
            ray.init(num_cpus=cores(), include_dashboard=False, **quiet)
            return
        host, colon, port = address.rpartition("://")[2].rpartition(":")
        if colon and port.isdecimal():  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), _CONNECTING_S).close()
        ray.init(address=address, **quiet)
    except Exception as error:  # Ray raises bare ones too, where a start takes it too long
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadEnvironment(
            f"cannot connect to Ray at {address} ({reason}); start it with `ray start --head`, and give its HOST:PORT, "
            "auto for that of this machine, or no address"
        ) from None
