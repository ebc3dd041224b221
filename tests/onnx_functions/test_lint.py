"""Each mutation of the table is refused by name; what is right passes; TensorRT-RTX does what the table says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from lint_damage import Damaged
from lint_mutations import Mutation
from lint_mutations_outside import MUTATIONS

from onnx_functions.linting import RULES, lint

SEVERITY = {rule.name: rule.severity for rule in RULES}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_found_by_its_rule_which_names_the_place(
    mutation: Mutation, quantized_digits: Path, tmp_path: Path
) -> None:
    graph = Damaged.copy(quantized_digits, tmp_path / "model")
    mutation.apply(graph)
    report = lint(graph.save())
    found = [finding for finding in report.findings if finding.rule == mutation.rule]
    assert mutation.where in {place for finding in found for place in (finding.node, finding.tensor)}
    assert report.passed == (SEVERITY[mutation.rule] == "warning")
    assert replace(report, allow_slow=True).passed == (SEVERITY[mutation.rule] != "wrong")
