"""The keys of a LoRA file: what each begins with, and what its end says of the tensor.

Sources: diffusers' ``loaders/lora_conversion_utils.py``, ComfyUI's ``comfy/lora.py`` and ``comfy/weight_adapter``, the
``weight_list`` of each of LyCORIS' modules, peft's ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["LYCORIS", "PREFIXES", "TEXT", "role_of", "unsupported"]

LYCORIS: Final = "lycoris_"
"""What LyCORIS' own wrapper, and so SimpleTuner, begins a module's name with."""

PREFIXES: Final = (
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_transformer_",
    "lora_unet_",
    LYCORIS,
    "transformer.",
    "unet.",
    "",
)
"""What may stand before a module's name; the longer before the shorter."""

TEXT: Final = re.compile(r"(lora_te\d*_|text_encoders?(_\d+)?\.|connectors\.|text_embedding_projection\.|bundle_emb\.)")
"""Beginning of a key that speaks of a text encoder, of what lies behind one, or of an embedding of its words."""

_ADAPTER: Final = r"(\.(?!weight|bias)[^.]+)?"
"""Name of an adapter, which peft's modules have in their own state."""

_SUFFIXES: Final = tuple(
    (re.compile(rf"(.+){suffix}"), role)
    for suffix, role in (
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_up\.bias", "up_bias"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_linear_layer\.down\.weight", "down"),
        (r"\.lora_linear_layer\.up\.weight", "up"),
        (r"[._]lora\.down\.weight", "down"),
        (r"[._]lora\.up\.weight", "up"),
        (rf"\.lora_A{_ADAPTER}(\.weight)?", "down"),
        (rf"\.lora_B{_ADAPTER}(\.weight)?", "up"),
        (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(\.weight)?", "magnitude"),
        (r"\.(alpha|dora_scale|diff|diff_b|set_weight|reshape_weight)", None),
        (r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t[12])", None),
        (r"\.(a1|a2|b1|b2|bm)\.weight", None),
        (r"\.(oft_blocks|rescale|on_input|w_norm|b_norm)", None),
        (r"\.down\.weight", "down"),  # XLabs
        (r"\.up\.weight", "up"),
    )
)

_UNSUPPORTED: Final = tuple(
    (re.compile(rf".+\.({ends})"), what)
    for ends, what in (
        (r"(q_layer|p_layer)\.weight|lambda_layer", "T-LoRA, whose rank changes with the timestep"),
        (rf"lora_E{_ADAPTER}|ranknum{_ADAPTER}", "peft's AdaLoRA"),
        (rf"oft_[rR]{_ADAPTER}(\.weight)?", "peft's OFT"),
        (rf"boft_[RsS]{_ADAPTER}", "peft's BOFT"),
        (rf"ia3_l{_ADAPTER}", "peft's IA3"),
        (rf"(vera_lambda_[bd]|vera_[AB]){_ADAPTER}", "peft's VeRA"),
        (rf"(fourierft_spectrum|hra_u|shira_weight|waveft_spectrum|c3a_kernel){_ADAPTER}", "an adapter of peft's own"),
    )
)


def role_of(key: str) -> tuple[str, str] | None:
    """Return a module's name, with its prefix, and what the tensor is to it; None where the end says nothing.

    Roles are ``down``, ``up``, ``mid``, ``magnitude`` and ``up_bias`` of a pair of factors, and LyCORIS' own names.
    """
    for suffix, role in _SUFFIXES:
        if (found := suffix.fullmatch(key)) is not None:
            return found[1], role or found[2]
    return None


def unsupported(key: str) -> str | None:
    """Return the kind of change that a key belongs to, where that is one that is not fused here."""
    return next((what for pattern, what in _UNSUPPORTED if pattern.fullmatch(key) is not None), None)
