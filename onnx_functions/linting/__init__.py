"""What TensorRT would accept wrongly, or degrade in silence: every rule that a graph is held against.

One function a rule, one file a family of rules. Nothing here runs a graph: nodes, metadata and stored bytes are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx

from fp4trt.errors import BadGraph, LintError
from fp4trt.pipeline_folder import graph_in
from fp4trt.progress import PATIENCE_S, Progress, tracking
from fp4trt.verb import verb
from onnx_functions.graph.external_data import read_model
from onnx_functions.linting import (
    activations,
    attentions,
    chains,
    data,
    dependence,
    files,
    fp8,
    metadata,
    operators,
    plausibility,
    promise,
    promised_tensors,
    stored_names,
    structure,
    symbolic,
    unread,
    weights,
)
from onnx_functions.linting.opset import normalise
from onnx_functions.linting.rule import Finding, LintReport, Rule
from onnx_functions.linting.subject import Subject

__all__ = ["RULES", "Finding", "LintReport", "Rule", "lint", "normalise", "require_clean", "require_form"]

RULES: Final[tuple[Rule, ...]] = (
    *weights.RULES,
    *activations.RULES,
    *chains.RULES,
    *fp8.RULES,
    *data.RULES,
    *plausibility.RULES,
    *attentions.RULES,
    *structure.RULES,
    *dependence.RULES,
    *symbolic.RULES,
    *operators.RULES,
    *metadata.RULES,
    *promise.RULES,
    *promised_tensors.RULES,
    *files.RULES,
    *stored_names.RULES,
    *unread.RULES,
)

_GRAVITY: Final = ("wrong", "slow", "warning")


@verb
def lint(
    path: str | Path,
    *,
    allow_slow: bool = False,
    progress: Progress | None = None,  # noqa: ARG001 - the verb's
) -> LintReport:
    """Hold a graph against every rule.

    Args:
        path: an ONNX file, or a folder that holds model.onnx, or a pipeline's.
        allow_slow: do not refuse what only loses speed.
        progress: called with each step; there is one a rule.

    Returns:
        The findings. Each byte of external data is read at most once, 8 MiB at a time.

    Raises:
        BadGraph: the file is missing or no ONNX model.
        BadCheckpoint: the quantized checkpoint beside it has a tensor without a meaning, or lacks one.
    """
    file = graph_in(Path(path))
    subject = Subject(file, read_model(file))
    # Wires that lead nowhere, or in a circle, or end in a node without inputs, cannot be followed.
    broken = tuple(
        finding for rule in (structure.tensor_order, operators.operator_form) for finding in rule.findings(subject)
    )
    if broken:
        return LintReport(file, broken, allow_slow)
    findings: list[Finding] = []
    with tracking(len(RULES), "linting", PATIENCE_S) as advance:
        for rule in RULES:
            findings += rule.findings(subject)
            advance()
    findings.sort(key=lambda finding: _GRAVITY.index(finding.severity))
    return LintReport(file, tuple(findings), allow_slow)


def require_clean(path: str | Path, allow_slow: bool = False) -> LintReport:
    """Return the lint's report of a graph that has nothing to be refused.

    Raises:
        LintError: naming the first finding.
        BadGraph: the file is missing or no ONNX model.
    """
    report = lint(path, allow_slow=allow_slow)
    if report.passed:
        return report
    first, *others = report.refused
    more = f" (and {len(others)} more: fp4trt lint lists them)" if others else ""
    slow = "; or pass --allow-slow" if all(finding.severity == "slow" for finding in report.refused) else ""
    raise LintError(f"{report.path.name} is refused: {first.line()}{more}{slow}")


def require_form(path: Path, model: onnx.ModelProto, ordered: bool = False) -> None:
    """Refuse a graph with a node that lacks what its operator needs, which nothing could follow.

    Args:
        path: of its file.
        model: the graph.
        ordered: refuse too what reads, or is, a tensor that nothing before it gives.

    Raises:
        BadGraph: naming the first.
    """
    rules = (operators.operator_form, structure.tensor_order) if ordered else (operators.operator_form,)
    for finding in (finding for rule in rules for finding in rule.findings(Subject(path, model))):
        where = f"node {finding.node}" if finding.node else f"tensor {finding.tensor}"
        raise BadGraph(f"{path}: {where}: {finding.message}; export the graph again")
