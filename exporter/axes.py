"""Rotary tables of positions with several axes (time, height, width), in one form whatever way the model spells them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import InPlacePass, PassResult
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError

_TABLES = ("Cos", "Sin")
_SHAPING = ("Cast", "Expand", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class GatherPositions(InPlacePass):
    """Each frequency takes the positions of its own axis before the angle is made, not its cosine out of those of all axes.

    Before::

        position_ids[A, B, S] * inv_freq[f] -> cos[A, B, S, f] -> slices, scatters, concats -> [B, S, f] -> both halves [B, S, 2f]

    After::

        position_ids[A, B, S] -> Gather(axis of each frequency) [f, B, S] -> [B, S, f] * inv_freq[f] -> both halves -> cos[B, S, 2f]

    That is a third of the cosines, and no scatter. Which axis a frequency takes is read off by running the nodes in between on
    elements that are all different, so that sections, interleaving and whatever comes next need no pattern each. Models with one
    axis are left alone.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite each table."""
        modified = False
        for node in [node for node in model.graph if _repeats_halves(node)]:
            half = _given(node, 0)
            origin = _find_origin(half)
            if origin is not None:
                _rewrite(model, node, half, origin)
                modified = True
        return PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No table of several axes is left in use.

        Raises:
            GraphError: one is; the message names it.
        """
        for node in model.graph:
            value = node.outputs[0]
            if node.op_type in _TABLES and value.shape is not None and len(value.shape) == 4 and any(_live(value)):
                raise GraphError(f"the rotary table {value.name!r} of shape {value.shape} is put together in a way that is not known")


def _repeats_halves(node: ir.Node) -> bool:
    used = bool(node.outputs[0].uses())  # one that was rewritten is left behind unused
    return used and node.op_type == "Concat" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _find_origin(half: ir.Value) -> ir.Value | None:
    """The one value ``[A, B, S, f]`` that a half table ``[B, S, f]`` is put together from, if that comes from a cosine or sine."""
    origins: set[ir.Value] = set()
    seen, stack = {half}, [half]
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None:
            if value.const_value is None:
                return None
        elif node.op_type in (*_TABLES, "Mul"):
            origins.add(value)
        else:
            new = [each for each in node.inputs if each is not None and each not in seen]
            seen.update(new)
            stack.extend(new)
    origin = origins.pop() if len(origins) == 1 else None
    several = origin is not None and origin.shape is not None and len(origin.shape) == 4
    return origin if several and half is not origin else None


def _rewrite(model: ir.Model, node: ir.Node, half: ir.Value, origin: ir.Value) -> None:
    """Replace the output of ``node``, both halves of a table."""
    function, factor = _split_factor(origin)
    angles = _given(function, 0).producer()
    inverse = None if angles is None or angles.op_type != "Mul" else ir.convenience.get_const_tensor(_given(angles, 1))
    if angles is None or inverse is None or inverse.size != _size(half, 2):
        raise GraphError(f"the angles of {function.op_type} {function.name!r} are no positions times {half.shape} frequencies")
    positions = _find_positions(_given(angles, 0), model.graph)
    axes = _read_axes(model, origin, half)
    # In a graph of its own first: there the builder's names cannot meet those of the traced graph.
    added = ir.Graph([], [], nodes=[], opset_imports=dict(model.graph.opset_imports), name="axes")
    op: Any = GraphBuilder(added).op
    gathered = op.Gather(positions, op.Constant(value=ir.tensor(axes)), axis=0)  # [f, B, S]
    chosen = op.Cast(op.Transpose(gathered, perm=[1, 2, 0]), to=ir.DataType.FLOAT)  # [B, S, f]
    angle = op.Mul(chosen, angles.inputs[1])
    table = getattr(op, function.op_type)(op.Concat(angle, angle, axis=-1))  # [B, S, 2f]
    if factor is not None:
        table = op.Mul(table, factor)
    nodes, old = list(added), node.outputs[0]
    added.remove(nodes)
    for number, each in enumerate(nodes):
        each.name = f"{node.name}.axes.{number}"
        each.metadata_props.update(node.metadata_props)
        each.outputs[0].name = f"{old.name}.axes.{number}"
    table.shape, table.type = old.shape, old.type
    model.graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(old, table)


def _split_factor(origin: ir.Value) -> tuple[ir.Node, ir.Value | None]:
    """The node of a table ``function(angles)`` or ``function(angles) * factor``, and the factor."""
    node, factor = origin.producer(), None
    if node is not None and node.op_type == "Mul" and ir.convenience.get_const_tensor(_given(node, 1)) is not None:
        factor, node = node.inputs[1], _given(node, 0).producer()
    if node is None or node.op_type not in _TABLES:
        raise GraphError(f"the rotary table {origin.name!r} comes from {node.op_type if node else 'an input'}, expected a cosine or sine")
    return node, factor


def _find_positions(value: ir.Value, graph: ir.Graph) -> ir.Value:
    """The input ``[A, B, S]`` behind ``[A, B, S, 1]``."""
    current = value
    while (node := current.producer()) is not None and node.op_type in _SHAPING:
        current = _given(node, 0)
    if current not in graph.inputs or current.shape is None or len(current.shape) != 3:
        raise GraphError(f"the angles come from {current.name!r}{current.shape}, expected the positions [axes, batch, sequence]")
    return current


def _read_axes(model: ir.Model, origin: ir.Value, half: ir.Value) -> NDArray[np.int64]:
    """Which axis each frequency is taken from, ``[f]``: the nodes between the two run on elements that are all different."""
    shape = (_size(origin, 0), 2, 3, _size(half, 2))
    elements = np.random.default_rng(0).standard_normal(shape, np.float32)
    graph = ir.convenience.extract(model.graph, [origin], [half])
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=model.ir_version)))
    found = np.asarray(next(iter(evaluator.run(None, {str(origin.name): elements}))))  # [B, S, f]
    taken = np.all(elements == found, axis=(1, 2))  # [A, f]
    if not np.all(taken.sum(0) == 1):
        raise GraphError(f"{half.name!r} mixes the axes of {origin.name!r}: every frequency should come from one axis, unmoved")
    axes: NDArray[np.int64] = taken.argmax(0)
    return axes


def _live(value: ir.Value) -> Iterator[bool]:
    """True for each use that reaches a graph output."""
    seen, stack = {value}, [value]
    while stack:
        current = stack.pop()
        if current.is_graph_output():
            yield True
        new = [output for node, _ in current.uses() for output in node.outputs if output not in seen]
        seen.update(new)
        stack.extend(new)


def _size(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if not isinstance(size, int):
        raise GraphError(f"{value.name!r} has shape {value.shape}: axis {axis} should be a fixed number")
    return size


def _given(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    if value is None:
        raise GraphError(f"{node.op_type} node {node.name!r} misses an input")
    return value
