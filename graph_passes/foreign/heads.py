"""Attention and rotary embedding on ``[B, S, heads * size]``, with a cache inside, as they stand on ``[B, heads, S, size]`` without one.

Before::

    x[B, S, H*d] -> RotaryEmbedding(num_heads) -> Attention(q, k, v, mask, past; q_num_heads) -> y[B, S, H*d], present

After::

    x -> Reshape, Transpose [B, H, S, d] -> RotaryEmbedding -> Attention(q, k, v, mask) -> Transpose, Reshape -> y[B, S, H*d]
                                                                                           k, v -> present
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sievert.graph_passes.foreign.match import Mismatch, add_before, at, integer_constant, nodes_of, producer

_TURN = (0, 2, 1, 3)
_INPUTS = 6
_LENGTHS = "attention reads lengths of padded caches (nonpad_kv_seqlen), which is a cache of fixed length: export with a dynamic cache"


def split_heads(model: ir.Model) -> Mismatch | int:
    """Rewrite every Attention of three axes or with a cache; gives how many there were."""
    count = 0
    for node in nodes_of(model.graph, "RotaryEmbedding"):
        _take_positions_out(model.graph, node)
    for node in nodes_of(model.graph, "Attention"):
        if any(value is not None for value in node.inputs[_INPUTS:]):
            return Mismatch(_LENGTHS, at(node))
        if len(node.outputs) > 3 and node.outputs[3].uses():
            return Mismatch("attention gives its scores, which a pruned graph does not have", at(node))
        if node.inputs[0] is None or node.inputs[0].shape is None:
            return Mismatch("the queries have no known shape", at(node))
        flat = len(node.inputs[0].shape) == 3
        if flat or len(node.inputs) > 4:
            wrong = _rewrite(model.graph, node, flat=flat)
            if wrong is not None:
                return wrong
            count += 1
    return count


def _take_positions_out(graph: ir.Graph, node: ir.Node) -> None:
    """The operator's own look-up of its tables at ``position_ids`` as a Gather before it."""
    if len(node.inputs) < 4 or node.inputs[3] is None:
        return
    tape = Tape()
    for place, table in enumerate(node.inputs[1:3], 1):
        rows = tape.op("Gather", [table, node.inputs[3]], {"axis": 0})
        if table is not None:
            rows.type = table.type
        node.replace_input_with(place, rows)
    node.resize_inputs(3)
    add_before(graph, node, tape)


def _rewrite(graph: ir.Graph, node: ir.Node, *, flat: bool) -> Mismatch | None:
    q, k, v = node.inputs[:3]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if q is None or k is None or v is None:
        return Mismatch("attention misses queries, keys or values", at(node))
    heads = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    tape = Tape()
    if flat:
        if not all(heads):
            return Mismatch("attention of three axes does not say how many heads it has", at(node))
        parts = []
        for value, count in ((q, heads[0]), (k, heads[1]), (v, heads[1])):
            part = _split(graph, value, count, node)
            if isinstance(part, Mismatch):
                return part
            parts.append(part)
        q, k, v = parts
    kept = {name: node.attributes[name] for name in ("scale", "softcap", "is_causal") if name in node.attributes}
    attended = tape.op("Attention", [q, k, v, *([] if mask is None else [mask])], kept)
    attended.shape, attended.type = q.shape, q.type
    output = attended
    if flat:
        turned = tape.op("Transpose", [attended], {"perm": _TURN})
        output = tape.op("Reshape", [turned, integer_constant(tape, [0, 0, -1])])
        output.shape, output.type = node.outputs[0].shape, node.outputs[0].type
    add_before(graph, node, tape)
    fresh = [output, k, v]
    for old, new in zip(node.outputs, fresh, strict=False):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return None


def _split(graph: ir.Graph, value: ir.Value, heads: int, attention: ir.Node) -> ir.Value | Mismatch:
    """``value[B, S, heads * d]`` as ``[B, heads, S, d]``: rotary embedding, if it was the last thing done, is done after the split."""
    width = None if value.shape is None else value.shape[-1]
    if not isinstance(width, int) or width % heads:
        return Mismatch(f"{value.name!r} has shape {value.shape}, expected a width that {heads} heads share", at(attention))
    joined = producer(value, "Reshape")
    turned = producer(joined.inputs[0], "Transpose") if joined is not None else None
    if turned is not None and turned.attributes.get_ints("perm") == _TURN and turned.inputs[0] is not None:
        return turned.inputs[0]  # it was split already
    rotary = producer(value, "RotaryEmbedding")
    whole = value if rotary is None else rotary.inputs[0]
    if whole is None or whole.shape is None or len(whole.shape) != 3:
        return Mismatch(f"{value.name!r} is not embedded on three axes", at(rotary))
    tape = Tape()
    split = tape.op("Reshape", [whole, integer_constant(tape, [0, 0, heads, width // heads])])
    result = tape.op("Transpose", [split], {"perm": _TURN})
    shape = ir.Shape([whole.shape[0], heads, whole.shape[1], width // heads])
    split.type = result.type = value.type
    split.shape, result.shape = ir.Shape([whole.shape[0], whole.shape[1], heads, width // heads]), shape
    if rotary is not None:
        kept = {name: attribute for name, attribute in rotary.attributes.items() if name != "num_heads"}
        result = tape.op("RotaryEmbedding", [result, *rotary.inputs[1:]], kept)
        result.shape, result.type = shape, value.type
    add_before(graph, attention if rotary is None else rotary, tape)
    return result
