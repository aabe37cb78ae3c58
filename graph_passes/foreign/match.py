"""What a search in a foreign graph gives where it does not find what it looks for, and the small steps all searches take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape


@dataclass(frozen=True)
class Mismatch:
    """Why something is not what was looked for, and the node or value where that showed."""

    reason: str
    culprit: str

    def __str__(self) -> str:
        return f"{self.reason} (at {self.culprit})"


def at(node: ir.Node | None) -> str:
    """A node as users find it in a viewer."""
    return "an input or a constant of the graph" if node is None else f"{node.op_type} node {node.name!r}"


def constant(value: ir.Value | None) -> NDArray[np.generic] | None:
    """The content of a small constant or initializer; None for weights and for what is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and tensor.size <= 64 else None


def scalar(value: ir.Value | None) -> float | None:
    """The number that ``value`` is, if it is one."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The list of whole numbers that ``value`` is, if it is one."""
    array = constant(value)
    return None if array is None or array.dtype.kind not in "iu" else tuple(int(number) for number in array.reshape(-1))


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that computes ``value``, if it is one of ``ops``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in ops else None


def ancestors(values: Iterable[ir.Value]) -> set[ir.Value]:
    """Everything whose *content* the values depend on, themselves included; what only a Shape is taken of does not count."""
    found: set[ir.Value] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in found:
            continue
        found.add(value)
        node = value.producer()
        if node is not None and node.op_type != "Shape":
            stack.extend(each for each in node.inputs if each is not None)
    return found


def inputs_behind(graph: ir.Graph, values: Iterable[ir.Value]) -> list[ir.Value]:
    """The graph's inputs among the ancestors, in the graph's order."""
    behind = ancestors(values)
    return [value for value in graph.inputs if value in behind and not value.is_initializer()]


def nodes_of(graph: ir.Graph, *ops: str) -> Iterator[ir.Node]:
    """The graph's nodes of these kinds, in a list of its own: the graph may change meanwhile."""
    yield from [node for node in graph if node.op_type in ops]


def symbolic(value: ir.Value, *axes: int | str) -> ir.Value:
    """``value`` with this shape."""
    value.shape = ir.Shape(axes)
    return value


def add_before(graph: ir.Graph, place: ir.Node, tape: Tape) -> None:
    """Put what ``tape`` holds in front of ``place``; nodes carry the module path of ``place``."""
    for node in tape.nodes:
        node.metadata_props.update(place.metadata_props)
    graph.insert_before(place, tape.nodes)


def insert_first(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Put nodes that read inputs and constants only in front of all others."""
    first = next(iter(graph))
    graph.insert_before(first, nodes)


def integer_constant(tape: Tape, numbers: Sequence[int]) -> ir.Value:
    """A list of int64 as a node, so that no initializer needs a name."""
    return tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})
