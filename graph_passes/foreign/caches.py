"""Caches that a tool's graph takes: it is entered with none, so that what is written to a cache is the fresh keys and values alone.

Before::

    past[B, G, P, d], k[B, G, S, d] -> Concat -> present[B, G, P + S, d] -> attention

After::

    k[B, G, S, d] -> attention, present
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.tape import Tape

from sievert.graph_passes.foreign.match import Mismatch, add_before, at, integer_constant, nodes_of

_PAST_KEY, _PAST_VALUE = 4, 5
"""Inputs of the operator Attention."""


@dataclass(frozen=True)
class Past:
    """A cache input of the source: its name and ``[kv heads, head size]``."""

    name: str
    heads: int
    size: int


def find_past(graph: ir.Graph) -> tuple[list[ir.Value], Mismatch | None]:
    """Inputs that are a layer's cache, by what reads them."""
    found: list[ir.Value] = []
    for value in graph.inputs:
        readers = [(node, place) for node, place in value.uses() if node.op_type != "Shape"]
        joins = [node for node, place in readers if node.op_type == "Concat" and place == 0 and len(node.inputs) == 2]
        inside = [node for node, place in readers if node.op_type == "Attention" and place in (_PAST_KEY, _PAST_VALUE)]
        if not joins and not inside:
            if value.dtype is not None and value.dtype.is_floating_point() and value.shape is not None and len(value.shape) == 4:
                where = at(readers[0][0]) if readers else f"input {value.name!r}"
                return found, Mismatch(
                    f"the cache {value.name!r} is not joined to fresh keys or values by a Concat or in Attention; a cache of fixed length, "
                    "written by row, is not supported: export with a dynamic cache or without one",
                    where,
                )
            continue
        if len(joins) + len(inside) != len(readers):
            return found, Mismatch(f"the cache {value.name!r} is read in more than one way", at(readers[0][0]))
        found.append(value)
    return found, None


def cut_past(model: ir.Model) -> Mismatch | list[Past]:
    """Take the caches out of the inputs; their shape, where it is read, is that of empty ones."""
    graph = model.graph
    values, wrong = find_past(graph)
    if wrong is not None:
        return wrong
    cut = []
    for value in values:
        shape = value.shape
        if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int):
            return Mismatch(f"the cache {value.name!r} has shape {shape}, expected [batch, kv heads, rows, size]", "an input")
        cut.append(Past(str(value.name), shape[1], shape[3]))
    for value in values:
        for node in nodes_of(graph, "Concat"):
            if node.inputs and node.inputs[0] is value:
                if node.attributes.get_int("axis", 0) not in (2, -2) or node.inputs[1] is None:
                    return Mismatch(f"the cache {value.name!r} is joined along another axis than its rows", at(node))
                ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[1], replace_graph_outputs=True)
                graph.remove(node, safe=True)
    batch = _find_batch(graph, values)
    if batch is None:
        return Mismatch("no input but caches to read the batch from", "the model")
    for value, past in zip(values, cut, strict=True):
        for node, _ in list(value.uses()):
            if node.op_type == "Shape":
                _replace_shape(graph, node, batch, past)
    return cut


def drop_past(graph: ir.Graph, cut: list[Past]) -> None:
    """Take the inputs away, once nothing reads them any more."""
    names = {past.name for past in cut}
    for value in [value for value in graph.inputs if value.name in names]:
        graph.inputs.remove(value)


def _find_batch(graph: ir.Graph, past: list[ir.Value]) -> ir.Value | None:
    """An input whose first axis is the batch: of two axes and more, and no cache."""
    known = [value for value in graph.inputs if value not in past and value.shape is not None and len(value.shape) in (2, 3)]
    read = [value for value in known if value.uses()]
    # Ids or embeddings first: an attention mask may be bound to another length.
    return min(read, key=lambda value: "mask" in str(value.name), default=None)


def _replace_shape(graph: ir.Graph, node: ir.Node, batch: ir.Value, past: Past) -> None:
    """``Shape(past, start, end)`` as that of an empty cache: ``[batch, kv heads, 0, size]``."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    start, end = (number + 4 if number < 0 else min(number, 4) for number in (start, end))
    tape = Tape()
    sizes: list[ir.Value] = []
    for axis in range(start, end):
        number = {1: past.heads, 2: 0, 3: past.size}.get(axis)
        sizes.append(tape.op("Shape", [batch], {"start": 0, "end": 1}) if number is None else integer_constant(tape, [number]))
    shape = sizes[0] if len(sizes) == 1 else tape.op("Concat", sizes, {"axis": 0})
    shape.shape, shape.type = ir.Shape([end - start]), ir.TensorType(ir.DataType.INT64)
    add_before(graph, node, tape)
    ir.convenience.replace_all_uses_with(node.outputs[0], shape, replace_graph_outputs=True)
    graph.remove(node, safe=True)
