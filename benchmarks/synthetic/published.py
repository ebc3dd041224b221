"""Configs of published models, by a name for people, as far as they decide names, shapes and the graph."""

from __future__ import annotations

from typing import Any, Final

from fp4trt.single_files.tables import SINGLE_FILES

__all__ = ["PUBLISHED"]

_OF_TITLE: Final = {title: config for table in SINGLE_FILES.values() for title, config in table.published.items()}

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "flux2-dev": dict(_OF_TITLE["FLUX.2"]),
    "klein-4b": {
        **_OF_TITLE["FLUX.2"],
        "guidance_embeds": False,
        "joint_attention_dim": 7680,
        "num_attention_heads": 24,
        "num_layers": 5,
        "num_single_layers": 20,
    },
    "qwen-image": dict(_OF_TITLE["Qwen-Image"]),
    "z-image": dict(_OF_TITLE["Z-Image"]),
    "ltx-2": dict(_OF_TITLE["LTX-2"]),
    "wan-14b": dict(_OF_TITLE["Wan 14B"]),
}
