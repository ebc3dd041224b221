"""Open a single file as a checkpoint of diffusers: its config, and where in the file each tensor of diffusers lies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fp4trt.built_in import path_of
from fp4trt.errors import BadCheckpoint, QuantizedAlready, UnknownFamily
from fp4trt.families import family_of
from fp4trt.file_kind import shortened, what_it_is, what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.layouts import recognised
from fp4trt.made_tensors import MadeTensor, SwappedTensor
from fp4trt.number_formats import FORMATS
from fp4trt.safetensors_file import DTYPE_BYTES, StoredTensor, metadata_in_file, tensors_in_file
from fp4trt.single_files import cast_fp8, gguf_file
from fp4trt.single_files.config import config_of, published_config
from fp4trt.single_files.names import Original, Part, SingleFile
from fp4trt.single_files.tables import SINGLE_FILES

__all__ = [
    "SUFFIXES",
    "NamedTensors",
    "OpenFile",
    "config_beside",
    "config_like",
    "is_checkpoint",
    "named_tensors",
    "open_file",
    "require_config",
]

SUFFIXES: Final = (".safetensors", ".sft", ".gguf")
"""What the names of single files end in."""

PREFIXES: Final = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "net.", "model.")
"""What single files put before the names of a transformer's tensors."""


def is_checkpoint(source: Path) -> bool:
    """Return whether what a user names is a checkpoint, a single file among them, and not an ONNX graph."""
    if source.is_file():
        return source.suffix.lower() in SUFFIXES
    return source.suffix != ".onnx" or source.is_dir()


@dataclass(frozen=True)
class OpenFile:
    """A single file as a checkpoint of diffusers.

    Attributes:
        path: the file.
        config: of its model.
        tensors: name of diffusers to where it lies, or to what makes it, in the order of the model's own state.
        described: how the file holds them, in words.
    """

    path: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    described: str


@dataclass(frozen=True)
class NamedTensors:
    """The transformer's tensors in a file: without a prefix, under names of one kind.

    Attributes:
        path: the file.
        table: the names of its class.
        prefix: what is before each of its names there.
        diffusers: whether they are those of diffusers.
        tensors: name, without the prefix, to tensor.
        others: names of the tensors without the prefix.
    """

    path: Path
    table: SingleFile
    prefix: str
    diffusers: bool
    tensors: Mapping[str, StoredTensor]
    others: tuple[str, ...]

    def name_in_file(self, name: str) -> str:
        """Return what a tensor of diffusers is called in the file, or the tensor that it is a part of."""
        return name if self.diffusers else self.table.place_of(name)[0]

    def layout(self, state: Mapping[str, tuple[int, ...]]) -> dict[str, Original]:
        """Return name to tensor of the file of a model of these tensors of diffusers."""
        own = {name: Original(shape, (Part(name, shape),)) for name, shape in state.items()}
        return own if self.diffusers else self.table.layout(state)

    @property
    def names(self) -> str:
        """Whose names these are, in words."""
        whose = "diffusers' names" if self.diffusers else "the publisher's names"
        return f"{whose} behind {self.prefix}" if self.prefix else whose


def config_like(like: str | Path) -> dict[str, Any]:
    """Return the config that ``--like`` names: a published model's name, a config.json, or a folder with one.

    Raises:
        BadCheckpoint: it is none of these.
    """
    if (published := published_config(str(like))) is not None:
        return published
    path = path_of(like)
    for place in (path, path / "transformer" / "config.json", path / "config.json"):
        if place.is_file():
            config = load_json(place, expected="the config.json of a diffusers model")
            require_config(place, config)
            return {key: value for key, value in config.items() if key != "quantization_config"}
    known = ", ".join(f"'{name}'" for table in SINGLE_FILES.values() for name in table.published)
    raise BadCheckpoint(f"--like {like} is no config.json, no folder with one, and none of: {known}")


def config_beside(file: Path) -> dict[str, Any] | None:
    """Return the config.json that lies beside a single file, where it is that of a model as such files hold.

    What quantization added to it is left out.
    """
    place = file.parent / "config.json"
    if not place.is_file():
        return None
    try:
        is_such = load_json(place).get("_class_name") in SINGLE_FILES
    except BadCheckpoint:  # whatever it is, it is not ours to judge
        return None
    return config_like(place) if is_such else None


def require_config(place: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config of no family of ours, by the name of its file.

    Raises:
        BadCheckpoint, UnknownFamily: as :func:`fp4trt.families.family_of`.
    """
    try:
        family_of(config, place.parent)
    except (BadCheckpoint, UnknownFamily) as error:
        raise type(error)(str(error).replace(str(place.parent / "config.json"), str(place), 1)) from None


def open_file(path: Path, config: Mapping[str, Any] | None = None) -> OpenFile:
    """Open a single file.

    Args:
        path: safetensors or GGUF.
        config: of its model; None finds it by the shapes.

    Raises:
        BadCheckpoint: it is damaged, quantized in a format that is not read as 16 bit, of an unknown class, or not of
            this config.
        UnknownFamily: the config is of no family of ours.
    """
    every, metadata, types = _tensors(path)
    _refuse_quantized(path, metadata, every)
    named = named_tensors(path, every, None if config is None else config.get("_class_name"))
    if config is None:
        shapes = {name: tensor.shape for name, tensor in named.tensors.items() if not _is_known(named, name)}
        config = config_of(str(path), named.table, shapes, named.name_in_file)
    family = family_of(config)
    state = family.state(config)
    layout = named.layout(state)
    _refuse_others(named, layout)
    found = {part.name: _taken(named, name, layout[name], part) for name in layout for part in layout[name].parts}
    return OpenFile(path, dict(config), {name: found[name] for name in state}, _description(named, types))


def _tensors(path: Path) -> tuple[Mapping[str, StoredTensor], Mapping[str, str], Mapping[str, int]]:
    """Return the tensors of a file, its metadata, and how many are of types that GGUF quantizes to."""
    if not path.is_file():
        raise BadCheckpoint(f"{path} {what_it_lacks(path)}; expected a checkpoint")
    if gguf_file.is_gguf(path):
        tensors, types = gguf_file.tensors_in_gguf(path)
        return tensors, {}, types
    if path.suffix not in SUFFIXES and (kind := what_it_is(path)) is not None:
        raise BadCheckpoint(f"{path} {kind}")
    return tensors_in_file(path), metadata_in_file(path), {}


def _refuse_quantized(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a file with weights in four bits, or in a format that is no plain cast to FP8."""
    coded = next((name for name, one in tensors.items() if _is_coded(name, one, tensors)), None)
    if coded is not None:
        layout = recognised({}, metadata, tensors)
        raise QuantizedAlready(
            f"{path} is quantized already ({coded} is {tensors[coded].dtype}, in the layout of {layout.name}); "
            "expected a file in 16 bit or FP8"
        )


def _is_coded(name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]) -> bool:
    path, _, leaf = name.rpartition(".")
    if leaf in ("qweight", "weight_packed", "pre_quant_scale"):
        return True
    if leaf != "weight" or stored.dtype not in ("U8", "I8", *cast_fp8.FP8):
        return False
    scale = tensors.get(f"{path}.weight_scale")
    of_blocks = {scale.dtype for kind in FORMATS.values() for scale in kind.scales if scale.block is not None}
    return stored.dtype in ("U8", "I8") or (scale is not None and scale.dtype in (*of_blocks, "F8_E8M0"))


def named_tensors(path: Path, tensors: Mapping[str, StoredTensor], class_name: str | None = None) -> NamedTensors:
    """Find which class of models a file holds, and under whose names.

    Args:
        path: the file, for messages.
        tensors: all that it holds; of quantized linears the weights at least.
        class_name: of diffusers, where it is known.

    Raises:
        BadCheckpoint: of none that is known, or of another than the config's.
    """
    candidates = [
        NamedTensors(path, table, prefix, diffusers or not table.names, inside, others)
        for diffusers in (False, True)
        for prefix in PREFIXES
        for inside, others in [_parted(tensors, prefix)]
        for table in SINGLE_FILES.values()
        if _is_of(table, inside, diffusers)
    ]
    wanted = [named for named in candidates if SINGLE_FILES.get(class_name or "") in (None, named.table)]
    if wanted:
        return wanted[0]
    if candidates:
        found = _class_of(candidates[0].table)
        raise BadCheckpoint(
            f"{path} holds a {found}, and its config (--like, or the config.json beside it) is of a {class_name}; take "
            "that of this model"
        )
    some = ", ".join(shortened(name) for name in list(tensors)[:3])
    raise BadCheckpoint(
        f"{path} holds {len(tensors)} tensors ({some} ...), under the names of no model that is known; expected one "
        f"of: {', '.join(SINGLE_FILES)}"
    )


def _parted(tensors: Mapping[str, StoredTensor], prefix: str) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return the tensors behind a prefix, without it, and the names of the others."""
    inside = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
    return inside, tuple(name for name in tensors if not name.startswith(prefix))


def _is_of(table: SingleFile, tensors: Collection[str], diffusers: bool) -> bool:
    """Return whether names are those of a class of models, the publisher's or diffusers'."""
    if not diffusers:  # what Chroma's key names has the same name in diffusers
        common = (
            *(name for name, _ in table.sizes.values()),
            *(one.replace("*", "0") for one in table.counts.values()),
        )
        renamed = (table.place_of(name)[0] for name in common if table.place_of(name)[0] != name)
        return table.key in tensors and any(name in tensors for name in renamed)
    return all(name in tensors for name, _ in table.sizes.values()) and any(
        table.place_of(name)[0] == table.key for name in tensors
    )


def _class_of(table: SingleFile) -> str:
    return next(name for name, known in SINGLE_FILES.items() if known is table)


def _refuse_others(named: NamedTensors, layout: Mapping[str, Original]) -> None:
    """Refuse a file that lacks a tensor of the model, has it in another shape, or has one that is not the model's."""
    where = str(named.path)
    for name, original in layout.items():
        stored = named.tensors.get(name)
        if stored is None or not original.is_stored_as(stored.shape):
            has = "lacks" if stored is None else f"has {list(stored.shape)} in"
            raise BadCheckpoint(
                f"{where} {has} {named.prefix}{name}, which is {list(original.shape)} in the model of this config; "
                "give the config.json of its diffusers model with --like"
            )
    for name in named.tensors:
        if name not in layout and not _is_known(named, name):
            raise BadCheckpoint(
                f"{where} holds {shortened(named.prefix + name)}, which is no tensor of the model; take the file of "
                "the transformer alone, or the config that belongs to it with --like"
            )


def _is_known(named: NamedTensors, name: str) -> bool:
    """Return whether a tensor is none of the model's, and is known to lie beside them."""
    of_others = not named.prefix and name.partition(".")[0] in _OTHER_MODELS
    return of_others or name.startswith(named.table.ignored) or cast_fp8.is_beside(name, named.tensors)


_OTHER_MODELS: Final = (
    "vae",
    "audio_vae",
    "first_stage_model",
    "text_encoders",
    "text_encoder",
    "cond_stage_model",
    "conditioner",
    "vocoder",
    "text_embedding_projection",
)
"""What the names of other models' tensors begin with, in a file that holds a whole pipeline."""


def _taken(named: NamedTensors, name: str, original: Original, part: Part) -> StoredTensor:
    """Return a tensor of diffusers as some rows of what lies in the file."""
    stored = named.tensors[name]
    if stored.dtype in cast_fp8.FP8:
        stored = cast_fp8.dequantized(name, named.tensors)
    if len(original.parts) == 1 and not part.swapped:
        return replace(stored, shape=part.shape)
    if stored.dtype not in DTYPE_BYTES:
        raise BadCheckpoint(f"{named.path}: {name} is stored as {stored.dtype}; expected BF16, F16, F32 or FP8")
    row = stored.nbytes // original.shape[0]
    count = part.shape[0] * row
    if isinstance(stored, MadeTensor):
        return _rows_of(stored, part)
    kind = SwappedTensor if part.swapped else StoredTensor
    return kind(stored.file, stored.dtype, part.shape, stored.offset + part.row * row, count)


def _rows_of(stored: MadeTensor, part: Part) -> MadeTensor:
    """Return some rows of a tensor that is made, its halves swapped where they are."""
    half = part.shape[0] // 2

    def rows(first: int, last: int) -> Any:
        if not part.swapped:
            return stored.rows(part.row + first, part.row + last)
        import numpy as np

        whole = stored.rows(part.row, part.row + part.shape[0]).reshape(part.shape[0], -1)
        return np.roll(whole, half, axis=0)[first:last].reshape(-1)

    raw = stored.source
    in_file = raw.nbytes // raw.shape[0]
    source = replace(raw, shape=part.shape, offset=raw.offset + part.row * in_file, nbytes=part.shape[0] * in_file)
    return MadeTensor.of(source, stored.dtype, part.shape, rows)


def _description(named: NamedTensors, types: Mapping[str, int]) -> str:
    dtypes: dict[str, int] = {}
    for stored in named.tensors.values():
        if stored.dtype in (*cast_fp8.FP8, "F16", "F32", "BF16") and not isinstance(stored, MadeTensor):
            dtypes[stored.dtype] = dtypes.get(stored.dtype, 0) + 1
    counted = ", ".join(f"{count} in {kind}" for kind, count in {**dtypes, **types}.items())
    made = [kind for kind in (*dtypes, *types) if kind not in ("F16", "F32", "BF16")]
    rounded = f"; what is in {', '.join(made)} is dequantized to BF16, with the loss that it has" if made else ""
    return f"{named.names}, {len(named.tensors)} tensors ({counted}){rounded}"
