"""Any artifact in the place of ``pipe.transformer`` in a pipeline of diffusers."""

from __future__ import annotations

from generation.pipelines.model import Model, model_of
from generation.pipelines.transformer import PipelineTransformer, pipeline_transformer

__all__ = ["Model", "PipelineTransformer", "model_of", "pipeline_transformer"]
