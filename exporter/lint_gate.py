"""What the lint says of a graph that was just written, before it gets its name."""

from __future__ import annotations

from pathlib import Path

from fp4trt.errors import LintError
from onnx_functions.linting import lint

__all__ = ["passed_lint"]


def passed_lint(written: Path, source: Path, allow_slow: bool | None = None) -> list[str]:
    """Return the findings that only lose speed, a line each, of a graph that has no worse.

    Args:
        written: the graph, under the name that it has for now.
        source: what it was made of, as the user calls it.
        allow_slow: let those findings pass; None where the user is not asked.

    Raises:
        LintError: naming the source and the first finding.
    """
    report = lint(written, allow_slow=bool(allow_slow))
    if report.passed:
        return [finding.line() for finding in report.findings if finding.severity == "slow"]
    first, *others = report.refused
    more = f" (and {len(others)} more)" if others else ""
    slow = allow_slow is not None and all(finding.severity == "slow" for finding in report.refused)
    advice = "; or pass --allow-slow" if slow else ""
    raise LintError(f"the graph made of {source} is refused: {first.line()}{more}{advice}")
