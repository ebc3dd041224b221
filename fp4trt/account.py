"""What every tensor of a quantized checkpoint means, from its headers and its config alone.

Each tensor is the plain model's own, or belongs to a linear or an attention of it, or is refused by name: nothing is
passed over. All verbs read a quantized checkpoint through this, so that they give one answer.

For a linear X, in or outside the family's own selection: codes ``X.weight`` and scales as
:mod:`fp4trt.number_formats` has them for each format; or a weight in 16 or 32 bit. With any of them
``X.pre_quant_scale`` [K] and ``X.svdquant_lora_a`` [rank, K] with ``X.svdquant_lora_b`` [N, rank]. For an attention A
in FP8 the F32 scalars ``A.q_scale``, ``A.k_scale``, ``A.v_scale`` and, where its output is rounded too,
``A.output_scale``; or ModelOpt's amax of the same. Source: ModelOpt 0.47's unified export.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from fp4trt.account_entries import UNQUANTIZED, Account, Format, StoredForm
from fp4trt.declared import declared_algorithms, require_declared
from fp4trt.errors import BadCheckpoint
from fp4trt.families import family_of
from fp4trt.layouts import refuse_foreign_layout
from fp4trt.number_formats import FORMATS, PLAIN, NumberFormat, StoredScale, stored_format

__all__ = [
    "ATTENTION_SCALES",
    "BMM_AMAX",
    "BRANCH",
    "OUTPUT_SCALE",
    "SCALES",
    "SCALE_LEAVES",
    "SMOOTHING",
    "Account",
    "Format",
    "StoredForm",
    "TensorHeader",
    "account_of",
    "is_quantized_checkpoint",
]

SCALES: Final[Mapping[Format, tuple[str, ...]]] = {name: kind.leaves for name, kind in FORMATS.items()}
"""What a linear of each format has beside its weight and bias."""

SMOOTHING: Final = "pre_quant_scale"
"""What one has besides where its input is scaled by channel, [K]."""

BRANCH: Final = ("svdquant_lora_a", "svdquant_lora_b")
"""What one has besides where a low-rank branch is added to its product, [rank, K] and [N, rank]."""

ATTENTION_SCALES: Final = ("q_scale", "k_scale", "v_scale")
"""What an attention in FP8 has: amax / 448 of query, key and value."""

OUTPUT_SCALE: Final = "output_scale"
"""What it has besides where what its second product gives is rounded to FP8 too."""

_LINEAR_SCALES: Final = frozenset(leaf for leaves in SCALES.values() for leaf in leaves)

SCALE_LEAVES: Final = _LINEAR_SCALES | {*ATTENTION_SCALES, OUTPUT_SCALE}
"""All that is a scale, in its own type; other tensors are in BF16 in a graph, or in FP32 if computed with so."""

BMM_AMAX: Final[Mapping[str, str]] = {
    "q_bmm_quantizer._amax": "q_scale",
    "k_bmm_quantizer._amax": "k_scale",
    "v_bmm_quantizer._amax": "v_scale",
    "bmm2_output_quantizer._amax": OUTPUT_SCALE,
}
"""What ModelOpt writes of an attention: the amax that makes each scale."""

_FLOAT: Final = tuple(PLAIN)
_CODES: Final = tuple(dict.fromkeys(kind.codes for kind in FORMATS.values()))


class TensorHeader(Protocol):
    """What a safetensors header says of a tensor."""

    @property
    def dtype(self) -> str:
        """Its type by the name there, such as ``F8_E4M3``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def is_quantized_checkpoint(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> bool:
    """Whether a checkpoint is not a plain one: by its config, or by a type or a scale that no plain one has."""
    if "quantization_config" in config:
        return True
    endings = tuple(f".{leaf}" for leaf in _LINEAR_SCALES)
    return any(name.endswith(endings) or tensor.dtype in _CODES for name, tensor in tensors.items())


def account_of(
    where: str,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    tensors: Mapping[str, TensorHeader],
    scalar: Callable[[str], float] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Account:
    """Return what every tensor of a quantized checkpoint means.

    Args:
        where: the checkpoint, for messages.
        config: its config.json.
        metadata: the ``__metadata__`` of its safetensors headers, merged.
        tensors: name to type and shape.
        scalar: name of a tensor of one element to its value; None leaves the values alone.
        manifest: its fp4trt.json; None without one.

    Raises:
        BadCheckpoint: naming a tensor that is absent, contradictory, or of no meaning here, and what to do; or the
            format of the whole where that is none that is read.
        UnknownFamily: the model is of no family of ours.
    """
    algorithms = declared_algorithms(where, config)
    refuse_foreign_layout(where, config, metadata, tensors)
    account = _Reader(where, config, tensors, scalar).account()
    require_declared(where, account, algorithms, manifest or {})
    return account


class _Reader:
    """One checkpoint while its tensors are accounted for."""

    def __init__(
        self,
        where: str,
        config: Mapping[str, Any],
        tensors: Mapping[str, TensorHeader],
        scalar: Callable[[str], float] | None,
    ) -> None:
        self.where, self.config, self.tensors, self.scalar = where, config, tensors, scalar
        self.family = family_of(config, where)
        self.state = self.family.state(config)
        self.meanings: dict[str, str] = {}

    def account(self) -> Account:
        linears = {path: self._linear(path, shape) for path, shape in self.family.linears(self.config).items()}
        attentions = {
            path: scales for path in self.family.fp8_attentions(self.config) if (scales := self._attention(path))
        }
        for name, shape in self.state.items():
            if name not in self.meanings:
                self._floating(name, shape, "of the model itself")
        self._refuse_unknown()
        groups = self.family.groups_of(self.config, tuple(linears))
        return Account(self.family, self.config, groups, self.state.keys(), linears, attentions, self.meanings)

    def _linear(self, path: str, shape: tuple[int, int]) -> StoredForm:
        name = f"{path}.weight"
        stored = self._required(name, "the weight of a linear")
        scale = self.tensors.get(f"{path}.weight_scale")
        kind = stored_format(stored.dtype, scale.dtype if scale is not None else None)
        if kind is not None:
            self._codes(path, shape, kind)
        elif stored.dtype not in _FLOAT:
            codes = {dtype: next(kind.title for kind in FORMATS.values() if kind.codes == dtype) for dtype in _CODES}
            listed = ", ".join(f"{dtype} ({title})" for dtype, title in codes.items())
            raise self._wrong(name, f"{listed}, {', '.join(_FLOAT[:-1])} or {_FLOAT[-1]}")
        elif stored.shape != shape:
            raise self._wrong(name, f"{list(shape)} by its config.json")
        else:
            self.meanings[name] = "a weight"
        form = kind.name if kind is not None else UNQUANTIZED
        return StoredForm(form, shape, self._branch(path, shape), self._smoothing(path, shape[1]))

    def _codes(self, path: str, shape: tuple[int, int], kind: NumberFormat) -> None:
        """Account for codes and scales of a quantized linear."""
        name, columns, wanted = f"{path}.weight", shape[1], kind.codes_shape(*shape)
        stored = self.tensors[name]
        if kind.block is not None and columns % kind.block:
            needs = f"{kind.title} needs a multiple of {kind.block} in-features, {path} has {columns}"
            raise self._wrong(name, f"16 bit: {needs}")
        if stored.shape != wanted:
            raise self._wrong(name, f"{list(wanted)} by its config.json")
        self.meanings[name] = f"{kind.title} codes"
        for scale in kind.scales:
            if f"{path}.{scale.leaf}" not in self.tensors:
                raise BadCheckpoint(
                    f"{self.where} lacks {path}.{scale.leaf}; expected {kind.title} codes, as {name} is "
                    f"{stored.dtype}, with all their scales: {' and '.join(kind.leaves)}"
                )
            if scale.block is not None:
                self._block_scales(f"{path}.{scale.leaf}", scale, shape, kind)
            else:
                self._scalar(f"{path}.{scale.leaf}", f"a scale of {kind.title}")

    def _block_scales(self, name: str, scale: StoredScale, shape: tuple[int, int], kind: NumberFormat) -> None:
        stored, wanted = self.tensors[name], scale.shape(*shape)
        if stored.dtype != scale.dtype or stored.shape != wanted:
            raise self._wrong(name, f"{scale.dtype}{list(wanted)}, the block scales of {kind.title}")
        self.meanings[name] = "block scales"

    def _scalar(self, name: str, meaning: str, dtypes: tuple[str, ...] = ("F32",)) -> None:
        stored = self._required(name, meaning)
        if stored.dtype not in dtypes or stored.shape not in ((), (1,)):
            raise self._wrong(name, f"one {dtypes[0]} for the whole tensor, {meaning}")
        value = self.scalar(name) if self.scalar is not None else 1.0
        if not 0 < value < float("inf"):
            raise BadCheckpoint(
                f"{name} is {value:g} in {self.where}; expected a finite number above zero: calibrate again"
            )
        self.meanings[name] = meaning

    def _smoothing(self, path: str, columns: int) -> bool:
        name = f"{path}.{SMOOTHING}"
        if name not in self.tensors:
            return False
        self._floating(name, (columns,), "what the input of a linear is multiplied by")
        return True

    def _branch(self, path: str, shape: tuple[int, int]) -> int:
        names = [f"{path}.{leaf}" for leaf in BRANCH]
        found = [name for name in names if name in self.tensors]
        if not found:
            return 0
        if len(found) == 1:
            (absent,) = set(names) - set(found)
            raise BadCheckpoint(
                f"{self.where} has half of the branch of {path}: {found[0]}, and no {absent}; copy it again"
            )
        sizes = self.tensors[names[0]].shape
        rank = sizes[0] if len(sizes) == 2 else 0
        if rank < 1:
            raise self._wrong(names[0], f"[rank, {shape[1]}] in 16 or 32 bit")
        for name, wanted in zip(names, ((rank, shape[1]), (shape[0], rank)), strict=True):
            self._floating(name, wanted, "a factor of a low-rank branch")
        return rank

    def _attention(self, path: str) -> dict[str, str]:
        """Return scale to tensor of an attention in FP8, nothing of one in 16 bit."""
        leaves = (*ATTENTION_SCALES, OUTPUT_SCALE)
        ours = {leaf: f"{path}.{leaf}" for leaf in leaves if f"{path}.{leaf}" in self.tensors}
        theirs = {scale: f"{path}.{leaf}" for leaf, scale in BMM_AMAX.items() if f"{path}.{leaf}" in self.tensors}
        if ours and theirs:
            name = next(iter(theirs.values()))
            raise BadCheckpoint(f"{self.where} has {name} besides {next(iter(ours.values()))}; keep one of them")
        found = ours or theirs
        for scale in ATTENTION_SCALES if found else ():
            if scale not in found:
                leaf = scale if ours else next(leaf for leaf, made in BMM_AMAX.items() if made == scale)
                raise BadCheckpoint(
                    f"{self.where} has nothing as {path}.{leaf}, though it has {next(iter(found.values()))}; expected "
                    "those of query, key and value for an attention in FP8: quantize again"
                )
        if theirs:
            self._require_fp8_cache(theirs["q_scale"])
        for name in found.values():
            self._scalar(name, "a scale of attention" if ours else "an amax of attention", ("F32",) if ours else _AMAX)
        return found

    def _require_fp8_cache(self, name: str) -> None:
        """Require that the quantizers of attention are FP8: the amax alone does not say so, the config's entry does."""
        scheme = self.config.get("quantization_config", {}).get("kv_cache_scheme")
        is_fp8 = isinstance(scheme, Mapping) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
        if not is_fp8:
            raise BadCheckpoint(
                f"{self.where} has {name}, and its quantization_config has kv_cache_scheme {scheme!r}; expected FP8 "
                "attention, 8 bits of type float: quantize attention to FP8 or not at all"
            )

    def _floating(self, name: str, shape: tuple[int, ...], meaning: str) -> None:
        stored = self._required(name, meaning)
        if stored.dtype not in _FLOAT or stored.shape != shape:
            raise self._wrong(name, f"{list(shape)} in BF16, F16 or F32, {meaning}")
        self.meanings[name] = meaning

    def _required(self, name: str, meaning: str) -> TensorHeader:
        if name not in self.tensors:
            strangers = [
                key for key in self.tensors if key not in self.state and key.rpartition(".")[2] not in SCALE_LEAVES
            ]
            near = difflib.get_close_matches(name, strangers, 1, 0.9)
            hint = f"is it {near[0]}" if near else "is config.json the one of these weights"
            raise BadCheckpoint(f"{self.where} lacks {name}, {meaning}; {hint}? Copy the files again")
        return self.tensors[name]

    def _wrong(self, name: str, expected: str) -> BadCheckpoint:
        stored = self.tensors[name]
        return BadCheckpoint(
            f"{name} is {stored.dtype}{list(stored.shape)} in {self.where}; expected {expected}: quantize again"
        )

    def _refuse_unknown(self) -> None:
        for name in self.tensors:
            if name in self.meanings:
                continue
            path, _, leaf = name.rpartition(".")
            stored, linear = self.tensors[name], self.tensors.get(f"{path}.weight")
            told = f"{self.where} has {name}, {stored.dtype}{list(stored.shape)}, "
            if linear is not None and f"{path}.weight" in self.state and leaf in _LINEAR_SCALES:
                raise BadCheckpoint(
                    f"{told}but {path}.weight is {linear.dtype}, which has no such scale; expected both of one format: "
                    "quantize again"
                )
            attentions, leaves = self.family.attentions(self.config), (*ATTENTION_SCALES, OUTPUT_SCALE, *BMM_AMAX)
            if masked := next((each for each in attentions if name.removeprefix(f"{each}.") in leaves), None):
                raise BadCheckpoint(
                    f"{told}as attention in FP8 has, and {masked} has a mask, which FP8 does not take: leave that in "
                    "16 bit"
                )
            raise BadCheckpoint(
                f"{told}which nothing here reads, and without it this is another model; expected the tensors of "
                f"{self.family.class_name} and what {_TITLES} add to them: quantize again without it"
            )


_TITLES: Final = " and ".join(kind.title for kind in FORMATS.values())
_AMAX: Final = ("F32", "BF16", "F16")
