"""What a graph with a single query row per sequence, as decode has, can do with less on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from sievert.graph_passes.lowering.attention import AttentionForm, read_attention, read_options
from sievert.graph_passes.lowering.rewrite import Rewriter
from sievert.graph_passes.lowering.rules import static_shape
from sievert.graph_passes.op import Op


@dataclass(frozen=True)
class GroupQueryHeads(ir.passes.InPlacePass):
    """Let the query heads of one kv head be the rows of one product, so that a cache is read once and not once per head.

    Before::

        q[B, H, 1, d], k[B, G, T, d], v[B, G, T, d], mask[B, 1, 1, T] -> Attention -> [B, H, 1, d]

    After::

        q -> Reshape[B, G, H/G, d] -+
        mask -> Expand[B, 1, H/G, T] -> Attention -> Reshape[B, H, 1, d]

    ONNX Runtime 1.31 on the CPU goes through the keys and values of a head for every head that shares them. In microseconds of one thread,
    14 query and 2 kv heads of 64: 105 and 51 at T = 680, 719 and 336 at 4,200, 4,240 and 2,510 at 16,448. It takes no mask that is
    broadcast along the query rows, hence the Expand, one for all layers that share a mask.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an operator was regrouped."""
        rewriter, masks = Rewriter(model.graph, "lower.heads"), dict[tuple[ir.Value, int], ir.Value]()
        for node in model.graph:
            form = read_attention(node)
            if form is not None and _can_group(node, form):
                rewriter.replace(node, _group(rewriter.op, node, form, masks))
        return ir.passes.PassResult(model, modified=rewriter.apply())


def _can_group(node: ir.Node, form: AttentionForm) -> bool:
    """Whether one row of several heads meets each kv head, all see the same keys, their number is fixed, and nothing else is asked for."""
    alone = all(value is None for value in node.inputs[4:]) and len(node.outputs) == 1 and not form.flat and not form.causal
    grouped = form.query == 1 and form.heads > form.kv_heads and isinstance(form.keys, int)
    shape = form.mask_shape
    return alone and grouped and (form.mask is None or (len(shape) == 4 and shape[1:3] == (1, 1) and shape[3] == form.keys))


def _group(op: Op, node: ir.Node, form: AttentionForm, masks: dict[tuple[ir.Value, int], ir.Value]) -> ir.Value:
    query, *others = node.inputs[:3]
    rows = form.heads // form.kv_heads
    operands = [op.Reshape(query, [form.batch, form.kv_heads, rows, form.head_size]), *others]
    if form.mask is not None:
        if (form.mask, rows) not in masks:
            masks[form.mask, rows] = op.Expand(form.mask, [form.mask_shape[0], 1, rows, form.keys])
        operands.append(masks[form.mask, rows])
    return op.Reshape(op.Attention(*operands, **read_options(node)), [form.batch, form.heads, 1, form.value_size])


@dataclass(frozen=True)
class FlattenBiased(ir.passes.InPlacePass):
    """Give a product with a bias two axes: ONNX Runtime fuses it either way, but puts a Reshape on both sides where it has three.

    Before::

        x[B, 1, K] -> MatMul(w[K, N]) -> Add(b[N])

    After::

        x -> Reshape[B, K] -> MatMul(w) -> Add(b) -> Reshape[B, 1, N]

    The first Reshape is one for all products of the same rows; the last merges with the one that separates heads.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when a product was flattened."""
        rewriter, flat = Rewriter(model.graph, "lower.flat"), dict[ir.Value, ir.Value]()
        for node in model.graph:
            found = _find_biased(node)
            if found is not None:
                op, (rows, weight, bias, size) = rewriter.op, found
                if rows not in flat:
                    flat[rows] = op.Reshape(rows, [size[0], size[2]])
                total = op.Add(op.MatMul(flat[rows], weight), bias)
                rewriter.replace(node, op.Reshape(total, list(static_shape(node.outputs[0]) or ())))
        modified = rewriter.apply()
        _remove_dead(model.graph, "MatMul")
        return ir.passes.PassResult(model, modified=modified)


def _find_biased(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, tuple[int, ...]] | None:
    """Rows ``[B, 1, K]``, weight, bias and the size of the rows, where ``node`` adds a bias to a product nothing else reads."""
    if node.domain or node.op_type != "Add":
        return None
    for product, bias in (node.inputs, node.inputs[::-1]):
        source = None if product is None else product.producer()
        if product is None or bias is None or source is None or source.domain or source.op_type != "MatMul" or len(product.uses()) != 1:
            continue
        rows, weight = source.inputs
        size, sizes = static_shape(rows), static_shape(weight)
        fits = size is not None and len(size) == 3 and size[1] == 1 and sizes is not None and static_shape(bias) == sizes[1:]
        named = str(product.name).startswith("stage.") or product.is_graph_output()
        if rows is not None and weight is not None and size is not None and fits and bias.is_initializer() and not named:
            return rows, weight, bias, size
    return None


@dataclass(frozen=True)
class MergeReshapes(ir.passes.InPlacePass):
    """Turn a Transpose that moves only axes of size 1 into a Reshape, and a chain of Reshapes into its last.

    Before::

        x[B, 1, H * d] -> Reshape[B, 1, H, d] -> Transpose[B, H, 1, d]

    After::

        x[B, 1, H * d] -> Reshape[B, H, 1, d]

    Each operator costs ONNX Runtime's CPU about 5 microseconds, and decode has eight of these in a layer.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an operator was turned or bypassed."""
        graph, rewriter = model.graph, Rewriter(model.graph, "lower.reshape")
        for node in graph:
            shape = static_shape(node.outputs[0])
            if (
                shape is not None
                and 0 not in shape
                and _only_reshapes(node)
                and (node.op_type == "Transpose" or _source(node) is not node.inputs[0])
            ):
                rewriter.replace(node, rewriter.op.Reshape(_source(node), list(shape)))
        modified = rewriter.apply()
        _remove_dead(graph, "Reshape")
        return ir.passes.PassResult(model, modified=modified)


def _source(node: ir.Node) -> ir.Value | None:
    """The value that a chain of reshapes ending in ``node`` starts from."""
    value = node.inputs[0]
    before = None if value is None else value.producer()
    return _source(before) if before is not None and _only_reshapes(before) else value


def _only_reshapes(node: ir.Node) -> bool:
    """Whether the elements stay in their order: a Reshape, or a Transpose that moves axes of size 1 past others."""
    if node.domain or node.op_type not in ("Reshape", "Transpose") or node.inputs[0] is None:
        return False
    shape = static_shape(node.inputs[0])
    if node.op_type == "Reshape":
        return shape is not None
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    moved = [axis for axis in order if shape[axis] != 1] if shape is not None and order is not None else [1, 0]
    return moved == sorted(moved)


def _remove_dead(graph: ir.Graph, op_type: str) -> None:
    """Remove what was bypassed; a named stage value is read from outside."""
    for node in reversed(list(graph)):
        value = node.outputs[0]
        if node.op_type == op_type and not (value.uses() or value.is_graph_output() or str(value.name).startswith("stage.")):
            graph.remove(node, safe=True)
