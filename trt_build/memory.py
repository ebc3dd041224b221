"""Will the build fit into memory, and the engine onto the GPU?"""

from __future__ import annotations

from collections.abc import Sequence

from fp4trt.free_memory import available_memory
from fp4trt.targets import Target

__all__ = ["GIB", "available_memory", "build_memory", "memory_lines", "size_text"]

GIB = 1 << 30
_BYTES_PER_WEIGHT_BYTE = 2.8  # measured: peak RSS of a streamed build of FLUX.1-dev over its weight data
_LIBRARIES = 500 << 20  # RSS of a build of next to nothing


def build_memory(weight_bytes: int) -> int:
    """Return the estimated peak resident bytes of a streamed build."""
    return int(_BYTES_PER_WEIGHT_BYTE * weight_bytes) + _LIBRARIES


def memory_lines(weight_bytes: int, targets: Sequence[Target], profiles: int = 1) -> list[str]:
    """Return the estimate, and a warning for memory or GPU memory that it exceeds, one line each.

    Profiles share the weights and are compiled one after the other. Measured with weights of 71 MB: four take 3 % more
    bytes than one, three times the seconds, and the same memory.
    """
    need, free = build_memory(weight_bytes), available_memory()
    lines = [f"memory: the build of {size_text(weight_bytes)} of weights needs about {size_text(need)}"]
    if profiles > 1:
        lines[0] += f" for {profiles} profiles as for one; it compiles them one after the other"
    if free is not None and need > free:
        lines.append(f"warning: only {size_text(free)} of memory are available; the build may be killed")
    small = (target for target in targets if weight_bytes > target.memory_gib * GIB)
    return lines + [
        f"warning: the engine exceeds the {target.memory_gib} GiB of {target.name}; use --weight-streaming"
        for target in small
    ]


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    units = {GIB: "GiB", 1 << 20: "MiB", 1 << 10: "KiB"}
    unit = next((unit for unit in units if count >= unit), None)
    return f"{count / unit:.1f} {units[unit]}" if unit else f"{count} bytes"
