"""Our rewriting of a traced program gives what torch's decomposition, which traces it again, gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from exporter import trace
from exporter.decompose import decompose


@pytest.mark.slow
def test_a_graph_equals_that_of_torchs_decomposition(
    traced_graph: Callable[..., onnx.ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    programs = []
    monkeypatch.setattr(trace, "decompose", lambda program: programs.append(decompose(program)) or programs[0])
    ours = traced_graph(lambda path: True, **changes)
    assert programs[0].run_decompositions() is programs[0]
    monkeypatch.setattr(trace, "decompose", lambda program: program)
    theirs = traced_graph(lambda path: True, **changes)
    assert [node.name for node in ours.graph.node] == [node.name for node in theirs.graph.node]
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


class _Erf(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erf(x.flatten())


class _Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[::2].flatten()


class _Sizes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.new_ones(x.shape), x[2:].tanh()]).flatten().unflatten(0, (-1, 3)).sub(x.new_zeros(3))


class _Axes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        picked = x.to(x.device, torch.float64).index_select(1, torch.arange(2))
        return picked.transpose(0, -1).contiguous().view(2, -1, 1).transpose(-2, 2)


class _Forms(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.concatenate([x, 1 - x], axis=-1).squeeze(1).swapaxes(0, 1).squeeze(-2)


@pytest.mark.parametrize(
    "module", [_Sizes(), _Axes(), _Forms()], ids=["sizes", "axes", "other names, and what changes nothing"]
)
def test_a_rewritten_program_computes_the_same(module: nn.Module) -> None:
    rows = torch.export.Dim("rows", min=4)
    program = torch.export.export(module, (torch.zeros(8, 3),), dynamic_shapes=({0: rows},))
    found = decompose(program)
    assert found is not program
    found.graph.lint()
    for count in (5, 9):
        x = torch.randn(count, 3)
        assert torch.equal(found.graph_module(x)[0], module(x))


@pytest.mark.parametrize("module", [_Erf(), _Half()], ids=["an operator", "a size that is half of another"])
def test_a_program_with_something_that_we_do_not_know_is_left_to_torch(module: nn.Module) -> None:
    rows = torch.export.Dim("rows", min=4)
    program = torch.export.export(module, (torch.zeros(8, 3),), dynamic_shapes=({0: rows},))
    before = str(program.graph)
    assert decompose(program) is program
    assert str(program.graph) == before
