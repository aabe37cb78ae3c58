"""Rotary embedding spelled out with tables that were cast or scaled, as one operator; the plain spelling is onnxscript's own to fuse.

Before::

    x * unsqueeze(cos[B, S, d]) + concat(-x2, x1) * unsqueeze(sin[B, S, d])

After::

    RotaryEmbedding(x, cos[..., :d/2], sin[..., :d/2])
"""

from __future__ import annotations

from itertools import permutations

import onnx_ir as ir
from onnx_ir.tape import Tape

from sievert.graph_passes.foreign.match import add_before, integer_constant, integers, nodes_of, producer, scalar


def fuse_rotary(model: ir.Model) -> int:
    """Replace every such sum; gives how many. What is spelled in another way stays, and is named where q or k is looked for behind it."""
    halves: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in nodes_of(model.graph, "Add"):
        found = _match(node)
        if found is None:
            continue
        x, tables, heads = found
        for table in tables:
            if table not in halves:
                halves[table] = _take_half(model.graph, table, x)
        tape = Tape()
        embedded = tape.op("RotaryEmbedding", [x, *(halves[table] for table in tables)], {"interleaved": 0, "num_heads": heads})
        embedded.shape, embedded.type = node.outputs[0].shape, node.outputs[0].type
        add_before(model.graph, node, tape)
        ir.convenience.replace_all_uses_with(node.outputs[0], embedded, replace_graph_outputs=True)
        count += 1
    return count


def _match(add: ir.Node) -> tuple[ir.Value, tuple[ir.Value, ir.Value], int] | None:
    """What is embedded, ``x[B, H, S, d]``, the tables of cosines and sines, and ``H``."""
    for first, second in permutations(add.inputs):
        straight, turned = producer(first, "Mul"), producer(second, "Mul")
        if straight is None or turned is None:
            continue
        for x, cos in permutations(straight.inputs):
            for rotated, sin in permutations(turned.inputs):
                if x is None or x.shape is None or len(x.shape) != 4 or not _is_rotated(rotated, x):
                    continue
                tables = _table(cos, "Cos"), _table(sin, "Sin")
                heads = x.shape[1]
                if tables[0] is not None and tables[1] is not None and isinstance(heads, int):
                    return x, (tables[0], tables[1]), heads
    return None


def _is_rotated(value: ir.Value | None, x: ir.Value) -> bool:
    """Whether ``value`` is ``[-x2, x1]`` of the two halves of ``x``."""
    joined = producer(value, "Concat")
    size = x.shape[3] if x.shape is not None else None
    if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) not in (-1, 3) or not isinstance(size, int):
        return False
    negated, first = producer(joined.inputs[0], "Neg"), producer(joined.inputs[1], "Slice")
    second = producer(negated.inputs[0], "Slice") if negated is not None else None
    return _cuts(first, x, 0, size // 2, size) and _cuts(second, x, size // 2, size, size)


def _cuts(node: ir.Node | None, x: ir.Value, start: int, end: int, size: int) -> bool:
    """Whether a Slice takes the elements ``start`` to ``end`` of the last of four axes."""
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    starts, ends, axes = (integers(value) for value in node.inputs[1:4])
    steps = integers(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    return starts == (start,) and ends is not None and min(ends[0], size) == end and axes in ((3,), (-1,)) and steps == (1,)


def _table(value: ir.Value | None, function: str) -> ir.Value | None:
    """The table ``[B, S, d]`` behind its axis of heads, if it is ``function`` of angles that are the same in both halves."""
    node = producer(value, "Unsqueeze")
    if node is None or integers(node.inputs[1]) != (1,):
        return None
    table = current = node.inputs[0]
    while (above := producer(current, "Cast", "Mul")) is not None:
        if above.op_type == "Mul" and scalar(above.inputs[1]) is None:
            return None
        current = above.inputs[0]
    applied = producer(current, function)
    angles = producer(applied.inputs[0], "Concat") if applied is not None else None
    repeated = angles is not None and len(angles.inputs) == 2 and angles.inputs[0] is angles.inputs[1]
    return table if repeated else None


def _take_half(graph: ir.Graph, table: ir.Value, x: ir.Value) -> ir.Value:
    assert x.shape is not None and isinstance(x.shape[3], int)  # noqa: S101 - _is_rotated has looked
    place = table.producer()
    assert place is not None  # noqa: S101 - it is computed
    tape = Tape()
    bounds = [integer_constant(tape, [number]) for number in (0, x.shape[3] // 2, -1)]
    half = tape.op("Slice", [table, *bounds])
    half.type = table.type
    if table.shape is not None:
        half.shape = ir.Shape([*list(table.shape)[:-1], x.shape[3] // 2])
    for each in tape.nodes:
        each.metadata_props.update(place.metadata_props)
    graph.insert_after(place, tape.nodes)
    return half
