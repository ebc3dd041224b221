"""Krea 2: diffusers' Krea2Transformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Sizes, Stack
from fp4trt.families.positions import grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["KREA2"]

BLOCKS: Final = Stack(
    "transformer_blocks",
    "num_layers",
    groups=(
        Group("T+L", ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate")),
        Group("T+L", ("attn.to_out.0",)),
        Group("T+L", ("ff.gate", "ff.up"), gated=True),
        Group("T+L", ("ff.down",)),
    ),
    masked=("attn",),
)
"""8 linears of a block, 5 GEMMs: TensorRT-RTX does not merge ``gate`` and ``up``, whose product is a SwiGLU. All blocks
share one modulation, which stays in BF16, and so does what makes the text's features, 3 % of the parameters."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "num_key_value_heads", "intermediate_size")
    texts = ("text_hidden_dim", "num_text_layers", "text_num_attention_heads", "text_num_key_value_heads")
    axes = config.get("axes_dims_rope", (32, 48, 48))
    return problem_of_blocks(config, (*sizes, *texts, "text_intermediate_size"), BLOCKS.count, axes=axes)


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' Krea2Transformer2DModel has them."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    text, embedded = config["text_hidden_dim"], config.get("timestep_embed_dim", 256)
    shapes = Shapes()
    shapes.linear("img_in", width, config["in_channels"])
    shapes.linear("time_embed.linear_1", width, embedded)
    shapes.linear("time_embed.linear_2", width, width)
    shapes.linear("time_mod_proj", 6 * width, width)

    def block(path: str, size: int, heads: int, keys: int, inner: int) -> None:
        each = size // heads
        shapes.norms(path, size, "norm1", "norm2")
        shapes.linear(f"{path}.attn.to_q", size, size, bias=False)
        shapes.linears(f"{path}.attn", keys * each, size, "to_k", "to_v", bias=False)
        shapes.linear(f"{path}.attn.to_gate", size, size, bias=False)
        shapes.norms(f"{path}.attn", each, "norm_q", "norm_k")
        shapes.linear(f"{path}.attn.to_out.0", size, size, bias=False)
        shapes.linears(f"{path}.ff", inner, size, "gate", "up", bias=False)
        shapes.linear(f"{path}.ff.down", size, inner, bias=False)

    def texts(name: str, count: str) -> None:
        for index in range(config.get(count, 2)):
            heads, keys = config["text_num_attention_heads"], config["text_num_key_value_heads"]
            block(f"text_fusion.{name}.{index}", text, heads, keys, config["text_intermediate_size"])

    texts("layerwise_blocks", "num_layerwise_text_blocks")
    shapes.linear("text_fusion.projector", 1, config["num_text_layers"], bias=False)
    texts("refiner_blocks", "num_refiner_text_blocks")
    shapes["txt_in.norm.weight"] = (text,)
    shapes.linear("txt_in.linear_1", width, text)
    shapes.linear("txt_in.linear_2", width, width)
    for path in BLOCKS.blocks(config):
        shapes[f"{path}.scale_shift_table"] = (6, width)
        block(path, width, config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"])
    shapes["final_layer.scale_shift_table"] = (2, width)
    shapes["final_layer.norm.weight"] = (width,)
    shapes.linear("final_layer.linear", config["in_channels"], width)
    return shapes


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of image tokens, (time, row, column); the text's are 0."""
    return {"img_ids": grid(sizes["L"], axes=3, row=1)}


KREA2: Final = Family(
    name="krea2",
    class_name="Krea2Transformer2DModel",
    matches=lambda config: config.get("_class_name") == "Krea2Transformer2DModel",
    problem=problem,
    stacks=(BLOCKS,),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim("image_tokens", pixels_per_token=16, min_resolution=256, max_resolution=2048, default_resolution=1024),
        "T": Dim("text_tokens", min=1, max=512, default=256),
    },
    # diffusers' names and order, with the positions of image tokens alone
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "num_text_layers", "text_hidden_dim")),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 3), "positions", "fp32"),
        "encoder_attention_mask": Input(("B", "T"), "mask", "bool"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
    adapter="calibration.adapters.krea2:Krea2",
)
