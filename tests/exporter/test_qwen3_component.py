"""Qwen3 as a text encoder: exported and validated against transformers, rounded to FP8, and built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import fp4trt
from calibration.checkpoints.plain import load_source
from calibration.inputs.captured import save_inputs
from onnx_functions.simulation.simulate import simulate

SIZES = ((1, 1), (2, 40))


def saved(folder: Path, tied: bool) -> Any:
    """Save a tiny model in BF16; return it in FP32, read back: a cast would round its rotary frequencies."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config).eval().to(torch.bfloat16)
    model.save_pretrained(folder)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def example(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return tokens of which the last three are padding."""
    mask = (torch.arange(tokens) < max(1, tokens - 3)).long().expand(batch, -1)
    return {"input_ids": torch.randint(0, 60, (batch, tokens)), "attention_mask": mask}


def wanted(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what Z-Image's and FLUX.2 klein's pipelines read."""
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return states[-2], torch.cat([states[1], states[2], states[3]], dim=-1)


def apart(one: Any, other: torch.Tensor) -> float:
    reference = other.numpy()
    assert one.shape == reference.shape
    return float(np.linalg.norm(one - reference) / np.linalg.norm(reference))


@pytest.mark.slow
def test_qwen3_is_transformers_at_any_size_and_becomes_an_engine(tmp_path: Path) -> None:
    model = saved(tmp_path / "text_encoder", tied=False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    exported = fp4trt.export(tmp_path, component="text_encoder")
    assert not exported.copied_weights
    graph = Path(exported.onnx)
    wide = tmp_path / "text_encoder" / "simulated.onnx"
    onnx.save(simulate(onnx.load(graph, load_external_data=False), float32=True), wide)
    session = onnxruntime.InferenceSession(str(wide), providers=["CPUExecutionProvider"])
    for batch, tokens in SIZES:
        inputs = example(batch, tokens)
        found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for one, other in zip(found, wanted(model, inputs), strict=True):
            assert apart(one, other) < 1e-4
    assert fp4trt.validate(graph.parent).passed
    built = fp4trt.build(graph.parent, gpu="rtx5090,rtx4090", batch=1, text="1:16:32")
    assert set(built.compute_capabilities) == {"SM89", "SM120"}


@pytest.mark.thorough
@pytest.mark.slow
def test_qwen3_in_fp8_passes_every_gate_and_is_merged_on_sm89(tmp_path: Path) -> None:
    saved(tmp_path / "plain", tied=True)
    save_inputs(tmp_path / "inputs.safetensors", [example(2, 9), example(2, 40)])
    fp4trt.quantize(tmp_path / "plain", tmp_path / "fp8", recipe="fp8-ptq", calibration=tmp_path / "inputs.safetensors")
    fp4trt.export(tmp_path / "fp8")
    assert fp4trt.validate(tmp_path / "fp8").passed
    built = fp4trt.build(tmp_path / "fp8", gpu="rtx4090", batch=1, text="1:16:32")
    assert (built.fp8_gemms, built.fp8_linears) == (12, 21)


@pytest.mark.parametrize("tied", [False, True])
def test_its_adapter_is_transformers_whether_lm_head_is_tied_or_not(tmp_path: Path, tied: bool) -> None:
    model, inputs = saved(tmp_path, tied), example(2, 40)
    found = load_source(tmp_path, torch.float32)(**inputs)
    for one, other in zip(found, wanted(model, inputs), strict=True):
        assert apart(one.numpy(), other) < 1e-5
