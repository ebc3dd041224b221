"""LTX-2 and LTX-2.3, video with sound: diffusers' LTX2VideoTransformer3DModel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fp4trt.families.config import problem_of_blocks
from fp4trt.families.dim import Dim
from fp4trt.families.family import Config, Family, Group, Input, Sizes, Stack
from fp4trt.families.positions import grid
from fp4trt.families.shapes import Shapes

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LTX2"]


def _self_attention(path: str, reads: str) -> tuple[Group, ...]:
    return Group(reads, (f"{path}.to_q", f"{path}.to_k", f"{path}.to_v")), Group(reads, (f"{path}.to_out.0",))


def _cross_attention(path: str, asks: str, answers: str) -> tuple[Group, ...]:
    """Return the groups of an attention whose queries are of other tokens than its keys and values."""
    return (
        Group(asks, (f"{path}.to_q",)),
        Group(answers, (f"{path}.to_k", f"{path}.to_v")),
        Group(asks, (f"{path}.to_out.0",)),
    )


BLOCKS: Final = Stack(
    "transformer_blocks",
    "num_layers",
    groups=(
        *_self_attention("attn1", "L"),
        *_self_attention("audio_attn1", "A"),
        *_cross_attention("attn2", "L", "T"),
        *_cross_attention("audio_attn2", "A", "T"),
        *_cross_attention("audio_to_video_attn", "L", "A"),
        *_cross_attention("video_to_audio_attn", "A", "L"),
        Group("L", ("ff.net.0.proj",)),
        Group("L", ("ff.net.2",)),
        Group("A", ("audio_ff.net.0.proj",)),
        Group("A", ("audio_ff.net.2",)),
    ),
    attentions=("attn1", "audio_attn1", "attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    masked=("attn2", "audio_attn2"),
)
"""28 linears of a block, 20 GEMMs. Its scales and shifts are a table of its own added to what all blocks share: no
linear of it makes them. The gates of LTX-2.3 have as many outputs as there are heads, and stay in 16 bit."""

_ONE_VALUE: Final = {
    "qk_norm": "rms_norm_across_heads",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
"""Keys of a config to the value that they have in LTX-2 and LTX-2.3, and by default."""


def unsupported(config: Config) -> str | None:
    """Return which model of this class a config describes that is not supported, and what to take, or None."""
    for key, value in _ONE_VALUE.items():
        if config.get(key, value) != value:
            return (
                f"{key} is {config[key]!r}, expected {value!r}, as LTX-2 and LTX-2.3 have it; take one of these: other "
                "models of this class are not supported"
            )
    return None


def problem(config: Config) -> str | None:
    """Return what is wrong with a config, in one sentence, or None."""
    sizes = ("in_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim")
    keys = (*sizes, *(f"audio_{key}" for key in sizes), "caption_channels")
    for key in ("attention_head_dim", "audio_attention_head_dim"):
        if isinstance(config.get(key), int) and config[key] % 2:
            return f"{key} is {config[key]}, expected an even number: positions turn pairs of channels"
    # The channels of all heads are turned together; a head has no axes that could be wrong.
    wrong = problem_of_blocks(config, keys, BLOCKS.count, axes=(config.get("attention_head_dim"),))
    if wrong is not None:
        return wrong
    if (kind := config.get("rope_type", "interleaved")) not in ("interleaved", "split"):
        return f"rope_type is {kind!r}, expected 'interleaved' or 'split'"
    modulated = [bool(config.get(f"{prefix}cross_attn_mod")) for prefix in ("", "audio_")]
    if modulated[0] != modulated[1]:
        return f"cross_attn_mod is {modulated[0]} and audio_cross_attn_mod {modulated[1]}, expected the same"
    for prefix in ("", "audio_"):
        found, width = config[f"{prefix}cross_attention_dim"], _width(config, prefix)
        if found != width:
            heads = f"{prefix}num_attention_heads times {prefix}attention_head_dim"
            return f"{prefix}cross_attention_dim is {found}, expected {heads}, {width}"
    return None


def state(config: Config) -> dict[str, tuple[int, ...]]:
    """Return name to shape of every tensor, as diffusers' LTX2VideoTransformer3DModel has them."""
    widths = {prefix: _width(config, prefix) for prefix in ("", "audio_")}
    video, audio = widths.values()
    prompt = bool(config.get("cross_attn_mod"))
    modulations = 9 if prompt else 6
    shapes = Shapes({f"{prefix}scale_shift_table": (2, width) for prefix, width in widths.items()})
    for prefix, width in widths.items():
        shapes.linear(f"{prefix}proj_in", width, config[f"{prefix}in_channels"])
    if config.get("use_prompt_embeddings", True):
        for prefix, width in widths.items():
            shapes.linear(f"{prefix}caption_projection.linear_1", width, config["caption_channels"])
            shapes.linear(f"{prefix}caption_projection.linear_2", width, width)

    def adaptive(path: str, width: int, count: int) -> None:
        shapes.linear(f"{path}.emb.timestep_embedder.linear_1", width, 256)
        shapes.linear(f"{path}.emb.timestep_embedder.linear_2", width, width)
        shapes.linear(f"{path}.linear", count * width, width)

    adaptive("time_embed", video, modulations)
    adaptive("audio_time_embed", audio, modulations)
    adaptive("av_cross_attn_video_scale_shift", video, 4)
    adaptive("av_cross_attn_audio_scale_shift", audio, 4)
    adaptive("av_cross_attn_video_a2v_gate", video, 1)
    adaptive("av_cross_attn_audio_v2a_gate", audio, 1)
    if prompt:
        adaptive("prompt_adaln", video, 2)
        adaptive("audio_prompt_adaln", audio, 2)
    for block in BLOCKS.blocks(config):
        _block(shapes, config, block, modulations)
    for prefix, width in widths.items():
        channels = config.get(f"{prefix}out_channels", 128) or config[f"{prefix}in_channels"]
        shapes.linear(f"{prefix}proj_out", channels, width)
    return shapes


def _block(shapes: Shapes, config: Config, block: str, modulations: int) -> None:
    video, audio = (_width(config, prefix) for prefix in ("", "audio_"))
    names = {"scale_shift_table": modulations, "prompt_scale_shift_table": 2 if config.get("cross_attn_mod") else 0}
    for name, rows in names.items():
        if rows:
            shapes[f"{block}.{name}"], shapes[f"{block}.audio_{name}"] = (rows, video), (rows, audio)
    for name, width in (("video", video), ("audio", audio)):
        shapes[f"{block}.{name}_a2v_cross_attn_scale_shift_table"] = (5, width)

    def attention(name: str, prefix: str, inner: int, reads: int) -> None:
        """Add an attention of ``inner`` channels, whose queries are of one kind of tokens and keys ``reads`` wide."""
        path, asks, bias = f"{block}.{name}", _width(config, prefix), config.get("attention_bias", True)
        shapes.norms(path, inner, "norm_q", "norm_k")
        shapes.linear(f"{path}.to_q", inner, asks, bias)
        shapes.linears(path, inner, reads, "to_k", "to_v", bias=bias)
        shapes.linear(f"{path}.to_out.0", asks, inner, config.get("attention_out_bias", True))
        if config.get(f"{prefix}gated_attn"):
            heads = f"{'' if name in ('attn1', 'attn2') else 'audio_'}num_attention_heads"
            shapes.linear(f"{path}.to_gate_logits", config[heads], asks)

    attention("attn1", "", video, video)
    attention("audio_attn1", "audio_", audio, audio)
    attention("attn2", "", video, video)
    attention("audio_attn2", "audio_", audio, audio)
    attention("audio_to_video_attn", "", audio, audio)
    attention("video_to_audio_attn", "audio_", audio, video)
    for prefix, width in (("", video), ("audio_", audio)):
        bias = config.get(f"{prefix}ff_bias", True)
        shapes.linear(f"{block}.{prefix}ff.net.0.proj", 4 * width, width, bias)
        shapes.linear(f"{block}.{prefix}ff.net.2", width, 4 * width, bias)


def _width(config: Config, prefix: str) -> int:
    """Return the channels of a token of the video, or of sound where ``prefix`` is ``audio_``."""
    return int(config[f"{prefix}num_attention_heads"]) * int(config[f"{prefix}attention_head_dim"])


def _text(config: Config) -> int:
    """Return how wide the video's text is: as the text encoder's, or projected by the pipeline (LTX-2.3)."""
    return int(config["caption_channels" if config.get("use_prompt_embeddings", True) else "cross_attention_dim"])


def _audio_text(config: Config) -> int:
    return int(config["caption_channels" if config.get("use_prompt_embeddings", True) else "audio_cross_attention_dim"])


def positions(sizes: Sizes) -> dict[str, npt.NDArray[np.float32]]:
    """Return where tokens begin and end, as pipelines say it: a video's in seconds and pixels, sound's in seconds.

    The first token in time is of one frame, at 24 a second, or of one window of sound; the others are of 8, or of 4.
    """
    import numpy as np

    found = grid(sizes["L"], axes=3, row=1)
    found[:, 0], found[:, 1] = np.divmod(found[:, 1], 2)
    video = np.stack([found, found + 1], axis=-1) * np.array([8, 32, 32], np.float32)[:, None]
    video[:, 0] = (video[:, 0] + 1 - 8).clip(0) / 24
    counted = np.arange(sizes["A"], dtype=np.float32)
    audio = (np.stack([counted, counted + 1], axis=-1) * 4 + 1 - 4).clip(0) * 160 / 16000
    each: dict[str, npt.NDArray[Any]] = {"video_coords": video.transpose(1, 0, 2), "audio_coords": audio[None]}
    return {name: np.stack([value] * sizes["B"]).astype(np.float32) for name, value in each.items()}


LTX2: Final = Family(
    name="ltx2",
    class_name="LTX2VideoTransformer3DModel",
    matches=lambda config: config.get("_class_name") == "LTX2VideoTransformer3DModel",
    problem=problem,
    stacks=(BLOCKS,),
    dims={
        "B": Dim("batch", min=1, max=4, default=1),
        "L": Dim(
            "video_tokens", pixels_per_token=32, min_resolution=256, max_resolution=1536, default_resolution=640,
            frames_per_token=8, min_frames=9, max_frames=257, default_frames=121,
        ),
        "A": Dim("audio_tokens", min=1, max=512, default=126),
        "T": Dim("text_tokens", min=1, max=1024, default=1024),
    },
    # diffusers' names; every video of a batch is at one time, and so is its sound
    inputs={
        "hidden_states": Input(("B", "L", "in_channels")),
        "audio_hidden_states": Input(("B", "A", "audio_in_channels")),
        "encoder_hidden_states": Input(("B", "T", _text)),
        "audio_encoder_hidden_states": Input(("B", "T", _audio_text)),
        "timestep": Input(("B",), "time", "fp32", noise_at=1000),
        "audio_timestep": Input(("B",), "time", "fp32", noise_at=1000),
        "sigma": Input(("B",), "time", "fp32", noise_at=1000, given_by="cross_attn_mod"),
        "audio_sigma": Input(("B",), "time", "fp32", noise_at=1000, given_by="cross_attn_mod"),
        "encoder_attention_mask": Input(("B", "T"), "mask", "bool"),
        "audio_encoder_attention_mask": Input(("B", "T"), "mask", "bool"),
        "video_coords": Input(("B", 3, "L", 2), "positions", "fp32"),
        "audio_coords": Input(("B", 1, "A", 2), "positions", "fp32"),
    },
    outputs={"video": ("B", "L", None), "audio": ("B", "A", None)},
    positions=positions,
    state=state,
    adapter="calibration.adapters.ltx2:LTX2",
    unsupported=unsupported,
)  # fmt: skip
