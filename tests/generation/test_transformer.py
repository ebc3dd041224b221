"""A transformer is called alike, whatever form the model has."""

from __future__ import annotations

from pathlib import Path

import torch

from calibration.checkpoints.quantized import load, read
from generation.transformer import open_transformer


def test_a_checkpoint_and_its_graph_give_the_same_velocity(quantized_digits: Path) -> None:
    checkpoint = read(quantized_digits)
    call = checkpoint.family.example_inputs(checkpoint.config, (2, 16, 8), 0, torch.bfloat16)
    with torch.no_grad():
        (wanted,) = load(quantized_digits)(**call, return_dict=False)
        (torch_velocity,) = open_transformer(quantized_digits)(**call, return_dict=False)
    (graph_velocity,) = open_transformer(quantized_digits / "model.onnx")(**call, return_dict=False)
    assert torch.equal(torch_velocity, wanted)
    assert graph_velocity.dtype == wanted.dtype
    error = (graph_velocity.float() - wanted.float()).norm() / wanted.float().norm()
    assert error < 0.05  # BF16 sums in another order move some codes, through four blocks


def test_the_built_in_model_opens_by_its_name(built_in: Path) -> None:
    by_name, by_folder = open_transformer("digits"), open_transformer(built_in)
    assert all(torch.equal(one, other) for one, other in zip(by_name.parameters(), by_folder.parameters(), strict=True))
