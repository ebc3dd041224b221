"""Chroma: diffusers' ChromaTransformer2DModel."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.family import Config, Family, Input, Stack
from fp4trt.families.flux import DOUBLE, FLUX, SINGLE
from fp4trt.families.shapes import Shapes

__all__ = ["CHROMA"]


def _without_modulation(stack: Stack) -> Stack:
    """Return a stack of FLUX.1 whose blocks are given slices of a modulation, other ones each, and a mask."""
    groups = tuple(group for group in stack.groups if group.reads)
    return Stack(stack.path, stack.count, groups, stack.attentions, stack.attentions, equal=False)


BLOCKS: Final = _without_modulation(DOUBLE)
"""12 linears of a block, 8 GEMMs. One network makes the modulations of all blocks; it stays in BF16."""

SINGLE_BLOCKS: Final = _without_modulation(SINGLE)
"""5 linears of a block, 2 GEMMs."""

MODULATION: Final = "distilled_guidance_layer"


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "patch_size")
    network = ("approximator_num_channels", "approximator_hidden_dim", "approximator_layers")
    axes = config.get("axes_dims_rope", (16, 56, 56))
    if isinstance(axes, list | tuple) and len(axes) != 3:
        return f"axes_dims_rope is {axes!r}, expected three even numbers"
    wrong = problem_of_blocks(config, (*sizes, *network), BLOCKS.count, SINGLE_BLOCKS.count, axes=axes)
    if wrong is None and config["approximator_num_channels"] % 4:
        return f"approximator_num_channels is {config['approximator_num_channels']}, expected a multiple of 4"
    return wrong


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' ChromaTransformer2DModel has them."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    inner, hidden = 4 * width, config["approximator_hidden_dim"]
    shapes = Shapes()
    shapes.linear(f"{MODULATION}.in_proj", hidden, config["approximator_num_channels"])
    layers = range(config["approximator_layers"])
    for layer in layers:
        shapes.linears(f"{MODULATION}.layers.{layer}", hidden, hidden, "linear_1", "linear_2")
    shapes.norms(f"{MODULATION}.norms", hidden, *(str(layer) for layer in layers))
    shapes.linear(f"{MODULATION}.out_proj", width, hidden)
    shapes.linear("context_embedder", width, config["joint_attention_dim"])
    shapes.linear("x_embedder", width, config["in_channels"])
    for path in BLOCKS.blocks(config):
        shapes.norms(f"{path}.attn", head, "norm_q", "norm_k")
        shapes.linears(f"{path}.attn", width, width, "to_q", "to_k", "to_v", "to_out.0")
        shapes.norms(f"{path}.attn", head, "norm_added_q", "norm_added_k")
        shapes.linears(f"{path}.attn", width, width, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        for name in ("ff", "ff_context"):
            shapes.linear(f"{path}.{name}.net.0.proj", inner, width)
            shapes.linear(f"{path}.{name}.net.2", width, inner)
    for path in SINGLE_BLOCKS.blocks(config):
        shapes.linear(f"{path}.proj_mlp", inner, width)
        shapes.linear(f"{path}.proj_out", width, width + inner)
        shapes.norms(f"{path}.attn", head, "norm_q", "norm_k")
        shapes.linears(f"{path}.attn", width, width, "to_q", "to_k", "to_v")
    shapes.linear("proj_out", config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"]), width)
    return shapes


CHROMA: Final = Family(
    name="chroma",
    class_name="ChromaTransformer2DModel",
    matches=lambda config: config.get("_class_name") == "ChromaTransformer2DModel",
    problem=problem,
    stacks=(BLOCKS, SINGLE_BLOCKS),
    dims={**FLUX.dims, "L": replace(FLUX.dims["L"], references=False)},
    # diffusers' names and order, with a mask of the text alone
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "encoder_hidden_states": Input(("B", "T", "joint_attention_dim")),
        "timestep": Input(("B",), "time"),
        "img_ids": Input(("L", 3), "positions", "fp32"),
        "txt_ids": Input(("T", 3), "positions", "fp32"),
        "encoder_attention_mask": Input(("B", "T"), "mask", "bool"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=FLUX.positions,
    state=state,
    adapter="calibration.adapters.chroma:Chroma",
)
