"""What a checkpoint's config.json, and a quantized one's fp4trt.json, say that it holds, held against what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from fp4trt.account_entries import UNQUANTIZED, Account
from fp4trt.errors import BadCheckpoint
from fp4trt.layouts import MODELOPT_ALGORITHMS
from fp4trt.number_formats import FORMATS, NVFP4

__all__ = ["declared_algorithms", "require_declared", "require_shapes"]

Shapes = Mapping[str, tuple[int, ...]]
"""Name of each tensor to its shape."""

Algorithms = Mapping[str, str | None]
"""Module path to what ModelOpt calls its format; the empty path stands for all others."""

_CALLED: Final[Mapping[str, str]] = {
    "W4A16_NVFP4": "weight-only NVFP4",
    "W4A8_NVFP4_FP8": "NVFP4 weights with FP8 activations",
    "W4A8_MXFP4_FP8": "MXFP4 weights with FP8 activations",
    "MXFP4": "MXFP4",
    "W8A8_SQ_PER_CHANNEL": "INT8 SmoothQuant",
    "W8A16": "weight-only INT8",
    "W4A16_AWQ": "weight-only INT4 AWQ",
    "W4A8_AWQ": "INT4 AWQ weights with FP8 activations",
    "FP8_PER_CHANNEL_PER_TOKEN": "FP8 per channel and token",
    "FP8_PB_WO": "weight-only FP8 in blocks",
}
_BY_ALGORITHM: Final = {kind.modelopt["algorithm"]: name for name, kind in FORMATS.items()}
"""ModelOpt's algorithm to the format of its weights; its variants of NVFP4 are not listed."""
_ADVICE: Final = "quantize the 16-bit checkpoint with fp4trt quantize, or with ModelOpt's NVFP4 or FP8 configs"


def declared_algorithms(where: str, config: Mapping[str, Any]) -> dict[str, str | None]:
    """Return module path to what the config says to be its format; the empty path stands for all others.

    Raises:
        BadCheckpoint: it says so in another form than ModelOpt's, or names a format that is not read.
    """
    described = config.get("quantization_config", {})
    layers = described.get("quantized_layers") or {} if isinstance(described, Mapping) else None
    if not isinstance(layers, Mapping) or not all(isinstance(layer, Mapping) for layer in layers.values()):
        raise BadCheckpoint(
            f"{where}: quantization_config is {described!r}, expected ModelOpt's: copy config.json again"
        )
    whole = described.get("quant_algo")
    named = {"": None if whole == "MIXED_PRECISION" else whole}
    named |= {str(path): layer.get("quant_algo") for path, layer in layers.items()}
    read = [name for name in MODELOPT_ALGORITHMS if name != "MIXED_PRECISION"]
    for path, name in named.items():
        if name is not None and name not in read:
            called = f" ({_CALLED[known]})" if (known := str(name).upper()) in _CALLED else ""
            raise BadCheckpoint(
                f"{f'{path} in {where}' if path else where} is quantized to {name}{called}, says its "
                f"quantization_config; expected one of {', '.join(read)}: {_ADVICE}"
            )
    return named


def require_declared(where: str, account: Account, algorithms: Algorithms, manifest: Mapping[str, Any]) -> None:
    """Require what the config says of each linear's format, and what the manifest promises.

    Args:
        where: the checkpoint, for messages.
        account: what it holds.
        algorithms: as :func:`declared_algorithms` gives them.
        manifest: its fp4trt.json, empty without one.

    Raises:
        BadCheckpoint: naming what is missing, or of another format.
    """
    _require_formats(where, account, algorithms)
    _require_smoothing(where, account, algorithms, manifest)
    _require_promise(where, account, manifest)


def _require_formats(where: str, account: Account, algorithms: Algorithms) -> None:
    """Require the format of each linear, the branch of what SVDQuant made, and the scaled input of what AWQ made."""
    for path, form in account.linears.items():
        algorithm = algorithms.get(path, algorithms[""])
        says = _BY_ALGORITHM.get(str(algorithm), NVFP4.name) if algorithm else None
        certain = path in algorithms or says != NVFP4.name  # of a whole in NVFP4 some linears may be in FP8
        if certain and form.format != UNQUANTIZED and says not in (None, form.format):
            raise BadCheckpoint(
                f"{where} has {path}.weight in {form.format.upper()}, but its quantization_config says {algorithm}; "
                "take the config.json of these weights"
            )
        lacks = {"NVFP4_SVD": not form.rank, "NVFP4_AWQ": not form.smoothed}
        if form.format == NVFP4.name and lacks.get(str(algorithm), False):
            leaf = "svdquant_lora_a" if algorithm == "NVFP4_SVD" else "pre_quant_scale"
            raise BadCheckpoint(
                f"{where} lacks {path}.{leaf}; its quantization_config says that the linear is {algorithm}: copy the "
                "files again"
            )


def _require_smoothing(where: str, account: Account, algorithms: Algorithms, manifest: Mapping[str, Any]) -> None:
    """Require the scaled inputs of what SVDQuant made: without them the stored weights are noise.

    ModelOpt scales the input of every linear; ours leaves out those that read one vector, and a recipe, which the
    manifest has, may leave out all; training keeps those that it starts from. A state of ModelOpt's says itself which
    it has.
    """
    training = manifest.get("training")
    recipe = training.get("start") if isinstance(training, Mapping) else manifest.get("recipe")
    method = recipe.get("method") if isinstance(recipe, Mapping) else None
    options = method if isinstance(method, Mapping) else {}
    if manifest and (options.get("name") != "svdquant" or options.get("smoothing") is False):
        return
    forms = {path: form for path, form in account.linears.items() if form.format == NVFP4.name}
    made = [path for path in forms if algorithms.get(path, algorithms[""]) == "NVFP4_SVD"]
    chosen = set(account.family.quantized(account.config))
    vectors = {path for path in made if path in chosen and not account.family.stream(path)}
    like = next((f", as {path} has one" for path in made if path in vectors and forms[path].smoothed), "")
    for path in made:
        if not forms[path].smoothed and (like or path not in vectors):
            raise BadCheckpoint(
                f"{where} lacks {path}.pre_quant_scale{like if path in vectors else ''}; SVDQuant made the linear, "
                "says its quantization_config, and its weight is of a scaled input: copy the files again"
            )


def _require_promise(where: str, account: Account, manifest: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks what its manifest promises."""
    promised = manifest.get("quantized", {})
    for kind, name, found in (
        *((name, f"{kind.title} weights", account.of_format(name)) for name, kind in FORMATS.items()),
        ("svdquant", "low-rank branch", tuple(path for path in account.altered if account.linears[path].rank)),
    ):
        for path in promised.get(kind, []):
            if path not in found:
                raise BadCheckpoint(f"{where} has no {name} for {path}, which its fp4trt.json promises; quantize again")
    for path in manifest.get("attention", {}).get("fp8", []):
        if path not in account.attentions:
            raise BadCheckpoint(
                f"{where} has nothing as {path}.q_scale; expected an F32 scalar, as {path} is in FP8 by its "
                "fp4trt.json: quantize again"
            )


def require_shapes(where: str, wanted: Shapes, found: Shapes) -> None:
    """Require that a plain checkpoint holds the tensors of the model that its config describes, and no others.

    Args:
        where: the checkpoint, for messages.
        wanted: of the model.
        found: of the checkpoint.

    Raises:
        BadCheckpoint: naming the first tensor, by the alphabet, that is absent, superfluous or of another shape.
    """
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise BadCheckpoint(
                f"{name} is {_shape(found.get(name))} in {where}, {_shape(wanted.get(name))} by its config.json; take "
                "the config.json of these weights"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
