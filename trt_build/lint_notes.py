"""Notes on a graph's lint, before anything is made of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from onnx_functions.linting import require_clean

__all__ = ["lint_notes"]

_SHOWN: Final = 5


def lint_notes(path: Path, *, allow_slow: bool) -> Iterator[str]:
    """Refuse what TensorRT would build wrongly; yield a line for each of the first findings that pass.

    Raises:
        LintError
    """
    findings = require_clean(path, allow_slow).findings
    yield from (finding.line() for finding in findings[:_SHOWN])
    if len(findings) > _SHOWN:
        yield f"and {len(findings) - _SHOWN} warnings more: fp4trt lint lists them"
