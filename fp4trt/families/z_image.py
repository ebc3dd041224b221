"""Z-Image (Turbo, Base): diffusers' ZImageTransformer2DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Sizes, Stack
from fp4trt.families.positions import counted, grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Z_IMAGE"]

PATCH: Final = "2-1"
"""Rows and columns, and frames, of a patch: the only kind that published models have."""

_MODULATION_INPUT: Final = 256
"""Most channels of what the modulations read."""


def _of_block(reads: str) -> tuple[Group, ...]:
    return (
        Group(reads, ("attention.to_q", "attention.to_k", "attention.to_v")),
        Group(reads, ("attention.to_out.0",)),
        Group(reads, ("feed_forward.w1", "feed_forward.w3"), gated=True),
        Group(reads, ("feed_forward.w2",)),
    )


MODULATION: Final = Group("", ("adaLN_modulation.0",))
ATTENTION: Final = ("attention",)

IMAGE: Final = Stack("noise_refiner", "n_refiner_layers", (MODULATION, *_of_block("L")), ATTENTION, read_by="layers")
TEXT: Final = Stack("context_refiner", "n_refiner_layers", _of_block("T"), ATTENTION)
JOINT: Final = Stack("layers", "n_layers", (MODULATION, *_of_block("L+T")), ATTENTION)
"""Blocks of 8 linears and 5 GEMMs, without a modulation 7 and 4. A modulation has no shift."""


def unsupported(config: Config) -> str | None:
    """Return which model of this class a config describes that is not supported, and what to take, or None."""
    if config.get("siglip_feat_dim") is not None:
        return "siglip_feat_dim is set, as in Z-Image-Omni, which edits pictures and is not supported; take Z-Image"
    return None


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    patches = [list(config.get(key, usual)) for key, usual in (("all_patch_size", [2]), ("all_f_patch_size", [1]))]
    if patches != [[2], [1]]:
        return f"all_patch_size and all_f_patch_size are {patches[0]} and {patches[1]}, expected [2] and [1]"
    sizes = ("in_channels", "dim", "n_heads", "n_kv_heads", "cap_feat_dim")
    heads = config.get("n_heads")
    width = {"attention_head_dim": config.get("dim", 0) // heads if isinstance(heads, int) and heads > 0 else 0}
    counts = (JOINT.count, TEXT.count)
    return problem_of_blocks({**config, **width}, sizes, *counts, axes=config.get("axes_dims", (32, 48, 48)))


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' ZImageTransformer2DModel has them."""
    width, head = config["dim"], config["dim"] // config["n_heads"]
    inner, read = int(width / 3 * 8), min(width, _MODULATION_INPUT)
    queries, keys = config["n_heads"] * head, config["n_kv_heads"] * head
    shapes = Shapes({"x_pad_token": (1, width), "cap_pad_token": (1, width)})
    shapes.linear(f"all_x_embedder.{PATCH}", width, channels(config))
    shapes.linear(f"all_final_layer.{PATCH}.linear", channels(config), width)
    shapes.linear(f"all_final_layer.{PATCH}.adaLN_modulation.1", width, read)

    def block(path: str, modulated: bool) -> None:
        if config.get("qk_norm", True):
            shapes.norms(f"{path}.attention", head, "norm_q", "norm_k")
        shapes.linear(f"{path}.attention.to_q", queries, width, bias=False)
        shapes.linears(f"{path}.attention", keys, width, "to_k", "to_v", bias=False)
        shapes.linear(f"{path}.attention.to_out.0", width, queries, bias=False)
        shapes.linear(f"{path}.feed_forward.w1", inner, width, bias=False)
        shapes.linear(f"{path}.feed_forward.w2", width, inner, bias=False)
        shapes.linear(f"{path}.feed_forward.w3", inner, width, bias=False)
        shapes.norms(path, width, "attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
        if modulated:
            shapes.linear(f"{path}.adaLN_modulation.0", 4 * width, read)

    for stack in (IMAGE, TEXT):
        for path in stack.blocks(config):
            block(path, MODULATION in stack.groups)
    shapes.linear("t_embedder.mlp.0", 1024, 256)
    shapes.linear("t_embedder.mlp.2", read, 1024)
    shapes["cap_embedder.0.weight"] = (config["cap_feat_dim"],)
    shapes.linear("cap_embedder.1", width, config["cap_feat_dim"])
    for path in JOINT.blocks(config):
        block(path, modulated=True)
    return shapes


def channels(config: Config) -> int:
    """Return how many channels a token has: those of a patch of 2 x 2 latents."""
    return 4 * int(config["in_channels"])


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return positions (time, row, column): the text is counted from 1 along the first, the picture comes behind it."""
    image, text = grid(sizes["L"], axes=3, row=1), counted(sizes["T"], axes=3, axis=0)
    image[:, 0] = sizes["T"] + 1
    text[:, 0] += 1
    return {"img_ids": image, "txt_ids": text}


Z_IMAGE: Final = Family(
    name="z-image",
    class_name="ZImageTransformer2DModel",
    matches=lambda config: config.get("_class_name") == "ZImageTransformer2DModel",
    problem=problem,
    stacks=(IMAGE, TEXT, JOINT),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim("image_tokens", pixels_per_token=16, min_resolution=256, max_resolution=2048, default_resolution=1024),
        "T": Dim("text_tokens", min=32, max=512, default=512),
    },
    # Tokens, positions, and which tokens are padding, in place of diffusers' lists of pictures and captions. Its
    # pipeline pads both to a multiple of 32.
    inputs={
        "hidden_states": Input(("B", "L", channels)),
        "timestep": Input(("B",), "time", "fp32"),
        "encoder_hidden_states": Input(("B", "T", "cap_feat_dim")),
        "img_ids": Input(("L", 3), "positions", "fp32"),
        "txt_ids": Input(("T", 3), "positions", "fp32"),
        "img_pad": Input(("L",), "padding", "bool"),
        "txt_pad": Input(("T",), "padding", "bool"),
    },
    outputs={"latent": ("B", "L", None)},
    positions=positions,
    state=state,
    adapter="calibration.adapters.z_image:ZImage",
    unsupported=unsupported,
)
