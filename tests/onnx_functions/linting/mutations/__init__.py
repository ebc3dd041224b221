"""The table of mutations: ways in which an export of the built-in model goes wrong, and what each provokes.

Each names the rule of the lint that refuses it, the node or tensor that the finding has to name, and what
TensorRT-RTX 1.7.1 does with the graph when nothing stops it: `accepted` (an engine with all FP4 GEMMs, and a kernel for
each attention that is written out), `slow` (an engine with fewer linears in FP4, or more kernels), `refused` (an error
of parser or builder), or `crashes`. `benchmarks/lint_verdicts.py` measures that; docs/lint.md shows all of it.
"""

from __future__ import annotations

from tests.onnx_functions.linting.mutations import attention, chains, fp8, inputs, meant, names, outside
from tests.onnx_functions.linting.mutations.mutation import Mutation, mutations_of

__all__ = ["MUTATIONS", "Mutation"]

TOPICS = (chains, outside, names, attention, meant, inputs, fp8)
MUTATIONS = tuple(mutation for topic in TOPICS for mutation in mutations_of(topic))
