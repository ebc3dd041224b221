"""Transformers whose diffusers class takes more than tensors, with a forward of tensors alone.

Each is a subclass of the diffusers class, with its modules and tensors under the same names, so that its checkpoints
load as they are. A pipeline of diffusers drives it as its own: what the pipeline calls it with is turned into the
family's inputs by ``inputs_of``, which capturing calls too; or by ``calls_of`` into those of several calls, where a
graph cannot take a batch that a pipeline makes.
"""
