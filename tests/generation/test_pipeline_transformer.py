"""An artifact in the place of a pipeline's transformer draws what diffusers' own transformer draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import fp4trt
from fp4trt.errors import BadGraph, BadInputs
from generation.pipelines import PipelineTransformer, model_of
from generation.pipelines.batches import largest_batch, split
from tests.frame.diffusers_pipelines import save


def drawn(folder: Path, transformer: Any, **call: Any) -> torch.Tensor:
    """Return the picture [3, H, W] that a FLUX.1 pipeline draws around a transformer."""
    pipe = diffusers.FluxPipeline.from_pretrained(folder, transformer=None, torch_dtype=torch.bfloat16)
    pipe.transformer = transformer
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **call}
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **settings).images[0].float()


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


@pytest.fixture(scope="module")
def stock(pipeline: Path) -> Any:
    return diffusers.FluxTransformer2DModel.from_pretrained(pipeline / "transformer", torch_dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def graph(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    fp4trt.export(pipeline / "transformer", path, precision="bf16")
    return path


def test_a_checkpoint_and_its_graph_draw_what_diffusers_transformer_draws(
    pipeline: Path, graph: Path, stock: Any
) -> None:
    wanted = drawn(pipeline, stock, true_cfg_scale=2.0, negative_prompt="a dog")
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a dog"}
    in_torch = drawn(pipeline, fp4trt.pipeline_transformer(pipeline / "transformer"), **guided)
    assert torch.equal(in_torch, wanted)
    assert psnr(drawn(pipeline, fp4trt.pipeline_transformer(graph), **guided), wanted) > 40


def of_class(folder: Path, transformers: dict[str, Any]) -> torch.Tensor:
    """Return what the pipeline in a folder draws, with its own transformers where others are not given."""
    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, name).from_pretrained(folder, **dict.fromkeys(transformers), torch_dtype=torch.bfloat16)
    for part, transformer in transformers.items():
        setattr(pipe, part, transformer)
    pipe.set_progress_bar_config(disable=True)
    video = {"num_frames": 5} if name.startswith("Wan") else {}
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **video}
    drawn = pipe(prompt="a cat", generator=torch.Generator().manual_seed(0), **settings)
    return (drawn.frames if video else drawn.images).float()


@pytest.mark.parametrize(
    ("name", "by_graph"),
    [
        pytest.param("FLUX.2 klein", True, marks=pytest.mark.slow),
        pytest.param("Qwen-Image", True, marks=pytest.mark.slow),
        ("Z-Image", False),
        ("SD3", False),
        ("Wan 2.2 A14B", False),
    ],
)
def test_each_kind_of_call_gives_the_picture_of_diffusers_transformer(
    name: str, by_graph: bool, tmp_path: Path
) -> None:
    """Tokens, lists of latents, latents, and videos of two transformers, with batches and calls of guidance."""
    save(name, tmp_path / "pipe")
    parts = [part for part in ("transformer", "transformer_2") if (tmp_path / "pipe" / part).is_dir()]
    wanted = of_class(tmp_path / "pipe", {})
    own = {part: fp4trt.pipeline_transformer(tmp_path / "pipe" / part) for part in parts}
    assert torch.equal(of_class(tmp_path / "pipe", own), wanted)
    if by_graph:
        fp4trt.export(tmp_path / "pipe" / "transformer", tmp_path / "model.onnx", precision="bf16")
        graph = {"transformer": fp4trt.pipeline_transformer(tmp_path / "model.onnx")}
        assert psnr(of_class(tmp_path / "pipe", graph), wanted) > 40


def test_a_graph_s_transformer_is_not_in_torch_s_memory(graph: Path) -> None:
    held = fp4trt.pipeline_transformer(graph)
    modules = [value for value in vars(held).values() if isinstance(value, torch.nn.Module)]
    assert not any(parameter.device.type != "meta" for module in modules for parameter in module.parameters())
    assert held.config.in_channels == held.config["in_channels"] == 64
    assert held.config.guidance_embeds


def test_a_graph_holds_the_config_and_an_older_one_takes_the_file_beside_it(graph: Path, tmp_path: Path) -> None:
    import onnx

    known = model_of(graph)
    assert (known.family.name, known.kind, known.config["num_layers"]) == ("flux", "onnx", 1)
    model = onnx.load(graph, load_external_data=False)
    for entry in [entry for entry in model.metadata_props if entry.key == "fp4trt.config"]:
        model.metadata_props.remove(entry)
    onnx.save(model, tmp_path / "older.onnx")
    with pytest.raises(BadGraph, match=r"older\.onnx does not say which model it is of, and there is no config\.json"):
        model_of(tmp_path / "older.onnx")
    (tmp_path / "config.json").write_text(json.dumps(dict(known.config)))
    assert model_of(tmp_path / "older.onnx").config == known.config


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"controlnet_block_samples": [torch.zeros(1)]}, "controlnet_block_samples"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "joint_attention_kwargs has scale"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.zeros(1)]}}, "ip_adapter_image_embeds"),
        ({"guidance": None}, "without guidance"),
        ({"hidden_states": torch.zeros(1, 4, 32)}, r"hidden_states of shape \[1, 4, 32\]"),
    ],
)
def test_what_a_graph_does_not_compute_is_refused_by_name(given: dict[str, Any], named: str, graph: Path) -> None:
    held = fp4trt.pipeline_transformer(graph)
    family, config = held.model.family, held.model.config
    call = family.example_inputs(config, (1, 4, 8), 0, torch.bfloat16)
    with pytest.raises(BadInputs, match=named):
        held(**{**call, **given}, return_dict=False)
    held(**call, joint_attention_kwargs={"scale": 1.0}, controlnet_block_samples=None, return_dict=False)


def test_a_batch_beyond_a_profile_is_split(graph: Path) -> None:
    model = model_of(graph)
    shapes = model.family.input_shapes(model.config)
    call = model.family.example_inputs(model.config, (3, 4, 8), 0, torch.bfloat16)

    def profile(most: int, tokens: int) -> dict[str, list[list[int]]]:
        sizes = {"B": most, "L": tokens, "T": 8}
        tops = {name: [sizes[n] if isinstance(n, str) else n for n in shape] for name, shape in shapes.items()}
        return {name: [[1] * len(top), top, top] for name, top in tops.items()}

    assert largest_batch([], shapes, call) is None
    assert largest_batch([profile(8, 3), profile(2, 4)], shapes, call) == 2
    parts = list(split(call, shapes, 2))
    assert [len(part["hidden_states"]) for part in parts] == [2, 1]
    assert all(part["img_ids"] is call["img_ids"] for part in parts)
    whole = PipelineTransformer(model, lambda: fp4trt.pipeline_transformer(graph).open())
    engine = PipelineTransformer(model.__class__(**{**vars(model), "profiles": (profile(2, 4),)}), whole.open)
    one, other = (each(**call, return_dict=False)[0] for each in (whole, engine))
    assert torch.allclose(one.float(), other.float(), atol=0.02)
