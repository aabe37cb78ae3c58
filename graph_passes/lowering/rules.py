"""What a lint rule is, and how rules look at a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from sievert.graph_passes.lowering.targets import BUILDERS, Target

Severity = Literal["error", "warning"]
Find = Callable[[ir.Model], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Rule:
    """A condition under which a target refuses a graph or computes something else.

    ``seen`` says where the line lies and what was seen beyond it; ``fix`` what to do. ``find`` yields (node or value, what is there).
    """

    name: str
    seen: str
    fix: str
    find: Find = field(repr=False)
    targets: frozenset[Target] = BUILDERS
    severity: Severity = "error"


def walk_nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Nodes of standard operators, those inside If and Loop bodies too; all of them when no type is named."""
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and (not op_types or node.op_type in op_types):
            yield node


def where(node: ir.Node) -> str:
    """How findings name a node."""
    return f"{node.op_type} {node.name or node.outputs[0].name}"


def get_input(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index`` of a node, None where it has none."""
    return node.inputs[index] if index < len(node.inputs) else None


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as numbers; None where it is not known or not fixed."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(size) for size in value.shape.numpy())
