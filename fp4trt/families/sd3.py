"""Stable Diffusion 3 and 3.5 (medium and large): diffusers' SD3Transformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fp4trt.families.config import problem_of_sizes
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Modulated, Sizes, Stack
from fp4trt.families.flux import IMAGE_IN, TEXT_IN
from fp4trt.families.positions import grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["SD3", "SD35_MEDIUM"]

DUAL_IN: Final = ("attn2.to_q", "attn2.to_k", "attn2.to_v")

TEXT_OUT: Final = ("attn.to_add_out", "ff_context")
"""What the last block lacks: nothing reads its text."""

_HEADS_NORMS: Final = (None, "rms_norm")


def is_dual(config: Config, index: int) -> bool:
    """Return whether a block has a second attention, of the image alone."""
    return index in config.get("dual_attention_layers", ())


def lacks(config: Config, index: int) -> tuple[str, ...]:
    """Return the modules that a block does not have."""
    second = () if is_dual(config, index) else ("attn2",)
    return (*second, *TEXT_OUT) if index == config[BLOCKS.count] - 1 else second


def _blocks(**kind: Any) -> Stack:
    return Stack(
        "transformer_blocks",
        "num_layers",
        groups=(
            Group("", ("norm1.linear",)),
            Group("", ("norm1_context.linear",)),
            Group("L", IMAGE_IN),
            Group("T", TEXT_IN),
            Group("T", ("attn.to_add_out",)),
            Group("L", ("attn.to_out.0",)),
            Group("L", DUAL_IN),
            Group("L", ("attn2.to_out.0",)),
            Group("L", ("ff.net.0.proj",)),
            Group("L", ("ff.net.2",)),
            Group("T", ("ff_context.net.0.proj",)),
            Group("T", ("ff_context.net.2",)),
        ),
        attentions=("attn", "attn2"),
        modulated=(
            Modulated("norm1.linear", 6, 0, 1, IMAGE_IN),
            Modulated("norm1.linear", 6, 3, 4, ("ff.net.0.proj",)),
            # of a block with two attentions
            Modulated("norm1.linear", 9, 0, 1, IMAGE_IN),
            Modulated("norm1.linear", 9, 6, 7, DUAL_IN),
            Modulated("norm1.linear", 9, 3, 4, ("ff.net.0.proj",)),
            Modulated("norm1_context.linear", 6, 0, 1, TEXT_IN),
            Modulated("norm1_context.linear", 6, 3, 4, ("ff_context.net.0.proj",)),
            # of the last block, whose norm is AdaLayerNormContinuous: scale, then shift
            Modulated("norm1_context.linear", 2, 1, 0, TEXT_IN),
        ),
        lacks=lacks,
        **kind,
    )


BLOCKS: Final = _blocks(tail=True)
"""14 linears of a block, 10 GEMMs; the last has 11 and 7, because it gives no text."""

DUAL_BLOCKS: Final = _blocks(equal=False)
"""As :data:`BLOCKS`, where some blocks have a second attention: 4 linears and 2 GEMMs more."""


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim")
    wrong = problem_of_sizes(config, (*sizes, "patch_size", "pos_embed_max_size"), BLOCKS.count)
    if wrong is not None:
        return wrong
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config.get("caption_projection_dim") != width:
        found = config.get("caption_projection_dim")
        return f"caption_projection_dim is {found!r}, expected the blocks' width, {width}"
    if config.get("qk_norm") not in _HEADS_NORMS:
        return f"qk_norm is {config['qk_norm']!r}, expected null or 'rms_norm'"
    dual, count = config.get("dual_attention_layers", ()), config[BLOCKS.count]
    if not isinstance(dual, list | tuple) or any(type(index) is not int or not 0 <= index < count for index in dual):
        return f"dual_attention_layers is {dual!r}, expected numbers of blocks, 0 to {count - 1}"
    return None


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' SD3Transformer2DModel has them."""
    head, channels, patch = config["attention_head_dim"], config["in_channels"], config["patch_size"]
    width = config["num_attention_heads"] * head
    shapes = Shapes({"pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, width)})
    shapes |= {"pos_embed.proj.weight": (width, channels, patch, patch), "pos_embed.proj.bias": (width,)}
    for name, columns in (("timestep", 256), ("text", config["pooled_projection_dim"])):
        shapes.linear(f"time_text_embed.{name}_embedder.linear_1", width, columns)
        shapes.linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
    shapes.linear("context_embedder", width, config["joint_attention_dim"])

    def norms(path: str, *names: str) -> None:
        if config.get("qk_norm") is not None:
            shapes.norms(path, head, *names)

    def feed_forward(path: str) -> None:
        shapes.linear(f"{path}.net.0.proj", 4 * width, width)
        shapes.linear(f"{path}.net.2", width, 4 * width)

    for index, path in enumerate(BLOCKS.blocks(config)):
        dual, last = is_dual(config, index), index == config[BLOCKS.count] - 1
        shapes.linear(f"{path}.norm1.linear", (9 if dual else 6) * width, width)
        shapes.linear(f"{path}.norm1_context.linear", (2 if last else 6) * width, width)
        norms(f"{path}.attn", "norm_q", "norm_k")
        shapes.linears(f"{path}.attn", width, width, "to_q", "to_k", "to_v")
        shapes.linears(f"{path}.attn", width, width, "add_k_proj", "add_v_proj", "add_q_proj", "to_out.0")
        if not last:
            shapes.linear(f"{path}.attn.to_add_out", width, width)
        norms(f"{path}.attn", "norm_added_q", "norm_added_k")
        if dual:
            norms(f"{path}.attn2", "norm_q", "norm_k")
            shapes.linears(f"{path}.attn2", width, width, "to_q", "to_k", "to_v", "to_out.0")
        feed_forward(f"{path}.ff")
        if not last:
            feed_forward(f"{path}.ff_context")
    shapes.linear("norm_out.linear", 2 * width, width)
    out = channels if config.get("out_channels") is None else config["out_channels"]
    shapes.linear("proj_out", patch**2 * out, width)
    return shapes


def patch_of(config: Config) -> int:
    """Return how many numbers a token has: the channels of a patch's latents."""
    return int(config["patch_size"] ** 2 * config["in_channels"])


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return the positions of image tokens, (row, column) in the model's table."""
    return {"img_ids": grid(sizes["L"], axes=2, row=0)}


def _family(name: str, stack: Stack, special: bool) -> Family:
    """Return the family of the models with, or without, blocks that have two attentions."""
    return Family(
        name=name,
        class_name="SD3Transformer2DModel",
        matches=lambda config: (
            config.get("_class_name") == "SD3Transformer2DModel"
            and (bool(config.get("dual_attention_layers")) or not special)
        ),
        problem=problem,
        stacks=(stack,),
        dims={
            # Two, for guidance: diffusers' pipeline lets both of a pair in at once.
            "B": Dim("batch", min=1, max=4, default=2),
            "L": Dim(
                "image_tokens", pixels_per_token=16, min_resolution=256, max_resolution=1536, default_resolution=1024
            ),
            "T": Dim("text_tokens", min=1, max=589, default=333),
        },
        # diffusers' names and order, with positions in place of the shape of a picture
        inputs={
            "hidden_states": Input(("B", "L", patch_of)),
            "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
            "pooled_projections": Input(("B", "pooled_projection_dim")),
            "timestep": Input(("B",), "time", "fp32", noise_at=1000),
            "img_ids": Input(("L", 2), "positions", "int64"),
        },
        outputs={"latent": ("B", "L", None)},
        positions=positions,
        state=state,
        adapter="calibration.adapters.sd3:SD3",
        reorders=True,
        special=special,
    )


SD3: Final = _family("sd3", BLOCKS, special=False)
"""SD3 medium and SD3.5 large, whose blocks are equal but for the last."""

SD35_MEDIUM: Final = _family("sd3.5-medium", DUAL_BLOCKS, special=True)
"""SD3.5 medium, in which some blocks have two attentions."""
