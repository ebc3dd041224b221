"""What a rule of the lint is, and what it finds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fp4trt.verb import Result
from onnx_functions.linting.subject import Subject

__all__ = ["Finding", "Hit", "LintReport", "Rule", "Severity", "rule"]

Severity = Literal["wrong", "slow", "warning"]


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken: the node, the tensor, or both ("" where there is none), and what was found."""

    message: str
    node: str = ""
    tensor: str = ""


@dataclass(frozen=True)
class Finding:
    """One broken rule of one graph.

    Attributes:
        rule: the rule's name.
        severity: `wrong` computes something else, or does not build; `slow` loses FP4; `warning` may be meant.
        node: name of the node, or "".
        tensor: name of the tensor (or file, or key of the metadata), or "".
        message: what was found and what was expected.
        hint: how to mend it.
    """

    rule: str
    severity: Severity
    node: str
    tensor: str
    message: str
    hint: str

    def line(self) -> str:
        """Return it as one line."""
        where = " ".join(part for part in (self.node, f"[{self.tensor}]" if self.tensor else "") if part)
        return f"{self.severity}: {self.rule}: {where + ': ' if where else ''}{self.message}; {self.hint}"


@dataclass(frozen=True, eq=False)
class LintReport(Result):
    """All findings of one graph, the gravest first; its items are those of :meth:`as_dict`."""

    path: Path
    findings: tuple[Finding, ...]
    allow_slow: bool

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings that forbid to build the graph."""
        allowed = {"warning", "slow"} if self.allow_slow else {"warning"}
        return tuple(finding for finding in self.findings if finding.severity not in allowed)

    @property
    def passed(self) -> bool:
        """Whether nothing is refused."""
        return not self.refused

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON holds it."""
        return {
            "onnx": str(self.path.resolve()),
            "passed": self.passed,
            "allow_slow": self.allow_slow,
            "refused": len(self.refused),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def _items(self) -> dict[str, Any]:
        return self.as_dict()


@dataclass(frozen=True)
class Rule:
    """A rule: `why` is the first paragraph of its function's docstring."""

    name: str
    severity: Severity
    hint: str
    why: str
    check: Callable[[Subject], Iterable[Hit]]

    def findings(self, subject: Subject) -> Iterator[Finding]:
        """Yield what the graph does against this rule."""
        for hit in self.check(subject):
            yield Finding(self.name, self.severity, hit.node, hit.tensor, hit.message, self.hint)


def rule(name: str, severity: Severity, hint: str) -> Callable[[Callable[[Subject], Iterable[Hit]]], Rule]:
    """Turn a function into a rule.

    Args:
        name: what findings, the command and the documentation call it.
        severity: see `Finding`.
        hint: how to mend what it finds, the end of a sentence.
    """

    def make(check: Callable[[Subject], Iterable[Hit]]) -> Rule:
        paragraph = (inspect.getdoc(check) or "").split("\n\n")[0]
        return Rule(name, severity, hint, " ".join(paragraph.split()), check)

    return make
