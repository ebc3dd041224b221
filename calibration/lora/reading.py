"""LoRA files: every key is accounted for, every module found in the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from calibration.lora.adapter import Adapter, Added, Replaced, Rows, Tensors
from calibration.lora.keys import LYCORIS, PREFIXES, TEXT, role_of, unsupported
from calibration.lora.lycoris import KINDS, Lycoris
from calibration.lora.names import Module, names_of
from calibration.lora.pairs import Alpha, Pair
from calibration.lora.peft_config import PeftConfig, peft_config_of
from calibration.lora.shapes import fits
from fp4trt.errors import BadLora
from fp4trt.families import Family
from fp4trt.safetensors_file import StoredTensor, tensors_in_file
from fp4trt.single_files.names import Original, Part
from fp4trt.single_files.tables import SINGLE_FILES

__all__ = ["Change", "LoraFile", "read_lora"]

_FOLDED: Final = ("QwenImageTransformer2DModel", "WanTransformer3DModel", "ZImageTransformer2DModel")
"""Classes for which diffusers folds alpha into the factors whatever they are called, and not only kohya's."""

_SPARSE: Final = ("FluxTransformer2DModel", "Flux2Transformer2DModel")
"""Classes for which diffusers takes a block-diagonal LoRA of kohya's naming apart."""

_BAKED: Final = ("Flux2Transformer2DModel", "ZImageTransformer2DModel")
"""Classes for which diffusers loads LoKr."""

_COPIED: Final = "ZImageTransformer2DModel"
"""Class of which files of some trainers hold a fused module besides its parts, which diffusers leaves out."""

_PADDED: Final = ("FluxTransformer2DModel", "x_embedder.weight")
"""Class and tensor that may have more columns than a LoRA: one of FLUX.1-dev's on Fill or on Control."""

_IN_DTYPE: Final = ("lora_transformer_", "FluxTransformer2DModel")
"""Prefix and class for which diffusers divides alpha by the rank in alpha's dtype, as it does for fused modules."""

_KOHYA: Final = ".lora_down.weight"
_OF_BIAS: Final = {"diff_b", "b_norm", "up_bias"}
_ASIDE: Final = {"alpha", "reshape_weight"}
"""Roles that go with every kind."""


@dataclass(frozen=True)
class Change:
    """What a file does to one tensor of diffusers.

    Attributes:
        adapter: what it does to the module's weight, or to its bias.
        original: that weight or bias, and the tensors of diffusers that it is made of.
        index: which of them the tensor is, from 0.
    """

    adapter: Adapter
    original: Original
    index: int

    @property
    def rows(self) -> Rows:
        """The rows of the weight or bias that are the tensor."""
        sizes = tuple(part.shape[0] if part.shape else 1 for part in self.original.parts)
        begin = sum(sizes[: self.index])
        return Rows(begin, begin + sizes[self.index], self.index, sizes)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file, read against a model; of its tensors only the headers are read.

    Attributes:
        path: of the file.
        changes: name of a tensor of diffusers to what is done to it, in order.
        kinds: kind of change to the number of weights and biases that it is done to.
        left_out: beginning of the keys that belong to no transformer, to their number.
    """

    path: Path
    changes: Mapping[str, tuple[Change, ...]]
    kinds: Mapping[str, int]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class _Found:
    """A module of a file: what its keys begin with, what it is in the model, and its tensors."""

    prefix: str
    module: Module
    tensors: Tensors

    @property
    def roles(self) -> frozenset[str]:
        return frozenset(self.tensors.stored)

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.tensors.stored.values()]


@dataclass(frozen=True)
class _Placed:
    """An adapter, the weight or bias that it is for, what messages call it, and whether the shapes fit."""

    adapter: Adapter
    original: Original
    kind: str
    fits: bool


def read_lora(path: Path, family: Family, config: Mapping[str, Any]) -> LoraFile:
    """Read a LoRA file against a model.

    Args:
        path: a safetensors file in any of the namings and kinds of ``docs/lora.md``.
        family, config: of the model.

    Raises:
        BadLora: the file is of another model, of a kind that is not fused, or has a key that nothing is known of.
        BadCheckpoint: it is missing, damaged, or not safetensors.
    """
    stored = tensors_in_file(path)
    given = peft_config_of(path)
    found, left_out, strangers = _sorted_out(path, stored, family, config)
    placed = {text: list(_adapters(each, family.class_name, given)) for text, each in found.items()}
    misfits = [each for text, each in found.items() if not all(one.fits for one in placed[text])]
    strangers += [f"{key} (its shape is not that of {_told(each.module)})" for each in misfits for key in each.keys]
    _refuse_strangers(path, family, len(stored) - sum(left_out.values()), strangers)
    changes = _changes(path, family.class_name, found, placed, left_out)
    kinds = Counter(one.kind for each in placed.values() for one in each)
    return LoraFile(path, changes, dict(kinds), dict(left_out))


def _sorted_out(
    path: Path, stored: Mapping[str, StoredTensor], family: Family, config: Mapping[str, Any]
) -> tuple[dict[str, _Found], Counter[str], list[str]]:
    """Return the modules by their names in the file, the keys that are none of the model's, and those of no use."""
    names = names_of(family, config)
    table = SINGLE_FILES.get(family.class_name)
    ignored = table.ignored if table is not None else ()
    places: dict[str, tuple[str, Module] | None] = {}
    groups: dict[str, dict[str, tuple[str, StoredTensor]]] = {}
    left_out, strangers = Counter[str](), []
    for key, tensor in stored.items():
        if (text := TEXT.match(key)) is not None:
            left_out[text[1]] += 1
            continue
        module, role = role_of(key) or (key.removesuffix(".weight"), "value")
        if module not in places:
            places[module] = _place(names, module)
        if places[module] is None:
            if (kind := unsupported(key)) is not None:
                raise BadLora(f"{path}: {key} is a tensor of {kind}; fp4trt fuses no such change")
            if outside := next((name for name in ignored if name in key), None):
                left_out[outside] += 1
            else:
                strangers.append(key)
        elif role in groups.setdefault(module, {}):
            raise BadLora(f"{path}: {key} and {groups[module][role][0]} are one tensor of two LoRAs; expected one LoRA")
        else:
            groups[module][role] = key, tensor
    found = {name: _Found(*place, Tensors(path, groups[name])) for name, place in places.items() if place is not None}
    return found, left_out, strangers


def _place(names: Mapping[str, Module], text: str) -> tuple[str, Module] | None:
    """Return the prefix of a module's name in a file, and the module; None where the model has none of this name."""
    for prefix in PREFIXES:
        if text.startswith(prefix):
            module = names.get(text.removeprefix(prefix).replace(".", "_"))
            if module is not None:
                return prefix, module
    return None


def _refuse_strangers(path: Path, family: Family, keys: int, strangers: Sequence[str]) -> None:
    if not keys:
        raise BadLora(f"{path} changes nothing of a transformer; expected a LoRA of {family.class_name}")
    if len(strangers) * 2 > keys:
        raise BadLora(
            f"{path} is a LoRA of another model: {keys - len(strangers)} of its {keys} keys fit this "
            f"{family.class_name}, and {strangers[0]} does not; give one that was trained on this model"
        )
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        raise BadLora(
            f"{path}: {strangers[0]}{more}, of {keys} keys, fit nothing of this {family.class_name}; take what is "
            f"not the model's out of the file"
        )


def _told(module: Module) -> str:
    return f"{module.name} {list(module.weight.shape)}"


def _adapters(found: _Found, class_name: str, given: PeftConfig | None) -> Iterator[_Placed]:
    """Yield what a module's tensors do to its weight and to its bias.

    Raises:
        BadLora: some are not there, or do not go together.
    """
    tensors, module = found.tensors, found.module
    weight = None  # judged first, as the bias' scale is that of a whole pair
    if found.roles - _OF_BIAS - _ASIDE or not found.roles & _OF_BIAS:
        weight = _of_weight(found, class_name, given)
    for role in sorted(found.roles & _OF_BIAS):
        if module.bias is None:
            key = tensors.stored[role][0]
            raise BadLora(f"{tensors.path}: {key} changes the bias of {module.name}, which has none in this model")
        if role == "up_bias" and "down" not in tensors:
            raise BadLora(f"{tensors.path}: {tensors.stored[role][0]} is the bias of a pair that is not there")
        scale = _scale_of_bias(found, given) if role == "up_bias" else 1.0
        yield _Placed(Added(tensors, role, scale), module.bias, "bias", fits(role, tensors, module.bias.shape))
    if weight is not None:
        yield weight


def _scale_of_bias(found: _Found, given: PeftConfig | None) -> float:
    """Return what peft multiplies the bias of ``lora_B`` by, which is what it multiplies the product by."""
    if "alpha" in found.tensors:
        return found.tensors.number("alpha") / found.tensors.shape("down")[0]
    alpha, rank = given.of(found.module.name) if given is not None else (1.0, 1.0)
    return alpha / rank


def _of_weight(found: _Found, class_name: str, given: PeftConfig | None) -> _Placed:
    """Return what a module's tensors do to its weight.

    Raises:
        BadLora: some are not there, or do not go together.
    """
    kind = _kind(found, class_name)
    needed, optional = _KINDS.get(kind, (((kind,),), ()))
    roles = found.roles - _OF_BIAS - _ASIDE
    if not any(roles.issuperset(one) and roles <= {*one, *optional} for one in needed):
        keys = ", ".join(key for role, (key, _) in found.tensors.stored.items() if role in roles) or found.keys[0]
        expected = " or ".join(" + ".join(one) for one in needed)
        raise BadLora(f"{found.tensors.path}: {keys}: expected {expected} of {found.module.name}; take another copy")
    original = found.module.weight
    tensors, shape = found.tensors, original.shape
    _refuse_other_model(found)
    padded = (class_name, original.parts[0].name) == _PADDED
    fit = fits(kind, tensors, shape, padded)
    own = given.of(found.module.name) if given is not None and "alpha" not in tensors else None
    if kind == "pair":
        kohya = tensors.stored["down"][0].endswith(_KOHYA)
        apart = kohya and class_name in _SPARSE and len(original.parts) > 1
        in_dtype = apart or (found.prefix, class_name) == _IN_DTYPE
        alpha = Alpha(folded=kohya or class_name in _FOLDED, in_dtype=in_dtype, given=own)
        pair = Pair(tensors, alpha, sparse=apart, padded=padded)
        return _Placed(pair, original, "DoRA" if "magnitude" in tensors else "LoRA", fit)
    if kind in KINDS:
        name = KINDS[kind].name
        name = f"{name} with DoRA" if "dora_scale" in tensors else name
        return _Placed(Lycoris(kind, tensors, shape, own), original, name, fit)
    if kind in ("value", "set_weight"):
        return _Placed(Replaced(tensors, kind), original, "replaced", fit)
    return _Placed(Added(tensors, kind), original, "full", fit)


def _kind(found: _Found, class_name: str) -> str:
    """Return ``pair``, a key of :data:`KINDS`, or the role of a tensor that is added to the weight or replaces it."""
    roles = found.roles
    if "value" in roles:
        return "ia3" if "on_input" in roles else "value"
    if role := next((role for role in ("set_weight", "diff", "w_norm") if role in roles), None):
        return role
    if "oft_blocks" in roles:
        return "boft" if len(found.tensors.shape("oft_blocks")) == 4 else "oft"
    if "a1" in roles:
        return "glora"
    if any(role.startswith("hada") for role in roles):
        return "loha"
    if any(role.startswith("lokr") for role in roles):
        return "baked_lokr" if class_name in _BAKED and "dora_scale" not in roles else "lokr"
    return "locon" if found.prefix == LYCORIS or roles & {"dora_scale", "mid"} else "pair"


_KINDS: Final = {
    "pair": ((("down", "up"),), ("magnitude",)),
    **{name: (kind.needed, kind.optional) for name, kind in KINDS.items()},
}
"""Kind to the sets of roles of which a module has one, and the roles that it may have besides."""


def _refuse_other_model(found: _Found) -> None:
    """Refuse a change that is made for a model of another shape, or that replaces a matrix.

    Raises:
        BadLora: naming it.
    """
    tensors, module = found.tensors, found.module
    if "reshape_weight" in tensors:
        key, stored = tensors.stored["reshape_weight"]
        if (wanted := [int(size) for size in stored.tensor()]) != list(module.weight.shape):
            raise BadLora(f"{tensors.path}: {key} widens {_told(module)} to {wanted}; take the model of that shape")
    if "value" in tensors and "on_input" not in tensors and len(module.weight.shape) > 1:
        key = tensors.stored["value"][0]
        raise BadLora(f"{tensors.path}: {key} is a whole weight and no change of one; expected a LoRA")


def _changes(
    path: Path,
    class_name: str,
    found: Mapping[str, _Found],
    placed: Mapping[str, Sequence[_Placed]],
    left_out: Counter[str],
) -> dict[str, tuple[Change, ...]]:
    """Return name of a tensor of diffusers to what is done to it.

    Raises:
        BadLora: a file changes a weight under two names.
    """
    found_in: dict[str, dict[str, list[Change]]] = {}
    for text, adapters in placed.items():
        for one in adapters:
            for index, part in enumerate(one.original.parts):
                change = Change(one.adapter, one.original, index)
                found_in.setdefault(part.name, {}).setdefault(text, []).append(change)
    copies = set[str]()
    for name, by_text in found_in.items():
        fused = {text for text in by_text if _is_copy(found[text].module.weight.parts, found_in)}
        if class_name == _COPIED and len(by_text) == len(fused) + 1:
            copies |= fused
        elif len(by_text) > 1:
            raise BadLora(f"{path} changes {name} under two names: {' and '.join(by_text)}; expected one")
    for text in copies:
        left_out["copies of parts: " + text] += len(found[text].keys)
    kept = {
        name: tuple(change for text, done in by_text.items() if text not in copies for change in done)
        for name, by_text in found_in.items()
    }
    return {name: done for name, done in kept.items() if done}


def _is_copy(parts: Sequence[Part], found_in: Mapping[str, Mapping[str, object]]) -> bool:
    """Return whether each of a fused module's parts is changed under its own name too."""
    return len(parts) > 1 and all(len(found_in.get(part.name, {})) > 1 for part in parts)
