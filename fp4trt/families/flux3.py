"""FLUX.3 (text to image): diffusers' Flux3Transformer2DModel."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.family import Config, Family, Group, Input, Stack
from fp4trt.families.flux2 import FLUX2
from fp4trt.families.shapes import Shapes

__all__ = ["FLUX3"]

_MODES: Final = ("image", "image_cond", "txt")


def _groups(reads: str) -> tuple[Group, ...]:
    return (
        Group(reads, ("attn.to_q", "attn.to_k", "attn.to_v", "ff.linear_in")),
        Group(reads, ("attn.to_out.0",)),
        Group(reads, ("ff.linear_out",)),
    )


TEXT: Final = Stack("txt_mode_blocks", "num_layers", _groups("T"), read_by="single_transformer_blocks")
IMAGE: Final = Stack("mode_blocks.image", "num_layers", _groups("L"))
JOINT: Final = Stack("single_transformer_blocks", "num_single_layers", _groups("L+T"))
"""Blocks of 6 linears and 3 GEMMs: attention and MLP read one input. Blocks share their modulations, which stay in
BF16, as FLUX.2's."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    return problem_of_blocks(config, sizes, IMAGE.count, JOINT.count, axes=config.get("axes_dims_rope", (32,) * 4))


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' Flux3Transformer2DModel has them; no linear has a bias."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    inner = int(width * config.get("mlp_ratio", 3.0))
    channels = {"image": config["in_channels"], "image_cond": config.get("cond_in_channels", 128)}
    shapes = Shapes()

    def linear(path: str, rows: int, columns: int) -> None:
        shapes.linear(path, rows, columns, bias=False)

    for name in ("timestep_embedder", *(("target_timestep_embedder",) if config.get("flow_map") else ())):
        linear(f"{name}.linear_1", width, config.get("timestep_channels", 256))
        linear(f"{name}.linear_2", width, width)
    for kind in ("early_stream_modulations", "single_stream_modulations"):
        for mode in _MODES:
            linear(f"{kind}.{mode}.linear", 3 * width, width)
    for mode, columns in channels.items():
        linear(f"x_embedders.{mode}", width, columns)
    linear("context_embedder", width, config["joint_attention_dim"])
    counts = {f"mode_blocks.{mode}": config[IMAGE.count] for mode in channels}
    counts |= {TEXT.path: config[TEXT.count], JOINT.path: config[JOINT.count]}
    for path in (f"{stack}.{index}" for stack, count in counts.items() for index in range(count)):
        shapes.linears(f"{path}.attn", width, width, "to_q", "to_k", "to_v", bias=False)
        shapes.norms(f"{path}.attn", head, "norm_q", "norm_k")
        linear(f"{path}.attn.to_out.0", width, width)
        linear(f"{path}.ff.linear_in", 2 * inner, width)
        linear(f"{path}.ff.linear_out", width, inner)
    linear("norm_out.linear", 2 * width, width)
    linear("proj_out", config["in_channels"], width)
    return shapes


FLUX3: Final = Family(
    name="flux3",
    class_name="Flux3Transformer2DModel",
    matches=lambda config: config.get("_class_name") == "Flux3Transformer2DModel",
    problem=problem,
    stacks=(TEXT, IMAGE, JOINT),
    dims={**FLUX2.dims, "L": replace(FLUX2.dims["L"], references=False)},
    # diffusers' names and order, without the tokens of reference pictures
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 4), "positions", "fp32"),
        "txt_ids": Input(("T", 4), "positions", "fp32"),
        "target_timestep": Input(("B",), "time", given_by="flow_map"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=FLUX2.positions,
    state=state,
    unused=(
        "mode_blocks.image_cond",
        "early_stream_modulations.image_cond",
        "single_stream_modulations.image_cond",
        "x_embedders.image_cond",
    ),
)
