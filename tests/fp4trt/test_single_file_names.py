"""Names in single files, against diffusers' own converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

from fp4trt.families import family_of
from fp4trt.safetensors_file import StoredTensor
from fp4trt.single_files.names import Original
from fp4trt.single_files.opening import named_tensors
from fp4trt.single_files.tables import SINGLE_FILES
from tests.frame.diffusers_models import MODELS

FIXED_WIDTH = ("FluxTransformer2DModel", "ChromaTransformer2DModel")
"""Classes whose converter splits ``linear1`` at 3072 rows, whatever the model's width."""


def _config(name: str) -> dict[str, Any]:
    model = MODELS[name]
    config = {**model.config, "_class_name": model.class_name}
    if model.class_name in FIXED_WIDTH:
        config |= {
            "patch_size": 1,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56],
        }
    return config


def _numbered(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return a tensor of which every row is another number, and the first another than in other tensors."""
    rows = torch.arange(shape[0], dtype=torch.int16) + seed
    return rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def _joined(original: Original, state: dict[str, torch.Tensor]) -> torch.Tensor:
    parts = [state[part.name] for part in original.parts]
    parts = [
        torch.cat(value.chunk(2)[::-1]) if part.swapped else value
        for value, part in zip(parts, original.parts, strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converts_what_the_table_says_to_the_model(name: str) -> None:
    config = _config(name)
    table, shapes = SINGLE_FILES[MODELS[name].class_name], family_of(config).state(config)
    state = {key: _numbered(shape, seed) for seed, (key, shape) in enumerate(shapes.items())}
    layout = table.layout(shapes)
    single = {key: _joined(original, state) for key, original in layout.items()}
    if name == "ltx2.3":  # whose converter does not know the names of the newest modulations
        single = {key.replace("prompt_adaln_single", "prompt_adaln"): value for key, value in single.items()}

    assert table.key in single
    assert {key: tuple(value.shape) for key, value in single.items()} == {
        key.replace("prompt_adaln_single", "prompt_adaln"): original.shape for key, original in layout.items()
    }
    classes: Any = SINGLE_FILE_LOADABLE_CLASSES
    found = classes[MODELS[name].class_name]["checkpoint_mapping_fn"](dict(single), config=config)

    assert found.keys() == state.keys()
    assert [key for key, value in found.items() if not torch.equal(value, state[key])] == []


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_known_by_its_names_whether_they_are_diffusers_or_not(name: str) -> None:
    config = _config(name)
    table, state = SINGLE_FILES[MODELS[name].class_name], family_of(config).state(config)
    layout = table.layout(state)
    for shapes in (state, {key: original.shape for key, original in layout.items()}):
        stored = {f"model.{key}": StoredTensor(Path(), "BF16", shape, 0, 0) for key, shape in shapes.items()}
        named = named_tensors(Path("theirs"), stored)
        assert (named.table, named.prefix, named.others) == (table, "model.", ())
        assert named.diffusers == (shapes.keys() == state.keys())
        assert named.layout(state).keys() == shapes.keys()
