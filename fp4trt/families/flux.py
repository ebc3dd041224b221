"""FLUX.1 (dev, schnell, Fill, Control, Kontext, Krea): diffusers' FluxTransformer2DModel.

And SimpleTuner's class for training with a mask of the text, which has the same tensors: without its mask it computes
what diffusers' class does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Modulated, Sizes, Stack
from fp4trt.families.positions import counted, grid

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FLUX"]

IMAGE_IN: Final = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_IN: Final = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

DOUBLE: Final = Stack(
    "transformer_blocks",
    "num_layers",
    groups=(
        Group("", ("norm1.linear",)),
        Group("", ("norm1_context.linear",)),
        Group("L", IMAGE_IN),
        Group("T", TEXT_IN),
        Group("L", ("attn.to_out.0",)),
        Group("T", ("attn.to_add_out",)),
        Group("L", ("ff.net.0.proj",)),
        Group("L", ("ff.net.2",)),
        Group("T", ("ff_context.net.0.proj",)),
        Group("T", ("ff_context.net.2",)),
    ),
    modulated=(
        Modulated("norm1.linear", 6, 0, 1, IMAGE_IN),
        Modulated("norm1.linear", 6, 3, 4, ("ff.net.0.proj",)),
        Modulated("norm1_context.linear", 6, 0, 1, TEXT_IN),
        Modulated("norm1_context.linear", 6, 3, 4, ("ff_context.net.0.proj",)),
    ),
)
"""Everything that multiplies in a double block: 14 linears, 10 GEMMs once each group is one. The norms before attention
and MLP are AdaLayerNormZero, whose linear modulates both."""

SINGLE: Final = Stack(
    "single_transformer_blocks",
    "num_single_layers",
    groups=(
        Group("", ("norm.linear",)),
        Group("L+T", (*IMAGE_IN, "proj_mlp")),
        Group("L+T", ("proj_out",)),
    ),
    modulated=(Modulated("norm.linear", 3, 0, 1, (*IMAGE_IN, "proj_mlp")),),
)
"""Everything that multiplies in a single block: 6 linears, 3 GEMMs. ``proj_out`` is a block's own, not the model's."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
    axes = config.get("axes_dims_rope", (16, 56, 56))
    if isinstance(axes, list | tuple) and len(axes) != 3:
        return f"axes_dims_rope is {axes!r}, expected three even numbers"
    return problem_of_blocks(config, sizes, DOUBLE.count, SINGLE.count, axes=axes)


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' FluxTransformer2DModel has them."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    inner = 4 * width
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(path: str, rows: int, columns: int) -> None:
        shapes[f"{path}.weight"], shapes[f"{path}.bias"] = (rows, columns), (rows,)

    def norms(path: str, *names: str) -> None:
        shapes.update({f"{path}.{name}.weight": (head,) for name in names})

    embedders = {"timestep": 256, "guidance": 256, "text": config["pooled_projection_dim"]}
    for name, columns in embedders.items():
        if name != "guidance" or config.get("guidance_embeds"):
            linear(f"time_text_embed.{name}_embedder.linear_1", width, columns)
            linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
    linear("context_embedder", width, config["joint_attention_dim"])
    linear("x_embedder", width, config["in_channels"])
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        linear(f"{block}.norm1.linear", 6 * width, width)
        linear(f"{block}.norm1_context.linear", 6 * width, width)
        norms(f"{block}.attn", "norm_q", "norm_k")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(f"{block}.attn.{name}", width, width)
        norms(f"{block}.attn", "norm_added_q", "norm_added_k")
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linear(f"{block}.attn.{name}", width, width)
        for name in ("ff", "ff_context"):
            linear(f"{block}.{name}.net.0.proj", inner, width)
            linear(f"{block}.{name}.net.2", width, inner)
    for index in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{index}"
        linear(f"{block}.norm.linear", 3 * width, width)
        linear(f"{block}.proj_mlp", inner, width)
        linear(f"{block}.proj_out", width, width + inner)
        norms(f"{block}.attn", "norm_q", "norm_k")
        for name in ("to_q", "to_k", "to_v"):
            linear(f"{block}.attn.{name}", width, width)
    linear("norm_out.linear", 2 * width, width)
    linear("proj_out", config.get("patch_size", 1) ** 2 * (config.get("out_channels") or config["in_channels"]), width)
    return shapes


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of image and text tokens: row and column, and nothing for the text."""
    return {"img_ids": grid(sizes["L"], axes=3, row=1), "txt_ids": counted(sizes["T"], axes=3)}


CLASS: Final = "FluxTransformer2DModel"
MASKED: Final = "FluxTransformer2DModelWithMasking"


def remark(config: Config) -> str | None:
    """Return the note on a config, or None."""
    if config.get("_class_name") != MASKED:
        return None
    return f"a {MASKED} is taken as {CLASS}: the mask that its attention may have is not applied"


FLUX: Final = Family(
    name="flux",
    class_name=CLASS,
    matches=lambda config: config.get("_class_name") in (CLASS, MASKED),
    problem=problem,
    stacks=(DOUBLE, SINGLE),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim(
            "image_tokens",
            pixels_per_token=16,
            min_resolution=256,
            max_resolution=1360,
            default_resolution=1024,
            references=True,
        ),
        "T": Dim("text_tokens", min=1, max=512, default=512),
    },
    # In the order that NVIDIA's and Black Forest Labs' runtimes use.
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
        "pooled_projections": Input(("B", "pooled_projection_dim")),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 3), "positions", "fp32"),
        "txt_ids": Input(("T", 3), "positions", "fp32"),
        "guidance": Input(("B",), "guidance", "fp32", given_by="guidance_embeds"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
    remark=remark,
)
