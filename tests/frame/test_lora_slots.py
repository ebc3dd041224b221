"""LoRAs as inputs of a graph: from LoRA files to what the graph computes, and to the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from exporter import export
from fp4trt.families import family_of
from fp4trt.json_file import load_json
from generation.transformer import GraphTransformer
from onnx_functions.linting import lint
from onnx_functions.validation.run_gates import validate
from tests.shared_folders import SharedFolder
from trt_build import build

MAX_RANK = 128
BLOCK = "transformer_blocks.0"


@pytest.fixture(scope="module")
def slotted(svdquant_checkpoint: Path, shared_folder: SharedFolder) -> Path:
    """A checkpoint with smoothed inputs and branches, exported with slots; not to be changed."""

    def make(folder: Path) -> None:
        export(shutil.copytree(svdquant_checkpoint, folder / "digits"), lora_rank=MAX_RANK)

    return shared_folder("slotted", make) / "digits"


def _inputs(folder: Path) -> dict[str, torch.Tensor]:
    config = load_json(folder / "config.json")
    return family_of(config).example_inputs(config, (2, 16, 8), 0, torch.float32)


def test_an_empty_slot_changes_no_bit(slotted: Path, svdquant_digits: Path) -> None:
    given = {name: value.bfloat16() for name, value in _inputs(slotted).items()}

    with_slots, without = (GraphTransformer(folder / "model.onnx") for folder in (slotted, svdquant_digits))

    assert torch.equal(with_slots(**given)[0], without(**given)[0])


@pytest.mark.slow
def test_every_gate_passes_with_a_lora_in_every_slot(slotted: Path) -> None:
    report = validate(slotted)

    assert report.passed, [gate.line for gate in report.gates if not gate.passed]
    assert not [gate.name for gate in report.gates if gate.was_skipped]


@pytest.mark.slow
def test_the_engine_has_the_same_fp4_gemms_as_without_slots(slotted: Path, tmp_path: Path) -> None:
    """13 groups, as of the graph without slots; two kernels a group, and one for each factor whose rank may change."""
    built = build(slotted, output=tmp_path / "x.engine", shapes="lora_rank=0:16:64")

    assert (built.fp4_gemms, built.fp4_linears, built.lost) == (13, 20, [])
    assert built.profile["lora_rank"] == [0, 16, 64]
    assert built.lora is not None
    assert (built.lora["linears"], built.lora["max_rank"]) == (20, MAX_RANK)
    assert built.lora["kernels"] >= 2 * 13
    assert json.loads(Path(built.manifest).read_text())["lora"] == built.lora


def test_lint_refuses_slots_that_are_not_what_the_metadata_say(slotted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(slotted, tmp_path / "digits")
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = {node.name: node for node in graph.graph.node}
    q, k = (nodes[f"{BLOCK}.attn.{name}/lora_b/Transpose"] for name in ("to_q", "to_k"))
    q.input[0], k.input[0] = k.input[0], q.input[0]
    onnx.save(graph, folder / "model.onnx")

    (finding, _) = lint(folder / "model.onnx").findings

    assert (finding.rule, finding.tensor) == ("promise-metadata", "fp4trt.lora")
    assert f"{BLOCK}.attn.to_q has no slot that reads {BLOCK}.attn.to_q.lora_a and" in finding.message
