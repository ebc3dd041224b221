"""Which NVIDIA GPUs are in this machine, as the driver's own tool says."""

from __future__ import annotations

import subprocess

__all__ = ["local_compute_capabilities"]


def local_compute_capabilities() -> tuple[str, ...]:
    """Return the compute capabilities of the GPUs here, such as ("SM100",); empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(f"SM{line.strip().replace('.', '')}" for line in found.splitlines() if line.strip())
