"""FLUX.2 (dev, klein): diffusers' Flux2Transformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Sizes, Stack
from fp4trt.families.positions import counted, grid

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FLUX2"]

DOUBLE: Final = Stack(
    "transformer_blocks",
    "num_layers",
    groups=(
        Group("L", ("attn.to_q", "attn.to_k", "attn.to_v")),
        Group("T", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        Group("L", ("attn.to_out.0",)),
        Group("T", ("attn.to_add_out",)),
        Group("L", ("ff.linear_in",)),
        Group("L", ("ff.linear_out",)),
        Group("T", ("ff_context.linear_in",)),
        Group("T", ("ff_context.linear_out",)),
    ),
)
"""12 linears of a double block, 8 GEMMs. ``linear_in`` holds gate and value of a SwiGLU in one weight."""

SINGLE: Final = Stack(
    "single_transformer_blocks",
    "num_single_layers",
    groups=(Group("L+T", ("attn.to_qkv_mlp_proj",)), Group("L+T", ("attn.to_out",))),
)
"""Both linears of a single block: query, key, value and MLP are one weight already.

The modulations, which all blocks of a kind share (1.8 % of FLUX.2-dev's parameters), stay in BF16, as in NVIDIA's
recipe for it."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    return problem_of_blocks(config, sizes, DOUBLE.count, SINGLE.count, axes=config.get("axes_dims_rope", (32,) * 4))


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' Flux2Transformer2DModel has them; no linear has a bias."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    inner = int(width * config.get("mlp_ratio", 3.0))
    shapes: dict[str, tuple[int, ...]] = {}

    def weights(path: str, **rows_and_columns: tuple[int, ...]) -> None:
        shapes.update({f"{path}{name}.weight": shape for name, shape in rows_and_columns.items()})

    embedders = ("timestep", "guidance") if config.get("guidance_embeds", True) else ("timestep",)
    for name in embedders:
        path = f"time_guidance_embed.{name}_embedder."
        weights(path, linear_1=(width, config.get("timestep_guidance_channels", 256)), linear_2=(width, width))
    for name, sets in (("double_stream_modulation_img", 2), ("double_stream_modulation_txt", 2)):
        weights(f"{name}.", linear=(3 * sets * width, width))
    weights("single_stream_modulation.", linear=(3 * width, width))
    weights("", x_embedder=(width, config["in_channels"]), context_embedder=(width, config["joint_attention_dim"]))
    square = (width, width)
    for block in DOUBLE.blocks(config):
        weights(f"{block}.attn.", to_q=square, to_k=square, to_v=square, norm_q=(head,), norm_k=(head,))
        weights(f"{block}.attn.to_out.", **{"0": square})
        weights(f"{block}.attn.", norm_added_q=(head,), norm_added_k=(head,))
        weights(f"{block}.attn.", add_q_proj=square, add_k_proj=square, add_v_proj=square, to_add_out=square)
        for name in ("ff", "ff_context"):
            weights(f"{block}.{name}.", linear_in=(2 * inner, width), linear_out=(width, inner))
    for block in SINGLE.blocks(config):
        weights(f"{block}.attn.", to_qkv_mlp_proj=(3 * width + 2 * inner, width), norm_q=(head,), norm_k=(head,))
        weights(f"{block}.attn.", to_out=(width, width + inner))
    weights("norm_out.", linear=(2 * width, width))
    channels = config.get("out_channels") or config["in_channels"]
    weights("", proj_out=(config.get("patch_size", 1) ** 2 * channels, width))
    return shapes


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of image and text tokens, (time, row, column, index): text is counted by the last."""
    return {"img_ids": grid(sizes["L"], axes=4, row=1), "txt_ids": counted(sizes["T"], axes=4, axis=3)}


FLUX2: Final = Family(
    name="flux2",
    class_name="Flux2Transformer2DModel",
    matches=lambda config: config.get("_class_name") == "Flux2Transformer2DModel",
    problem=problem,
    stacks=(DOUBLE, SINGLE),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim(
            "image_tokens",
            pixels_per_token=16,
            min_resolution=256,
            max_resolution=2048,
            default_resolution=1024,
            references=True,
        ),
        "T": Dim("text_tokens", min=1, max=512, default=512),
    },
    # diffusers' names and order; its pipeline gives ids a batch dimension, of which the model reads the first member.
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 4), "positions", "fp32"),
        "txt_ids": Input(("T", 4), "positions", "fp32"),
        "guidance": Input(("B",), "guidance", "fp32", given_by="guidance_embeds"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
)
