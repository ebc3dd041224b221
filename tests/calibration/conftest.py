"""What several tests of calibration share: a tiny pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def pipeline(tiny_flux: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX pipeline with random weights, as diffusers stores one; not to be changed."""
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "cat": 4, "dog": 5, "<unk>": 6}
    split = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=split, model_max_length=77, **names)
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 7}
    clip = CLIPTextConfig(hidden_size=16, intermediate_size=16, projection_dim=16, eos_token_id=2, **sizes)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            latent_channels=16, block_out_channels=(32,), norm_num_groups=8, sample_size=32, shift_factor=0.1
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=7)),
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel.from_pretrained(tiny_flux(folder / "seed")),
    ).save_pretrained(folder / "pipeline")
    return folder / "pipeline"
