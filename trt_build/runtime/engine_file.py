"""An engine's file, and all that keeps it from running here, said in one line before it is loaded.

What tells: the JSON that ``fp4trt build`` wrote beside it, and TensorRT's own look at the file's header. Without a GPU
that says only whether it is one (measured with TensorRT-RTX 1.7.1); with one, whether version, compute capability,
driver and memory fit.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BackendMissingError, BadEngine
from fp4trt.file_kind import is_file, what_it_is, what_it_lacks
from fp4trt.json_file import load_json
from fp4trt.progress import note
from trt_build.manifest import manifest_path, read_manifest
from trt_build.runtime.card import Card
from trt_build.signature import Signature, signature_in

__all__ = ["EngineFile", "backend_of", "require_fit", "require_valid"]

_RTX: Final = "tensorrt_rtx"
_TITLES: Final = {_RTX: "TensorRT for RTX", "tensorrt": "TensorRT"}
_EXTRAS: Final = {_RTX: "rtx", "tensorrt": "tensorrt"}
_RTX_MAGIC: Final = b"vtrt"
"""First bytes of an engine of TensorRT for RTX. Measured."""

_END: Final = 1 << 20

_REASONS: Final = {
    "VERSION_MISMATCH": "it was built with another version than {version}: build it again",
    "UNSUPPORTED_CC": "it was not built for {card} ({capability}): build it with --gpu for that",
    "OLD_CUDA_DRIVER": "the driver is too old: install a newer one",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old: install a newer TensorRT",
    "INSUFFICIENT_GPU_MEMORY": "it does not fit into the free memory of {card}: free some, or build it with "
    "--weight-streaming and give a budget",
    "MALFORMED_ENGINE": "it is damaged, or of another version than {version}: build it again",
    "CUDA_ERROR": "CUDA is not installed correctly",
}
"""TensorRT's diagnosis to what it means here."""


@dataclass(frozen=True)
class EngineFile:
    """An engine and what is known of it from outside.

    Attributes:
        path: of the engine.
        manifest: what ``fp4trt build`` wrote beside it; empty for an engine of another program's.
        backend: the module that runs it: ``tensorrt_rtx`` or ``tensorrt``.
    """

    path: Path
    manifest: dict[str, Any]
    backend: str

    @classmethod
    def at(cls, path: Path) -> EngineFile:
        """Return the engine at a path.

        Raises:
            BadEngine: there is none, it is not the one that its JSON tells of, or that is damaged.
        """
        if not is_file(path):
            raise BadEngine(f"{path} {what_it_lacks(path)}; expected an engine of fp4trt build")
        if kind := what_it_is(path):
            raise BadEngine(f"{path} {kind}")
        manifest = read_manifest(path) or _not_ours(manifest_path(path))
        size = path.stat().st_size
        if manifest and manifest.get("engine_bytes") != size:
            raise BadEngine(
                f"{path} has {size} bytes, and {manifest_path(path).name} tells of {manifest.get('engine_bytes')}: it "
                "is cut off or another engine; copy both again, or build it again"
            )
        backend = _asked(manifest, "backend", "")
        if backend not in _TITLES:
            with path.open("rb") as file:
                backend = _RTX if file.read(len(_RTX_MAGIC)) == _RTX_MAGIC else "tensorrt"
        return cls(path, manifest, backend)

    @property
    def title(self) -> str:
        """The backend's name for people."""
        return _TITLES[self.backend]

    @property
    def signature(self) -> Signature | None:
        """Inputs and outputs as the graph declares them; None where nothing tells."""
        return signature_in(self.manifest)

    @property
    def streams_weights(self) -> bool | None:
        """Whether it was built so that weights may stay in host memory; None where nothing tells."""
        flags = _asked(self.manifest, "flags", {})
        return bool(flags["weight_streaming"]) if "weight_streaming" in flags else None

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What it was built for; empty where nothing tells."""
        return tuple(map(str, _asked(self.manifest, "compute_capabilities", [])))

    @cached_property
    def identity(self) -> str:
        """The hash that tells it from other engines: of its bytes, or, where no JSON has that, of its size and ends."""
        known = self.manifest.get("engine_sha256")
        if isinstance(known, str):
            return known
        digest = hashlib.sha256(str(self.path.stat().st_size).encode())
        with self.path.open("rb") as file:
            digest.update(file.read(_END))
            file.seek(max(0, self.path.stat().st_size - _END))
            digest.update(file.read(_END))
        return digest.hexdigest()


def _not_ours(beside: Path) -> dict[str, Any]:
    """Return nothing, where no JSON lies beside an engine or another program's does.

    Raises:
        BadEngine: it is damaged, or in a format of another version.
    """
    if is_file(beside) and load_json(beside, error=BadEngine).get("kind") == "fp4trt engine":
        raise BadEngine(f"{beside} is in a format of another version of fp4trt; build the engine again")
    return {}


def _asked(manifest: dict[str, Any], key: str, default: Any) -> Any:
    """Return an item of a build's request, of the default's type."""
    request = manifest.get("request")
    found = request.get(key) if isinstance(request, dict) else None
    return found if isinstance(found, type(default)) else default


def backend_of(file: EngineFile) -> Any:
    """Return the module that runs an engine.

    Raises:
        BackendMissingError: it is not installed.
    """
    if importlib.util.find_spec(file.backend) is None:
        raise BackendMissingError(
            f"{file.path} is an engine of {file.title}, and {file.backend} is not installed; "
            f"pip install 'fp4trt[{_EXTRAS[file.backend]}]'"
        )
    return importlib.import_module(file.backend)


def require_fit(file: EngineFile, version: str, card: Card) -> None:
    """Refuse what an engine's JSON alone tells to be of another version or for other GPUs.

    An engine runs with the version that built it: TensorRT-RTX promises no more, and neither does TensorRT unless
    it was asked to. The fourth part of a version is a build's number.

    Raises:
        BadEngine
    """
    built = _asked(file.manifest, "tensorrt_version", "")
    if built and built.split(".")[:3] != version.split(".")[:3]:
        raise BadEngine(
            f"{file.path} was built with {file.title} {built}, and {version} is installed; build it again, or "
            f"pip install {file.backend.replace('_', '-')}=={built}"
        )
    capabilities = file.compute_capabilities
    if capabilities and card.compute_capability not in capabilities:
        raise BadEngine(
            f"{file.path} was built for {', '.join(capabilities)}, and the GPU here is {card.name} "
            f"({card.compute_capability}); build it with --gpu for that"
        )


def require_valid(file: EngineFile, trt: Any, runtime: Any, card: Card, *, streaming: bool) -> None:
    """Refuse what TensorRT does after a look at the header; a warning where it would run it, but not at its best.

    Args:
        file: the engine.
        trt: its backend.
        runtime: the backend's ``Runtime``; one without ``get_engine_validity`` is not asked.
        card: where it is to run.
        streaming: whether a weight streaming budget was given, with which an engine may fit after all.

    Raises:
        BadEngine
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    with file.path.open("rb") as opened:
        header = opened.read(runtime.engine_header_size)
    validity, diagnosis = runtime.get_engine_validity(header)
    if validity == trt.EngineValidity.VALID:
        return
    members = trt.EngineInvalidityDiagnostics.__members__.items()
    found = [name for name, member in members if int(diagnosis) & int(member.value)]
    told = {"version": f"{file.title} {trt.__version__}", "card": card.name, "capability": card.compute_capability}
    reasons = [_REASONS.get(name, name.lower().replace("_", " ")).format(**told) for name in found]
    if validity == trt.EngineValidity.SUBOPTIMAL:
        note(f"warning: {file.path} runs slower here than it could: {'; '.join(reasons) or 'no reason given'}")
        return
    if streaming and found == ["INSUFFICIENT_GPU_MEMORY"]:
        return
    raise BadEngine(f"{file.path} cannot run here: {'; '.join(reasons) or 'no reason given'}")
