"""What a config of LTX-2 may not be, and the recipe that the documents give for it."""

from __future__ import annotations

import pytest

from fp4trt.errors import BadCheckpoint
from fp4trt.families import family_of
from tests.frame.diffusers_models import MODELS

CONFIG = {**MODELS["ltx2"].config, "_class_name": MODELS["ltx2"].class_name}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_prompt_adaln_single": False}, "use_prompt_adaln_single is False, expected True"),
        ({"use_keyframes_abs_pos_embedding": True}, "use_keyframes_abs_pos_embedding is True, expected False"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True, expected False"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu', expected 'gelu-approximate'"),
        ({"rope_type": "complex"}, "rope_type is 'complex', expected 'interleaved' or 'split'"),
        ({"cross_attn_mod": True}, "cross_attn_mod is True and audio_cross_attn_mod False, expected the same"),
        ({"cross_attention_dim": 32}, "cross_attention_dim is 32, expected num_attention_heads times .*, 64"),
        ({"audio_cross_attention_dim": 64}, "audio_cross_attention_dim is 64, expected audio_num_.*, 32"),
        ({"audio_attention_head_dim": 15}, "audio_attention_head_dim is 15, expected an even number"),
        ({"caption_channels": None}, "caption_channels is None, expected a whole number"),
    ],
)
def test_a_config_that_is_not_of_ltx2_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadCheckpoint, match=words):
        family_of({**CONFIG, **changes})
