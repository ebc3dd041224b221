"""Checkpoints by their names on the hub: from its local cache, else downloaded, with huggingface_hub's own progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from fp4trt.errors import BadCheckpoint
from fp4trt.file_kind import is_file
from fp4trt.pipeline_folder import PIPELINE

__all__ = ["cached_file", "described_in", "file_of", "pipeline_of_hub", "transformer_of"]

_WANTED: Final = ("config.json", "diffusion_pytorch_model*", "model_index.json", "transformer/*")
"""Files of a repository that are downloaded: of a transformer alone, or of a pipeline's."""

_NOT_OF_PIPELINES: Final = ("transformer*.safetensors", "transformer*.bin", "*.gguf", "*.onnx*", "*.msgpack", "*.md")
"""Files of a pipeline's repository that are not downloaded where its transformer is another one."""


_DESCRIBING: Final = ("model_index.json", "modular_model_index.json", "*config.json", "*.safetensors.index.json")
"""Files of a repository that tell what it holds."""


def cached_file(name: str) -> Path:
    """Return a single file of a repository, named as ``OWNER/NAME/FILE``, from the cache alone.

    Raises:
        BadCheckpoint: it is not there.
    """
    from huggingface_hub import try_to_load_from_cache

    owner, repository, *parts = name.split("/")
    found = try_to_load_from_cache(f"{owner}/{repository}", "/".join(parts))
    if not isinstance(found, str):
        raise BadCheckpoint(
            f"{name} is neither a file here nor in the hub's cache, and is not fetched to be planned; give "
            f"{owner}/{repository}, or a config.json of the model"
        )
    return Path(found)


def described_in(repository: str) -> Path:
    """Return the snapshot of a repository in the cache or, where there is none, of the files that describe it.

    Raises:
        BadCheckpoint: it is neither in the cache nor to be had.
    """
    from huggingface_hub import errors, snapshot_download

    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        return Path(str(snapshot_download(repository, local_files_only=True)))
    return Path(_fetched(repository, lambda: snapshot_download(repository, allow_patterns=list(_DESCRIBING))))


def transformer_of(repository: str) -> Path:
    """Return the folder of a repository's transformer: its own, or that of the pipeline which it is.

    Raises:
        BadCheckpoint: it is neither in the cache nor to be had, or holds no transformer.
    """
    from huggingface_hub import snapshot_download

    snapshot = Path(_fetched(repository, lambda: snapshot_download(repository, allow_patterns=list(_WANTED))))
    if (snapshot / "transformer").is_dir():
        return snapshot / "transformer"
    if is_file(snapshot / "config.json") and not (snapshot / PIPELINE).exists():
        return snapshot
    raise BadCheckpoint(
        f"{repository} has neither transformer/ nor a config.json of its own; expected a diffusion transformer, or a "
        f"pipeline around one: name a single file of it as {repository}/FILE.safetensors"
    )


def pipeline_of_hub(repository: str) -> Path:
    """Return the folder of a repository's pipeline, without its transformer's weights.

    Raises:
        BadCheckpoint: it is neither in the cache nor to be had, or is no pipeline.
    """
    from huggingface_hub import snapshot_download

    wanted, unwanted = ["*/*", PIPELINE], list(_NOT_OF_PIPELINES)
    snapshot = Path(
        _fetched(repository, lambda: snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    )
    if is_file(snapshot / PIPELINE):
        return snapshot
    raise BadCheckpoint(f"{repository} has no {PIPELINE}; expected the repository of a diffusers pipeline")


def file_of(name: str) -> Path:
    """Return a single file of a repository, named as ``OWNER/NAME/FILE``.

    Raises:
        BadCheckpoint: it is neither in the cache nor to be had.
    """
    from huggingface_hub import hf_hub_download

    owner, repository, *parts = name.split("/")
    return Path(_fetched(name, lambda: hf_hub_download(f"{owner}/{repository}", "/".join(parts))))


def _fetched(name: str, fetch: Callable[[], Any]) -> str:
    with _refusing(name):
        return str(fetch())


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Say in one line why something is not to be had from the hub."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise BadCheckpoint(
            f"{name} is gated, and the hub does not know that you may have it: accept its license on its page, run hf "
            "auth login, and try again"
        ) from None
    except errors.RepositoryNotFoundError:
        raise BadCheckpoint(
            f"{name} is not a folder here, and the hub has no repository of that name, or a private one: check the "
            "name, or run hf auth login"
        ) from None
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise BadCheckpoint(
                f"{name} is neither a folder here nor in the hub's cache, and the hub cannot be reached; give the path "
                "of a local copy, or try again online"
            ) from None
        raise BadCheckpoint(f"{name} names a file that the repository does not have; check its name") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadCheckpoint(
            f"{name} is not a folder here and could not be downloaded ({reason}); give the path of a local copy"
        ) from None
