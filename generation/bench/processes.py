"""One process after another, each of which times one thing; all end with this one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["NotRun", "run"]

# The package's parent goes last in the path: first, it could shadow the standard library.
_START: Final = "import sys; sys.path.append(sys.argv[1]); from generation.bench.child import main; sys.exit(main())"
_KILLED: Final = -9


class NotRun(RuntimeError):
    """What was to be timed did not run; the message is the reason."""


def run(request: Mapping[str, Any], advance: Callable[[], None]) -> dict[str, Any]:
    """Return what a process measured (see :func:`generation.bench.child.measure`).

    Args:
        request: what to measure.
        advance: is called after each call of the model.

    Raises:
        NotRun: it did not run to its end.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _START, str(Path(__file__).resolve().parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # where it died at once, its exit status says more
                process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
                process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "call":
                    advance()
                elif event["event"] == "error":
                    raise NotRun(event["message"])
                else:
                    return {key: value for key, value in event.items() if key != "event"}
            raise NotRun(_death(process.wait(), errors))
        finally:
            process.kill()
            process.communicate()


def _death(status: int, errors: Any) -> str:
    errors.seek(0)
    last = next((line for line in reversed(errors.read().decode(errors="replace").splitlines()) if line.strip()), "")
    if status == _KILLED:
        return "its process was killed, as a system does that is out of memory"
    return f"its process ended with {status}: {last.strip()[:300] or 'it said nothing'}"
