"""Former places of modules, which work for one more version with one line of warning."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Final

__all__ = ["MOVED", "install"]

MOVED: Final = {
    "calibration.alone": "fp4trt.folder_lock",
    "calibration.attention_amax": "calibration.formats.attention_amax",
    "calibration.bfloat16": "calibration.formats.bfloat16",
    "calibration.block_calibration": "calibration.by_block.measure_amax",
    "calibration.block_checkpoint": "calibration.by_block.progress",
    "calibration.block_runner": "calibration.by_block.runner",
    "calibration.checkpoint": "calibration.checkpoints.quantized",
    "calibration.column_rounding": "calibration.methods.quality.column_rounding",
    "calibration.comparison": "generation.comparison",
    "calibration.comparison.cli": "generation.comparison.cli",
    "calibration.comparison.compare": "generation.comparison.compare",
    "calibration.comparison.drawing": "generation.comparison.drawing",
    "calibration.comparison.frechet": "generation.comparison.frechet",
    "calibration.comparison.grid": "generation.comparison.grid",
    "calibration.comparison.measurement": "generation.comparison.measurement",
    "calibration.comparison.metrics": "generation.comparison.metrics",
    "calibration.comparison.perceptual": "generation.comparison.perceptual",
    "calibration.comparison.pipeline": "generation.comparison.pipeline",
    "calibration.comparison.report": "generation.comparison.report",
    "calibration.comparison.statistics": "generation.comparison.statistics",
    "calibration.comparison.store": "generation.comparison.store",
    "calibration.comparison.table": "generation.comparison.table",
    "calibration.compiled": "calibration.formats.compiled",
    "calibration.dataset": "calibration.inputs.captured",
    "calibration.digits.classifier": "generation.comparison.digit_classifier",
    "calibration.digits.cli": "generation.demo.cli",
    "calibration.digits.demo": "generation.demo.demo",
    "calibration.digits.errors": "fp4trt.errors",
    "calibration.digits.grid": "generation.demo.grid",
    "calibration.digits.progress": "fp4trt.progress",
    "calibration.digits.quality": "generation.comparison.digits",
    "calibration.errors": "fp4trt.errors",
    "calibration.file_reader": "calibration.checkpoints.file_reader",
    "calibration.folds": "calibration.methods.quality.folds",
    "calibration.fp8": "calibration.formats.fp8",
    "calibration.fp8_attention": "calibration.formats.fp8_attention",
    "calibration.fp8_linear": "calibration.formats.linears",
    "calibration.fused_linears": "calibration.methods.modelopt.fused_linears",
    "calibration.gptq": "calibration.methods.quality.gptq",
    "calibration.input_amax": "calibration.by_block.calibration",
    "calibration.input_statistics": "calibration.by_block.input_statistics",
    "calibration.modelopt_algorithms": "calibration.methods.modelopt.algorithms",
    "calibration.modelopt_backend": "calibration.formats.modelopt_backend",
    "calibration.modelopt_contents": "calibration.modelopt_states.contents",
    "calibration.modelopt_linears": "calibration.methods.modelopt.linears",
    "calibration.modelopt_quantizers": "calibration.modelopt_states.quantizers",
    "calibration.modelopt_reference": "calibration.modelopt_states.reference",
    "calibration.modelopt_result": "calibration.modelopt_states.to_checkpoint",
    "calibration.modelopt_state": "calibration.modelopt_states.state",
    "calibration.models": "fp4trt.families",
    "calibration.nvfp4": "calibration.formats.nvfp4",
    "calibration.nvfp4_linear": "calibration.formats.linears",
    "calibration.one_pass": "calibration.checkpoints.one_pass",
    "calibration.packing": "calibration.formats.nvfp4_packer",
    "calibration.pictures": "calibration.inputs.pictures",
    "calibration.plain": "calibration.methods.plan",
    "calibration.preparation": "calibration.by_block.quantize_blocks",
    "calibration.processes": "calibration.by_block.processes",
    "calibration.prompts": "calibration.inputs.prompts",
    "calibration.ptq": "calibration.formats.input_quantizers",
    "calibration.qat": "calibration.methods.qat",
    "calibration.qat.distillation": "calibration.methods.qat.distillation",
    "calibration.qat.loss_curve": "calibration.methods.qat.loss_curve",
    "calibration.qat.student": "calibration.methods.qat.student",
    "calibration.qat.training": "calibration.methods.qat.training",
    "calibration.qat.trajectories": "calibration.methods.qat.trajectories",
    "calibration.quality": "calibration.methods.quality.quantize_block",
    "calibration.quantization_config": "calibration.formats.quantization_config",
    "calibration.recipe": "calibration.recipes.recipe",
    "calibration.result_files": "calibration.results.write",
    "calibration.safetensors_file": "fp4trt.safetensors_file",
    "calibration.shards": "calibration.checkpoints.layout",
    "calibration.sharing": "calibration.formats.shared_scales",
    "calibration.source": "calibration.checkpoints.plain",
    "calibration.straight_through": "calibration.formats.straight_through",
    "calibration.svdquant": "calibration.methods.modelopt.svdquant",
    "calibration.svdquant_linear": "calibration.formats.linears",
    "calibration.wiener": "calibration.methods.quality.wiener",
    "calibration.work_folder": "fp4trt.work_folder",
    "calibration.write": "fp4trt.publish",
    "exporter.errors": "fp4trt.errors",
    "onnx_functions.attention_gates": "onnx_functions.validation.attention_gates",
    "onnx_functions.attentions": "onnx_functions.graph.attentions",
    "onnx_functions.baked": "onnx_functions.graph.baked",
    "onnx_functions.block_gates": "onnx_functions.validation.block_gates",
    "onnx_functions.block_selection": "onnx_functions.validation.block_selection",
    "onnx_functions.block_structure": "onnx_functions.validation.block_structure",
    "onnx_functions.branches": "onnx_functions.graph.branches",
    "onnx_functions.checkpoint_beside": "onnx_functions.graph.checkpoint_beside",
    "onnx_functions.checkpoint_manifest": "fp4trt.checkpoint_manifest",
    "onnx_functions.cut": "onnx_functions.graph.cut",
    "onnx_functions.dependence": "onnx_functions.graph.dependence",
    "onnx_functions.element_types": "onnx_functions.graph.element_types",
    "onnx_functions.errors": "fp4trt.errors",
    "onnx_functions.example_inputs": "onnx_functions.validation.example_inputs",
    "onnx_functions.external_data": "onnx_functions.graph.external_data",
    "onnx_functions.file_output": "fp4trt.file_output",
    "onnx_functions.fit": "onnx_functions.graph.fit",
    "onnx_functions.fitting_sizes": "onnx_functions.validation.fitting_sizes",
    "onnx_functions.free_memory": "fp4trt.free_memory",
    "onnx_functions.functions_gate": "onnx_functions.validation.functions_gate",
    "onnx_functions.graph_runner": "onnx_functions.validation.graph_runner",
    "onnx_functions.inspect": "onnx_functions.inspection.inspect",
    "onnx_functions.inspect_attention": "onnx_functions.inspection.attention",
    "onnx_functions.inspect_graph": "onnx_functions.inspection.graph",
    "onnx_functions.inspect_table": "onnx_functions.inspection.table",
    "onnx_functions.json_file": "fp4trt.json_file",
    "onnx_functions.layout_detection": "onnx_functions.layouts.detection",
    "onnx_functions.layout_fits": "onnx_functions.layouts.fits",
    "onnx_functions.layout_names": "onnx_functions.layouts.names",
    "onnx_functions.layout_readings": "onnx_functions.layouts.readings",
    "onnx_functions.layout_sources": "onnx_functions.layouts.sources",
    "onnx_functions.linears": "onnx_functions.graph.linears",
    "onnx_functions.linked_files": "fp4trt.linked_files",
    "onnx_functions.module_tree": "onnx_functions.inspection.module_tree",
    "onnx_functions.promise_gate": "onnx_functions.validation.promise_gate",
    "onnx_functions.reference_ops": "onnx_functions.simulation.reference_ops",
    "onnx_functions.reference_sizes": "onnx_functions.validation.reference_sizes",
    "onnx_functions.report": "onnx_functions.validation.report",
    "onnx_functions.safetensors_header": "fp4trt.checkpoint_folder",
    "onnx_functions.sizes": "onnx_functions.graph.sizes",
    "onnx_functions.stored_linears": "onnx_functions.graph.stored_linears",
    "onnx_functions.structure_gates": "onnx_functions.validation.structure_gates",
    "onnx_functions.subgraphs": "onnx_functions.graph.subgraphs",
    "onnx_functions.symbols": "onnx_functions.graph.symbols",
    "onnx_functions.teacher_gates": "onnx_functions.validation.teacher_gates",
    "onnx_functions.third_party_runs": "onnx_functions.validation.third_party_runs",
    "onnx_functions.third_party_validation": "onnx_functions.validation.third_party_validation",
    "onnx_functions.torch_reference": "onnx_functions.validation.torch_reference",
    "onnx_functions.verdict": "onnx_functions.validation.verdict",
    "onnx_functions.weight_gates": "onnx_functions.validation.weight_gates",
    "onnx_functions.wires": "onnx_functions.graph.bodies",
    "trt_build.errors": "fp4trt.errors",
    "trt_build.targets": "fp4trt.targets",
}
"""Former name of a module to its name."""


class _Former(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return what loads a module that has moved; None for any other."""
        if fullname not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module from where it is."""
        name = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {name} now; import it from there", FutureWarning, stacklevel=2)
        module = importlib.import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back its own spec: it was executed where it is."""
        former = module.__spec__
        assert former is not None
        module.__spec__ = former.loader_state


def install() -> None:
    """Let former names be imported; more than once does no more."""
    if not any(isinstance(finder, _Former) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Former())  # a package that moved still finds files by its path
