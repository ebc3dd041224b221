"""Rules for which tensors the promised linears read: each its own, by the names of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from onnx import NodeProto

from fp4trt.errors import BadGraph
from fp4trt.number_formats import FORMATS
from onnx_functions.graph.branches import BRANCH_ADD, FACTORS, SMOOTHING, find_branch, find_smoothing
from onnx_functions.graph.index import CASTS, PRODUCTS
from onnx_functions.graph.lora_slots import SLOT_ADD
from onnx_functions.linting.rule import Hit, rule
from onnx_functions.linting.subject import FP8Product, Product, Subject

__all__ = ["RULES", "product_of"]

_SHARED: Final = ("weight_scale_2", "input_scale")
"""The scales that a group shares: those of its first member."""


@rule("promised-weight", "wrong", "let each linear read its own weight: export again")
def promised_weight(subject: Subject) -> Iterator[Hit]:
    """A promised linear X that reads other codes, block scales or 16-bit weights than X.weight and X.weight_scale.

    Source: measured: weights of one shape are exchanged without a word.
    """
    yield from _strangers(subject, ("weight", "weight_scale"))


@rule("promised-scale", "wrong", "let each linear read the global scales of its group's first member: export again")
def promised_scale(subject: Subject) -> Iterator[Hit]:
    """A promised linear whose global scales are not its own, and not those of its group's first member.

    X.weight_scale_2 for the weight, X.input_scale for the activation. Source: measured: accepted, and every product is
    off by a factor.
    """
    yield from _strangers(subject, _SHARED)


@rule("promised-bias", "wrong", "let each linear add its own bias: export again")
def promised_bias(subject: Subject) -> Iterator[Hit]:
    """A promised linear X that adds another bias than X.bias, or none where there is one, or X.bias twice.

    Source: measured: accepted.
    """
    yield from _strangers(subject, ("bias",))
    for path in dict.fromkeys(path for paths in subject.promised.values() for path in paths):
        if (count := sum(1 for _ in subject.graph.readers(f"{path}.bias", CASTS))) > 1:
            yield Hit(f"{path}.bias is read {count} times; expected once", f"{path}/Add", f"{path}.bias")


@rule("module-tensor", "wrong", "let each module read its own tensors: export again")
def module_tensor(subject: Subject) -> Iterator[Hit]:
    """With a promise nodes are named after their modules: one of module X reads X.weight, not Y.weight, where both are.

    Source: the names that fp4trt export gives; norms of one width are exchanged without a word.
    """
    if not subject.promises:
        return
    for node in subject.model.graph.node:
        module, slash, _ = node.name.partition("/")
        for tensor in node.input if slash else ():
            owner, dot, part = subject.owner(tensor).rpartition(".")
            if not dot or owner == module or part in _SHARED or tensor not in subject.graph.initializers:
                continue
            if f"{module}.{part}" in subject.known:
                yield Hit(f"reads {owner}.{part}; expected {module}.{part}", node.name, tensor)


@rule("promised-branch", "wrong", "let each linear read its own branch and smoothing: export again")
def promised_branch(subject: Subject) -> Iterator[Hit]:
    """A promised linear X that does without a branch or a smoothing that is stored for it, or has another linear's.

    X.svdquant_lora_b has to be its own; X.svdquant_lora_a and X.pre_quant_scale may be those of another member of its
    group. Source: measured: TensorRT-RTX takes what is there, and every product is wrong by the branch.
    """
    groups, graph = _groups_of(subject), subject.graph
    for path, kind in {path: kind for kind, paths in subject.promised.items() for path in paths}.items():
        node = product_of(subject, path)
        if node is None:
            continue  # rules of their own
        quantizer = subject.any_quantizer_of(node.input[0])
        if quantizer is None and kind in FORMATS:
            continue
        enters = quantizer.input[0] if quantizer is not None else node.input[0]
        try:
            branch = find_branch(graph, path, node)
        except BadGraph as error:
            yield Hit(str(error), node.name)
            continue
        if branch is not None and branch.input != enters:
            yield Hit(f"reads {branch.input}, the quantizer {enters}", branch.products[0], branch.factors[0])
        smoother = find_smoothing(graph, enters)
        reads = {SMOOTHING: smoother.input[1] if smoother is not None else ""}
        reads |= zip(FACTORS, branch.factors if branch is not None else ("", ""), strict=True)
        for part, tensor in reads.items():
            owners = [path] if part == FACTORS[1] else [path, *groups.get(path, ())]
            wanted = [f"{owner}.{part}" for owner in owners]
            # Some members of a group may have none: whose own is not stored is not expected to read one.
            if (tensor or wanted[0] in subject.known) and subject.owner(tensor) not in wanted:
                yield Hit(f"reads {tensor or 'none'}; expected {wanted[0]}", node.name, tensor or wanted[0])


RULES = (promised_weight, promised_scale, promised_bias, promised_branch, module_tensor)


def product_of(subject: Subject, path: str) -> NodeProto | None:
    """Return the product of a promised linear, None where the graph has none under its name."""
    node = subject.graph.nodes.get(f"{path}/MatMul") or subject.graph.nodes.get(f"{path}/Gemm")
    return node if node is not None and node.op_type in PRODUCTS else None


@dataclass(frozen=True)
class _Read:
    """What a linear reads as one of its parts: `tensor` is a constant, or "" where there is none."""

    part: str
    tensor: str


def _strangers(subject: Subject, parts: tuple[str, ...]) -> Iterator[Hit]:
    """Yield each promised linear that reads something else as one of these parts, though its own is there."""
    products: dict[int, Product | FP8Product] = {id(product.node): product for product in subject.products}
    products |= {id(product.node): product for product in subject.fp8_products}
    first = _first_members(subject)
    promised = dict.fromkeys(path for paths in subject.promised.values() for path in paths)
    quantized = {path for kind in FORMATS for path in subject.promised.get(kind, ())}
    for path in promised:
        node = product_of(subject, path)
        if node is None:
            continue
        product = products.get(id(node))
        fallen = product is None and path in quantized  # a rule of its own
        for read in _reads(subject, node, product):
            if read.part not in parts:
                continue
            owners = {path, first.get(path, path)} if read.part in _SHARED else {path}
            wanted = [f"{owner}.{read.part}" for owner in sorted(owners, key=lambda owner: owner == path)]
            owner = subject.owner(read.tensor)
            if owner in wanted:
                continue
            module = owner.rpartition(".")[0]
            theirs = read.part not in _SHARED and module != path and module in promised
            if theirs or (not fallen and any(name in subject.known for name in wanted)):
                found = f"reads {read.tensor}" if read.tensor else f"reads no {read.part}"
                yield Hit(f"{found}; expected {wanted[0]}", f"{path}/{node.op_type}", read.tensor or wanted[0])


def _first_members(subject: Subject) -> dict[str, str]:
    return {path: group[0] for path, group in _groups_of(subject).items()}


def _groups_of(subject: Subject) -> dict[str, list[str]]:
    """Return the declared group of each linear."""
    groups = subject.declared("fp4trt.groups")
    lists = [group for group in groups if isinstance(group, list) and group] if isinstance(groups, list) else []
    return {str(path): [str(member) for member in group] for group in lists for path in group}


def _reads(subject: Subject, node: NodeProto, product: Product | FP8Product | None) -> Iterator[_Read]:
    """Yield what a product reads, as far as it can be followed to constants."""
    if product is None:
        source = subject.constant(subject.graph.to_source(node.input[1]))
        if source:
            yield _Read("weight", source)
        for above in subject.graph.chain(node.input[1]):
            if (above.domain, above.op_type) in _OWN_DEQUANTIZERS and (scale := subject.constant(above.input[1])):
                yield _Read("weight_scale", scale)
    else:
        parts = _parts_of(product)
        yield from (_Read(part, constant) for part, name in parts.items() if (constant := subject.constant(name)))
    quantizer = subject.any_quantizer_of(node.input[0])
    scale = subject.constant(quantizer.input[1]) if quantizer is not None and len(quantizer.input) > 1 else ""
    if scale:
        yield _Read("input_scale", scale)
    yield _Read("bias", _bias(subject, node))


_OWN_DEQUANTIZERS: Final = {kind.dequantizer for kind in FORMATS.values() if kind.dequantizer[0]}
"""Operators of TensorRT's own that read a weight's codes and block scales."""


def _parts_of(product: Product | FP8Product) -> dict[str, str]:
    """Return the tensors that a product's weight is made of, by the checkpoint's names for such."""
    if isinstance(product, FP8Product):
        return {"weight": product.codes, "weight_scale": product.scale}
    chain = product.chain
    scales = {"weight_scale": chain.block_scales, "weight_scale_2": chain.global_scale}
    return {"weight": chain.codes, **(scales if chain.scales is not None else {})}


def _bias(subject: Subject, node: NodeProto) -> str:
    """Return the constant that is added to a product, cast or not, "" where none is."""
    if node.op_type == "Gemm" and len(node.input) > 2:
        return subject.constant(subject.graph.through_casts(node.input[2]))
    tensors = [node.output[0]]
    for tensor in tensors:
        for reader in subject.graph.consumers.get(tensor, ()):
            other = [name for name in reader.input if name != tensor] if reader.op_type == "Add" else []
            if other and (constant := subject.constant(subject.graph.through_casts(other[0]))):
                return constant
            if other and reader.name.endswith((BRANCH_ADD, SLOT_ADD)):
                tensors.append(reader.output[0])
    return ""
