"""Write a quantized checkpoint while the model runs block by block: each block is read once, run, and written here.

What is on disk of a finished block is noted in ``DIR.partial`` before the block counts as finished, so that a killed
run resumes with its unfinished blocks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from calibration.by_block.calibration import Calibration
from calibration.by_block.measure_amax import OUTSIDE
from calibration.by_block.one_block import OpenReader
from calibration.by_block.progress import BlockCheckpoint
from calibration.by_block.quantize_blocks import Prepared
from calibration.checkpoints import layout
from calibration.checkpoints.file_reader import ReadTensors, TensorReader, hash_of_tensors
from calibration.checkpoints.one_pass import Done, Work, is_large, quantize_in_one_pass
from calibration.checkpoints.plain import PlainCheckpoint
from calibration.methods import registry
from calibration.methods.plan import Plain
from calibration.results.write import Given, complete, shared_input_amax, versions
from fp4trt import publish
from fp4trt.account import ATTENTION_SCALES, TensorHeader
from fp4trt.checkpoint_folder import files_of
from fp4trt.disk_space import foresee
from fp4trt.progress import note
from fp4trt.safetensors_file import StoredTensor, TensorPlan

__all__ = ["ResultByBlock"]


class ResultByBlock:
    """A quantized checkpoint that is written while the model runs; :meth:`opened` gives the sink for its blocks.

    Args:
        plain: what is quantized.
        calibrated: captured inputs.
        directory: of the result, written as ``DIR.partial`` and renamed.
        force: replace an existing result.
        device: where to pack, ``cpu`` or ``cuda``.
    """

    tensors: Final[Mapping[str, StoredTensor]] = MappingProxyType({})

    def __init__(self, plain: Plain, calibrated: Calibration, directory: Path, force: bool, device: str) -> None:
        self._plain, self._calibrated = plain, calibrated
        self._directory, self._force, self._device = directory, force, device
        self._inside = tuple(f"{block}." for block in plain.family.blocks(plain.config))
        self._decided = _decided(plain, self._inside)
        self._layout = plain.quantized_groups, plain.quantized_linears, self._decided
        self._planned = layout.plan_shards(plain.stored, *self._layout, plain.wide)
        self._plan = {tensor.name: tensor for shard in self._planned for tensor in shard.plan}

    @contextlib.contextmanager
    def opened(self, finished: BlockCheckpoint) -> Iterator[ResultByBlock]:
        """Take blocks until the end of the ``with`` statement, where the result gets its name.

        Args:
            finished: the finished blocks, which are forgotten where their tensors are lost.
        """
        parts = [finished.run, self._calibrated.described, self._plain.recipe.resolved(), versions(), "by block"]
        identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        with publish.replacing(self._directory, self._force, identity) as self._partial:
            try:
                self._resume(finished)
                yield self
            except (OSError, MemoryError, KeyboardInterrupt):
                raise
            except BaseException:
                publish.forget_progress(self._partial)  # useless without the finished blocks, which are removed too
                raise

    def _resume(self, finished: BlockCheckpoint) -> None:
        """Keep the tensors of finished blocks; an unfinished block is written anew, so that all of it is of one run."""
        blocks = tuple(f"{block}." for block in finished.results)
        done = Done(**publish.progress_of(self._partial))
        written = [name for name in done.written if name.startswith(blocks)]
        there = set(layout.results_of(written, *self._layout))
        wanted = (name for name in self._plan if name.startswith(blocks))
        if blocks and layout.are_reserved(self._partial, self._planned) and there.issuperset(wanted):
            count = len(finished.results.keys() - {OUTSIDE})
            note(f"resuming: {count} of {len(self._inside)} blocks are done")
            self._done = replace(done, written=written)
            self._files = layout.ShardFiles(self._partial, self._planned, there)
            return
        finished.forget()
        self._done, self._files = Done(), layout.ShardFiles(self._partial, self._planned)
        reads = sum(tensor.nbytes for tensor in self._plain.stored.values())
        foresee(self._partial.parent, reads, self._files.missing())

    @property
    def reader(self) -> OpenReader:
        """Opens what reads the plain checkpoint: each tensor once, hashed, and held unless the method gives it."""
        changed = self._inside if registry.needs_activations(self._plain.recipe.method) else ()
        return _Opener(frozenset(self._decided), changed, is_large(self._plain.stored))

    def put(
        self, block: str, tensors: Mapping[str, StoredTensor], amax: Mapping[str, float], read: ReadTensors
    ) -> None:
        """Bring a block to disk: the method's tensors, weights that are packed here, and what stays as it is."""
        self._done.amax.update(read.amax)
        self._done.tensors.update(read.sha256)
        stored = {name: value for name, value in read.held.items() if name not in tensors}
        for name, value in tensors.items():
            made, plan = TensorPlan(name, value.dtype, value.shape), self._plan.get(name)
            assert made == plan, f"{self._plain.recipe.method.name} gave {made}, planned was {plan}"
        groups = [group for group in self._plain.quantized_groups if f"{group[0]}.weight" in stored]
        inputs = shared_input_amax(self._plain, groups, _by_linear(amax))
        work = Work((), stored, groups, self._plain.quantized_linears, inputs, tensors, self._device)
        keep = functools.partial(publish.note_progress, self._partial)
        quantize_in_one_pass(work, self._files, self._done, keep, lambda _: None)
        self._files.sync()
        keep(self._done.as_dict())

    def complete(self, prepared: Prepared) -> None:
        """Write config, manifest and what calibrated, once all blocks are there."""
        for file in files_of(self._plain.folder):
            self._done.sha256[file.name] = hash_of_tensors(file, self._plain.stored, self._done.tensors)
        calibrated = replace(self._calibrated, amax={**_by_linear(prepared.amax), **prepared.outside})
        given = Given(calibrated, prepared)
        complete(self._partial, self._plain, given, self._decided, self._planned, self._done)


@dataclass(frozen=True)
class _Opener:
    """Opens a :class:`TensorReader`, whose arguments these are, in whatever process."""

    passed_on: frozenset[str]
    changed: tuple[str, ...]
    forgets: bool

    def __call__(self, source: PlainCheckpoint) -> TensorReader:
        return TensorReader(source.stored, self.passed_on, self.changed, source.wide, self.forgets)


def _decided(plain: Plain, inside: tuple[str, ...]) -> dict[str, TensorHeader]:
    """Return the tensors that the method gives in place of those of the plain checkpoint, or adds, in file order."""
    method = plain.method
    decided: dict[str, TensorHeader] = {}
    if registry.needs_activations(method):
        weights = [f"{path}.weight" for path in plain.quantized_linears if path.startswith(inside)]
        decided |= {name: plain.stored[name] for name in weights}
    groups = [group for group in plain.groups if group[0].startswith(inside)]
    shapes = {path: plain.stored[f"{path}.weight"].shape for path in plain.quantized_linears}
    decided |= {one.name: one for one in registry.added_tensors(method, plain.family, groups, shapes)}
    scales = [f"{path}.{leaf}" for path in plain.fp8_attentions for leaf in ATTENTION_SCALES]
    return decided | {name: TensorPlan(name, "F32", ()) for name in scales}


def _by_linear(amax: Mapping[str, float]) -> dict[str, float]:
    """Return module path to the amax of a linear's input, from that of quantizers."""
    names = ((name.rpartition("."), value) for name, value in amax.items())
    return {path: value for (path, _, leaf), value in names if leaf == "input_quantizer"}
