"""How much memory a process can still take."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

__all__ = ["available_memory"]

_CGROUP = Path("/sys/fs/cgroup")


class _MemoryStatus(ctypes.Structure):
    """Windows' MEMORYSTATUSEX."""

    _fields_ = [
        ("length", ctypes.c_ulong),
        ("load", ctypes.c_ulong),
        *((name, ctypes.c_ulonglong) for name in ("total", "available", "page_total", "page_available")),
        *((name, ctypes.c_ulonglong) for name in ("virtual_total", "virtual_available", "extended")),
    ]
    length: int
    available: int


def available_memory() -> int | None:
    """Return the bytes that a new process can take without swapping; None where the system does not say."""
    if sys.platform == "win32":
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.available)
    free = [value for value in (_proc_available(), _cgroup_available()) if value is not None]
    return min(free, default=None)


def _proc_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(value) * 1024 for value in values), None)


def _cgroup_available() -> int | None:
    """Memory left under a container's limit; its page cache can be reclaimed and does not count as used."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        statistics = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return None
    used = dict(zip(statistics[::2], statistics[1::2], strict=False)).get("anon", "0")
    return int(limit) - int(used) if limit.isdecimal() else None
