"""Parts of a pipeline besides its transformer: exported, validated against torch, and built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import fp4trt
from calibration.checkpoints.plain import load_source
from calibration.inputs.captured import save_inputs
from fp4trt.errors import BadCheckpoint, UnknownFamily
from onnx_functions.simulation.simulate import simulate

TARGETS = ("rtx5090", "rtx4090")  # SM120 and SM89


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tiny models by the names of their folders."""
    torch.manual_seed(0)
    t5 = {
        "vocab_size": 60, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    clip = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
        "projection_dim": 16, "bos_token_id": 58, "eos_token_id": 59,
    }  # fmt: skip
    vae: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip
    return {
        "text_encoder_2": T5EncoderModel(T5Config(**t5)).eval(),
        "umt5": UMT5EncoderModel(UMT5Config(**t5)).eval(),
        "clip": CLIPTextModel(CLIPTextConfig(**clip)).eval(),
        "clip_projected": CLIPTextModelWithProjection(
            CLIPTextConfig(**clip | {"eos_token_id": 2, "hidden_act": "gelu"})
        ).eval(),
        "vae": AutoencoderKL(**vae, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False).eval(),
        "flux2_vae": AutoencoderKLFlux2(**vae, latent_channels=8).eval(),
    }


@pytest.fixture(scope="module")
def pipeline(parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("components") / "pipe"
    for name, part in parts.items():
        nn = part.to(torch.bfloat16)
        nn.save_pretrained(folder / name)
        nn.float()  # of values that BF16 can hold
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return folder


def run(graph: Path, inputs: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """Run a graph in ONNX Runtime, which computes in FP32 on the weights in BF16."""
    return run_all(graph, inputs)[0]


def run_all(graph: Path, inputs: dict[str, torch.Tensor]) -> list[Any]:
    """Run a graph likewise; return all outputs."""
    session = onnxruntime.InferenceSession(_saved(graph), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: value.numpy() for name, value in inputs.items()}))


def _saved(graph: Path) -> str:
    path = graph.with_name("simulated.onnx")
    onnx.save(simulate(onnx.load(graph, load_external_data=False), float32=True), path)
    return str(path)


def apart(one: np.ndarray[Any, Any], other: torch.Tensor) -> float:
    reference = other.detach().numpy()
    assert one.shape == reference.shape
    return float(np.linalg.norm(one - reference) / np.linalg.norm(reference))


@pytest.mark.slow
def test_t5_is_transformers_at_any_size_and_becomes_an_engine(parts: dict[str, Any], pipeline: Path) -> None:
    exported = fp4trt.export(pipeline, component="text_encoder_2")
    assert exported.precision == "bf16"
    assert not exported.copied_weights
    graph = Path(exported.onnx)
    assert graph == pipeline / "text_encoder_2" / "model.onnx"
    for batch, tokens in ((1, 1), (2, 40), (3, 200)):
        ids = torch.randint(0, 60, (batch, tokens))
        mask = (torch.arange(tokens) < max(1, tokens - 3)).long().expand(batch, -1)
        wanted = parts["text_encoder_2"](input_ids=ids, attention_mask=mask).last_hidden_state
        assert apart(run(graph, {"input_ids": ids, "attention_mask": mask}), wanted) < 1e-4
    assert fp4trt.validate(graph.parent).passed
    built = fp4trt.build(graph.parent, gpu=",".join(TARGETS), batch=1, text="1:16:32")
    assert Path(built.engine).is_file()
    assert set(built.compute_capabilities) == {"SM89", "SM120"}


@pytest.mark.slow
def test_t5_in_fp8_passes_every_gate_and_is_merged_on_sm89(pipeline: Path, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    calls = [
        {
            "input_ids": torch.randint(0, 60, (2, tokens), generator=random),
            "attention_mask": torch.ones(2, tokens).long(),
        }
        for tokens in (9, 40)
    ]
    save_inputs(tmp_path / "inputs.safetensors", calls)
    source, rounded = pipeline / "text_encoder_2", tmp_path / "t5-fp8"
    fp4trt.quantize(source, rounded, recipe="fp8-ptq", calibration=tmp_path / "inputs.safetensors")
    fp4trt.export(rounded)
    assert fp4trt.validate(rounded).passed
    built = fp4trt.build(rounded, gpu="rtx4090", batch=1, text="1:16:32")
    assert (built.fp8_gemms, built.fp8_linears) == (8, 14)


def test_umt5s_adapter_is_transformers(parts: dict[str, Any], pipeline: Path) -> None:
    ids, mask = torch.randint(0, 60, (2, 40)), (torch.arange(40) < 30).long().expand(2, -1)
    wanted = parts["umt5"](input_ids=ids, attention_mask=mask).last_hidden_state
    found = load_source(pipeline / "umt5", torch.float32)(input_ids=ids, attention_mask=mask)[0]
    assert apart(found.numpy(), wanted) < 1e-5


@pytest.mark.slow
def test_clip_is_transformers_with_and_without_a_projection(parts: dict[str, Any], pipeline: Path) -> None:
    ids = torch.randint(3, 50, (3, 20))
    for row, end in enumerate((5, 19, 11)):
        ids[row, end:] = 59  # pipelines pad with the end of text
    plain = load_source(pipeline / "clip", torch.float32)(input_ids=ids)[0]
    assert apart(plain.numpy(), parts["clip"](ids).pooler_output) < 1e-5
    exported = fp4trt.export(pipeline, component="clip_projected")
    assert not exported.copied_weights
    pooled, before = run_all(Path(exported.onnx), {"input_ids": ids})
    wanted = parts["clip_projected"](ids, output_hidden_states=True)
    assert apart(pooled, wanted.text_embeds) < 1e-4
    assert apart(before, wanted.hidden_states[-2]) < 1e-4


@pytest.mark.slow
def test_a_decoder_is_diffusers_at_any_size_and_becomes_an_engine(parts: dict[str, Any], pipeline: Path) -> None:
    exported = fp4trt.export(pipeline, component="vae")
    assert not exported.copied_weights
    graph = Path(exported.onnx)
    for batch, rows, columns in ((1, 3, 8), (2, 7, 2)):
        latents = torch.randn(batch, 16, rows, columns)
        with torch.no_grad():
            wanted = parts["vae"].decode(latents).sample
        assert apart(run(graph, {"latents": latents}), wanted) < 1e-4
    assert fp4trt.validate(graph.parent).passed
    built = fp4trt.build(graph.parent, gpu=",".join(TARGETS), batch=1, resolution="256:256x512:512")
    assert Path(built.engine).is_file()
    assert set(built.compute_capabilities) == {"SM89", "SM120"}


def test_the_adapter_of_flux2s_decoder_is_diffusers(parts: dict[str, Any], pipeline: Path) -> None:
    latents = torch.randn(2, 8, 3, 5)
    with torch.no_grad():
        wanted = parts["flux2_vae"].decode(latents).sample
        found = load_source(pipeline / "flux2_vae", torch.float32)(latents)[0]
    assert apart(found.numpy(), wanted) < 1e-5


def test_what_cannot_be_a_component_is_named(pipeline: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"has no text_encoder_3/.*: clip, .*, vae$"):
        fp4trt.export(pipeline, component="text_encoder_3")
    with pytest.raises(BadCheckpoint, match="is no folder of a whole pipeline"):
        fp4trt.export(pipeline / "vae", component="vae")
    (pipeline / "safety").mkdir()
    (pipeline / "safety" / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UnknownFamily, match=r"a LlamaForCausalLM; of the parts .* T5EncoderModel"):
        fp4trt.export(pipeline, component="safety")
