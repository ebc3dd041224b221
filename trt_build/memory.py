"""Will the build fit into memory, and the engine onto the GPU?"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from trt_build.targets import Target

__all__ = ["GIB", "available_memory", "build_memory", "memory_lines"]

GIB = 1 << 30
_BYTES_PER_WEIGHT_BYTE = 2.8  # measured: peak RSS of a streamed build of FLUX.1-dev over its weight data
_LIBRARIES = 500 << 20  # RSS of a build of next to nothing
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


def build_memory(weight_bytes: int) -> int:
    """Return the estimated peak resident bytes of a streamed build."""
    return int(_BYTES_PER_WEIGHT_BYTE * weight_bytes) + _LIBRARIES


def available_memory() -> int | None:
    """Return the bytes that a new process can take without swapping; None where the system does not say."""
    if sys.platform == "win32":
        status = _MemoryStatus()
        status.length = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status.available)
    free = [value for value in (_proc_available(), _cgroup_available()) if value is not None]
    return min(free, default=None)


def memory_lines(weight_bytes: int, targets: Sequence[Target]) -> list[str]:
    """Return the estimate, and a warning for memory or GPU memory that it exceeds, one line each."""
    need, free = build_memory(weight_bytes), available_memory()
    lines = [f"memory: the build of {_size(weight_bytes)} of weights needs about {_size(need)}"]
    if free is not None and need > free:
        lines.append(f"warning: only {_size(free)} of memory are available; the build may be killed")
    small = (target for target in targets if weight_bytes > target.memory_gib * GIB)
    return lines + [
        f"warning: the engine exceeds the {target.memory_gib} GiB of {target.name}; use --weight-streaming"
        for target in small
    ]


def _size(count: int) -> str:
    units = {GIB: "GiB", 1 << 20: "MiB", 1 << 10: "KiB"}
    unit = next((unit for unit in units if count >= unit), None)
    return f"{count / unit:.1f} {units[unit]}" if unit else f"{count} bytes"


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
