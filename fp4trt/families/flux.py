"""FLUX.1 (dev, schnell, Fill, Control, Kontext, Krea): diffusers' FluxTransformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.family import Config, Family, Modulated, Symbol

if TYPE_CHECKING:
    import torch

__all__ = ["FLUX", "attentions", "example_inputs", "groups", "input_shapes", "modulated", "problem", "state", "stream"]

DOUBLE_BLOCK: Final[tuple[tuple[str, ...], ...]] = (
    ("norm1.linear",),
    ("norm1_context.linear",),
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ("attn.to_out.0",),
    ("attn.to_add_out",),
    ("ff.net.0.proj",),
    ("ff.net.2",),
    ("ff_context.net.0.proj",),
    ("ff_context.net.2",),
)
"""Everything that multiplies in a double block: 14 linears, 10 GEMMs once each group is one."""

SINGLE_BLOCK: Final[tuple[tuple[str, ...], ...]] = (
    ("norm.linear",),
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("proj_out",),
)
"""Everything that multiplies in a single block: 6 linears, 3 GEMMs. ``proj_out`` is a block's own, not the model's."""


_COUNTS: Final = (
    "in_channels",
    "num_layers",
    "num_single_layers",
    "num_attention_heads",
    "attention_head_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
)


_MOST: Final = 100_000
"""What no size of a model comes near: a config that asks for more is damaged."""


_MOST_BLOCKS: Final = 1000


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    for key in _COUNTS:
        if type(config.get(key)) is not int or not 0 < config[key] <= _MOST:
            return f"{key} is {config.get(key)!r}, expected a whole number above 0, {_MOST:,} at most"
    if (blocks := config["num_layers"] + config["num_single_layers"]) > _MOST_BLOCKS:
        return f"num_layers and num_single_layers add up to {blocks}, expected {_MOST_BLOCKS} blocks at most"
    axes, width = config.get("axes_dims_rope", (16, 56, 56)), config["attention_head_dim"]
    if not isinstance(axes, list | tuple) or len(axes) != 3 or any(type(n) is not int or n % 2 for n in axes):
        return f"axes_dims_rope is {axes!r}, expected three even numbers"
    if sum(axes) != width:
        return f"axes_dims_rope {list(axes)} adds up to {sum(axes)}, expected attention_head_dim, {width}"
    return None


def groups(config: Config) -> tuple[tuple[str, ...], ...]:
    """Return the quantized linears in graph order; not among them: embedders, the final norm and output layer."""
    blocks = [(f"transformer_blocks.{index}", DOUBLE_BLOCK) for index in range(config["num_layers"])]
    blocks += [(f"single_transformer_blocks.{index}", SINGLE_BLOCK) for index in range(config["num_single_layers"])]
    return tuple(tuple(f"{block}.{name}" for name in group) for block, inner in blocks for group in inner)


def attentions(config: Config) -> tuple[str, ...]:
    """Return the attentions in graph order: one a block, over text and image tokens together."""
    blocks = [f"transformer_blocks.{index}" for index in range(config["num_layers"])]
    blocks += [f"single_transformer_blocks.{index}" for index in range(config["num_single_layers"])]
    return tuple(f"{block}.attn" for block in blocks)


def stream(path: str) -> str:
    """Return whose tokens a quantized linear reads: the picture's ``L``, the text's ``T``, both, or none."""
    name = path.split(".", 2)[2]
    if name in ("norm.linear", "norm1.linear", "norm1_context.linear"):
        return ""
    if path.startswith("single_transformer_blocks."):
        return "L+T"
    return "T" if name.startswith(("attn.add_", "attn.to_add_out", "ff_context.")) else "L"


def modulated(block: str) -> tuple[Modulated, ...]:
    """Return the linears of a block behind AdaLayerNormZero, or behind the MLP's norm, which it modulates too."""
    if block.startswith("single_transformer_blocks."):
        return (Modulated("norm.linear", 3, 0, 1, SINGLE_BLOCK[1]),)
    return (
        Modulated("norm1.linear", 6, 0, 1, DOUBLE_BLOCK[2]),
        Modulated("norm1.linear", 6, 3, 4, DOUBLE_BLOCK[6]),
        Modulated("norm1_context.linear", 6, 0, 1, DOUBLE_BLOCK[3]),
        Modulated("norm1_context.linear", 6, 3, 4, DOUBLE_BLOCK[8]),
    )


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


def input_shapes(config: Config) -> dict[str, tuple[str | int, ...]]:
    """Return each input's symbolic shape, in the order that NVIDIA's and Black Forest Labs' runtimes use."""
    shapes: dict[str, tuple[str | int, ...]] = {
        "hidden_states": ("B", "L", config["in_channels"]),
        "encoder_hidden_states": ("B", "T", config["joint_attention_dim"]),
        "pooled_projections": ("B", config["pooled_projection_dim"]),
        "timestep": ("B",),
        "img_ids": ("L", 3),
        "txt_ids": ("T", 3),
    }
    if config.get("guidance_embeds"):
        shapes["guidance"] = ("B",)
    return shapes


def example_inputs(
    config: Config, batch: int, image_tokens: int, text_tokens: int, seed: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return seeded random inputs in graph order.

    Position ids and guidance are FP32, the rest ``dtype``; timesteps lie in (0, 1]. The picture is as square as
    ``image_tokens`` allows.
    """
    import torch

    random = torch.Generator().manual_seed(seed)
    size = {"B": batch, "L": image_tokens, "T": text_tokens}

    def normal(name: str) -> torch.Tensor:
        shape = [size[n] if isinstance(n, str) else n for n in input_shapes(config)[name]]
        return torch.randn(shape, generator=random).to(dtype)

    width = next(n for n in range(int(image_tokens**0.5), 0, -1) if image_tokens % n == 0)
    positions = torch.arange(image_tokens)
    inputs = {
        "hidden_states": normal("hidden_states"),
        "encoder_hidden_states": normal("encoder_hidden_states"),
        "pooled_projections": normal("pooled_projections"),
        "timestep": (1 - 0.9 * torch.rand(batch, generator=random)).to(dtype),
        "img_ids": torch.stack((torch.zeros_like(positions), positions // width, positions % width), dim=-1).float(),
        "txt_ids": torch.zeros(text_tokens, 3),
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = 1 + 4 * torch.rand(batch, generator=random)
    return inputs


FLUX: Final = Family(
    name="flux",
    class_name="FluxTransformer2DModel",
    matches=lambda config: config.get("_class_name") == "FluxTransformer2DModel",
    problem=problem,
    groups=groups,
    attentions=attentions,
    example_inputs=example_inputs,
    stacks={"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
    input_shapes=input_shapes,
    symbols={
        "B": Symbol("batch", min=1, max=4, default=1),
        "L": Symbol(
            "image_tokens",
            pixels_per_token=16,
            min_resolution=256,
            max_resolution=1360,
            default_resolution=1024,
        ),
        "T": Symbol("text_tokens", min=1, max=512, default=512),
    },
    outputs=("latent",),
    stream=stream,
    modulated=modulated,
    state=state,
)
