"""Rules for what depends on what: inputs that no output reads, outputs and activations that are constants."""

from __future__ import annotations

from collections.abc import Iterator

from onnx import NodeProto

from onnx_functions.graph.index import PRODUCTS, SOURCE, name_of
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import FP8Product, Product, Subject

__all__ = ["RULES"]


@rule("dead-input", "wrong", "export again with the input used, or take it out of the graph's inputs")
def dead_input(subject: Subject) -> Iterator[Hit]:
    """An input on whose values no output depends: a constant stands in its place, or nothing.

    What a graph reads of it through Shape or Size alone does not count. Source: measured: accepted without a word.
    """
    outputs = [value.name for value in subject.model.graph.output]
    known = subject.dependence
    by_values = {name for output in outputs for name in known.by_values(output)}
    by_shape = {name for output in outputs for name in known.by_anything(output)}
    for name in known.inputs:
        if name not in by_values:
            what = "is read for its shape alone" if name in by_shape else "reaches no output"
            yield Hit(f"the input {what}: changing its values changes nothing", tensor=name)


@rule("constant-output", "wrong", "let it read the inputs: export again without what is baked in")
def constant_output(subject: Subject) -> Iterator[Hit]:
    """An output that depends on the values of no input is the same at every run.

    Source: measured: accepted without a word.
    """
    known = subject.dependence
    for value in subject.model.graph.output:
        if not known.by_values(value.name):
            shapes = known.by_anything(value.name)
            what = f"of {', '.join(shapes)} it reads the shape alone" if shapes else _origin(subject, value.name)
            yield Hit(f"the output depends on the values of no input; {what}", tensor=value.name)


@rule("constant-activation", "wrong", "let it read what the inputs make: export again")
def constant_activation(subject: Subject) -> Iterator[Hit]:
    """A quantizer of activations, or a product by an FP4 or FP8 weight, that reads a constant baked in by an exporter.

    A weight may be quantized to FP8 in the graph, so such a quantizer counts where its product reads nothing but
    constants. Source: ModelOpt's export of rotated quantizers; measured: accepted without a word.
    """
    told = set[str]()
    fp8 = [node for node in subject.fp8_quantizers if _multiplies_constants(subject, node)]
    for node in (*(chain.quantizer for chain in subject.activations), *fp8):
        if found := _constant(subject, node.input[0]):
            told.add(node.output[0])
            yield Hit(f"quantizes {found}", name_of(node), node.input[0])
    products: list[Product | FP8Product] = [*subject.products, *subject.fp8_products]
    for product in products:
        multiplies = product.node.op_type in PRODUCTS and product.index < 2 <= len(product.node.input)
        other = product.node.input[1 - product.index] if multiplies else ""
        if other and subject.graph.to_source(other) not in told and (found := _constant(subject, other)):
            yield Hit(f"multiplies {found}", name_of(product.node), other)


RULES = (dead_input, constant_output, constant_activation)


def _constant(subject: Subject, tensor: str) -> str:
    """Say what a tensor is that depends on the values of no input; "" for one that does depend on some."""
    if subject.dependence.by_values(tensor):
        return ""
    shapes = subject.dependence.by_anything(tensor)
    what = f"of {', '.join(shapes)} the shape alone" if shapes else _origin(subject, tensor)
    return f"{tensor}, which depends on the values of no input: {what}"


def _multiplies_constants(subject: Subject, quantizer: NodeProto) -> bool:
    """Whether a QuantizeLinear ends in a product all of whose operands depend on no input."""
    products = (reader.node for reader in subject.graph.readers(quantizer.output[0], SOURCE))
    return any(
        node.op_type in (*PRODUCTS, "Conv") and not any(map(subject.dependence.by_values, node.input[:2]))
        for node in products
    )


def _origin(subject: Subject, tensor: str) -> str:
    """Return where a constant comes from, up its first inputs."""
    while (node := subject.graph.producer.get(tensor)) is not None and node.input and node.input[0]:
        tensor = node.input[0]
    return f"it comes from {tensor}" + (f" of node {name_of(node)}" if node is not None else ", which is stored")
