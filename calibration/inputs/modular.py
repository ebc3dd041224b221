"""A pipeline that diffusers puts together from blocks, around a transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fp4trt.errors import BadInputs

__all__ = ["load_modular"]

_UPSAMPLER = "prompt_upsampler"
"""The step that has a language model write the prompts out, and its part."""


def load_modular(root: Path, transformer: Any, blocks: str) -> Any:
    """Return the BF16 pipeline in a folder around a transformer, from text to latents, on the GPU where there is one.

    Prompts are written out where the folder has the language model for it, and else taken as they are.

    Args:
        root: the folder.
        transformer: its transformer.
        blocks: class of diffusers that the pipeline is put together by.

    Raises:
        BadInputs: a part is not in the folder, or cannot be loaded.
    """
    import diffusers
    import transformers  # noqa: F401 - the text encoders' library; its absence is reported in one line

    made: Any = diffusers
    steps = getattr(made, blocks)()
    for step in ("decode", *(() if (root / _UPSAMPLER).is_dir() else (_UPSAMPLER,))):
        steps.sub_blocks.pop(step)
    manager = made.ComponentsManager() if torch.cuda.is_available() else None
    pipeline: Any = steps.get_workflow("text2image").init_pipeline(root, components_manager=manager)
    parts = [part for part in pipeline.pretrained_component_names if part != "transformer"]
    specs = {part: pipeline.get_component_spec(part) for part in parts}  # that of a part on the hub names the hub's
    own = [part for part in parts if specs[part].pretrained_model_name_or_path == str(root) and (root / part).is_dir()]
    if absent := [part for part in parts if part not in own]:
        raise BadInputs(f"{root} lacks {absent[0]}/, which prompts need; expected the whole pipeline: copy it too")
    pipeline.update_components(transformer=transformer)
    pipeline.load_components(parts, torch_dtype=torch.bfloat16)
    if failed := [part for part in parts if getattr(pipeline, part) is None]:
        raise BadInputs(f"{root / failed[0]} cannot be loaded (see above); expected a whole part: copy it again")
    pipeline.set_progress_bar_config(disable=True)
    if manager is not None:
        manager.enable_auto_cpu_offload(device="cuda")
    return pipeline
