"""Count what a static graph multiplies and adds: the machine-independent price of a plan."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.bundle.specs import size_axis
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.lengths import varies_with_prompts


def count_flops(model: ir.Model, sequence: int = 0) -> int:
    """Floating point operations of one run: two for each multiply-add of the MatMul, Gemm, Conv and Attention nodes.

    Causal attention is counted in full, as engines without a causal kernel compute it. Norms, activations, softmax and everything that
    only moves data are left out: in a decoder they are below a hundredth of the whole. Of a graph that takes prompts of any length, those
    for ``sequence`` tokens.

    Raises:
        GraphError: a node whose shapes are not all numbers: the graph is not static.
    """
    fixed = _fix_length(model, sequence) if sequence and varies_with_prompts(model) else model
    return sum(_count_node(node) for node in fixed.graph)


def _fix_length(model: ir.Model, sequence: int) -> ir.Model:
    """A copy for prompts of one length, whose shapes are all numbers."""
    fixed = model.clone()
    for node in fixed.graph:
        for value in node.outputs:
            value.shape = None
    for value in fixed.graph.inputs:
        value.shape = ir.Shape([axis if isinstance(axis, int) else size_axis(str(axis.value), sequence) for axis in value.shape or ()])
    return FixShapes()(fixed).model


def _count_node(node: ir.Node) -> int:
    if node.op_type == "MatMul":
        return 2 * _shape(node, node.inputs[0])[-1] * prod(_shape(node, node.outputs[0]))
    if node.op_type == "Gemm":
        left = _shape(node, node.inputs[0])
        inner = left[0] if node.attributes.get_int("transA", 0) else left[1]
        return 2 * inner * prod(_shape(node, node.outputs[0]))
    if node.op_type == "Conv":
        weight = _shape(node, node.inputs[1])  # [out, in / groups, *kernel]
        return 2 * prod(weight[1:]) * prod(_shape(node, node.outputs[0]))
    if node.op_type == "Attention":
        query, keys, values = (_shape(node, node.inputs[place]) for place in range(3))
        batch, heads, rows, size = query
        return 2 * batch * heads * rows * keys[2] * (size + values[3])
    return 0


def _shape(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    shape = None if value is None else value.shape
    if shape is None or not shape.is_static():
        name = None if value is None else value.name
        raise GraphError(f"{name!r} of {node.op_type} node {node.name!r} has the shape {shape}: FLOPs are counted of static graphs only")
    return tuple(size for size in shape if isinstance(size, int))
