"""Qwen-Image, Edit (2509, 2511) and Layered: diffusers' QwenImageTransformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Modulated, Sizes, Stack
from fp4trt.families.positions import grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["QWEN_IMAGE"]

IMAGE_IN: Final = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_IN: Final = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

BLOCKS: Final = Stack(
    "transformer_blocks",
    "num_layers",
    groups=(
        Group("", ("img_mod.1",)),
        Group("", ("txt_mod.1",)),
        Group("L", IMAGE_IN),
        Group("T", TEXT_IN),
        Group("L", ("attn.to_out.0",)),
        Group("T", ("attn.to_add_out",)),
        Group("L", ("img_mlp.net.0.proj",)),
        Group("L", ("img_mlp.net.2",)),
        Group("T", ("txt_mlp.net.0.proj",)),
        Group("T", ("txt_mlp.net.2",)),
    ),
    modulated=(
        Modulated("img_mod.1", 6, 0, 1, IMAGE_IN),
        Modulated("img_mod.1", 6, 3, 4, ("img_mlp.net.0.proj",)),
        Modulated("txt_mod.1", 6, 0, 1, TEXT_IN),
        Modulated("txt_mod.1", 6, 3, 4, ("txt_mlp.net.0.proj",)),
    ),
    masked=("attn",),
    unused_in_last=("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
"""14 linears of a block, 10 GEMMs. What the last block makes of the text is read by nothing."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    if config.get("guidance_embeds"):
        return "guidance_embeds is true, expected false: diffusers' class has no embedding of guidance"
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    return problem_of_blocks(config, sizes, BLOCKS.count, axes=config.get("axes_dims_rope", (16, 56, 56)))


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' QwenImageTransformer2DModel has them."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    shapes = Shapes()
    shapes.linear("time_text_embed.timestep_embedder.linear_1", width, 256)
    shapes.linear("time_text_embed.timestep_embedder.linear_2", width, width)
    if config.get("use_additional_t_cond"):
        shapes["time_text_embed.addition_t_embedding.weight"] = (2, width)
    shapes["txt_norm.weight"] = (config["joint_attention_dim"],)
    shapes.linear("img_in", width, config["in_channels"])
    shapes.linear("txt_in", width, config["joint_attention_dim"])
    for block in BLOCKS.blocks(config):
        shapes.linear(f"{block}.img_mod.1", 6 * width, width)
        shapes.norms(f"{block}.attn", head, "norm_q", "norm_k")
        shapes.linears(f"{block}.attn", width, width, "to_q", "to_k", "to_v")
        shapes.linears(f"{block}.attn", width, width, "add_k_proj", "add_v_proj", "add_q_proj")
        shapes.linears(f"{block}.attn", width, width, "to_out.0", "to_add_out")
        shapes.norms(f"{block}.attn", head, "norm_added_q", "norm_added_k")
        shapes.linear(f"{block}.img_mlp.net.0.proj", 4 * width, width)
        shapes.linear(f"{block}.img_mlp.net.2", width, 4 * width)
        shapes.linear(f"{block}.txt_mod.1", 6 * width, width)
        shapes.linear(f"{block}.txt_mlp.net.0.proj", 4 * width, width)
        shapes.linear(f"{block}.txt_mlp.net.2", width, 4 * width)
    shapes.linear("norm_out.linear", 2 * width, width)
    channels = config.get("out_channels", 16) or config["in_channels"]
    shapes.linear("proj_out", config.get("patch_size", 2) ** 2 * channels, width)
    return shapes


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of one picture's tokens, counted from its centre, and of the text behind them."""
    import numpy as np

    image = grid(sizes["L"], axes=3, row=1)
    height, width = (int(n) for n in image[-1, 1:] + 1)
    image[:, 1:] -= (height - height // 2, width - width // 2)
    first = max(height // 2, width // 2)
    return {"img_ids": image, "txt_ids": np.arange(first, first + sizes["T"], dtype=np.float32)}


QWEN_IMAGE: Final = Family(
    name="qwen-image",
    class_name="QwenImageTransformer2DModel",
    matches=lambda config: config.get("_class_name") == "QwenImageTransformer2DModel",
    problem=problem,
    stacks=(BLOCKS,),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim(
            "image_tokens",
            pixels_per_token=16,
            min_resolution=256,
            max_resolution=2048,
            default_resolution=1328,
            references=True,
        ),
        "T": Dim("text_tokens", min=1, max=1024, default=512),
    },
    # diffusers' names and order, with positions in place of the shapes of pictures
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
        "encoder_hidden_states_mask": Input(("B", "T"), "mask", "bool"),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 3), "positions", "fp32"),
        "txt_ids": Input(("T",), "positions", "fp32"),
        "modulate_index": Input(("B", "L"), "choice", "int32", given_by="zero_cond_t"),
        "additional_t_cond": Input(("B",), "choice", "int64", given_by="use_additional_t_cond"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
    adapter="calibration.adapters.qwen_image:QwenImage",
    lookups=("time_text_embed.addition_t_embedding",),
)
