"""Which rows of a 16-bit checkpoint a quantized linear was made of, where the two name their tensors differently.

diffusers keeps q, k and v apart; the models' own repositories, ComfyUI and Black Forest Labs fuse them, and call all
linears otherwise. Sources: diffusers' `loaders/single_file_utils.py`; only FLUX.1's map was run, the others were read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from fp4trt.layouts import PREFIXES

__all__ = ["Rows", "Stretch", "index_of", "stretches_of"]

_SWAPPED: Final = "swapped halves of "
"""Before a name: the linear's two halves of rows lie the other way round (scale and shift of the last norm)."""

_FLUX1: Final[Mapping[str, tuple[str, ...]]] = {
    r"double_blocks\.(\d+)\.img_attn\.qkv": tuple(rf"transformer_blocks.\1.attn.to_{part}" for part in "qkv"),
    r"double_blocks\.(\d+)\.txt_attn\.qkv": tuple(rf"transformer_blocks.\1.attn.add_{part}_proj" for part in "qkv"),
    r"double_blocks\.(\d+)\.img_attn\.proj": (r"transformer_blocks.\1.attn.to_out.0",),
    r"double_blocks\.(\d+)\.txt_attn\.proj": (r"transformer_blocks.\1.attn.to_add_out",),
    r"double_blocks\.(\d+)\.img_mlp\.0": (r"transformer_blocks.\1.ff.net.0.proj",),
    r"double_blocks\.(\d+)\.img_mlp\.2": (r"transformer_blocks.\1.ff.net.2",),
    r"double_blocks\.(\d+)\.txt_mlp\.0": (r"transformer_blocks.\1.ff_context.net.0.proj",),
    r"double_blocks\.(\d+)\.txt_mlp\.2": (r"transformer_blocks.\1.ff_context.net.2",),
    r"double_blocks\.(\d+)\.img_mod\.lin": (r"transformer_blocks.\1.norm1.linear",),
    r"double_blocks\.(\d+)\.txt_mod\.lin": (r"transformer_blocks.\1.norm1_context.linear",),
    r"single_blocks\.(\d+)\.linear1": (
        *(rf"single_transformer_blocks.\1.attn.to_{part}" for part in "qkv"),
        r"single_transformer_blocks.\1.proj_mlp",
    ),
    r"single_blocks\.(\d+)\.linear2": (r"single_transformer_blocks.\1.proj_out",),
    r"single_blocks\.(\d+)\.modulation\.lin": (r"single_transformer_blocks.\1.norm.linear",),
    r"img_in": ("x_embedder",),
    r"txt_in": ("context_embedder",),
    r"time_in\.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    r"time_in\.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    r"vector_in\.in_layer": ("time_text_embed.text_embedder.linear_1",),
    r"vector_in\.out_layer": ("time_text_embed.text_embedder.linear_2",),
    r"guidance_in\.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    r"guidance_in\.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    r"final_layer\.linear": ("proj_out",),
    r"final_layer\.adaLN_modulation\.1": (f"{_SWAPPED}norm_out.linear",),
}
_FLUX2: Final[Mapping[str, tuple[str, ...]]] = {
    **{pattern: names for pattern, names in _FLUX1.items() if "_mlp" not in pattern and "single" not in pattern},
    r"double_blocks\.(\d+)\.img_mlp\.0": (r"transformer_blocks.\1.ff.linear_in",),
    r"double_blocks\.(\d+)\.img_mlp\.2": (r"transformer_blocks.\1.ff.linear_out",),
    r"double_blocks\.(\d+)\.txt_mlp\.0": (r"transformer_blocks.\1.ff_context.linear_in",),
    r"double_blocks\.(\d+)\.txt_mlp\.2": (r"transformer_blocks.\1.ff_context.linear_out",),
    r"single_blocks\.(\d+)\.linear1": (r"single_transformer_blocks.\1.attn.to_qkv_mlp_proj",),
    r"single_blocks\.(\d+)\.linear2": (r"single_transformer_blocks.\1.attn.to_out",),
    r"(double_stream_modulation_(?:img|txt)|single_stream_modulation)\.lin": (r"\1.linear",),
}
_Z_IMAGE: Final[Mapping[str, tuple[str, ...]]] = {
    r"(.*\.attention)\.qkv": tuple(rf"\1.to_{part}" for part in "qkv"),
    r"(.*\.attention)\.out": (r"\1.to_out.0",),
}
_MAPS: Final = (_FLUX1, _FLUX2, _Z_IMAGE)


@dataclass(frozen=True)
class Rows:
    """A linear's weight as rows of a stored tensor: `spans` of (first row, count), in the linear's own order."""

    tensor: str
    spans: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(count for _, count in self.spans)


@dataclass(frozen=True)
class Stretch:
    """`count` rows from row `row` of a quantized linear on, made of those from `source_row` on of a stored tensor."""

    row: int
    tensor: str
    source_row: int
    count: int


def index_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Rows]:
    """Return the linears of a 16-bit checkpoint by every name that they may have, as rows of its tensors.

    Args:
        shapes: of its matrices, by tensor name.
    """
    index: dict[str, Rows] = {}
    for name, shape in shapes.items():
        path = _bare(name.removesuffix(".weight"))
        index[path] = Rows(name, ((0, shape[0]),))
        for names in _candidates(path):
            first, counts = 0, _split(len(names), shape)
            if min(counts) < 1:
                continue
            for part, count in zip(names, counts, strict=True):
                index.setdefault(part.removeprefix(_SWAPPED), Rows(name, _spans(part, first, count)))
                first += count
    return index


def stretches_of(path: str, index: Mapping[str, Rows]) -> tuple[Stretch, ...]:
    """Return what a quantized linear was made of, in the order of its rows; nothing where the checkpoint lacks it."""
    bare = _bare(path)
    for names in ((bare,), *_candidates(bare)):
        parts = [index.get(name.removeprefix(_SWAPPED)) for name in names]
        if all(parts):
            return tuple(_laid_out(names, [part for part in parts if part is not None]))
    return ()


def _laid_out(names: tuple[str, ...], parts: list[Rows]) -> Iterator[Stretch]:
    row = 0
    for name, part in zip(names, parts, strict=True):
        for first, count in (piece for span in part.spans for piece in _spans(name, *span)):
            yield Stretch(row, part.tensor, first, count)
            row += count


def _spans(name: str, first: int, count: int) -> tuple[tuple[int, int], ...]:
    if not name.startswith(_SWAPPED):
        return ((first, count),)
    half = count // 2
    return (first + half, count - half), (first, half)


def _split(parts: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the rows of each part of a fused linear: q, k, v alike; in `linear1` each is as wide as the input."""
    rows, columns = shape
    if parts == 4:
        return columns, columns, columns, rows - 3 * columns
    return (rows // parts,) * parts


def _bare(path: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if path.startswith(prefix)), "")
    return path.removeprefix(prefix)


def _candidates(path: str) -> Iterator[tuple[str, ...]]:
    """Yield the names that diffusers may have for a linear of a model's own repository."""
    for names in _MAPS:
        for pattern, templates in names.items():
            if (found := re.fullmatch(pattern, path)) is not None:
                yield tuple(found.expand(template) for template in templates)
