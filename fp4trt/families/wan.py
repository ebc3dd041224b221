"""Wan 2.1 and 2.2, text to video and, of 2.2, image to video: diffusers' WanTransformer3DModel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Sizes, Stack
from fp4trt.families.positions import grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["PATCH", "WAN", "WAN_TI2V", "rotary_axes"]

PATCH: Final = (1, 2, 2)
"""Frames, rows and columns of latents that are a token: of all published models."""

BLOCKS: Final = Stack(
    "blocks",
    "num_layers",
    groups=(
        Group("L", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        Group("L", ("attn1.to_out.0",)),
        Group("L", ("attn2.to_q",)),
        Group("T", ("attn2.to_k", "attn2.to_v")),
        Group("L", ("attn2.to_out.0",)),
        Group("L", ("ffn.net.0.proj",)),
        Group("L", ("ffn.net.2",)),
    ),
    attentions=("attn1", "attn2"),
)
"""10 linears of a block, 7 GEMMs. Its modulation is a table plus what all blocks share: no linear of its own."""


def unsupported(config: Config) -> str | None:
    """Return which model of this class a config describes that is not supported, and what to take, or None."""
    for key in ("image_dim", "added_kv_proj_dim"):
        if config.get(key) is not None:
            return (
                f"{key} is {config[key]!r}, as in Wan 2.1 from image to video, which is not supported: TensorRT-RTX "
                "1.7.1's builder crashes on its attention to the picture; take Wan 2.2 (I2V-A14B or TI2V-5B)"
            )
    return None


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    patch = config.get("patch_size", PATCH)
    if not isinstance(patch, list | tuple) or tuple(patch) != PATCH:
        return f"patch_size is {patch!r}, expected {list(PATCH)}"
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "text_dim", "ffn_dim")
    head = config.get("attention_head_dim")
    if type(head) is int and head % 2:
        return f"attention_head_dim is {head}, expected an even number: rotary positions turn pairs"
    return problem_of_blocks(config, sizes, BLOCKS.count, axes=rotary_axes(head) if type(head) is int else ())


def rotary_axes(head: int) -> tuple[int, int, int]:
    """Return how many channels of a head frames, rows and columns turn."""
    side = 2 * (head // 6)
    return head - 2 * side, side, side


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' WanTransformer3DModel has them."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    shapes = Shapes({"scale_shift_table": (1, 2, width)})
    shapes["patch_embedding.weight"] = (width, config["in_channels"], *PATCH)
    shapes["patch_embedding.bias"] = (width,)
    shapes.linear("condition_embedder.time_embedder.linear_1", width, config.get("freq_dim", 256))
    shapes.linear("condition_embedder.time_embedder.linear_2", width, width)
    shapes.linear("condition_embedder.time_proj", 6 * width, width)
    shapes.linear("condition_embedder.text_embedder.linear_1", width, config["text_dim"])
    shapes.linear("condition_embedder.text_embedder.linear_2", width, width)
    for block in BLOCKS.blocks(config):
        shapes[f"{block}.scale_shift_table"] = (1, 6, width)
        for attention in BLOCKS.attentions:
            shapes.linears(f"{block}.{attention}", width, width, "to_q", "to_k", "to_v", "to_out.0")
            shapes.norms(f"{block}.{attention}", width, "norm_q", "norm_k")
        if config.get("cross_attn_norm", True):
            shapes[f"{block}.norm2.weight"] = shapes[f"{block}.norm2.bias"] = (width,)
        shapes.linear(f"{block}.ffn.net.0.proj", config["ffn_dim"], width)
        shapes.linear(f"{block}.ffn.net.2", width, config["ffn_dim"])
    channels = config.get("out_channels", 16) or config["in_channels"]
    shapes.linear("proj_out", 4 * channels, width)
    return shapes


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of a video's tokens, (frame, row, column): two frames where their number is even."""
    import numpy as np

    tokens = sizes["L"]
    frames = 1 if tokens % 2 else 2
    ids = np.tile(grid(tokens // frames, axes=3, row=1), (frames, 1))
    ids[:, 0] = np.repeat(np.arange(frames), tokens // frames)
    return {"img_ids": ids}


def _is_wan(config: Config) -> bool:
    return config.get("_class_name") == "WanTransformer3DModel"


def _is_ti2v(config: Config) -> bool:
    """Whether latents are those of Wan 2.2's own VAE, which only TI2V-5B has: nothing else of its config tells."""
    return _is_wan(config) and config.get("in_channels") == config.get("out_channels") == 48


def _channels(config: Config) -> int:
    return 4 * int(config["in_channels"])


WAN: Final = Family(
    name="wan",
    class_name="WanTransformer3DModel",
    matches=_is_wan,
    problem=problem,
    stacks=(BLOCKS,),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim(
            "video_tokens",
            pixels_per_token=16,
            min_resolution=256,
            default_resolution=640,
            max_resolution=960,
            frames_per_token=4,
            min_frames=1,
            default_frames=81,
            max_frames=121,
        ),
        "T": Dim("text_tokens", min=1, max=512, default=512),
    },
    # Tokens and their positions, in place of latents [B, C, F, H, W].
    inputs={
        "hidden_states": Input(("B", "L", _channels)),
        "timestep": Input(("B",), "time", "fp32", noise_at=1000),
        "encoder_hidden_states": Input(("B", "T", "text_dim")),
        "img_ids": Input(("L", 3), "positions", "fp32"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
    adapter="calibration.adapters.wan:Wan",
    reorders=True,
    unsupported=unsupported,
)

WAN_TI2V: Final = replace(
    WAN,
    name="wan-ti2v",
    matches=_is_ti2v,
    dims={**WAN.dims, "L": replace(WAN.dims["L"], pixels_per_token=32)},
    # A timestep for each token: those of a given first frame are at 0.
    inputs={**WAN.inputs, "timestep": Input(("B", "L"), "time", "fp32", noise_at=1000)},
    special=True,
)
