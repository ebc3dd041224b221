"""Peft's own config of an adapter: in the header of a file that diffusers saved, or in a file beside peft's.

It tells alpha and rank where a file has no tensors of alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadLora
from fp4trt.json_file import load_json
from fp4trt.safetensors_file import metadata_in_file

__all__ = ["PeftConfig", "peft_config_of"]

_FILE: Final = "adapter_model.safetensors"
_BESIDE: Final = "adapter_config.json"
_HEADER: Final = "lora_adapter_metadata"
_PREFIX: Final = "transformer."
_TYPES: Final = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class PeftConfig:
    """What scales an adapter's products.

    Attributes:
        alpha, rank: of all modules that have none of their own.
        alphas, ranks: pattern of a module's name to its own, as :func:`re.match` reads it.
        by_root: whether alpha is divided by the root of the rank.
    """

    alpha: float
    rank: float
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def of(self, module: str) -> tuple[float, float]:
        """Return alpha of a module, and what it is divided by."""
        rank = _matching(self.ranks, module, self.rank)
        return _matching(self.alphas, module, self.alpha), math.sqrt(rank) if self.by_root else rank


def _matching(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def peft_config_of(path: Path) -> PeftConfig | None:
    """Return the config that belongs to a LoRA file, None where it has none.

    Raises:
        BadLora: it is damaged, or that of an adapter of another kind.
    """
    beside = path.parent / _BESIDE
    if path.name == _FILE and beside.is_file():
        found = load_json(beside, "the config of a peft adapter", BadLora)
        kind = found.get("peft_type", "LORA")
        if kind not in _TYPES:
            raise BadLora(f"{beside}: peft_type is {kind!r}; fp4trt fuses {', '.join(_TYPES)}")
        return _config(found, str(beside))
    text = metadata_in_file(path).get(_HEADER)
    if not text:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadLora(f"{path}: {_HEADER} of its header is not JSON ({error}); save the LoRA again") from None
    if not isinstance(found, dict):
        raise BadLora(f"{path}: {_HEADER} of its header is no object; save the LoRA again")
    own = {key.removeprefix(_PREFIX): value for key, value in found.items() if key.startswith(_PREFIX)}
    return _config(own or found, f"{path}: {_HEADER}")


def _config(values: Mapping[str, Any], where: str) -> PeftConfig:
    alpha = values.get("lora_alpha", values.get("alpha"))
    try:
        config = PeftConfig(
            _number(alpha),
            _number(values.get("r")),
            {key: _number(value) for key, value in (values.get("alpha_pattern") or {}).items()},
            {key: _number(value) for key, value in (values.get("rank_pattern") or {}).items()},
            bool(values.get("use_rslora")),
        )
        for pattern in (*config.alphas, *config.ranks):
            re.compile(pattern)
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise BadLora(f"{where} has no usable r, lora_alpha, rank_pattern and alpha_pattern ({error})") from None
    if min(config.rank, *config.ranks.values(), 1) <= 0:
        raise BadLora(f"{where} has a rank that is not positive")
    return config


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number")
    return value
